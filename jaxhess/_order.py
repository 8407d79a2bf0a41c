"""Network order: parameters and data followed through the jaxpr of a loss.

The purpose of an inner jaxpr is read off its shapes, because versions of JAX name the parameters differently.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal


class _Tag(NamedTuple):
    """What a value is made of: parameters alone (leaf, scan index or None), or data from the batch too."""

    params: frozenset = frozenset()
    data: bool = False


class _Scanned(NamedTuple):
    """A slice of a leaf, in the body of a scan over it."""

    leaf: int
    scan: object


class _Made(NamedTuple):
    """Of a leaf, and no longer it: slices of the value are no slices of the leaf."""

    leaf: int


# Operations behind which the first axis of a leaf is still its own: conversions, and what acts entry by entry.
_KEEPING = frozenset(
    "convert_element_type copy copy_p reduce_precision optimization_barrier sharding_constraint abs add clamp div exp "
    "integer_pow log logistic max min mul neg pow rsqrt select_n sign sqrt square sub tanh".split()
)


def _leaf(use):
    return use if isinstance(use, int) else use[0]


def first_uses(jaxpr: Any, num_leaves: int) -> list:
    """What joins data first, in order: a leaf's number, or (leaf, slice, its siblings in the scan, length of the scan).

    The first ``num_leaves`` inputs of the jaxpr are parameters, the others data from the batch.
    """
    tags = [_Tag(frozenset([i])) if i < num_leaves else _Tag(data=True) for i in range(len(jaxpr.invars))]
    found: dict = {}  # an ordered set
    _walk(jaxpr, tags, found)
    return list(dict.fromkeys(use.leaf if isinstance(use, _Made) else use for use in found))


def _walk(jaxpr, tags, uses):
    """Tags of the outputs of a jaxpr, given those of its inputs; first uses are added to ``uses`` in order."""
    env = dict(zip(jaxpr.invars, tags, strict=True))

    def read(var):
        return _Tag() if isinstance(var, Literal) else env.get(var, _Tag())

    for eqn in jaxpr.eqns:
        ins = [read(var) for var in eqn.invars]
        outs = _inner(eqn, ins, uses)
        if outs is None:  # an elementary operation
            data = any(tag.data for tag in ins)
            params = frozenset().union(*(tag.params for tag in ins))
            if eqn.primitive.name not in _KEEPING:
                params = frozenset(_Made(use) if isinstance(use, int) else use for use in params)
            if data:
                uses.update(dict.fromkeys(sorted(params, key=_leaf)))
            outs = [_Tag(frozenset(), True) if data else _Tag(params)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _inner(eqn, ins, uses):
    """The tags of the outputs of an operation that holds jaxprs of its own, or None.

    The purpose of a jaxpr is read off its shapes, because versions of JAX name the parameters differently.
    """
    name, jaxprs = eqn.primitive.name, _opened(eqn.params.values())
    if name == "scan" and (scan := _read_scan(eqn, jaxprs)):
        return _walk_scan(*scan, ins, uses)
    if name == "while" and (loop := _read_while(eqn, jaxprs)):
        return _walk_while(*loop, ins, uses)
    if name == "cond" and (branches := _read_cond(eqn)):
        return [_merge(*tags) for tags in zip(*(_walk(branch, ins[1:], uses) for branch in branches), strict=True)]
    if name in ("scan", "while", "cond"):
        warnings.warn(
            f"jaxhess cannot read the {name!r} of JAX {jax.__version__}: the layers used in it come in the order of "
            f"the parameters' leaves, and arrays that hold many layers are not split. The numbers are right all the "
            f"same. Write layers= for another order, and please report this",
            stacklevel=2,
        )
    elif len(jaxprs) == 1 and _fits(jaxprs[0], ins, eqn.outvars):  # jit, checkpoint, custom_jvp, custom_vjp, shard_map
        return _walk(jaxprs[0], ins, uses)
    return None


def _opened(values):
    """The jaxprs among values, without their constants."""
    return [jaxpr for value in values if hasattr(jaxpr := getattr(value, "jaxpr", value), "eqns")]


def _fits(jaxpr, ins, outs):
    return len(jaxpr.invars) == len(ins) and len(jaxpr.outvars) == len(outs)


def _kinds(variables):
    """[(shape, type)] of variables."""
    return [(jnp.shape(var.aval), getattr(var.aval, "dtype", None)) for var in variables]


def _read_cond(eqn):
    """The jaxprs of a cond's branches, or None. The first input says which; the others go into each."""
    for value in eqn.params.values():
        branches = _opened(value) if isinstance(value, tuple | list) else []
        if branches and len(branches) == len(value) and all(_fits(b, eqn.invars[1:], eqn.outvars) for b in branches):
            return branches
    return None


def _fixpoint(body, ins, consts, carried, uses):
    """A loop's body once more than the tags of what it carries need to settle."""
    for _ in range(2):
        outs = _walk(body, ins, uses)
        ins = [_merge(tag, outs[i - consts]) if consts <= i < consts + carried else tag for i, tag in enumerate(ins)]
    return outs


def _read_while(eqn, jaxprs):
    """(test, body, number of the test's constants, of the body's) of a while loop, or None.

    The inputs are the test's constants, the body's, and what is carried: test and body take it, the body returns it.
    """
    carried = len(eqn.outvars)
    for test, body in itertools.permutations(jaxprs) if len(jaxprs) == 2 else ():
        skip, consts = len(test.invars) - carried, len(body.invars) - carried
        inside = _kinds([*test.invars, *body.invars, *body.outvars])
        outside = _kinds([*eqn.invars[:skip], *eqn.invars[skip + consts :], *eqn.invars[skip:], *eqn.outvars])
        if min(skip, consts) >= 0 and skip + consts + carried == len(eqn.invars) and inside == outside:
            return test, body, skip, consts
    return None


def _walk_while(test, body, skip, consts, ins, uses):
    _walk(test, ins[:skip] + ins[skip + consts :], uses)
    return _fixpoint(body, ins[skip:], consts, len(ins) - skip - consts, uses)


def _read_scan(eqn, jaxprs):
    """(body, number of constants, number of what is carried, indices in the order of time) of a scan, or None.

    The inputs are constants, what is carried, and what is scanned; the outputs are what is carried and what is stacked.
    Scanned and stacked arrays, and they alone, have an axis that the body does not see.
    """
    if len(jaxprs) != 1 or not _fits(jaxprs[0], eqn.invars, eqn.outvars) or "reverse" not in eqn.params:
        return None
    (body,) = jaxprs
    ins, outs = _leading(eqn.invars, body.invars), _leading(eqn.outvars, body.outvars)
    carried = outs.count(())
    consts = ins.count(()) - carried
    lengths = {*ins, *outs} - {()}
    if (
        consts < 0
        or () in [*ins[consts + carried :], *outs[carried:]]
        or len(lengths) > 1
        or any(axes is None or len(axes) != 1 for axes in lengths)
        or _kinds(body.invars[consts : consts + carried]) != _kinds(body.outvars[:carried])
    ):
        return None
    indices = range(lengths.pop()[0] if lengths else 0)
    return body, consts, carried, indices[::-1] if eqn.params["reverse"] else indices


def _leading(outer, inner):
    """The axes that each outer variable has in front of those of the inner one, or None where the others differ."""
    shapes = [(jnp.shape(a.aval), jnp.shape(b.aval)) for a, b in zip(outer, inner, strict=True)]
    return [a[: len(a) - len(b)] if a[max(0, len(a) - len(b)) :] == b else None for a, b in shapes]


def _walk_scan(body, consts, carried, indices, ins, uses):
    here = object()  # slices of a scan around this one are not this one's

    def enter(tag):
        return tag._replace(
            params=frozenset(_Scanned(use, here) if isinstance(use, int) else use for use in tag.params)
        )

    def leave(tag):
        return tag._replace(params=frozenset(_Made(use.leaf) if own(use) else use for use in tag.params))

    def own(use):
        return isinstance(use, _Scanned) and use.scan is here

    inner: dict = {}
    ins = [enter(tag) if i >= consts + carried else tag for i, tag in enumerate(ins)]
    outs = _fixpoint(body, ins, consts, carried, inner)
    scanned = tuple(use.leaf for use in inner if own(use))
    for i in indices or [0]:
        uses.update(dict.fromkeys((use.leaf, i, scanned, len(indices)) if own(use) else use for use in inner))
    return [leave(tag) for tag in outs]


def _merge(*tags):
    data = any(tag.data for tag in tags)
    return _Tag(frozenset() if data else frozenset().union(*(tag.params for tag in tags)), data)
