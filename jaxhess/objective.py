"""Losses that show their two halves, and the curvature of a criterion in a network's outputs.

The generalised Gauss-Newton matrix is G = J' S J with J the Jacobian of the outputs in the parameters and S the
Hessian of the criterion in the outputs. A criterion that knows S in closed form says so with two methods,
``hessian_product`` and ``factor_product``; every other one is differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._checks import at_least_float32, described, likely_labels
from jaxhess._programs import check_forward_mode

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss that shows its two halves: ``criterion(predict(params, batch), batch)``.

    Hashable by its two functions: a new one made of the same functions compiles nothing.

    Args:
      predict: ``predict(params, batch) -> outputs``, a floating-point array of shape (..., C), one row an example
        (or a position of a sequence).
      criterion: ``criterion(outputs, batch) -> scalar``, a mean over the examples. `cross_entropy` and
        `squared_error` bring closed forms; any other twice differentiable function is differentiated.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda params, batch: batch["x"] @ params["w"], jh.cross_entropy)
      >>> batch = {"x": jnp.ones((4, 3)), "label": jnp.array([0, 1, 0, 1])}
      >>> round(float(objective({"w": jnp.zeros((3, 2))}, batch)), 4)
      0.6931

    Reference: Schraudolph 2002, Fast curvature matrix-vector products; equations (1) and (2) of the paper.
    """

    predict: Callable[[PyTree, PyTree], jax.Array]
    criterion: Callable[[jax.Array, PyTree], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The loss, a scalar."""
        return self.criterion(self.predict(params, batch), batch)


def _label_entry(batch):
    return batch["label"]


@dataclasses.dataclass(frozen=True)
class _Labelled:
    """What the closed-form criteria share: where the labels are, and the number of rows of the mean."""

    labels: Callable[[PyTree], jax.Array] = _label_entry

    def _read(self, batch):
        try:
            return jnp.asarray(self.labels(batch))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{type(self).__name__} found no labels in the batch ({described(batch)}): {error!r}; say where they "
                f"are, as in {type(self).__name__}(labels=lambda batch: batch[{likely_labels(batch)!r}])"
            ) from error


@dataclasses.dataclass(frozen=True)
class CrossEntropy(_Labelled):
    """Softmax cross-entropy of integer labels: the mean over all rows of -log softmax(outputs)[label].

    In one row with probabilities p its Hessian is S = diag(p) - p p', with the factor
    B = diag(sqrt p) - p sqrt(p)', B B' = S.

    Args:
      labels: ``labels(batch) -> int array`` of shape outputs.shape[:-1] with values 0..C-1; by default
        ``batch["label"]``. A label outside 0..C-1 is a ValueError where values are known, and a NaN under ``jit``.
      weights: ``weights(batch) -> array`` of shape outputs.shape[:-1], not negative, or a mask: the loss is the
        weighted mean sum_i w_i l_i / sum_i w_i. Rows of weight zero, as padding, may have any label. None, the default,
        is the plain mean. `Batches` needs the sum of the weights of a batch as ``size=``.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> criterion = jh.CrossEntropy(labels=lambda batch: batch[1])
      >>> round(float(criterion(jnp.zeros((2, 4)), (None, jnp.array([3, 0])))), 4)
      1.3863
      >>> padded = jh.CrossEntropy(weights=lambda batch: batch["label"] >= 0)
      >>> round(float(padded(jnp.zeros((3, 4)), {"label": jnp.array([3, -1, 0])})), 4)
      1.3863

    Reference: Papyan 2019, Measurements of three-level hierarchical structure, section 2.
    """

    weights: Callable[[PyTree], jax.Array] | None = None

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The mean cross-entropy, a scalar."""
        labels = jnp.clip(self._checked(outputs, batch), 0, outputs.shape[-1] - 1)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return (losses * self._shares(outputs, batch)).sum()

    def _shares(self, outputs, batch):
        """What each row counts, in sum one; NaN for a label out of range: as a factor it reaches every derivative."""
        labels, weights = self._checked(outputs, batch), self._weights(outputs, batch)
        known = (labels >= 0) & (labels < outputs.shape[-1])
        if weights is None:
            shares = 1 / _rows(outputs)
        else:
            known |= weights == 0
            shares = weights / weights.sum()
        return jnp.where(known, shares, jnp.nan).astype(outputs.dtype)

    def _weights(self, outputs, batch):
        if self.weights is None:
            return None
        weights = jnp.asarray(self.weights(batch))
        if weights.shape != outputs.shape[:-1]:
            raise ValueError(
                f"weights of shape {weights.shape} do not fit outputs of shape {outputs.shape}: "
                f"one weight for each row, {outputs.shape[:-1]}, is needed"
            )
        return weights.astype(at_least_float32(outputs))

    def _checked(self, outputs, batch):
        labels = self._read(batch)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"cross-entropy takes integer labels, got {labels.dtype}; give class indices 0..C-1")
        if labels.shape != outputs.shape[:-1]:
            raise ValueError(
                f"labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}: "
                f"one label for each row, {outputs.shape[:-1]}, is needed"
            )
        return labels.astype(jnp.int32)  # in a narrow type the number of classes itself might not fit

    def check(self, outputs: jax.ShapeDtypeStruct, batch: PyTree) -> None:
        """Raises ValueError for labels outside 0..C-1 and for weights that are none, where values are known."""
        size, classes = self._checked(outputs, batch).size, outputs.shape[-1]
        self._weights(outputs, batch)
        labels, weights = self.labels(batch), None if self.weights is None else self.weights(batch)
        if size == 0 or any(isinstance(x, jax.core.Tracer) for x in (labels, weights)):
            return
        spread = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in (labels, weights))
        # Where other processes hold some of them in jax; else in numpy, which can read what is known inside the tracing
        # of something else too.
        xp = jnp if spread else np
        labels = xp.asarray(labels)
        if weights is not None:
            weights = xp.asarray(weights)
            if not (xp.min(weights) >= 0 and 0 < xp.sum(weights) < np.inf):
                raise ValueError("weights of rows that are negative, not finite, or all zero make no mean; mend them")
            labels = xp.where(weights > 0, labels, 0)
        low, high = int(xp.min(labels)), int(xp.max(labels))
        if low < 0 or high >= classes:
            allowed = f"0..{classes - 1} for {classes} outputs"
            raise ValueError(f"labels run from {low} to {high}, outside {allowed}{self._hint(low, high == classes)}")

    def _hint(self, low, one_more):
        if low < 0 and self.weights is None:
            more = "" if self.labels is _label_entry else "labels=..., "
            return (
                f"; rows that do not count, as padding, are left out by weights: "
                f'CrossEntropy({more}weights=lambda batch: batch["label"] >= 0)'
            )
        return "; the first class is 0" if low == 1 and one_more else ""

    def hessian_product(self, outputs: jax.Array, batch: PyTree, tangent: jax.Array) -> jax.Array:
        """S t, with the 1/N of the mean in S; ``tangent`` like ``outputs``."""
        p = jax.nn.softmax(outputs)
        # S is blind to shifts of t: one that is zero where p is largest loses no digits as p saturates.
        tangent = tangent - jnp.take_along_axis(tangent, outputs.argmax(-1, keepdims=True), -1)
        product = p * (tangent - (p * tangent).sum(-1, keepdims=True))
        return product * self._shares(outputs, batch)[..., None]

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S, the 1/N of the mean included; ``noise`` like ``outputs``."""
        # exp(log_softmax / 2), for the derivative of sqrt(softmax) is NaN where a probability underflows.
        root = jnp.exp(jax.nn.log_softmax(outputs) / 2)
        scaled = root * noise
        product = scaled - root**2 * scaled.sum(-1, keepdims=True)
        return product * jnp.sqrt(self._shares(outputs, batch))[..., None]


@dataclasses.dataclass(frozen=True)
class SquaredError(_Labelled):
    """Squared error: the mean over all rows of sum_c (outputs_c - label_c)^2. Its Hessian is 2 I in one row.

    Args:
      labels: ``labels(batch) -> float array`` of the outputs' shape; by default ``batch["label"]``. Outputs of shape
        (N,) are N rows of one output.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> float(jh.squared_error(jnp.ones((4, 3)), {"label": jnp.zeros((4, 3))}))
      3.0

    Reference: Papyan 2018, The full spectrum of deep net Hessians at scale, section 2.
    """

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The mean squared error, a scalar."""
        return jnp.sum((outputs - self._checked(outputs, batch)) ** 2) / self._rows(outputs)

    @staticmethod
    def _rows(outputs):
        return len(outputs) if outputs.ndim == 1 else _rows(outputs)

    def _checked(self, outputs, batch):
        labels = self._read(batch)
        if labels.shape != outputs.shape:  # (N,) against (N, 1) would broadcast to (N, N)
            raise ValueError(
                f"squared error takes targets of the outputs' shape {outputs.shape}, got {labels.shape}; "
                f"for class labels: SquaredError(labels=lambda batch: jax.nn.one_hot(batch['label'], C))"
            )
        return labels

    def check(self, outputs: jax.ShapeDtypeStruct, batch: PyTree) -> None:
        """Raises ValueError for targets that do not have the outputs' shape."""
        self._checked(outputs, batch)

    def hessian_product(self, outputs: jax.Array, batch: PyTree, tangent: jax.Array) -> jax.Array:
        """S t, with the 1/N of the mean in S; ``tangent`` like ``outputs``."""
        return tangent * (2 / self._rows(outputs))

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S, the 1/N of the mean included; ``noise`` like ``outputs``."""
        return noise * (2 / self._rows(outputs)) ** 0.5


cross_entropy = CrossEntropy()
squared_error = SquaredError()


def _rows(outputs):
    return int(np.prod(outputs.shape[:-1], dtype=int))


def output_hessian_product(criterion, outputs, batch, tangent):
    """S t for any criterion: its own closed form, or the derivative of its gradient along t."""
    if hasattr(criterion, "hessian_product"):
        return criterion.hessian_product(outputs, batch, tangent)
    return jax.jvp(jax.grad(criterion), (outputs, batch), (tangent, zero_tangent(batch)))[1]


def output_factor_product(criterion, outputs, batch, noise):
    """B e with B B' = S for any criterion; NaN where S is no sum of positive semi-definite C x C blocks."""
    if hasattr(criterion, "factor_product"):
        return criterion.factor_product(outputs, batch, noise)
    blocks, faults = _output_blocks(criterion, outputs, batch)
    values, vectors = jnp.linalg.eigh(blocks)
    # Rounding in a zero eigenvalue is no reason to refuse: `faults` has judged.
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    product = jnp.einsum("...ij,...j->...i", factor, noise.astype(factor.dtype))
    return jnp.where((faults[0] | faults[1]), jnp.nan, product).astype(outputs.dtype)


class NoFactorError(ValueError):
    """A criterion's Hessian in the outputs has no factor B with B B' = S."""


def check_factor(criterion, outputs, batch):
    """Raises NoFactorError for a criterion without a factor, at these outputs; says nothing under ``jit``."""
    if hasattr(criterion, "factor_product"):
        return
    check_forward_mode(
        criterion,
        (outputs, batch),
        partial(output_hessian_product, criterion),
        (outputs, batch, outputs),
        "It is in the criterion: give cross_entropy or squared_error, which have closed forms, or one without the rule",
    )
    with jax.default_matmul_precision("float32"):
        coupled, concave = _faults(criterion, outputs, batch)
    if isinstance(coupled, jax.core.Tracer):
        return
    name = getattr(criterion, "__name__", repr(criterion))
    if bool(coupled):
        raise NoFactorError(
            f"the criterion {name} couples the outputs of different rows, so its Hessian has no C x C blocks to "
            f"factor; use curvature='hessian', or a criterion that is a mean over rows"
        )
    if bool(concave):
        raise NoFactorError(
            f"the criterion {name} is not convex in the outputs here, so its Hessian has no real factor; "
            f"use curvature='hessian', or the ggn operator, which needs no factor"
        )


@partial(jax.jit, static_argnums=0)
def _faults(criterion, outputs, batch):
    return _output_blocks(criterion, outputs, batch)[1]


def _output_blocks(criterion, outputs, batch):
    """The C x C blocks of S, (..., C, C), and two flags: S has more than these blocks; a block is indefinite."""
    outputs = outputs.astype(at_least_float32(outputs))  # no eigenvalues of half precision

    def blocks_at(outputs):
        columns = jax.vmap(
            lambda column: output_hessian_product(criterion, outputs, batch, jnp.broadcast_to(column, outputs.shape))
        )(jnp.eye(outputs.shape[-1], dtype=outputs.dtype))
        return jnp.moveaxis(columns, 0, -1)

    blocks = blocks_at(outputs)
    # Blocks read off with one direction in all rows are S only if no row feels another one's direction: tried with a
    # direction without any pattern.
    signs = jnp.sign(jnp.sin(1.0 + jnp.arange(outputs.size, dtype=outputs.dtype) ** 2)).reshape(outputs.shape)
    product = output_hessian_product(criterion, outputs, batch, signs)
    # On a net that is trained to the end S vanishes, and the rounding of its derivation does not: that is of the size
    # that S has elsewhere, in the criterion's own units.
    elsewhere = jnp.max(jnp.abs(blocks_at(jnp.zeros_like(outputs))))
    scale = jnp.maximum(jnp.max(jnp.abs(blocks)), jnp.where(jnp.isfinite(elsewhere), 4 * elsewhere, 0))
    tolerance = 100 * jnp.finfo(outputs.dtype).eps * scale
    coupled = jnp.any(jnp.abs(product - jnp.einsum("...ij,...j->...i", blocks, signs)) > 10 * tolerance)
    concave = jnp.any(jnp.linalg.eigvalsh(blocks) < -tolerance)
    return blocks, (coupled, concave)


def zero_tangent(tree):
    """Zero tangents for a tree that is not differentiated; integer and key leaves get float0."""

    def zero(leaf):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.inexact):
            return jnp.zeros(jnp.shape(leaf), dtype)
        return np.zeros(jnp.shape(leaf), jax.dtypes.float0)

    return jax.tree.map(zero, tree)
