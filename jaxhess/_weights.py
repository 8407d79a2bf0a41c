"""The weights of Ritz values: what start vectors saw, or what they must be where a Ritz value is an eigenvalue.

A start vector of a random direction sees a single eigenvalue with the weight chi^2_1 / dim, whatever the number of
steps. A Ritz value that has converged is an eigenvalue, so its weight is known: 1 / dim. The others share the rest of
the mass in proportion to what was seen.

A repeated eigenvalue looks like a single one with more weight, chi^2_m / dim, and must keep it. A second, shorter run
in the complement of the vectors that were found sees its other copies. It is a second draw too, of the rest alone, and
does not know which values had converged: a start vector finds those first that it sees with more weight, so that what
it leaves is a little too light. Eigenvalues that the second run is too short for count as single if none is repeated,
and if their weights are not too large for single ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

_APART = 0.3  # of the gap to the next Ritz value: residuals below it are those of eigenvalues
_RELATIVE = 3e-2  # of the value: a cluster that is not resolved yet has residuals as large as it is wide
_UNLIKELY = 1e-5  # probability of a weight as large as this for a single eigenvalue
_UNLIKELY_ALL = 1e-3  # likewise of all weights together, as where all eigenvalues come in pairs
_MANY = 0.2  # more eigenvalues in the complement between those that were found, for each of these, are copies
_SAME = 1e-4  # of the value: nodes of two runs that are this near are one eigenvalue
_DENSE = 1.5  # 2 sigma of the density, in units of the range / steps: nodes that are as near as this show no bumps


class Nodes(NamedTuple):
    """Arguments of a `Spectrum`, (m,) each."""

    nodes: np.ndarray
    weights: np.ndarray
    residuals: np.ndarray
    fixed: np.ndarray


def plain(draws: list[Nodes]) -> Nodes:
    """The Ritz values of all draws with the weights that were seen."""
    nodes, weights, residuals, _ = _joined(draws)
    return _one_each(Nodes(nodes, weights / len(draws), residuals, np.zeros(len(nodes), bool)))


class Check(NamedTuple):
    """What a run in the complement of the converged vectors of the first draw has shown.

    Attributes:
      single: indices of Ritz values of the first draw that are known to be single eigenvalues.
      repeated: likewise repeated ones.
      draw: the whole spectrum as this run has it: the converged values, in their order, and then its nodes. None if
        these lie too far apart.
    """

    single: frozenset[int] = frozenset()
    repeated: frozenset[int] = frozenset()
    draw: Nodes | None = None


def check(first: Nodes, early: Nodes, rest: Nodes, dim: int) -> Check:
    """From the first draw, its first steps, and the run in the complement of its converged vectors."""
    found = converged(first)
    known = rest.residuals < _RELATIVE * np.abs(rest.nodes)
    near = np.array([_near(first, i, rest) & known for i in found])
    again = set(found[near.any(1)].tolist()) | _hidden(first, found, rest, dim)
    lead = {int(i) for i in found if np.any(_near(first, i, early)[converged(early)])}
    nodes = np.where(near.any(0), first.nodes[found[near.argmax(0)]], rest.nodes)  # the same eigenvalue is one node
    left = Nodes(nodes, rest.weights * (1 - len(found) / dim), rest.residuals, rest.fixed)
    whole = _joined([_exact(first, found, dim), left])
    new = rest.nodes[~near.any(0)]  # the others lie on nodes of the first
    dense = not new.size or np.ptp(new) * len(first.nodes) <= _DENSE * np.ptp(first.nodes) * new.size
    return Check(frozenset(lead - again), frozenset(again), whole if dense else None)


def _hidden(first, found, rest, dim):
    """Found eigenvalues among which the complement has others, though it did not converge to them.

    Between Ritz values that have all converged, the first run has seen nothing else: only the same values again.
    """
    hidden: set[int] = set()
    for run in np.split(found, np.flatnonzero(np.diff(found) > 1) + 1):
        within = (rest.nodes >= first.nodes[run[0]]) & (rest.nodes <= first.nodes[run[-1]])
        if (dim - len(found)) * rest.weights[within].sum() > max(1, _MANY * len(run)):
            hidden.update(run.tolist())
    return hidden


def _near(first, i, other):
    """Which nodes of another run are the i-th of the first, as far as the residuals of both tell."""
    reach = first.residuals[i] + other.residuals + _SAME * abs(first.nodes[i])
    return np.abs(other.nodes - first.nodes[i]) <= reach


def deflated(draws: list[Nodes], dim: int, check: Check) -> Nodes:
    """One node of weight 1 / dim for each eigenvalue that all draws have found; other Ritz values share the rest."""
    matches = _single(draws, _matches(draws), dim, check)
    if check.draw is not None:
        place = {index: i for i, index in enumerate(converged(draws[0]))}
        draws, matches = [*draws, check.draw], [(*match, place[match[0]]) for match in matches]
    count = len(matches)
    left = [np.delete(np.arange(len(d.nodes)), [match[i] for match in matches]) for i, d in enumerate(draws)]
    masses = [d.weights[rest].sum() for d, rest in zip(draws, left, strict=True)]
    if not count or (count < dim and min(masses) <= 0):
        return plain(draws)
    best = [min(((draws[d].residuals[i], d, i) for d, i in enumerate(match))) for match in matches]
    exact = _joined([_exact(draws[d], [i], dim) for _, d, i in best])
    scales = [(1 - count / dim) / len(draws) / mass if mass else 0.0 for mass in masses]
    rest = [
        Nodes(d.nodes[i], d.weights[i] * scale, d.residuals[i], np.zeros(len(i), bool))
        for d, i, scale in zip(draws, left, scales, strict=True)
    ]
    return _one_each(_joined([exact, *rest]))


def _exact(draw, indices, dim):
    """Nodes that are single eigenvalues."""
    count = len(indices)
    return Nodes(draw.nodes[indices], np.full(count, 1 / dim), draw.residuals[indices], np.ones(count, bool))


def _joined(parts):
    return Nodes(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _one_each(found):
    """What two draws hold as the very same number is one node."""
    nodes, index, inverse = np.unique(found.nodes, return_index=True, return_inverse=True)
    return Nodes(nodes, np.bincount(inverse, found.weights), found.residuals[index], found.fixed[index])


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


def _single(draws, matches, dim, check):
    """Those of the matches that are single eigenvalues: that were checked, or whose weights are not too large."""
    known = [match for match in matches if match[0] in check.single]
    if check.repeated:
        return known  # where some are repeated, others may be, too
    others = [match for match in matches if match[0] not in check.single]
    seen = np.array([dim * sum(d.weights[i] for d, i in zip(draws, match, strict=True)) for match in others])
    likely = scipy.stats.chi2.sf(seen, len(draws)) > _UNLIKELY
    if scipy.stats.chi2.sf(seen[likely].sum(), max(1, len(draws) * int(likely.sum()))) < _UNLIKELY_ALL:
        return known  # together they are too heavy, as where every eigenvalue is repeated
    return known + [match for match, ok in zip(others, likely, strict=True) if ok]
