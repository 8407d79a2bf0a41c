"""How precise every estimator is: traces by probes, curvature by images, spectra by Lanczos steps and draws.

    python -m experiments.run estimators model=lenet dataset=mnist

All is measured on one trained net. What it is compared with is exact: the eigenvalues of G from its Gram matrix.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

import jaxhess as jh
from experiments import figures, measure, models, plot, report, store

PROBES = ("rademacher", "gaussian")
LAYERWISE, JOINT, GGN = "Hess, a layer at a time", "Hess, all layers at once", "G, all layers at once"


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to compare.

    Attributes:
      probes: number of probes, from which the standard deviation of one is estimated.
      images: numbers of images that G is measured at.
      subsets: sets of each number of images, drawn from the training images.
      steps: numbers of Lanczos steps, with one start vector.
      draws: numbers of start vectors, with the largest number of steps.
      repeats: number of spectra for each number of steps and of draws.
    """

    probes: int = 128
    images: tuple[int, ...] = (10, 30, 100, 300)
    subsets: int = 8
    steps: tuple[int, ...] = (8, 16, 32, 64, 128)
    draws: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 8


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, measures, and saves the numbers."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    loss, params = models.objective(model), trained.params
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    layers = figures.shown(config, model, params, batch)
    keys = jax.random.split(jax.random.key(config.seed), 2)
    exact = _exact(loss, params, batch, layers)
    numbers = {
        "images_measured": len(batch["label"]),
        "probes": _by_probes(config, loss, params, batch, exact, keys[0]),
        "images": _by_images(config, loss, params, dataset, trained.batch_stats, layers),
        "lanczos": _by_lanczos(config, loss, params, batch, exact["total"], keys[1]),
    }
    store.save_json(out_dir / "numbers.json", numbers)


def _exact(loss, params, batch, layers):
    """The spectra of G_l and of G from the Gram matrix."""
    return jh.layer_spectra(
        loss,
        params,
        batch,
        key=jax.random.key(0),  # nothing is random
        curvature="ggn",
        method="gram",
        layers=layers,
        max_bytes=measure.GRAM_BYTES,
    )


def _by_probes(config, loss, params, batch, exact, key):
    """{estimator: {"rademacher": {layer: deviation of one probe / Tr G_l}, "gaussian": ..., "gradients": a probe}}."""
    gradient = jax.jit(jax.grad(loss))
    second = _seconds(lambda: gradient(params, batch))
    blocks = {layer: jh.hessian(loss, params, batch, layer=layer) for layer in exact if layer != "total"}

    def layerwise(probe):
        return {
            layer: jh.trace(block, like=jh.subtree(params, layer), key=key, num_probes=config.probes, probe=probe)
            for layer, block in blocks.items()
        }

    def at_once(curvature):
        return lambda probe: jh.layer_traces(
            loss,
            params,
            batch,
            key=key,
            num_probes=config.probes,
            curvature=curvature,
            probe=probe,
            method="hutchinson",
        )

    numbers = {}
    for name, way in {LAYERWISE: layerwise, JOINT: at_once("hessian"), GGN: at_once("ggn")}.items():
        numbers[name] = {"gradients": _seconds(lambda way=way: way("rademacher")) / config.probes / second}
        for probe in PROBES:
            deviations = {layer: float(e.std_error) * config.probes**0.5 for layer, e in way(probe).items()}
            if name == LAYERWISE:  # as of independent probes
                deviations["total"] = float(np.linalg.norm(list(deviations.values())))
            numbers[name][probe] = {layer: deviations[layer] / exact[layer].trace for layer in exact}
    return numbers


def _by_images(config, loss, params, dataset, batch_stats, layers):
    """{number: {"trace": {layer: [of each set]}, "lambda_max": ...}}, of G."""
    rng, numbers = np.random.default_rng(config.seed), {}
    for count in config.images:
        found = numbers[count] = {"trace": {}, "lambda_max": {}}
        for _ in range(config.subsets):
            chosen = rng.choice(len(dataset.train["label"]), count, replace=False)
            batch = dataset.batch({name: values[chosen] for name, values in dataset.train.items()})
            batch |= {"batch_stats": batch_stats} if batch_stats else {}
            for layer, spectrum in _exact(loss, params, batch, layers).items():
                found["trace"].setdefault(layer, []).append(spectrum.trace)
                found["lambda_max"].setdefault(layer, []).append(spectrum.lambda_max)
    return numbers


def _by_lanczos(config, loss, params, batch, exact, key):
    """{"steps": {number: {"lambda_max": [relative error], "wasserstein": [...]}}, "draws": ...}, of G."""
    operator = jh.linearize(jh.ggn(loss, params, batch), like=params)

    def errors(salt, **how):
        found = {"lambda_max": [], "wasserstein": []}
        for i in range(config.repeats):
            keys = jax.random.fold_in(jax.random.fold_in(key, salt), i)
            spectrum = jh.spectrum(operator, like=params, key=keys, **how)
            found["lambda_max"].append(abs(spectrum.lambda_max / exact.lambda_max - 1))
            found["wasserstein"].append(jh.wasserstein(spectrum, exact) * exact.dim / exact.trace)
        return found

    most = max(config.steps)
    return {
        "steps": {count: errors(0, num_steps=count) for count in config.steps},
        "draws": {count: errors(1, num_steps=most, num_draws=count) for count in config.draws},
    }


def _seconds(call: Callable) -> float:
    """The median of five calls after a first one, which compiles."""
    timer = partial(report.seconds, call, jax.block_until_ready)
    return float(np.median(report.in_turn({"call": timer}, 6)["call"][1:]))


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the curves from the saved numbers, and prints what a precision of 5% costs."""
    numbers = store.load_json(out_dir / "numbers.json")
    count = numbers["images_measured"]
    print(f"{figures.about(config, config.model, config.dataset)}, {count} training images")
    layers = list(numbers["probes"][GGN]["rademacher"])
    print("standard deviation of one probe, as a share of the trace:")
    lines = [["", "probe", "gradients", *layers, "probes for 5% of total", "gradients"]]
    for name, record in numbers["probes"].items():
        for probe in PROBES:
            needed = int(np.ceil((record[probe]["total"] / 0.05) ** 2))
            cells = [f"{record[probe][layer]:.3f}" for layer in layers]
            cost = record["gradients"]
            lines.append([name, probe, f"{cost:.2f}", *cells, f"{needed}", f"{needed * cost:.0f}"])
    report.print_columns(lines)
    for metric, words in (("trace", "Tr G"), ("lambda_max", "lambda_max(G)")):
        print(f"{words} of {config.subsets} sets of images:")
        rows = [
            [images, *(report.spread(record[metric][k], ".4g") for k in layers)]
            for images, record in numbers["images"].items()
        ]
        report.print_columns([["images", *layers], *rows])
    for way, records in numbers["lanczos"].items():
        for how_many, record in records.items():
            errors = ", ".join(f"{metric} {np.mean(values):.2g}" for metric, values in record.items())
            print(f"{how_many:>4} {way}: mean relative error of the whole G: {errors}")
    title = f"{figures.about(config, config.model, config.dataset)}, {count} training images"
    plot.save(plot.precision(_panels(numbers, layers, config.probes), title), out_dir / "figure.png")


def _panels(numbers, layers, most):
    """{title: (label of x, {line: (x, y)})}."""
    counts = 2.0 ** np.arange(int(np.log2(most)) + 1)
    probes = {
        name: (counts * record["gradients"], record["rademacher"]["total"] / counts**0.5)
        for name, record in numbers["probes"].items()
    }
    images = {
        f"{words}, {'full' if layer == 'total' else layer}": (
            [int(count) for count in numbers["images"]],
            [np.std(r[metric][layer], ddof=1) / np.mean(r[metric][layer]) for r in numbers["images"].values()],
        )
        for metric, words in (("trace", "Tr"), ("lambda_max", r"$\lambda_{\max}$"))
        for layer in (layers[0], layers[-2], "total")
    }
    lanczos = {
        way: {
            words: ([int(count) for count in records], [np.mean(record[metric]) for record in records.values()])
            for metric, words in (("lambda_max", r"$\lambda_{\max}$"), ("wasserstein", "spectrum (Wasserstein)"))
        }
        for way, records in numbers["lanczos"].items()
    }
    return {
        "Tr of the net, standard error": ("gradients spent, Rademacher probes", probes),
        "G, deviation between sets of images": ("images", images),
        "G of the net, one start vector": ("Lanczos steps", lanczos["steps"]),
        f"G of the net, {max(map(int, numbers['lanczos']['steps']))} steps": ("start vectors", lanczos["draws"]),
    }
