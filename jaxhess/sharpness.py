"""Sharpness along an update, by forward passes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import check_known
from jaxhess._products import match
from jaxhess._trees import tree_norm
from jaxhess.problem import pose

PyTree = Any
_DOUBLINGS = 60


def critical_sharpness(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    update: PyTree,
    *,
    learning_rate: float = 1.0,
    rtol: float = 0.02,
    has_aux: bool = False,
) -> float:
    """2 / eta_c, with the smallest learning rate eta_c at which a step along the update raises the loss.

    L(w + c u) > L(w) from c = eta_c / learning_rate on; a rise before that, which the doubling steps over, is not seen.
    On a quadratic with Hessian A and u = -learning_rate g it is g' A g / g' g. It takes about six forward passes:
    doubling or halving from c = 1, then false position on (L(w + c u) - L(w)) / c, which is linear in c on a quadratic.

    Args:
      loss, params, batch, has_aux: as for `hessian`.
      update: a pytree like ``params``: what the optimizer adds, as from optax's ``tx.update``.
      learning_rate: the rate that is part of the update; with 1, the result is in units of 1 / update.
      rtol: relative precision of eta_c, at least as far as the rounding of the loss allows.

    Returns:
      The critical sharpness; inf if the shortest step already raises the loss, and 0 if no step does.

    Raises:
      TypeError, ValueError: as `hessian`; ValueError for an update of another tree, zero or not finite, or a learning
        rate that is not positive; TypeError under ``jit``.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> loss = lambda w, batch: jnp.sum(jnp.array([1.0, 3.0]) * w**2) / 2
      >>> params = jnp.array([0.0, 1.0])
      >>> round(jh.critical_sharpness(loss, params, None, -0.1 * jnp.array([0.0, 3.0]), learning_rate=0.1), 3)
      3.0

    Reference: Kalra et al. 2026, A scalable measure of loss landscape curvature (arXiv 2601.16979), section 2.
    """
    if not (np.ndim(learning_rate) == 0 and 0 < learning_rate < np.inf):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate!r}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie in (0, 1), got {rtol!r}")
    problem = pose("hessian", loss, params, batch, has_aux)
    check_known("the critical sharpness is searched for", "call it outside", problem.params, update)
    update = match(update, problem.params)
    leaves = jax.tree.leaves(update)
    if not all(bool(jnp.isfinite(x).all()) for x in leaves) or not any(bool(x.any()) for x in leaves):
        raise ValueError("the update is zero or not finite; give what the optimizer adds to the parameters")
    along = _Along(problem.loss)

    def value(c):
        return float(problem.mean(along, lambda number: (update, jnp.float32(c))))

    here = value(0.0)
    if not np.isfinite(here):
        raise ValueError(f"the loss at the parameters is {here}; give parameters at which it is finite")
    least = 4e-7 * float(tree_norm(problem.params)) / float(tree_norm(update))
    found = _crossing(lambda c: (value(c) - here) / c, rtol, least)
    return 2 / (found * learning_rate) if found else float("inf")


@dataclasses.dataclass(frozen=True)
class _Along:
    """The loss at a multiple of the update; static under ``jit``."""

    loss: Callable

    def __call__(self, params, batch, update, c):
        return self.loss(jax.tree.map(lambda p, u: p + c.astype(p.dtype) * u, params, update), batch)


def _crossing(slope, rtol, least):
    """A c at which slope(c) changes its sign, doubling or halving from 1; 0 or inf where it is always or never > 0.

    Steps below ``least`` are not felt.
    """
    low, high = 0.0, 1.0
    at_low, at_high = 0.0, slope(1.0)
    if _rises(at_high):
        for _ in range(_DOUBLINGS):
            low, at_low = high / 2, slope(high / 2)
            if at_low == 0:  # exactly a crossing, or a step that rounding swallows
                return low if low > least else 0.0
            if not _rises(at_low):
                break
            high, at_high = low, at_low
        else:
            return 0.0
    else:
        for _ in range(_DOUBLINGS):
            low, at_low = high, at_high
            high, at_high = 2 * high, slope(2 * high)
            if _rises(at_high):
                break
        else:
            return float("inf")
    while high - low > rtol * high:
        # Where the loss overflows, halves; elsewhere false position, not too near an end.
        share = -at_low / (at_high - at_low) if np.isfinite(at_high) else 0.5
        middle = low + (high - low) * min(max(share, 0.05), 0.95)
        at_middle = slope(middle)
        if _rises(at_middle):
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
        if np.isfinite(at_high) and abs(at_middle) <= rtol * (at_high - at_low) * 0.5:
            return middle
    return low + (high - low) * (-at_low / (at_high - at_low) if np.isfinite(at_high) and at_high > at_low else 0.5)


def _rises(slope):
    """A loss that is not finite is higher."""
    return not slope <= 0
