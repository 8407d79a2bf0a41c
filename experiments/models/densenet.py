"""DenseNet (Huang et al. 2017) without bottlenecks and compression, for images of 32x32 pixels."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models import ops


class Block(nn.Module):
    """Layers of batch norm, ReLU and 3x3 convolution, whose outputs are appended to their inputs.

    Attributes:
      layers: how many.
      growth: channels that each appends.
      convolution: what computes the convolutions.
    """

    layers: int
    growth: int
    convolution: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H, W, C + layers * growth)."""
        conv, norm = ops.conv(self.convolution), ops.batch_norm(train)
        for i in range(1, self.layers + 1):
            y = conv(self.growth, name=f"conv{i}")(nn.relu(norm(name=f"bn{i}")(x)))
            x = jnp.concatenate([x, y], axis=-1)
        return x


class Transition(nn.Module):
    """Batch norm, ReLU, a 1x1 convolution and 2x2 mean pooling.

    Attributes:
      convolution: what computes the convolution.
    """

    convolution: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / 2, W / 2, C)."""
        x = nn.relu(ops.batch_norm(train)(name="bn")(x))
        x = ops.conv(self.convolution)(x.shape[-1], kernel_size=(1, 1), padding=0, name="conv")(x)
        return ops.mean_pool(x)


class DenseNet(nn.Module):
    """DenseNet: a 3x3 convolution to 16 channels, three dense blocks with transitions between, a dense layer.

    Layers conv1, block1/bn1, block1/conv1, ..., transition1/bn, transition1/conv, block2/bn1, ..., bn, fc.

    Attributes:
      num_classes: number of outputs.
      depth: layers with weights, 3 n + 4 for n in each block: the first convolution, the transitions and the dense
        layer count.
      growth: channels that each layer appends.
      width: factor on the growth and on the channels of the first convolution.
      convolution: what computes the convolutions, with the signature of ``lax.conv_general_dilated``.
    """

    num_classes: int
    depth: int = 40
    growth: int = 12
    width: float = 1.0
    convolution: Callable = ops.convolution

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, C) of 28x28 or 32x32 pixels."""
        layers, rest = divmod(self.depth - 4, 3)
        if layers < 1 or rest:
            raise ValueError(f"depth must be 3 n + 4 for an n of at least 1, got {self.depth}")
        growth = ops.scaled(self.growth, self.width)
        x = ops.conv(self.convolution)(ops.scaled(16, self.width), name="conv1")(ops.pad_to_32(images))
        for i in (1, 2, 3):
            x = Block(layers, growth, self.convolution, name=f"block{i}")(x, train)
            if i < 3:
                x = Transition(self.convolution, name=f"transition{i}")(x, train)
        x = nn.relu(ops.batch_norm(train)(name="bn")(x))
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))
