"""A first look in a minute: LeNet on scikit-learn's digits, the table of its curvature, and its spectra.

    python -m experiments.run demo

Needs no download. About a minute on two CPU cores. Expected: a test accuracy of at least 96%, and a figure as fig1's.
"""

from __future__ import annotations

import dataclasses

from experiments import data
from experiments.studies import fig1


@dataclasses.dataclass(frozen=True)
class Config(fig1.Config):
    """What to train and what to measure."""

    dataset: data.Name = "digits"
    epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 2e-2
    milestones: tuple[float, ...] = (0.7,)


run = fig1.run
draw = fig1.draw
