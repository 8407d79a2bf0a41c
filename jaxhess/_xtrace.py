"""Samples of a trace by XTrace: each from all but one of the random vectors, with that one as a probe of what is left.

With Q an orthonormal basis of the products Y = A W of m random vectors w, the trace of Q' A Q needs no probe. To leave
the i-th vector out is to leave one direction out of Q: with Y = Q R, the basis is Q (I - s_i s_i') for the unit vector
s_i that is orthogonal to all other columns of R. So the same 2 m products give m estimates (Epperly, Tropp and Webber
2024, XTrace, section 2).
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._trees import full_precision, own_eps, random_rows, to_host


def samples(operator, like, keys) -> np.ndarray:
    """(m,) estimates of the trace, one for each key, none with a bias."""
    drawn = random_rows(keys, like, jax.random.normal)
    products = operator.func.stacked(*operator.args, drawn)
    basis, r = _orthonormal(products)
    images = operator.func.stacked(*operator.args, _rows_like(basis, drawn))
    inner = [to_host(x).astype(np.float64) for x in (r, *_inner(drawn, products, basis, images))]
    if not all(np.isfinite(x).all() for x in inner):
        return np.full(len(keys), np.nan)
    return _leave_one_out(basis.shape[1], own_eps(like), *inner)


def _leave_one_out(dim, eps, r, w, t, h, forms, squares):
    """From R, W = Q' Omega, T = (A Q)' Omega, H = Q' A Q, and for each w_i the form w_i' A w_i and ||w_i||^2."""
    count = len(r)
    if not r.any():
        return np.zeros(count)  # A is zero
    # The columns of R are dependent where A has a small range. What leaves them independent is rounding, then.
    s = np.linalg.inv(r + eps * np.linalg.norm(r) * np.eye(count)).T
    s /= np.linalg.norm(s, axis=0)
    x = w - s * np.sum(s * w, axis=0)  # Q x_i is the part of w_i in the range that is left
    inside = np.trace(h) - np.sum(s * (h @ s), axis=0)
    outside = forms - 2 * np.sum(t * x, axis=0) + np.sum(x * (h @ x), axis=0)
    length = squares - np.sum(x**2, axis=0)  # of the part outside, squared; only its direction is random
    return inside + (dim - count + 1) * outside / np.maximum(length, eps * squares)


@jax.jit
@full_precision
def _orthonormal(products):
    """Q', (m, n), and R of the products as columns."""
    q, r = jnp.linalg.qr(_matrix(products).T)
    return q.T, r


@jax.jit
@full_precision
def _inner(drawn, products, basis, images):
    drawn, products, images = _matrix(drawn), _matrix(products), _matrix(images)
    squares = jnp.sum(drawn**2, axis=1)
    return basis @ drawn.T, images @ drawn.T, basis @ images.T, jnp.sum(drawn * products, axis=1), squares


def _matrix(rows):
    """(m, n), at least in float32."""
    leaves = jax.tree.leaves(rows)
    dtype = jnp.promote_types(jnp.result_type(*leaves), jnp.float32)
    return jnp.concatenate([x.reshape(len(x), -1).astype(dtype) for x in leaves], axis=1)


def _rows_like(matrix, rows):
    """The rows of a matrix as a pytree like given rows."""
    leaves, treedef = jax.tree.flatten(rows)
    ends = np.cumsum([x[0].size for x in leaves])[:-1]
    parts = jnp.split(matrix, ends, axis=1)
    return jax.tree.unflatten(treedef, [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)])
