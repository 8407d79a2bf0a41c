"""Means over random probes with their standard errors, and how many probes to draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import NotFiniteError, check_count, is_traced
from jaxhess._trees import draw_keys

LEAST = 8  # probes: with fewer, the standard error is too often small by chance


class _Estimate(NamedTuple):
    mean: jax.Array
    std_error: jax.Array
    num_probes: int


class Estimate(_Estimate):
    """A mean over probes with its standard error.

    Attributes:
      mean: scalar, the mean of the probes.
      std_error: scalar, their standard deviation / sqrt(num_probes); NaN for a single probe.
      num_probes: the number of probes, or of products by XTrace; 0 for an exact value, whose ``std_error`` is its
        rounding.
      method: how it was found: "hutchinson"; "xtrace"; "split", as Tr G + Tr H; or "exact".

    Example:
      >>> import jaxhess as jh
      >>> print(jh.Estimate(12.3456, 0.0321, 64))
      12.35 +- 0.032

    Reference: Hutchinson 1990, A stochastic estimator of the trace of the influence matrix.
    """

    method: str = "hutchinson"

    def __new__(cls, mean: Any, std_error: Any, num_probes: Any, method: str = "hutchinson") -> Estimate:
        """A tuple of three; ``method`` is no part of it."""
        self = super().__new__(cls, mean, std_error, num_probes)
        self.method = method
        return self

    def plus(self, other: Estimate) -> Estimate:
        """The sum with an independent one, in whose probes it is counted; of this one's method."""
        error = np.hypot(self.std_error, other.std_error)
        return Estimate(self.mean + other.mean, error, other.num_probes, self.method)

    def __str__(self) -> str:
        exact = isinstance(self.num_probes, int) and self.num_probes == 0 and self.std_error <= 1e-3 * abs(self.mean)
        return f"{self.mean:.4g} {'exact' if exact else f'+- {self.std_error:.2g}'}"


def _unflatten(method: str, parts: Any) -> Estimate:
    mean, std_error, num_probes = parts
    return Estimate(mean, std_error, num_probes, method)


jax.tree_util.register_pytree_node(Estimate, lambda e: ((e.mean, e.std_error, e.num_probes), e.method), _unflatten)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many probes to draw; arguments as for `trace`."""

    num_probes: int = 64
    rtol: float | None = None
    atol: float | None = None
    max_probes: int = 1024
    chunk_size: int = 8

    def __post_init__(self):
        check_count("num_probes", self.num_probes)
        check_count("chunk_size", self.chunk_size)
        check_count("max_probes", self.max_probes)
        if not min(self.rtol or 0, self.atol or 0) >= 0:
            raise ValueError(f"tolerances must not be negative, got rtol={self.rtol}, atol={self.atol}")

    @property
    def adaptive(self) -> bool:
        """Whether a tolerance decides."""
        return self.rtol is not None or self.atol is not None

    def estimate(self, draw: Callable, why: Callable, key: jax.Array, names: Sequence[str]) -> list[Estimate]:
        """From ``draw(keys) -> (len(keys), quantities)``, in equal chunks of keys; ``why()`` one is not finite."""
        # The standard error of a handful of probes is too often small by chance.
        least = max(self.num_probes, min(LEAST, self.max_probes)) if self.adaptive else self.num_probes
        limit = max(least, self.max_probes) if self.adaptive else least
        chunk = -(-least // -(-least // self.chunk_size))  # equal chunks: one shape, one compilation
        samples = np.zeros((0, len(names)))
        while True:
            new = draw(draw_keys(key, len(samples), chunk))
            if is_traced(new):
                if self.adaptive:
                    raise TypeError("a stopping rule reads values and cannot run under jit; leave out rtol, atol")
                return _estimates(jax.lax.map(lambda k: draw(k[None])[0], draw_keys(key, 0, least), batch_size=chunk))
            samples = np.concatenate([samples, np.asarray(new, np.float64)])
            if not np.isfinite(samples[-chunk:]).all():
                bad = [name for name, column in zip(names, samples.T, strict=True) if not np.isfinite(column).all()]
                raise NotFiniteError(f"probes gave values that are not finite for {bad}: {why()}")
            if len(samples) < least:
                continue
            estimates = _estimates(samples[:limit])  # at most a chunk too many were drawn
            if (
                not self.adaptive
                or len(samples) >= limit
                or all(e.std_error <= self.tolerance(e.mean) for e in estimates)
            ):
                return estimates

    def of_ggn(self, share: int) -> Plan:
        """For G where it is a part: one in ``share`` of the probes, or a sixteenth of the variance of a tolerance."""
        rtol, atol = (None if x is None else x / 4 for x in (self.rtol, self.atol))
        return Plan(max(LEAST, self.num_probes // share), rtol, atol, self.max_probes, self.chunk_size)

    def tolerance(self, mean: float) -> float:
        """The largest standard error that is wanted for a mean."""
        return max(self.atol or 0.0, (self.rtol or 0.0) * abs(mean))


def _estimates(samples):
    xp, count = (np if isinstance(samples, np.ndarray) else jnp), samples.shape[0]
    errors = samples.std(0, ddof=1) / count**0.5 if count > 1 else xp.full(samples.shape[1:], xp.nan)
    return [Estimate(mean, error, count) for mean, error in zip(samples.mean(0), errors, strict=True)]
