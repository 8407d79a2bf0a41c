"""The protocol of linear operators: functions v -> A v that may know something of themselves.

An operator is a `jax.tree_util.Partial`, so that it passes through ``jit`` as an argument. Its function is a `Linear`,
static under ``jit``, whose methods take the Partial's own arguments first. A plain function is wrapped once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxhess._programs import rounding_of
from jaxhess._trees import map_rows, own_eps, stack_rows, take_row

PyTree = Any
Operator = Callable[[PyTree], PyTree]


class HostLoopError(TypeError):
    """A product that loops on the host was called under a transformation of JAX."""


class Linear:
    """What a product knows of itself. The defaults are those of a function whose inside is unknown."""

    on_host = False  # whether it loops on the host, so that JAX cannot trace it

    def __call__(self, *args: Any) -> PyTree:
        """``self(*args, v)``: the product A v."""
        raise NotImplementedError

    def stacked(self, *args: Any) -> PyTree:
        """``self.stacked(*args, vectors)``: A v for several v, stacked along a leading axis."""
        return _stacked(Partial(self, *args[:-1]), args[-1])

    def perturbed(self, key: jax.Array, size: float, *args: Any) -> Partial | None:
        """The operator at parameters that are moved by a relative ``size``; None if it has none."""
        return None

    def rounding(self, *args: Any) -> float:
        """``self.rounding(*args, like)``: the rounding of the coarsest type on the way, where JAX can trace it."""
        eps = own_eps(args[-1])
        try:
            return max(eps, float(_rounding(Partial(self, *args[:-1]), args[-1])))
        except Exception:  # a function of the host may raise anything when it is traced
            return eps

    def why_not_finite(self, *args: Any) -> str:
        """``self.why_not_finite(*args, v)``: where a product that is not finite comes from."""
        bad = not_finite(self(*args))
        if not bad:
            return "its entries are finite, and their squares overflow; scale the operator down"
        return "look for overflow or NaN in the operator" + (f", at {', '.join(bad)}" if any(bad) else "")


@dataclasses.dataclass(frozen=True)
class _Function(Linear):
    """A function of v that knows nothing of itself; its one argument is that function."""

    def __call__(self, function, v):
        return function(v)

    def stacked(self, function, vectors):
        try:
            return _stacked(Partial(self, function), vectors)
        except HostLoopError:  # a function that calls a product over many batches, like its negative
            return stack_rows([function(take_row(vectors, i)) for i in range(len(jax.tree.leaves(vectors)[0]))])


def as_linear(operator: Operator) -> Any:
    """Any function of v as a pytree that passes through ``jit`` and keeps the protocol."""
    if not isinstance(operator, Partial):
        operator = Partial(operator)
    return operator if isinstance(operator.func, Linear) else Partial(_Function(), operator)


def not_finite(tree: PyTree) -> list[str]:
    """The places of the arrays of a tree that are not finite."""
    return [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and not jnp.isfinite(x).all()
    ]


@jax.jit
def _stacked(operator, vectors):
    return map_rows(operator, vectors)


@jax.jit
def _rounding(operator, v):
    """A constant, known when the operator is traced: once for its shapes, though its numbers change."""
    return jnp.float32(rounding_of(_call, operator, v))


def _call(operator, v):
    return operator(v)
