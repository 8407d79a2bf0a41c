"""Eigenspectra of Hess_l and G_l of ResNet18 on CIFAR-10 (Figure 9 of the paper).

    python -m experiments.run fig9 epochs=1 num_probes=8

`fig1` with the paper's net and data. The whole net takes hours without a GPU; ``width`` and ``examples`` make it less.
"""

from __future__ import annotations

import dataclasses

from experiments import data, models
from experiments.studies import fig1


@dataclasses.dataclass(frozen=True)
class Config(fig1.Config):
    """What to train and what to measure."""

    model: models.Name = "resnet18"
    dataset: data.Name = "cifar10"


run = fig1.run
draw = fig1.draw
