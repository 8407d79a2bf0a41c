"""What numbers say, in words and tables: spreads, claims and their verdicts, rank correlations, times.

Imports NumPy and SciPy only, so that the benchmark's other process, which has no JAX, reads its clock here too.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from experiments import statistics
from experiments.statistics import Effect

METRICS = {"test_error": "test error", "trace": "trace"}


class Claim(NamedTuple):
    """That ``lower`` has a lower ``metric`` than ``higher``."""

    lower: str
    higher: str
    words: str
    metric: str = "test_error"


def print_columns(lines: Sequence[Sequence[str]]) -> None:
    """Prints a table of words, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip())


def percent(shares: Sequence[float], form: str = ".2f") -> str:
    """`spread` of shares of 1, in percent."""
    return spread([100 * share for share in shares], form)


class Column(NamedTuple):
    """A column of a table of records: which number, times what, and how it is written."""

    metric: str
    scale: float
    form: str

    def cell(self, records: Sequence[Mapping[str, float]]) -> str:
        """`spread` of the column over records."""
        return spread([self.scale * record[self.metric] for record in records], self.form)


ERROR, ACCURACY, GAP = (
    Column("test_error", 100, ".2f"),
    Column("train_accuracy", 100, ".2f"),
    Column("gap", 100, ".2f"),
)
TRAIN_LOSS = Column("train_loss", 1, ".3g")
TRACE, NEGATIVE = Column("trace", 1, ".4g"), Column("negative_trace", 1, ".3g")
LAMBDA_MAX, LAMBDA_MIN = Column("lambda_max", 1, ".4g"), Column("lambda_min", 1, ".3g")


def spread(values: Sequence[float], form: str) -> str:
    """Mean +- standard deviation; of one value the value alone."""
    mean = format(np.mean(values), form)
    return f"{mean} +- {format(np.std(values, ddof=1), form)}" if len(values) > 1 else mean


class Reported(NamedTuple):
    """What the paper reports of the arms of a row.

    Attributes:
      errors: {arm: (mean, standard deviation)} of the test error in %.
      trials: of each arm.
      comparable: whether the same net was trained on the same images here, so that the differences can be compared.
    """

    errors: Mapping[str, tuple[float, float]]
    trials: int
    comparable: bool = True

    def effect(self, claim: Claim) -> Effect | None:
        """The difference of a claim; None if the paper does not report it."""
        if claim.metric != "test_error" or not {claim.lower, claim.higher} <= set(self.errors):
            return None
        return statistics.unpaired(self.errors[claim.lower], self.errors[claim.higher], self.trials)

    def margin(self, claim: Claim) -> float:
        """Points of test error that count as none: the difference that the paper reports, and no more than 0.1."""
        theirs = self.effect(claim)
        return NO_MARGIN if theirs is None else min(NO_MARGIN, abs(theirs.mean))


NO_MARGIN = 0.1  # points of test error: what counts as none is at most this, however large the paper's difference is
NO_SHARE = 0.05  # share of a trace that counts as none


def judge(
    claim: Claim,
    values: Mapping[str, Sequence[float]],
    tests: int = 1,
    reported: Reported | None = None,
    margin: float | None = None,
) -> str:
    """Whether a claim holds, in words.

    Args:
      claim: what is claimed.
      values: {arm: one value for each trial}, the same seeds in all.
      tests: how many such claims are looked at, by which p is multiplied (Bonferroni).
      reported: what the paper reports.
      margin: points of test error that count as none, where ``reported`` does not say; `NO_MARGIN` by default.

    Returns:
      The verdict of `experiments.statistics.verdict`, and lines with what it follows from: the mean difference with its
      95% interval and p; whether it is within a margin that counts as none, which is the difference that the paper
      reports, but no more than 0.1 points, or 5% of a trace; the difference that would be found with a power of 80%;
      and the paper's difference with its own p, and beside this one. What is not decided may still be less than a
      large difference that the paper reports: this is said.
    """
    found, usual = _measured(claim, values)
    margin = usual if margin is None else margin
    theirs = reported.effect(claim) if reported is not None else None
    if reported is not None and theirs is not None:
        margin = reported.margin(claim)
    compared = theirs if reported is not None and reported.comparable else None
    verdict = statistics.verdict(found, tests=tests, margin=margin, reported=compared)
    words = " (the opposite is seen)" if tests * found.p_value() <= statistics.LEVEL and found.mean > 0 else ""
    if verdict == "not decided" and theirs is not None:
        p = tests * found.p_equivalence(abs(theirs.mean))
        words = f" (a difference as large as the paper's is excluded, p = {p:.2g})" if p <= statistics.LEVEL else ""
    paper = _paper(theirs, None if compared is None else found)
    return f"{claim.words}: {verdict}{words}\n  {_evidence(claim, found, margin, tests)}{paper}"


def judge_no_difference(
    claim: Claim, values: Mapping[str, Sequence[float]], tests: int = 1, margin: float | None = None
) -> str:
    """Whether the two arms of a claim do not differ, in words; arguments and lines as of `judge`."""
    found, usual = _measured(claim, values)
    margin = usual if margin is None else margin
    verdict = statistics.verdict_of_no_difference(found, margin, tests=tests)
    return f"{claim.words}: {verdict}\n  {_evidence(claim, found, margin, tests)}"


def judge_best(arm: str, values: Mapping[str, Sequence[float]], margin: float = NO_MARGIN) -> str:
    """Whether an arm has the lowest test error of all, in words: against each other one, with p multiplied by these.

    Args:
      arm: of which it is claimed.
      values: {arm: one test error for each trial}, the same seeds in all.
      margin: as of `judge`.

    Returns:
      The verdict of `experiments.statistics.best`, and a line for each of the other arms.
    """
    claims = [Claim(arm, other, f"{arm} has a lower test error than {other}") for other in values if other != arm]
    found = [effect(claim, values) for claim in claims]
    lines = [f"  {_evidence(claim, one, margin, len(claims))}" for claim, one in zip(claims, found, strict=True)]
    words = f"{arm} is the best, p multiplied by the {len(claims)} tests: {statistics.best(found)}"
    return "\n".join([words, *lines])


def effect(claim: Claim, values: Mapping[str, Sequence[float]]) -> Effect:
    """The paired difference of a claim, of test errors in points; arguments as of `judge`."""
    return _measured(claim, values)[0]


def outcome(claim: Claim, values: Mapping[str, Sequence[float]], tests: int = 1) -> str:
    """What ``lower`` does to the test error, in a few words; arguments as of `judge`.

    Returns:
      "helps", "hurts", "makes no difference as large as 0.1 points", or "is not decided", as `judge` finds it; what
      helps or hurts by less than that says so too.
    """
    found, margin = _measured(claim, values)
    verdict = statistics.verdict(found, tests=tests, margin=margin)
    if verdict == "not decided":
        return f"is {verdict}"
    if not tests * found.p_value() <= statistics.LEVEL:
        return f"makes no difference as large as {margin:g} points"
    small = f" by less than {margin:g} points" if tests * found.p_equivalence(margin) <= statistics.LEVEL else ""
    return ("helps" if found.mean < 0 else "hurts") + small


def _measured(claim, values):
    """The effect, and the margin that counts as none: test errors in points."""
    percent = claim.metric == "test_error"
    lower, higher = (np.multiply(values[arm], 100 if percent else 1) for arm in (claim.lower, claim.higher))
    return statistics.paired(lower, higher), NO_MARGIN if percent else NO_SHARE * abs(float(np.mean(higher)))


def _evidence(claim, found, margin, tests):
    form, unit = (".3f", " points") if claim.metric == "test_error" else (".4g", "")
    of = f"{METRICS[claim.metric]} {claim.lower} - {claim.higher}: {found.mean:{form}}{unit}"
    if not np.isfinite(found.std_error):
        return f"{of}, no paired t-test"
    p, none = (min(1.0, tests * p) for p in (found.p_value(), found.p_equivalence(margin)))
    smallest = found.smallest_found(statistics.LEVEL / tests)
    return (
        f"{of}, 95% interval {_interval(found, form)}, paired t-test p = {p:.3g}; within +-{margin:{form}}: "
        f"p = {none:.3g}; 80% power to find {smallest:{form}}"
    )


def _paper(theirs, found):
    """The line on the paper's difference, and on how far the one found is from it."""
    if theirs is None:
        return ""
    words = f"\n  the paper's: {theirs.mean:.2f} points, {_interval(theirs, '.2f')}, its own p = {theirs.p_value():.2g}"
    if found is None:
        return words
    apart = statistics.difference(found, theirs)
    return f"{words}; ours - the paper's: {apart.mean:.2f}, {_interval(apart, '.2f')}, p = {apart.p_value():.2g}"


def _interval(effect, form):
    low, high = effect.interval()
    return f"{low:{form}} to {high:{form}}"


def rank_correlation(traces: Sequence[float], gaps: Sequence[float], where: str) -> str:
    """How far the trace goes with the generalisation gap, in words: Spearman's rank correlation."""
    found = scipy.stats.spearmanr(traces, gaps)
    # The p-value is asymptotic: of three values in a row it would be zero.
    p_value = f" (p = {found.pvalue:.2g})" if len(traces) >= 10 else ""
    return f"rank correlation of trace and generalisation gap {where} {found.statistic:.2f}{p_value}"


def rank_correlation_of_series(traces: Sequence[float], gaps: Sequence[float]) -> str:
    """The same over epochs, which depend on each other: of the levels without p, of the steps with one."""
    levels = statistics.rank_correlation(traces, gaps)
    steps, p = statistics.rank_correlation_of_steps(traces, gaps)
    return (
        f"rank correlation of trace and generalisation gap over {len(gaps)} epochs {levels:.2f}, of their changes from "
        f"epoch to epoch {steps:.2f} (p = {p:.2g})"
    )


def interval(effect: Effect, form: str) -> str:
    """An effect with its 95% interval, in words; the effect alone if its error is not known."""
    if not np.isfinite(effect.std_error):
        return format(effect.mean, form)
    return f"{effect.mean:{form}} (95% interval {_interval(effect, form)})"


def log_effect(ratios: Sequence[float]) -> Effect:
    """The mean logarithm of ratios, one for each trial; less than 0 where what is above the line is smaller."""
    return statistics.paired(np.log(ratios), np.zeros(len(ratios)))


def p_words(effect: Effect, tests: int = 1) -> str:
    """The p of the test that an effect is none, multiplied by ``tests``, as ", p = ..."; "" if there is none."""
    p = tests * effect.p_value()
    return f", p = {min(1.0, p):.2g}" if np.isfinite(p) else ""


def times(ratios: Sequence[float]) -> str:
    """The geometric mean of ratios, one for each trial, in words: with its 95% interval where there are several."""
    effect = log_effect(ratios)
    if not np.isfinite(effect.std_error):
        return f"{np.exp(effect.mean):.3g}"
    low, high = np.exp(effect.interval())
    return f"{np.exp(effect.mean):.3g} (95% interval {low:.3g} to {high:.3g})"


# ---- time ----


def seconds(call: Callable[[], Any], wait: Callable[[Any], object] = lambda result: None) -> float:
    """The time of a call, with ``wait(result)``, such as ``jax.block_until_ready``, for what it leaves undone."""
    start = time.perf_counter()
    wait(call())
    return time.perf_counter() - start


def in_turn(
    timers: Mapping[str, Callable[[], float]], rounds: int, done: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds by name, of timers that are called in turn in each round: what slows the machine slows all of them.

    Args:
      timers: {name: a call that returns its seconds}.
      rounds: how often each is called.
      done: called after each of these calls, for a progress bar.

    Returns:
      {name: [seconds of each round]}.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
            done()
    return times


def ratio(times: Sequence[float | None], reference: Sequence[float | None]) -> np.ndarray:
    """The time in times of another, round by round; rounds in which one of them was not timed are left out."""
    pairs = zip(times, reference, strict=True)
    return np.array([a / b for a, b in pairs if a is not None and b is not None])


def machine(backend: str, version: str) -> str:
    """The machine and its JAX, in words."""
    return f"{os.cpu_count()} {platform.machine()} cores, {backend}, jax {version}"
