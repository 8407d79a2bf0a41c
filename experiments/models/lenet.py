"""LeNet: two convolutions and three dense layers, 61,706 parameters on one channel and ten classes."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import ops


class LeNet(nn.Module):
    """LeNet 6-16-120-84-C with ReLU and 2x2 max pooling; layers conv1, conv2, fc1, fc2, fc3.

    Attributes:
      num_classes: number of outputs, C.
      convolution: what computes the convolutions, with the signature of ``lax.conv_general_dilated``.
    """

    num_classes: int
    convolution: Callable = ops.row_convolution

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, C) of 28x28 or 32x32 pixels."""
        if images.ndim != 4 or images.shape[1:3] not in ((28, 28), (32, 32)):
            raise ValueError(f"LeNet takes images (N, 28, 28, C) or (N, 32, 32, C), got {images.shape}")
        margin = (32 - images.shape[1]) // 2
        # The border is continued: a zero would be a frame of mean brightness around normalised images.
        x = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")
        for i, features in enumerate((6, 16), start=1):
            conv = nn.Conv(features, (5, 5), padding="VALID", conv_general_dilated=self.convolution, name=f"conv{i}")
            x = nn.relu(ops.max_pool(conv(x)))  # ReLU and maximum commute; behind it are a quarter of the values
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(120, name="fc1")(x))
        x = nn.relu(nn.Dense(84, name="fc2")(x))
        return nn.Dense(self.num_classes, name="fc3")(x)
