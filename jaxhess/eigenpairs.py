"""The largest eigenvalues of an operator with their eigenvectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhess._checks import check_count, check_key, check_like, standard_promotion
from jaxhess._lanczos import lanczos, ritz
from jaxhess._linear import as_linear
from jaxhess._noise import noise, ritz_run
from jaxhess._trees import combine, random_like, tree_norm, tree_size

PyTree = Any


def top_eigenpairs(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    k: int = 10,
    num_steps: int | None = None,
    reorthogonalize: bool | str = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """The algebraically largest eigenvalues with their eigenvectors and residual norms.

    For the smallest, negate the operator. All copies of a repeated eigenvalue are found if ``num_steps`` reaches the
    dimension, or if the Krylov space is exhausted earlier; otherwise one copy of each is found.

    Args:
      operator: a symmetric v -> A v.
      like: a pytree of arrays like v.
      key: a JAX random key, for the start vector.
      k: number of pairs.
      num_steps: Lanczos steps, by default max(100, 5 k), at most the dimension. They take the memory of as
        many vectors.
      reorthogonalize: True, or "host" as for `lanczos`.
      progress: as for `lanczos`.

    Returns:
      values (k,), descending; vectors, a pytree of (k, *leaf.shape) with orthonormal rows; residuals (k,): an
      eigenvalue lies within this distance of each value. A residual is the norm of A v - lambda v, from k further
      products, plus the rounding inside the operator, measured with a few more.

    Raises:
      ValueError: for an empty ``like``, k < 1, k beyond the dimension, fewer steps than k, or an operator that gives
        different results for the same v or is not symmetric.
      TypeError: under ``jit`` (use `lanczos` there), or if ``key`` is not a JAX random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> values, vectors, residuals = jh.top_eigenpairs(
      ...     lambda v: jnp.arange(5.0) * v, like=jnp.zeros(5), key=jax.random.key(0), k=2)
      >>> [round(float(x), 4) for x in values]
      [4.0, 3.0]

    Reference: Parlett 1998, The symmetric eigenvalue problem, chapter 13.
    """
    check_key(key)
    check_count("k", k)
    check_like("like", like)
    linear, dim = as_linear(operator), tree_size(like)
    if k > dim:
        raise ValueError(f"k = {k} eigenpairs were asked of an operator of dimension {dim}; ask for at most {dim}")
    steps = min(max(100, 5 * k) if num_steps is None else num_steps, dim)
    if steps < k:
        raise ValueError(f"num_steps = {num_steps} Lanczos steps cannot give k = {k} eigenpairs; take more steps")
    start_key, restart_key = jax.random.split(key)
    start = random_like(start_key, like)
    found = lanczos(operator, start, steps, reorthogonalize=reorthogonalize, restart_key=restart_key, progress=progress)
    values, coefficients, _ = ritz(found.alphas, found.betas)
    top = np.argsort(values)[::-1][:k]
    vectors = combine(found.basis, coefficients[:, top])
    ends = ritz_run(found, vectors_of=[top[0], top[-1]])
    added = noise(linear, lambda product, _: product, {"": ends}, like, jax.random.fold_in(restart_key, 1))[""]
    residuals = np.asarray(_residuals(linear.func.stacked(*linear.args, vectors), vectors, values[top]))
    return values[top], vectors, residuals + added


@jax.jit
@standard_promotion
def _residuals(products, vectors, values):
    rests = jax.tree.map(
        lambda a, v: a - v * values.astype(v.dtype).reshape(-1, *[1] * (v.ndim - 1)), products, vectors
    )
    return jax.vmap(tree_norm)(rests)
