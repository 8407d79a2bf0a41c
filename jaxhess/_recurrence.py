"""A step of the Lanczos recurrence, and the basis that its next vector must be orthogonal to: in JAX and in numpy."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from jaxhess._checks import at_least_float32, standard_promotion
from jaxhess._trees import full_precision, random_like, spread, tree_norm

PyTree = Any


class Basis(NamedTuple):
    """All vectors so far as rows, (steps, *leaf.shape), on the device or in numpy; those not yet written are zero."""

    rows: PyTree

    def remainder(self, state, product):
        """The product without its components along the basis and the last vector, which are the new column of T."""
        once = _orthogonalize(self.rows, state.vector, product)
        return _orthogonalize(self.rows, state.vector, once)  # twice is enough (Parlett 1998, 6.9)

    def fresh(self, state, key):
        """A random unit vector orthogonal to the basis and the last vector; zero if they span the space."""
        drawn = random_like(key, state.vector)
        drawn = jax.tree.map(lambda x, rows: np.asarray(x) if isinstance(rows, np.ndarray) else x, drawn, self.rows)
        size = optax.tree.norm(drawn)
        vector = self.remainder(state, drawn)
        norm = optax.tree.norm(vector)
        ok = norm > 100 * jnp.finfo(norm.dtype).eps * size
        return optax.tree.scale(jnp.where(ok, 1 / jnp.where(ok, norm, 1), 0), vector)

    def write(self, vector, step):
        """The basis with one more row, in place."""
        if not in_numpy(self):
            return _write(self, vector, step)
        for rows, x in zip(jax.tree.leaves(self.rows), jax.tree.leaves(vector), strict=True):
            rows[int(step)] = x
        return self


@partial(jax.jit, donate_argnums=0)
def _write(basis, vector, step):
    """Kept separate from `one_step`: fused with a reader, XLA copies the basis."""
    return Basis(jax.tree.map(lambda rows, q: rows.at[step].set(q), basis.rows, vector))


class LastVector(NamedTuple):
    """Only the vector before the last: the three-term recurrence."""

    previous: PyTree

    @property
    def rows(self):
        return None

    def remainder(self, state, product):
        alpha, last = optax.tree.vdot(state.vector, product), state.betas[state.step - 1]  # at step 0 the last one, 0
        return jax.tree.map(lambda w, q, p: w - alpha * q - last * p, product, state.vector, self.previous)

    def write(self, vector, step):
        del step
        return LastVector(vector)


def empty_basis(vector, num_steps, where):
    """Zeros for ``num_steps`` vectors, on the host, or each sharded over devices like this one."""

    def zeros(x):
        if where == "host":
            return np.zeros((num_steps, *x.shape), x.dtype)
        sharding = spread(x)
        if sharding is not None:
            spec = jax.sharding.PartitionSpec(None, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        return jnp.zeros((num_steps, *x.shape), x.dtype, device=sharding)

    return Basis(jax.tree.map(zeros, vector)) if where else LastVector(optax.tree.zeros_like(vector))


@full_precision
def _orthogonalize(basis, last, vector):
    """The vector minus its projections onto the rows of the basis and the last vector, which is not yet a row."""
    # Only methods and operators, so that numpy arrays stay in numpy.
    triples = list(zip(*map(jax.tree.leaves, (basis, last, vector)), strict=True))
    flat = [rows.reshape(len(rows), x.size) for rows, _, x in triples]
    coefficients = sum(rows @ x.ravel() for rows, (_, _, x) in zip(flat, triples, strict=True))
    overlap = sum(q.ravel() @ x.ravel() for _, q, x in triples)
    rests = [
        x - (coefficients @ rows).reshape(x.shape) - overlap * q for rows, (_, q, x) in zip(flat, triples, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(vector), rests)


# ---- a step ----


class State(NamedTuple):
    """Where a recurrence stands; its arrays are those of JAX or of numpy."""

    step: jax.Array
    alphas: jax.Array
    betas: jax.Array
    scale: jax.Array  # the largest coefficient so far: what "zero" is measured against
    alive: jax.Array  # False after a breakdown without restart
    num_valid: jax.Array
    vector: PyTree  # q_j, the direction of the next product; zero after a breakdown


@partial(jax.jit, static_argnums=1)
@standard_promotion
def begin(start, num_steps):
    """The state before the first step."""
    start = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), start)
    dtype = at_least_float32(*jax.tree.leaves(start))
    return _first(jnp, num_steps, dtype, optax.tree.cast_like(optax.tree.scale(1 / tree_norm(start), start), start))


def _first(xp, num_steps, dtype, vector):
    return State(
        step=xp.array(0, int),  # not weakly typed: the first step is one program with the others
        alphas=xp.zeros(num_steps, dtype),
        betas=xp.zeros(num_steps, dtype),
        scale=xp.zeros((), dtype),
        alive=xp.array(True),
        num_valid=xp.array(0, int),
        vector=vector,
    )


@jax.jit
@standard_promotion
def one_step(basis, state, product, restart_key):
    """One step, given the product with the state's vector, which is not yet a row of the basis."""
    rest = basis.remainder(state, product)
    alpha, beta = optax.tree.vdot(state.vector, product), tree_norm(rest)
    scale = jnp.maximum(state.scale, jnp.maximum(jnp.abs(alpha), beta))
    exhausted = beta <= 10 * jnp.finfo(beta.dtype).eps * scale
    beta = jnp.where(exhausted, 0, beta)
    vector = optax.tree.scale(jnp.where(exhausted, 0, 1 / jnp.where(exhausted, 1, beta)), rest)
    alive = state.alive & ~exhausted
    if restart_key is not None:
        key, alive = jax.random.fold_in(restart_key, state.step), state.alive
        drawn = lambda: optax.tree.cast_like(basis.fresh(state, key), vector)
        vector = jax.lax.cond(exhausted, drawn, lambda: vector)
    return State(
        step=state.step + 1,
        alphas=state.alphas.at[state.step].set(alpha),
        betas=state.betas.at[state.step].set(beta),
        scale=scale,
        alive=alive,
        num_valid=state.num_valid + state.alive.astype(int),
        vector=optax.tree.cast_like(vector, state.vector),
    )


# ---- the same in numpy ----


def begin_in_numpy(start, num_steps):
    """As `begin`, of arrays in the memory of a CPU."""
    start = jax.tree.map(np.asarray, start)
    dtype, size = at_least_float32(*jax.tree.leaves(start)), norm_in_numpy(start)
    return _first(np, num_steps, dtype, jax.tree.map(lambda x: np.asarray(x / size, x.dtype), start))


@standard_promotion
def step_in_numpy(basis, state, product, restart_key):
    """As `one_step`, compiled for no shape; a restart draws its vector in JAX."""
    step, product = int(state.step), jax.tree.map(np.asarray, product)
    basis = Basis(jax.tree.map(lambda rows: rows[:step], basis.rows))  # the rest is not written yet
    with np.errstate(all="ignore"):  # the scale tells what is not finite
        rest = basis.remainder(state, product)
        alpha, beta = sum(map(np.vdot, *map(jax.tree.leaves, (state.vector, product)))), norm_in_numpy(rest)
        scale = np.maximum(state.scale, np.maximum(np.abs(alpha), beta)).astype(state.scale.dtype)
        exhausted = bool(beta <= 10 * np.finfo(scale.dtype).eps * scale)
        vector = jax.tree.map(lambda x: np.zeros_like(x) if exhausted else x / beta, rest)
    if exhausted and restart_key is not None:
        vector = basis.fresh(state, jax.random.fold_in(restart_key, step))
    alphas, betas = state.alphas.copy(), state.betas.copy()
    alphas[step], betas[step] = alpha, 0 if exhausted else beta
    return State(
        step=np.array(step + 1),
        alphas=alphas,
        betas=betas,
        scale=scale,
        alive=state.alive & (restart_key is not None or not exhausted),
        num_valid=state.num_valid + state.alive,
        vector=jax.tree.map(lambda x, q: np.asarray(x, q.dtype), vector, state.vector),
    )


def norm_in_numpy(tree):
    """`tree_norm` in numpy: that of BLAS, whose squares are never out of range."""
    norms = [float(scipy.linalg.norm(x.ravel(), check_finite=False)) for x in jax.tree.leaves(tree)]
    return float(np.hypot.reduce(norms))


def placed(x, like):
    """An array of numpy as one of JAX, on the device that another is bound to; nothing is compiled for it."""
    if not isinstance(x, np.ndarray):
        return x
    if not (isinstance(like, jax.Array) and like.committed):
        return jax.device_put(x)
    return jax.device_put(x, like.sharding if x.shape == like.shape else next(iter(like.devices())))


def step_of(basis):
    """The step that goes with a basis."""
    return step_in_numpy if in_numpy(basis) else one_step


def in_numpy(basis):
    """Whether a basis is held in numpy."""
    return isinstance(jax.tree.leaves(basis)[0], np.ndarray)
