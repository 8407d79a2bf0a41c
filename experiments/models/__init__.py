"""The nets of the experiments, in Flax Linen, by name.

Every net is called as ``model.apply(variables, images, train=False)`` and gives logits; in training mode those with
batch norm update the collection "batch_stats".
"""

from __future__ import annotations

import flax.linen as nn

from experiments.models.lenet import LeNet
from experiments.models.mlp import MLP

MODELS = {"lenet": LeNet, "mlp": MLP}


def build(name: str, num_classes: int, **options) -> nn.Module:
    """The net of a name.

    Args:
      name: a key of `MODELS`.
      num_classes: number of outputs.
      **options: fields of the net, such as ``hidden=(64, 32)`` of the MLP.

    Returns:
      A Flax module, hashable by its fields.

    Raises:
      ValueError: for an unknown name or option.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {sorted(MODELS)}")
    fields = {field for field in MODELS[name].__dataclass_fields__ if field not in ("parent", "name", "num_classes")}
    unknown = set(options) - fields
    if unknown:
        raise ValueError(f"model {name!r} has no option {sorted(unknown)}; it has {sorted(fields)}")
    return MODELS[name](num_classes=num_classes, **options)
