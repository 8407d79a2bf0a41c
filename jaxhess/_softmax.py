"""The softmax loss of a row and its derivatives in the logits, with all their digits however small the loss.

A row with logits z, targets t >= 0 of sum T, and p = softmax(z) has the loss

    l = sum_j t_j (log sum exp z - z_j) + c (log sum exp z)^2,

its slope p T - t + 2 c lse p, and the Hessian S = a (diag p - p p') + 2 c p p' with a = T + 2 c lse. Written like this,
a net that is sure of its answers loses every digit: at the largest logit m, p_m - t_m and 1 - p_m are differences of
numbers that are equal but for rounding. Here both come from the other classes, which sum to them: the rows of
diag p - p p' and the entries of p T - t sum to zero.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def losses(z_loss: float, z: jax.Array, t: jax.Array) -> jax.Array:
    """The losses (...,) of logits z and targets t, both (..., C); ``z_loss`` is c."""
    top, rest = _top(z)
    # log sum exp z - z_m, with m the largest: every term below is positive.
    excess = jnp.log1p(jnp.sum(jnp.where(top, 0, jnp.exp(rest)), -1))
    found = excess * t.sum(-1) - jnp.sum(_product(t, rest), -1)
    return found + z_loss * jax.nn.logsumexp(z, axis=-1) ** 2 if z_loss else found


def _losses_jvp(z_loss, primals, tangents):
    (z, t), (dz, dt) = primals, tangents
    found = losses(z_loss, z, t)
    change = jnp.zeros_like(found)
    if not _is_zero(dz):
        change += jnp.sum(slopes(z_loss, z, t) * dz, -1)
    if not _is_zero(dt):
        change -= jnp.sum(jax.nn.log_softmax(z) * dt, -1)
    return found, change


losses.defjvp(_losses_jvp, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def slopes(z_loss: float, z: jax.Array, t: jax.Array) -> jax.Array:
    """The derivatives of `losses` in the logits, (..., C)."""
    top, _ = _top(z)
    p = jax.nn.softmax(z)
    others = jnp.where(top, 0, p * t.sum(-1, keepdims=True) - t)
    found = jnp.where(top, -others.sum(-1, keepdims=True), others)
    return found + 2 * z_loss * jax.nn.logsumexp(z, axis=-1, keepdims=True) * p if z_loss else found


def _slopes_jvp(z_loss, primals, tangents):
    (z, t), (dz, dt) = primals, tangents
    found = slopes(z_loss, z, t)
    change = jnp.zeros_like(found)
    if not _is_zero(dz):
        change += hessian_product(z_loss, z, t, dz)
    if not _is_zero(dt):
        change += jax.nn.softmax(z) * dt.sum(-1, keepdims=True) - dt
    return found, change


slopes.defjvp(_slopes_jvp, symbolic_zeros=True)


def hessian_product(z_loss: float, z: jax.Array, t: jax.Array, v: jax.Array) -> jax.Array:
    """S v in every row; all arrays are (..., C)."""
    p = jax.nn.softmax(z)
    # diag p - p p' is blind to shifts of v: one that is zero where p is largest loses no digits as p saturates.
    shifted = v - jnp.take_along_axis(v, jnp.argmax(z, -1, keepdims=True), -1)
    product = _steepness(z_loss, z, t) * p * (shifted - (p * shifted).sum(-1, keepdims=True))
    return product + 2 * z_loss * p * (p * v).sum(-1, keepdims=True) if z_loss else product


def factor_product(z_loss: float, z: jax.Array, t: jax.Array, e: jax.Array) -> jax.Array:
    """B e in every row, with B = sqrt(a) (diag sqrt(p) - p sqrt(p)') + sqrt(2 c) p sqrt(p)', so that B B' = S."""
    top, _ = _top(z)
    # exp(log_softmax / 2), because the derivative of sqrt(softmax) is NaN where a probability underflows.
    root = jnp.exp(jax.nn.log_softmax(z) / 2)
    p, scaled = root**2, root * e
    total = scaled.sum(-1, keepdims=True)
    rest_of_one = jnp.where(top, jnp.where(top, 0, p).sum(-1, keepdims=True), 1 - p)
    rest_of_sum = jnp.where(top, jnp.where(top, 0, scaled).sum(-1, keepdims=True), total - scaled)
    product = jnp.sqrt(_steepness(z_loss, z, t)) * (scaled * rest_of_one - p * rest_of_sum)
    return product + (2 * z_loss) ** 0.5 * p * total if z_loss else product


def _steepness(z_loss, z, t):
    """The factor a of diag p - p p', (..., 1)."""
    total = t.sum(-1, keepdims=True)
    return total + 2 * z_loss * jax.nn.logsumexp(z, axis=-1, keepdims=True) if z_loss else total


def _top(z):
    """Which class is the first with the largest logit, and the logits less that one."""
    at = jnp.argmax(z, -1, keepdims=True)
    return jax.lax.broadcasted_iota(at.dtype, z.shape, z.ndim - 1) == at, z - jnp.take_along_axis(z, at, -1)


def _is_zero(tangent):
    """Whether nothing is differentiated there; 0 * inf would be NaN at a logit that rules its class out."""
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _product(t, rest):
    """t * rest, and 0 where t is 0: a class that a logit of -inf rules out is not a target."""
    return jnp.where(t == 0, 0, t * jnp.where(t == 0, 0, rest))
