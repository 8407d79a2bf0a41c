"""Trace of the Hessian over training, with and without batch norm and skip connections (Figure 5 of the paper).

    python -m experiments.run fig5 model=vgg11,vgg11_bn,resnet18,resnet18_noskip dataset=cifar10

The paper finds less curvature with batch norm and with skip connections. Batch norm makes weights scale-free: they can
grow and the trace fall without anything changing, so that Tr(Hess) ||w||^2 stands beside it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments import figures, plot, store
from experiments.figures import OverTraining as Config

__all__ = ["Config", "draw", "run"]

run = figures.run_over_training


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and prints them at the end of training."""
    numbers = store.load_json(out_dir / "numbers.json")
    numbers, title = figures.told_apart(config, numbers)
    print(title)
    panels = {
        "Tr(Hess)": {name: record["trace/total"] for name, record in numbers.items()},
        r"$\sum_l$ Tr(Hess$_l$) $\|w_l\|^2$": {name: figures.scale_free(record) for name, record in numbers.items()},
    }
    epochs = {name: record["epochs"] for name, record in numbers.items()}
    plot.save(plot.over_epochs(panels, title, epochs=epochs), out_dir / "figure.png")
    for name, record in numbers.items():
        print(f"{name}: Tr(Hess) {figures.course(record['epochs'], record['trace/total'])}")
        print(f"{name}: sum of Tr(Hess_l) ||w_l||^2 {figures.course(record['epochs'], figures.scale_free(record))}")
    if all("train_loss" in record for record in numbers.values()):
        for line in at_equal_loss(numbers):
            print(line)
    else:
        print("training losses were not kept: the nets are compared at equal epochs alone")


def at_equal_loss(numbers: Mapping[str, Any]) -> Iterator[str]:
    """The traces of the nets at the lowest training loss that each of them reaches, in words.

    The logarithm of the trace is interpolated in the loss, between measurements that each lower it.
    """
    curves = {}
    for name, record in numbers.items():
        due = np.array([epoch for epoch in record["epochs"] if epoch > 0])
        losses, traces = np.mean(record["train_loss"], 0)[due - 1], np.mean(record["trace/total"], 0)[-len(due) :]
        lower = losses < np.minimum.accumulate([np.inf, *losses[:-1]])
        curves[name] = losses[lower], traces[lower]
    common, first = max(losses[-1] for losses, _ in curves.values()), min(losses[0] for losses, _ in curves.values())
    if common > first:
        yield f"no training loss is common to all nets: one starts at {first:.3g}, one ends at {common:.3g}"
        return
    for name, (losses, traces) in curves.items():
        value = np.exp(np.interp(common, losses[::-1], np.log(traces[::-1])))  # of losses that rise
        yield f"{name}: Tr(Hess) {value:.4g} at a training loss of {common:.3g}"
