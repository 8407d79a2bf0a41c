"""Criteria with closed forms: cross-entropy and squared error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhess._softmax as softmax
from jaxhess._checks import at_least_float32, described, is_traced
from jaxhess._slips import likely_labels
from jaxhess.logits import Logits, pulled_back, total
from jaxhess.objective import Criterion

PyTree = Any


def _label_entry(batch):
    return batch["label"]


@dataclasses.dataclass(frozen=True)
class _Labelled(Criterion):
    """What the criteria with closed forms share: where the labels are."""

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
    """Softmax cross-entropy: the mean over all rows of -log softmax(outputs)[label].

    For one row with probabilities p, the Hessian is S = diag(p) - p p'. It has the factor
    B = diag(sqrt p) - p sqrt(p)', with B B' = S. Loss, slope, S and B stay accurate as the loss goes to zero. They are
    computed in float32 or a higher precision.

    Args:
      labels: ``labels(batch)``; by default ``batch["label"]``. Integers of shape outputs.shape[:-1] with values
        0..C-1, or soft labels: floats of the outputs' shape, not negative, that sum to one in each row. An integer
        outside 0..C-1 raises ValueError where values are known, and gives NaN under ``jit``.
      weights: ``weights(batch) -> array`` of shape outputs.shape[:-1], not negative, or a mask: the loss is the
        weighted mean sum_i w_i l_i / sum_i w_i. Rows of weight zero, such as padding, may have any label. By
        default, the plain mean. `Batches` needs the sum of the weights of a batch as ``size=``.
      smoothing: label smoothing s in [0, 1): the target is 1 - s times the label plus s / C for every class.
      class_weights: C numbers, not negative: the term of class j in the loss is multiplied by the j-th number. With
        integer labels, they also weight the mean, as in PyTorch, and `Batches` needs ``size=``.
      temperature: the outputs are divided by it first.
      z_loss: coefficient of (log sum exp)^2, which is added to the loss of each row.

    Raises:
      ValueError: for a smoothing outside [0, 1), a temperature that is not positive, a negative z_loss, or class
        weights that are negative or not finite.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> criterion = jh.CrossEntropy(labels=lambda batch: batch[1])
      >>> round(float(criterion(jnp.zeros((2, 4)), (None, jnp.array([3, 0])))), 4)
      1.3863
      >>> padded = jh.CrossEntropy(weights=lambda batch: batch["label"] >= 0)
      >>> round(float(padded(jnp.zeros((3, 4)), {"label": jnp.array([3, -1, 0])})), 4)
      1.3863

    Reference: Papyan 2019, Measurements of three-level hierarchical structure, section 2; Szegedy et al. 2016,
    Rethinking the Inception architecture, section 7 (smoothing); Chowdhery et al. 2022, PaLM, section 5 (z-loss).
    """

    weights: Callable[[PyTree], jax.Array] | None = None
    smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    temperature: float = 1.0
    z_loss: float = 0.0

    takes_logits = True

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not 0 <= self.z_loss < np.inf:
            raise ValueError(f"z_loss must be finite and not negative, got {self.z_loss}")
        if self.class_weights is not None:
            values = tuple(float(w) for w in self.class_weights)  # hashable, as an Objective must be
            if not all(0 <= w < np.inf for w in values) or not any(values):
                raise ValueError(f"class_weights must be finite, not negative, and not all zero, got {values}")
            object.__setattr__(self, "class_weights", values)

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        """Whether the mean is weighted; `Batches` then needs the sum of the weights."""
        return self.weights is not None or self.class_weights is not None

    def __call__(self, outputs: jax.Array | Logits, batch: PyTree) -> jax.Array:
        """The mean cross-entropy, a scalar."""
        rows = self._by_row(outputs, batch)
        return total(self._sum, outputs, *rows) if isinstance(outputs, Logits) else self._sum(outputs, *rows)

    def hessian_product(self, outputs: Any, batch: PyTree, tangent: Any) -> Any:
        """S t, where S includes the 1/N of the mean; ``tangent`` is like ``outputs``.

        Of `Logits` it is J' S J t, where J is the Jacobian of the logits in features, kernel and bias.
        """
        rows = self._by_row(outputs, batch)
        if isinstance(outputs, Logits):
            return pulled_back(self._products, outputs, tangent, *rows)
        return self._products(outputs, tangent, *rows)

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S, where S includes the 1/N of the mean; ``noise`` is like ``outputs``."""
        labels, shares = self._by_row(outputs, batch)
        z, t = self._scaled(outputs, labels)
        product = softmax.factor_product(self.z_loss, z, t, noise.astype(z.dtype))
        return (product * jnp.sqrt(shares)[..., None] / self.temperature).astype(outputs.dtype)

    def _sum(self, outputs, labels, shares):
        return (softmax.losses(self.z_loss, *self._scaled(outputs, labels)) * shares).sum()

    def _products(self, outputs, tangent, labels, shares):
        z, t = self._scaled(outputs, labels)
        product = softmax.hessian_product(self.z_loss, z, t, tangent.astype(z.dtype))
        return (product * shares[..., None] / self.temperature**2).astype(outputs.dtype)

    def _scaled(self, outputs, labels):
        """Logits and targets (..., C), in at least float32."""
        classes, dtype = outputs.shape[-1], at_least_float32(outputs)
        soft = labels.ndim == outputs.ndim
        t = labels.astype(dtype) if soft else jax.nn.one_hot(jnp.clip(labels, 0, classes - 1), classes, dtype=dtype)
        if self.smoothing:
            t = (1 - self.smoothing) * t + self.smoothing / classes
        if self.class_weights is not None:
            t = t * jnp.asarray(self.class_weights, dtype).reshape((1,) * (t.ndim - 1) + (-1,))
        return outputs.astype(dtype) / self.temperature, t

    def _by_row(self, outputs, batch):
        """The labels, and the share of each row in the mean, in at least float32."""
        labels, weights = self._checked(outputs, batch)
        classes, dtype = outputs.shape[-1], at_least_float32(*jax.tree.leaves(outputs))
        counts, known = jnp.ones(outputs.shape[:-1], dtype), jnp.asarray(True)
        if labels.ndim < len(outputs.shape):
            known = (labels >= 0) & (labels < classes)
            if self.class_weights is not None:
                counts = jnp.asarray(self.class_weights, dtype)[jnp.clip(labels, 0, classes - 1)]
        if weights is None:
            weights = jnp.ones(outputs.shape[:-1], dtype)
        else:
            weights = weights.astype(dtype)
            known |= weights == 0
        # NaN for a label out of range: as a factor it reaches every derivative.
        shares = jnp.where(known, weights, jnp.nan) / jnp.where(weights == 0, 0, weights * counts).sum()
        return labels, shares

    def _checked(self, outputs, batch):
        """Labels and weights (None without weights), whose shapes fit the outputs."""
        labels, shape = self._read(batch), outputs.shape[:-1]
        if isinstance(outputs, Logits):
            outputs.check()
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[-1]:
            raise ValueError(
                f"{len(self.class_weights)} class_weights do not fit outputs of shape {outputs.shape}: one weight for "
                f"each of the {outputs.shape[-1]} classes is needed"
            )
        if jnp.issubdtype(labels.dtype, jnp.floating):
            if isinstance(outputs, Logits):
                raise TypeError("soft labels take as much memory as formed logits; return these, not Logits, for them")
            if labels.shape != outputs.shape:
                raise TypeError(
                    f"cross-entropy takes integer labels, got {labels.dtype} of shape {labels.shape}; give class "
                    f"indices 0..C-1, or soft labels of the outputs' shape {outputs.shape}"
                )
        elif not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"cross-entropy takes integer labels, got {labels.dtype}; give class indices 0..C-1")
        elif labels.shape != shape:
            hint = "; give one-hot labels as floats" if labels.shape == outputs.shape else ""
            raise ValueError(
                f"labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}: "
                f"one label for each row, {shape}, is needed{hint}"
            )
        else:
            labels = labels.astype(jnp.int32)  # in a narrow type the number of classes itself might not fit
        weights = None if self.weights is None else jnp.asarray(self.weights(batch))
        if weights is not None and weights.shape != shape:
            raise ValueError(
                f"weights of shape {weights.shape} do not fit outputs of shape {outputs.shape}: "
                f"one weight for each row, {shape}, is needed"
            )
        return labels, weights

    def check(self, outputs: jax.ShapeDtypeStruct, batch: PyTree) -> None:
        """Raises ValueError for labels outside 0..C-1 and for invalid weights, where values are known."""
        checked, classes = self._checked(outputs, batch)[0], outputs.shape[-1]
        labels, weights = self.labels(batch), None if self.weights is None else self.weights(batch)
        if checked.size == 0 or is_traced(labels, weights):
            return
        # In jax if other processes hold some of them; otherwise in numpy, which can read them while jax traces.
        spread = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in (labels, weights))
        xp: Any = jnp if spread else np
        labels = xp.asarray(labels)
        if weights is not None:
            weights = xp.asarray(weights)
            if not (xp.min(weights) >= 0 and 0 < xp.sum(weights) < np.inf):
                raise ValueError("the weights of rows are negative, not finite or all zero; give weights >= 0")
        if checked.ndim == len(outputs.shape):
            if not (xp.min(labels) >= 0 and xp.max(labels) < np.inf):
                raise ValueError("soft labels must be finite and not negative; give probabilities of the classes")
            return
        if weights is not None:
            labels = xp.where(weights > 0, labels, 0)
        low, high = int(xp.min(labels)), int(xp.max(labels))
        if low < 0 or high >= classes:
            allowed = f"0..{classes - 1} for {classes} outputs"
            raise ValueError(f"labels run from {low} to {high}, outside {allowed}{self._hint(low, high == classes)}")

    def _hint(self, low, one_more):
        if low < 0 and self.weights is None:
            more = "" if self.labels is _label_entry else "labels=..., "
            weights = f'CrossEntropy({more}weights=lambda batch: batch["label"] >= 0)'
            return f"; rows that do not count, such as padding, are left out by weights: {weights}"
        return "; the first class is 0" if low == 1 and one_more else ""


@dataclasses.dataclass(frozen=True)
class SquaredError(_Labelled):
    """Squared error: the mean over all rows of sum_c (outputs_c - label_c)^2. The Hessian of one row is 2 I.

    Args:
      labels: ``labels(batch) -> float array`` of the outputs' shape; by default ``batch["label"]``. Outputs of shape
        (N,) count as N rows with one output each.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> float(jh.squared_error(jnp.ones((4, 3)), {"label": jnp.zeros((4, 3))}))
      3.0

    Reference: Papyan 2018, The full spectrum of deep net Hessians at scale, section 2.
    """

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The mean squared error, a scalar."""
        labels = self._checked(outputs, batch)
        dtype = at_least_float32(outputs, labels)
        return jnp.sum((outputs.astype(dtype) - labels.astype(dtype)) ** 2) / self._rows(outputs)

    @staticmethod
    def _rows(outputs):
        return len(outputs) if outputs.ndim == 1 else int(np.prod(outputs.shape[:-1], dtype=int))

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
        """S t, where S includes the 1/N of the mean; ``tangent`` is like ``outputs``."""
        return tangent * (2 / self._rows(outputs))

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S, where S includes the 1/N of the mean; ``noise`` is like ``outputs``."""
        return noise * (2 / self._rows(outputs)) ** 0.5


cross_entropy = CrossEntropy()
squared_error = SquaredError()
