"""Curvature operators: products v -> A v with the Hessian, its Gauss-Newton part G, and the rest H.

Each product is a `jax.tree_util.Partial` over parameters and batch: a function of v that is also a pytree, so it can be
passed through ``jit`` as an argument. It is compiled once for each loss, layer and set of shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from jaxhess._checks import at_least_float32, check_like, is_traced
from jaxhess._diagnosis import why_not_finite
from jaxhess._finite import Step, Widened, finite_step, in_float64, in_precision
from jaxhess._linear import HostLoopError, Linear, Operator, as_linear
from jaxhess._products import At, match
from jaxhess._programs import check_forward_mode
from jaxhess._trees import jitter, map_rows, own_eps, stack_rows, take_row, to_host
from jaxhess.batches import Batches, first_batch
from jaxhess.objective import Objective
from jaxhess.problem import Problem, compute, mean_over, pose
from jaxhess.selections import Layer, Selection

PyTree = Any


def hessian(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    layer: Selection = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> Partial:
    """The Hessian as a product: v -> Hess v, or v -> Hess_l v with the diagonal block of one layer.

    Hess = d^2 loss / d params^2, computed forward over reverse: one product takes the time of about two gradients and
    at most twice the memory of one. A block product differentiates with respect to that layer's parameters only.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over examples, such as an `Objective`.
      params: a pytree of floating-point arrays. Half-precision parameters are converted to float32.
      batch: any pytree, or `Batches` for the mean over many batches.
      layer: a layer or group, for its block: a name from `layer_names`, or anything else that `subtree` takes. By
        default the whole net.
      differentiation: "exact", forward over reverse; or "finite", for nets without derivatives in forward mode
        (``jax.custom_vjp``, as in flash attention): (grad L(w + t v) - grad L(w - t v)) / 2 t. The step t is found by a
        trial of a dozen. Its error, to which rounding belongs, is part of the residuals of eigenvalues. A number is a
        step of your own, relative to the parameters, such as 1e-3.
      has_aux: whether the loss returns ``(value, aux)``; for an `Objective`, whether ``predict`` returns
        ``(outputs, aux)``.

    Returns:
      A function v -> A v. Both are pytrees like ``params`` (or like ``subtree(params, layer)``), and A v has at least
      the precision of float32. Entries of parameters that the loss does not use are zero.

    Raises:
      TypeError: for parameters that are not floating-point, or a loss that does not return a scalar.
      ValueError: for an unknown layer or a selection of nothing (the message lists the layers), parameters that are not
        finite, an empty or inconsistent batch, labels out of range, or a v of another structure or shape.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> hv = jh.hessian(lambda p, batch: jnp.sum(p["w"] ** 3) * batch, {"w": jnp.array([1.0, 2.0])}, 0.5)
      >>> hv({"w": jnp.array([1.0, 1.0])})["w"]
      Array([3., 6.], dtype=float32)

    Reference: Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """
    problem = pose("hessian", loss, params, batch, has_aux, None, differentiation)
    return product("hessian", problem, problem.layer(layer))


def ggn(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    layer: Selection = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> Partial:
    """The generalised Gauss-Newton matrix as a product: v -> J' S J v, or the block G_l of one layer.

    J is the Jacobian of the outputs in the parameters and S the Hessian of the criterion in the outputs: equations
    (2) and (3) of the paper. It is positive semi-definite where the criterion is convex.

    Args:
      objective: an `Objective`; a plain loss does not show the two halves that this needs.
      params, batch, layer, differentiation, has_aux: as for `hessian`. With "finite", derivatives of ``predict``
        along v are central differences.

    Returns:
      A function v -> A v, as `hessian` returns.

    Raises:
      TypeError: for a plain loss; otherwise as `hessian`.
      ValueError: as `hessian`.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> gv = jh.ggn(objective, jnp.zeros((2, 1)), {"x": jnp.eye(2), "label": jnp.ones((2, 1))})
      >>> gv(jnp.ones((2, 1))).ravel()
      Array([1., 1.], dtype=float32)

    Reference: Schraudolph 2002, Fast curvature matrix-vector products.
    """
    problem = pose("ggn", objective, params, batch, has_aux, None, differentiation)
    return product("ggn", problem, problem.layer(layer))


def functional_hessian(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    layer: Selection = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> Partial:
    """The Hessian without G, as a product: v -> H v with H = Hess - G, or the block H_l of one layer.

    H = sum over outputs of (d criterion / d output) * (d^2 output / d params^2): equations (1) and (4) of the paper.
    It is computed as the Hessian of ``<g, predict(params)>`` with g held fixed, not as a difference, so a block that is
    zero comes out as exactly zero. In piecewise linear nets with fixed batch statistics, every H_l is zero, but H is
    not.

    Args:
      objective: an `Objective`; a plain loss does not show the two halves that this needs.
      params, batch, layer, differentiation, has_aux: as for `hessian`. With "finite", derivatives of ``predict``
        along v are central differences.

    Returns:
      A function v -> A v, as `hessian` returns.

    Raises:
      TypeError: for a plain loss; otherwise as `hessian`.
      ValueError: as `hessian`.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> hv = jh.functional_hessian(objective, jnp.zeros((2, 1)), {"x": jnp.eye(2), "label": jnp.ones((2, 1))})
      >>> hv(jnp.ones((2, 1))).ravel()
      Array([0., 0.], dtype=float32)

    Reference: Sagun et al. 2018, Empirical analysis of the Hessian of over-parametrized neural networks.
    """
    problem = pose("functional", objective, params, batch, has_aux, None, differentiation)
    return product("functional", problem, problem.layer(layer))


def aslinearoperator(operator: Operator, *, like: PyTree) -> scipy.sparse.linalg.LinearOperator:
    """Turns a product into a linear operator of SciPy, which eigsh, lobpcg, svds and cg accept.

    Vectors are flat, of shape (dim,): the leaves of v one after another, in the order of
    ``jax.flatten_util.ravel_pytree``.

    Args:
      operator: a symmetric v -> A v, as from `hessian`; `linearize` it first for speed.
      like: a pytree of arrays like v.

    Returns:
      `scipy.sparse.linalg.LinearOperator` of shape (dim, dim) and type float64. Products are computed in the precision
      of ``operator``.

    Raises:
      ValueError: for an empty ``like``.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh, numpy as np, scipy.sparse.linalg
      >>> op = jh.aslinearoperator(lambda v: jnp.arange(5.0) * v, like=jnp.zeros(5))
      >>> values = scipy.sparse.linalg.eigsh(op, k=2, v0=np.ones(5), return_eigenvectors=False)
      >>> [round(float(x), 4) for x in values]
      [3.0, 4.0]

    Reference: ``scipy.sparse.linalg.LinearOperator``.
    """
    check_like("like", like)
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), at_least_float32(x)), like))
    linear = as_linear(operator)

    def matvec(x):
        product = linear(unravel(jnp.asarray(np.ravel(x), flat.dtype)))
        return np.concatenate([to_host(leaf).ravel().astype(np.float64) for leaf in jax.tree.leaves(product)])

    def matmat(x):
        rows = jax.vmap(unravel)(jnp.asarray(x.T, flat.dtype))
        products = linear.func.stacked(*linear.args, rows)
        columns = [to_host(leaf).reshape(x.shape[1], -1).T for leaf in jax.tree.leaves(products)]
        return np.concatenate(columns).astype(np.float64)

    shape = (flat.size, flat.size)
    return scipy.sparse.linalg.LinearOperator(shape, matvec, rmatvec=matvec, matmat=matmat, dtype=np.float64)


def product(curvature: str, problem: Problem, layer: Layer | None = None) -> Partial:
    """The product of a `Problem`, for the whole net by default."""
    layer = problem.whole if layer is None else layer
    if problem.finite:
        step = finite_step(curvature, problem, wide=True)
        made = _Product(At(curvature, problem.loss, layer, step.size), problem.batch if problem.many else None, step)
    else:
        made = _Product(product_at(curvature, problem, layer), problem.batch if problem.many else None)
    return Partial(made, problem.params, None if problem.many else problem.batch)


def product_at(curvature: str, problem: Problem, layer: Layer) -> At:
    """The product of one batch as a function of parameters, batch and v; TypeError where there is none."""
    if problem.finite:
        return At(curvature, problem.loss, layer, finite_step(curvature, problem, wide=False).size)
    at, first = At(curvature, problem.loss, layer), (problem.params, problem.first)
    check_forward_mode(problem.loss, first, at, (*first, layer.take(problem.params)))
    return at


@dataclasses.dataclass(frozen=True)
class _Product(Linear):
    """The product of one batch, or the mean over many, as an operator; static under ``jit``."""

    at: At
    batches: Batches | None = None
    step: Step | None = None  # of central differences

    @property
    def on_host(self):
        return self.batches is not None or (self.step is not None and self.step.wide)

    def __call__(self, params, batch, v):
        if self.batches is None:
            return self._of_batch(params, batch, v)
        return self._mean(self.at, params, v)

    def _of_batch(self, params, batch, v):
        if self.step is None or not self.step.wide:
            return compute(self.at, params, batch, (v,))
        if is_traced(params, batch, v):
            raise HostLoopError(
                "products by central differences in float64 cannot run under jit, vmap or grad; call them outside, or "
                "make the operator inside, where they are taken in float32"
            )
        return in_precision(True, self.at, params, batch, match(v, self.at.layer.take(params)))

    def stacked(self, params, batch, vectors):
        """The products with several vectors; each of many batches is read once for all of them."""
        if self.batches is None and not self.on_host:
            return super().stacked(params, batch, vectors)
        if self.batches is None:
            count = len(jax.tree.leaves(vectors)[0])
            return stack_rows([self(params, batch, take_row(vectors, i)) for i in range(count)])
        return self._mean(_Rows(self.at), params, vectors)

    def _mean(self, function, params, v):
        if is_traced(params, v):
            raise HostLoopError(
                "an operator over Batches reads its batches in a loop on the host and cannot run under jit, vmap or "
                "grad; call it outside, or give one batch"
            )
        if self.step is None or not self.step.wide:
            return mean_over(self.batches, self.at.loss, params, function, lambda _: (v,))
        mean = partial(mean_over, self.batches, self.at.loss)
        return in_float64(lambda p, _, args: mean(p, Widened(function), lambda number: args), params, None, (v,))

    def perturbed(self, key, size, params, batch):
        if self.step is None:
            return Partial(self, jitter(key, params, size), batch)
        # The change to half of the step is larger than the error at either.
        half = dataclasses.replace(self, at=dataclasses.replace(self.at, step=self.step.size / 2))
        return Partial(half, jitter(key, params, own_eps(params)), batch)

    def rounding(self, params, batch, like):
        if self.step is not None:
            return self.step.error
        if self.batches is None:
            return super().rounding(params, batch, like)
        return _Product(self.at).rounding(params, first_batch(self.batches), like)

    def why_not_finite(self, params, batch, v):
        data = batch if self.batches is None else self.batches
        return why_not_finite(self.at.curvature, self.at.loss, params, data)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The product with several vectors, stacked along a leading axis."""

    at: At

    def __call__(self, params, batch, vectors):
        return map_rows(partial(self.at, params, batch), vectors)


@dataclasses.dataclass(frozen=True)
class _Block(Linear):
    """The diagonal block of a layer, from the product of the whole net: nothing is compiled for the layer."""

    layer: Layer

    def __call__(self, product, zeros, part):
        return self.layer.take(product(self.layer.put(zeros, part)))

    def perturbed(self, key, size, product, zeros):
        moved = product.func.perturbed(key, size, *product.args)
        return None if moved is None else Partial(self, moved, zeros)

    def rounding(self, product, zeros, like):
        return product.func.rounding(*product.args, zeros)

    def why_not_finite(self, product, zeros, part):
        return product.func.why_not_finite(*product.args, self.layer.put(zeros, part))


def block(product: Partial, layer: Layer, zeros: PyTree) -> Partial:
    """The diagonal block of a layer from the product of the whole net; ``zeros`` is a tree like the parameters."""
    return Partial(_Block(layer), product, zeros)


def linearize(operator: Operator, *, like: PyTree) -> Operator:
    """The same product, with everything that does not depend on v computed once and kept.

    Each product then leaves out the forward and backward pass at the parameters; their intermediate values stay in
    memory. This pays from the second product on. The spectra of this library do it for single batches.

    Args:
      operator: a linear function of v that JAX can trace, as from `hessian`.
      like: a pytree of arrays like v.

    Returns:
      A `jax.tree_util.Partial` v -> A v. New values of the same shapes are not compiled again. An operator over
      `Batches` is returned unchanged.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> hv = jh.linearize(jh.hessian(lambda p, _: jnp.sum(p["w"] ** 3), params, None), like=params)
      >>> hv(params)["w"]
      Array([ 6., 24.], dtype=float32)

    Reference: ``jax.linearize``.
    """
    linear = as_linear(operator)
    if linear.func.on_host:
        return operator
    # In the precision of the products, which is also that of random vectors.
    like = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), like)
    return Partial(_Linearized(), _linearize(linear, like), like, linear)


@dataclasses.dataclass(frozen=True)
class _Linearized(Linear):
    """A product whose parts that do not depend on v are computed already, with the operator that it came from."""

    def __call__(self, linear, like, origin, v):
        return _apply_linear(linear, like, v)

    def perturbed(self, key, size, linear, like, origin):
        moved = origin.func.perturbed(key, size, *origin.args)
        return None if moved is None else linearize(moved, like=like)

    def why_not_finite(self, linear, like, origin, v):
        return origin.func.why_not_finite(*origin.args, v)


@jax.jit
def _linearize(operator, like):
    def product(v):
        entry = jnp.sum(jnp.ravel(jax.tree.leaves(v)[0])[:1])
        return jax.tree.map(lambda x: _with_tangent(x, entry), operator(v))

    return jax.linearize(product, jax.tree.map(jnp.zeros_like, like))[1]


@jax.custom_jvp
def _with_tangent(x, entry):
    """``x``, with a tangent that is an array even where it is zero.

    In JAX 0.6 and 0.7, the function that `jax.linearize` returns may hold zeros that were made under ``jit`` and cannot
    leave it. Zeros that are computed from a tangent avoid this; ``entry`` is any number that depends on v.
    """
    return x


@partial(_with_tangent.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    x, (tangent, of_entry) = primals[0], tangents
    if isinstance(tangent, SymbolicZero):
        tangent = jnp.full(x.shape, jnp.where(False, of_entry, 0), x.dtype)
    return x, tangent


@jax.jit
def _apply_linear(linear, like, v):
    return linear(match(v, like))
