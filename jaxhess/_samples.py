"""Samples of every layer's trace and of their sum: (probes,) keys -> (probes, layers + 1), static under ``jit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._checks import standard_promotion
from jaxhess._examples import cut, fits_into
from jaxhess._products import At
from jaxhess._trees import fold_in, inner, map_rows, random_like, squared_norm, tree_bytes
from jaxhess.objective import Objective
from jaxhess.selections import Layer

PyTree = Any


@dataclasses.dataclass(frozen=True)
class ProductSamples:
    """(v / s)_l . (A (s v))_l of a product with the whole net, for v over all layers or over one of them only.

    A scale s of each layer leaves the mean as it is. The blocks between layers add (s_m / s_l)^2 ||A_lm||_F^2 to the
    variance: without scales, they are most of it where a layer has little curvature of its own.
    """

    at: At
    layers: tuple[Layer, ...]
    distribution: Callable
    covered: bool = True  # whether the layers add up to what is asked of the whole net

    def keys_of_batch(self, keys, number):
        """The same v for every batch: it is v' A v for the mean A."""
        return keys

    def __call__(self, params, batch, keys, scales=None, only=None):
        scale = None if scales is None else self._spread(params, scales)

        def one(key):
            v = random_like(key, params, self.distribution)
            scaled = v if scale is None else jax.tree.map(jnp.multiply, v, scale)
            if only is not None:
                scaled = self._part(scaled, only)
            product_v = self.at(params, batch, scaled)
            if scale is not None:
                product_v = jax.tree.map(lambda x, s: x / jnp.where(s > 0, s, 1), product_v, scale)
            parts = [inner(layer.arrays(v), layer.arrays(product_v)) for layer in self.layers]
            return parts if self.covered else [*parts, inner(v, product_v)]

        return with_total(map_rows(one, keys), self.covered)

    def _spread(self, params, scales):
        """The scale of every parameter. What no layer holds has 1 if the total needs it, and else no probe."""
        tree = jax.tree.map(jnp.zeros_like if self.covered else jnp.ones_like, params)
        for layer, scale in zip(self.layers, scales, strict=True):
            tree = layer.put(tree, jax.tree.map(lambda x, s=scale: jnp.full_like(x, s), layer.take(tree)))
        return tree

    def _part(self, v, only):
        """v in the layer of this index and zero elsewhere, or v for -1."""
        kept = jax.tree.map(lambda x: jnp.full_like(x, only < 0), v)
        for i, layer in enumerate(self.layers):  # one by one: groups may share parameters
            mine = jax.tree.map(lambda x, i=i: jnp.where(only == i, jnp.ones_like(x), x), layer.take(kept))
            kept = layer.put(kept, mine)
        return jax.tree.map(jnp.multiply, v, kept)


@dataclasses.dataclass(frozen=True)
class FactorSamples:
    """Squared norms of (J' B e)_l, summed over groups of examples where these do not depend on each other.

    The squared norm for the whole batch carries the products between examples too, of mean zero: noise.
    """

    objective: Objective
    layers: tuple[Layer, ...]
    distribution: Callable
    covered: bool = True  # whether the layers add up to the whole net
    of_examples: tuple[bool, ...] | None = None  # which arrays of the batch hold an entry for each example

    def keys_of_batch(self, keys, number):
        """A fresh draw for each batch: the estimate is a sum over examples."""
        return fresh(keys, number)

    def __call__(self, params, batch, keys):
        outputs = self.objective.predict(params, batch)

        def one(key):
            noise = self.distribution(key, outputs.shape, outputs.dtype)
            return self.objective.criterion.factor_product(outputs, batch, noise)

        cotangents = jax.vmap(one)(keys)
        count = fits_into(self.of_examples, outputs, len(keys) * tree_bytes(params))
        if count == 1:
            return with_total(self._norms(params, batch, cotangents), self.covered)
        of_groups = jnp.moveaxis(cotangents.reshape(len(keys), count, -1, *outputs.shape[1:]), 1, 0)
        split, join = cut(batch, self.of_examples, count)
        parts = jax.vmap(lambda some, e: self._norms(params, join(some), e))(split, of_groups)
        return with_total([part.sum(0) for part in parts], self.covered)

    def _norms(self, params, batch, cotangents):
        """For each layer (probes,), and for the whole net where the layers do not cover it."""
        pull = jax.vjp(lambda p: self.objective.predict(p, batch), params)[1]

        def one(cotangent):
            (gradient,) = pull(cotangent)
            parts = [squared_norm(layer.arrays(gradient)) for layer in self.layers]
            return parts if self.covered else [*parts, squared_norm(gradient)]

        return jax.vmap(one)(cotangents)


Samples = ProductSamples | FactorSamples


def fresh(keys: jax.Array, number: int | None) -> jax.Array:
    """Keys of a batch of its own, for a number of it."""
    return keys if number is None else jax.vmap(fold_in, (0, None))(keys, number)


@standard_promotion
def with_total(parts: list, covered: bool) -> jax.Array:
    """(probes, layers + 1), with the sum of the layers if the last part is not of the whole net already."""
    samples = jnp.stack(parts, axis=1)
    return jnp.concatenate([samples, samples.sum(1, keepdims=True)], axis=1) if covered else samples
