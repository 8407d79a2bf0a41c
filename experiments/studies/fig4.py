"""Largest eigenvalue and trace of the Hessian over training (Figure 4 of the paper).

    python -m experiments.run fig4 model=resnet18,densenet dataset=cifar10

The paper finds that both fall; printed beside is how far the trace goes with the generalisation gap.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments import figures, plot, report, statistics, store
from experiments.figures import OverTraining as Config

__all__ = ["Config", "draw", "run"]

run = figures.run_over_training


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and says what they show."""
    numbers = store.load_json(out_dir / "numbers.json")
    numbers, title = figures.told_apart(config, numbers)
    print(title)
    panels = {
        r"$\lambda_{\max}$(Hess)": {name: record["lambda_max/total"] for name, record in numbers.items()},
        "Tr(Hess)": {name: record["trace/total"] for name, record in numbers.items()},
        r"$\sum_l$ Tr(Hess$_l$) $\|w_l\|^2$": {name: figures.scale_free(record) for name, record in numbers.items()},
    }
    epochs = {name: record["epochs"] for name, record in numbers.items()}
    plot.save(plot.over_epochs(panels, title, epochs=epochs), out_dir / "figure.png")
    for name, record in numbers.items():
        for metric in ("lambda_max", "trace"):
            print(f"{name}: {metric} {figures.course(record['epochs'], record[f'{metric}/total'])}")
        # Of each net: two metrics from two starts, and the layers from the same.
        for line in falls(record, tests=4 * len(numbers)):
            print(f"{name}: {line}")
        for line in layers_fall(record, tests=2 * len(numbers)):
            print(f"{name}: {line}")
        if "train_loss" in record:  # which results kept before do not name
            print(f"{name}: training loss of the last epoch {np.mean(record['train_loss'], 0)[-1]:.3g}")
        measured = [epoch for epoch in record["epochs"] if epoch > 0]
        traces = np.mean(record["trace/total"], 0)[-len(measured) :]
        gaps = np.mean(record["gap"], 0)[np.array(measured) - 1]
        if len(measured) > 3:  # of three epochs there are two steps, which tell nothing
            print(f"{name}: {report.rank_correlation_of_series(traces, gaps)}")
    traces, gaps = ([np.mean(record[key], 0)[-1] for record in numbers.values()] for key in ("trace/total", "gap"))
    if len(numbers) > 2:
        print(report.rank_correlation(traces, gaps, f"at the end over {len(numbers)} nets"))


def falls(record: Mapping[str, Any], tests: int = 1) -> Iterator[str]:
    """Whether lambda_max and trace fall, in words: from the start, and from the first measurement after it, to the end.

    The start is that of training, at which the running statistics of batch norm are not yet those of the data. So a
    fall from it alone is a fall in part.

    Args:
      record: of one net over its trials.
      tests: how many such falls are looked at, by which each p is multiplied.
    """
    epochs = record["epochs"]
    for metric in ("lambda_max", "trace"):
        values = np.array(record[f"{metric}/total"])
        parts, verdicts = [], []
        for i, epoch in list(enumerate(epochs[:-1]))[:2]:
            effect = report.log_effect(ratios := values[:, -1] / values[:, i])
            verdicts.append(statistics.verdict(effect, tests=tests))
            parts.append(f"that at epoch {epoch} {report.times(ratios)}{report.p_words(effect, tests)}")
        words = f"{metric} at epoch {epochs[-1]}, in times {'; '.join(parts)}; p multiplied by the {tests} tests"
        yield f"{words}; falls: {', '.join(verdicts)}; together: {statistics.together(verdicts)}"


def layers_fall(record: Mapping[str, Any], tests: int = 1) -> Iterator[str]:
    """In how many layers lambda_max falls in every trial, in words, from the same starts as in `falls`.

    That it falls in every layer is as sure as it is in the least sure of them (an intersection-union test), with p
    multiplied by ``tests``.
    """
    epochs = record["epochs"]
    layers = [name for name in record if name.startswith("lambda_max/") and name != "lambda_max/total"]
    for i, epoch in list(enumerate(epochs[:-1]))[:2]:
        ratios = [(values := np.array(record[name]))[:, -1] / values[:, i] for name in layers]
        everywhere = sum(bool(np.all(each < 1)) for each in ratios)
        verdicts = [statistics.verdict(report.log_effect(each), tests=tests) for each in ratios]
        sure = "does not hold" if "does not hold" in verdicts else statistics.agreed(verdicts)
        yield (
            f"lambda_max of a layer falls from epoch {epoch} in every trial in {everywhere} of {len(layers)}; "
            f"surely, p multiplied by {tests}, in {verdicts.count('holds')}; in every layer: {sure}"
        )
