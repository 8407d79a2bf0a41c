"""The basis of a Lanczos recurrence: what its next vector must be orthogonal to."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._trees import full_precision, random_like, spread

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
        if not isinstance(jax.tree.leaves(self.rows)[0], np.ndarray):
            return _write(self, vector, step)
        for rows, x in zip(jax.tree.leaves(self.rows), jax.tree.leaves(vector), strict=True):
            rows[int(step)] = x
        return self


@partial(jax.jit, donate_argnums=0)
def _write(basis, vector, step):
    """Kept separate from `_step`: fused with a reader, XLA copies the basis."""
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
