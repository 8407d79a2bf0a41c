"""The Gauss-Newton matrix through its Gram matrix: exact spectra, and its structure by classes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxhess._checks import check_known
from jaxhess._diagnosis import NotFiniteError, why_not_finite
from jaxhess.batches import Batches
from jaxhess.layers import Layer, find_layers, layer_names
from jaxhess.objective import CrossEntropy, NoFactorError, Objective, factored, outputs_of
from jaxhess.operators import jitter, own_eps, prepare, rounding_of, to_host

PyTree = Any
_TRIED = 2  # examples, and perturbed parameters, that the rounding of rows is seen at


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
    side is the number of examples times C. Cheap while that is a few thousand; use `layer_spectra` beyond. The
    Gram matrix is summed over layers and built from the rows of a few examples at a time: the Jacobian of the whole
    batch is held only where it fits in ``max_bytes``.

    Where examples do not depend on each other (the outputs of an example alone are its outputs in the batch), each
    row is differentiated through its own example only; otherwise (batch norm in training mode) through the batch.

    Args:
      objective: an `Objective` with a criterion convex in the outputs.
      params, has_aux: as for `hessian`.
      batch: one batch.
      layer: a name from `layer_names`; by default the whole net.
      max_bytes: memory for rows of the Jacobian, at least those of one example; with less of it, rows are computed
        more often.
      progress: ``progress(done, total)``, one for each example, and more where rows are computed more than once.

    Returns:
      (r,) float64, descending; values that rounding cannot tell from zero are left out.

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
    loss, params = prepare("ggn", objective, params, batch, has_aux)
    layers = find_layers(params, layer_names(params) if layer is None else [layer])
    return gram_eigenvalues(loss, params, batch, layers, ["total"], max_bytes=max_bytes, progress=progress)["total"][0]


def gram_eigenvalues(
    loss: Objective,
    params: PyTree,
    batch: PyTree,
    layers: Sequence[Layer],
    names: Collection[str],
    *,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[np.ndarray, float]]:
    """The non-zero eigenvalues of G_l of those layers that are named, and of the sum over all if "total" is.

    Each comes with its rounding, as a share of the largest: of the products, and of the rows themselves.
    """
    grams, noise = _gram_matrices(loss, params, batch, layers, max_bytes, progress)
    least = 10 * own_eps(params)
    return {name: (_nonzero(grams[name], least), max(least, noise[name])) for name in grams if name in names}


def gram_rows(loss: Callable, params: PyTree, batch: PyTree) -> int:
    """The rows of the Gram matrix of G; 0 where there is none: a plain loss, `Batches`, no factor of the criterion."""
    if isinstance(batch, Batches) or not isinstance(loss, Objective):
        return 0
    outputs = _outputs(loss, params, batch)
    try:
        factored(loss.criterion, outputs, batch, max_classes=outputs.shape[-1])
    except NoFactorError:
        return 0
    return outputs.size


class ClassStructure(NamedTuple):
    """G, or one layer's G_l, taken apart by the class c of the example and the class c' of the output.

    G = sum_i sum_c' w_i,c' d_i,c' d_i,c'' over all examples i, with d_i,c' = J_i' (e_c' - p_i) and w_i,c' = p_i,c' / N.
    The vectors are given by coordinates in an orthonormal basis of what they span, the same for all: distances and
    angles are those of parameter space.

    Attributes:
      weights: (C, C) float64, w_c,c' = sum of w_i,c' over the examples of class c.
      pairs: (C, C, r) float64, delta_c,c', the weighted mean of d_i,c' over the examples of class c.
      classes: (C, r) float64, delta_c, the weighted mean of delta_c,c' over c' != c; over all c' it would be zero.
      traces: {part: float} of the parts "class" (sum_c w_c delta_c delta_c'), "cross_class" (the delta_c,c' around
        delta_c), "within_class" (the d_i,c' around delta_c,c'), "same_class" (c' = c), and of "total", their sum, G.
      eigenvalues: {part: float64, descending}, the non-zero ones.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.cross_entropy)
      >>> found = jh.class_structure(objective, jnp.zeros((2, 2)), {"x": jnp.eye(2), "label": jnp.array([0, 1])}, 2)
      >>> found.pairs.shape, found.classes.shape
      ((2, 2, 2), (2, 2))

    Reference: Papyan 2020, Traces of class/cross-class structure pervade deep learning spectra, section 4.
    """

    weights: np.ndarray
    pairs: np.ndarray
    classes: np.ndarray
    traces: dict[str, float]
    eigenvalues: dict[str, np.ndarray]


def class_structure(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    num_classes: int,
    layer: str | None = None,
    *,
    weighting: str = "p",
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> ClassStructure:
    """How the classes build up G, or one layer's G_l.

    G = G_class + G_cross_class + G_within_class + G_same_class, from the Gram matrix, so that no vector of the
    parameters' length is kept; the batch must be as small as for `ggn_eigenvalues`.

    Args:
      objective: an `Objective` with `CrossEntropy`.
      params, has_aux: as for `hessian`.
      batch: one batch with an example of every class.
      num_classes: C, the last axis of the outputs.
      layer: a name from `layer_names`; by default the whole net.
      weighting: "p": w_i,c' = p_i,c' / N as in Papyan's later paper; or "legacy_sqrt_p": vectors
        sqrt(p_i,c') J_i' (e_c' - p_i) with equal weights 1 / N, as in Papyan 2019 and the code released with the paper.
        Either way the parts add up to G.
      max_bytes, progress: as for `ggn_eigenvalues`.

    Returns:
      `ClassStructure`.

    Raises:
      TypeError, ValueError: as `ggn_eigenvalues`; TypeError for another criterion; ValueError if ``num_classes`` is
        not that of the outputs, a class has no example in the batch, or the weighting is unknown.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.cross_entropy)
      >>> batch = {"x": jnp.eye(4), "label": jnp.array([0, 1, 0, 1])}
      >>> found = jh.class_structure(objective, jnp.zeros((4, 2)), batch, 2)
      >>> {part: round(value, 4) for part, value in found.traces.items()}
      {'class': 0.125, 'cross_class': 0.0, 'within_class': 0.125, 'same_class': 0.25, 'total': 0.5}

    Reference: Papyan 2019, Measurements of three-level hierarchical structure; Papyan 2020, Traces of class/cross-class
    structure pervade deep learning spectra, section 4.
    """
    loss, params = prepare("ggn", objective, params, batch, has_aux)
    layers = find_layers(params, layer_names(params) if layer is None else [layer])
    found = class_structures(loss, params, batch, num_classes, layers, weighting, max_bytes, progress, only_total=True)
    return found["total"]


def layer_class_structures(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    num_classes: int,
    *,
    weighting: str = "p",
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> dict[str, ClassStructure]:
    """How the classes build up the G_l of every layer and the G of the net, from one pass.

    Args:
      objective, params, batch, num_classes, weighting, max_bytes, progress, has_aux: as for `class_structure`.

    Returns:
      {layer: `ClassStructure`, ..., "total": ...}, layers in network order.

    Raises:
      TypeError, ValueError: as `class_structure`.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, batch: batch["x"] @ p["a"]["w"] @ p["b"]["w"], jh.cross_entropy)
      >>> params = {"a": {"w": jnp.eye(3)}, "b": {"w": jnp.ones((3, 2))}}
      >>> batch = {"x": jnp.eye(3), "label": jnp.array([0, 1, 0])}
      >>> found = jh.layer_class_structures(objective, params, batch, 2)
      >>> {layer: round(structure.traces["total"], 4) for layer, structure in found.items()}
      {'a': 0.0, 'b': 0.5, 'total': 0.5}

    Reference: as `class_structure`; the paper, section 4.
    """
    loss, params = prepare("ggn", objective, params, batch, has_aux)
    layers = find_layers(params, layer_names(params, loss, batch))
    return class_structures(loss, params, batch, num_classes, layers, weighting, max_bytes, progress)


def class_structures(loss, params, batch, num_classes, layers, weighting, max_bytes, progress, only_total=False):
    """`ClassStructure` of each layer (if wanted) and of the layers together, "total"."""
    if weighting not in ("p", "legacy_sqrt_p"):
        raise ValueError(f"unknown weighting {weighting!r}; choose 'p' or 'legacy_sqrt_p'")
    if not isinstance(loss.criterion, CrossEntropy):
        raise TypeError(f"classes are those of cross-entropy; the criterion is {loss.criterion!r}")
    plain = dataclasses.replace(loss.criterion, labels=CrossEntropy().labels, smoothing=0.0)
    if plain != CrossEntropy():
        raise TypeError(
            "the class structure is that of the plain mean of the softmax; give a CrossEntropy without weights, "
            "temperature and z_loss"
        )
    probabilities = to_host(jax.nn.softmax(_outputs(loss, params, batch))).astype(np.float64)
    classes = probabilities.shape[-1]
    if num_classes != classes:
        raise ValueError(f"num_classes = {num_classes}, but the outputs have {classes} classes; give that number")
    probabilities, labels = probabilities.reshape(-1, classes), np.ravel(to_host(loss.criterion.labels(batch)))
    if len(labels) != len(probabilities):
        raise TypeError("the class structure goes by integer labels; give class indices 0..C-1, not soft labels")
    if missing := sorted(set(range(classes)) - set(labels.tolist())):
        raise ValueError(f"classes {missing} have no example in the batch; give at least one of every class")
    grams, _ = _gram_matrices(loss, params, batch, layers, max_bytes, progress)
    weights = (np.ones_like(probabilities) if weighting == "legacy_sqrt_p" else probabilities) / len(labels)
    wanted = ["total"] if only_total else grams
    return {name: _class_structure(grams[name], weights, labels, own_eps(params)) for name in wanted}


def _class_structure(gram, weights, labels, eps):
    """From the Gram matrix of sqrt(w_i,c') d_i,c': every vector of the structure is a combination of these rows."""
    count, classes = weights.shape
    root = np.sqrt(weights)
    member = np.eye(classes)[labels]  # (i, c)
    pair_weights = member.T @ weights
    class_weights = pair_weights.sum(1) - np.diag(pair_weights)
    other = 1 - np.eye(classes)

    # Combinations as matrices on the rows (i, c'): of delta_c,c', (c, c', i, c'), and of delta_c.
    pairs = np.einsum("ic,ik,kl->ckil", member, root, np.eye(classes))
    pairs /= _positive(pair_weights)[:, :, None, None]
    means = np.einsum("ck,ckil->cil", pair_weights * other, pairs) / _positive(class_weights)[:, None, None]
    flat = (-1, count * classes)
    pairs, means = pairs.reshape(classes, classes, -1), means.reshape(flat)

    around = np.sqrt(pair_weights)[:, :, None] * (pairs - means[:, None])
    deviations = np.eye(count * classes) - (root[:, :, None] * pairs[labels]).reshape(-1, count * classes)
    same = labels[:, None] == np.arange(classes)
    parts = {
        "class": np.sqrt(class_weights)[:, None] * means,
        "cross_class": around[other > 0],
        "within_class": deviations[~same.ravel()],
        "same_class": np.eye(count * classes)[same.ravel()],
    }
    grams = {name: part @ gram @ part.T for name, part in parts.items()}
    total = _nonzero(gram, 10 * eps)
    scale = total[0] if total.size else 0.0  # a part of G that is zero has nothing but rounding
    vectors = _coordinates(np.concatenate([pairs.reshape(flat), means]), gram, eps)
    return ClassStructure(
        weights=pair_weights,
        pairs=vectors[: classes**2].reshape(classes, classes, -1),
        classes=vectors[classes**2 :],
        traces={name: float(np.trace(part)) for name, part in (grams | {"total": gram}).items()},
        eigenvalues={name: _nonzero(part, 10 * eps, scale) for name, part in grams.items()} | {"total": total},
    )


def _coordinates(combinations, gram, eps):
    """Vectors with the inner products of these combinations of the rows, in as few coordinates as hold them."""
    values, vectors = scipy.linalg.eigh(combinations @ gram @ combinations.T)
    keep = values > 10 * eps * max(values[-1], 0)
    return (vectors[:, keep] * np.sqrt(values[keep]))[:, ::-1]


def _positive(weights):
    """What to divide by: one for a weight of zero, whose vectors then are zero."""
    return np.where(weights > 0, weights, 1)


def _gram_matrices(loss, params, batch, layers, max_bytes, progress):
    """(J_l' B)' (J_l' B) of every layer and their sum, "total": float64, rows ordered by example, position, class.

    Of a group of layers the rows of as many examples as fit are held, and those of all later examples pass by them, one
    example at a time: the cotangents of one example share its activations, so that its convolutions stay plain ones.
    """
    if isinstance(batch, Batches):
        raise TypeError(
            "the Gram matrix pairs every example with every other and takes one batch, not Batches; "
            "join them into one, or use method='lanczos'"
        )
    layers = tuple(layers)
    params, batch = _off_explicit_meshes(loss, params, batch)
    outputs = _outputs(loss, params, batch)
    if _automatic(outputs) is not outputs:
        raise NoGramError(f"its outputs are on {outputs.sharding}")
    if not bool(jnp.isfinite(outputs).all()):
        raise NotFiniteError(why_not_finite("ggn", loss, params, batch))
    loss = Objective(loss.predict, factored(loss.criterion, outputs, batch, max_classes=outputs.shape[-1]))
    of_examples = _of_independent_examples(loss, params, batch, outputs)
    # An example that depends on others has its rows differentiated through the batch, which takes as long as one.
    count = outputs.size if of_examples is None else len(outputs)
    rows_each = outputs.size // count
    factor = _factor(loss, params, batch)
    grams = {layer.name: np.zeros((outputs.size, outputs.size)) for layer in layers}
    plan = [
        (group, start, min(start + held, count), held)
        for group, held in _groups(layers, params, rows_each, count, max_bytes)
        for start in range(0, count, held)
    ]
    done, todo = 0, sum(count - start for _, start, _, _ in plan)

    def report():
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, todo)

    for group, start, stop, held in plan:
        rows_of = partial(_rows, loss, group, of_examples, params, batch, factor)
        mine = [grams[layer.name] for layer in group]
        block = slice(start * rows_each, stop * rows_each)
        kept = [jnp.zeros((held * rows_each, *x.shape[1:]), x.dtype) for x in jax.eval_shape(rows_of, start)]
        for i in range(start, stop):
            kept = _keep(kept, rows_of(i), (i - start) * rows_each)
            report()
        for gram, tile in zip(mine, _products(kept, kept), strict=True):
            gram[block, block] = to_host(tile)[: block.stop - block.start, : block.stop - block.start]
        for i in range(stop, count):
            columns = slice(i * rows_each, (i + 1) * rows_each)
            for gram, tile in zip(mine, _products(kept, rows_of(i)), strict=True):
                gram[block, columns] = to_host(tile)
                gram[columns, block] = gram[block, columns].T
            report()
    for name, gram in grams.items():
        if not np.isfinite(gram).all():
            why = why_not_finite("ggn", loss, params, batch)
            raise NotFiniteError(f"the products of the Jacobian's rows are not finite in layer {name!r}: {why}")
    grams |= {"total": sum(grams.values())}
    energy = np.diag(grams["total"]).reshape(count, -1).sum(1)
    groups = dict.fromkeys(group for group, *_ in plan)
    noise = _row_noise(loss, groups, of_examples, params, batch, np.argsort(energy)[-_TRIED:])
    return grams, noise


def _row_noise(loss, groups, of_examples, params, batch, examples):
    """{layer: relative error of the eigenvalues}, also of "total", by rows at parameters moved by one rounding.

    Of the examples with the largest rows. An eigenvalue is a square, hence the 2; 3 is for what a few rows miss.
    """
    eps = max(own_eps(params), rounding_of(loss.predict, params, batch))
    change, size = {"total": 0.0}, {"total": 0.0}
    factor = _factor(loss, params, batch)
    moved = [jitter(jax.random.key(number), params, eps) for number in range(_TRIED)]
    factors = [_factor(loss, there, batch) for there in moved]
    for group in groups:
        for i in map(int, examples):
            here = _rows(loss, group, of_examples, params, batch, factor, i)
            squares = [
                _squares(here, _rows(loss, group, of_examples, there, batch, f, i))
                for there, f in zip(moved, factors, strict=True)
            ]
            for k, layer in enumerate(group):
                found = max(float(changes[k]) for changes, _ in squares), float(squares[0][1][k])
                for name in (layer.name, "total"):
                    change[name] = change.get(name, 0.0) + found[0]
                    size[name] = size.get(name, 0.0) + found[1]
    return {name: 6 * (change[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in size}


@jax.jit
def _squares(rows, others):
    """For each layer the squared norms of the difference and of the rows."""
    return [jnp.sum((a - b) ** 2) for a, b in zip(rows, others, strict=True)], [jnp.sum(a**2) for a in rows]


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


def _groups(layers, params, rows_each, count, max_bytes):
    """[(layers, how many examples' rows are held)]: as many as fit with the rows of all examples, or one that does not.

    Each group costs a backward pass for every example; all layers in one, with the rows of a few examples held, would
    cost one for each of these few.
    """
    sizes = {layer: rows_each * sum(x.nbytes for x in layer.arrays(params)) for layer in layers}
    groups: list[tuple[Layer, ...]] = []
    for layer, size in sizes.items():
        fits = (i for i, group in enumerate(groups) if count * (size + sum(map(sizes.get, group))) <= max_bytes)
        if (i := next(fits, None)) is None:
            groups.append((layer,))
        else:
            groups[i] += (layer,)
    return [(group, min(count, max(1, max_bytes // max(1, sum(map(sizes.get, group)))))) for group in groups]


def _nonzero(gram, rtol, scale=None):
    """Eigenvalues, descending, that are not zero beside the scale: the largest one unless given."""
    values = scipy.linalg.eigvalsh(gram)[::-1]
    return values[values > rtol * (max(values[0], 0) if scale is None else scale)]


def _outputs(loss, params, batch):
    outputs = outputs_of(loss, params, batch)
    check_known("the Gram matrix is put together", "call it outside; ggn and layer_traces run inside too", outputs)
    return outputs


def _of_independent_examples(loss, params, batch, outputs):
    """For each array of the batch whether it holds one entry for each example; None if examples are not independent.

    They are if each taken alone has the outputs that it has in the batch, and the same slopes.
    """
    if outputs.ndim < 2:
        return None
    of_examples = _of_examples(loss, params, batch, outputs)
    if of_examples is None:
        return None
    try:
        same = _alike(loss, of_examples, params, batch)
    except Exception:  # of a batch that cannot be taken apart along its first axis the user's code may raise anything
        return None
    return of_examples if bool(same) else None


def _of_examples(loss, params, batch, outputs):
    """For each array of the batch whether it holds one entry for each example; None where that cannot be told.

    The first axis of an array of another kind may happen to be as long: of the statistics of 100 channels in a batch of
    100. So it must be possible to lengthen the arrays of examples, and the outputs must lengthen with them: tried with
    all arrays of this length, then without those under one key of the batch, under two, ...
    """
    count = len(outputs)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    lengths = [jnp.shape(x)[:1] == (count,) for _, x in leaves]
    keys = [path[:1] for path, _ in leaves]
    names = list(dict.fromkeys(key for key, fits in zip(keys, lengths, strict=True) if fits))

    def longer(x):
        return jax.ShapeDtypeStruct((count + 1, *x.shape[1:]), x.dtype)

    choices = (chosen for size in range(len(names), 0, -1) for chosen in itertools.combinations(names, size))
    for chosen in itertools.islice(choices, 64):
        found = tuple(fits and key in chosen for key, fits in zip(keys, lengths, strict=True))
        with contextlib.suppress(Exception):  # of arrays that do not go together the user's code may raise anything
            shapes = [longer(x) if cut else x for cut, (_, x) in zip(found, leaves, strict=True)]
            lengthened = jax.eval_shape(loss.predict, params, jax.tree.unflatten(treedef, shapes))
            if lengthened.shape == (count + 1, *outputs.shape[1:]):
                return found
    return None


@partial(jax.jit, static_argnums=(0, 1))
def _alike(loss, of_examples, params, batch):
    """Whether the batch has the outputs of its examples taken alone, and the gradient of one random sum of them.

    In reverse mode, as the rows of the Gram matrix: a net may have no other.
    """

    def together(p):
        return loss.predict(p, batch)

    def alone(p):
        return jax.vmap(lambda i: loss.predict(p, _example(batch, of_examples, i))[0])(jnp.arange(len(outputs)))

    with jax.default_matmul_precision("float32"):
        outputs, pull = jax.vjp(together, params)
        noise = jax.random.normal(jax.random.key(0), outputs.shape, outputs.dtype)
        apart, pull_apart = jax.vjp(alone, params)
        return _same(outputs, apart) & _same(pull(noise), pull_apart(noise))


def _same(a, b):
    """Whether two trees agree but for rounding, in each array beside its largest entry.

    Beside that of the whole tree in a small array, for what vanishes, like the gradient of a bias that a softmax does
    not see, is nothing but rounding.
    """
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    sizes = jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x, _ in pairs])
    differences = jnp.stack([jnp.max(jnp.abs(x - y), initial=0).astype(jnp.float32) for x, y in pairs])
    return (differences <= jnp.maximum(1e-4 * sizes, 1e-5 * sizes.max())).all()


def _example(batch, of_examples, i):
    """Example i as a batch of one: arrays of examples are cut, others are shared."""
    leaves, treedef = jax.tree.flatten(batch)
    cut = [jax.lax.dynamic_slice_in_dim(x, i, 1) if mine else x for mine, x in zip(of_examples, leaves, strict=True)]
    return jax.tree.unflatten(treedef, cut)


@partial(jax.jit, static_argnums=0)
def _factor(loss, params, batch):
    """B e_c' of every output c', (C, *outputs.shape): B is block diagonal, one product serves all rows."""
    with jax.default_matmul_precision("float32"):
        outputs = loss.predict(params, batch)
        basis = jnp.eye(outputs.shape[-1], dtype=outputs.dtype)
        return jax.vmap(lambda e: loss.criterion.factor_product(outputs, batch, jnp.broadcast_to(e, outputs.shape)))(
            basis
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _rows(loss, layers, of_examples, params, batch, factor, i):
    """For each layer the rows of B' J_l, (rows, dim), of one example, or the one row of an entry of the outputs."""
    shape = factor.shape[1:]
    if of_examples is not None:
        mine = factor[:, i].reshape(shape[-1], -1, shape[-1])
        places = jnp.eye(mine.shape[1], dtype=mine.dtype)
        cotangents = places[:, None, :, None] * mine[None]  # (position, class, position, output)
        cotangents, part = cotangents.reshape(-1, 1, *shape[1:]), _example(batch, of_examples, i)
    else:
        position, output = jnp.divmod(i, shape[-1])
        column = factor[output].reshape(-1, shape[-1])
        cotangents, part = jnp.zeros_like(column).at[position].set(column[position]).reshape(1, *shape), batch
    with jax.default_matmul_precision("float32"):
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
def _products(left, right):
    with jax.default_matmul_precision("float32"):
        return [x @ y.T for x, y in zip(left, right, strict=True)]
