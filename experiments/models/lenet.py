"""LeNet: two convolutions and three dense layers, 61,706 parameters on one channel and ten classes."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

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
        x = ops.pad_to_32(images)
        for i, features in enumerate((6, 16), start=1):
            conv = nn.Conv(features, (5, 5), padding="VALID", conv_general_dilated=self.convolution, name=f"conv{i}")
            x = nn.relu(ops.max_pool(conv(x)))  # ReLU and maximum commute; behind it are a quarter of the values
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(120, name="fc1")(x))
        x = nn.relu(nn.Dense(84, name="fc2")(x))
        return nn.Dense(self.num_classes, name="fc3")(x)
