"""The block of a transformer, as GPT and the vision transformer have it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Self-attention; layers query, key, value, out.

    Attributes:
      heads: number of heads, which divides the number of features.
      causal: whether a position sees those before it only.
    """

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, F) -> (N, T, F)."""
        features = x.shape[-1]
        shape = (*x.shape[:-1], self.heads, features // self.heads)
        query, key, value = (nn.Dense(features, name=name)(x).reshape(shape) for name in ("query", "key", "value"))
        scores = jnp.einsum("nthf,nshf->nhts", query, key) / shape[-1] ** 0.5
        if self.causal:
            earlier = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
            scores = jnp.where(earlier[None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("nhts,nshf->nthf", nn.softmax(scores), value)
        return nn.Dense(features, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then two dense layers with GELU, each added to its input.

    Layers norm1, attn/query, attn/key, attn/value, attn/out, norm2, fc, proj.

    Attributes:
      heads: number of heads.
      causal: whether a position sees those before it only.
    """

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, F) -> (N, T, F)."""
        features = x.shape[-1]
        x = x + Attention(self.heads, self.causal, name="attn")(nn.LayerNorm(epsilon=1e-5, name="norm1")(x))
        y = nn.gelu(nn.Dense(4 * features, name="fc")(nn.LayerNorm(epsilon=1e-5, name="norm2")(x)))
        return x + nn.Dense(features, name="proj")(y)
