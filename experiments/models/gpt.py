"""A small GPT: a transformer that reads characters and predicts the next one at each position."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import ops
from experiments.models.attention import Block


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
