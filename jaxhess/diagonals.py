"""Diagonals of operators by random probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._checks import check_key, check_like
from jaxhess._linear import as_linear
from jaxhess._trees import draw_keys, random_rows, sampler
from jaxhess.estimates import Estimate, Plan

PyTree = Any


def diagonal(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    num_probes: int = 64,
    probe: str = "rademacher",
    chunk_size: int = 8,
) -> Estimate:
    """The diagonal of an operator: the mean of v * (A v), entry by entry, over random v.

    A Rademacher probe has in entry i the variance sum_{j != i} A_ij^2, so that a diagonal matrix is exact.

    Args:
      operator: v -> A v, as from `hessian`; traceable by JAX, or over `Batches`.
      like: a pytree of arrays like v.
      key: a JAX random key; the probes are those of `trace` with the same key.
      num_probes: number of probes.
      probe: "rademacher" or "gaussian".
      chunk_size: probes at a time; memory is that of so many products.

    Returns:
      `Estimate` of trees like v: the mean, and its standard error in each entry (NaN for one probe). The trace is the
      sum of the mean.

    Raises:
      ValueError: for fewer than one probe, an unknown probe, or an empty ``like``.
      TypeError: if ``key`` is not one JAX random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> found = jh.diagonal(lambda v: jnp.arange(3.0) * v, like=jnp.zeros(3), key=jax.random.key(0), num_probes=4)
      >>> found.mean, found.std_error
      (Array([0., 1., 2.], dtype=float32), Array([0., 0., 0.], dtype=float32))

    Reference: Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix.
    """
    check_key(key)
    check_like("like", like)
    plan = Plan(num_probes, chunk_size=chunk_size)
    linear, distribution = as_linear(operator), sampler(probe)
    moments: Any = None
    for done in range(0, num_probes, plan.chunk_size):
        vectors = random_rows(draw_keys(key, done, min(plan.chunk_size, num_probes - done)), like, distribution)
        moments = _add(moments, vectors, linear.func.stacked(*linear.args, vectors), done)
    mean, squares = moments
    scale = num_probes * (num_probes - 1)
    error = jax.tree.map(lambda s: jnp.sqrt(s / scale) if scale else jnp.full_like(s, jnp.nan), squares)
    return Estimate(mean, error, num_probes)


@jax.jit
def _add(moments, vectors, products, done):
    """The mean, and the sum of squared deviations from it, with the entries of more probes (Chan et al. 1979)."""
    new = jax.tree.map(lambda v, a: v * a, vectors, products)
    count = len(jax.tree.leaves(new)[0])
    mean = jax.tree.map(lambda x: x.mean(0), new)
    squares = jax.tree.map(lambda x, m: jnp.sum((x - m[None]) ** 2, axis=0), new, mean)
    if moments is None:
        return mean, squares
    share = count / (done + count)
    change = jax.tree.map(jnp.subtract, mean, moments[0])
    return (
        jax.tree.map(lambda m, d: m + share.astype(d.dtype) * d, moments[0], change),
        jax.tree.map(lambda a, b, d: a + b + d**2 * (done * share).astype(d.dtype), moments[1], squares, change),
    )
