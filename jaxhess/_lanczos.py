"""The Lanczos recurrence on pytrees: A Q = Q T + r e_k', with Ritz values and vectors from T.

The basis is a pytree of leaves stacked along a leading axis, (steps, *leaf.shape): it shards like the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from jaxhess._checks import (
    NotFiniteError,
    at_least_float32,
    check_count,
    check_key,
    check_known,
    check_like,
    is_traced,
)
from jaxhess._linear import as_linear
from jaxhess._recurrence import Basis, begin, begin_in_numpy, empty_basis, in_numpy, one_step, placed, step_of
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

    Outside ``jit``, a loop on the host takes the steps and stops at a breakdown. With a basis in the memory of the
    host, which is that of one CPU device or "host", it takes them in numpy, so that no step is compiled. Under ``jit``,
    the loop is compiled too. Steps after a breakdown are then zeros, and ``num_steps`` of the result is the number of
    valid steps.

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
    found = tridiagonalize(operator, start, num_steps, reorthogonalize, restart_key, progress)
    if reorthogonalize in (False, "host") or not in_numpy(found.basis):
        return found
    rows, treedef = jax.tree.flatten(found.basis)
    found = found._replace(basis=None)
    for i, x in enumerate(jax.tree.leaves(start)):  # one after the other, so that not all are there twice
        rows[i] = placed(rows[i], x)
    return found._replace(basis=jax.tree.unflatten(treedef, rows))


def tridiagonalize(
    operator: Callable[[PyTree], PyTree],
    start: PyTree,
    num_steps: int,
    reorthogonalize: bool | str,
    restart_key: jax.Array | None,
    progress: Callable[[int, int], None] | None,
) -> Tridiagonal:
    """As `lanczos`, with the basis where it was made: on a CPU in numpy."""
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
        return drive(lanczos_steps(start, num_steps, reorthogonalize, restart_key, progress), linear)
    num_steps = min(num_steps, tree_size(start))
    state = begin(start, num_steps)
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
    _check_outside(start)
    num_steps = min(num_steps, tree_size(start))
    start = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), start)
    # On a CPU numpy steps through JAX's memory, and nothing is compiled for each shape.
    where = "host" if reorthogonalize and all(map(numpy_reads, jax.tree.leaves(start))) else reorthogonalize
    state = (begin_in_numpy if where == "host" else begin)(start, num_steps)
    basis = empty_basis(state.vector, num_steps, where)
    return (yield from _steps(state, basis, start, restart_key, num_steps, progress))


def lanczos_beside(rows: PyTree, count: int, scale: float, start: PyTree, num_steps: int) -> Steps:
    """As `lanczos_steps`, in the complement of ``count`` orthonormal rows, behind which there is room for the steps.

    ``scale`` is the size of the operator, beside which a remainder is zero. With as many rows as another basis has, and
    of its kind, nothing new is compiled.
    """
    basis, room = Basis(rows), len(jax.tree.leaves(rows)[0])
    xp = np if in_numpy(basis) else jnp
    state = (begin_in_numpy if in_numpy(basis) else begin)(start, room)
    before = state._replace(step=xp.asarray(count), vector=jax.tree.map(xp.zeros_like, state.vector))
    state = step_of(basis)(basis, before, state.vector, None)._replace(
        step=before.step, scale=xp.asarray(scale, before.scale.dtype)
    )
    if not state.alive:
        return Tridiagonal(np.zeros(1), np.zeros(1), 1, None)  # the rows span the space
    return (yield from _steps(state, basis, start, None, num_steps, None, count))


def _run_compiled(operator, state, basis, restart_key, num_steps):
    def body(_, carry):
        state, basis = carry
        following = one_step(basis, state, operator(state.vector), restart_key)
        return following, basis.write(state.vector, state.step)

    state, basis = jax.lax.fori_loop(0, num_steps, body, (state, basis))
    return Tridiagonal(state.alphas, state.betas, state.num_valid, basis.rows)


def _steps(state, basis, start, restart_key, num_steps, progress, first=0):
    step = step_of(basis)
    for done in range(1, num_steps + 1):
        vector = state.vector
        product = yield jax.tree.map(placed, vector, start)
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
