"""Effects with their intervals, and what follows from them: tests, equivalence, power, and the verdict.

Every test is Student's t, with Satterthwaite's degrees of freedom where the effect is made of several means. Imports
NumPy and SciPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

LEVEL = 0.05  # of all tests
POWER = 0.8
VERDICTS = ("holds", "holds in part", "does not hold", "not decided")


class Effect(NamedTuple):
    """An estimated effect.

    Attributes:
      mean: the estimate.
      std_error: its standard error; NaN if it is not known.
      df: degrees of freedom of the standard error.
    """

    mean: float
    std_error: float
    df: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The interval that holds the effect with probability 1 - ``level``."""
        half = self.std_error * scipy.stats.t.isf(level / 2, self.df)
        return self.mean - half, self.mean + half

    def p_value(self, value: float = 0.0) -> float:
        """p of the two-sided t-test that the effect is ``value``."""
        return float(2 * scipy.stats.t.sf(abs(self.mean - value) / self.std_error, self.df))

    def p_equivalence(self, margin: float) -> float:
        """p of the two one-sided tests (TOST) that the effect is not within +- ``margin``.

        Reference: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach", 1987.
        """
        return float(scipy.stats.t.sf((margin - abs(self.mean)) / self.std_error, self.df))

    def smallest_found(self, level: float = LEVEL, power: float = POWER) -> float:
        """The true effect that the two-sided t-test finds with probability ``power``, at this standard error."""
        return self.std_error * _noncentrality(self.df, level, power)


def paired(one: Sequence[float], two: Sequence[float]) -> Effect:
    """The mean of ``one - two``, the same seeds in both; NaN errors for one pair, or differences by rounding alone."""
    differences = np.subtract(one, two)
    count = len(differences)
    # Errors are kept in float32: equal counts of wrong answers differ in the eighth digit, and the test would see that.
    varies = count > 1 and np.ptp(differences) > 1e-6 * np.abs([one, two]).max()
    error = np.std(differences, ddof=1) / np.sqrt(count) if varies else np.nan
    return Effect(float(np.mean(differences)), float(error), count - 1)


def unpaired(one: tuple[float, float], two: tuple[float, float], trials: int) -> Effect:
    """The difference of two reported (mean, standard deviation), each of so many trials: Welch's."""
    return difference(*(Effect(mean, deviation / np.sqrt(trials), trials - 1) for mean, deviation in (one, two)))


def difference(one: Effect, two: Effect) -> Effect:
    """``one - two`` of independent effects; the degrees of freedom are Welch's and Satterthwaite's.

    Reference: Welch, "The generalization of Student's problem when several different population variances are
    involved", 1947.
    """
    variances = np.array([one.std_error, two.std_error]) ** 2
    total = variances.sum()
    df = total**2 / np.sum(variances**2 / [one.df, two.df]) if total > 0 else np.nan
    return Effect(one.mean - two.mean, float(np.sqrt(total)), float(df))


def verdict(effect: Effect, *, tests: int = 1, margin: float = 0.0, reported: Effect | None = None) -> str:
    """What is to be said of the claim that an effect is negative.

    Args:
      effect: what was measured.
      tests: how many claims are looked at, by which each p is multiplied (Bonferroni).
      margin: an effect within +- ``margin`` counts as none; 0 if nothing would.
      reported: the effect that was claimed, if its size was.

    Returns:
      "holds": negative. "holds in part": negative, but within the margin, or smaller than what was reported. "does not
      hold": positive, or within the margin. "not decided": none of these is sure.
    """

    def sure(p):
        return tests * p <= LEVEL  # False for NaN

    none = margin > 0 and sure(effect.p_equivalence(margin))
    if not sure(effect.p_value()):
        return "does not hold" if none else "not decided"
    if effect.mean > 0:
        return "does not hold"
    smaller = reported is not None and effect.mean > reported.mean and sure(difference(effect, reported).p_value())
    return "holds in part" if none or smaller else "holds"


def verdict_of_no_difference(effect: Effect, margin: float, *, tests: int = 1) -> str:
    """What is to be said of the claim that there is no effect: within +- ``margin``, if there is one.

    Args:
      effect: what was measured.
      margin: an effect within it counts as none.
      tests: as for `verdict`.

    Returns:
      "holds": within the margin. "holds in part": within the margin, and yet sure to be there. "does not hold": there,
      and not sure to be within it. "not decided": nothing is sure.
    """
    none, there = (tests * p <= LEVEL for p in (effect.p_equivalence(margin), effect.p_value()))
    if none:
        return "holds in part" if there else "holds"
    return "does not hold" if there else "not decided"


def agreed(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that is looked at in several ways: that of all, or "not decided" if they differ."""
    return verdicts[0] if len(set(verdicts)) == 1 else "not decided"


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim of several parts: "holds in part" if it holds, or does in part, for some of them alone."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "holds in part" if {"holds", "holds in part"} & set(verdicts) else "not decided"


def best(rivals: Sequence[Effect]) -> str:
    """What is to be said of the claim that something is the best.

    Args:
      rivals: it less each of its rivals, negative where it is better; each p is multiplied by their number.

    Returns:
      "holds": better than each. "does not hold": a rival is better. "not decided": neither is sure.
    """
    found = [verdict(effect, tests=len(rivals)) for effect in rivals]
    if "does not hold" in found:
        return "does not hold"
    return agreed(found)


def _noncentrality(df, level, power):
    """The shift of t in units of the standard error at which the two-sided test has this power."""
    edge = scipy.stats.t.isf(level / 2, df)

    def lacking(shift):
        return scipy.stats.nct.sf(edge, df, shift) - power  # the other side has next to nothing at this power

    return float(scipy.optimize.brentq(lacking, 0.0, 1.5 * edge + 3))


# ---- series ----


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one of them is constant."""
    return _pearson(*map(scipy.stats.rankdata, (one, two)))


def rank_correlation_of_steps(
    one: Sequence[float], two: Sequence[float], *, block: int = 2, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Spearman's rank correlation of the first differences of two series, and its p.

    Two series that both grow are correlated whatever they are; their steps are not. What dependence is left between
    neighbouring steps is kept within blocks, which alone are permuted.

    Args:
      one: values at successive epochs.
      two: likewise.
      block: steps in a block; 1 for steps that are independent.
      resamples: permutations.
      seed: of the permutations.

    Returns:
      (rank correlation, two-sided p).
    """
    x, y = (scipy.stats.rankdata(np.diff(values)) for values in (one, two))
    observed = _pearson(x, y)
    if np.isnan(observed):
        return observed, observed
    generator = np.random.default_rng(seed)
    found = [_pearson(x, y[_shuffled(len(y), block, generator)]) for _ in range(resamples)]
    return observed, float((1 + np.sum(np.abs(found) >= abs(observed) - 1e-12)) / (resamples + 1))


def _shuffled(count, block, generator):
    """Indices in blocks of successive ones, the blocks in random order and from a random start around the end."""
    start = generator.integers(block)
    blocks = np.split(np.roll(np.arange(count), start), range(block, count, block))
    return np.concatenate([blocks[i] for i in generator.permutation(len(blocks))])


def _pearson(x, y):
    if not (np.ptp(x) and np.ptp(y)):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
