"""The classes in every layer's Gauss-Newton matrix: t-SNE of delta_{c,c'} and delta_c (Figures 2 and 11 of the paper).

    python -m experiments.run fig2 model=lenet dataset=mnist

The paper finds C clusters in every layer. Beside the picture stands what t-SNE cannot invent: the silhouette of the
classes c among the delta_{c,c'} themselves, with its value for shuffled classes, that of the outputs c', and the share
of each part of G in its trace.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

import jaxhess as jh
from experiments import figures, measure, models, plot, store

PARTS = ("class", "cross_class", "within_class", "same_class")


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train, and how it is drawn.

    Attributes:
      weighting: weights of the examples, "p" or "legacy_sqrt_p", as for jaxhess.class_structure.
      perplexity: perplexity of t-SNE.
      shuffles: random orders of the classes that the silhouette is compared with.
    """

    weighting: Literal["p", "legacy_sqrt_p"] = "p"
    perplexity: float = 15.0
    shuffles: int = 100


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, takes G apart, and saves vectors and numbers."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    with measure.progress_bar("rows of the Gram matrix") as progress:
        found = jh.layer_class_structures(
            models.objective(model),
            trained.params,
            batch,
            dataset.num_classes,
            weighting=config.weighting,
            max_bytes=measure.GRAM_BYTES,
            progress=progress,
        )
    arrays, numbers = {}, {}
    for layer in [*figures.shown(config, model, trained.params, batch), "total"]:
        points = vectors(found[layer])
        tsne = TSNE(perplexity=min(config.perplexity, (len(points) - 1) / 3), random_state=config.seed, init="pca")
        arrays |= {f"{layer}/points": points, f"{layer}/embedded": tsne.fit_transform(points)}
        numbers[layer] = silhouettes(points, dataset.num_classes, config.shuffles, config.seed) | {
            "traces": found[layer].traces,
            "largest": {part: values[:1].tolist() for part, values in found[layer].eigenvalues.items()},
        }
    store.save_arrays(out_dir / "numbers.npz", arrays)
    about = {"test_error": float(trained.history["test_error"][-1]), "num_classes": dataset.num_classes}
    store.save_json(out_dir / "numbers.json", about | {"layers": numbers})


def vectors(structure: jh.ClassStructure) -> np.ndarray:
    """The delta_{c,c'} for c' != c, class by class, and behind them the delta_c: (C (C - 1) + C, r)."""
    classes = len(structure.classes)
    return np.concatenate([structure.pairs[~np.eye(classes, dtype=bool)], structure.classes])


def silhouettes(points: np.ndarray, classes: int, shuffles: int, seed: int) -> dict[str, float]:
    """The silhouette of the classes c among the delta_{c,c'}, and its mean and largest value for shuffled classes."""
    points, labels = points[:-classes], np.repeat(np.arange(classes), classes - 1)
    rng = np.random.default_rng(seed)
    others = [silhouette_score(points, rng.permutation(labels)) for _ in range(shuffles)]
    found = {"silhouette": silhouette_score(points, labels), "shuffled": np.mean(others), "shuffled_max": max(others)}
    return {name: float(value) for name, value in found.items()}


def of_outputs(points: np.ndarray, classes: int) -> float:
    """The silhouette of the outputs c' among the delta_{c,c'}: whether they lie together by where the slope points."""
    _, outputs = np.nonzero(~np.eye(classes, dtype=bool))
    return float(silhouette_score(points[:-classes], outputs))


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and prints the silhouettes and the parts."""
    numbers = store.load_json(out_dir / "numbers.json")
    layers = numbers["layers"]
    arrays, classes = store.load_arrays(out_dir / "numbers.npz"), numbers["num_classes"]
    print(f"{'':{max(map(len, layers))}}  silhouette  shuffled (max)   by c'   share of Tr G: " + ", ".join(PARTS))
    for layer, record in layers.items():
        shares = "  ".join(f"{record['traces'][part] / record['traces']['total']:6.1%}" for part in PARTS)
        print(
            f"{layer:{max(map(len, layers))}}  {record['silhouette']:10.3f}  {record['shuffled']:.3f} "
            f"({record['shuffled_max']:.3f})  {of_outputs(arrays[f'{layer}/points'], classes):6.3f}   {shares}"
        )
    title = (
        f"{figures.about(config, config.model, config.dataset)}, test error {numbers['test_error']:.1%}: "
        f"t-SNE of $\\delta_{{c,c'}}$ (dots) and $\\delta_c$ (crosses)"
    )
    panels = {layer: (arrays[f"{layer}/embedded"], record["silhouette"]) for layer, record in layers.items()}
    plot.save(plot.clusters(panels, classes, title), out_dir / "figure.png")
