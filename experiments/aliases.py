"""Figures of the paper that are another figure with other nets or data: names of experiments with other defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """Another name of an experiment.

    Attributes:
      experiment: the experiment.
      defaults: its settings that have other defaults.
      line: what it shows, in one line.
    """

    experiment: str
    defaults: Mapping[str, Any]
    line: str


_RESNET18 = {"model": "resnet18", "dataset": "cifar10"}
_DENSENET = {"model": "densenet", "dataset": "cifar10"}

ALIASES = {
    "fig9": Alias("fig1", _RESNET18, "Eigenspectra of Hess_l and G_l of ResNet18 on CIFAR-10 (Figure 9 of the paper)."),
    "fig10": Alias(
        "fig1", _DENSENET, "Eigenspectra of Hess_l and G_l of DenseNet on CIFAR-10 (Figure 10 of the paper)."
    ),
    "fig11": Alias(
        "fig2",
        _DENSENET,
        "The classes in every layer's Gauss-Newton matrix, of DenseNet on CIFAR-10 (Figure 11 of the paper).",
    ),
    "fig12": Alias(
        "fig3",
        {"model": ("lenet",), "dataset": ("mnist", "fashion_mnist")},
        "Jensen-Shannon divergences between each layer's spectrum and the whole net's (Figure 12 of the paper).",
    ),
    "fig13": Alias(
        "fig6",
        {"model": ("resnet18",), "dataset": ("cifar10",)},
        "Largest eigenvalue of every layer's Hessian over training, of ResNet18 on CIFAR-10 (Figure 13 of the paper).",
    ),
}


def module(name: str, experiment: ModuleType) -> ModuleType:
    """What an alias runs: the module of its experiment, with the other defaults and words of its own.

    Args:
      name: a key of `ALIASES`.
      experiment: the module of the experiment that it stands for.

    Returns:
      A module with ``Config``, ``run``, ``draw``, and ``plan`` where the experiment has one.
    """
    alias, found = ALIASES[name], ModuleType(name)
    kinds = typing.get_type_hints(experiment.Config, include_extras=True)
    fields = [(key, kinds[key], dataclasses.field(default=value)) for key, value in alias.defaults.items()]
    changed = dataclasses.make_dataclass("Config", fields, bases=(experiment.Config,), frozen=True)
    changed.__doc__ = experiment.Config.__doc__
    words = " ".join(f"{key}={_typed(value)}" for key, value in alias.defaults.items())
    found.__doc__ = f"""{alias.line}

    python -m experiments.run {name}

Another name of ``{alias.experiment} {words}``. A large net takes hours without a GPU; ``width``, for nets that have it,
and ``examples`` make it less.
"""
    for part in ("run", "draw", "plan"):
        if hasattr(experiment, part):
            setattr(found, part, getattr(experiment, part))
    found.Config = changed
    return found


def _typed(value):
    return ",".join(value) if isinstance(value, tuple) else value
