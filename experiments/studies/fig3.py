"""Distances between each layer's Hessian spectrum and the whole net's (Figures 3 and 12 of the paper).

    python -m experiments.run fig3 model=lenet dataset=mnist,fashion_mnist

About 3 minutes a data set for LeNet on two CPU cores. The paper finds the middle layers closest to the whole. Beside
the distances of spectra stands the released code's "Wasserstein distance", which takes the values of two density
curves for samples (``legacy``).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter

import jax
import numpy as np

import jaxhess as jh
from experiments import data, figures, measure, models, plot, report, store


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure.

    Attributes:
      model: names of nets.
      dataset: names of data sets; every net is trained on each.
      trials: trainings of each net, with the seeds seed, seed + 1, ...
      draws: start vectors; each gives a spectrum and distances of its own.
      num_steps: Lanczos steps of each spectrum.
    """

    model: tuple[models.Name, ...] = ("lenet",)
    dataset: data.Names = ("mnist", "fashion_mnist")
    trials: int = 1
    draws: int = 1
    num_steps: int = 128


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the nets, measures them and saves the numbers."""
    arrays, numbers = {}, {}
    for dataset_name, dataset in figures.load_all(config, data_dir).items():
        for model_name in config.model:
            name = figures.about(config, model_name, dataset_name)
            record = numbers[name] = {"distances": {}, "lambda_max": {}, "test_error": []}
            for trial in range(config.trials):
                seeded = dataclasses.replace(config, seed=config.seed + trial)
                model, trained = figures.net(seeded, model_name, dataset, out_dir)
                record["test_error"].append(float(trained.history["test_error"][-1]))
                batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
                for draw_number in range(config.draws):
                    found = measure.spectra(
                        model,
                        trained.params,
                        batch,
                        key=jax.random.fold_in(jax.random.key(seeded.seed), draw_number),
                        num_steps=config.num_steps,
                        curvatures=("hessian",),
                        method=config.method,
                        layers=figures.shown(config, model, trained.params, batch),
                    )["hessian"]
                    arrays |= measure.pack(found, f"{name}/{trial}/{draw_number}")
                    for layer, spectrum in found.items():
                        record["lambda_max"].setdefault(layer, []).append(spectrum.lambda_max)
                    for metric, values in measure.distances(found).items():
                        for layer, value in values.items():
                            record["distances"].setdefault(metric, {}).setdefault(layer, []).append(value)
    store.save_arrays(out_dir / "numbers.npz", arrays)
    store.save_json(out_dir / "numbers.json", numbers)


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and prints the distances and the closest layers."""
    numbers = store.load_json(out_dir / "numbers.json")
    for name, record in numbers.items():
        layers = list(record["distances"]["wasserstein"])
        middle = jh.middle_layers(layers)
        print(f"{name}: test error {report.percent(record['test_error'])} %; middle: {middle}")
        # By interlacing no block has a larger lambda_max than the whole: the closest layer is that with the largest.
        gaps = {layer: np.subtract(record["lambda_max"]["total"], record["lambda_max"][layer]) for layer in layers}
        for metric, values in (record["distances"] | {"lambda_max": gaps}).items():
            closest = Counter(min(layers, key=lambda layer: values[layer][i]) for i in range(len(values[layers[0]])))
            inside = sum(count for layer, count in closest.items() if layer in middle)
            row = "  ".join(f"{layer} {report.spread(values[layer], '.3g')}" for layer in layers)
            print(f"  {metric:19} {row}")
            print(f"  {'':19} closest: {dict(closest)}; a middle one in {inside} of {closest.total()}")
    title = (
        f"From each layer's Hessian spectrum to the whole net's: {config.images_per_class} training images a "
        "class,\n"
        f"{figures.how(config)}; trainings: {config.trials}, start vectors: {config.draws}"
    )
    figure = plot.layer_distances({name: record["distances"] for name, record in numbers.items()}, title)
    plot.save(figure, out_dir / "figure.png")
