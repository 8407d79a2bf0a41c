"""Traces by random probes, each with its standard error: Hutchinson, and all layers at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._checks import at_least_float32, check_count, check_key, check_like, standard_promotion
from jaxhess._diagnosis import NotFiniteError, why_not_finite, why_product_not_finite
from jaxhess.batches import Batches, first_batch
from jaxhess.layers import Layer, find_layers, layer_names
from jaxhess.objective import Objective, factored, outputs_of
from jaxhess.operators import _Product, apply_stacked, check_batches, map_rows, prepare

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
      key: a JAX random key; the same key gives the same probes, and more probes begin with the fewer.
      num_probes: number of probes; with a tolerance, the least number (and not below 8: the standard error of
        fewer is too often small by chance).
      probe: "rademacher" or "gaussian".
      rtol, atol: with either, probes are added until the standard error is at most max(atol, rtol * |mean|), or
        ``max_probes`` is reached. The standard error of the result tells which.
      max_probes: largest number of probes under a tolerance.
      chunk_size: probes at a time; memory is that of so many products.

    Returns:
      `Estimate` of scalars. Works under ``jit`` without tolerances.

    Raises:
      ValueError: for fewer than one probe, an unknown probe, a negative tolerance, an empty ``like``, or a product that
        is not finite.
      TypeError: for a key that is none, or a tolerance under ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> est = jh.trace(lambda v: 2.0 * v, like=jnp.zeros(5), key=jax.random.key(0), num_probes=4)
      >>> float(est.mean), float(est.std_error), est.num_probes
      (10.0, 0.0, 4)

    Reference: Hutchinson 1990; Avron and Toledo 2011; Algorithm 1 of the paper.
    """
    check_key(key)
    check_like("like", like)
    distribution = sampler(probe)
    draw = partial(_quadratic_forms, operator, like, distribution)

    def why():
        return why_product_not_finite(operator, random_like(key, like, distribution))

    return _estimate(draw, why, key, num_probes, rtol, atol, max_probes, chunk_size, ("the operator",))[0]


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
    """The traces of every layer's block, and of the whole, from the same probes.

    "hessian" and "functional": with one probe v over all parameters, v_l . (A v)_l is unbiased for Tr(A_l) for
    every layer at once, for one product of the whole net. "ggn": with B B' = S and random e over the outputs,
    ||(J' B e)_l||^2 is unbiased for Tr(G_l), for one backward pass. Where the two traces agree (piecewise linear
    nets with fixed batch statistics: H_l = 0), "ggn" is several times as precise and costs half. A criterion of one's
    own whose S is neither diagonal nor that of a softmax, with more than 64 classes, is taken by products with G.

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
      {layer: Estimate} in network order, and "total" with the standard error of the sum: layers share probes, so
      that it is not the root of the sum of squares.

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
    loss, params = prepare(curvature, objective, params, batch, has_aux, products=curvature != "ggn")
    names = layer_names(params, loss, batch)
    form = "product"
    if curvature == "ggn":
        one = first_batch(batch)
        criterion = factored(loss.criterion, outputs_of(loss, params, one), one)
        if criterion is not None:
            form, loss = "factor", Objective(loss.predict, criterion)
    samples = _LayerSamples(curvature, form, loss, find_layers(params, names), sampler(probe))
    names = [*names, "total"]
    draw = partial(samples.over_batches if isinstance(batch, Batches) else samples, params, batch)
    why = partial(why_not_finite, curvature, loss, params, batch)
    estimates = _estimate(draw, why, key, num_probes, rtol, atol, max_probes, chunk_size, names)
    return dict(zip(names, estimates, strict=True))


def _rademacher(key, shape, dtype):
    """Signs from one random bit each; jax.random.rademacher draws a whole word, which is felt beside a product."""
    size = int(np.prod(shape, dtype=int))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (1 - 2 * bits.ravel()[:size].astype(dtype)).reshape(shape)


def _alone(function: Callable) -> Callable:
    """A function of a key and other arrays that gives each row under vmap what it gives that row alone.

    Of threefry every function does. With other keys (rbg) JAX draws all rows from the first key.
    """
    alone = jax.custom_batching.custom_vmap(function)

    @alone.def_vmap
    def each(size, batched, *args):
        def one(rows):
            rows = iter(rows)
            return alone(*(next(rows) if mapped else x for x, mapped in zip(args, batched, strict=True)))

        return jax.lax.map(one, [x for x, mapped in zip(args, batched, strict=True) if mapped]), True

    return lambda key, *more: (function if _is_threefry(key) else alone)(key, *more)


def _is_threefry(key):
    return str(jax.random.key_impl(key)) == "threefry2x32"


_fold_in = _alone(jax.random.fold_in)


def _draw_alone(draw):
    return lambda key, shape, dtype: _alone(lambda k: draw(k, shape, dtype))(key)


_SAMPLERS = {"rademacher": _draw_alone(_rademacher), "gaussian": _draw_alone(jax.random.normal)}


def sampler(probe: str) -> Callable:
    """``sampler(key, shape, dtype)`` of a probe's name."""
    if probe not in _SAMPLERS:
        raise ValueError(f"unknown probe {probe!r}; choose from {sorted(_SAMPLERS)}")
    return _SAMPLERS[probe]


# ---- one sample for each probe: (probes,) keys -> (probes, quantities) ----


def random_like(key: jax.Array, like: PyTree, distribution: Callable = jax.random.normal) -> PyTree:
    """A random pytree like another, at least in float32, spread over devices as that one is."""
    return _draw_spread(key, like, distribution, tuple(map(spread, jax.tree.leaves(like))))


def spread(x: Any) -> jax.sharding.NamedSharding | None:
    """How an array is spread over devices; None for one device, or where it is not known yet."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    sharding = x.sharding if known else None
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.device_set) > 1 else None


@partial(jax.jit, static_argnums=(2, 3))
def _draw_spread(key, like, distribution, shardings):
    drawn = _draw(key, like, distribution)
    meshes = [sharding.mesh for sharding in shardings if sharding is not None]
    if not meshes:
        return drawn
    # One program has one set of devices: what is not spread itself is copied to all of them.
    copied = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
    leaves, treedef = jax.tree.flatten(drawn)
    placed = [jax.lax.with_sharding_constraint(x, s or copied) for x, s in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def _draw(key, like, distribution):
    """One draw, cut into leaves: XLA takes many times as long to compile a draw for each leaf."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([np.size(x) for x in leaves], dtype=int)
    dtypes = [at_least_float32(x) for x in leaves]
    flat = distribution(key, (int(ends[-1]),), at_least_float32(*dtypes))
    pieces = zip(jnp.split(flat, ends[:-1]), leaves, dtypes, strict=True)
    parts = [piece.reshape(jnp.shape(x)).astype(dtype) for piece, x, dtype in pieces]
    return jax.tree.unflatten(treedef, parts)


@partial(jax.jit, static_argnums=2)
def _random_stack(keys, like, distribution):
    return jax.vmap(lambda key: _draw(key, like, distribution))(keys)


@jax.jit
def _dots(vectors, products):
    return jax.vmap(inner)(vectors, products)[:, None]


@standard_promotion
def inner(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product of two trees."""
    return optax.tree.vdot(a, b)


_squared = standard_promotion(partial(optax.tree.norm, squared=True))
_stack = standard_promotion(jnp.stack)


def _quadratic_forms(operator, like, distribution, keys):
    vectors = _random_stack(keys, like, distribution)
    return _dots(vectors, apply_stacked(operator, vectors))


@dataclasses.dataclass(frozen=True)
class _LayerSamples:
    """Samples of every layer's trace and of their sum; static under ``jit``."""

    kind: str
    form: str  # "factor", squared norms of J' B e, or "product", v' A v
    loss: Callable
    layers: tuple[Layer, ...]
    distribution: Callable

    def __call__(self, params, batch, keys):
        return _layer_samples(self, params, batch, keys, None, 1.0)

    def over_batches(self, params, batches, keys):
        def step(mean, batch, share, number):
            # A fresh draw for each batch where the estimate is a sum over examples; the same v where it is v' A v.
            batch_keys = jax.vmap(_fold_in, (0, None))(keys, number) if self.form == "factor" else keys
            return _layer_samples(self, params, batch, batch_keys, mean, share)

        mean = batches.fold(step)
        if not np.isfinite(mean).all():
            check_batches(self.loss, params, batches)
        return mean


@partial(jax.jit, static_argnums=0)
def _layer_samples(spec, params, batch, keys, mean, share):
    with jax.default_matmul_precision("float32"):
        forms = _ggn_forms if spec.form == "factor" else _product_forms
        parts = forms(spec, params, batch, keys)
    new = jnp.concatenate([parts, parts.sum(1, keepdims=True)], axis=1)
    return new if mean is None else mean + jnp.asarray(share, new.dtype) * (new - mean)


def _product_forms(spec, params, batch, keys):
    product = _Product(spec.kind, spec.loss, None)

    def one(key):
        v = random_like(key, params, spec.distribution)
        product_v = product(params, batch, v)
        return _stack([inner(layer.arrays(v), layer.arrays(product_v)) for layer in spec.layers])

    return map_rows(one, keys)


def _ggn_forms(spec, params, batch, keys):
    outputs, pull = jax.vjp(lambda p: spec.loss.predict(p, batch), params)

    def one(key):
        noise = spec.distribution(key, outputs.shape, outputs.dtype)
        (gradient,) = pull(spec.loss.criterion.factor_product(outputs, batch, noise))
        return _stack([_squared(layer.arrays(gradient)) for layer in spec.layers])

    return jax.vmap(one)(keys)


# ---- means, standard errors, and when to stop ----


def _estimate(draw, why, key, num_probes, rtol, atol, max_probes, chunk_size, names):
    """Estimates from ``draw(keys) -> (len(keys), quantities)``, in equal chunks of keys; ``why`` one is not finite."""
    check_count("num_probes", num_probes)
    check_count("chunk_size", chunk_size)
    adaptive = rtol is not None or atol is not None
    if adaptive:
        check_count("max_probes", max_probes)
        if not min(rtol or 0, atol or 0) >= 0:
            raise ValueError(f"tolerances must not be negative, got rtol={rtol}, atol={atol}")
        # The standard error of a handful is too often small by chance.
        num_probes = max(num_probes, min(_LEAST, max_probes))
    chunk = -(-num_probes // -(-num_probes // chunk_size))  # equal chunks: one shape, one compilation
    samples = np.zeros((0, len(names)))
    while True:
        new = draw(_keys(key, len(samples), chunk))
        if isinstance(new, jax.core.Tracer):
            if adaptive:
                raise TypeError("a stopping rule reads values and cannot run under jit; leave out rtol, atol")
            samples = jax.lax.map(lambda k: draw(k[None])[0], _keys(key, 0, num_probes), batch_size=chunk)
            return _summary(samples, jnp)
        samples = np.concatenate([samples, np.asarray(new, np.float64)])
        if not np.isfinite(samples[-chunk:]).all():
            bad = [name for name, ok in zip(names, np.isfinite(samples).all(0), strict=True) if not ok]
            raise NotFiniteError(f"probes gave values that are not finite for {bad}: {why()}")
        if len(samples) < num_probes:
            continue
        # At most a chunk too many were drawn.
        limit = max(num_probes, max_probes) if adaptive else num_probes
        estimates = _summary(samples[:limit], np)
        if not adaptive or len(samples) >= limit:
            return estimates
        if all(e.std_error <= max(atol or 0.0, (rtol or 0.0) * abs(e.mean)) for e in estimates):
            return estimates


def _summary(samples, xp):
    count = samples.shape[0]
    errors = samples.std(0, ddof=1) / count**0.5 if count > 1 else xp.full(samples.shape[1:], xp.nan)
    return [Estimate(mean, error, count) for mean, error in zip(samples.mean(0), errors, strict=True)]


@partial(jax.jit, static_argnums=2)
def _keys(key, first, count):
    """Keys number first, first + 1, ...: the same for the same number, however many are drawn."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.vmap(partial(_fold_in, key))(first + jnp.arange(count))
