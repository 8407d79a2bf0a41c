"""Largest eigenvalue of every layer's Hessian over training, and of the whole one (Figures 6 and 13 of the paper).

    python -m experiments.run fig6 model=vgg11 dataset=mnist

The paper finds the middle layers closest to the whole. By interlacing no layer's lambda_max exceeds the whole's, so
that the closest layer is simply the one with the largest.
"""

from __future__ import annotations

import pathlib

import numpy as np

import jaxhess as jh
from experiments import figures, plot, store
from experiments.figures import OverTraining as Config

__all__ = ["Config", "draw", "run"]

run = figures.run_over_training


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and says which layers come closest."""
    numbers = store.load_json(out_dir / "numbers.json")
    numbers, title = figures.told_apart(config, numbers)
    print(title)
    panels = {}
    for name, record in numbers.items():
        layers = [metric.removeprefix("lambda_max/") for metric in record if metric.startswith("lambda_max/")]
        panels[name] = (record["epochs"], {layer: record[f"lambda_max/{layer}"] for layer in layers})
        layers.remove("total")
        largest = np.array([np.mean(record[f"lambda_max/{layer}"], 0) for layer in layers]).argmax(0)
        middle = jh.middle_layers(layers)
        inside = sum(layers[i] in middle for i in largest)
        print(f"{name}: closest at epochs {record['epochs']}: {[layers[i] for i in largest]}")
        chance = len(middle) / len(layers) * len(largest)
        between = f"{middle[0]} to {middle[-1]}"
        print(f"{name}: a middle layer ({between}) in {inside} of {len(largest)}, {chance:.1f} by chance")
    plot.save(plot.layers_over_epochs(panels, title), out_dir / "figure.png")
