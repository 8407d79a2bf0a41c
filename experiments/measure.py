"""From a trained net to the numbers of its curvature: plain arrays, which plots read back from disk."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import scipy.stats
from tqdm import tqdm

import jaxhess as jh
from experiments.data import Dataset, first
from experiments.models import objective

PyTree = Any
GRAM_BYTES = 4 * 2**30  # of rows that are held: a gradient each, 37 GB for 1,000 of VGG11
_FIELDS = ("nodes", "weights", "residuals", "dim", "num_steps", "num_draws", "fixed")


def measure_batch(dataset: Dataset, images_per_class: int, batch_stats: PyTree) -> PyTree:
    """The first training images of every class, and the batch statistics of a net, as a batch for `objective`.

    Of text it is so many sequences in all.
    """
    batch = dataset.batch(first(dataset, images_per_class))
    return batch | ({"batch_stats": batch_stats} if batch_stats else {})


@dataclasses.dataclass(frozen=True)
class InBatches:
    """All training images, in batches for `objective`; can be read again and again, as `jaxhess.Batches` does.

    Attributes:
      dataset: where they are from.
      size: images in a batch; the last one has what is left.
      batch_stats: the batch statistics of a net, {} without batch norm.
    """

    dataset: Dataset
    size: int
    batch_stats: PyTree

    def __iter__(self) -> Iterator[PyTree]:
        """The batches from the first on; what a batch takes is made when it is due."""
        for start in range(0, len(self.dataset.train["label"]), self.size):
            batch = self.dataset.batch({k: v[start : start + self.size] for k, v in self.dataset.train.items()})
            yield batch | ({"batch_stats": self.batch_stats} if self.batch_stats else {})


def spectra(
    model: nn.Module,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_steps: int = 128,
    num_draws: int = 1,
    curvatures: tuple[str, ...] = ("hessian", "ggn"),
    method: str = "lanczos",
    layers: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, dict[str, jh.Spectrum]]:
    """Spectra of every layer and of the whole net, for several curvatures.

    That of the GGN is exact, from its Gram matrix, where this is not too large. Those by Lanczos all start from the
    same vectors, so that where two curvatures agree their spectra do.

    Args:
      model: a net of `experiments.models`.
      params: its parameters.
      batch: images and labels, as from `measure_batch`.
      key: a JAX random key.
      num_steps: Lanczos steps of each draw.
      num_draws: start vectors of each spectrum; the weights of one draw are random by themselves.
      curvatures: of "hessian", "ggn" and "functional".
      method: of the spectra of the Hessian, "lanczos" or "auto", as for `jaxhess.layer_spectra`.
      layers: names of the layers that are wanted; all by default.
      progress: whether to show progress bars.

    Returns:
      {curvature: {layer: `jaxhess.Spectrum`, ..., "total": ...}}.
    """
    found = {}
    for curvature in curvatures:
        with progress_bar(f"spectra, {curvature}", progress) as report:
            found[curvature] = jh.layer_spectra(
                objective(model),
                params,
                batch,
                key=key,
                num_steps=num_steps,
                num_draws=num_draws,
                curvature=curvature,
                method="auto" if curvature == "ggn" else method,
                layers=layers,
                max_bytes=GRAM_BYTES,
                progress=report,
            )
    return found


def distances(spectra: Mapping[str, jh.Spectrum]) -> dict[str, dict[str, float]]:
    """Distances of the layers' spectra to that of the whole net.

    Args:
      spectra: {layer: `jaxhess.Spectrum`, ..., "total": ...}.

    Returns:
      {"wasserstein": {layer: float}, "jensen_shannon": ..., "kl_divergence": ..., "legacy_wasserstein": ...}: the
      first two normalised to [0, 1], the third in nats, of the layer from the whole; for the last see
      `legacy_wasserstein`.
    """
    total = spectra["total"]
    layers = [name for name in spectra if name != "total"]
    return {
        "wasserstein": {name: jh.wasserstein(spectra[name], total, normalize=True) for name in layers},
        "jensen_shannon": {name: jh.jensen_shannon(spectra[name], total, normalize=True) for name in layers},
        "kl_divergence": {name: jh.kl_divergence(spectra[name], total) for name in layers},
        "legacy_wasserstein": {name: legacy_wasserstein(spectra[name], total) for name in layers},
    }


def legacy_wasserstein(a: jh.Spectrum, b: jh.Spectrum) -> float:
    """What the code released with the paper calls Wasserstein distance, for comparison only.

    It takes the values of the two density curves, each on its own grid, for samples: eigenvalues play no part.
    """
    return float(scipy.stats.wasserstein_distance(a.density()[1], b.density()[1]))


def pack(spectra: Mapping[str, jh.Spectrum], prefix: str) -> dict[str, np.ndarray]:
    """Spectra as named arrays, ``{prefix}/{layer}/{nodes, weights, residuals, dim, num_steps}``."""
    return {
        f"{prefix}/{layer}/{field}": np.asarray(getattr(spectrum, field))
        for layer, spectrum in spectra.items()
        for field in _FIELDS
    }


def unpack(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, jh.Spectrum]:
    """What `pack` packed, in its order.

    Raises:
      ValueError: if there is nothing under ``prefix``.
    """
    layers: dict[str, dict] = {}
    for path, array in arrays.items():
        if path.startswith(f"{prefix}/"):
            layer, field = path.removeprefix(f"{prefix}/").rsplit("/", 1)
            layers.setdefault(layer, {})[field] = array if array.ndim else int(array)
    if not layers:
        raise ValueError(f"no spectra of {prefix!r} among the saved arrays; run the experiment again")
    return {layer: jh.Spectrum(**fields) for layer, fields in layers.items()}


@contextlib.contextmanager
def progress_bar(title: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as the ``progress(done, total)`` that jaxhess calls; on terminals only."""
    with tqdm(desc=title, unit="step", disable=None if show else True, leave=False) as bar:

        def report(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield report
