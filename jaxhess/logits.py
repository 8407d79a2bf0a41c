"""Logits over many classes, as the product that they are: made in blocks of rows, never as a whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
_BLOCK = 2**22  # numbers in a block of logits: 16 MiB in float32


@partial(jax.tree_util.register_dataclass, data_fields=["features", "kernel", "bias"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Logits:
    """The logits features @ kernel + bias, which are never held as a whole.

    ``predict`` of an `Objective` may return them in place of an array. `CrossEntropy` then takes them in blocks of
    rows, so that a loss, its gradient and products with its curvature take the memory of a block, and not that of
    rows x C numbers. Probabilities are computed again in each pass, which takes about one more product with the kernel.

    A gradient of a gradient needs a JAX later than 0.7. The products of jaxhess go forward over reverse and need 0.6.

    Traces and spectra come from products. What needs the rows of G, such as exact traces of G, its Gram matrix or the
    structure of its classes, raises an error.

    Args:
      features: (..., F), what the last layer gets.
      kernel: (F, C); of a tied embedding its transpose.
      bias: (C,), or None.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> def predict(params, batch):
      ...     return jh.Logits(jnp.tanh(batch["x"] @ params["fc"]), params["head"])
      >>> objective = jh.Objective(predict, jh.cross_entropy)
      >>> params = {"fc": jnp.eye(2), "head": jnp.zeros((2, 4))}
      >>> round(float(objective(params, {"x": jnp.ones((3, 2)), "label": jnp.array([0, 3, 1])})), 4)
      1.3863

    Reference: Wijmans et al. 2025, Cut your losses in large-vocabulary language models (a loss in blocks).
    """

    features: jax.Array
    kernel: jax.Array
    bias: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits, (..., C)."""
        return (*self.features.shape[:-1], self.kernel.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes of the logits."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of logits."""
        rows, classes = self.features.size // max(1, self.features.shape[-1]), self.kernel.shape[-1]
        return rows * classes

    @property
    def dtype(self) -> Any:
        """That of the logits."""
        return jnp.result_type(*jax.tree.leaves(self))

    def __len__(self) -> int:
        return self.shape[0]

    def check(self) -> None:
        """ValueError for arrays that do not fit each other."""
        features, kernel, bias = self.features.shape, self.kernel.shape, getattr(self.bias, "shape", None)
        fits = len(features) > 0 and len(kernel) == 2 and features[-1] == kernel[0]
        if not fits or bias not in (None, kernel[1:]):
            raise ValueError(
                f"Logits take features (..., F), a kernel (F, C) and a bias (C,) or None, got the shapes {features}, "
                f"{kernel} and {bias}; of a tied embedding (C, F), give the transpose as the kernel"
            )


def formed(features: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The logits of a block of rows, (rows, C)."""
    found = features @ kernel
    return found if bias is None else found + bias[None]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def total(function: Callable, logits: Logits, labels: jax.Array, shares: jax.Array) -> jax.Array:
    """The sum over blocks of ``function(logits, labels, shares)`` of the block, a scalar.

    Args:
      function: zero for rows with shares of zero, which fill up the last block.
      logits: what is taken in blocks.
      labels: integers, with the leading axes of the logits.
      shares: floats, likewise.

    Returns:
      The sum. Its derivatives hold one block at a time too: the slope is found together with the value, block by block,
      so that nothing of a block is kept for a backward pass.
    """

    def of_block(weights, block):
        features, *rows = block
        return function(formed(features, *weights), *rows), ()

    weights, blocks = (logits.kernel, logits.bias), _blocks(logits, [logits.features, labels, shares])
    return _summed(partial(of_block, weights), blocks)[0]


def _total_jvp(function, primals, tangents):
    logits, _, shares = primals
    found, (of_features, of_shares, of_weights) = _value_and_slope(function, *primals)
    slopes = jax.tree.leaves((of_features, of_weights, of_shares))
    along = jax.tree.leaves((tangents[0], tangents[2]), is_leaf=_is_zero)
    products = [jnp.vdot(a, b).astype(found.dtype) for a, b in zip(slopes, along, strict=True) if not _is_zero(b)]
    return found, sum(products, jnp.zeros_like(found))


total.defjvp(_total_jvp, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value_and_slope(function, logits, labels, shares):
    """The sum, and its slopes in features, shares and (kernel, bias)."""
    of_block = partial(_slope_of_block, function, logits.kernel, logits.bias)
    (value, of_weights), by_row = _summed(of_block, _blocks(logits, [logits.features, labels, shares]))
    return value, (*_joined(by_row, (logits.features, shares)), of_weights)


def _slope_of_block(function, kernel, bias, block):
    features, label, share = block

    def value(features, share, kernel, bias):
        return function(formed(features, kernel, bias), label, share)

    found, (of_features, of_share, *of_weights) = jax.value_and_grad(value, (0, 1, 2, 3))(features, share, kernel, bias)
    return (found, of_weights), (of_features, of_share)


def _value_and_slope_jvp(function, primals, tangents):
    """The derivative is a loop of its own: derived from the other one, it would keep what is in every block."""
    logits, labels, shares = primals
    features, kernel, bias, of_shares = (
        None if x is None else jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x
        for x in (tangents[0].features, tangents[0].kernel, tangents[0].bias, tangents[2])
    )

    @jax.checkpoint
    def of_block(weights, directions, block):
        feature, direction, label, share, of_share = block

        def slope(feature, share, *weights):
            return _slope_of_block(function, *weights, (feature, label, share))

        return jax.jvp(slope, (feature, share, *weights), (direction, of_share, *directions))[1]

    blocks = _blocks(logits, [logits.features, features, labels, shares, of_shares])
    found, by_row = _summed(partial(of_block, (logits.kernel, logits.bias), (kernel, bias)), blocks)
    return _value_and_slope(function, *primals), (found[0], (*_joined(by_row, (logits.features, shares)), found[1]))


_value_and_slope.defjvp(_value_and_slope_jvp, symbolic_zeros=True)


def _is_zero(tangent):
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def pulled_back(function: Callable, logits: Logits, tangent: Logits, labels: jax.Array, shares: jax.Array) -> Logits:
    """J' f(J t) by blocks, where J is the Jacobian of the logits in features, kernel and bias.

    Args:
      function: f(logits, their tangent, labels, shares) of a block, like the logits.
      logits: where J is taken.
      tangent: t.
      labels, shares: as for `total`.
    """

    @jax.checkpoint
    def of_block(weights, directions, block):
        features, direction, *rows = block
        z, dz = jax.jvp(formed, (features, *weights), (direction, *directions))
        _, pull = jax.vjp(formed, features, *weights)
        of_features, *of_weights = pull(function(z, dz, *rows).astype(z.dtype))
        return of_weights, of_features

    weights, directions = (logits.kernel, logits.bias), (tangent.kernel, tangent.bias)
    blocks = _blocks(logits, [logits.features, tangent.features, labels, shares])
    of_weights, of_features = _summed(partial(of_block, weights, directions), blocks)
    return Logits(*_joined([of_features], [logits.features]), *of_weights)


# ---- blocks of rows ----


def _summed(of_block, blocks):
    """The sum over blocks of the first result of ``of_block(block)``, and the second results one after the other."""

    def step(found, block):
        new, by_row = of_block(block)
        return jax.tree.map(jnp.add, found, new), by_row

    like = jax.eval_shape(of_block, [x[0] for x in blocks])[0]
    return jax.lax.scan(step, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), blocks)


def _joined(blocks, likes):
    """Arrays (blocks, rows in a block, rest) as arrays like others, without what fills up the last block."""

    def join(x, like):
        rest = x.shape[2:]
        return x.reshape(-1, *rest)[: like.size // max(1, math.prod(rest))].reshape(like.shape)

    return [join(x, like) for x, like in zip(blocks, likes, strict=True)]


def _blocks(logits, arrays):
    """Arrays (rows..., rest) as (blocks, rows in a block, rest), filled up with zeros."""
    axes = logits.features.ndim - 1
    rows = logits.size // logits.kernel.shape[-1]
    count = -(-rows // max(1, _BLOCK // logits.kernel.shape[-1]))
    each = -(-rows // max(1, count))

    def cut(x):
        flat = x.reshape(rows, *x.shape[axes:])
        filled = jnp.pad(flat, [(0, count * each - rows)] + [(0, 0)] * (flat.ndim - 1))
        return filled.reshape(count, each, *flat.shape[1:])

    return [cut(x) for x in arrays]
