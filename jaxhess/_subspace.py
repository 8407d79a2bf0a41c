"""Rayleigh and Ritz in a subspace that grows by residuals: eigenpairs that start from known vectors, in bounded memory.

From one start vector, the residuals of all Ritz vectors are the next vector of Lanczos, so that this is Lanczos with
thick restarts; from several it goes on with what the old vectors miss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxhess._checks import NotFiniteError, standard_promotion
from jaxhess._trees import full_precision, own_eps, random_like, take_row, tree_norm

PyTree = Any
_REFUSED = 1e-2  # of the largest eigenvalue: how far |q' A p - p' A q| may lie from zero


class Found(NamedTuple):
    """The leading Ritz pairs: values (k,) descending, vectors of (k, ...), residuals (k,), and the products taken."""

    values: np.ndarray
    vectors: PyTree
    residuals: np.ndarray
    num_products: int


class Subspace:
    """Orthonormal rows Q with the products A Q, and Q' A Q on the host."""

    def __init__(self, linear: Any, like: PyTree, room: int):
        """An empty one, for an operator, vectors like these, and so many rows."""
        self._linear, self._room = linear, room
        self._rows = jax.tree.map(lambda x: jnp.zeros((room, *x.shape), x.dtype), like)
        self._products, self._matrix, self._count = self._rows, np.zeros((room, room)), 0
        self.asymmetry = 0.0

    def add(self, v: PyTree, least: float) -> bool:
        """Adds the part of v that is new, and its product; False if it is no larger than ``least``, a share of v."""
        q, share = _new_part(self._rows, v)
        if not float(share) > least:
            return False
        product = self._linear(q)
        column, row = (np.asarray(x, np.float64) for x in _entries(self._rows, self._products, q, product))
        if not np.isfinite(column).all():
            raise NotFiniteError(f"a product is not finite: {self._linear.func.why_not_finite(*self._linear.args, q)}")
        i = self._count
        self._rows, self._products = _store(self._rows, self._products, q, product, i)
        self._matrix[: i + 1, i] = self._matrix[i, : i + 1] = np.append((column[:i] + row[:i]) / 2, column[-1])
        self.asymmetry = max(self.asymmetry, float(np.max(np.abs(column[:i] - row[:i]), initial=0)))
        self._count += 1
        return True

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """The Ritz values, descending, and their coefficients in columns."""
        values, vectors = scipy.linalg.eigh(self._matrix[: self._count, : self._count])
        return values[::-1], vectors[:, ::-1]

    def residuals(self, values: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """The norms of A y - theta y."""
        return np.array([float(tree_norm(self.residual(*pair))) for pair in zip(values, coefficients.T, strict=True)])

    def residual(self, value: float, coefficients: np.ndarray) -> PyTree:
        """A y - theta y."""
        padded = np.zeros(self._room)
        padded[: self._count] = coefficients
        return _residual(self._rows, self._products, padded, value)

    def vectors(self, coefficients: np.ndarray) -> PyTree:
        """Combinations of the rows, by the columns of the coefficients."""
        return _mixed(self._rows, _padded(coefficients, self._room))

    def compress(self, values: np.ndarray, coefficients: np.ndarray) -> None:
        """Keeps these Ritz vectors alone."""
        kept, mix = len(values), _padded(coefficients, self._room)
        self._rows, self._products = (_kept(tree, mix) for tree in (self._rows, self._products))
        self._matrix = np.zeros_like(self._matrix)
        self._matrix[range(kept), range(kept)] = values
        self._count = kept

    def full(self) -> bool:
        """Whether there is no room for another row."""
        return self._count == self._room


def leading_pairs(
    linear: Any, like: PyTree, key: jax.Array, k: int, start: PyTree | None, num_products: int, room: int, rtol: float
) -> Found:
    """The k largest eigenvalues with their vectors, by at most so many products.

    Args:
      linear: a symmetric operator of the protocol.
      like: a pytree like v.
      key: a JAX random key, for a start, and for what replaces a residual that vanishes.
      k: how many.
      start: rows (r, ...) to begin with; None for a random one.
      num_products: at most.
      room: rows that are held, with as many products.
      rtol: where to stop: all k residuals are at most this share of the largest value.
    """
    space, used = Subspace(linear, like, room), 0
    first = [random_like(key, like)] if start is None else [take_row(start, i) for i in range(_rows_of(start))]
    for v in first:
        used += space.add(v, 1e-3)
    stop, looked, extra = max(rtol, 10 * own_eps(like)), False, 0
    while True:
        values, coefficients = space.ritz()
        known = min(k, len(values))
        scale = max(np.abs(values).max(), np.finfo(np.float32).tiny)
        if space.asymmetry > _REFUSED * scale:
            raise ValueError(
                f"the operator is not symmetric, or gives different results for the same v: of two products p' A q and "
                f"q' A p differ by {space.asymmetry / scale:.1%} of its largest eigenvalue"
            )
        residuals = space.residuals(values[:known], coefficients[:, :known])
        done = known == k and (residuals <= stop * scale).all()
        if done and start is not None and not looked and used < num_products and not space.full():
            # The start may lie in an invariant subspace that lacks the largest: a random direction sees the others.
            looked, extra = True, used + 5
            used += space.add(random_like(jax.random.fold_in(key, 1), like), 1e-6)
            continue
        if used >= num_products or (done and used >= extra):
            return Found(values[:k], space.vectors(coefficients[:, :k]), residuals + 3 * space.asymmetry, used)
        worst = int(np.argmax(residuals))
        if done:  # the largest of the others that has not converged
            every = space.residuals(values, coefficients)
            worst = next((i for i, r in enumerate(every) if r > stop * scale), int(np.argmax(every)))
        direction = space.residual(values[worst], coefficients[:, worst])
        if space.full():
            keep = max(known, 1) + (room - known) // 3
            space.compress(values[:keep], coefficients[:, :keep])
        if not space.add(direction, 10 * own_eps(like)):
            used += space.add(random_like(jax.random.fold_in(key, used), like), 1e-6)
        else:
            used += 1


def _rows_of(tree):
    return len(jax.tree.leaves(tree)[0])


def _padded(coefficients, room):
    padded = np.zeros((room, coefficients.shape[1]))
    padded[: len(coefficients)] = coefficients
    return padded


@jax.jit
@standard_promotion
@full_precision
def _new_part(rows, v):
    """(the unit vector along the part of v that is orthogonal to the rows, its share of v)."""
    size = tree_norm(v)
    new = jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1).astype(x.dtype), v)
    for _ in range(2):
        onto = sum(jax.tree.leaves(jax.tree.map(_dots, rows, new)))
        new = jax.tree.map(lambda r, x, c=onto: x - jnp.tensordot(c.astype(x.dtype), r, 1), rows, new)
    share = tree_norm(new)
    return jax.tree.map(lambda x: x / jnp.where(share > 0, share, 1).astype(x.dtype), new), jnp.where(
        size > 0, share, 0
    )


def _dots(rows, x):
    return rows.reshape(len(rows), -1) @ x.ravel()


@jax.jit
@standard_promotion
@full_precision
def _entries(rows, products, q, product):
    """The products of all rows with A q and behind them q' A q; and of q with all A rows."""
    column = sum(jax.tree.leaves(jax.tree.map(_dots, rows, product)))
    row = sum(jax.tree.leaves(jax.tree.map(_dots, products, q)))
    own = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, q, product)))
    return jnp.append(column, own), row


@jax.jit
def _store(rows, products, q, product, i):
    def put(stacked, x):
        return jax.tree.map(lambda r, y: r.at[i].set(y.astype(r.dtype)), stacked, x)

    return put(rows, q), put(products, product)


@jax.jit
@standard_promotion
@full_precision
def _residual(rows, products, coefficients, value):
    def one(q, a):
        weights = coefficients.astype(q.dtype)
        return jnp.tensordot(weights, a, 1) - jnp.asarray(value, q.dtype) * jnp.tensordot(weights, q, 1)

    return jax.tree.map(one, rows, products)


@jax.jit
@full_precision
def _mixed(rows, coefficients):
    return jax.tree.map(lambda x: jnp.tensordot(coefficients.T.astype(x.dtype), x, 1), rows)


@jax.jit
def _kept(rows, coefficients):
    """The combinations first, and zeros behind them."""
    mixed = _mixed(rows, coefficients)
    return jax.tree.map(lambda r, m: jnp.zeros_like(r).at[: len(m)].set(m), rows, mixed)


def orthonormal(stacked: PyTree) -> PyTree | None:
    """An orthonormal basis of the rows; None if they are linearly dependent, zero or not finite."""
    rows = jax.tree.map(jnp.zeros_like, stacked)
    for i in range(_rows_of(stacked)):
        q, share = _new_part(rows, take_row(stacked, i))
        if not float(share) > 1e-5:
            return None
        rows, _ = _store(rows, rows, q, q, i)
    return rows


def overlap_matrix(a: PyTree, b: PyTree) -> np.ndarray:
    """(rows of a, rows of b): the inner products of rows, in float64 on the host."""
    return np.asarray(_cross(a, b), np.float64)


@jax.jit
@standard_promotion
@full_precision
def _cross(a, b):
    return sum(
        x.reshape(len(x), -1) @ y.reshape(len(y), -1).T
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
