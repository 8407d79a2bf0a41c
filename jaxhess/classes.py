"""The structure of the Gauss-Newton matrix by the classes of examples and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg

from jaxhess._checks import check_choice
from jaxhess._rows import known_outputs
from jaxhess._trees import own_eps, to_host
from jaxhess.criteria import CrossEntropy
from jaxhess.gram import gram_matrices, layer_grams, nonzero
from jaxhess.objective import Objective
from jaxhess.problem import pose
from jaxhess.selections import Selection, Selections

PyTree = Any


class ClassStructure(NamedTuple):
    """G, or one layer's G_l, taken apart by the class c of the example and the class c' of the output.

    G = sum_i sum_c' w_i,c' d_i,c' d_i,c'' over all examples i, with d_i,c' = J_i' (e_c' - p_i) and w_i,c' = p_i,c' / N.
    All vectors are given by their coordinates in one orthonormal basis of their span, so distances and angles are those
    of parameter space.

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
    layer: Selection = None,
    *,
    weighting: str = "p",
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> ClassStructure:
    """The parts of G, or of one layer's G_l, that belong to the classes.

    G = G_class + G_cross_class + G_within_class + G_same_class. The parts are computed from the Gram matrix, so no
    vector of the length of the parameters is kept. The batch must be as small as for `ggn_eigenvalues`.

    Args:
      objective: an `Objective` with `CrossEntropy`.
      params, has_aux: as for `hessian`.
      batch: one batch with an example of every class.
      num_classes: C, the last axis of the outputs.
      layer: a layer or group, as for `hessian`; by default the whole net.
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
    problem = pose("ggn", objective, params, batch, has_aux)
    parts = problem.parts() if layer is None else [problem.layer(layer)]

    def grams():
        return {"total": gram_matrices(problem, parts, max_bytes, progress)[0]["total"]}

    return _structures(problem, grams, num_classes, weighting)["total"]


def layer_class_structures(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    num_classes: int,
    *,
    weighting: str = "p",
    layers: Selections = None,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> dict[str, ClassStructure]:
    """The class structure of every layer's G_l and of the net's G, from one pass.

    Args:
      objective, params, batch, num_classes, weighting, max_bytes, progress, has_aux: as for `class_structure`.
      layers: which layers or groups; all layers by default, else as for `layer_spectra`.

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
    problem = pose("ggn", objective, params, batch, has_aux, layers)

    def grams():
        return layer_grams(problem, [*(layer.name for layer in problem.layers), "total"], max_bytes, progress)[0]

    return _structures(problem, grams, num_classes, weighting)


def _structures(problem, grams, num_classes, weighting):
    """{name: `ClassStructure`} of the Gram matrices that ``grams()`` returns."""
    check_choice("weighting", weighting, ("p", "legacy_sqrt_p"))
    probabilities, labels = _probabilities_and_labels(problem, num_classes)
    weights = (np.ones_like(probabilities) if weighting == "legacy_sqrt_p" else probabilities) / len(labels)
    eps = own_eps(problem.params)
    return {name: _class_structure(gram, weights, labels, eps) for name, gram in grams().items()}


def _probabilities_and_labels(problem, num_classes):
    """(N, C) and (N,), checked: the structure is that of the plain mean over a softmax with integer labels."""
    loss = problem.loss
    if not isinstance(loss.criterion, CrossEntropy):
        raise TypeError(f"classes are those of cross-entropy; the criterion is {loss.criterion!r}")
    plain = dataclasses.replace(loss.criterion, labels=CrossEntropy().labels, smoothing=0.0)
    if plain != CrossEntropy():
        raise TypeError(
            "the class structure is that of the plain mean of the softmax; give a CrossEntropy without weights, "
            "temperature and z_loss"
        )
    probabilities = to_host(jax.nn.softmax(known_outputs(problem))).astype(np.float64)
    classes = probabilities.shape[-1]
    if num_classes != classes:
        raise ValueError(f"num_classes = {num_classes}, but the outputs have {classes} classes; give that number")
    probabilities, labels = probabilities.reshape(-1, classes), np.ravel(to_host(loss.criterion.labels(problem.first)))
    if len(labels) != len(probabilities):
        raise TypeError("the class structure needs integer labels; give class indices 0..C-1, not soft labels")
    if missing := sorted(set(range(classes)) - set(labels.tolist())):
        raise ValueError(f"classes {missing} have no example in the batch; give at least one of every class")
    return probabilities, labels


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
    total = nonzero(gram, 10 * eps)
    scale = total[0] if total.size else 0.0  # a part of G that is zero contains only rounding
    vectors = _coordinates(np.concatenate([pairs.reshape(flat), means]), gram, eps)
    return ClassStructure(
        weights=pair_weights,
        pairs=vectors[: classes**2].reshape(classes, classes, -1),
        classes=vectors[classes**2 :],
        traces={name: float(np.trace(part)) for name, part in (grams | {"total": gram}).items()},
        eigenvalues={name: nonzero(part, 10 * eps, scale) for name, part in grams.items()} | {"total": total},
    )


def _coordinates(combinations, gram, eps):
    """Vectors with the inner products of these combinations of the rows, in as few coordinates as possible."""
    values, vectors = scipy.linalg.eigh(combinations @ gram @ combinations.T)
    keep = values > 10 * eps * max(values[-1], 0)
    return (vectors[:, keep] * np.sqrt(values[keep]))[:, ::-1]


def _positive(weights):
    """The divisor for each weight: one for a weight of zero, whose vectors are zero."""
    return np.where(weights > 0, weights, 1)
