"""What the Hessian S of a criterion in the outputs is, and a factor B with B B' = S, from products with S alone.

The criterion is one that follows the protocol `jaxhess.Criterion`; it is static under ``jit``.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

import jaxhess._softmax as softmax
from jaxhess._checks import at_least_float32


def _diagonal_factor(criterion, outputs, batch, noise):
    return jnp.sqrt(criterion.hessian_product(outputs, batch, jnp.ones_like(outputs))) * noise


def _softmax_factor(criterion, outputs, batch, noise):
    root = jnp.sqrt(_steepness(criterion, outputs, batch))
    return root * softmax.factor_product(0.0, outputs, _unit_targets(outputs), noise)


def _blocks_factor(criterion, outputs, batch, noise):
    blocks, faults = _output_blocks(criterion, outputs, batch)
    values, vectors = jnp.linalg.eigh(blocks)
    # Rounding in a zero eigenvalue is no reason to refuse: `faults` has judged.
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    return jnp.where(faults[0] | faults[1], jnp.nan, jnp.einsum("...ij,...j->...i", factor, noise))


PRODUCTS = {"diagonal": _diagonal_factor, "softmax": _softmax_factor, "blocks": _blocks_factor}


def _steepness(criterion, outputs, batch):
    """a_i of S_i = a_i (diag p_i - p_i p_i'), (..., 1), read where all p are equal: there S loses no digits."""
    (e,) = _directions(outputs, 1)
    e -= e.mean(-1, keepdims=True)
    tangent = criterion.hessian_product(_zeros(outputs), batch, e)
    return outputs.shape[-1] * (tangent * e).sum(-1, keepdims=True) / jnp.maximum((e * e).sum(-1, keepdims=True), 1e-30)


def _zeros(outputs):
    """Zeros that XLA does not see through: of a large vocabulary it takes minutes to fold what comes of them."""
    return jax.lax.optimization_barrier(jnp.zeros_like(outputs))


def _unit_targets(outputs):
    """Targets of sum one, all that the curvature of `jaxhess._softmax` asks of them."""
    return jnp.full_like(outputs, 1 / outputs.shape[-1])


def _directions(outputs, count):
    """Directions without any pattern, (count, ...); drawn flat, which XLA compiles faster."""
    return jax.random.normal(jax.random.key(0), (count * outputs.size,), outputs.dtype).reshape(count, *outputs.shape)


@partial(jax.jit, static_argnums=0)
def forms(criterion, outputs, batch):
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
        whole, diagonal, part = jax.vmap(partial(criterion.hessian_product, o, batch))(vectors)
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
def blocks_concave(criterion, outputs, batch):
    """Whether some block of S is not positive semi-definite."""
    return _output_blocks(criterion, outputs, batch)[1][1]


def _output_blocks(criterion, outputs, batch):
    """The C x C blocks of S, (..., C, C), and two flags: S has more than these blocks; a block is indefinite."""
    outputs = outputs.astype(at_least_float32(outputs))  # no eigenvalues of half precision

    def blocks_at(outputs):
        columns = jax.vmap(
            lambda column: criterion.hessian_product(outputs, batch, jnp.broadcast_to(column, outputs.shape))
        )(jnp.eye(outputs.shape[-1], dtype=outputs.dtype))
        return jnp.moveaxis(columns, 0, -1)

    blocks, signs = blocks_at(outputs), jnp.sign(_directions(outputs, 1)[0])
    # Blocks read off with one direction in all rows are S only if no row feels another one's direction.
    moved = criterion.hessian_product(outputs, batch, signs)
    # On a net that is trained to the end S vanishes, and the rounding of its derivation does not: that is of the size
    # that S has elsewhere, in the criterion's own units.
    elsewhere = jnp.max(jnp.abs(blocks_at(jnp.zeros_like(outputs))))
    scale = jnp.maximum(jnp.max(jnp.abs(blocks)), jnp.where(jnp.isfinite(elsewhere), 4 * elsewhere, 0))
    tolerance = 100 * jnp.finfo(outputs.dtype).eps * scale
    coupled = jnp.any(jnp.abs(moved - jnp.einsum("...ij,...j->...i", blocks, signs)) > 10 * tolerance)
    concave = jnp.any(jnp.linalg.eigvalsh(blocks) < -tolerance)
    return blocks, (coupled, concave)
