"""What numbers say, in words and tables: spreads, claims and their tests, rank correlations, times.

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
TRACE, NEGATIVE = Column("trace", 1, ".4g"), Column("negative_trace", 1, ".3g")
LAMBDA_MAX, LAMBDA_MIN = Column("lambda_max", 1, ".4g"), Column("lambda_min", 1, ".3g")


def spread(values: Sequence[float], form: str) -> str:
    """Mean +- standard deviation; of one value the value alone."""
    mean = format(np.mean(values), form)
    return f"{mean} +- {format(np.std(values, ddof=1), form)}" if len(values) > 1 else mean


def paired_p(one: Sequence[float], two: Sequence[float]) -> float:
    """The p-value of the paired t-test; NaN for a single pair, or differences that vary by rounding alone."""
    differences = np.subtract(one, two)
    # Errors are kept in float32: equal counts of wrong answers differ in the eighth digit, and the test would see that.
    if len(one) < 2 or not np.ptp(differences) > 1e-6 * np.abs([one, two]).max():
        return float("nan")
    return float(scipy.stats.ttest_rel(one, two).pvalue)


def judge(claim: Claim, values: Mapping[str, Sequence[float]], tests: int = 1) -> str:
    """Whether a claim is seen, in words.

    Args:
      claim: what is claimed.
      values: {arm: one value for each trial}, the same seeds in all.
      tests: how many such claims are looked at, by which p is multiplied (Bonferroni).

    Returns:
      A line with the mean difference, its standard deviation and p.
    """
    lower, higher = values[claim.lower], values[claim.higher]
    p = float(np.minimum(1.0, tests * paired_p(lower, higher)))  # NaN stays NaN
    if not p <= 0.05:
        verdict = "not decided at this size"
    else:
        verdict = "seen" if np.mean(lower) < np.mean(higher) else "the opposite is seen"
    percent = claim.metric == "test_error"
    difference = spread(np.subtract(lower, higher) * (100 if percent else 1), ".3f" if percent else ".4g")
    of = f"{METRICS[claim.metric]} {claim.lower} - {claim.higher}"
    test = "no paired t-test" if np.isnan(p) else f"paired t-test p = {p:.3g}"
    return f"{claim.words}: {verdict} ({of}: {difference}{' points' if percent else ''}, {test})"


def rank_correlation(traces: Sequence[float], gaps: Sequence[float], where: str) -> str:
    """How far the trace goes with the generalisation gap, in words: Spearman's rank correlation."""
    found = scipy.stats.spearmanr(traces, gaps)
    # The p-value is asymptotic: of three epochs in a row it would be zero.
    p_value = f" (p = {found.pvalue:.2g})" if len(traces) >= 10 else ""
    return f"rank correlation of trace and generalisation gap {where} {found.statistic:.2f}{p_value}"


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
