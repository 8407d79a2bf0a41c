"""Largest eigenvalue of every layer's Hessian over training, of ResNet18 on CIFAR-10 (Figure 13 of the paper).

    python -m experiments.run fig13 width=0.25 examples=10000

`fig6` with the paper's net and data. The whole net takes hours without a GPU.
"""

from __future__ import annotations

import dataclasses

from experiments import data, models
from experiments.studies import fig6


@dataclasses.dataclass(frozen=True)
class Config(fig6.Config):
    """What to train and what to measure."""

    model: tuple[models.Name, ...] = ("resnet18",)
    dataset: data.Names = ("cifar10",)


run = fig6.run
draw = fig6.draw
