"""Distances between each layer's Hessian spectrum and the whole net's (Figures 3 and 12 of the paper).

    python -m experiments.run fig3 model=lenet dataset=mnist,fashion_mnist

About 3 minutes a data set for LeNet on two CPU cores. The paper finds the middle layers closest to the whole.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from experiments import data, measure, plot, results
from experiments.train import TrainConfig, train_once


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """What to train as in `TrainConfig`, and what to measure.

    Attributes:
      epochs: passes over the training images.
      model: names of nets.
      dataset: names of data sets; every net is trained on each.
      label: feature with the labels.
      images_per_class: training images of each class that the curvature is measured on.
      num_steps: Lanczos steps of each spectrum.
      num_draws: start vectors of each spectrum.
    """

    epochs: int = 10
    model: tuple[str, ...] = ("lenet",)
    dataset: tuple[str, ...] = ("mnist", "fashion_mnist")
    label: str = "label"
    images_per_class: int = 10
    num_steps: int = 128
    num_draws: int = 1


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the nets, measures them, saves the numbers and prints the distances."""
    arrays, numbers = {}, {}
    for dataset_name in config.dataset:
        dataset = data.load(dataset_name, data_dir, label=config.label)
        for model_name in config.model:
            model, trained = train_once(model_name, dataset, config, out_dir)
            batch, key = measure.measure_batch(dataset, config.images_per_class, trained), jax.random.key(config.seed)
            found = measure.spectra(
                model,
                trained.params,
                batch,
                key=key,
                num_steps=config.num_steps,
                num_draws=config.num_draws,
                curvatures=("hessian",),
            )["hessian"]
            distances = measure.distances(found)
            name = f"{plot.label(model_name)}, {plot.label(dataset_name)}"
            numbers[name] = {"distances": distances, "test_error": float(trained.history["test_error"][-1])}
            arrays |= measure.pack(found, name)
            print(f"{name}: test error {numbers[name]['test_error']:.2%}; distances to the whole net's spectrum")
            for metric, values in distances.items():
                row = "  ".join(f"{layer} {value:.3g}" for layer, value in values.items())
                print(f"  {metric:15} {row}   closest: {min(values, key=values.get)}")
    results.save_arrays(out_dir / "numbers.npz", arrays)
    results.save_json(out_dir / "numbers.json", numbers)


def draw(out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers."""
    config, numbers = results.load_json(out_dir / "config.json"), results.load_json(out_dir / "numbers.json")
    title = (
        f"From each layer's Hessian spectrum to the whole net's: "
        f"{config['images_per_class']} training images a class, {config['num_steps']} Lanczos steps"
    )
    figure = plot.layer_distances({name: record["distances"] for name, record in numbers.items()}, title)
    plot.save(figure, out_dir / "figure.png")
