"""Distances between each layer's Hessian spectrum and the whole net's (Figures 3 and 12 of the paper).

    python -m experiments.run fig3 model=lenet dataset=mnist,fashion_mnist

About 3 minutes a data set for LeNet on two CPU cores. The paper finds the middle layers closest to the whole. Beside
the distances of spectra stands the released code's "Wasserstein distance", which takes the values of two density
curves for samples (``legacy``). The distances are also compared with those of spectra that know nothing, and with those
of spectra without a scale (`experiments.nulls`).

``from_fig1=true`` trains nothing, and takes the spectra that fig1 kept in results/, of the Hessian and of G:

    python -m experiments.run fig3 model=vgg11_bn,resnet18,densenet dataset=cifar10 from_fig1=true
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxhess as jh
from experiments import data, figures, folders, measure, models, nulls, plot, report, statistics, store
from experiments.plan import Plan
from experiments.studies import fig1


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure.

    Attributes:
      model: names of nets.
      dataset: names of data sets; every net is trained on each.
      trials: trainings of each net, with the seeds seed, seed + 1, ...
      draws: start vectors; each gives a spectrum and distances of its own.
      num_steps: Lanczos steps of each spectrum.
      from_fig1: take the spectra of each net from the folder of fig1 in results/; nothing is trained.
    """

    model: tuple[models.Name, ...] = ("lenet",)
    dataset: data.Names = ("mnist", "fashion_mnist")
    trials: int = 1
    draws: int = 1
    num_steps: int = 128
    from_fig1: bool = False


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings, of which there are none where fig1 kept the spectra."""
    return Plan({}, out_dir) if config.from_fig1 else figures.plan(config, out_dir, data_dir)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the nets, measures them and saves the numbers."""
    if config.from_fig1:
        store.save_json(out_dir / "numbers.json", _kept_by_fig1(config))
        return
    arrays, numbers = {}, {}
    for dataset_name, dataset in figures.load_all(config, data_dir).items():
        for model_name in config.model:
            name = figures.about(config, model_name, dataset_name)
            trainings, errors = [], []
            for trial in range(config.trials):
                seeded = dataclasses.replace(config, seed=config.seed + trial)
                model, trained = figures.net(seeded, model_name, dataset, out_dir)
                errors.append(float(trained.history["test_error"][-1]))
                batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
                trainings.append([])
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
                    trainings[-1].append(found)
            numbers[name] = compared(trainings) | {"test_error": errors}
    store.save_arrays(out_dir / "numbers.npz", arrays)
    store.save_json(out_dir / "numbers.json", numbers)


def _kept_by_fig1(config):
    """The numbers of the nets whose spectra fig1 kept."""
    numbers = {}
    for dataset_name in config.dataset:
        for model_name in config.model:
            folder = folders.RESULTS / f"fig1-{model_name}-{dataset_name}"
            if not (folder / "numbers.npz").exists():
                raise ValueError(
                    f"{folder} has no numbers.npz; run fig1 model={model_name} dataset={dataset_name} first"
                )
            made = folders.configured(folder, fig1.Config)
            arrays = store.load_arrays(folder / "numbers.npz")
            error = 1 - store.load_json(folder / "numbers.json")["test_accuracy"]
            for kind, words in (("hessian", "Hess"), ("ggn", "G")):
                name = f"{figures.about(made, model_name, dataset_name)}, {words}"
                numbers[name] = compared([[measure.unpack(arrays, kind)]]) | {"test_error": [error]}
    return numbers


def compared(trainings: Sequence[Sequence[Mapping[str, jh.Spectrum]]]) -> dict[str, Any]:
    """All that is said of the layers' spectra of one net.

    Args:
      trainings: {layer: spectrum, ..., "total": ...} of each draw of each training.

    Returns:
      {"distances": {metric: {layer: [float, ...]}}, "lambda_max": {layer: [float, ...]}, "params": {layer: int},
      "comparisons": {metric: [{comparison: {layer: float}}, ...]}}: the lists of the first two by training and draw,
      the last by training, a mean over its draws.
    """
    flat = [found for draws in trainings for found in draws]
    layers = [name for name in flat[0] if name != "total"]
    found = [measure.distances(spectra) for spectra in flat]
    return {
        "distances": {key: {name: [one[key][name] for one in found] for name in layers} for key in found[0]},
        "lambda_max": {name: [one[name].lambda_max for one in flat] for name in flat[0]},
        "params": {name: flat[0][name].dim for name in flat[0]},
        "comparisons": {key: [_mean_comparison(draws, layers, key) for draws in trainings] for key in nulls.DISTANCES},
    }


def _mean_comparison(draws, layers, distance):
    """{comparison: {layer: its mean over the start vectors}}."""
    found = {name: [nulls.compare(spectra[name], spectra["total"], distance) for spectra in draws] for name in layers}
    return {
        key: {name: float(np.mean([one[key] for one in found[name]])) for name in layers} for key in nulls.COMPARISONS
    }


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and prints the distances, the closest layers and the comparisons."""
    numbers = store.load_json(out_dir / "numbers.json")
    for name, record in numbers.items():
        layers = list(record["distances"]["wasserstein"])
        middle = jh.middle_layers(layers)
        few = len(layers) <= FEW
        between = middle if few else f"{middle[0]} to {middle[-1]}"
        print(f"{name}: test error {report.percent(record['test_error'])} %; middle: {between}")
        # By interlacing no block has a larger lambda_max than the whole: the closest layer is that with the largest.
        gaps = {layer: np.subtract(record["lambda_max"]["total"], record["lambda_max"][layer]) for layer in layers}
        for metric, values in (record["distances"] | {"lambda_max": gaps}).items():
            closest = Counter(min(layers, key=lambda layer: values[layer][i]) for i in range(len(values[layers[0]])))
            inside = sum(count for layer, count in closest.items() if layer in middle)
            if few:
                print(
                    f"  {metric:19} " + "  ".join(f"{layer} {report.spread(values[layer], '.3g')}" for layer in layers)
                )
            words = f"closest: {dict(closest)}; a middle one in {inside} of {closest.total()}"
            print(f"  {'' if few else metric:19} {words}")
        for metric, trainings in record.get("comparisons", {}).items():
            _print_comparisons(metric, trainings, record["params"], few)
    title = (
        f"From each layer's {'' if config.from_fig1 else 'Hessian '}spectrum to the whole net's: "
        f"{config.images_per_class} training images a class,\n"
        f"{figures.how(config)}; trainings: {config.trials}, start vectors: {config.draws}"
    )
    figure = plot.layer_distances({name: record["distances"] for name, record in numbers.items()}, title)
    plot.save(figure, out_dir / "figure.png")


FEW = 12  # layers, up to which each has a line


def _print_comparisons(metric, trainings, params, few):
    """A column for each comparison, means over the trainings: the layers, and how often a middle one is closer."""
    layers = list(trainings[0]["as it is"])
    means = {key: {name: np.mean([one[key][name] for one in trainings]) for name in layers} for key in trainings[0]}
    lines = [[f"  {metric}", "parameters", *means]]
    for name in layers if few else ():
        values = [f"{means[key][name]:.3g}" for key in means]
        lines.append([f"    {name}", f"{params[name] / params['total']:.1%}", *values])
    sizes = [params[name] for name in layers]
    lines.append(["    the closest on average", ""])
    lines.append(["    middle layers in times the others", ""])
    lines.append(["    a middle one is closer than another", ""])
    lines.append(["    rank correlation with parameters", ""])
    for key, distances in means.items():
        known = np.ptp(list(distances.values())) > 0  # the all-zero spectrum is as far in each layer
        share = np.mean([nulls.closer(one[key]) for one in trainings])
        ratio = np.exp(np.mean([np.log(nulls.ratio(one[key])) for one in trainings]))
        correlation = statistics.rank_correlation(list(distances.values()), sizes)
        cells = min(layers, key=distances.__getitem__), f"{ratio:.2f}", f"{share:.0%}", f"{correlation:.2f}"
        for line, cell in zip(lines[-4:], cells, strict=True):
            line.append(cell if known else "-")
    report.print_columns(lines)
    below = {null: sum(means["as it is"][name] < means[null][name] for name in layers) for null in nulls.NULLS}
    print(f"    closer than all zeros: {below['all zero']} of {len(layers)} layers; than random: {below['random']}")
    if len(trainings) > 1:
        parts = [
            f"{key} {report.times([nulls.ratio(one[key]) for one in trainings])}"
            for key in means
            if key not in nulls.NULLS
        ]
        print(f"    middle layers in times the others: {'; '.join(parts)}")
    verdict = nulls.verdict(trainings, tests=len(nulls.DISTANCES))
    count = f"{len(trainings)} training{'s' if len(trainings) > 1 else ''}"
    print(f"    the middle layers are the closest, {count}: {verdict}")
