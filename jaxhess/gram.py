"""The Gauss-Newton matrix through its Gram matrix: exact eigenvalues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxhess._checks import NotFiniteError, check_known
from jaxhess._diagnosis import why_not_finite
from jaxhess._examples import independent_examples, one_example
from jaxhess._programs import rounding_of
from jaxhess._trees import full_precision, jitter, own_eps, to_host
from jaxhess.layers import Layer
from jaxhess.objective import NoFactorError, Objective, factored
from jaxhess.problem import Problem, outputs_of, pose

PyTree = Any
_TRIED = 2  # examples, and perturbed parameters, at which the rounding of rows is seen


def ggn_eigenvalues(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    layer: str | None = None,
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
      layer: a name from `layer_names`; by default the whole net.
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
    return gram_eigenvalues(problem, layers, ["total"], max_bytes, progress)["total"][0]


def gram_eigenvalues(
    problem: Problem, layers: Sequence[Layer], names: Collection[str], max_bytes: int, progress: Callable | None
) -> dict[str, tuple[np.ndarray, float]]:
    """The non-zero eigenvalues of G_l of those layers that are named, and of the sum over all if "total" is.

    Each comes with its rounding, as a share of the largest: of the products, and of the rows themselves.
    """
    grams, noise = gram_matrices(problem, layers, max_bytes, progress)
    least = 10 * own_eps(problem.params)
    return {name: (nonzero(grams[name], least), max(least, noise[name])) for name in grams if name in names}


def gram_rows(problem: Problem) -> int:
    """The rows of the Gram matrix of G; 0 where there is none: a plain loss, `Batches`, no factor of the criterion."""
    if problem.many or not isinstance(problem.loss, Objective):
        return 0
    outputs = known_outputs(problem)
    try:
        factored(problem.loss.criterion, outputs, problem.first, max_classes=outputs.shape[-1])
    except NoFactorError:
        return 0
    return outputs.size


def known_outputs(problem: Problem) -> jax.Array:
    """The outputs of the first batch; TypeError under ``jit``."""
    instead = "call it outside; ggn and layer_traces run inside too"
    check_known("the Gram matrix is put together", instead, problem.outputs)
    return problem.outputs


def nonzero(gram: np.ndarray, rtol: float, scale: float | None = None) -> np.ndarray:
    """Eigenvalues, descending, that are not zero beside the scale: the largest one unless given."""
    values = scipy.linalg.eigvalsh(gram)[::-1]
    return values[values > rtol * (max(values[0], 0) if scale is None else scale)]


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
    rows = _Rows.of(problem)
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of B' J_l, those of one example at a time.

    An example that depends on others has its rows differentiated through the batch, one by one, which takes as long as
    an example: then an example is an entry of the outputs.
    """

    loss: Objective  # with a criterion that knows its factor
    params: PyTree
    batch: PyTree
    of_examples: tuple[bool, ...] | None
    factor: jax.Array
    count: int  # of examples
    each: int  # rows of an example

    @classmethod
    def of(cls, problem):
        params, batch = _off_explicit_meshes(problem.loss, problem.params, problem.first)
        outputs = known_outputs(problem)
        if _automatic(outputs) is not outputs:
            outputs = outputs_of(problem.loss, params, batch)
            if _automatic(outputs) is not outputs:
                raise NoGramError(f"its outputs are on {outputs.sharding}")
        if not bool(jnp.isfinite(outputs).all()):
            raise NotFiniteError(why_not_finite("ggn", problem.loss, params, batch))
        criterion = factored(problem.loss.criterion, outputs, batch, max_classes=outputs.shape[-1])
        loss = Objective(problem.loss.predict, criterion)
        of_examples = independent_examples(loss, params, batch, outputs)
        count = outputs.size if of_examples is None else len(outputs)
        factor = _factor(loss, params, batch)
        return cls(loss, params, batch, of_examples, factor, count, outputs.size // count)

    def __call__(self, group, i):
        """For each layer of the group (rows, dim)."""
        return _rows(self.loss, self.of_examples, group, self.params, self.batch, self.factor, i)

    def noise(self, groups, examples):
        """{layer: relative error of the eigenvalues}, also of "total", by rows at parameters moved by one rounding.

        Of the examples with the largest rows. An eigenvalue is a square, hence the 2; 3 is for what a few rows miss.
        """
        eps = max(own_eps(self.params), rounding_of(self.loss.predict, self.params, self.batch))
        moved = []
        for number in range(_TRIED):
            params = jitter(jax.random.key(number), self.params, eps)
            factor = _factor(self.loss, params, self.batch)
            moved.append(dataclasses.replace(self, params=params, factor=factor))
        change, size = {"total": 0.0}, {"total": 0.0}
        for group in groups:
            for i in map(int, examples):
                here = self(group, i)
                changes = np.max([_distances(here, there(group, i)) for there in moved], axis=0)
                for layer, one, all_of_it in zip(group, changes, _distances(here, None), strict=True):
                    for name in (layer.name, "total"):
                        change[name] = change.get(name, 0.0) + float(one)
                        size[name] = size.get(name, 0.0) + float(all_of_it)
        return {name: 6 * (change[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in size}


@jax.jit
def _distances(rows, others):
    """For each layer the squared norm of the rows, or of their difference from others."""
    others = [0.0] * len(rows) if others is None else others
    return [jnp.sum((a - b) ** 2) for a, b in zip(rows, others, strict=True)]


class NoGramError(ValueError):
    """A net of which the rows of the Gram matrix cannot be taken."""

    def __init__(self, found: str):
        super().__init__(
            f"rows of the Gram matrix are cut from arrays on a mesh with automatic axes, and the net, as under "
            f"shard_map, has its own mesh with explicit ones ({found}); use method='lanczos', or 'auto', which then is "
            f"that, or make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
        )


def _off_explicit_meshes(loss, params, batch):
    """Parameters and batch on meshes whose axes the compiler handles; NoGramError where the net needs other ones."""
    moved = jax.tree.map(_automatic, (params, batch))
    if any(x is not y for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves((params, batch)), strict=True)):
        try:
            jax.eval_shape(partial(outputs_of, loss), *moved)
        except Exception as error:  # whatever jax says of the wrong mesh
            raise NoGramError(str(error)) from error
    return moved


def _automatic(x):
    """An array of a mesh with explicit axes, from which no row can be cut, as one whose axes the compiler handles."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
        mesh = x.sharding.mesh
        if set(mesh.axis_types) != {AxisType.Auto}:
            return jax.device_put(x, NamedSharding(Mesh(mesh.devices, mesh.axis_names), x.sharding.spec))
    return x


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


@partial(jax.jit, static_argnums=0)
@full_precision
def _factor(loss, params, batch):
    """B e_c' of every output c', (C, *outputs.shape): B is block diagonal, one product serves all rows."""
    outputs = loss.predict(params, batch)
    basis = jnp.eye(outputs.shape[-1], dtype=outputs.dtype)
    return jax.vmap(lambda e: loss.criterion.factor_product(outputs, batch, jnp.broadcast_to(e, outputs.shape)))(basis)


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_precision
def _rows(loss, of_examples, layers, params, batch, factor, i):
    """For each layer the rows of B' J_l, (rows, dim), of one example, or the one row of an entry of the outputs."""
    shape = factor.shape[1:]
    if of_examples is not None:
        mine = factor[:, i].reshape(shape[-1], -1, shape[-1])
        places = jnp.eye(mine.shape[1], dtype=mine.dtype)
        cotangents = places[:, None, :, None] * mine[None]  # (position, class, position, output)
        cotangents, part = cotangents.reshape(-1, 1, *shape[1:]), one_example(batch, of_examples, i)
    else:
        position, output = jnp.divmod(i, shape[-1])
        column = factor[output].reshape(-1, shape[-1])
        cotangents, part = jnp.zeros_like(column).at[position].set(column[position]).reshape(1, *shape), batch
    pull = jax.vjp(lambda p: loss.predict(p, part), params)[1]
    gradients = jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)

    def row(layer):
        arrays = layer._replace(scan_index=None).arrays(gradients)
        if layer.scan_index is not None:  # the rows stand before the axis of scanned layers
            arrays = [x[:, layer.scan_index] for x in arrays]
        return jnp.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)

    return [row(layer) for layer in layers]


@partial(jax.jit, donate_argnums=0)
def _keep(kept, rows, start):
    """The kept rows with those of one example more, in place."""
    return [jax.lax.dynamic_update_slice(x, y, (start, 0)) for x, y in zip(kept, rows, strict=True)]


@jax.jit
@full_precision
def _products(left, right):
    return [x @ y.T for x, y in zip(left, right, strict=True)]
