"""Curvature operators: products v -> A v with the Hessian, its Gauss-Newton part G, and the rest H.

Each public function returns a `jax.tree_util.Partial` over parameters and batch: a pytree, so that it passes through
``jit`` as an argument, and a function of v. The product is compiled once for each loss, layer and set of shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import multihost_utils
from jax.tree_util import Partial

from jaxhess._checks import at_least_float32, check_batch, check_parameters, hints
from jaxhess._programs import check_forward_mode, ends_in_softmax, equations, program
from jaxhess.batches import Batches, first_batch, leading_axis
from jaxhess.layers import Layer, find_layer
from jaxhess.objective import CrossEntropy, Objective, output_hessian_product

PyTree = Any
Operator = Callable[[PyTree], PyTree]

UNROLLED = 16  # rows of `map_rows` up to here stand one after another; the time of compiling grows with them


def hessian(
    loss: Callable, params: PyTree, batch: PyTree, *, layer: str | None = None, has_aux: bool = False
) -> Partial:
    """The Hessian as a product: v -> Hess v, or v -> Hess_l v with the diagonal block of one layer.

    Hess = d^2 loss / d params^2, forward over reverse: one product costs about two gradients, and no more memory
    than a gradient twice. Block products differentiate that layer's parameters only.

    Args:
      loss: ``loss(params, batch) -> scalar``, a mean over examples; an `Objective` is one.
      params: a pytree of floating-point arrays. Half-precision parameters are taken in float32.
      batch: any pytree, or `Batches` for the mean over many.
      layer: a name from `layer_names` for the block of one layer; by default the whole net.
      has_aux: the loss returns ``(value, aux)`` (of an `Objective`: its ``predict`` returns ``(outputs, aux)``).

    Returns:
      A function of v, a pytree like ``params`` (or like ``subtree(params, layer)``), that returns A v of the same
      structure, at least in float32. Parameters that the loss does not use get zeros.

    Raises:
      TypeError: for parameters that are not floating-point, or a loss that does not return a scalar.
      ValueError: for an unknown layer (the message lists them), parameters that are not finite, an empty or
        inconsistent batch, labels out of range, or a v that does not match.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> hv = jh.hessian(lambda p, batch: jnp.sum(p["w"] ** 3) * batch, {"w": jnp.array([1.0, 2.0])}, 0.5)
      >>> hv({"w": jnp.array([1.0, 1.0])})["w"]
      Array([3., 6.], dtype=float32)

    Reference: Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """
    return _operator("hessian", loss, params, batch, layer, has_aux)


def ggn(
    objective: Objective, params: PyTree, batch: PyTree, *, layer: str | None = None, has_aux: bool = False
) -> Partial:
    """The generalised Gauss-Newton matrix as a product: v -> J' S J v, or the block G_l of one layer.

    J is the Jacobian of the outputs in the parameters and S the Hessian of the criterion in the outputs: equations
    (2) and (3) of the paper. Positive semi-definite where the criterion is convex.

    Args:
      objective: an `Objective`, whose halves are needed.
      params, batch, layer, has_aux: as for `hessian`.

    Returns:
      A function of v, as `hessian` does.

    Raises:
      TypeError: for a plain loss; further as `hessian`.
      ValueError: as `hessian`.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> gv = jh.ggn(objective, jnp.zeros((2, 1)), {"x": jnp.eye(2), "label": jnp.ones((2, 1))})
      >>> gv(jnp.ones((2, 1))).ravel()
      Array([1., 1.], dtype=float32)

    Reference: Schraudolph 2002, Fast curvature matrix-vector products.
    """
    return _operator("ggn", objective, params, batch, layer, has_aux)


def functional_hessian(
    objective: Objective, params: PyTree, batch: PyTree, *, layer: str | None = None, has_aux: bool = False
) -> Partial:
    """What the Hessian has beyond G, as a product: v -> H v with H = Hess - G, or the block H_l of one layer.

    H = sum over outputs of (d criterion / d output) * (d^2 output / d params^2): equations (1) and (4) of the paper.
    It is computed as the Hessian of ``<g, predict(params)>`` with g held fixed, not as a difference, so that a zero
    block comes out as zero. For piecewise linear nets with fixed batch statistics every H_l is zero, H is not.

    Args:
      objective: an `Objective`, whose halves are needed.
      params, batch, layer, has_aux: as for `hessian`.

    Returns:
      A function of v, as `hessian` does.

    Raises:
      TypeError: for a plain loss; further as `hessian`.
      ValueError: as `hessian`.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> hv = jh.functional_hessian(objective, jnp.zeros((2, 1)), {"x": jnp.eye(2), "label": jnp.ones((2, 1))})
      >>> hv(jnp.ones((2, 1))).ravel()
      Array([0., 0.], dtype=float32)

    Reference: Sagun et al. 2018, Empirical analysis of the Hessian of over-parametrized neural networks.
    """
    return _operator("functional", objective, params, batch, layer, has_aux)


def linearize(operator: Operator, *, like: PyTree) -> Operator:
    """The same product with everything that does not depend on v computed once and kept.

    Takes the forward and backward pass out of each product, for the memory of their intermediate values. Worth it
    from the second product on; used by the traces and spectra of this library for single batches.

    Args:
      operator: a linear function of v that JAX can trace, as from `hessian`.
      like: a pytree of arrays like v.

    Returns:
      A `jax.tree_util.Partial` v -> A v; new values of the same shapes compile nothing. An operator over
      `Batches` comes back as it is.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> hv = jh.linearize(jh.hessian(lambda p, _: jnp.sum(p["w"] ** 3), params, None), like=params)
      >>> hv(params)["w"]
      Array([ 6., 24.], dtype=float32)

    Reference: ``jax.linearize``.
    """
    if runs_on_host(operator):
        return operator
    # In the precision of the products, which is that of the vectors that samplers draw.
    like = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), like)
    operator = as_partial(operator)
    return Partial(_Linear(), _linearize(operator, like), like, operator)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A product of which everything that does not depend on v was computed before."""

    def __call__(self, linear, like, origin, v):
        del origin  # kept for `perturbed` and `source`
        return _apply_linear(linear, like, v)

    def perturbed(self, key, size, linear, like, origin):
        del linear
        return linearize(perturbed(origin, key, size), like=like)


@jax.jit
def _linearize(operator, like):
    def product(v):
        entry = jnp.sum(jnp.ravel(jax.tree.leaves(v)[0])[:1])
        return jax.tree.map(lambda x: _with_tangent(x, entry), operator(v))

    return jax.linearize(product, jax.tree.map(jnp.zeros_like, like))[1]


@jax.custom_jvp
def _with_tangent(x, entry):
    """``x``, whose tangent is an array also where it is zero.

    In JAX 0.6 and 0.7, what `jax.linearize` returns keeps zeros that it made under ``jit``, and cannot leave it. Zeros
    made of a tangent are none of them; ``entry`` is any number that depends on v.
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
    return linear(_match(v, like))


def source(operator: Operator) -> Partial:
    """What was linearised, or what a block is of, or the operator itself."""
    made = as_partial(operator)
    if isinstance(made.func, _Block):
        return source(made.args[0])
    return made.args[2] if isinstance(made.func, _Linear) else made


def as_partial(operator: Operator) -> Partial:
    """Any function of v as a pytree that passes through ``jit``."""
    return operator if isinstance(operator, Partial) else Partial(operator)


def runs_on_host(operator: Operator) -> bool:
    """True for products over `Batches`, which loop on the host."""
    return isinstance(getattr(operator, "func", None), _OverBatches)


def perturbed(operator: Partial, key: jax.Array, size: float) -> Partial | None:
    """The operator at parameters that are moved by a relative ``size``; None for a function whose inside is unknown."""
    move = getattr(operator.func, "perturbed", None)
    return None if move is None else move(key, size, *operator.args)


@jax.jit
def jitter(key: jax.Array, tree: PyTree, size: float) -> PyTree:
    """A tree with every number moved by a relative ``size``, up or down."""
    leaves, treedef = jax.tree.flatten(tree)
    ends = np.cumsum([x.size for x in leaves])
    # One draw, cut into leaves: XLA takes many times as long to compile a draw for each leaf.
    signs = jnp.split(jax.random.rademacher(key, (int(ends[-1]),), jnp.int8), ends[:-1])
    factors = [
        1 + jnp.asarray(size, x.dtype) * s.reshape(x.shape).astype(x.dtype) for s, x in zip(signs, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, [x * f for x, f in zip(leaves, factors, strict=True)])


def coarsest_eps(operator: Partial, like: PyTree) -> float:
    """The rounding of the coarsest floating-point type that an operator rounds to on the way, by its program.

    `own_eps` where that is the coarsest, or where JAX cannot trace the operator.
    """
    if isinstance(operator.func, _Block):
        return coarsest_eps(*operator.args)
    if isinstance(operator.func, _OverBatches):
        operator = Partial(operator.func.product, *operator.args, first_batch(operator.func.batches))
    own = own_eps(like)
    try:
        return max(own, rounding_of(_call, operator, like))
    except Exception:  # a function of the host may raise anything when it is traced
        return own


def own_eps(like: PyTree) -> float:
    """Rounding of the precision that products are taken in, which is that of ``like`` but at least float32."""
    return max(float(jnp.finfo(at_least_float32(x)).eps) for x in jax.tree.leaves(like))


def _call(operator, v):
    return operator(v)


def rounding_of(function: Callable, *args: PyTree) -> float:
    """The rounding of the coarsest floating-point type that a program converts finer numbers to; 0 if it does not."""
    return max((float(jnp.finfo(dtype).eps) for dtype in _roundings(program(function, *args))), default=0.0)


def _roundings(jaxpr):
    """The types that floating-point numbers of a finer one are converted to."""
    for eqn, _ in equations(jaxpr):
        if eqn.primitive.name == "convert_element_type":
            old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            if all(jnp.issubdtype(x, jnp.floating) for x in (old, new)) and jnp.finfo(new).eps > jnp.finfo(old).eps:
                yield new


def apply_stacked(operator: Operator, vectors: PyTree) -> PyTree:
    """A v for several v, stacked along a new leading axis; over `Batches`, each batch is read once for all."""
    operator = as_partial(operator)
    if runs_on_host(operator):
        return operator.func(*operator.args, vectors, stacked=True)
    try:
        return _apply_stacked(operator, vectors)
    except HostLoopError:  # a function that calls such a product, like its negative
        rows = [operator(jax.tree.map(lambda x, i=i: x[i], vectors)) for i in range(len(jax.tree.leaves(vectors)[0]))]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


@jax.jit
def _apply_stacked(operator, vectors):
    return map_rows(operator, vectors)


def map_rows(function: Callable, stacked: PyTree) -> PyTree:
    """``jax.vmap(function)(stacked)``, where a few rows stand one after another in the program.

    Faster for products: each row has tangents of the kernels of its own, and of such convolutions vmap makes one with
    groups. What the rows share the compiler computes once either way.
    """
    count = len(jax.tree.leaves(stacked)[0])
    if count > UNROLLED:
        return jax.vmap(function)(stacked)
    rows = [function(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(count)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *rows)


# ---- the three products, at a point and in a direction of the whole tree or of one layer ----


def _hessian_product(loss, fill, point, batch, v):
    return jax.jvp(jax.grad(lambda q: loss(fill(q), batch)), (point,), (v,))[1]


def _ggn_product(objective, fill, point, batch, v):
    def predict(q):
        return objective.predict(fill(q), batch)

    outputs, tangent = jax.jvp(predict, (point,), (v,))
    _, pull = jax.vjp(predict, point)
    return pull(output_hessian_product(objective.criterion, outputs, batch, tangent))[0]


def _functional_product(objective, fill, point, batch, v):
    outputs = objective.predict(fill(point), batch)
    slope = jax.grad(objective.criterion)(outputs, batch)
    return _hessian_product(lambda p, b: jnp.sum(slope * objective.predict(p, b)), fill, point, batch, v)


_PRODUCTS = {"hessian": _hessian_product, "ggn": _ggn_product, "functional": _functional_product}


@dataclasses.dataclass(frozen=True)
class _Product:
    """One kind of product of one loss, for one layer or all; static under ``jit``."""

    kind: str
    loss: Callable
    layer: str | None

    def __call__(self, params, batch, v):
        return _apply(self, params, batch, v)

    def perturbed(self, key, size, params, batch):
        return Partial(self, jitter(key, params, size), batch)


@dataclasses.dataclass(frozen=True)
class _Block:
    """The diagonal block of a layer by the product of the whole net: only the ends are compiled."""

    layer: Layer

    def __call__(self, product, params, part):
        return _take(self.layer, product(_put(self.layer, params, part)))

    def perturbed(self, key, size, product, params):
        return Partial(self, perturbed(product, key, size), params)


def block(product: Partial, layer: Layer, params: PyTree) -> Partial:
    """The diagonal block of a layer from the product of the whole net."""
    return Partial(_Block(layer), product, params)


@partial(jax.jit, static_argnums=0)
def _put(layer, like, part):
    return layer.put(optax.tree.zeros_like(like), part)


@partial(jax.jit, static_argnums=0)
def _take(layer, tree):
    return layer.take(tree)


@partial(jax.jit, static_argnums=0)
def _apply(product, params, batch, v):
    point, fill = params, lambda q: q
    if product.layer is not None:
        layer = find_layer(params, product.layer)
        point, fill = layer.take(params), partial(layer.put, params)
    # TF32, the default of some GPUs, is too coarse for curvature.
    with jax.default_matmul_precision("float32"):
        return _PRODUCTS[product.kind](product.loss, fill, point, batch, _match(v, point))


def _match(v, point):
    """v with the dtypes of the point; ValueError where its structure or shapes differ."""
    if jax.tree.structure(v) != jax.tree.structure(point):
        mine, theirs = (
            [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)] for t in (v, point)
        )
        differ = sorted(set(mine) ^ set(theirs))[:4] or "in their containers"
        raise ValueError(
            f"v does not match the parameters: the structures differ at {differ}; v must be a pytree like params, "
            f"or like subtree(params, layer) for one layer"
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(point), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            at = jax.tree_util.keystr(path)
            raise ValueError(f"v does not match the parameters at {at!r}: shape {jnp.shape(a)}, theirs {jnp.shape(b)}")
        if jnp.issubdtype(jnp.result_type(a), jnp.complexfloating):
            raise TypeError(f"v is complex at {jax.tree_util.keystr(path)!r}; take the products of its two parts")
    return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), v, point)


class HostLoopError(TypeError):
    """A product over `Batches` was called under a transformation of JAX."""


@dataclasses.dataclass(frozen=True)
class _OverBatches:
    """The mean of a product over many batches, weighted by their numbers of examples."""

    product: _Product
    batches: Batches

    def __call__(self, params, v, stacked=False):
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, v))):
            raise HostLoopError(
                "an operator over Batches reads its batches in a loop on the host and cannot run under jit, vmap or "
                "grad; call it outside, or give one batch"
            )
        mean = self.batches.fold(
            lambda mean, batch, share, _: _accumulate(self.product, stacked, params, batch, v, mean, share)
        )
        if not all(_finite(jax.tree.leaves(mean))):
            check_batches(self.product.loss, params, self.batches)
        return mean

    def perturbed(self, key, size, params):
        return Partial(self, jitter(key, params, size))


@partial(jax.jit, static_argnums=(0, 1))
def _accumulate(product, stacked, params, batch, v, mean, share):
    """The running mean after one more batch, which holds this share of the examples so far."""
    new = map_rows(partial(product, params, batch), v) if stacked else product(params, batch, v)
    return new if mean is None else jax.tree.map(lambda m, n: m + jnp.asarray(share, m.dtype) * (n - m), mean, new)


# ---- what is checked before the first product ----


def _operator(kind, loss, params, batch, layer, has_aux):
    loss, params = prepare(kind, loss, params, batch, has_aux, products=True, layer=layer)
    product = _Product(kind, loss, layer)
    if isinstance(batch, Batches):
        return Partial(_OverBatches(product, batch), params)
    return Partial(product, params, batch)


def prepare(
    kind: str,
    loss: Any,
    params: PyTree,
    batch: PyTree,
    has_aux: bool = False,
    *,
    products: bool = False,
    layer: str | None = None,
) -> tuple[Any, PyTree]:
    """Checks a loss, its parameters and its batch; returns the loss without aux, and the parameters to differentiate.

    Values (NaN, labels) are checked where they are concrete; under ``jit`` a NaN is carried through. For those who take
    ``products``, of the whole net or one layer, it is checked that they can be taken.
    """
    if kind not in _PRODUCTS:
        raise ValueError(f"unknown curvature {kind!r}; choose from {sorted(_PRODUCTS)}")
    if kind != "hessian" and not isinstance(loss, Objective):
        raise TypeError(
            f"{kind} needs the two halves of the loss, got {_describe(loss)}; "
            f"make an Objective(predict, criterion), or ask for the Hessian"
        )
    if not callable(loss):
        raise TypeError(f"a loss is a function loss(params, batch), got {_describe(loss)}")
    try:
        hash(loss)
    except TypeError:
        raise TypeError(
            f"the loss, a {type(loss).__name__}, has no hash, and is compiled for its identity; give a function or a "
            f"frozen dataclass, and put arrays into the parameters or the batch"
        ) from None
    if has_aux:
        loss = Objective(_First(loss.predict), loss.criterion) if isinstance(loss, Objective) else _First(loss)
    params = _differentiable(params)
    criterion = loss.criterion if isinstance(loss, Objective) else None
    if getattr(criterion, "weighted", False) and isinstance(batch, Batches) and batch.size is leading_axis:
        raise ValueError(
            "a criterion with weights is a mean by their sums, which Batches cannot know; say them with "
            "Batches(batches, size=lambda batch: ...), the sum of the weights of a batch"
        )
    batches, batch = batch, first_batch(batch)
    check_batch(batch)
    if isinstance(batches, Batches):
        batches.look_ahead()
    _check_values(loss, params, batch)
    with hints(params, batch):
        value = jax.eval_shape(jax.jit(loss), params, batch)
    if not (hasattr(value, "shape") and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)):
        hint = "; for (value, aux) say has_aux=True" if isinstance(value, tuple) else "; take the mean over examples"
        raise TypeError(f"the loss must return a floating-point scalar, got {value}{hint}")
    if isinstance(batches, Batches) and batches.check:
        _check_mean(loss, params, batches)
    if products:
        v = params if layer is None else find_layer(params, layer).take(params)
        check_forward_mode(loss, (params, batch), _Product(kind, loss, layer), (params, batch, v))
    return loss, params


def _check_mean(loss, params, batches):
    """ValueError for a loss over several batches that is no mean over independent examples, tried on a few of them."""
    some = list(itertools.islice(batches, 2))
    # Of a random key the halves would make other random numbers than the whole.
    if len(some) < 2 or any(isinstance(x, jax.core.Tracer) or _is_key(x) for x in jax.tree.leaves((params, some[0]))):
        return
    try:
        count = _examples(loss, params, some[0]) // 2 * 2
        whole, *halves = [_rows(some[0], *ends) for ends in ((0, count), (0, count // 2), (count // 2, count))]
        sizes = [float(batches.size(half)) for half in halves]
        values = [float(_value(loss, params, part)) for part in (whole, *halves)]
        rounding = rounding_of(loss, params, whole)
    except Exception:  # of a batch that cannot be cut the user's code may raise anything
        return
    mean = float(np.average(values[1:], weights=sizes)) if sum(sizes) else np.nan
    if abs(values[0] - mean) > max(1e-3, 20 * rounding) * np.max(np.abs(values)):
        raise ValueError(
            f"over Batches a loss must be a mean over independent examples, and this one is {values[0]:.5g} on {count} "
            f"examples where the mean over their halves is {mean:.5g}. Divide a sum by the number of examples; give "
            f"one batch to a loss that couples examples (batch norm in training mode, a contrastive loss); where "
            f"examples have weights, size= must be the sum of the weights. Batches(..., check=False) takes the mean "
            f"over batches as it is"
        )


@partial(jax.jit, static_argnums=0)
def _value(loss, params, batch):
    with jax.default_matmul_precision("float32"):
        return loss(params, batch)


def _examples(loss, params, batch):
    """How many examples to try: eight, or as many as there are."""
    if isinstance(loss, Objective):
        return min(8, len(jax.eval_shape(loss.predict, params, batch)))
    return min(8, leading_axis(batch))


def _rows(batch, start, stop):
    """Examples of a batch: of arrays with its most common leading axis."""
    lengths = [np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    count = max(set(lengths), key=lengths.count)
    return jax.tree.map(lambda x: x[start:stop] if np.shape(x)[:1] == (count,) else x, batch)


def _is_key(x):
    raw = np.shape(x) in ((2,), (4,)) and jnp.result_type(x) == jnp.uint32
    return raw or jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def check_batches(loss: Any, params: PyTree, batches: Batches) -> None:
    """Looks for what is wrong in batches beyond the first, after a result that is not finite."""
    for batch in batches:
        _check_values(loss, params, batch)


def _check_values(loss, params, batch):
    """What an objective's halves say of a batch: shapes, and labels where their values are known."""
    if isinstance(loss, Objective):
        with hints(params, batch):
            # Under jit the trace is kept for the next time.
            outputs = jax.eval_shape(jax.jit(loss.predict), params, batch)
        if not (hasattr(outputs, "shape") and outputs.ndim and jnp.issubdtype(outputs.dtype, jnp.floating)):
            raise TypeError(f"predict must return one floating-point array of shape (..., C), got {outputs}")
        if isinstance(loss.criterion, CrossEntropy):
            _check_logits(loss, params, batch)
        if hasattr(loss.criterion, "check"):
            loss.criterion.check(outputs, batch)


def _check_logits(loss, params, batch):
    if ends_in_softmax(loss.predict, params, batch):
        raise ValueError(
            "predict ends in a softmax, and cross_entropy takes logits, of which it takes the softmax itself; return "
            "what goes into the softmax, or jnp.log of the probabilities. If the loss is meant to take two, give it a "
            "function as criterion: lambda outputs, batch: cross_entropy(outputs, batch)"
        )


@dataclasses.dataclass(frozen=True)
class _First:
    """A function without its aux; equal for equal functions, so that it compiles once."""

    function: Callable

    def __call__(self, *args):
        result = self.function(*args)
        if not isinstance(result, tuple):
            raise TypeError(f"has_aux=True takes a function that returns (value, aux), got {type(result).__name__}")
        return result[0]


def _describe(thing):
    return f"{type(thing).__name__} {getattr(thing, '__name__', thing)!r}"


def _differentiable(params):
    check_parameters(params)
    # Half precision has too few digits for second derivatives.
    params = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), params)
    finite = _finite(jax.tree.leaves(params))
    if not any(isinstance(ok, jax.core.Tracer) for ok in finite):
        paths = jax.tree_util.tree_leaves_with_path(params)
        if bad := [jax.tree_util.keystr(path) for (path, _), ok in zip(paths, finite, strict=True) if not ok]:
            raise ValueError(f"the parameters are not finite at {bad}; curvature there means nothing")
    return params


def to_host(x: Any) -> np.ndarray:
    """An array in numpy, whole, also where other processes hold parts of it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


@jax.jit
def _finite(leaves):
    return [jnp.isfinite(x).all() for x in leaves]
