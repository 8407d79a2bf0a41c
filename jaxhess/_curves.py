"""Second derivatives of a function along many directions, each in one layer, from one sweep forward.

With the function x_0 -> x_1 -> ..., let dx be the derivative of each x along a direction u, and s_x the slope of the
result in x. The second derivative of the result along u is the sum of s_x . D^2 x[dx, dx] over all operations x, of
which most bend nothing. The slopes are the same for all directions: one pass back. The sweep carries the dx alone.

A direction in a layer moves nothing before that layer. So an operation is differentiated along the directions of those
layers only whose parameters reach it: about half of the work of taking every layer through the whole net, in a program
as long as that of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxhess._checks import at_least_float32, standard_promotion
from jaxhess._programs import used_inputs, work_of

# Calls whose inside is taken operation by operation. Those with rules of their own for derivatives are left whole.
_OPENED = frozenset("jit pjit closed_call core_call checkpoint remat remat2".split())
# Known without a trace: those that are their own derivative, all that bend nothing, and those that are linear in each
# of their inputs.
_OWN_SLOPE = frozenset(
    "broadcast_in_dim convert_element_type copy cumsum dynamic_slice expand_dims imag neg real reduce_sum reshape rev "
    "slice squeeze transpose".split()
)
_LINEAR = _OWN_SLOPE | frozenset("add add_any concatenate gather pad select_n sub".split())
_BILINEAR = frozenset("conv_general_dilated dot_general mul".split())


class Curve(NamedTuple):
    """The first derivatives of x(p + s u + t v) at 0, for directions u and v in each of several layers; often u is v.

    Attributes:
      layers: whose directions move x, by number.
      firsts: those along each of the directions, (layers, probes, *x.shape); one array if they are the same.
    """

    layers: tuple[int, ...]
    firsts: tuple[jax.Array, ...]


class _Step(NamedTuple):
    """An operation on a tape, with the places of what it takes and of what it makes."""

    eqn: Any
    ins: list[int]
    outs: list[int]


@dataclasses.dataclass(frozen=True)
class Tape:
    """The operations of a function at a point, in their order.

    Attributes:
      values: of everything, by its place; the leaves of the parameters come first.
      steps: the operations that something moves through.
      outs: the places of the outputs.
      moving: the places of what moves.
    """

    values: list[Any]
    steps: list[_Step]
    outs: list[int]
    moving: frozenset[int]

    def slopes(self, of_outputs: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """{place: the slope of the result in what lies there}, from those in the outputs: one pass back."""
        found: dict[int, jax.Array] = {}
        for place, slope in zip(self.outs, of_outputs, strict=True):
            _add(found, place, slope)
        for step in reversed(self.steps):
            local = self._local(step, [i for i, place in enumerate(step.ins) if place in self.moving])
            outs = [step.outs[i] for i in local.smooth]
            if any(place in found for place in outs):
                made, back = jax.vjp(local, *local.point)
                known = [found.get(place, jnp.zeros_like(x)) for place, x in zip(outs, made, strict=True)]
                for i, slope in zip(local.places, back(known), strict=True):
                    _add(found, step.ins[i], slope)
        return found

    def firsts(self, curves: Sequence[Curve | None]) -> list[Curve | None]:
        """The curves of the outputs, from those of the leaves; None for one that does not move."""
        moved = self._moved(curves, lambda *_: None)
        return [moved.get(place) for place in self.outs]

    @standard_promotion
    def seconds(
        self, curves: Sequence[Curve | None], slopes: dict[int, jax.Array], count: int
    ) -> tuple[jax.Array, frozenset[int]]:
        """(layers, probes) second derivatives of the result, and the layers for which they need not vanish.

        Args:
          curves: of the leaves.
          slopes: as `slopes` returns them.
          count: the number of layers.
        """
        found: dict[tuple, jax.Array] = {}

        def visit(local, step, some, directions):
            known = [slopes.get(step.outs[i]) for i in local.smooth]
            if all(slope is None for slope in known) or not local.bends():
                return
            for x, slope in zip(_over_rows(local.bend, sum(directions, ())), known, strict=True):
                if slope is not None:  # added up before they are summed: the compiler makes one loop of such products
                    _add(found, (tuple(some), slope.shape), _weighted(x, slope[None, None]))

        self._moved(curves, visit)
        if not found:
            probes = next(curve.firsts[0].shape[1] for curve in curves if curve is not None)
            return jnp.zeros((count, probes)), frozenset()
        sums = jnp.concatenate([_summed(x) for x in found.values()])
        layers = [layer for some, _ in found for layer in some]
        return jax.ops.segment_sum(sums, jnp.array(layers), count), frozenset(layers)

    def _moved(self, curves, visit):
        """{place: its curve}; ``visit(operation, step, layers, directions)`` is called on the way."""
        moved = {place: curve for place, curve in enumerate(curves) if curve is not None}
        for step in self.steps:
            local = self._local(step, ())
            parts = []
            for places, layers in _classes([moved.get(place) for place in step.ins]).items():
                local = local._replace(places=places)
                some = [_of_layers(moved[step.ins[i]], layers) for i in places]
                directions = list(zip(*some, strict=True))
                visit(local, step, layers, directions)
                firsts = list(zip(*(_over_rows(local.slope, of_inputs) for of_inputs in directions), strict=True))
                parts.append([Curve(tuple(layers), x) for x in firsts])
            for number, i in enumerate(local.smooth if parts else ()):
                moved[step.outs[i]] = _joined([part[number] for part in parts])
        return moved

    def _local(self, step, places):
        ins = [self.values[place] for place in step.ins]
        smooth = [i for i, place in enumerate(step.outs) if _is_smooth(self.values[place])]
        return _Local(step.eqn, ins, smooth, tuple(places))


def tape_of(function: Callable, params: Any, moving: Iterable[int]) -> Tape:
    """What a function does.

    Args:
      function: ``function(params) -> arrays``, a pytree of them.
      params: a pytree of arrays.
      moving: the numbers of the leaves that move.
    """
    closed = jax.make_jaxpr(function)(params)
    values: list[Any] = jax.tree.leaves(params)
    steps: list[_Step] = []
    moving = set(moving)

    def put(x):
        values.append(x)
        return len(values) - 1

    def record(jaxpr, consts, at):
        places = dict(zip(jaxpr.constvars, map(put, consts), strict=True)) | dict(zip(jaxpr.invars, at, strict=True))

        def read(variables):
            return [put(var.val) if isinstance(var, Literal) else places[var] for var in variables]

        for eqn in jaxpr.eqns:
            ins, inner = read(eqn.invars), _inner(eqn)
            if inner is not None:
                outs = record(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), ins)
            else:
                outs = [put(x) for x in _bind(eqn, [values[place] for place in ins])]
                if moving.intersection(ins):
                    steps.append(_Step(eqn, ins, outs))
                    moving.update(place for place in outs if _is_smooth(values[place]))
            places.update(zip(eqn.outvars, outs, strict=True))
        return read(jaxpr.outvars)

    outs = record(getattr(closed, "jaxpr", closed), closed.consts, range(len(values)))
    return Tape(values, steps, outs, frozenset(moving))


def work_along(jaxpr: Any, layers: Sequence[Any]) -> tuple[int, int]:
    """The work of a program, and that of carrying one direction in each layer through it, as `work_of` counts it.

    The first inputs of the program are the leaves that the layers move.
    """
    reached: dict[int, set[int]] = {}
    for number, layer in enumerate(layers):
        for leaf in leaves_of([layer]):
            reached.setdefault(leaf, set()).add(number)
    return _work(jaxpr, [reached.get(place, set()) for place in range(len(jaxpr.invars))])[1:]


def _work(jaxpr, of_inputs):
    """The layers that reach each output, the work of a jaxpr, and that of carrying all layers through it."""
    reached, work, carried = dict(zip(jaxpr.invars, of_inputs, strict=True)), 0, 0
    read = lambda variables: [set() if isinstance(var, Literal) else reached.get(var, set()) for var in variables]
    for eqn in jaxpr.eqns:
        ins, inner = read(eqn.invars), _inner(eqn)
        if inner is not None:
            outs, one, all_layers = _work(getattr(inner, "jaxpr", inner), ins)
        else:
            one, joined = work_of(eqn), set().union(*ins)
            rows = sum(map(len, ins)) if eqn.primitive.name in _BILINEAR else len(joined)
            outs, all_layers = [joined] * len(eqn.outvars), one * rows
        work, carried = work + one, carried + all_layers
        reached.update(zip(eqn.outvars, outs, strict=True))
    return read(jaxpr.outvars), work, carried


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


def _is_smooth(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _add(found, place, x):
    found[place] = found[place] + x if place in found else x


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
        name = self.eqn.primitive.name  # tracing jvp takes longer than a rule that is known
        if len(v) == 1 and name in _OWN_SLOPE | _BILINEAR:
            return self(*v)
        return self._mixed(v, self.point) if name in _BILINEAR else jax.jvp(self, self.point, v)[1]

    def bend(self, *both):
        """The second derivative along two directions, one after the other in ``both``."""
        v, u = both[: len(self.places)], both[-len(self.places) :]
        if self.eqn.primitive.name in _BILINEAR:
            return self._mixed(v, u)
        return jax.jvp(lambda *x: jax.jvp(self, x, v)[1], self.point, u)[1]

    def _mixed(self, v, u):
        return [x + y for x, y in zip(self(v[0], u[1]), self(u[0], v[1]), strict=True)]

    def bends(self):
        """Whether the second derivative depends on the direction: if not, it is zero."""
        name = self.eqn.primitive.name
        if name in _LINEAR | _BILINEAR:
            return name in _BILINEAR and len(self.places) > 1
        shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in self.point]
        closed = jax.make_jaxpr(self.bend)(*shapes)
        return any(used_inputs(getattr(closed, "jaxpr", closed)))


def _weighted(rows, slope):
    """Second derivatives times the slope, in float32 at least; infinite ones do not count where it is zero."""
    return jnp.where(slope == 0, 0, rows.astype(at_least_float32(rows)) * slope).real


def _summed(rows):
    """(layers, probes) sums, as a product with ones, which is faster on CPUs."""
    flat = rows.reshape(*rows.shape[:2], -1)
    return jnp.matmul(flat, jnp.ones(flat.shape[2], flat.dtype))


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


def _of_layers(curve, layers):
    """The first derivatives along the directions of some layers."""
    at = [curve.layers.index(layer) for layer in layers]
    cut = slice(at[0], at[-1] + 1) if at == list(range(at[0], at[-1] + 1)) else jnp.array(at)
    return tuple(x[cut] for x in curve.firsts)


def _over_rows(function, tangents):
    """A function of tangents over the axes of layers and probes, as one axis."""
    rows = tangents[0].shape[:2]
    found = jax.vmap(function)(*(x.reshape(rows[0] * rows[1], *x.shape[2:]) for x in tangents))
    return [x.reshape(*rows, *x.shape[1:]) for x in found]


def _joined(curves):
    """One curve of those for several layers."""
    layers = tuple(layer for curve in curves for layer in curve.layers)
    return Curve(layers, tuple(_stacked(x) for x in zip(*(curve.firsts for curve in curves), strict=True)))


def _stacked(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def leaves_of(layers: Iterable[Any]) -> set[int]:
    """The numbers of the leaves that the directions of some layers move."""
    return {piece.leaf for layer in layers for piece in layer.pieces}


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
