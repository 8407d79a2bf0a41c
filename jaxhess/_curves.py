"""Second derivatives of a function along many directions, each in one layer, in one sweep forward.

A direction in a layer moves nothing before that layer. So an operation is differentiated along the directions of those
layers only whose parameters reach it: about half of the work of taking every layer through the whole net, in a program
as long as that of one. The interpreter is of the kind that JAX's documentation describes under custom interpreters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxhess._programs import used_inputs

# Calls whose inside is taken operation by operation. Those with rules of their own for derivatives are left whole.
_OPENED = frozenset("jit pjit closed_call core_call checkpoint remat remat2".split())
# Those that bend nothing, and those that are linear in each of their inputs: no trace is needed to tell.
_LINEAR = frozenset(
    "add add_any broadcast_in_dim concatenate convert_element_type copy cumsum dynamic_slice expand_dims gather imag "
    "neg pad real reduce_sum reshape rev select_n slice squeeze sub transpose".split()
)
_BILINEAR = frozenset("conv_general_dilated dot_general mul".split())


class Curve(NamedTuple):
    """The derivatives of x(p + s u + t v) at 0, for directions u and v in each of several layers; often u is v.

    Attributes:
      layers: whose directions move x, by number.
      firsts: those along each of the directions, (layers, probes, *x.shape); one array if they are the same.
      second: the mixed one, likewise, or x.shape if only the sum over layers and probes is asked for; None for zero.
      bent: the layers whose second derivatives need not vanish.
    """

    layers: tuple[int, ...]
    firsts: tuple[jax.Array, ...]
    second: jax.Array | None = None
    bent: frozenset[int] = frozenset()


def second_order(
    function: Callable, args: Sequence[Any], curves: Sequence[Curve | None], seconds: str = "each"
) -> list[Curve | None]:
    """The curves of the outputs of a function, from those of its arguments.

    Args:
      function: ``function(*args) -> arrays``, a pytree of them.
      args: arrays.
      curves: of each argument; None for one that does not move.
      seconds: which second derivatives are asked for: those of "each" layer; their "sum" over all layers, which takes
        one pass forward; or "none".

    Returns:
      For each output; None for one that does not move.

    Raises:
      What JAX raises where an operation has no derivatives in forward mode.
    """
    closed = jax.make_jaxpr(function)(*args)
    return _walk(getattr(closed, "jaxpr", closed), closed.consts, args, curves, seconds)[1]


def _walk(jaxpr, consts, args, curves, seconds):
    """The outputs of a jaxpr, and their curves."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    moving = {var: curve for var, curve in zip(jaxpr.invars, curves, strict=True) if curve is not None}

    def read(variables):
        known = [var.val if isinstance(var, Literal) else values[var] for var in variables]
        return known, [None if isinstance(var, Literal) else moving.get(var) for var in variables]

    for eqn in jaxpr.eqns:
        ins, moves = read(eqn.invars)
        inner = _inner(eqn)
        if inner is None:
            outs, moved = _apply(eqn, ins, moves, seconds)
        else:
            outs, moved = _walk(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), ins, moves, seconds)
        values.update(zip(eqn.outvars, outs, strict=True))
        moving.update((var, curve) for var, curve in zip(eqn.outvars, moved, strict=True) if curve is not None)
    return read(jaxpr.outvars)


def _inner(eqn):
    """The jaxpr of an operation that is nothing but a call of it, else None."""
    found = [x for x in eqn.params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")]
    return found[0] if eqn.primitive.name in _OPENED and len(found) == 1 else None


def _bind(eqn, ins):
    """The outputs of one operation, as a list."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # JAX before 0.8 tells them apart
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*functions, *ins, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _apply(eqn, ins, curves, seconds):
    """The outputs of an operation, and their curves."""
    outs = _bind(eqn, ins)
    smooth = [i for i, x in enumerate(outs) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    moved: list[Curve | None] = [None] * len(outs)
    local = partial(_Local, eqn, ins, smooth)
    parts = [_along(local(places), curves, layers, seconds) for places, layers in _classes(curves).items()]
    for number, i in enumerate(smooth if parts else ()):
        moved[i] = _joined([part[number] for part in parts], seconds == "sum")
    pushed = tuple(i for i, curve in enumerate(curves) if curve is not None and curve.second is not None)
    if seconds == "sum" and pushed:
        for i, more in zip(smooth, local(pushed).slope(*(curves[i].second for i in pushed)), strict=True):
            moved[i] = moved[i]._replace(second=more if moved[i].second is None else more + moved[i].second)
    return outs, moved


class _Local(NamedTuple):
    """An operation as a function of some of its inputs, with its smooth outputs."""

    eqn: Any
    ins: Sequence[Any]
    smooth: list[int]
    places: tuple[int, ...]

    def __call__(self, *moved):
        at = dict(zip(self.places, moved, strict=True))
        outs = _bind(self.eqn, [at.get(i, x) for i, x in enumerate(self.ins)])
        return [outs[i] for i in self.smooth]

    @property
    def point(self):
        return tuple(self.ins[i] for i in self.places)

    def slope(self, *v):
        return jax.jvp(self, self.point, v)[1]

    def bend(self, *both):
        """The second derivative along two directions, one after the other in ``both``."""
        v, u = both[: len(self.places)], both[-len(self.places) :]
        return jax.jvp(lambda *x: jax.jvp(self, x, v)[1], self.point, u)[1]

    def bends(self):
        """Whether the second derivative depends on the direction: if not, it is zero."""
        if self.eqn.primitive.name in _LINEAR:
            return False
        if self.eqn.primitive.name in _BILINEAR:
            return len(self.places) > 1
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in self.point]
        closed = jax.make_jaxpr(self.bend)(*shapes)
        return any(used_inputs(getattr(closed, "jaxpr", closed)))


def _classes(curves):
    """{the inputs that the directions of some layers move: these layers}."""
    moved: dict[int, list[int]] = {}
    for i, curve in enumerate(curves):
        for layer in () if curve is None else curve.layers:
            moved.setdefault(layer, []).append(i)
    classes: dict[tuple[int, ...], list[int]] = {}
    for layer, places in moved.items():
        classes.setdefault(tuple(places), []).append(layer)
    return classes


def _along(local, curves, layers, wanted):
    """The curves of the outputs of an operation for the directions of some layers."""
    some = [_of_layers(curves[i], layers, wanted == "each") for i in local.places]
    directions = list(zip(*(curve.firsts for curve in some), strict=True))
    firsts = list(zip(*(_over_rows(local.slope, of_inputs) for of_inputs in directions), strict=True))
    bends = wanted != "none" and local.bends()
    seconds = [None] * len(firsts)
    if bends:
        seconds = _over_rows(local.bend, [x for of_inputs in directions for x in of_inputs])
    if wanted == "sum":
        seconds = [None if x is None else x.sum((0, 1)) for x in seconds]
    elif any(curve.second is not None for curve in some):
        pushed = [jnp.zeros_like(c.firsts[0]) if c.second is None else c.second for c in some]
        more = _over_rows(local.slope, pushed)
        seconds = [x if y is None else x + y for x, y in zip(more, seconds, strict=True)]
    bent = frozenset(layers) if bends else _union(some)
    return [Curve(tuple(layers), x, y, bent) for x, y in zip(firsts, seconds, strict=True)]


def _union(curves):
    return frozenset().union(*(curve.bent for curve in curves))


def _of_layers(curve, layers, with_second):
    """The curve for some of its layers."""
    at = [curve.layers.index(layer) for layer in layers]
    cut = slice(at[0], at[-1] + 1) if at == list(range(at[0], at[-1] + 1)) else jnp.array(at)
    second = curve.second[cut] if with_second and curve.second is not None else None
    return Curve(tuple(layers), tuple(x[cut] for x in curve.firsts), second, curve.bent & frozenset(layers))


def _over_rows(function, tangents):
    """A function of tangents over the axes of layers and probes, as one axis."""
    rows = tangents[0].shape[:2]
    found = jax.vmap(function)(*(x.reshape(rows[0] * rows[1], *x.shape[2:]) for x in tangents))
    return [x.reshape(*rows, *x.shape[1:]) for x in found]


def _joined(curves, summed):
    """One curve of those for several layers."""
    layers = tuple(layer for curve in curves for layer in curve.layers)
    firsts = tuple(_stacked(x) for x in zip(*(curve.firsts for curve in curves), strict=True))
    known = [curve.second for curve in curves if curve.second is not None]
    second = None
    if known and summed:
        second = sum(known)
    elif known:
        second = _stacked([jnp.zeros_like(c.firsts[0]) if c.second is None else c.second for c in curves])
    return Curve(layers, firsts, second, _union(curves))


def _stacked(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def curves_of(leaves: Sequence[jax.Array], layers: Sequence[Any], *directions: Sequence[list]) -> list[Curve | None]:
    """How each leaf moves.

    Args:
      leaves: of the parameters.
      layers: `Layer` s, or anything with their pieces.
      directions: one or two; of each, for each layer its arrays, with an axis of probes in front.
    """
    ways = [_spread(leaves, layers, vectors) for vectors in directions]
    curves: list[Curve | None] = []
    for rows in zip(*ways, strict=True):
        firsts = tuple(jnp.stack(list(of_layers.values())) for of_layers in rows if of_layers)
        curves.append(Curve(tuple(rows[0]), firsts) if firsts else None)
    return curves


def _spread(leaves, layers, vectors):
    """For each leaf {number of a layer: how its vectors move the leaf}."""
    moved: list[dict[int, jax.Array]] = [{} for _ in leaves]
    for number, (layer, arrays) in enumerate(zip(layers, vectors, strict=True)):
        for piece, v in zip(layer.pieces, arrays, strict=True):
            if piece.at is not None:  # of which there may be several in one leaf
                before = moved[piece.leaf].get(number, jnp.zeros((len(v), *leaves[piece.leaf].shape), v.dtype))
                v = jax.vmap(partial(_put, piece))(before, v)
            moved[piece.leaf][number] = v
    return moved


def _put(piece, leaf, part):
    return leaf.at[piece.key()].set(part)
