"""Noise stability as an optax gradient transformation: the gradient at parameters moved by noise, to both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._trees import full_precision, random_like
from jaxhess.problem import pose
from jaxhess.regularizer import Weighted, check_layers, leaf_weights, scaled
from jaxhess.transform import MISSING, add_finite, check_update, key_data

PyTree = Any


class NoiseStabilityState(NamedTuple):
    """The state of `add_noise_stability`: arrays only, so that a checkpoint restores the same noise.

    Attributes:
      count: int32, steps so far.
      key: the raw data of the random key.
      skipped: int32, the number of steps on which a gradient at moved parameters was not finite and was left out.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> tx = jh.add_noise_stability(lambda p, batch: jnp.sum(p**4), sigma=0.1, key=jax.random.key(0))
      >>> int(tx.init(jnp.ones(2)).skipped)
      0

    Reference: as `add_noise_stability`.
    """

    count: jax.Array  # type: ignore[assignment]  # as in optax, over tuple.count
    key: jax.Array
    skipped: jax.Array


def add_noise_stability(
    loss: Callable,
    sigma: float = 1e-2,
    *,
    key: jax.Array,
    layers: Weighted = "all",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by its mean at w + u and w - u, with random u: minimises E[L(w + u)].

    It adds (grad L(w + u) + grad L(w - u)) / 2 - grad L(w), with u ~ N(0, sigma^2 w_l) in layer l. To second order in
    sigma this is the gradient of (sigma^2 / 2) sum_l w_l Tr(Hess_l): that of the Hessian trace penalty with gamma =
    sigma^2 / 2, without second derivatives. On a quadratic it adds nothing.

    Put it first in the chain, as `add_hessian_trace`. What is said there of ``batch``, dtypes, ``optax.masked`` and
    devices holds here too. A step takes two more gradients, and one that the compiler shares with yours if both are in
    one ``jit``.

    Args:
      loss: ``loss(params, batch) -> scalar``.
      sigma: standard deviation of the noise, > 0.
      key: a JAX random key; the noise of a step is that of ``fold_in(key, count)``.
      layers: as for `hessian_trace_penalty`.
      has_aux: as for `hessian`.

    Returns:
      A transformation whose ``update`` takes ``params`` and ``batch=``.

    Raises:
      ValueError, TypeError: for a sigma that is not positive and finite, a wrong selection of layers, or a ``key`` that
        is not a JAX random key; in ``update`` if ``params`` or ``batch`` is missing, and as `hessian`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxhess as jh
      >>> loss = lambda p, batch: jnp.sum(p**3) * batch
      >>> tx = optax.chain(jh.add_noise_stability(loss, sigma=0.1, key=jax.random.key(0)), optax.sgd(1.0))
      >>> params = jnp.ones(1000)
      >>> updates, _ = tx.update(jax.grad(loss)(params, 1.0), tx.init(params), params, batch=1.0)
      >>> round(float(updates.mean()), 2)  # -3 (1 + sigma^2)
      -3.03

    Reference: Zhang, Li and Ju 2023, Noise stability optimization for finding flat minima (arXiv 2306.08553).
    """
    if isinstance(sigma, bool) or np.ndim(sigma) or not 0 < sigma < np.inf:
        raise ValueError(f"sigma must be a positive, finite number, got {sigma!r}")
    check_layers(layers)
    key, impl = key_data(key)

    def init_fn(params):
        del params
        return NoiseStabilityState(jnp.zeros((), jnp.int32), jnp.array(key, copy=True), jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, *others, batch=MISSING, **extra_args):
        del extra_args
        check_update("add_noise_stability", others, params, batch, state.key, key)
        problem = pose("hessian", loss, params, batch, has_aux)
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=impl), state.count)
        noise = optax.tree.scale(sigma, random_like(step_key, problem.params))
        noise = scaled(noise, leaf_weights(problem, layers), 0.5)
        added = optax.tree.cast_like(_correction(problem.loss, problem.params, batch, noise), updates)
        updates, valid = add_finite(updates, added, jnp.array(True))
        skipped = state.skipped + (~valid).astype(state.skipped.dtype)
        return updates, NoiseStabilityState(optax.safe_increment(state.count), state.key, skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@full_precision
def _correction(loss, params, batch, noise):
    there, back = (jax.grad(loss)(jax.tree.map(move, params, noise), batch) for move in (jnp.add, jnp.subtract))
    return jax.tree.map(lambda a, b, c: (a + b) / 2 - c, there, back, jax.grad(loss)(params, batch))
