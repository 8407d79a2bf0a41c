"""ResNet18 (He et al. 2016) for images of 32x32 pixels: 11,173,962 parameters on three channels and ten classes."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from experiments.models import ops


class Block(nn.Module):
    """A basic block: two 3x3 convolutions with batch norm, and a shortcut around both.

    Attributes:
      features: channels of the outputs.
      stride: of the first convolution.
      skip: whether there is a shortcut; it is projected by a 1x1 convolution with batch norm where shapes differ.
      convolution: what computes the convolutions.
    """

    features: int
    stride: int
    skip: bool
    convolution: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / stride, W / stride, features)."""
        conv, norm = ops.conv(self.convolution), ops.batch_norm(train)
        y = nn.relu(norm(name="bn1")(conv(self.features, strides=self.stride, name="conv1")(x)))
        y = norm(name="bn2")(conv(self.features, name="conv2")(y))
        if self.skip and x.shape != y.shape:
            x = conv(self.features, kernel_size=(1, 1), strides=self.stride, padding=0, name="shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(y + x if self.skip else y)


class ResNet18(nn.Module):
    """ResNet18 with a 3x3 stem of stride 1, four stages of two basic blocks, mean pooling and a dense layer.

    Layers conv1, bn1, block1/conv1, block1/bn1, block1/conv2, ..., block3/shortcut_conv, ..., block8/bn2, fc.

    Attributes:
      num_classes: number of outputs.
      skip: whether the blocks have shortcuts.
      width: factor on the numbers of channels, 64 to 512.
      convolution: what computes the convolutions, with the signature of ``lax.conv_general_dilated``.
    """

    num_classes: int
    skip: bool = True
    width: float = 1.0
    convolution: Callable = ops.convolution

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, C) of 28x28 or 32x32 pixels."""
        channels = [ops.scaled(features, self.width) for features in (64, 64, 128, 128, 256, 256, 512, 512)]
        x = ops.conv(self.convolution)(channels[0], name="conv1")(ops.pad_to_32(images))
        x = nn.relu(ops.batch_norm(train)(name="bn1")(x))
        for i, features in enumerate(channels, start=1):
            stride = 2 if i in (3, 5, 7) else 1
            x = Block(features, stride, self.skip, self.convolution, name=f"block{i}")(x, train)
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))
