"""Where a result that is not finite comes from: looked for only after it was found, so that it costs nothing before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linear import not_finite
from jaxhess._products import At
from jaxhess._trees import full_precision
from jaxhess.batches import Batches
from jaxhess.layers import layer_names
from jaxhess.logits import Logits
from jaxhess.objective import Objective, as_criterion
from jaxhess.selections import find_layers, whole_net

PyTree = Any


def why_not_finite(kind: str, loss: Callable, params: PyTree, batch: PyTree) -> str:
    """The first of outputs, loss, slope and second derivative that is not finite, and the layers where."""
    for number, one in enumerate(batch if isinstance(batch, Batches) else [batch]):
        at = f" in batch {number}" if isinstance(batch, Batches) else ""
        if (fault := full_precision(_fault)(kind, loss, params, one)) is not None:
            return fault + at
    return "loss, slope and second derivative are finite, and overflow where they are multiplied; scale the loss down"


def _fault(kind, loss, params, batch):
    if isinstance(loss, Objective):
        outputs = jax.jit(loss.predict)(params, batch)
        rows = ~jnp.isfinite(outputs.features if isinstance(outputs, Logits) else outputs).all(-1)
        if rows.any():
            return f"the outputs of predict are not finite in {int(rows.sum())} of {rows.size} rows{_of_batch(batch)}"
    value, slope = jax.jit(jax.value_and_grad(loss))(params, batch)
    if not jnp.isfinite(value):
        return f"the loss itself is {float(value)}{_of_batch(batch)}"
    layers = find_layers(params, layer_names(params))
    if bad := [layer.name for layer in layers if not_finite(layer.arrays(slope))]:
        return f"the loss is finite, {float(value):.4g}, and its slope is not in layers {bad}{_of_batch(batch)}"
    if bad := [layer.name for layer in layers if not_finite(_product_of_ones(kind, loss, layer, params, batch))]:
        what = "the outputs' slope or the criterion's second derivative" if kind == "ggn" else "its second derivative"
        return f"the loss, {float(value):.4g}, and its slope are finite, and {what} is not in layers {bad}"
    return None


def _of_batch(batch):
    return f" (the batch is not finite at {', '.join(bad)})" if (bad := not_finite(batch)) else ""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _product_of_ones(kind, loss, layer, params, batch):
    """A product with a layer's block; of the Gauss-Newton matrix J' S 1, for which reverse mode is enough."""
    point = layer.take(params)
    if kind != "ggn":
        ones = layer.put(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, point))
        return layer.take(At(kind, loss, whole_net(params))(params, batch, ones))
    outputs, pull = jax.vjp(lambda part: loss.predict(layer.put(params, part), batch), point)
    return pull(as_criterion(loss.criterion).hessian_product(outputs, batch, jax.tree.map(jnp.ones_like, outputs)))
