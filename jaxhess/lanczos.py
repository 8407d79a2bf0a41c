"""The Lanczos recurrence on pytrees: A Q = Q T + r e_k', with Ritz values and vectors from T.

The basis is a pytree of leaves stacked along a leading axis, (steps, *leaf.shape): it shards like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from numpy.typing import ArrayLike

from jaxhess._checks import at_least_float32, check_count, check_key, check_known, check_like, standard_promotion
from jaxhess._diagnosis import NotFiniteError, why_product_not_finite
from jaxhess._noise import Run, noise
from jaxhess.operators import apply_stacked, as_partial, runs_on_host
from jaxhess.trace import random_like, spread

PyTree = Any


class Tridiagonal(NamedTuple):
    """What `lanczos` found: T with diagonal ``alphas`` and off-diagonal ``betas[:-1]``.

    Attributes:
      alphas: (m,), the diagonal of T = Q' A Q.
      betas: (m,), the off-diagonal; the last is the norm of the remainder r, 0 where the recurrence broke down.
      num_steps: the steps that count; fewer than asked for after a breakdown or beyond the dimension.
      basis: pytree of (m, *leaf.shape), orthonormal rows; None without reorthogonalisation.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> t = jh.lanczos(lambda v: 3.0 * v, jnp.ones(2), 2)
      >>> t.num_steps, [round(float(x), 4) for x in t.alphas]
      (1, [3.0])

    Reference: Parlett 1998, The symmetric eigenvalue problem, chapter 13.
    """

    alphas: jax.Array | np.ndarray
    betas: jax.Array | np.ndarray
    num_steps: jax.Array | int
    basis: PyTree | None


class _State(NamedTuple):
    step: jax.Array
    alphas: jax.Array
    betas: jax.Array
    scale: jax.Array  # the largest coefficient so far: what "zero" is measured against
    alive: jax.Array  # False after a breakdown without restart
    num_valid: jax.Array
    vector: PyTree  # q_j, the direction of the next product; zero after a breakdown
    previous: PyTree | None  # q_{j-1}, where no basis is kept


def lanczos(
    operator: Callable[[PyTree], PyTree],
    start: PyTree,
    num_steps: int,
    *,
    reorthogonalize: bool | str = True,
    restart_key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tridiagonal:
    """Lanczos's recurrence from a start vector.

    With ``reorthogonalize`` each new vector is orthogonalised twice against all earlier ones, and Ritz values have
    no ghosts; memory is that of ``num_steps`` vectors. Without, three vectors are held: enough for a density, for
    ghost copies share the weight of the eigenvalue that they copy.

    Outside ``jit`` it is a host loop over a compiled step, which is the quicker form on a CPU (convolutions inside
    a compiled loop run several times slower there) and stops at a breakdown. Under ``jit`` it becomes a compiled
    loop; steps after a breakdown then count as zeros, and ``num_steps`` of the result says how many are real.

    Args:
      operator: a symmetric v -> A v; over `Batches` only outside ``jit``.
      start: a pytree of floating-point arrays, not zero; it need not be normalised.
      num_steps: steps; at most the dimension are taken.
      reorthogonalize: keep and use the basis; "host" keeps it in the host's memory, in numpy, for what the device
        cannot hold: its steps wait for the transfers.
      restart_key: with a JAX random key, a breakdown (an invariant subspace is exhausted) continues with a random
        vector orthogonal to the basis, which finds repeated eigenvalues; needs the basis.
      progress: ``progress(done, num_steps)``, called after each step of the host loop.

    Returns:
      `Tridiagonal`.

    Raises:
      ValueError: for fewer than one step, an empty start, a restart without a basis, another word than "host", or
        (outside ``jit``) a start vector that is zero or a product that is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> t = jh.lanczos(lambda v: jnp.array([1.0, 2.0]) * v, jnp.ones(2), 2)
      >>> [round(float(x), 4) for x in t.alphas], round(float(t.betas[0]), 4)
      ([1.5, 1.5], 0.5)

    Reference: Lanczos 1950; Parlett 1998, The symmetric eigenvalue problem, chapter 13.
    """
    check_count("num_steps", num_steps)
    check_like("start", start)
    if reorthogonalize not in (True, False, "host"):
        raise ValueError(f"reorthogonalize must be True, False or 'host', got {reorthogonalize!r}")
    if restart_key is not None and not reorthogonalize:
        raise ValueError("a restart needs the basis to be orthogonal to; use reorthogonalize=True")
    if restart_key is not None:
        check_key(restart_key, "restart_key")
    num_steps = min(num_steps, dimension(start))
    operator = as_partial(operator)
    norm = tree_norm(start)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((operator, norm, restart_key))):
        if runs_on_host(operator) or reorthogonalize == "host":
            what = "a basis on the host" if reorthogonalize == "host" else "an operator over Batches"
            raise TypeError(f"{what} needs a loop on the host and cannot run under jit; call it outside")

        def body(_, carry):
            state, basis = carry
            following = _advance(state, basis, operator(state.vector), restart_key)
            return following, _write(basis, state.vector, state.step)

        state = _begin(start, num_steps, reorthogonalize)
        basis = _empty_basis(state.vector, num_steps, True) if reorthogonalize else None
        state, basis = jax.lax.fori_loop(0, num_steps, body, (state, basis))
        return Tridiagonal(state.alphas, state.betas, state.num_valid, basis)

    if not (np.isfinite(norm) and norm > 0):
        raise ValueError(f"Lanczos needs a start vector that is finite and not zero, got norm {norm}")
    advance, write = (_advance_on_host, _write_on_host) if reorthogonalize == "host" else (_advance, _write)
    state = _begin(start, num_steps, bool(reorthogonalize))
    basis = _empty_basis(state.vector, num_steps, reorthogonalize) if reorthogonalize else None
    for done in range(1, num_steps + 1):
        vector = state.vector
        following = advance(state, basis, operator(vector), restart_key)
        basis, state = write(basis, vector, state.step), following
        if not np.isfinite(float(state.scale)):
            why = why_product_not_finite(operator, vector)
            raise NotFiniteError(f"the product is not finite at Lanczos step {done}: {why}")
        if progress is not None:
            progress(done, num_steps)
        if not state.alive:
            break
    # Cut on the host: a slice for each length would be a compilation for each length.
    alphas, betas = (np.asarray(x)[:done] for x in (state.alphas, state.betas))
    if done < num_steps:
        basis = jax.tree.map(lambda rows: rows[:done], basis)
    return Tridiagonal(alphas, betas, done, basis)


def ritz(alphas: ArrayLike, betas: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues of T, ascending, its eigenvectors in columns, and the residual norms of the Ritz pairs.

    The residual of A y - theta y is |beta_m s_m|, with s_m the last entry of the eigenvector: some eigenvalue of A
    lies within it of the Ritz value theta. To it are added 30 eps * max |theta| in the precision of
    ``alphas``, for the rounding of the products; what an operator computes more coarsely than that is for `noise` to
    find. In float64, on the host.

    Args:
      alphas, betas: (m,) as in `Tridiagonal`.

    Returns:
      values (m,), vectors (m, m), residuals (m,).

    Raises:
      TypeError: under ``jit``.
    """
    check_known(
        "Ritz values are computed",
        "call spectrum, layer_spectra, top_eigenpairs and summarize outside; lanczos and layer_traces run inside too",
        alphas,
        betas,
    )
    eps = np.finfo(np.asarray(alphas).dtype).eps
    alphas, betas = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
    values, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1])
    return values, vectors, np.abs(betas[-1] * vectors[-1]) + 30 * eps * np.abs(values).max()


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

    For the smallest, negate the operator. Repeated eigenvalues are all found where ``num_steps`` reaches the
    dimension or the Krylov space is exhausted before; otherwise one start vector sees one copy of each.

    Args:
      operator: a symmetric v -> A v.
      like: a pytree of arrays like v.
      key: a JAX random key, for the start vector.
      k: number of pairs.
      num_steps: Lanczos steps, by default max(100, 5 k), at most the dimension. Memory is that of so many vectors.
      reorthogonalize: True, or "host" as for `lanczos`.
      progress: as for `lanczos`.

    Returns:
      values (k,) descending; vectors, a pytree of (k, *leaf.shape) with orthonormal rows; residuals (k,): within each
      lies an eigenvalue. They are the norms of A v - lambda v, computed with k further products, and what a few more
      tell of the rounding inside the operator.

    Raises:
      ValueError: for an empty ``like``, k < 1, k beyond the dimension, fewer steps than k, or an operator that does not
        repeat itself or is not symmetric.
      TypeError: under ``jit``, where `lanczos` runs in its place, or for a key that is none.

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
    dim = dimension(like)
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
    operator = as_partial(operator)
    ends = ritz_run(found, vectors_of=[top[0], top[-1]])
    added = noise(operator, lambda product, _: product, {"": ends}, like, jax.random.fold_in(restart_key, 1))[""]
    residuals = np.asarray(_residuals(apply_stacked(operator, vectors), vectors, values[top]))
    return values[top], vectors, residuals + added


def ritz_run(found: Tridiagonal, vectors_of: Sequence[int] | None = None) -> Run:
    """The Ritz pairs of these numbers, by default the two extreme ones, with what the recurrence claims of them."""
    values, coefficients, _ = ritz(found.alphas, found.betas)
    some = sorted({0, len(values) - 1} if vectors_of is None else set(vectors_of))
    claimed = np.abs(np.float64(found.betas[-1]) * coefficients[-1, some])
    return Run(values[some], combine(found.basis, coefficients[:, some]), claimed)


def dimension(tree: PyTree) -> int:
    """The number of entries of all arrays of a tree."""
    return sum(int(np.size(x)) for x in jax.tree.leaves(tree))


@jax.jit
@standard_promotion
def tree_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm, by no square that is out of range: float32 has none of numbers below 1e-19."""
    largest = reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)])
    # A power of two rounds nothing; zero, infinity and NaN go as they are.
    unit = jnp.where(
        jnp.isfinite(largest) & (largest > 0), jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1] - 1), 1
    )
    return unit * optax.tree.norm(jax.tree.map(lambda x: x / unit.astype(jnp.result_type(x)), tree))


def combine(basis: PyTree, coefficients: np.ndarray) -> PyTree:
    """Combinations of the rows of a basis, (k, ...), with coefficients (m, k), where the basis is."""

    def one(rows):
        # On a CPU numpy reads JAX's memory, and nothing is compiled for each shape.
        here = isinstance(rows, np.ndarray) or (rows.is_fully_addressable and not spread(rows) and _on_cpu(rows))
        xp = np if here else jnp
        with jax.default_matmul_precision("float32"):
            return xp.tensordot(coefficients.T.astype(rows.dtype), xp.asarray(rows), 1)

    return jax.tree.map(one, basis)


def _on_cpu(x):
    return all(device.platform == "cpu" for device in x.devices())


@jax.jit
@standard_promotion
def _residuals(products, vectors, values):
    rests = jax.tree.map(
        lambda a, v: a - v * values.astype(v.dtype).reshape(-1, *[1] * (v.ndim - 1)), products, vectors
    )
    return jax.vmap(tree_norm)(rests)


# ---- the recurrence ----


@partial(jax.jit, static_argnums=(1, 2))
@standard_promotion
def _begin(start, num_steps, keep_basis):
    start = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), start)
    dtype = at_least_float32(*jax.tree.leaves(start))
    return _State(
        step=jnp.array(0),
        alphas=jnp.zeros(num_steps, dtype),
        betas=jnp.zeros(num_steps, dtype),
        scale=jnp.zeros((), dtype),
        alive=jnp.array(True),
        num_valid=jnp.array(0),
        vector=_as(optax.tree.scale(1 / tree_norm(start), start), start),
        previous=None if keep_basis else optax.tree.zeros_like(start),
    )


def _empty_basis(vector, num_steps, where):
    """Zeros for so many vectors, on the host or each spread over devices as this one is."""

    def zeros(x):
        if where == "host":
            return np.zeros((num_steps, *x.shape), x.dtype)
        sharding = spread(x)
        if sharding is not None:
            spec = jax.sharding.PartitionSpec(None, *sharding.spec)
            sharding = jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
        return jnp.zeros((num_steps, *x.shape), x.dtype, device=sharding)

    return jax.tree.map(zeros, vector)


@jax.jit
@standard_promotion
def _advance(state, basis, product, restart_key):
    """One step, given the product of the operator with the state's vector, which is not yet a row of the basis."""
    vector = state.vector
    if basis is not None:
        # Twice is enough (Parlett 1998, 6.9); the projection takes out alpha q_j and beta q_{j-1} too.
        rest = _orthogonalize(basis, vector, _orthogonalize(basis, vector, product))
    else:
        alpha, last = optax.tree.vdot(vector, product), state.betas[state.step - 1]  # at step 0 the last one, still 0
        rest = jax.tree.map(lambda w, q, p: w - alpha * q - last * p, product, vector, state.previous)
    following, exhausted = _follow(state, product, rest, basis is not None)
    if restart_key is None:
        return following
    key = jax.random.fold_in(restart_key, state.step)
    restarted = jax.lax.cond(exhausted, lambda: _as(_fresh(basis, vector, key), vector), lambda: following.vector)
    return following._replace(vector=restarted, alive=state.alive)


@partial(jax.jit, static_argnums=3)
def _follow(state, product, rest, has_basis):
    """The state behind a step with this remainder, and whether the remainder is zero."""
    alpha, beta = optax.tree.vdot(state.vector, product), tree_norm(rest)
    scale = jnp.maximum(state.scale, jnp.maximum(jnp.abs(alpha), beta))
    exhausted = beta <= 10 * jnp.finfo(beta.dtype).eps * scale
    beta = jnp.where(exhausted, 0, beta)
    following = _State(
        step=state.step + 1,
        alphas=state.alphas.at[state.step].set(alpha),
        betas=state.betas.at[state.step].set(beta),
        scale=scale,
        alive=state.alive & ~exhausted,
        num_valid=state.num_valid + state.alive.astype(int),
        vector=_as(optax.tree.scale(jnp.where(exhausted, 0, 1 / jnp.where(exhausted, 1, beta)), rest), state.vector),
        previous=None if has_basis else state.vector,
    )
    return following, exhausted


def _as(tree, like):
    """In the dtypes of ``like``: a scalar in float64 would turn leaves in float32 into such."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


@partial(jax.jit, donate_argnums=0)
def _write(basis, vector, step):
    """The basis with one row more, in place. Apart from `_advance`: in one program with what reads it XLA copies."""
    return None if basis is None else jax.tree.map(lambda rows, q: rows.at[step].set(q), basis, vector)


def _orthogonalize(basis, last, vector):
    """The vector less its projection onto the rows of the basis and onto the last vector, not yet a row."""
    with jax.default_matmul_precision("float32"):
        # Methods and operators alone, so that what is in numpy stays there.
        triples = list(zip(*map(jax.tree.leaves, (basis, last, vector)), strict=True))
        flat = [rows.reshape(len(rows), x.size) for rows, _, x in triples]
        coefficients = sum(rows @ x.ravel() for rows, (_, _, x) in zip(flat, triples, strict=True))
        overlap = sum(q.ravel() @ x.ravel() for _, q, x in triples)
        rests = [
            x - (coefficients @ rows).reshape(x.shape) - overlap * q
            for rows, (_, q, x) in zip(flat, triples, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(vector), rests)


def _fresh(basis, last, key):
    """A random unit vector orthogonal to the basis and the last vector; zero where they span the space."""
    vector = random_like(key, last)
    if isinstance(jax.tree.leaves(basis)[0], np.ndarray):
        vector = jax.tree.map(np.asarray, vector)
    size = optax.tree.norm(vector)
    vector = _orthogonalize(basis, last, _orthogonalize(basis, last, vector))
    norm = optax.tree.norm(vector)
    ok = norm > 100 * jnp.finfo(norm.dtype).eps * size
    return optax.tree.scale(jnp.where(ok, 1 / jnp.where(ok, norm, 1), 0), vector)


@standard_promotion
def _advance_on_host(state, basis, product, restart_key):
    """`_advance` with a basis in numpy."""
    vector, rest = (jax.tree.map(np.asarray, tree) for tree in (state.vector, product))
    rows = jax.tree.map(lambda rows: rows[: int(state.step)], basis)
    for _ in range(2):
        rest = _orthogonalize(rows, vector, rest)
    following, exhausted = _follow(state, product, rest, True)
    if restart_key is None:
        return following
    if exhausted:
        fresh = _fresh(rows, vector, jax.random.fold_in(restart_key, state.step))
        following = following._replace(vector=fresh)
    return following._replace(alive=state.alive)


def _write_on_host(basis, vector, step):
    for rows, x in zip(jax.tree.leaves(basis), jax.tree.leaves(vector), strict=True):
        rows[int(step)] = x
    return basis
