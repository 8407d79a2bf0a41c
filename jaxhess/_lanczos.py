"""The Lanczos recurrence on pytrees: A Q = Q T + r e_k', with Ritz values and vectors from T.

The basis is a pytree of leaves stacked along a leading axis, (steps, *leaf.shape): it shards like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from numpy.typing import ArrayLike

from jaxhess._basis import Basis, empty_basis
from jaxhess._checks import (
    NotFiniteError,
    at_least_float32,
    check_count,
    check_key,
    check_known,
    check_like,
    is_traced,
    standard_promotion,
)
from jaxhess._linear import as_linear
from jaxhess._trees import numpy_reads, tree_norm, tree_size

PyTree = Any


class Tridiagonal(NamedTuple):
    """What `lanczos` found: T with diagonal ``alphas`` and off-diagonal ``betas[:-1]``.

    Attributes:
      alphas: (m,), the diagonal of T = Q' A Q.
      betas: (m,), the off-diagonal; the last is the norm of the remainder r, 0 if the recurrence broke down.
      num_steps: the number of valid steps: at most the dimension, and fewer after a breakdown.
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


def lanczos(
    operator: Callable[[PyTree], PyTree],
    start: PyTree,
    num_steps: int,
    *,
    reorthogonalize: bool | str = True,
    restart_key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tridiagonal:
    """The Lanczos recurrence from a start vector.

    With ``reorthogonalize``, each new vector is orthogonalised twice against all earlier ones, so Ritz values have no
    ghost copies. This takes the memory of ``num_steps`` vectors. Without it, three vectors are kept. That is enough for
    a density, because ghost copies share the weight of the eigenvalue that they copy.

    Outside ``jit``, a loop on the host takes the steps and stops at a breakdown. On a CPU it takes them in numpy, so
    that nothing but the product is compiled; elsewhere it runs a compiled step. Under ``jit``, the loop is compiled
    too. Steps after a breakdown are then zeros, and ``num_steps`` of the result is the number of valid steps.

    Args:
      operator: a symmetric v -> A v; over `Batches` only outside ``jit``.
      start: a pytree of floating-point arrays, not zero; it need not be normalised.
      num_steps: steps; at most the dimension are taken.
      reorthogonalize: whether the basis is kept and used. "host" keeps it in host memory, in numpy, if it does not fit
        on the device; steps then wait for the transfers.
      restart_key: a JAX random key. With it, the recurrence goes on after a breakdown (an exhausted invariant subspace)
        with a random vector orthogonal to the basis, and so finds repeated eigenvalues. This needs the basis.
      progress: ``progress(done, num_steps)``, called after each step of the host loop.

    Returns:
      `Tridiagonal`.

    Raises:
      ValueError: for fewer than one step, an empty start, a restart without a basis, another string than "host",
        or (outside ``jit``) a start vector that is zero or a product that is not finite.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> t = jh.lanczos(lambda v: jnp.array([1.0, 2.0]) * v, jnp.ones(2), 2)
      >>> [round(float(x), 4) for x in t.alphas], round(float(t.betas[0]), 4)
      ([1.5, 1.5], 0.5)

    Reference: Lanczos 1950; Parlett 1998, The symmetric eigenvalue problem, chapter 13.
    """
    check_count("num_steps", num_steps)
    check_like("start", start)
    check_basis(reorthogonalize)
    if restart_key is not None and not reorthogonalize:
        raise ValueError("a restart needs the basis to be orthogonal to; use reorthogonalize=True")
    if restart_key is not None:
        check_key(restart_key, "restart_key")
    linear = as_linear(operator)
    norm = tree_norm(start)
    traced = is_traced(linear, norm, restart_key)
    if traced and (linear.func.on_host or reorthogonalize == "host"):
        what = "a basis on the host" if reorthogonalize == "host" else "an operator over Batches"
        raise TypeError(f"{what} needs a loop on the host and cannot run under jit; call it outside")
    if not traced and not (np.isfinite(norm) and norm > 0):
        raise ValueError(f"Lanczos needs a start vector that is finite and not zero, got norm {norm}")
    if not traced:
        found = drive(lanczos_steps(start, num_steps, reorthogonalize, restart_key, progress), linear)
        return found if reorthogonalize == "host" else found._replace(basis=jax.tree.map(jnp.asarray, found.basis))
    num_steps = min(num_steps, tree_size(start))
    state = _begin(start, num_steps)
    basis = empty_basis(state.vector, num_steps, reorthogonalize)
    return _run_compiled(linear, state, basis, restart_key, num_steps)


def check_basis(reorthogonalize: Any) -> None:
    """ValueError for anything other than True, False and "host"."""
    if reorthogonalize not in (True, False, "host"):
        raise ValueError(f"reorthogonalize must be True, False or 'host', got {reorthogonalize!r}")


Steps = Generator[PyTree, PyTree, Any]  # yields vectors, and is sent their products


def drive(steps: Steps, operator: Any) -> Any:
    """What a recurrence returns, by the products of one operator."""
    vector = next(steps)
    while True:
        try:
            following = steps.send(operator(vector))
        except StopIteration as done:
            return done.value
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}: {operator.func.why_not_finite(*operator.args, vector)}") from None
        vector = following


def lanczos_steps(
    start: PyTree,
    num_steps: int,
    reorthogonalize: bool | str = True,
    restart_key: jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Steps:
    """`lanczos` outside ``jit``, as a generator that yields vectors and is sent their products."""
    num_steps = min(num_steps, tree_size(start))
    start = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), start)
    # On a CPU numpy steps through JAX's memory, and nothing is compiled for each shape.
    where = "host" if reorthogonalize and all(map(numpy_reads, jax.tree.leaves(start))) else reorthogonalize
    state = (_begin_in_numpy if where == "host" else _begin)(start, num_steps)
    basis = empty_basis(state.vector, num_steps, where)
    return (yield from _steps(state, basis, restart_key, num_steps, progress))


def lanczos_beside(rows: PyTree, count: int, scale: float, start: PyTree, num_steps: int) -> Steps:
    """As `lanczos_steps`, in the complement of ``count`` orthonormal rows, behind which there is room for the steps.

    ``scale`` is the size of the operator, beside which a remainder is zero. With as many rows as another basis has, and
    of its kind, nothing new is compiled.
    """
    basis, room = Basis(rows), len(jax.tree.leaves(rows)[0])
    xp, begin, step = (np, _begin_in_numpy, _step_in_numpy) if _in_numpy(basis) else (jnp, _begin, _step)
    state = begin(start, room)
    before = state._replace(step=xp.asarray(count), vector=jax.tree.map(xp.zeros_like, state.vector))
    state = step(basis, before, state.vector, None)._replace(
        step=before.step, scale=xp.asarray(scale, before.scale.dtype)
    )
    if not state.alive:
        return Tridiagonal(np.zeros(1), np.zeros(1), 1, None)  # the rows span the space
    return (yield from _steps(state, basis, None, num_steps, None, count))


def _run_compiled(operator, state, basis, restart_key, num_steps):
    def body(_, carry):
        state, basis = carry
        following = _step(basis, state, operator(state.vector), restart_key)
        return following, basis.write(state.vector, state.step)

    state, basis = jax.lax.fori_loop(0, num_steps, body, (state, basis))
    return Tridiagonal(state.alphas, state.betas, state.num_valid, basis.rows)


def _steps(state, basis, restart_key, num_steps, progress, first=0):
    step = _step_in_numpy if _in_numpy(basis) else _step
    for done in range(1, num_steps + 1):
        vector = state.vector
        product = yield jax.tree.map(jnp.asarray, vector)
        if done == 1:
            _check_outside(product, state.scale)
        following = step(basis, state, product, restart_key)
        basis, state = basis.write(vector, state.step), following
        if not np.isfinite(float(state.scale)):
            raise NotFiniteError(f"the product is not finite at Lanczos step {done}")
        if progress is not None:
            progress(done, num_steps)
        if not state.alive:
            break
    # Cut on the host: a slice on the device would be compiled for each length.
    alphas, betas = (np.asarray(x)[first : first + done] for x in (state.alphas, state.betas))
    rows = basis.rows if done == num_steps else jax.tree.map(lambda rows: rows[: first + done], basis.rows)
    return Tridiagonal(alphas, betas, done, rows)


def _in_numpy(basis):
    return isinstance(jax.tree.leaves(basis)[0], np.ndarray)


def ritz(alphas: ArrayLike, betas: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues of T, ascending, its eigenvectors in columns, and the residual norms of the Ritz pairs.

    The residual of A y - theta y is |beta_m s_m|, where s_m is the last entry of the eigenvector: some eigenvalue of A
    lies within it of the Ritz value theta. 30 eps max |theta| is added, in the precision of ``alphas``, for the
    rounding of the products. Coarser rounding inside an operator shows only in its products. Computed in float64, on
    the host.

    Args:
      alphas, betas: (m,) as in `Tridiagonal`.

    Returns:
      values (m,), vectors (m, m), residuals (m,).

    Raises:
      TypeError: under ``jit``.
    """
    _check_outside(alphas, betas)
    eps = np.finfo(np.asarray(alphas).dtype).eps
    alphas, betas = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
    values, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas[:-1])
    return values, vectors, np.abs(betas[-1] * vectors[-1]) + 30 * eps * np.abs(values).max()


def _check_outside(*values):
    functions = "spectrum, layer_spectra, top_eigenpairs and summarize"
    instead = f"call {functions} outside; lanczos and layer_traces run inside too"
    check_known("Ritz values are computed", instead, *jax.tree.leaves(values))


# ---- the recurrence ----


class _State(NamedTuple):
    step: jax.Array
    alphas: jax.Array
    betas: jax.Array
    scale: jax.Array  # the largest coefficient so far: what "zero" is measured against
    alive: jax.Array  # False after a breakdown without restart
    num_valid: jax.Array
    vector: PyTree  # q_j, the direction of the next product; zero after a breakdown


@partial(jax.jit, static_argnums=1)
@standard_promotion
def _begin(start, num_steps):
    start = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), start)
    dtype = at_least_float32(*jax.tree.leaves(start))
    return _State(
        step=jnp.array(0),
        alphas=jnp.zeros(num_steps, dtype),
        betas=jnp.zeros(num_steps, dtype),
        scale=jnp.zeros((), dtype),
        alive=jnp.array(True),
        num_valid=jnp.array(0, int),  # not weakly typed: the first step is one program with the others
        vector=optax.tree.cast_like(optax.tree.scale(1 / tree_norm(start), start), start),
    )


@jax.jit
@standard_promotion
def _step(basis, state, product, restart_key):
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
    return _State(
        step=state.step + 1,
        alphas=state.alphas.at[state.step].set(alpha),
        betas=state.betas.at[state.step].set(beta),
        scale=scale,
        alive=alive,
        num_valid=state.num_valid + state.alive.astype(int),
        vector=optax.tree.cast_like(vector, state.vector),
    )


# ---- the same in numpy ----


def _begin_in_numpy(start, num_steps):
    start = jax.tree.map(np.asarray, start)
    dtype, size = np.result_type(*jax.tree.leaves(start)), _norm(start)
    return _State(
        step=np.array(0),
        alphas=np.zeros(num_steps, dtype),
        betas=np.zeros(num_steps, dtype),
        scale=np.zeros((), dtype),
        alive=np.array(True),
        num_valid=np.array(0),
        vector=jax.tree.map(lambda x: x / size, start),
    )


def _step_in_numpy(basis, state, product, restart_key):
    step, product = int(state.step), jax.tree.map(np.asarray, product)
    basis = Basis(jax.tree.map(lambda rows: rows[:step], basis.rows))  # the rest is not written yet
    with np.errstate(all="ignore"):  # the scale tells what is not finite
        rest = basis.remainder(state, product)
        alpha, beta = sum(map(np.vdot, *map(jax.tree.leaves, (state.vector, product)))), _norm(rest)
        scale = np.maximum(state.scale, np.maximum(np.abs(alpha), beta)).astype(state.scale.dtype)
        exhausted = bool(beta <= 10 * np.finfo(scale.dtype).eps * scale)
        vector = jax.tree.map(lambda x: np.zeros_like(x) if exhausted else x / beta, rest)
    if exhausted and restart_key is not None:
        vector = basis.fresh(state, jax.random.fold_in(restart_key, step))
    alphas, betas = state.alphas.copy(), state.betas.copy()
    alphas[step], betas[step] = alpha, 0 if exhausted else beta
    return _State(
        step=np.array(step + 1),
        alphas=alphas,
        betas=betas,
        scale=scale,
        alive=state.alive & (restart_key is not None or not exhausted),
        num_valid=state.num_valid + state.alive,
        vector=jax.tree.map(lambda x, q: np.asarray(x, q.dtype), vector, state.vector),
    )


def _norm(tree):
    """`tree_norm` in numpy: that of BLAS, whose squares are never out of range."""
    return float(np.hypot.reduce([scipy.linalg.norm(x.ravel(), check_finite=False) for x in jax.tree.leaves(tree)]))
