"""Eigenspectra of Hess_l and G_l of DenseNet on CIFAR-10 (Figure 10 of the paper).

    python -m experiments.run fig10 epochs=1 num_probes=8

`fig1` with the paper's net and data. The whole net takes hours without a GPU; ``examples`` makes it less.
"""

from __future__ import annotations

import dataclasses

from experiments import data, models
from experiments.studies import fig1


@dataclasses.dataclass(frozen=True)
class Config(fig1.Config):
    """What to train and what to measure."""

    model: models.Name = "densenet"
    dataset: data.Name = "cifar10"


run = fig1.run
draw = fig1.draw
