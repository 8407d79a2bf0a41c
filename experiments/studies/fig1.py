"""Eigenspectra of Hess_l and G_l for every layer and for the whole net (Figures 1, 9 and 10 of the paper).

    python -m experiments.run fig1 model=lenet dataset=mnist

Under 3 minutes for LeNet on one CPU core, one of them measuring. The paper finds as many outliers as classes in every
layer. Expected: a bulk at zero and some outliers; the two curves of a layer of a ReLU net coincide, since f is affine
in one layer's parameters, while for the whole net the Hessian has negative eigenvalues and G has none.
``curvatures=hessian,ggn,functional`` draws H_l too. Of a large ReLU net ``method=auto`` takes the spectra of the
layers from the Gram matrix, after a check that H_l is zero in them, for up to 2,000 images times classes; the whole net
stays with Lanczos.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Literal

import jax
import numpy as np

import jaxhess as jh
from experiments import figures, measure, models, nulls, plot, store


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure.

    Attributes:
      num_steps: Lanczos steps of each spectrum.
      num_probes: probes of each trace.
      chunk_size: probes at a time; for large nets fewer, whose activations fit in memory.
      curvatures: spectra to draw, of "hessian", "ggn" and "functional".
    """

    num_steps: int = 128
    num_probes: int = 64
    chunk_size: int = 8
    curvatures: tuple[Literal["hessian", "ggn", "functional"], ...] = ("hessian", "ggn")


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, measures it and saves the numbers."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    accuracy = 1 - float(trained.history["test_error"][-1])
    print(f"{config.model} on {config.dataset}: test accuracy {accuracy:.2%} after {config.epochs} epochs")

    start = time.perf_counter()
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    key, layers = jax.random.key(config.seed), figures.shown(config, model, trained.params, batch)
    with measure.progress_bar("summary") as progress:
        table = jh.summarize(
            models.objective(model),
            trained.params,
            batch,
            key=key,
            num_probes=config.num_probes,
            chunk_size=config.chunk_size,
            num_steps=config.num_steps,
            method=config.method,
            max_bytes=measure.GRAM_BYTES,
            layers=layers,
            progress=progress,
        )
    others = tuple(kind for kind in config.curvatures if kind != "hessian")
    spectra = {"hessian": table.spectra} | measure.spectra(
        model,
        trained.params,
        batch,
        key=key,
        num_steps=config.num_steps,
        curvatures=others,
        method=config.method,
        layers=layers,
    )
    seconds = time.perf_counter() - start

    arrays = {name: array for kind in spectra for name, array in measure.pack(spectra[kind], kind).items()}
    store.save_arrays(out_dir / "numbers.npz", arrays)
    store.save_json(
        out_dir / "numbers.json",
        {
            "test_accuracy": accuracy,
            "images": len(batch["label"]),
            "seconds_measuring": seconds,
            "summary": table.to_dict(),
            "table": str(table).splitlines(),
            "distances": {kind: measure.distances(spectra[kind]) for kind in spectra},
            "history": {name: values.tolist() for name, values in trained.history.items()},
        },
    )


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and prints the table and how many outliers random spectra have."""
    numbers = store.load_json(out_dir / "numbers.json")
    if "table" in numbers:
        print(f"curvature at {numbers['images']} training images, measured in {numbers['seconds_measuring']:.0f} s:")
        print(*numbers["table"], sep="\n")
    arrays = store.load_arrays(out_dir / "numbers.npz")
    spectra = {kind: measure.unpack(arrays, kind) for kind in config.curvatures}
    if "ggn" in spectra:
        print(nulls.outliers(spectra["ggn"].values()))
    words = {kind: figures.how(config) for kind in spectra}
    if "ggn" in spectra and all(np.ptp(found.residuals) == 0 for found in spectra["ggn"].values()):
        words["ggn"] = "exact"  # Ritz values would have residuals of their own each
    title = (
        f"{figures.about(config, config.model, config.dataset)}, test accuracy {numbers['test_accuracy']:.1%}; "
        f"spectra at {numbers['images']} training images\n"
        + "; ".join(f"{plot.label(kind)}: {how}" for kind, how in words.items())
    )
    figure = plot.log_densities(spectra, title)
    plot.save(figure, out_dir / "figure.png")
