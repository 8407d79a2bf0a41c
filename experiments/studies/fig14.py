"""Ablation of the coefficient gamma, 1e-8 to 1e-1 (Figure 14 of the paper).

    python -m experiments.run fig14 model=lenet dataset=fashion_mnist trials=3

27 trainings, with ``epochs=15`` about 4 minutes each on one CPU core (measured once); the released settings are 40
epochs. The paper finds about 1e-2 the best and smaller ones worse. Expected: no difference up to 1e-4, and from 1e-2 on
more errors.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import arms, data, report, store, tables
from experiments.plan import Plan

BEST = 1e-2  # in the paper


@dataclasses.dataclass(frozen=True)
class Config(arms.Config):
    """Which net on which data set, how often, and what is compared.

    Attributes:
      gammas: coefficients of the penalty that are compared with no penalty.
    """

    dataset: data.Name = "fashion_mnist"
    trials: int = 3
    gammas: tuple[float, ...] = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of all settings."""
    return tables.plan_sweep(config, _settings(config), out_dir, data_dir)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """Trains (or finds) the nets and saves the numbers; returns how they were trained."""
    return tables.run_sweep(config, _settings(config), out_dir, data_dir)


def _settings(config: Config) -> dict[str, Mapping | None]:
    return {"no HTR": None} | {f"gamma = {gamma:g}": {"gamma": gamma} for gamma in config.gammas}


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and says what they show."""
    tables.draw_sweep(config, out_dir, "no HTR")
    numbers = store.load_json(out_dir / "numbers.json")
    errors = {name: [values[-1] for values in metrics["test_error"]] for name, metrics in numbers.items()}
    if (best := f"gamma = {BEST:g}") in errors:
        print(report.judge_best(best, errors, arms.margin(config)))
