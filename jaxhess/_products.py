"""The three products, at a point and in a direction of the whole net or of one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._checks import standard_promotion
from jaxhess.logits import Logits
from jaxhess.objective import as_criterion
from jaxhess.selections import Layer

PyTree = Any


# derivative(function, point, v) -> (its value, its derivative along v)


def _hessian_product(derivative, loss, fill, point, batch, v):
    return derivative(jax.grad(lambda q: loss(fill(q), batch)), point, v)[1]


def _ggn_product(derivative, objective, fill, point, batch, v):
    def predict(q):
        return objective.predict(fill(q), batch)

    outputs, tangent = derivative(predict, point, v)
    _, pull = jax.vjp(predict, point)
    return pull(as_criterion(objective.criterion).hessian_product(outputs, batch, tangent))[0]


def _functional_product(derivative, objective, fill, point, batch, v):
    outputs = objective.predict(fill(point), batch)
    if isinstance(outputs, Logits):  # the slope of the logits would be as large as they are
        both = (form(derivative, objective, fill, point, batch, v) for form in (_hessian_product, _ggn_product))
        return jax.tree.map(jnp.subtract, *both)
    slope = jax.grad(objective.criterion)(outputs, batch)
    return _hessian_product(derivative, lambda p, b: jnp.sum(slope * objective.predict(p, b)), fill, point, batch, v)


_PRODUCTS = {"hessian": _hessian_product, "ggn": _ggn_product, "functional": _functional_product}


def _forward(function, point, v):
    return jax.jvp(function, (point,), (v,))


def _central(step, params, function, point, v):
    """(f(p + t v) - f(p - t v)) / 2 t, where t v moves the parameters by a relative ``step``."""
    t = step / relative_norm(v, point, params)
    moved = jax.tree.map(lambda x: t.astype(x.dtype) * x, v)
    there, back = (function(jax.tree.map(move, point, moved)) for move in (jnp.add, jnp.subtract))
    return function(point), jax.tree.map(lambda a, b: (a - b) / (2 * t).astype(a.dtype), there, back)


@standard_promotion
def relative_norm(v: PyTree, point: PyTree, params: PyTree) -> jax.Array:
    """The norm of v, in each array as a share of the norm of the parameters there; 1 for v = 0.

    An array that is small or zero, like a new bias, counts with a tenth of the root mean square of all parameters.
    """
    pairs, every = list(zip(jax.tree.leaves(v), jax.tree.leaves(point), strict=True)), jax.tree.leaves(params)
    mean = sum(jnp.sum(p**2) for p in every) / sum(p.size for p in every)
    mean = jnp.where(mean > 0, mean, 1)
    squares = sum(jnp.sum(x**2) / jnp.maximum(jnp.sum(p**2), 0.01 * mean * p.size) for x, p in pairs)
    return jnp.where(squares > 0, jnp.sqrt(squares), 1)


@dataclasses.dataclass(frozen=True)
class At:
    """``at(params, batch, v)``: one product of one loss with one layer, for one batch; static under ``jit``.

    Attributes:
      step: None for derivatives in forward mode; else the relative step of central differences.
    """

    curvature: str
    loss: Callable
    layer: Layer
    step: float | None = None

    def __call__(self, params, batch, v):
        point = self.layer.take(params)
        v = match(v, point)
        if self.step is None:
            return self._product(_forward, params, batch, v)

        @jax.custom_jvp
        def product(v):
            return self._product(partial(_central, self.step, params), params, batch, v)

        # A linear function is its own derivative.
        product.defjvp(lambda primals, tangents: (product(*primals), product(*tangents)))
        return product(v)

    def _product(self, derivative, params, batch, v):
        fill = partial(self.layer.put, params)
        return _PRODUCTS[self.curvature](derivative, self.loss, fill, self.layer.take(params), batch, v)


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
