"""The largest eigenvalues of an operator with their eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import at_least_float32, check_count, check_key, check_like, is_traced, standard_promotion
from jaxhess._lanczos import ritz, tridiagonalize
from jaxhess._linear import as_linear
from jaxhess._noise import noise, ritz_run
from jaxhess._subspace import leading_pairs, orthonormal, overlap_matrix
from jaxhess._trees import combine, leaves_finite, random_like, tree_norm, tree_size

PyTree = Any


def top_eigenpairs(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    k: int = 10,
    start: PyTree | None = None,
    num_steps: int | None = None,
    rtol: float | None = None,
    max_vectors: int | None = None,
    reorthogonalize: bool | str = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """The algebraically largest eigenvalues with their eigenvectors and residual norms.

    For the smallest, negate the operator. To follow them over a training, start from the vectors of the last time: then
    a few products are enough. With ``start``, ``rtol`` or ``max_vectors``, the basis grows by the residual of the worst
    pair; from one vector this is Lanczos with thick restarts.

    All copies of a repeated eigenvalue are found if ``num_steps`` reaches the dimension, or if the Krylov space is
    exhausted earlier; otherwise one copy of each is found.

    Args:
      operator: a symmetric v -> A v.
      like: a pytree of arrays like v.
      key: a JAX random key, for the start vector.
      k: number of pairs.
      start: vectors to start from, a pytree of (r, *leaf.shape), such as those that an earlier call returned. They need
        not be orthonormal.
      num_steps: products, at most the dimension: by default max(100, 5 k), and r + max(5, k) with ``start``. They take
        the memory of as many vectors, of twice as many with ``start`` or ``rtol``.
      rtol: stops when all residuals are at most this share of the largest value.
      max_vectors: the most vectors that are held, with as many products, at least k + 2; when they are there, the basis
        is cut to its leading Ritz vectors. By default ``num_steps``.
      reorthogonalize: True, or "host" as for `lanczos`.
      progress: as for `lanczos`.

    Returns:
      values (k,), descending; vectors, a pytree of (k, *leaf.shape) with orthonormal rows; residuals (k,): an
      eigenvalue lies within this distance of each value. A residual is the norm of A v - lambda v, from k further
      products, plus the rounding inside the operator, measured with a few more.

    Raises:
      ValueError: for an empty ``like``, k < 1, k beyond the dimension, fewer steps than k or than start vectors, start
        vectors that are zero, not finite or of another tree, or an operator that gives different results for the same v
        or is not symmetric.
      TypeError: under ``jit`` (use `lanczos` there), or if ``key`` is not a JAX random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> values, vectors, residuals = jh.top_eigenpairs(
      ...     lambda v: jnp.arange(5.0) * v, like=jnp.zeros(5), key=jax.random.key(0), k=2)
      >>> [round(float(x), 4) for x in values]
      [4.0, 3.0]

    Reference: Parlett 1998, The symmetric eigenvalue problem, chapter 13; Wu and Simon 2000, Thick-restart Lanczos
    method for large symmetric eigenvalue problems.
    """
    check_key(key)
    check_count("k", k)
    check_like("like", like)
    linear, dim = as_linear(operator), tree_size(like)
    if k > dim:
        raise ValueError(f"k = {k} eigenpairs were asked of an operator of dimension {dim}; ask for at most {dim}")
    rows = 0 if start is None else _check_start(start, like)
    usual = max(100, 5 * k) if start is None else rows + max(5, k)
    steps = min(usual if num_steps is None else num_steps, dim)
    if steps < k:
        raise ValueError(f"num_steps = {num_steps} Lanczos steps cannot give k = {k} eigenpairs; take more steps")
    if start is not None or rtol is not None or max_vectors is not None:
        return _restarted(linear, like, key, k, start, steps, rows, rtol, max_vectors, reorthogonalize)
    start_key, restart_key = jax.random.split(key)
    first = random_like(start_key, like)
    found = tridiagonalize(linear, first, steps, reorthogonalize, restart_key, progress)
    values, coefficients, _ = ritz(found.alphas, found.betas)
    top = np.argsort(values)[::-1][:k]
    vectors = combine(found.basis, coefficients[:, top])
    ends = ritz_run(found, vectors_of=[top[0], top[-1]])
    added = noise(linear, lambda product, _: product, {"": ends}, like, jax.random.fold_in(restart_key, 1))[""]
    residuals = np.asarray(_residuals(linear.func.stacked(*linear.args, vectors), vectors, values[top]))
    return values[top], vectors, residuals + added


def _restarted(linear, like, key, k, start, steps, rows, rtol, max_vectors, reorthogonalize):
    if reorthogonalize is not True:
        raise ValueError("start, rtol and max_vectors keep all vectors on the device; use reorthogonalize=True")
    if is_traced(linear, like, key, start):
        raise TypeError("start, rtol and max_vectors need a loop on the host and cannot run under jit; call it outside")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol must lie in [0, 1), got {rtol}")
    if steps < min(rows, tree_size(like)):
        raise ValueError(f"num_steps = {steps} products are fewer than the {rows} start vectors; give fewer vectors")
    room = steps if max_vectors is None else max_vectors
    if room < min(max(k + 2, rows), steps):
        raise ValueError(f"max_vectors = {room} must be at least k + 2 = {k + 2} and the {rows} start vectors")
    like = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), like)
    found = leading_pairs(linear, like, key, k, start, steps, min(room, steps), rtol or 0.0)
    rounding = linear.func.rounding(*linear.args, like) * np.abs(found.values).max()
    return found.values, found.vectors, found.residuals + rounding


def _check_start(start, like):
    """How many start vectors there are."""
    shapes = [np.shape(x) for x in jax.tree.leaves(start)]
    same = jax.tree.structure(start) == jax.tree.structure(like) and len({shape[:1] for shape in shapes}) == 1
    if not same or [shape[1:] for shape in shapes] != [np.shape(x) for x in jax.tree.leaves(like)] or not shapes[0][0]:
        raise ValueError(
            f"start must be a pytree like ``like`` with one leading axis for all arrays, got "
            f"{jax.tree.map(np.shape, start)}; take the vectors that an earlier call returned"
        )
    if not (is_traced(start) or all(bool(x) for x in leaves_finite(start))):
        raise ValueError("the start vectors are not finite")
    if not is_traced(start) and not any(np.any(x) for x in jax.tree.leaves(start)):
        raise ValueError("the start vectors are zero; leave start out for a random one")
    return shapes[0][0]


@jax.jit
@standard_promotion
def _residuals(products, vectors, values):
    rests = jax.tree.map(
        lambda a, v: a - v * values.astype(v.dtype).reshape(-1, *[1] * (v.ndim - 1)), products, vectors
    )
    return jax.vmap(tree_norm)(rests)


def subspace_overlap(vectors_a: PyTree, vectors_b: PyTree) -> float:
    """How far two spaces coincide: the mean squared cosine of the angles between them.

    ||Q_a' Q_b||_F^2 / min(k_a, k_b), with orthonormal bases Q of the two spaces: 1 if one holds the other, 0 if they
    are orthogonal. For one vector, such as a gradient, it is the share of its squared length that lies in the space.

    Args:
      vectors_a, vectors_b: pytrees of (k, *leaf.shape), as `top_eigenpairs` returns; rows need not be orthonormal, but
        linearly independent. For a gradient, ``jax.tree.map(lambda x: x[None], gradient)``.

    Returns:
      A float in [0, 1].

    Raises:
      ValueError: for vectors of different trees, linearly dependent or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> plane = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
      >>> round(jh.subspace_overlap(jnp.array([[1.0, 0.0, 0.0]]), plane), 4)
      0.5

    Reference: Gur-Ari, Roberts and Dyer 2018, Gradient descent happens in a tiny subspace (arXiv 1812.04754), equation
    (4).
    """
    trees = vectors_a, vectors_b
    structures: list[Any] = [jax.tree.structure(tree) for tree in trees]
    rows = [[np.shape(x)[1:] for x in jax.tree.leaves(tree)] for tree in trees]
    if structures[0] != structures[1] or rows[0] != rows[1] or not rows[0]:
        raise ValueError(f"the vectors must be pytrees of one structure with equal rows, got {rows[0]} and {rows[1]}")
    if any(len({np.shape(x)[:1] for x in jax.tree.leaves(tree)}) > 1 for tree in trees):
        raise ValueError("all arrays of the vectors must have one leading axis, that of the vectors")
    bases = [orthonormal(tree) for tree in trees]
    if None in [basis if basis is None else 0 for basis in bases]:
        raise ValueError("the vectors are linearly dependent, zero or not finite; give a basis of the space")
    cross = overlap_matrix(*bases)
    return float(np.clip(np.sum(cross**2) / min(cross.shape), 0, 1))
