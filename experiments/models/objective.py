"""A net as jaxhess takes it: a prediction in evaluation mode, and the cross-entropy of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

import jaxhess as jh

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Predict:
    """``predict(params, batch)`` of a net in evaluation mode; equal for equal nets, so that ``jit`` compiles once."""

    model: nn.Module

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Logits (N, C), of text (N, T, C), of ``batch["image"]``, with ``batch["batch_stats"]`` if there are any."""
        variables = {"params": params, "batch_stats": batch.get("batch_stats", {})}
        return self.model.apply(variables, batch["image"], train=False)


def objective(model: nn.Module) -> jh.Objective:
    """The cross-entropy of a net in evaluation mode, as jaxhess takes it.

    Args:
      model: a net of `experiments.models`.

    Returns:
      An `jaxhess.Objective` of batches {"image": (N, H, W, C), "label": int (N,)}, and "batch_stats" for nets with
      batch norm.
    """
    return jh.Objective(Predict(model), jh.cross_entropy)
