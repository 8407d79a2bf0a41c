"""A small GPT: a transformer that reads characters and predicts the next one at each position."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import ops


class Attention(nn.Module):
    """Causal self-attention; layers query, key, value, out.

    Attributes:
      heads: number of heads, which divides the number of features.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, F) -> (N, T, F)."""
        features = x.shape[-1]
        shape = (*x.shape[:-1], self.heads, features // self.heads)
        query, key, value = (nn.Dense(features, name=name)(x).reshape(shape) for name in ("query", "key", "value"))
        scores = jnp.einsum("nthf,nshf->nhts", query, key) / shape[-1] ** 0.5
        earlier = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jnp.where(earlier[None, None], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("nhts,nshf->nthf", nn.softmax(scores), value)
        return nn.Dense(features, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then two dense layers with GELU, each added to its input.

    Layers norm1, attn/query, attn/key, attn/value, attn/out, norm2, fc, proj.

    Attributes:
      heads: number of heads.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, F) -> (N, T, F)."""
        features = x.shape[-1]
        x = x + Attention(self.heads, name="attn")(nn.LayerNorm(epsilon=1e-5, name="norm1")(x))
        y = nn.gelu(nn.Dense(4 * features, name="fc")(nn.LayerNorm(epsilon=1e-5, name="norm2")(x)))
        return x + nn.Dense(features, name="proj")(y)


class GPT(nn.Module):
    """A decoder like nanoGPT's, with learned positions and without dropout; embedding and head are two matrices.

    Layers token, position, block1/norm1, block1/attn/query, ..., norm, head.

    Attributes:
      num_classes: number of different characters.
      layers: number of blocks.
      heads: number of attention heads.
      width: factor on the number of features, 64.
      context: length of the longest sequence.
    """

    num_classes: int
    layers: int = 2
    heads: int = 4
    width: float = 1.0
    context: int = 32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, T, num_classes) of the next characters, of integers (N, T)."""
        del train  # there is neither dropout nor batch norm
        features = ops.scaled(64, self.width)
        self._check(tokens, features)
        embed = partial(nn.Embed, features=features, embedding_init=nn.initializers.normal(0.1))
        x = embed(self.num_classes, name="token")(tokens)
        x = x + embed(self.context, name="position")(jnp.arange(tokens.shape[1]))[None]
        for i in range(1, self.layers + 1):
            x = Block(self.heads, name=f"block{i}")(x)
        return nn.Dense(self.num_classes, name="head")(nn.LayerNorm(epsilon=1e-5, name="norm")(x))

    def _check(self, tokens, features):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"a GPT reads text: integers (N, T), got {tokens.dtype} {tokens.shape}; take dataset=shakespeare"
            )
        if tokens.shape[1] > self.context:
            raise ValueError(
                f"sequences of {tokens.shape[1]} characters are longer than context={self.context}; take shorter ones, "
                f"as in dataset=shakespeare/{self.context}"
            )
        if features % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the {features} features; take a divisor")
