"""Traces by random probes, each with its standard error: Hutchinson, and all layers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import NotFiniteError, check_count, check_key, check_like, is_traced, standard_promotion
from jaxhess._diagnosis import why_not_finite
from jaxhess._linear import as_linear
from jaxhess._products import At
from jaxhess._trees import draw_keys, fold_in, inner, map_rows, random_like, random_rows, sampler, squared_norm
from jaxhess.layers import Layer
from jaxhess.objective import Objective, factored
from jaxhess.operators import product
from jaxhess.problem import Problem, pose

PyTree = Any
_CHUNK = 8
_LEAST = 8


class Estimate(NamedTuple):
    """A mean over probes with its standard error.

    Attributes:
      mean: scalar, the mean of the probes.
      std_error: scalar, their standard deviation / sqrt(num_probes); NaN for a single probe.
      num_probes: the number of probes; 0 for an exact value, whose ``std_error`` is its rounding.

    Example:
      >>> import jaxhess as jh
      >>> print(jh.Estimate(12.3456, 0.0321, 64))
      12.35 +- 0.032

    Reference: Hutchinson 1990, A stochastic estimator of the trace of the influence matrix.
    """

    mean: jax.Array
    std_error: jax.Array
    num_probes: int

    def __str__(self) -> str:
        exact = isinstance(self.num_probes, int) and self.num_probes == 0 and self.std_error <= 1e-3 * abs(self.mean)
        return f"{self.mean:.4g} {'exact' if exact else f'+- {self.std_error:.2g}'}"


def trace(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    num_probes: int = 64,
    probe: str = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    max_probes: int = 1024,
    chunk_size: int = _CHUNK,
) -> Estimate:
    """Hutchinson's estimate of a trace: the mean of v' A v over random v with E[v v'] = I.

    A Rademacher probe has the variance 2 * (||A||_F^2 - sum_i A_ii^2), a Gaussian one 2 * ||A||_F^2.

    Args:
      operator: v -> A v, as from `hessian`; traceable by JAX, or over `Batches`.
      like: a pytree of arrays like v.
      key: a JAX random key; the same key gives the same probes, and a longer run begins with those of a shorter one.
      num_probes: number of probes; with a tolerance, the smallest number (at least 8: with fewer, the standard error
        is too often small by chance).
      probe: "rademacher" or "gaussian".
      rtol, atol: with either, probes are added until the standard error is at most max(atol, rtol * |mean|), or
        ``max_probes`` is reached. The standard error of the result tells which happened.
      max_probes: largest number of probes under a tolerance.
      chunk_size: probes computed at a time; they take the memory of as many products.

    Returns:
      `Estimate` of scalars. Works under ``jit`` without tolerances.

    Raises:
      ValueError: for fewer than one probe, an unknown probe, a negative tolerance, an empty ``like``, or a product that
        is not finite.
      TypeError: if ``key`` is not a JAX random key, or for a tolerance under ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> est = jh.trace(lambda v: 2.0 * v, like=jnp.zeros(5), key=jax.random.key(0), num_probes=4)
      >>> float(est.mean), float(est.std_error), est.num_probes
      (10.0, 0.0, 4)

    Reference: Hutchinson 1990; Avron and Toledo 2011; Algorithm 1 of the paper.
    """
    check_key(key)
    check_like("like", like)
    distribution, operator = sampler(probe), as_linear(operator)
    plan = Plan(num_probes, rtol, atol, max_probes, chunk_size)

    def draw(keys):
        vectors = random_rows(keys, like, distribution)
        return _dots(vectors, operator.func.stacked(*operator.args, vectors))

    def why():
        return operator.func.why_not_finite(*operator.args, random_like(key, like, distribution))

    return plan.estimate(draw, why, key, ["the operator"])[0]


def layer_traces(
    objective: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_probes: int = 64,
    curvature: str = "hessian",
    probe: str = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    max_probes: int = 1024,
    chunk_size: int = _CHUNK,
    has_aux: bool = False,
) -> dict[str, Estimate]:
    """The traces of every layer's block, and of the whole net, from the same probes.

    "hessian" and "functional": with one probe v over all parameters, v_l . (A v)_l is unbiased for Tr(A_l) for
    every layer at once, for one product of the whole net. "ggn": with B B' = S and random e over the outputs,
    ||(J' B e)_l||^2 is unbiased for Tr(G_l), for one backward pass. Where the two traces agree (piecewise linear
    nets with fixed batch statistics: H_l = 0), "ggn" is several times as precise and costs half. Products with G
    are used for your own criterion with more than 64 classes if its S is neither diagonal nor that of a softmax.

    Args:
      objective: a loss, or an `Objective` (which "ggn" and "functional" need).
      params: a pytree of floating-point arrays.
      batch: any pytree, or `Batches`.
      key: a JAX random key.
      num_probes, probe, rtol, atol, max_probes, chunk_size: as for `trace`; a tolerance must hold for every layer
        and for the total.
      curvature: "hessian", "ggn" or "functional".
      has_aux: as for `hessian`.

    Returns:
      {layer: Estimate} in network order, and "total" with the standard error of the sum. Layers share probes, so
      it is not the root of the sum of squares.

    Raises:
      TypeError, ValueError: as `hessian` and `trace`; ValueError for "ggn" with a criterion that is not convex.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, batch: batch["x"] @ p["fc"]["w"], jh.squared_error)
      >>> batch = {"x": jnp.eye(2), "label": jnp.ones((2, 1))}
      >>> params = {"fc": {"w": jnp.zeros((2, 1))}}
      >>> traces = jh.layer_traces(objective, params, batch, key=jax.random.key(0), num_probes=4)
      >>> {name: float(est.mean) for name, est in traces.items()}
      {'fc': 2.0, 'total': 2.0}

    Reference: Hutchinson 1990; for the one-backward estimator Schraudolph 2002 and Martens et al. 2012 (curvature
    propagation).
    """
    check_key(key)
    problem = pose(curvature, objective, params, batch, has_aux)
    plan = Plan(num_probes, rtol, atol, max_probes, chunk_size)
    return traces_of(problem, curvature, key, plan, probe)


def traces_of(
    problem: Problem, curvature: str, key: jax.Array, plan: Plan, probe: str = "rademacher"
) -> dict[str, Estimate]:
    """As `layer_traces`, of a `Problem`."""
    criterion = factored(problem.loss.criterion, problem.outputs, problem.first) if curvature == "ggn" else None
    if criterion is not None:
        objective = Objective(problem.loss.predict, criterion)
        samples: _Samples = _FactorSamples(objective, problem.layers, sampler(probe))
    else:
        product(curvature, problem)  # checks that there is one
        samples = _ProductSamples(At(curvature, problem.loss, problem.whole), problem.layers, sampler(probe))
    names = [*(layer.name for layer in problem.layers), "total"]

    def draw(keys):
        return problem.mean(samples, lambda number: (samples.keys_of_batch(keys, number),))

    why = partial(why_not_finite, curvature, problem.loss, problem.params, problem.batch)
    return dict(zip(names, plan.estimate(draw, why, key, names), strict=True))


@jax.jit
def _dots(vectors, products):
    return jax.vmap(inner)(vectors, products)[:, None]


# ---- samples of every layer's trace and of their sum: (probes,) keys -> (probes, layers + 1); static under jit ----


@dataclasses.dataclass(frozen=True)
class _ProductSamples:
    """v_l . (A v)_l of a product with the whole net."""

    at: At
    layers: tuple[Layer, ...]
    distribution: Callable

    def keys_of_batch(self, keys, number):
        """The same v for every batch: it is v' A v for the mean A."""
        return keys

    def __call__(self, params, batch, keys):
        def one(key):
            v = random_like(key, params, self.distribution)
            product_v = self.at(params, batch, v)
            return [inner(layer.arrays(v), layer.arrays(product_v)) for layer in self.layers]

        return _with_total(map_rows(one, keys))


@dataclasses.dataclass(frozen=True)
class _FactorSamples:
    """Squared norms of (J' B e)_l."""

    objective: Objective
    layers: tuple[Layer, ...]
    distribution: Callable

    def keys_of_batch(self, keys, number):
        """A fresh draw for each batch: the estimate is a sum over examples."""
        return keys if number is None else jax.vmap(fold_in, (0, None))(keys, number)

    def __call__(self, params, batch, keys):
        outputs, pull = jax.vjp(lambda p: self.objective.predict(p, batch), params)

        def one(key):
            noise = self.distribution(key, outputs.shape, outputs.dtype)
            (gradient,) = pull(self.objective.criterion.factor_product(outputs, batch, noise))
            return [squared_norm(layer.arrays(gradient)) for layer in self.layers]

        return _with_total(jax.vmap(one)(keys))


_Samples = _ProductSamples | _FactorSamples


@standard_promotion
def _with_total(parts):
    parts = jnp.stack(parts, axis=1)
    return jnp.concatenate([parts, parts.sum(1, keepdims=True)], axis=1)


# ---- means, standard errors, and when to stop ----


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many probes to draw; arguments as for `trace`."""

    num_probes: int = 64
    rtol: float | None = None
    atol: float | None = None
    max_probes: int = 1024
    chunk_size: int = _CHUNK

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
        least = max(self.num_probes, min(_LEAST, self.max_probes)) if self.adaptive else self.num_probes
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
            if not self.adaptive or len(samples) >= limit or all(map(self._met, estimates)):
                return estimates

    def _met(self, estimate):
        return estimate.std_error <= max(self.atol or 0.0, (self.rtol or 0.0) * abs(estimate.mean))


def _estimates(samples):
    xp, count = (np if isinstance(samples, np.ndarray) else jnp), samples.shape[0]
    errors = samples.std(0, ddof=1) / count**0.5 if count > 1 else xp.full(samples.shape[1:], xp.nan)
    return [Estimate(mean, error, count) for mean, error in zip(samples.mean(0), errors, strict=True)]
