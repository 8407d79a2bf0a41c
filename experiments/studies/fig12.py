"""Jensen-Shannon divergences between each layer's spectrum and the whole net's (Figure 12 of the paper).

    python -m experiments.run fig12 model=lenet dataset=mnist

`fig3`, which draws them beside the other distances, with the paper's data sets for LeNet; other nets are named as
there.
"""

from __future__ import annotations

import dataclasses

from experiments import data, models
from experiments.studies import fig3


@dataclasses.dataclass(frozen=True)
class Config(fig3.Config):
    """What to train and what to measure."""

    model: tuple[models.Name, ...] = ("lenet",)
    dataset: data.Names = ("mnist", "fashion_mnist")


plan = fig3.plan
run = fig3.run
draw = fig3.draw
