"""The nets of the experiments, in Flax Linen, by name, and each as an objective.

Every net is called as ``model.apply(variables, images, train=False)`` and gives logits; in training mode those with
batch norm update the collection "batch_stats". A GPT takes characters, as integers (N, T), in place of images.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import flax.linen as nn

from experiments import names
from experiments.models.densenet import DenseNet
from experiments.models.gpt import GPT
from experiments.models.lenet import LeNet
from experiments.models.mlp import MLP
from experiments.models.objective import Predict, objective
from experiments.models.resnet import ResNet18
from experiments.models.vgg import VGG
from experiments.models.vit import ViT

__all__ = ["MODELS", "Name", "Predict", "build", "objective"]

MODELS = {
    "lenet": LeNet,
    "mlp": MLP,
    "vgg11": partial(VGG, depth=11),
    "vgg13": partial(VGG, depth=13),
    "vgg16": partial(VGG, depth=16),
    "vgg11_bn": partial(VGG, depth=11, batch_norm=True),
    "vgg13_bn": partial(VGG, depth=13, batch_norm=True),
    "vgg16_bn": partial(VGG, depth=16, batch_norm=True),
    "resnet18": ResNet18,
    "resnet18_noskip": partial(ResNet18, skip=False),
    "densenet": DenseNet,
    "gpt": GPT,
    "vit": ViT,
    "gpt_10m": partial(GPT, layers=6, heads=6, width=6.0, context=256),  # as nanoGPT's for characters
}
Name = Literal[*MODELS]


def build(name: str, num_classes: int, **options) -> nn.Module:
    """The net of a name.

    Args:
      name: a key of `MODELS`.
      num_classes: number of outputs.
      **options: fields of the net that its name leaves open, such as ``hidden=(64, 32)`` of the MLP.

    Returns:
      A Flax module, hashable by its fields.

    Raises:
      ValueError: for an unknown name or option.
    """
    names.check("model", name, MODELS)
    model = partial(MODELS[name])  # of a class or of a partial, with its keywords
    fields = set(model.func.__dataclass_fields__) - {"parent", "name", "num_classes", *model.keywords}
    unknown = set(options) - fields
    if unknown:
        raise ValueError(f"model {name!r} has no option {sorted(unknown)}; it has {sorted(fields)}")
    return model(num_classes=num_classes, **options)
