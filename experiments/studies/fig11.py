"""The classes in every layer's Gauss-Newton matrix, of DenseNet on CIFAR-10 (Figure 11 of the paper).

    python -m experiments.run fig11 epochs=1

`fig2` with the paper's net and data. The whole net takes hours without a GPU; ``examples`` makes it less.
"""

from __future__ import annotations

import dataclasses

from experiments import data, models
from experiments.studies import fig2


@dataclasses.dataclass(frozen=True)
class Config(fig2.Config):
    """What to train and what to measure."""

    model: models.Name = "densenet"
    dataset: data.Name = "cifar10"


run = fig2.run
draw = fig2.draw
