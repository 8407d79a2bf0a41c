"""What a layer's distance to the whole net is compared with: spectra that know nothing, and spectra without a scale.

A distance says that a layer is like the whole net if it is smaller than that of a spectrum that knows nothing of the
net (`zeros`, `divided_at_random`), and if its place among the layers does not follow from their sizes: nearly all
eigenvalues are zero, so that W1 is mostly the difference of two means, trace / dim. `COMPARISONS` are the distances as
they are, of those nulls, and of spectra that are divided by their largest eigenvalue or by their trace, with the zeros
and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

import jaxhess as jh
from experiments import statistics

DISTANCES: dict[str, Callable[[jh.Spectrum, jh.Spectrum, bool], float]] = {
    "wasserstein": lambda a, b, scaled: jh.wasserstein(a, b, normalize=not scaled),
    "jensen_shannon": lambda a, b, scaled: jh.jensen_shannon(a, b, normalize=True),
    "kl_divergence": lambda a, b, scaled: jh.kl_divergence(a, b),
}
NULLS = ("all zero", "random")
SCALE_FREE = ("/lmax", "/lmax, no 0", "/trace", "/trace, no 0")
COMPARISONS = ("as it is", *NULLS, *SCALE_FREE)
DRAWS = 5  # of the null at random, whose mean distance is taken
ROUNDING = 1e-5  # of the largest eigenvalue: what counts as zero


def zeros(spectrum: jh.Spectrum) -> jh.Spectrum:
    """As many eigenvalues as a spectrum has, all zero."""
    return jh.Spectrum([0.0], [1.0], spectrum.dim, spectrum.num_steps)


def divided_at_random(spectrum: jh.Spectrum, generator: np.random.Generator) -> jh.Spectrum:
    """As many eigenvalues, of the same trace, of which as many are not zero as are known: shares of it at random.

    The shares are uniform over all that add up to one (a flat Dirichlet distribution).
    """
    count = min(spectrum.dim, max(1, int(np.sum(~_is_zero(spectrum)))))
    values = spectrum.trace * generator.dirichlet(np.ones(count))
    return jh.Spectrum.from_eigenvalues(values, spectrum.dim)


def scaled(spectrum: jh.Spectrum, by: Literal["lmax", "trace"]) -> jh.Spectrum:
    """A spectrum divided by its largest eigenvalue, or by its trace; zero stays zero."""
    unit = spectrum.lambda_max if by == "lmax" else spectrum.trace
    return jh.Spectrum(spectrum.nodes / (unit or 1.0), spectrum.weights, spectrum.dim, spectrum.num_steps)


def without_zeros(spectrum: jh.Spectrum) -> jh.Spectrum:
    """The eigenvalues that differ from zero by more than rounding; all, if none does."""
    kept = ~_is_zero(spectrum)
    if not kept.any():
        return spectrum
    share = spectrum.weights[kept].sum()
    dim = max(1, round(spectrum.dim * share))
    return jh.Spectrum(spectrum.nodes[kept], spectrum.weights[kept] / share, dim, spectrum.num_steps)


def _is_zero(spectrum):
    size = np.abs(spectrum.nodes)
    return size <= ROUNDING * size.max()


def compare(
    layer: jh.Spectrum, total: jh.Spectrum, distance: str, draws: int = DRAWS, seed: int = 0
) -> dict[str, float]:
    """A layer's distance to the whole net in each of the `COMPARISONS`.

    Args:
      layer: its spectrum.
      total: that of the whole net.
      distance: one of `DISTANCES`. The Wasserstein distance is in shares of the range of both, without a scale as it
        is.
      draws: of the null at random, whose mean distance is taken.
      seed: of these draws.

    Returns:
      {comparison: distance}.
    """
    measure, generator = DISTANCES[distance], np.random.default_rng(seed)
    random = [measure(divided_at_random(layer, generator), total, False) for _ in range(draws)]
    found = [measure(layer, total, False), measure(zeros(layer), total, False), float(np.mean(random))]
    for by in ("lmax", "trace"):
        for part in (lambda spectrum: spectrum, without_zeros):
            found.append(measure(scaled(part(layer), by), scaled(part(total), by), True))
    return dict(zip(COMPARISONS, found, strict=True))


def outliers(spectra: Iterable[jh.Spectrum], draws: int = 20, seed: int = 0) -> str:
    """How many outliers spectra have, and how many random ones of the same sizes and traces, in words.

    Args:
      spectra: of the layers and of the net.
      draws: random spectra for each of them.
      seed: of these.
    """
    generator, spectra = np.random.default_rng(seed), list(spectra)
    random = [divided_at_random(spectrum, generator) for spectrum in spectra for _ in range(draws)]
    found = []
    for some in (spectra, random):
        counts = np.array([jh.count_outliers(spectrum) for spectrum in some])
        few, several = int(np.sum(counts < 2)), int(np.sum((counts > 1) & (counts <= 20)))
        found.append(f"0 or 1 in {few}, 2 to 20 in {several}, more in {len(counts) - few - several}")
    return f"outliers of the spectra of G: {found[0]}; of random spectra of the same sizes and traces: {found[1]}"


def closer(distances: Mapping[str, float]) -> float:
    """In what share of pairs of a middle layer and another the middle one is closer: 0.5 by chance, ties as a half."""
    middle = jh.middle_layers(list(distances))
    ours = np.array([distances[name] for name in middle])
    others = np.array([value for name, value in distances.items() if name not in middle])
    if not len(others):
        return 0.5
    return float(np.mean((ours[:, None] < others) + 0.5 * (ours[:, None] == others)))


def ratio(distances: Mapping[str, float], others: Mapping[str, float] | None = None) -> float:
    """The distance of the middle layers in times that of the others, geometric means of both: less than 1 if closer.

    Args:
      distances: {layer: distance}, of all layers.
      others: with these, the middle layers in times their own distances there, such as those of a null.

    Returns:
      The ratio; NaN if every layer is a middle one, or a distance is 0.
    """
    middle = jh.middle_layers(list(distances))
    rest = [value for name, value in distances.items() if name not in middle]
    below = rest if others is None else [others[name] for name in middle]
    values = np.array([distances[name] for name in middle])
    if not (len(below) and values.all() and np.all(below)):
        return float("nan")
    return float(np.exp(np.mean(np.log(values)) - np.mean(np.log(below))))


def verdict(trainings: Sequence[Mapping[str, Mapping[str, float]]], tests: int = 1) -> str:
    """What is to be said of the claim that the middle layers are the closest, from trainings of one net.

    Args:
      trainings: {comparison: {layer: distance}} of each.
      tests: how many such claims are looked at, by which each p is multiplied.

    Returns:
      That of `experiments.statistics.verdict` on the logarithm of the `ratio` to the other layers, if this is not
      "holds". Else "holds", if it also holds of the distances without a scale and of the ratios to both nulls, and
      "holds in part" if these are not all sure.
    """

    def sure(ratios):
        return statistics.verdict(statistics.paired(np.log(ratios), np.zeros(len(ratios))), tests=tests)

    first = sure([ratio(one["as it is"]) for one in trainings])
    if first != "holds":
        return first
    others = [[ratio(one["as it is"], one[null]) for one in trainings] for null in NULLS]
    others += [[ratio(one[comparison]) for one in trainings] for comparison in SCALE_FREE]
    return "holds" if all(sure(ratios) == "holds" for ratios in others) else "holds in part"
