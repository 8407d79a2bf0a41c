"""The number of outliers in each layer's spectrum, for data sets of different numbers of classes.

    python -m experiments.run outliers model=vgg11_bn dataset=cifar10,cifar100:coarse_label,cifar100

The paper finds as many outliers as classes in every layer. They are counted in the spectrum of G_l, whose bulk at zero
hides none, by `jaxhess.count_outliers`, which is not told the number of classes C. Beside the count stands what a
reader who is told C can see: the largest ratio of neighbours from eigenvalue C/2 to 2C, and after which it comes.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np

import jaxhess as jh
from experiments import data, figures, measure, models, report, store
from jaxhess import plot


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure.

    Attributes:
      model: name of the net.
      dataset: names of data sets; a colon and the feature with the labels may follow, as in cifar100:coarse_label.
      trials: trainings of each net, with the seeds seed, seed + 1, ...
      steps_per_class: Lanczos steps for each class, where the Gram matrix is too large; at least 128 steps.
    """

    model: models.Name = "vgg11_bn"
    dataset: data.Names = ("cifar10", "cifar100:coarse_label", "cifar100")
    trials: int = 1
    steps_per_class: int = 3


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the nets, counts, and saves the numbers and the spectra."""
    arrays, numbers = {}, {}
    for name, dataset in figures.load_all(config, data_dir).items():
        record = numbers[name] = {"num_classes": dataset.num_classes, "test_error": [], "outliers": {}}
        for trial in range(config.trials):
            seeded = dataclasses.replace(config, seed=config.seed + trial)
            model, trained = figures.net(seeded, config.model, dataset, out_dir)
            record["test_error"].append(float(trained.history["test_error"][-1]))
            batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
            found = measure.spectra(
                model,
                trained.params,
                batch,
                key=jax.random.key(seeded.seed),
                num_steps=max(128, config.steps_per_class * dataset.num_classes),
                curvatures=("ggn",),
                layers=figures.shown(config, model, trained.params, batch),
            )["ggn"]
            arrays |= measure.pack(found, f"{name}/{trial}")
            for layer, spectrum in found.items():
                record["outliers"].setdefault(layer, []).append(jh.count_outliers(spectrum))
    store.save_arrays(out_dir / "numbers.npz", arrays)
    store.save_json(out_dir / "numbers.json", numbers)


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the table from the saved numbers."""
    numbers = store.load_json(out_dir / "numbers.json")
    arrays = store.load_arrays(out_dir / "numbers.npz")
    print(f"outliers of G_l, {config.images_per_class} training images of each class, and the largest gap near C")
    columns = []
    for name, record in numbers.items():
        classes = record["num_classes"]
        found = [measure.unpack(arrays, f"{name}/{trial}") for trial in range(config.trials)]
        columns.append([f"C = {classes}", *(report.spread(counts, ".3g") for counts in record["outliers"].values())])
        columns.append(["gap", *(", ".join(gap_near(spec[layer], classes) for spec in found) for layer in found[0])])
    layers = ["layer", *next(iter(numbers.values()))["outliers"]]
    lines = [list(line) for line in zip(layers, *columns, strict=True)]
    report.print_columns(lines)
    for name, record in numbers.items():
        words = figures.about(config, config.model, name)
        print(f"{words}: test error {report.percent(record['test_error'])} %")


def gap_near(spectrum: jh.Spectrum, classes: int) -> str:
    """The largest ratio l_k / l_{k+1} for k from C/2 to 2C, in words: "1.80 at 10"; of eigenvalues that are known."""
    values = spectrum.nodes[::-1]
    known = (values > 0) & plot.converged(spectrum)[::-1]
    values = values[: len(values) if known.all() else int(np.argmin(known))]
    ratios = (values[:-1] / values[1:])[classes // 2 - 1 : 2 * classes]
    if not len(ratios):
        return "-"
    best = int(np.argmax(ratios))
    return f"{ratios[best]:.2f} at {best + classes // 2}"
