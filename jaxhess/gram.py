"""The Gauss-Newton matrix through its Gram matrix: exact eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxhess._checks import NotFiniteError, check_count
from jaxhess._diagnosis import why_not_finite
from jaxhess._rows import Rows, known_outputs
from jaxhess._trees import full_precision, own_eps, to_host
from jaxhess.logits import Logits
from jaxhess.objective import NoFactorError, Objective
from jaxhess.problem import Problem, pose
from jaxhess.selections import Layer, Selection, Selections

PyTree = Any
_TRIED = 2  # examples at which the rounding of rows is seen


def ggn_eigenvalues(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    layer: Selection = None,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> np.ndarray:
    """All non-zero eigenvalues of G, or of one layer's G_l, exactly.

    With B B' = S the matrix G = (J' B)(J' B)' has the non-zero eigenvalues of the Gram matrix (J' B)' (J' B), whose
    side is the number of examples times C. This is cheap up to a few thousand; use `layer_spectra` beyond that.
    The Gram matrix is summed over layers and built from the rows of a few examples at a time: the Jacobian of the whole
    batch is held only if it fits in ``max_bytes``.

    If examples do not depend on each other (the outputs of an example alone are its outputs in the batch), each row is
    differentiated through its own example only; otherwise (batch norm in training mode) through the whole batch.

    Args:
      objective: an `Objective` with a criterion convex in the outputs.
      params, has_aux: as for `hessian`.
      batch: one batch.
      layer: a layer or group, as for `hessian`; by default the whole net.
      max_bytes: memory for rows of the Jacobian. At least the rows of one example are held; with less memory, rows are
        computed more than once.
      progress: ``progress(done, total)``, counted in examples, again for each time that their rows are computed.

    Returns:
      (r,) float64, descending; values that cannot be told from zero because of rounding are left out.

    Raises:
      TypeError, ValueError: as `hessian`; TypeError for `Batches` and under ``jit``; ValueError for a criterion
        without a factor.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> batch = {"x": jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), "label": jnp.ones((2, 1))}
      >>> jh.ggn_eigenvalues(objective, jnp.zeros((3, 1)), batch)
      array([4., 1.])

    Reference: Papyan 2019, section 2 (G as the second moment of delta_{i,c,c'}).
    """
    problem = pose("ggn", objective, params, batch, has_aux)
    layers = problem.parts() if layer is None else [problem.layer(layer)]
    grams, _ = gram_matrices(problem, layers, max_bytes, progress)
    return nonzero(grams["total"], 10 * own_eps(problem.params))


def gram_eigenvalues(
    problem: Problem, names: Collection[str], max_bytes: int, progress: Callable | None
) -> dict[str, tuple[np.ndarray, float]]:
    """The non-zero eigenvalues of G_l of those layers of a problem that are named, and of the net if "total" is.

    Each comes with its rounding, as a share of the largest: of the products, and of the rows themselves.
    """
    grams, noise = layer_grams(problem, names, max_bytes, progress)
    least = 10 * own_eps(problem.params)
    return {name: (nonzero(gram, least), max(least, noise[name])) for name, gram in grams.items()}


def gram_rows(problem: Problem) -> int:
    """The rows of the Gram matrix of G; 0 where there is none: a plain loss, `Batches`, no factor of the criterion."""
    if problem.many or not isinstance(problem.loss, Objective):
        return 0
    if isinstance(problem.outputs_like, Logits):
        return 0
    outputs = known_outputs(problem)
    try:
        problem.factored(max_classes=outputs.shape[-1])
    except NoFactorError:
        return 0
    return outputs.size


def nonzero(gram: np.ndarray, rtol: float, scale: float | None = None) -> np.ndarray:
    """Eigenvalues, descending, that are not zero beside the scale: the largest one unless given."""
    values = scipy.linalg.eigvalsh(gram)[::-1]
    return values[values > rtol * (max(values[0], 0) if scale is None else scale)]


def layer_grams(
    problem: Problem, names: Collection[str], max_bytes: int, progress: Callable | None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """As `gram_matrices`, for those layers of a problem that are named, and for the whole net if "total" is."""
    layers = [layer for layer in problem.layers if layer.name in names]
    if "total" not in names:
        grams, noise = gram_matrices(problem, layers, max_bytes, progress)
    elif problem.covered or set(layers) <= set(problem.parts()):
        every = problem.layers if problem.covered else problem.parts()
        grams, noise = gram_matrices(problem, every, max_bytes, progress)
    else:  # the layers do not add up to the net
        grams, noise = gram_matrices(problem, layers, max_bytes, progress)
        whole = gram_matrices(problem, problem.parts(), max_bytes, progress)
        grams["total"], noise["total"] = whole[0]["total"], whole[1]["total"]
    return {name: gram for name, gram in grams.items() if name in names}, noise


def gram_matrices(
    problem: Problem, layers: Sequence[Layer], max_bytes: int, progress: Callable | None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(J_l' B)' (J_l' B) of every layer and their sum, "total": float64, rows ordered by example, position, class.

    And {layer: the relative rounding of its eigenvalues}. Of a group of layers the rows of as many examples as fit are
    held, and those of all later examples pass by them, one example at a time: the cotangents of one example share its
    activations, so that its convolutions stay plain ones.
    """
    if problem.many:
        raise TypeError(
            "the Gram matrix pairs every example with every other and takes one batch, not Batches; "
            "join them into one, or use method='lanczos'"
        )
    rows = Rows.of(problem)
    size = rows.count * rows.each
    grams = {layer.name: np.zeros((size, size)) for layer in layers}
    groups = _groups(layers, rows, max_bytes)
    todo = sum(rows.count - start for _, held in groups for start in range(0, rows.count, held))
    done = 0

    def report():
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, todo)

    for group, held in groups:
        for start in range(0, rows.count, held):
            _fill([grams[layer.name] for layer in group], rows, group, start, held, report)
    for name, gram in grams.items():
        if not np.isfinite(gram).all():
            why = why_not_finite("ggn", problem.loss, problem.params, problem.first)
            raise NotFiniteError(f"the products of the Jacobian's rows are not finite in layer {name!r}: {why}")
    grams["total"] = np.sum(list(grams.values()), axis=0)
    energy = np.diag(grams["total"]).reshape(rows.count, -1).sum(1)
    return grams, rows.noise([group for group, _ in groups], np.argsort(energy)[-_TRIED:])


def _fill(grams, rows, group, start, held, report):
    """The products of the rows of the examples that are held, with each other and with those of all later ones."""
    stop = min(start + held, rows.count)
    block = slice(start * rows.each, stop * rows.each)
    shapes = jax.eval_shape(partial(rows, group), start)
    kept = [jnp.zeros((held * rows.each, *x.shape[1:]), x.dtype) for x in shapes]
    for i in range(start, stop):
        kept = _keep(kept, rows(group, i), (i - start) * rows.each)
        report()
    for gram, tile in zip(grams, _products(kept, kept), strict=True):
        gram[block, block] = to_host(tile)[: block.stop - block.start, : block.stop - block.start]
    for i in range(stop, rows.count):
        columns = slice(i * rows.each, (i + 1) * rows.each)
        for gram, tile in zip(grams, _products(kept, rows(group, i)), strict=True):
            gram[block, columns] = to_host(tile)
            gram[columns, block] = gram[block, columns].T
        report()


def _groups(layers, rows, max_bytes):
    """[(layers, how many examples' rows are held)]: as many as fit with the rows of all examples, or one that does not.

    Each group costs a backward pass for every example; all layers in one, with the rows of a few examples held, would
    cost one for each of these few.
    """
    sizes = {layer: rows.each * sum(x.nbytes for x in layer.arrays(rows.params)) for layer in layers}
    groups: list[tuple[Layer, ...]] = []
    for layer, size in sizes.items():
        fits = (i for i, group in enumerate(groups) if rows.count * (size + sum(map(sizes.get, group))) <= max_bytes)
        if (i := next(fits, None)) is None:
            groups.append((layer,))
        else:
            groups[i] += (layer,)
    return [(group, min(rows.count, max(1, max_bytes // max(1, sum(map(sizes.get, group)))))) for group in groups]


@partial(jax.jit, donate_argnums=0)
def _keep(kept, rows, start):
    """The kept rows with those of one example more, in place."""
    return [jax.lax.dynamic_update_slice(x, y, (start, 0)) for x, y in zip(kept, rows, strict=True)]


@jax.jit
@full_precision
def _products(left, right):
    return [x @ y.T for x, y in zip(left, right, strict=True)]


# ---- what the rows hold without their products ----


def row_traces(problem: Problem) -> dict[str, tuple[float, float]]:
    """{layer: (Tr G_l, its rounding)}, by the squared norms of all rows; over `Batches` the mean of their examples.

    And of "total", where the layers do not cover the net.
    """
    layers = problem.layers if problem.covered else (*problem.layers, problem.whole)

    def of(one):
        return _by_example(Rows.of(one), layers).sum(0)

    def of_batch(batch):
        return of(Problem(problem.loss, problem.params, batch))

    try:
        found = problem.batch.fold(partial(_mean_of, of_batch)) if problem.many else of(problem)
    except NotFiniteError:
        why = why_not_finite("ggn", problem.loss, problem.params, problem.batch)
        raise NotFiniteError(f"rows of the Jacobian are not finite: {why}") from None
    eps = 10 * own_eps(problem.params)
    return {layer.name: (float(x), eps * float(x)) for layer, x in zip(layers, found, strict=True)}


def _mean_of(of, mean, batch, share, number):
    new = of(batch)
    return new if mean is None else mean + share * (new - mean)


def _by_example(rows, layers):
    """(examples, layers): the squared norms of the rows of each."""
    return np.stack([np.asarray(rows.squares(tuple(layers), i), np.float64) for i in range(rows.count)])


def example_traces(
    objective: Objective, params: PyTree, batch: PyTree, *, layers: Selections = None, has_aux: bool = False
) -> dict[str, np.ndarray]:
    """What each example adds to the trace of every G_l, and of G.

    Tr G_l = sum_i sum_c ||(J_i' b_ic)_l||^2 over the examples i, where the b_ic are the columns of the factor B of S
    that belong to example i. Few examples often make most of the curvature.

    Args:
      objective, params, has_aux: as for `hessian`; the criterion must be convex.
      batch: one batch of examples that do not depend on each other.
      layers: which layers or groups; all layers by default, else as for `layer_spectra`.

    Returns:
      {layer: (N,) float64} in network order, and "total"; the sum of an array is the trace.

    Raises:
      TypeError, ValueError: as `ggn_eigenvalues`; ValueError for examples that depend on each other, as by batch norm
        in training mode.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, batch: batch["x"] @ p["fc"]["w"], jh.squared_error)
      >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "label": jnp.ones((2, 1))}
      >>> jh.example_traces(objective, {"fc": {"w": jnp.zeros((2, 1))}}, batch)["fc"]
      array([1., 9.])

    Reference: Papyan 2019, section 2 (G as a sum over examples).
    """
    problem = pose("ggn", objective, params, batch, has_aux, layers)
    rows = _independent_rows(problem)
    found = _by_example(rows, (*problem.layers, *(() if problem.covered else (problem.whole,))))
    parts = dict(zip([layer.name for layer in problem.layers], found.T, strict=False))
    return parts | {"total": found.sum(1) if problem.covered else found[:, -1]}


def _independent_rows(problem):
    if problem.many:
        raise TypeError("rows are those of one batch, not of Batches; give one batch")
    rows = Rows.of(problem)
    if rows.of_examples is None:
        raise ValueError(
            "the examples of the batch depend on each other, as by batch norm in training mode, so no part of the "
            "curvature belongs to one of them; give a loss with fixed statistics"
        )
    return rows


def ggn_diagonal(objective: Objective, params: PyTree, batch: PyTree, *, has_aux: bool = False) -> PyTree:
    """The diagonal of G, exactly, from the rows of B' J.

    G_jj = sum_r (B' J)_rj^2, over all examples and outputs r: one backward pass of an example for each of its outputs.

    Args:
      objective, params, has_aux: as for `hessian`; the criterion must be convex.
      batch: one batch.

    Returns:
      A pytree like ``params``, at least in float32; zeros for parameters that the loss does not use.

    Raises:
      TypeError, ValueError: as `ggn_eigenvalues`.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> batch = {"x": jnp.array([[1.0, 2.0]]), "label": jnp.ones((1, 1))}
      >>> jh.ggn_diagonal(objective, jnp.zeros((2, 1)), batch).ravel().round(4)
      Array([2., 8.], dtype=float32)

    Reference: Schraudolph 2002; Dangel, Kunstner and Hennig 2020, BackPACK (DiagGGNExact).
    """
    problem = pose("ggn", objective, params, batch, has_aux)
    if problem.many:
        raise TypeError("rows are those of one batch, not of Batches; give one batch")
    rows, whole = Rows.of(problem), (problem.whole,)
    total = sum(rows.squares_of_columns(whole, i) for i in range(rows.count))
    flat = jax.tree.leaves(problem.params)
    ends = np.cumsum([x.size for x in flat])
    parts = [part.reshape(x.shape) for part, x in zip(jnp.split(total, ends[:-1]), flat, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(problem.params), parts)


def ggn_eigenpairs(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    k: int = 10,
    layer: Selection = None,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> tuple[np.ndarray, PyTree, np.ndarray]:
    """The largest eigenvalues of G, or of one layer's G_l, with their eigenvectors, from the Gram matrix.

    An eigenvector u of the Gram matrix K = R R' of the rows R = B' J gives that of G = R' R: R' u / sqrt(lambda).

    Args:
      objective, params, batch, layer, max_bytes, progress, has_aux: as for `ggn_eigenvalues`.
      k: number of pairs; fewer are returned where fewer are not zero.

    Returns:
      values (k,) descending; vectors, a pytree of (k, *leaf.shape) with orthonormal rows, like ``params`` or like
      ``subtree(params, layer)``; residuals (k,): within each lies an eigenvalue.

    Raises:
      TypeError, ValueError: as `ggn_eigenvalues`; ValueError for k < 1.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> batch = {"x": jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), "label": jnp.ones((2, 1))}
      >>> values, vectors, residuals = jh.ggn_eigenpairs(objective, jnp.zeros((3, 1)), batch, k=1)
      >>> values, abs(vectors).ravel()
      (array([4.]), array([0., 1., 0.], dtype=float32))

    Reference: Papyan 2019, section 2; Golub and Van Loan 2013, Matrix computations, section 8.6 (singular vectors).
    """
    check_count("k", k)
    problem = pose("ggn", objective, params, batch, has_aux)
    parts = problem.parts() if layer is None else (problem.layer(layer),)
    grams, noise = gram_matrices(problem, parts, max_bytes, progress)
    values, vectors = scipy.linalg.eigh(grams["total"])
    keep = np.flatnonzero(values > 10 * own_eps(problem.params) * max(values[-1], 0))[::-1][:k]
    values, vectors = values[keep], vectors[:, keep] / np.sqrt(values[keep])
    rows, target = Rows.of(problem), problem.layer(layer)
    found = np.zeros((len(keep), sum(x.size for x in target.arrays(problem.params))), np.float64)
    for i in range(rows.count):
        (mine,) = rows((target,), i)
        found += vectors[i * rows.each : (i + 1) * rows.each].T @ to_host(mine).astype(np.float64)
    leaves, ends = target.arrays(problem.params), np.cumsum([x.size for x in target.arrays(problem.params)])
    split = zip(np.split(found, ends[:-1], axis=1), leaves, strict=True)
    tree = target.unflatten([part.reshape(-1, *x.shape).astype(x.dtype) for part, x in split])
    return values, tree, np.full(len(values), noise["total"] * values[0] if len(values) else 0.0)
