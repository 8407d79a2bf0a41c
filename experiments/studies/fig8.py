"""Ablation of the interval f_r between penalties (Figure 8 of the paper).

    python -m experiments.run fig8 model=lenet dataset=fashion_mnist trials=3

18 trainings. With ``epochs=15 intervals=25,50,100,200`` it took 47 minutes on one CPU core (measured once). The paper
finds that penalties far apart do as well as frequent ones. What counts as no difference is the paper's own effect of
HTR on these data. Expected with the released gamma = 1e-5: no difference between any of them, and none from no penalty.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import arms, data, report, store, tables
from experiments.plan import Plan


@dataclasses.dataclass(frozen=True)
class Config(arms.Config):
    """Which net on which data set, how often, and what is compared.

    Attributes:
      intervals: steps from one penalty to the next (f_r), compared with no penalty; they replace every.
    """

    dataset: data.Name = "fashion_mnist"
    trials: int = 3
    intervals: tuple[int, ...] = (1, 25, 50, 100, 200)


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of all settings."""
    return tables.plan_sweep(config, _settings(config), out_dir, data_dir)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """Trains (or finds) the nets and saves the numbers; returns how they were trained."""
    return tables.run_sweep(config, _settings(config), out_dir, data_dir)


def _settings(config: Config) -> dict[str, Mapping | None]:
    return {"no HTR": None} | {f"f_r = {every}": {"every": every} for every in config.intervals}


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and says what they show."""
    tables.draw_sweep(config, out_dir, "no HTR")
    numbers = store.load_json(out_dir / "numbers.json")
    errors = {name: [values[-1] for values in metrics["test_error"]] for name, metrics in numbers.items()}
    first, *others = (f"f_r = {every}" for every in sorted(config.intervals))
    print(f"against the shortest interval, p multiplied by the {len(others)} tests:")
    for name in others:
        claim = report.Claim(name, first, f"{name} does as well as {first}")
        print(report.judge_no_difference(claim, errors, len(others), arms.margin(config)))
