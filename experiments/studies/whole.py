"""The Hessian over all training images beside that over a few: what the usual sample of them shows of the loss.

    python -m experiments.run whole model=lenet dataset=mnist

The images pass by in batches, so that all of them take the memory of ``images_at_once``. With ``num_steps=32`` 23
minutes on one CPU core. Expected: smaller eigenvalues over all images, since a few hard ones make the largest over a
few, and as many outliers as classes but one.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import jax
import numpy as np

import jaxhess as jh
from experiments import figures, measure, models, plot, report, store


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure; ``method`` and ``norm_layers`` play no part.

    Attributes:
      num_steps: Lanczos steps of the Hessian of the net.
      num_probes: probes of the traces of all G_l.
      images_at_once: training images in a batch.
    """

    num_steps: int = 128
    num_probes: int = 16
    images_at_once: int = 500


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, measures it on few and on all images, and saves the numbers."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    few = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    every = measure.InBatches(dataset, config.images_at_once, trained.batch_stats)
    batches = {len(few["label"]): few, len(dataset.train["label"]): jh.Batches(every, size=lambda b: len(b["label"]))}

    loss, params, keys = models.objective(model), trained.params, jax.random.split(jax.random.key(config.seed))
    numbers: dict[str, dict] = {}
    arrays: dict[str, np.ndarray] = {}
    for images, batch in batches.items():
        hessian = jh.hessian(loss, params, batch)
        start = time.perf_counter()
        with measure.progress_bar(f"spectrum, {images} images") as progress:
            found = jh.spectrum(hessian, like=params, key=keys[0], num_steps=config.num_steps, progress=progress)
        seconds = time.perf_counter() - start
        traces = jh.layer_traces(loss, params, batch, key=keys[1], num_probes=config.num_probes, curvature="ggn")
        numbers[str(images)] = {
            "lambda_max": found.lambda_max,
            "lambda_min": found.lambda_min,
            "outliers": jh.count_outliers(found),
            "traces": {layer: [float(estimate.mean), float(estimate.std_error)] for layer, estimate in traces.items()},
            "seconds_of_lanczos": seconds,
        }
        arrays |= measure.pack({"total": found}, str(images))
    store.save_arrays(out_dir / "numbers.npz", arrays)
    accuracy = 1 - float(trained.history["test_error"][-1])
    store.save_json(out_dir / "numbers.json", {"test_accuracy": accuracy, "images": numbers})


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the table and draws both densities from the saved numbers."""
    numbers = store.load_json(out_dir / "numbers.json")
    about = f"{figures.about(config, config.model, config.dataset)}, test accuracy {numbers['test_accuracy']:.1%}"
    records = {f"{int(images):,} images": record for images, record in numbers["images"].items()}
    print(about)
    lines = [["", *records]]
    for metric, words in (("lambda_max", "lambda_max(Hess)"), ("lambda_min", "lambda_min(Hess)")):
        lines.append([words, *(f"{record[metric]:.4g}" for record in records.values())])
    lines.append(["outliers of Hess", *(str(record["outliers"]) for record in records.values())])
    for layer in next(iter(records.values()))["traces"]:
        lines.append([f"Tr G, {layer}", *("{:.4g} +- {:.2g}".format(*r["traces"][layer]) for r in records.values())])
    lines.append(
        [f"{config.num_steps} Lanczos steps, s", *(f"{r['seconds_of_lanczos']:.1f}" for r in records.values())]
    )
    report.print_columns(lines)
    arrays = store.load_arrays(out_dir / "numbers.npz")
    spectra = {
        words: measure.unpack(arrays, images)["total"] for images, words in zip(numbers["images"], records, strict=True)
    }
    title = f"{about}:\nHessian of the net over few and over all training images, {config.num_steps} Lanczos steps"
    plot.save(plot.log_densities({"hessian": spectra}, title), out_dir / "figure.png")
