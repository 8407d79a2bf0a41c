"""Trace of the Hessian over training, with and without batch norm and skip connections (Figure 5 of the paper).

    python -m experiments.run fig5 model=vgg11,vgg11_bn,resnet18,resnet18_noskip dataset=cifar10

The paper finds less curvature with batch norm and with skip connections. Batch norm makes weights scale-free: they can
grow and the trace fall without anything changing, so that Tr(Hess) ||w||^2 stands beside it.
"""

from __future__ import annotations

import pathlib

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
