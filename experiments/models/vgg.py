"""VGG (Simonyan and Zisserman 2015) for images of 32x32 pixels, with and without batch norm."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from experiments.models import ops

STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}  # convolutions before each pooling
CLASSIFIERS = {"plain": (), "released": (4096, 4096)}  # hidden widths


class VGG(nn.Module):
    """VGG: 3x3 convolutions of 64 to 512 channels with ReLU, five 2x2 max poolings, a classifier.

    Layers conv1, conv2, ..., each followed by bn1, bn2, ... if there is batch norm, and fc; of the released
    classifier fc1, fc1_bn, fc2, fc2_bn, fc3.

    Attributes:
      num_classes: number of outputs, C.
      depth: 11, 13 or 16; it counts the original's three dense layers.
      batch_norm: whether the convolutions are followed by batch norm.
      width: factor on the numbers of channels.
      classifier: "plain", one dense layer 512-C; or "released", 512-4096-4096-C with batch norm whether or not the
        convolutions have it.
      convolution: what computes the convolutions, with the signature of ``lax.conv_general_dilated``.
    """

    num_classes: int
    depth: int = 11
    batch_norm: bool = False
    width: float = 1.0
    classifier: str = "plain"
    convolution: Callable = ops.convolution

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, C) of 28x28 or 32x32 pixels."""
        if self.depth not in STAGES:
            raise ValueError(f"unknown depth {self.depth!r}; choose from {sorted(STAGES)}")
        if self.classifier not in CLASSIFIERS:
            raise ValueError(f"unknown classifier {self.classifier!r}; choose from {sorted(CLASSIFIERS)}")
        conv, norm = ops.conv(self.convolution, use_bias=True), ops.batch_norm(train)
        x = ops.pad_to_32(images)
        lengths = STAGES[self.depth]
        for i, features in enumerate(np.repeat((64, 128, 256, 512, 512), lengths), start=1):
            x = conv(ops.scaled(features, self.width), name=f"conv{i}")(x)
            if self.batch_norm:
                x = norm(name=f"bn{i}")(x)
            x = nn.relu(x)
            if i in np.cumsum(lengths):
                x = ops.max_pool(x)
        x = x.reshape(len(x), -1)
        hidden = CLASSIFIERS[self.classifier]
        for i, features in enumerate(hidden, start=1):
            x = nn.Dense(ops.scaled(features, self.width), name=f"fc{i}")(x)
            x = nn.relu(norm(name=f"fc{i}_bn")(x))
        return nn.Dense(self.num_classes, name=f"fc{len(hidden) + 1}" if hidden else "fc")(x)
