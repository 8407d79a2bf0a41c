"""Losses that show their two halves, and the protocol of the outer half, the criterion.

The generalised Gauss-Newton matrix is G = J' S J, where J is the Jacobian of the outputs in the parameters and S the
Hessian of the criterion in the outputs. A `Criterion` may give S in closed form; for a plain function it comes from
automatic differentiation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxhess import _factor
from jaxhess._checks import at_least_float32, is_traced
from jaxhess._programs import check_forward_mode
from jaxhess._trees import full_precision
from jaxhess.logits import Logits

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss that shows its two halves: ``criterion(predict(params, batch), batch)``.

    It is hashed by its two functions: a new objective made of the same functions is not compiled again.

    Args:
      predict: ``predict(params, batch) -> outputs``, a floating-point array of shape (..., C), with one row for
        each example (or for each position of a sequence); or `Logits`.
      criterion: ``criterion(outputs, batch) -> scalar``, a mean over the examples. `cross_entropy` and
        `squared_error` have closed forms; any other function that JAX can differentiate twice works too.

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


class Criterion:
    """The base class of criteria: override what is known in closed form.

    ``criterion(outputs, batch)`` is a scalar, a mean over the rows of the outputs. A plain function works too: its
    Hessian S in the outputs comes from automatic differentiation, and a factor of S is searched for.

    Attributes:
      weighted: whether it is a weighted mean, for which `Batches` needs the sum of the weights as ``size=``; by default
        False.
      takes_logits: whether it applies the softmax itself, so that outputs which are probabilities are refused; by
        default False.

    Raises:
      NotImplementedError: when it is called, if the subclass does not define ``__call__``.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> class Huber(jh.Criterion):
      ...     def __call__(self, outputs, batch):
      ...         return jnp.sqrt(1 + (outputs - batch["label"]) ** 2).mean()
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, Huber())
      >>> gv = jh.ggn(objective, jnp.ones((2, 1)), {"x": jnp.eye(2), "label": jnp.ones((2, 1))})
      >>> gv(jnp.ones((2, 1))).ravel()
      Array([0.5, 0.5], dtype=float32)

    Reference: Schraudolph 2002, Fast curvature matrix-vector products (S of matching criteria).
    """

    weighted: bool = False
    takes_logits: bool = False

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The criterion, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, outputs, batch)")

    def check(self, outputs: jax.ShapeDtypeStruct, batch: PyTree) -> None:
        """Raises ValueError for a batch that does not fit outputs of this shape, where its values are known."""

    def hessian_product(self, outputs: jax.Array, batch: PyTree, tangent: jax.Array) -> jax.Array:
        """S t, where S includes the 1/N of the mean; ``tangent`` is like ``outputs``."""
        full = outputs.astype(at_least_float32(outputs))
        slope = jax.grad(lambda o: self(o, batch))
        return jax.jvp(slope, (full,), (tangent.astype(full.dtype),))[1].astype(outputs.dtype)

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S, where S includes the 1/N of the mean; from C x C blocks unless overridden."""
        return Factored(self, "blocks").factor_product(outputs, batch, noise)

    @property
    def knows_factor(self) -> bool:
        """Whether `factor_product` is overridden."""
        return type(self).factor_product is not Criterion.factor_product


@dataclasses.dataclass(frozen=True)
class _Function(Criterion):
    function: Callable

    def __call__(self, outputs, batch):
        return self.function(outputs, batch)


def as_criterion(criterion: Callable) -> Criterion:
    """A plain function as a `Criterion`."""
    return criterion if isinstance(criterion, Criterion) else _Function(criterion)


class NoFactorError(ValueError):
    """A criterion's Hessian in the outputs has no factor B with B B' = S."""


@dataclasses.dataclass(frozen=True)
class Factored(Criterion):
    """A criterion without a closed-form factor, with one that is found from its Hessian S in the outputs.

    Attributes:
      criterion: the criterion.
      form: the form that S has: "diagonal"; "softmax", a_i (diag p_i - p_i p_i') in row i, as for every cross-entropy,
        whatever the labels; or "blocks", any C x C matrix in each row, which takes rows x C^2 numbers.
    """

    criterion: Callable[[jax.Array, PyTree], jax.Array]
    form: str

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        """The criterion itself."""
        return self.criterion(outputs, batch)

    def hessian_product(self, outputs: jax.Array, batch: PyTree, tangent: jax.Array) -> jax.Array:
        """S t, as the criterion computes it."""
        return as_criterion(self.criterion).hessian_product(outputs, batch, tangent)

    def factor_product(self, outputs: jax.Array, batch: PyTree, noise: jax.Array) -> jax.Array:
        """B e with B B' = S; NaN if a block of S is not positive semi-definite, or S has entries outside its blocks."""
        full = outputs.astype(at_least_float32(outputs))
        product = _factor.PRODUCTS[self.form](self, full, batch, noise.astype(full.dtype))
        return product.astype(outputs.dtype)


def factored(criterion: Callable, outputs: jax.Array, batch: PyTree, *, max_classes: int = 64) -> Criterion | None:
    """A criterion with a factor: itself, or `Factored` with the form that S has at these outputs.

    S is examined through products with it alone. The result is None if S is neither diagonal nor that of a softmax and
    has more than ``max_classes`` columns, whose blocks would cost too much, and of `Logits`, which are never formed;
    products with S always work.

    Raises:
      NoFactorError: if S couples the rows, or is not positive semi-definite; neither is checked under ``jit``.
    """
    known = as_criterion(criterion)
    if isinstance(outputs, Logits):
        return None
    if known.knows_factor:
        return known
    instead = "It is in the criterion: give cross_entropy or squared_error, which have closed forms, or one without it"
    check_forward_mode(known, (outputs, batch), known.hessian_product, (outputs, batch, outputs), instead)
    few = outputs.shape[-1] <= max_classes
    found = full_precision(_factor.forms)(known, outputs, batch)
    if is_traced(found):
        return Factored(criterion, "blocks") if few else None
    name = getattr(criterion, "__name__", repr(criterion))
    if found["coupled"]:
        raise NoFactorError(
            f"the criterion {name} couples the outputs of different rows, so its Hessian has no C x C blocks to "
            f"factor; use curvature='hessian', or a criterion that is a mean over rows"
        )
    form = next((form for form in ("diagonal", "softmax") if found[form]), "blocks" if few else None)
    if found["concave"] or (form == "blocks" and full_precision(_factor.blocks_concave)(known, outputs, batch)):
        raise NoFactorError(
            f"the criterion {name} is not convex in the outputs here, so its Hessian has no real factor; "
            f"use curvature='hessian', or the ggn operator, which needs no factor"
        )
    return Factored(criterion, form) if form else None
