"""Training accuracy and sum of layer traces over training, with and without the penalty (Figure 7 of the paper).

    python -m experiments.run fig7 model=lenet dataset=fashion_mnist trials=3

6 trainings, with ``epochs=15`` about 4 minutes each on one CPU core (measured once); the released settings are 40
epochs. The paper finds a lower trace with the penalty at almost the same training accuracy. Expected with the released
gamma = 1e-5: no difference in either.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import arms, data, plot, report, store, tables
from experiments.plan import Plan

SETTINGS = {"CE": None, "CE + HTR": {}}


@dataclasses.dataclass(frozen=True)
class Config(arms.Config):
    """Which net on which data set, how often, and how the traces of G_l are measured after each epoch."""

    dataset: data.Name = "fashion_mnist"
    trials: int = 3


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of all settings."""
    return tables.plan_sweep(config, SETTINGS, out_dir, data_dir, traces=True)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """Trains (or finds) the nets, measuring after each epoch, and saves the numbers; returns how they were trained."""
    return tables.run_sweep(config, SETTINGS, out_dir, data_dir, traces=True)


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and says what they show."""
    numbers = store.load_json(out_dir / "numbers.json")
    panels = {
        "training accuracy": {name: metrics["train_accuracy"] for name, metrics in numbers.items()},
        r"$\sum_l$ Tr(Hess$_l$)": {name: metrics["trace/total"] for name, metrics in numbers.items()},
    }
    plot.save(plot.over_epochs(panels, tables.title(config)), out_dir / "figure.png")
    last = {name: [values[-1] for values in metrics["trace/total"]] for name, metrics in numbers.items()}
    for name, values in last.items():
        accuracy = report.percent([trial[-1] for trial in numbers[name]["train_accuracy"]])
        print(f"{name}: training accuracy {accuracy} %, sum of traces {report.spread(values, '.4g')}")
    for name, metrics in numbers.items():
        # Older results lack the accuracy of the net after each epoch, and have that of its steps alone.
        evaluated = "evaluated/train_accuracy" in metrics
        accuracies = metrics["evaluated/train_accuracy" if evaluated else "train_accuracy"]
        traces, accuracy, error = (
            np.mean(values, 0) for values in (metrics["trace/total"], accuracies, metrics["test_error"])
        )
        gap = accuracy[-len(error) :] - 1 + error
        words = report.rank_correlation_of_series(traces[-len(error) :], gap)
        print(f"{name}: {words}{'' if evaluated else '; the gap is to the accuracy during the epoch'}")
    print(report.judge(report.Claim("CE + HTR", "CE", "HTR lowers the sum of traces at the end", "trace"), last))
