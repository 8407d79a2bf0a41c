"""Hessian trace regularization as an optax gradient transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._checks import at_least_float32, check_count, check_key
from jaxhess._trees import leaves_finite
from jaxhess.regularizer import Penalty, Weighted

PyTree = Any
MISSING = object()


class HessianTraceState(NamedTuple):
    """The state of `add_hessian_trace`: arrays only, so that a checkpoint restores the same probes.

    Attributes:
      count: int32, steps so far.
      key: the raw data of the random key.
      penalty: the last penalty sum_l w_l Tr(A_l), without gamma; 0 before the first.
      skipped: int32, the number of penalties that were left out: the penalty or its scaled gradient was not finite, or
        the schedule returned a negative gamma.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> tx = jh.add_hessian_trace(lambda p, batch: jnp.sum(p**4), 0.1, key=jax.random.key(0))
      >>> int(tx.init(jnp.ones(2)).skipped)
      0

    Reference: equation (5) of the paper.
    """

    count: jax.Array  # type: ignore[assignment]  # as in optax, over tuple.count
    key: jax.Array
    penalty: jax.Array
    skipped: jax.Array


def add_hessian_trace(
    loss: Callable,
    gamma: float | jax.Array | Callable[[jax.Array], jax.Array],
    *,
    key: jax.Array,
    every: int = 1,
    start: int = 0,
    layers: Weighted = "all",
    num_probes: int = 1,
    curvature: str = "hessian",
    probe: str = "rademacher",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of gamma * sum_l w_l Tr(A_l) to the updates, on every ``every``-th step.

    It acts on the steps with count >= start for which (count - start) is divisible by ``every``, so on the first step
    too. On all other steps it does nothing. The state holds the value of the last penalty. A penalty that is not
    finite, before or after it is scaled by gamma, is left out of its step and counted in ``skipped``. So is one for
    which a schedule returns a negative gamma.

    Put it first in the chain. Its place decides what happens to the penalty. Before ``optax.scale_by_adam``, Adam
    preconditions it together with the gradient. After ``optax.scale_by_adam``, it is added unchanged, as in decoupled
    weight decay. After ``optax.sgd``, it would be added to the step itself, with the wrong sign.

    Everything that changes from step to step and is not a parameter belongs in ``batch``: images, labels, masks, batch
    statistics, a dropout key. The penalty is that of the loss as you give it. Batch norm that normalises with the batch
    couples the examples, so H_l is not zero; batch norm that reads fixed statistics from the batch does not. With
    dropout and the step's key in the batch, the penalty is that of the thinned net of this step.

    The curvature of half-precision parameters is computed in float32, and the updates keep their dtype. Inside
    ``optax.MultiSteps`` the penalty is that of the last micro-batch's parameters and batch. Under
    ``optax.inject_hyperparams`` name all arguments but gamma: ``static_args=("loss", "every", "start", "layers",
    "num_probes", "curvature", "probe", "has_aux")`` (and "key" for a raw one). Select layers with ``layers``, not with
    ``optax.masked``, which hides parameters from the loss.

    On several devices, arrays with a ``jax.sharding`` need no special treatment. Under ``jax.pmap``, or ``shard_map``
    with ``check_vma=False``, each device sees only its part of the batch and adds its own penalty. There, average over
    devices what this transformation returns, not the gradients before it; otherwise the copies of the parameters
    diverge.

    Under ``jit`` the step that acts is a branch of the program, which XLA's CPU backend runs several times slower than
    the same outside of a branch. There, say on the host whether it acts, with ``penalize=True`` or ``False`` in
    ``update``, and make it static: two programs are compiled, and none has a branch. This overrides ``every`` and
    ``start``.

    Args:
      loss: ``loss(params, batch) -> scalar``; for "ggn" an `Objective`.
      gamma: coefficient >= 0, or a schedule ``gamma(count)``.
      key: a JAX random key; the probes of a step are those of ``fold_in(key, count)``.
      every: number of steps from one penalty to the next, f_r in the paper. The penalty is not scaled by it.
      start: first step with the penalty.
      layers, num_probes, curvature, probe, has_aux: as for `hessian_trace_penalty`. Layers are resolved when the
        first update is traced.

    Returns:
      A transformation whose ``update`` takes ``params``, ``batch=`` and, if wanted, ``penalize=``.

    Raises:
      ValueError, TypeError: for a gamma that is negative or not finite, ``every`` < 1, ``start`` < 0, an empty or
        unknown selection of layers, or a ``key`` that is not a JAX random key; in ``update`` if ``params`` or
        ``batch`` is missing, and as `hessian_trace_penalty`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxhess as jh
      >>> loss = lambda p, batch: jnp.sum(p["fc"]["w"] ** 3) * batch
      >>> tx = optax.chain(jh.add_hessian_trace(loss, 0.1, every=2, key=jax.random.key(0)), optax.sgd(1.0))
      >>> params = {"fc": {"w": jnp.array([1.0, 2.0])}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss)(params, 1.0), state, params, batch=1.0)
      >>> updates["fc"]["w"], float(state[0].penalty)
      (Array([ -3.6, -12.6], dtype=float32), 18.0)

    Reference: equation (5) of the paper, and its paragraph on the penalization frequency.
    """
    schedule = _Schedule.checked(gamma, every, start)
    penalty = Penalty(loss, layers, num_probes, curvature, probe, has_aux)
    key, impl = key_data(key)

    def init_fn(params):
        return HessianTraceState(
            count=jnp.zeros((), jnp.int32),
            key=jnp.array(key, copy=True),  # a donated state must not take the caller's key with it
            penalty=jnp.zeros((), at_least_float32(*jax.tree.leaves(params))),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, *others, batch=MISSING, penalize=None, **extra_args):
        del extra_args
        check_update("add_hessian_trace", others, params, batch, state.key, key)

        def with_penalty():
            step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=impl), state.count)
            return _add(updates, state, schedule.gamma_at(state.count), *penalty(params, batch, step_key))

        due = schedule.due(state.count) if penalize is None else _chosen(penalize)
        as_it_was = (updates, state.penalty, state.skipped)
        if isinstance(due, jax.core.Tracer):
            added, value, skipped = jax.lax.cond(due, with_penalty, lambda: as_it_was)
        else:  # outside jit a cond would be compiled at every step
            added, value, skipped = with_penalty() if due else as_it_was
        return added, HessianTraceState(optax.safe_increment(state.count), state.key, value, skipped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _chosen(penalize):
    """What the host says of a step, as a bool."""
    if not isinstance(penalize, (bool, np.bool_)):
        raise TypeError(
            f"penalize must be True, False or None, known when the step is compiled, got {penalize!r}; under jit name "
            f"it in static_argnames"
        )
    return bool(penalize)


class _Schedule(NamedTuple):
    """When the penalty acts, and how strongly."""

    gamma: Any
    every: int
    start: int

    @classmethod
    def checked(cls, gamma, every, start):
        check_count("every", every)
        if not isinstance(start, (int, np.integer)) or start < 0:
            raise ValueError(f"start must be a whole number of steps, not negative, got {start!r}")
        if not (callable(gamma) or isinstance(gamma, jax.core.Tracer) or _is_coefficient(gamma)):
            raise ValueError(f"gamma must be a finite number that is not negative, or a schedule, got {gamma!r}")
        return cls(gamma, every, start)

    def due(self, count):
        """Whether it acts on this step."""
        if self.every == 1 and self.start == 0:
            return True
        return (count >= self.start) & ((count - self.start) % self.every == 0)

    def gamma_at(self, count):
        """Its coefficient on this step."""
        return jnp.asarray(self.gamma(count) if callable(self.gamma) else self.gamma)


def _add(updates, state, gamma, penalty, gradient):
    """The updates with gamma times the gradient, the penalty, and how many were left out so far."""
    if jax.tree.structure(gradient) != jax.tree.structure(updates):
        raise ValueError(
            f"the updates must be a pytree like the parameters, got {jax.tree.structure(updates)} for "
            f"{jax.tree.structure(gradient)}; leave layers out with layers=, not by None"
        )
    # Scaled before it is cast: 1e-8 is zero in half precision, and what gamma makes infinite must not pass.
    added = optax.tree.cast_like(jax.tree.map(lambda g: gamma.astype(g.dtype) * g, gradient), updates)
    added, valid = add_finite(updates, added, jnp.isfinite(penalty) & (gamma >= 0))
    return added, penalty.astype(state.penalty.dtype), state.skipped + (~valid).astype(state.skipped.dtype)


def add_finite(updates: PyTree, added: PyTree, valid: jax.Array) -> tuple[PyTree, jax.Array]:
    """The updates with what is added where it is valid and finite, and whether it is."""
    for finite in leaves_finite(added):
        valid &= finite
    return jax.tree.map(lambda u, a: jnp.where(valid, u + a, u), updates, added), valid


def check_update(name: str, others: tuple, params: PyTree, batch: PyTree, state_key: jax.Array, key: jax.Array) -> None:
    """Raises an error for a call of update that lacks an argument, or whose arguments do not fit together."""
    if others:
        raise TypeError("the batch is given by name: tx.update(grads, state, params, batch=batch)")
    if params is None:
        raise ValueError(f"{name} needs the parameters: tx.update(grads, state, params, batch=batch)")
    if batch is MISSING:
        raise ValueError(
            f"{name} needs the batch of the step: tx.update(grads, state, params, batch=batch); "
            "TrainState.apply_gradients does not pass it on, so call tx.update and optax.apply_updates instead"
        )
    if jnp.shape(state_key) != jnp.shape(key):
        raise ValueError(
            f"the state holds a key of shape {jnp.shape(state_key)}, and key= of {name} has shape "
            f"{jnp.shape(key)}, of another implementation; use the implementation with which the state was made"
        )
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            "some parameters are hidden by optax.masked or optax.multi_transform, and the loss needs them all; "
            f"put {name} outside and choose layers with its argument layers="
        )


def key_data(key: jax.Array) -> tuple[jax.Array, Any]:
    """The raw data of a key, which a checkpoint can hold, and its implementation; None for a raw key."""
    check_key(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key), jax.random.key_impl(key)
    return key, None


def _is_coefficient(gamma):
    try:
        return not isinstance(gamma, bool) and np.ndim(gamma) == 0 and bool(np.isfinite(gamma) and gamma >= 0)
    except TypeError:  # not a number, or complex
        return False
