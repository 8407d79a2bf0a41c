"""The products of all diagonal blocks of a curvature at once, and recurrences that advance together by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxhess._checks import NotFiniteError
from jaxhess._curves import curves_of, leaves_of, tape_of
from jaxhess._diagnosis import why_not_finite
from jaxhess._lanczos import Steps
from jaxhess._linear import Linear
from jaxhess._programs import array_bytes, program
from jaxhess._sweep import NO_SWEEP, room_for, twice_differentiated
from jaxhess._trees import full_precision, jitter, on_cpu, spread, take_row, tree_bytes
from jaxhess.logits import Logits
from jaxhess.objective import as_criterion
from jaxhess.operators import linearize
from jaxhess.problem import Problem
from jaxhess.selections import Layer

PyTree = Any
_ROOM = 2**30  # bytes of what is kept for the products, and of all bases
_CACHED = 2**21  # bytes of the widest array, up to which layers go side by side on a CPU


@dataclasses.dataclass(frozen=True)
class Blocks(Linear):
    """(v_l of each layer) -> (A_l v_l of each layer).

    A_l v is the gradient in u of the mixed derivative of p + s u + t v. Those of all layers come from one sweep forward
    and back, in which each layer's part begins and ends at its own parameters.
    """

    curvature: str
    loss: Callable
    layers: tuple[Layer, ...]
    at_a_time: int  # layers that are taken side by side

    @full_precision
    def __call__(self, params, batch, parts):
        leaves, of_ggn = jax.tree.leaves(params), self.curvature == "ggn"
        if of_ggn:
            function = lambda p: self.loss.predict(p, batch)
        else:
            function = twice_differentiated(self.curvature, self.loss, params, batch)
        tape = tape_of(function, params, leaves_of(self.layers))
        (out,) = (tape.values[place] for place in tape.outs)
        slopes = {} if of_ggn else tape.slopes([jnp.ones_like(out)])

        def form(others, layers, parts):
            directions = [[[x[None] for x in jax.tree.leaves(part)] for part in way] for way in (parts, others)]
            curves = curves_of(leaves, layers, *directions)
            if not of_ggn:
                return tape.seconds(curves, slopes, len(layers))[0].sum()
            (found,) = tape.firsts(curves)
            return 0.0 if found is None else self._ggn_form(out, batch, found)

        found = []
        for i in range(0, len(self.layers), self.at_a_time):
            layers, some = self.layers[i : i + self.at_a_time], parts[i : i + self.at_a_time]
            found += jax.grad(lambda others, of=(layers, some): form(others, *of))(jax.tree.map(jnp.zeros_like, some))
        return tuple(found)

    def _ggn_form(self, outputs, batch, found):
        product = partial(as_criterion(self.loss.criterion).hessian_product, outputs, batch)
        tangents, others = (jnp.reshape(x, (-1, *outputs.shape)) for x in found.firsts)
        return jnp.sum(others * jax.vmap(product)(tangents))

    def perturbed(self, key, size, params, batch):
        return Partial(self, jitter(key, params, size), batch)

    def why_not_finite(self, params, batch, parts):
        return why_not_finite(self.curvature, self.loss, params, batch)


def blocks_of(problem: Problem, curvature: str, layers: Sequence[Layer], num_steps: int) -> Any:
    """The linearised operator of all layers, where it can be had, and there is room for it and all bases; else None."""
    layers = tuple(layers)
    likes = tuple(layer.take(problem.params) for layer in layers)
    leaves = jax.tree.leaves(likes)
    if problem.many or len(layers) < 2 or any(map(spread, leaves)) or num_steps * tree_bytes(likes) > _ROOM:
        return None
    if curvature != "hessian" and isinstance(problem.outputs_like, Logits):
        return None
    if not room_for(problem, problem.loss, layers)[0]:
        return None
    made = list(array_bytes(program(problem.loss, problem.params, problem.first)))
    if len(layers) * sum(size * times for size, times in made) > _ROOM:
        return None
    cached = _CACHED if all(map(on_cpu, leaves)) else _ROOM
    blocks = Blocks(curvature, problem.loss, layers, max(1, cached // max(size for size, _ in made)))
    try:
        return linearize(Partial(blocks, problem.params, problem.batch), like=likes)
    except NO_SWEEP:
        return None


def advance(operator: Any, recurrences: Mapping[str, Steps], zeros: Sequence[PyTree]) -> dict[str, Any]:
    """What each recurrence returns, all of them advanced by the products of one operator of all blocks.

    Args:
      operator: as `blocks_of` makes it.
      recurrences: one of each layer, in their order.
      zeros: for each layer zeros like its vectors, for those that have ended.
    """
    waiting, found = {name: next(steps) for name, steps in recurrences.items()}, {}
    while waiting:
        vectors = tuple(waiting.get(name, zero) for name, zero in zip(recurrences, zeros, strict=True))
        products = dict(zip(recurrences, operator(vectors), strict=True))
        for name in list(waiting):
            try:
                waiting[name] = recurrences[name].send(products[name])
            except StopIteration as done:
                found[name] = done.value
                del waiting[name]
            except NotFiniteError:
                why = operator.func.why_not_finite(*operator.args, vectors)
                raise NotFiniteError(f"products of the curvature of {name!r} are not finite: {why}") from None
    return {name: found[name] for name in recurrences}


def products_of_rows(operator: Partial, rows: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The products of rows of vectors of each layer, in float64 on the host; layers may have fewer rows than others."""
    counts = {name: len(jax.tree.leaves(of_layer)[0]) for name, of_layer in rows.items()}
    products = [
        operator(tuple(take_row(of_layer, min(i, counts[name] - 1)) for name, of_layer in rows.items()))
        for i in range(max(counts.values()))
    ]
    found = {}
    for number, (name, count) in enumerate(counts.items()):
        mine = [of_row[number] for of_row in products[:count]]
        found[name] = jax.tree.map(lambda *x: np.stack([np.asarray(part, np.float64) for part in x]), *mine)
    return found
