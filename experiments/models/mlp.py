"""A small multilayer perceptron."""

from __future__ import annotations

import flax.linen as nn
import jax

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}


class MLP(nn.Module):
    """Dense layers fc1, fc2, ... on the flattened images.

    Attributes:
      num_classes: number of outputs.
      hidden: widths of the hidden layers.
      activation: "relu" or "tanh".
    """

    num_classes: int
    hidden: tuple[int, ...] = (64, 32)
    activation: str = "relu"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, ...)."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; choose from {sorted(ACTIVATIONS)}")
        x = images.reshape(len(images), -1)
        for i, width in enumerate(self.hidden, start=1):
            x = ACTIVATIONS[self.activation](nn.Dense(width, name=f"fc{i}")(x))
        return nn.Dense(self.num_classes, name=f"fc{len(self.hidden) + 1}")(x)
