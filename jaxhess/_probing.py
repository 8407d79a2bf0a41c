"""How the traces of all layers are drawn: with products of the whole net, with factors of G, and in sweeps forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._allocation import share_out
from jaxhess._checks import NotFiniteError, is_traced
from jaxhess._diagnosis import why_not_finite
from jaxhess._samples import FactorSamples, ProductSamples, Samples
from jaxhess._sweep import Sweep
from jaxhess._trees import automatic, sampler
from jaxhess.estimates import Estimate, Plan
from jaxhess.objective import Objective
from jaxhess.operators import product_at
from jaxhess.problem import Problem
from jaxhess.selections import Layer

Traces = dict[str, Estimate]


def by_probes(
    problem: Problem,
    curvature: str,
    layers: Sequence[Layer],
    key: jax.Array,
    plan: Plan,
    probe: str,
    method: str = "hutchinson",
    scales: np.ndarray | None = None,
) -> Traces:
    """Of some layers, and of the sum over these."""
    names = [*(layer.name for layer in layers), "total"]
    samples = _samples(problem, curvature, layers, probe, method)
    more = () if scales is None else (scales,)

    def draw(keys):
        return problem.mean(samples, lambda number: (samples.keys_of_batch(keys, number), *more))

    why = partial(why_not_finite, curvature, problem.loss, problem.params, problem.batch)
    return dict(zip(names, plan.estimate(draw, why, key, names), strict=True))


def to_tolerance(
    problem: Problem,
    curvature: str,
    key: jax.Array,
    plan: Plan,
    probe: str,
    known: Traces | None = None,
    scales: np.ndarray | None = None,
) -> Traces:
    """By probes of all layers and of single ones, to a tolerance; of those layers whose values they add to."""
    known = known or zeros(problem, "hutchinson")
    layers = tuple(layer for layer in problem.layers if layer.name in known)
    samples = _samples(problem, curvature, layers, probe, "hutchinson")

    def draw(keys, only):
        return problem.mean(samples, lambda number: (keys, scales, jnp.int32(only)))

    found = share_out(draw, key, plan, list(known.values()))
    return dict(zip(known, _finite(problem, curvature, known, found), strict=True))


def by_sweeps(problem: Problem, sweep: Sweep, key: jax.Array, plan: Plan, probe: str, known: Traces) -> Traces:
    """Known values plus Tr(H_l), of those layers that have an H."""
    names = [*(layer.name for layer in problem.layers), "total"]
    products: Any = None
    bends: Any = None

    def draw(keys, only=-1):
        nonlocal products, bends
        if only < 0:
            samples, bends = sweep.draw(keys)
            return samples
        products = products or _samples(problem, "functional", problem.layers, probe, "hutchinson")
        return problem.mean(products, lambda number: (keys, None, jnp.int32(only)))

    if plan.adaptive:
        found = share_out(draw, key, plan, [known[name] for name in names], sweep.price)
        found = _finite(problem, "functional", names, found)
    else:
        plan = dataclasses.replace(plan, num_probes=sweep.count(plan.num_probes))
        why = partial(why_not_finite, "functional", problem.loss, problem.params, problem.batch)
        found = [known[name].plus(e) for name, e in zip(names, plan.estimate(draw, why, key, names), strict=True)]
    return {name: e for name, e, bent in zip(names, found, bends, strict=True) if bent}


def zeros(problem: Problem, method: str) -> Traces:
    """Of no curvature."""
    return {name: Estimate(0.0, 0.0, 0, method) for name in (*(layer.name for layer in problem.layers), "total")}


def _finite(problem, curvature, names, found):
    """The estimates; NotFiniteError if one is not finite."""
    if bad := [name for name, e in zip(names, found, strict=True) if not np.isfinite(e.mean)]:
        why = why_not_finite(curvature, problem.loss, problem.params, problem.batch)
        raise NotFiniteError(f"probes gave values that are not finite for {bad}: {why}")
    return found


def _samples(problem, curvature, layers, probe, method) -> Samples:
    criterion = problem.factored() if curvature == "ggn" else None
    if criterion is None:
        at = product_at(curvature, problem, problem.whole)
        return ProductSamples(at, layers, sampler(probe), problem.covered)
    leaves = jax.tree.leaves((problem.params, problem.first))
    groups = method == "auto" and not is_traced(leaves) and all(automatic(x) is x for x in leaves)
    objective = Objective(problem.loss.predict, criterion)
    of_examples = problem.of_examples if groups else None
    return FactorSamples(objective, layers, sampler(probe), problem.covered, of_examples)
