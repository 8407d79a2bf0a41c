"""Experiments with jaxhess on real data: train a net, measure the curvature of its layers, draw it."""
