"""A small vision transformer: patches of an image as a sequence."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import ops
from experiments.models.attention import Block


class ViT(nn.Module):
    """A vision transformer with learned positions and the mean over patches in front of the head, without dropout.

    Layers patches, position, block1/norm1, block1/attn/query, ..., norm, head.

    Attributes:
      num_classes: number of outputs.
      layers: number of blocks.
      heads: number of attention heads.
      width: factor on the number of features, 64.
      patch: pixels on a side of a patch, which divides the sides of the image.

    Reference: Dosovitskiy et al. 2021, An image is worth 16x16 words; Beyer, Zhai and Kolesnikov 2022, Better plain ViT
    baselines for ImageNet-1k (the mean over patches).
    """

    num_classes: int
    layers: int = 2
    heads: int = 4
    width: float = 1.0
    patch: int = 4

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, C)."""
        del train  # there is neither dropout nor batch norm
        features, count = ops.scaled(64, self.width), len(images)
        if features % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the {features} features; take a divisor")
        if images.ndim != 4 or images.shape[1] % self.patch or images.shape[2] % self.patch:
            raise ValueError(f"patch={self.patch} does not divide the sides of images of shape {images.shape}")
        rows, columns = (side // self.patch for side in images.shape[1:3])
        x = images.reshape(count, rows, self.patch, columns, self.patch, -1)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * columns, -1)
        position = nn.Embed(x.shape[1], features, embedding_init=nn.initializers.normal(0.1), name="position")
        x = nn.Dense(features, name="patches")(x) + position(jnp.arange(x.shape[1]))[None]
        for i in range(1, self.layers + 1):
            x = Block(self.heads, causal=False, name=f"block{i}")(x)
        return nn.Dense(self.num_classes, name="head")(nn.LayerNorm(epsilon=1e-5, name="norm")(x).mean(1))
