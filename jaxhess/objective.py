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

import jaxhess._softmax as softmax
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
    """Softmax cross-entropy: the mean over all rows of -log softmax(outputs)[label].

    In one row with probabilities p its Hessian is S = diag(p) - p p', with the factor
    B = diag(sqrt p) - p sqrt(p)', B B' = S. Loss, slope, S and B keep their digits as the loss goes to zero, and are
    computed in at least float32.

    Args:
      labels: ``labels(batch)``; by default ``batch["label"]``. Integers of shape outputs.shape[:-1] with values
        0..C-1, or soft labels: floats of the outputs' shape, not negative, that sum to one in each row. An integer
        outside 0..C-1 is a ValueError where values are known, and a NaN under ``jit``.
      weights: ``weights(batch) -> array`` of shape outputs.shape[:-1], not negative, or a mask: the loss is the
        weighted mean sum_i w_i l_i / sum_i w_i. Rows of weight zero, as padding, may have any label. None, the default,
        is the plain mean. `Batches` needs the sum of the weights of a batch as ``size=``.
      smoothing: share s in [0, 1) of label smoothing: a label counts 1 - s, and every class s / C besides.
      class_weights: C numbers, not negative: class j's term of the loss is multiplied by the j-th. With integer labels
        the mean is weighted by them too, as in PyTorch, and `Batches` needs ``size=``.
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
    def weighted(self) -> bool:
        """Whether the mean is by weights, whose sum `Batches` must be told."""
        return self.weights is not None or self.class_weights is not None

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The mean cross-entropy, a scalar."""
        z, t, shares = self._parts(outputs, batch)
        return (softmax.losses(self.z_loss, z, t) * shares).sum()

    def hessian_product(self, outputs: jax.Array, batch: PyTree, tangent: jax.Array) -> jax.Array:
        """S t, with the 1/N of the mean in S; ``tangent`` like ``outputs``."""
        z, t, shares = self._parts(outputs, batch)
        product = softmax.hessian_product(self.z_loss, z, t, tangent.astype(z.dtype))
        return (product * shares[..., None] / self.temperature**2).astype(outputs.dtype)

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S, the 1/N of the mean included; ``noise`` like ``outputs``."""
        z, t, shares = self._parts(outputs, batch)
        product = softmax.factor_product(self.z_loss, z, t, noise.astype(z.dtype))
        return (product * jnp.sqrt(shares)[..., None] / self.temperature).astype(outputs.dtype)

    def _parts(self, outputs, batch):
        """Logits and targets (..., C), and what each row counts, in at least float32."""
        labels, weights = self._checked(outputs, batch), self._weights(outputs, batch)
        classes, dtype = outputs.shape[-1], at_least_float32(outputs)
        z = outputs.astype(dtype) / self.temperature
        soft = labels.ndim == outputs.ndim
        known = True if soft else (labels >= 0) & (labels < classes)
        t = labels.astype(dtype) if soft else jax.nn.one_hot(jnp.clip(labels, 0, classes - 1), classes, dtype=dtype)
        counts = jnp.ones(outputs.shape[:-1], dtype)
        if self.class_weights is not None:
            by_class = jnp.asarray(self.class_weights, dtype)
            if not soft:
                counts = by_class[jnp.clip(labels, 0, classes - 1)]
        if self.smoothing:
            t = (1 - self.smoothing) * t + self.smoothing / classes
        if self.class_weights is not None:
            t = t * by_class.reshape((1,) * (t.ndim - 1) + (-1,))
        if weights is None:
            weights = jnp.ones(outputs.shape[:-1], dtype)
        else:
            known |= weights == 0
        # NaN for a label out of range: as a factor it reaches every derivative.
        return z, t, jnp.where(known, weights, jnp.nan) / jnp.where(weights == 0, 0, weights * counts).sum()

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
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[-1]:
            raise ValueError(
                f"{len(self.class_weights)} class_weights do not fit outputs of shape {outputs.shape}: one weight for "
                f"each of the {outputs.shape[-1]} classes is needed"
            )
        if jnp.issubdtype(labels.dtype, jnp.floating):
            if labels.shape != outputs.shape:
                raise TypeError(
                    f"cross-entropy takes integer labels, got {labels.dtype} of shape {labels.shape}; give class "
                    f"indices 0..C-1, or soft labels of the outputs' shape {outputs.shape}"
                )
            return labels
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"cross-entropy takes integer labels, got {labels.dtype}; give class indices 0..C-1")
        if labels.shape != outputs.shape[:-1]:
            hint = "; give one-hot labels as floats" if labels.shape == outputs.shape else ""
            raise ValueError(
                f"labels of shape {labels.shape} do not fit outputs of shape {outputs.shape}: "
                f"one label for each row, {outputs.shape[:-1]}, is needed{hint}"
            )
        return labels.astype(jnp.int32)  # in a narrow type the number of classes itself might not fit

    def check(self, outputs: jax.ShapeDtypeStruct, batch: PyTree) -> None:
        """Raises ValueError for labels outside 0..C-1 and for weights that are none, where values are known."""
        checked, classes = self._checked(outputs, batch), outputs.shape[-1]
        self._weights(outputs, batch)
        labels, weights = self.labels(batch), None if self.weights is None else self.weights(batch)
        if checked.size == 0 or any(isinstance(x, jax.core.Tracer) for x in (labels, weights)):
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
            return (
                f"; rows that do not count, as padding, are left out by weights: "
                f'CrossEntropy({more}weights=lambda batch: batch["label"] >= 0)'
            )
        return "; the first class is 0" if low == 1 and one_more else ""


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
        labels = self._checked(outputs, batch)
        dtype = at_least_float32(outputs, labels)
        return jnp.sum((outputs.astype(dtype) - labels.astype(dtype)) ** 2) / self._rows(outputs)

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
    full = outputs.astype(at_least_float32(outputs))
    slope = jax.grad(lambda o: criterion(o, batch))
    return jax.jvp(slope, (full,), (tangent.astype(full.dtype),))[1].astype(outputs.dtype)


def output_factor_product(criterion, outputs, batch, noise):
    """B e with B B' = S for any criterion: its own closed form, or by C x C blocks, as `Factored` does."""
    if not hasattr(criterion, "factor_product"):
        criterion = Factored(criterion, "blocks")
    return criterion.factor_product(outputs, batch, noise)


@partial(jax.jit, static_argnums=0)
def outputs_of(objective, params, batch):
    """What an objective's ``predict`` says, compiled, in full precision."""
    with jax.default_matmul_precision("float32"):
        return objective.predict(params, batch)


class NoFactorError(ValueError):
    """A criterion's Hessian in the outputs has no factor B with B B' = S."""


@dataclasses.dataclass(frozen=True)
class Factored:
    """A criterion without closed forms of its own, with a factor of its Hessian S in the outputs.

    Attributes:
      criterion: the criterion.
      form: what S was found to be: "diagonal"; "softmax", a_i (diag p_i - p_i p_i') in row i, as of every
        cross-entropy, whatever the labels; or "blocks", some C x C matrix in each row, which takes rows x C^2 numbers.
    """

    criterion: Callable[[jax.Array, PyTree], jax.Array]
    form: str

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The criterion itself."""
        return self.criterion(outputs, batch)

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S; NaN where a block of S is not positive semi-definite, or S is more than its blocks."""
        full = outputs.astype(at_least_float32(outputs))
        noise = noise.astype(full.dtype)
        if self.form == "diagonal":
            product = jnp.sqrt(_diagonal(self.criterion, full, batch)) * noise
        elif self.form == "softmax":
            steepness = _steepness(self.criterion, full, batch)
            product = jnp.sqrt(steepness) * softmax.factor_product(0.0, full, _unit_targets(full), noise)
        else:
            blocks, faults = _output_blocks(self.criterion, full, batch)
            values, vectors = jnp.linalg.eigh(blocks)
            # Rounding in a zero eigenvalue is no reason to refuse: `faults` has judged.
            factor = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
            product = jnp.where(faults[0] | faults[1], jnp.nan, jnp.einsum("...ij,...j->...i", factor, noise))
        return product.astype(outputs.dtype)


def factored(criterion: Callable, outputs: jax.Array, batch: PyTree, *, max_classes: int = 64) -> Callable | None:
    """A criterion with ``factor_product``: itself, or `Factored` with what S is found to be at these outputs.

    S is looked at through products with it alone. None where it is neither diagonal nor that of a softmax and has more
    than ``max_classes`` columns, so that its blocks would cost too much; products with S always work.

    Raises:
      NoFactorError: if S couples the rows, or is not positive semi-definite; says nothing under ``jit``.
    """
    if hasattr(criterion, "factor_product"):
        return criterion
    check_forward_mode(
        criterion,
        (outputs, batch),
        partial(output_hessian_product, criterion),
        (outputs, batch, outputs),
        "It is in the criterion: give cross_entropy or squared_error, which have closed forms, or one without the rule",
    )
    few = outputs.shape[-1] <= max_classes
    with jax.default_matmul_precision("float32"):
        found = _forms(criterion, outputs, batch)
        if isinstance(found["coupled"], jax.core.Tracer):
            return Factored(criterion, "blocks") if few else None
        name = getattr(criterion, "__name__", repr(criterion))
        if found["coupled"]:
            raise NoFactorError(
                f"the criterion {name} couples the outputs of different rows, so its Hessian has no C x C blocks to "
                f"factor; use curvature='hessian', or a criterion that is a mean over rows"
            )
        form = next((form for form in ("diagonal", "softmax") if found[form]), "blocks" if few else None)
        if found["concave"] or (form == "blocks" and _faults(criterion, outputs, batch)[1]):
            raise NoFactorError(
                f"the criterion {name} is not convex in the outputs here, so its Hessian has no real factor; "
                f"use curvature='hessian', or the ggn operator, which needs no factor"
            )
    return Factored(criterion, form) if form else None


def check_factor(criterion: Callable, outputs: jax.Array, batch: PyTree) -> None:
    """Raises NoFactorError for a criterion without a factor, at these outputs; says nothing under ``jit``."""
    factored(criterion, outputs, batch)


# ---- what S is, from products with it ----


def _diagonal(criterion, outputs, batch):
    return output_hessian_product(criterion, outputs, batch, jnp.ones_like(outputs))


def _steepness(criterion, outputs, batch):
    """a_i of S_i = a_i (diag p_i - p_i p_i'), (..., 1), read where all p are equal: there S loses no digits."""
    (e,) = _directions(outputs, 1)
    e -= e.mean(-1, keepdims=True)
    product = output_hessian_product(criterion, _zeros(outputs), batch, e)
    return outputs.shape[-1] * (product * e).sum(-1, keepdims=True) / jnp.maximum((e * e).sum(-1, keepdims=True), 1e-30)


def _zeros(outputs):
    """Zeros that XLA does not see through: of a large vocabulary it takes minutes to fold what comes of them."""
    return jax.lax.optimization_barrier(jnp.zeros_like(outputs))


def _unit_targets(outputs):
    """Targets of sum one, all that the curvature of `jaxhess._softmax` asks of them."""
    return jnp.full_like(outputs, 1 / outputs.shape[-1])


def _directions(outputs, count):
    """Directions without any pattern, (count, ...)."""
    return jax.random.normal(jax.random.key(0), (count, *outputs.shape), outputs.dtype)


@partial(jax.jit, static_argnums=0)
def _forms(criterion, outputs, batch):
    """Flags of S: couples rows; is diagonal; is that of a softmax; has a direction of negative curvature.

    S has a form if it has it at these outputs and at two other places, since of a trained net S may be nothing but
    rounding. A place where the criterion is not finite does not count.
    """
    outputs = outputs.astype(at_least_float32(outputs))
    e, elsewhere, mask = _directions(outputs, 3)
    some = mask[..., :1] > 0
    vectors = jnp.stack([e, jnp.ones_like(e), jnp.where(some, e, 0)])
    steepness = _steepness(criterion, outputs, batch)

    def look(o):
        whole, diagonal, part = jax.vmap(partial(output_hessian_product, criterion, o, batch))(vectors)
        guess = steepness * softmax.hessian_product(0.0, o, _unit_targets(o), e)
        differences = {
            "diagonal": whole - diagonal * e,
            "softmax": whole - guess,
            "coupled": part - jnp.where(some, whole, 0),
        }
        worst = {name: jnp.max(jnp.abs(x)) for name, x in differences.items()}
        size = jnp.max(jnp.abs(jnp.stack([whole, diagonal, part])))
        return size, worst, jnp.min(diagonal), jnp.min((whole * e).sum(-1))

    places = jnp.stack([outputs, _zeros(outputs), elsewhere])
    sizes, worst, diagonal, curved = jax.lax.map(look, places)
    # The rounding of S's derivation is of the size that S has anywhere, in the criterion's own units.
    finite = jnp.isfinite(sizes)
    tolerance = 100 * jnp.finfo(outputs.dtype).eps * jnp.max(jnp.where(finite, sizes, 0))
    zero = {name: finite[0] & jnp.all((x <= tolerance) | ~finite) for name, x in worst.items()}
    lowest = jnp.where(zero["diagonal"], diagonal[0], jnp.where(zero["softmax"], jnp.min(steepness), curved[0]))
    return {
        "coupled": finite[0] & ~zero["coupled"],  # rows that were not moved have felt those that were
        "diagonal": zero["diagonal"],
        "softmax": zero["softmax"],
        "concave": lowest < -tolerance,
    }


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

    blocks, signs = blocks_at(outputs), jnp.sign(_directions(outputs, 1)[0])
    # Blocks read off with one direction in all rows are S only if no row feels another one's direction.
    product = output_hessian_product(criterion, outputs, batch, signs)
    # On a net that is trained to the end S vanishes, and the rounding of its derivation does not: that is of the size
    # that S has elsewhere, in the criterion's own units.
    elsewhere = jnp.max(jnp.abs(blocks_at(jnp.zeros_like(outputs))))
    scale = jnp.maximum(jnp.max(jnp.abs(blocks)), jnp.where(jnp.isfinite(elsewhere), 4 * elsewhere, 0))
    tolerance = 100 * jnp.finfo(outputs.dtype).eps * scale
    coupled = jnp.any(jnp.abs(product - jnp.einsum("...ij,...j->...i", blocks, signs)) > 10 * tolerance)
    concave = jnp.any(jnp.linalg.eigvalsh(blocks) < -tolerance)
    return blocks, (coupled, concave)
