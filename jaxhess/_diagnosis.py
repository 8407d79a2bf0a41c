"""Where a result that is not finite comes from: looked for only after it was found, so that it costs nothing before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.batches import Batches
from jaxhess.layers import find_layers, layer_names
from jaxhess.objective import Objective, output_hessian_product
from jaxhess.operators import _OverBatches, _Product, source

PyTree = Any


class NotFiniteError(ValueError):
    """A result that is not finite."""


def why_not_finite(kind: str, loss: Callable, params: PyTree, batch: PyTree) -> str:
    """The first of outputs, loss, slope and second derivative that is not finite, and the layers where."""
    for number, one in enumerate(batch if isinstance(batch, Batches) else [batch]):
        at = f" in batch {number}" if isinstance(batch, Batches) else ""
        with jax.default_matmul_precision("float32"):
            if (fault := _fault(kind, loss, params, one)) is not None:
                return fault + at
    return "loss, slope and second derivative are finite, and overflow where they are multiplied; scale the loss down"


def why_product_not_finite(operator: Callable, v: PyTree) -> str:
    """The same of a product: of one of this library's the cause, of others the places of the entries."""
    made = source(operator)
    if isinstance(made.func, _OverBatches):
        product = made.func.product
        return why_not_finite(product.kind, product.loss, made.args[0], made.func.batches)
    if isinstance(made.func, _Product):
        return why_not_finite(made.func.kind, made.func.loss, *made.args)
    bad = _not_finite(operator(v))
    if not bad:
        return "its entries are, and their squares overflow; scale the operator down"
    return "look for overflow or NaN in the operator" + (f", at {', '.join(bad)}" if any(bad) else "")


def _fault(kind, loss, params, batch):
    if isinstance(loss, Objective):
        rows = ~jnp.isfinite(jax.jit(loss.predict)(params, batch)).all(-1)
        if rows.any():
            return f"the outputs of predict are not finite in {int(rows.sum())} of {rows.size} rows{_of_batch(batch)}"
    value, slope = jax.jit(jax.value_and_grad(loss))(params, batch)
    if not jnp.isfinite(value):
        return f"the loss itself is {float(value)}{_of_batch(batch)}"
    layers = find_layers(params, layer_names(params))
    if bad := [layer.name for layer in layers if _not_finite(layer.arrays(slope))]:
        return f"the loss is finite, {float(value):.4g}, and its slope is not in layers {bad}{_of_batch(batch)}"
    if bad := [layer.name for layer in layers if _not_finite(_product_of_ones(kind, loss, layer, params, batch))]:
        what = "the outputs' slope or the criterion's second derivative" if kind == "ggn" else "its second derivative"
        return f"the loss, {float(value):.4g}, and its slope are finite, and {what} is not in layers {bad}"
    return None


def _of_batch(batch):
    return f" (the batch is not finite at {', '.join(bad)})" if (bad := _not_finite(batch)) else ""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _product_of_ones(kind, loss, layer, params, batch):
    """A product with a layer's block; of the Gauss-Newton matrix J' S 1, for which reverse mode is enough."""
    point = layer.take(params)
    if kind != "ggn":
        ones = layer.put(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, point))
        return layer.take(_Product(kind, loss, None)(params, batch, ones))
    outputs, pull = jax.vjp(lambda part: loss.predict(layer.put(params, part), batch), point)
    return pull(output_hessian_product(loss.criterion, outputs, batch, jnp.ones_like(outputs)))


def _not_finite(tree):
    """The places of the arrays of a tree that are not finite."""
    return [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and not jnp.isfinite(x).all()
    ]
