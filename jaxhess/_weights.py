"""The weights of Ritz values: what start vectors saw, or what they must be where a Ritz value is an eigenvalue.

A start vector of a random direction sees a single eigenvalue with the weight chi^2_1 / dim, whatever the number of
steps. A Ritz value that has converged is an eigenvalue, so its weight is known: 1 / dim. The others share the rest of
the mass in proportion to what was seen.

A repeated eigenvalue looks like a single one with more weight, chi^2_m / dim, and must keep it. A second, shorter run
that starts without the vectors that were found tells the leading ones apart. Of the others, weights that are too large
for single eigenvalues are left as they were seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

_APART = 0.1  # of the gap to the next Ritz value: residuals below it are those of eigenvalues
_RELATIVE = 1e-2  # of the value: a cluster that is not resolved yet has residuals as large as it is wide
_UNLIKELY = 1e-5  # probability of weights as large as these for single eigenvalues


class Nodes(NamedTuple):
    """Arguments of a `Spectrum`, (m,) each."""

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    fixed: np.ndarray


def plain(draws: list[Nodes]) -> Nodes:
    """The Ritz values of all draws with the weights that were seen."""
    nodes, weights, residuals, fixed = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    return Nodes(nodes, weights / len(draws), residuals, fixed)


class Checked(NamedTuple):
    """Indices of Ritz values of the first draw that are known to be single, or repeated."""

    single: frozenset[int]
    repeated: frozenset[int]


NOTHING_CHECKED = Checked(frozenset(), frozenset())


def deflated(draws: list[Nodes], dim: int, checked: Checked) -> Nodes:
    """One node of weight 1 / dim for each eigenvalue that all draws have found; other Ritz values share the rest."""
    matches = _single(draws, _matches(draws), dim, checked)
    count = len(matches)
    left = [np.delete(np.arange(len(d.nodes)), [match[i] for match in matches]) for i, d in enumerate(draws)]
    masses = [d.weights[rest].sum() for d, rest in zip(draws, left, strict=True)]
    if not count or (count < dim and min(masses) <= 0):
        return plain(draws)
    best = [min(((draws[d].residuals[i], d, i) for d, i in enumerate(match))) for match in matches]
    exact = Nodes(
        np.array([draws[d].nodes[i] for _, d, i in best]),
        np.full(count, 1 / dim),
        np.array([residual for residual, *_ in best]),
        np.ones(count, bool),
    )
    scales = [(1 - count / dim) / len(draws) / mass if mass else 0.0 for mass in masses]
    rest = [
        Nodes(d.nodes[i], d.weights[i] * scale, d.residuals[i], d.fixed[i])
        for d, i, scale in zip(draws, left, scales, strict=True)
    ]
    return Nodes(*(np.concatenate(parts) for parts in zip(exact, *rest, strict=True)))


def converged(draw: Nodes) -> np.ndarray:
    """The indices of Ritz values that are eigenvalues."""
    gaps = np.diff(draw.nodes, prepend=-np.inf, append=np.inf)
    apart = draw.residuals < _APART * np.minimum(gaps[:-1], gaps[1:])
    return np.flatnonzero(apart & (draw.residuals < _RELATIVE * np.abs(draw.nodes)))


def _matches(draws):
    """[(index in each draw)] of the eigenvalues that all draws have found."""
    found = []
    for i in converged(draws[0]):
        value, residual, match = draws[0].nodes[i], draws[0].residuals[i], [i]
        for other in draws[1:]:
            some = converged(other)
            near = some[np.abs(other.nodes[some] - value) <= residual + other.residuals[some]]
            match += list(near[:1])
        if len(match) == len(draws):
            found.append(tuple(match))
    return found


def _single(draws, matches, dim, checked):
    """Those of the matches that are single eigenvalues: that were checked, or whose weights are not too large."""
    known = [match for match in matches if match[0] in checked.single]
    others = [match for match in matches if match[0] not in checked.single | checked.repeated]
    seen = np.array([dim * sum(d.weights[i] for d, i in zip(draws, match, strict=True)) for match in others])
    likely = scipy.stats.chi2.sf(seen, len(draws)) > _UNLIKELY
    if scipy.stats.chi2.sf(seen[likely].sum(), max(1, len(draws) * int(likely.sum()))) < _UNLIKELY:
        return known  # together they are too heavy, as where every eigenvalue is repeated
    return known + [match for match, ok in zip(others, likely, strict=True) if ok]


def leading(early: Nodes, whole: Nodes) -> dict[int, float]:
    """{index: value} of the converged Ritz values of a run that had converged early, in its first steps."""
    some, before = converged(whole), converged(early)
    found = {}
    for i in some:
        reach = whole.residuals[i] + early.residuals[before]
        if np.any(np.abs(early.nodes[before] - whole.nodes[i]) <= reach):
            found[int(i)] = float(whole.nodes[i])
    return found


def recurring(values: dict[int, float], again: Nodes) -> Checked:
    """Which of the leading eigenvalues a run without their vectors has found again."""
    near = set()
    for i, value in values.items():
        if np.any(np.abs(again.nodes - value) <= np.maximum(again.residuals, 1e-4 * abs(value))):
            near.add(i)
    return Checked(frozenset(values) - near, frozenset(near))
