"""The three products, at a point and in a direction of the whole net or of one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.layers import Layer
from jaxhess.objective import as_criterion

PyTree = Any


def _hessian_product(loss, fill, point, batch, v):
    return jax.jvp(jax.grad(lambda q: loss(fill(q), batch)), (point,), (v,))[1]


def _ggn_product(objective, fill, point, batch, v):
    def predict(q):
        return objective.predict(fill(q), batch)

    outputs, tangent = jax.jvp(predict, (point,), (v,))
    _, pull = jax.vjp(predict, point)
    return pull(as_criterion(objective.criterion).hessian_product(outputs, batch, tangent))[0]


def _functional_product(objective, fill, point, batch, v):
    outputs = objective.predict(fill(point), batch)
    slope = jax.grad(objective.criterion)(outputs, batch)
    return _hessian_product(lambda p, b: jnp.sum(slope * objective.predict(p, b)), fill, point, batch, v)


_PRODUCTS = {"hessian": _hessian_product, "ggn": _ggn_product, "functional": _functional_product}


@dataclasses.dataclass(frozen=True)
class At:
    """``at(params, batch, v)``: one product of one loss with one layer, for one batch; static under ``jit``."""

    curvature: str
    loss: Callable
    layer: Layer

    def __call__(self, params, batch, v):
        point = self.layer.take(params)
        fill = partial(self.layer.put, params)
        return _PRODUCTS[self.curvature](self.loss, fill, point, batch, match(v, point))


def match(v: PyTree, point: PyTree) -> PyTree:
    """v with the dtypes of the point; ValueError where its structure or shapes differ."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (v, point)]
    if structures[0] != structures[1]:
        mine, theirs = (
            [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (v, point)
        )
        differ = sorted(set(mine) ^ set(theirs))[:4] or "in their containers"
        raise ValueError(
            f"v does not match the parameters: the structures differ at {differ}; v must be a pytree like params, "
            f"or like subtree(params, layer) for one layer"
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(point), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            at = jax.tree_util.keystr(path)
            raise ValueError(f"v does not match the parameters at {at!r}: shape {jnp.shape(a)}, theirs {jnp.shape(b)}")
        if jnp.issubdtype(jnp.result_type(a), jnp.complexfloating):
            raise TypeError(f"v is complex at {jax.tree_util.keystr(path)!r}; take the products of its two parts")
    return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), v, point)
