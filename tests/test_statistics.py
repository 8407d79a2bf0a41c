"""Effects, their tests, equivalence, power and verdicts: beside SciPy's tests, closed forms, and simulated data."""

import numpy as np
import pytest
import scipy.stats

from experiments import statistics
from experiments.statistics import Effect

ONE, TWO = [0.10, 0.12, 0.15, 0.11], [0.20, 0.19, 0.26, 0.18]


def test_a_paired_effect_is_that_of_the_t_test():
    found, expected = statistics.paired(ONE, TWO), scipy.stats.ttest_rel(ONE, TWO)
    assert found.p_value() == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert found.interval() == pytest.approx((interval.low, interval.high))
    shifted = scipy.stats.ttest_1samp(np.subtract(ONE, TWO), -0.05)
    assert found.p_value(-0.05) == pytest.approx(shifted.pvalue)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([0.1], [0.2]),
        ([0.1, 0.2], [0.1, 0.2]),
        ([np.float32(x) for x in (0.1049, 0.106, 0.1102)], [np.float32(x) for x in (0.105, 0.1061, 0.1103)]),
        ([float("nan"), 0.1], [0.2, 0.3]),
    ],
)
def test_no_error_where_there_is_nothing_to_take_it_from(one, two):
    found = statistics.paired(one, two)
    assert np.isnan(found.std_error) and np.isnan(found.p_value()) and np.isnan(found.p_equivalence(1.0))
    assert statistics.verdict(found, margin=1.0) == "not decided"


@pytest.mark.parametrize("trials", [3, 5])
def test_reported_means_are_compared_as_welch_does(trials):
    for one, two in [((18.20, 0.45), (15.11, 0.22)), ((1.25, 0.03), (1.19, 0.07))]:
        found = statistics.unpaired(one, two, trials)
        expected = scipy.stats.ttest_ind_from_stats(*one, trials, *two, trials, equal_var=False)
        assert found.p_value() == pytest.approx(expected.pvalue)
        assert found.mean / found.std_error == pytest.approx(expected.statistic)


def test_a_difference_of_effects_adds_their_variances():
    found = statistics.difference(Effect(1.0, 3.0, 4), Effect(0.5, 4.0, 8))
    assert found[:2] == (0.5, 5.0) and found.df == pytest.approx(25**2 / (9**2 / 4 + 16**2 / 8))
    exact = statistics.difference(Effect(1.0, 3.0, 4), Effect(0.5, 0.0, 4))
    assert exact == Effect(0.5, 3.0, 4)


def test_equivalence_is_two_one_sided_tests():
    differences = np.subtract(ONE, TWO)
    found = statistics.paired(ONE, TWO)
    for margin in (0.05, 0.09, 0.12, 0.3):
        above = scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue
        assert found.p_equivalence(margin) == pytest.approx(max(above, below))
    # At 5% just where the 90% interval touches the margin.
    assert found.p_equivalence(-found.interval(0.1)[0]) == pytest.approx(0.05)


@pytest.mark.parametrize(("count", "tabled"), [(3, 3.26), (5, 1.68), (10, 0.996), (20, 0.660), (100, 0.283)])
def test_the_smallest_difference_found_is_that_of_tables(count, tabled):
    """Effect sizes d of a paired t-test with 80% power at 5%, as tables of power have them (Cohen 1988)."""
    one_deviation = Effect(0.0, 1 / np.sqrt(count), count - 1)
    assert one_deviation.smallest_found() == pytest.approx(tabled, rel=5e-3)


def test_the_smallest_difference_is_found_as_often_as_it_says():
    count, deviation = 5, 2.0
    smallest = Effect(0.0, deviation / np.sqrt(count), count - 1).smallest_found()
    found = scipy.stats.power(
        scipy.stats.ttest_1samp,
        (lambda size: np.random.default_rng(0).normal(smallest, deviation, size),),
        (count,),
        n_resamples=4000,
        significance=0.05,
        kwargs={"popmean": 0.0},
    )
    assert found.power == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("effect", "options", "expected"),
    [
        (Effect(-1.0, 0.1, 4), {}, "holds"),
        (Effect(-1.0, 0.1, 4), {"margin": 0.5}, "holds"),
        (Effect(-1.0, 0.1, 4), {"margin": 2.0}, "holds in part"),  # there, and too small to matter
        (Effect(-1.0, 0.1, 4), {"reported": Effect(-3.0, 0.2, 4)}, "holds in part"),  # a third of what was reported
        (Effect(-1.0, 0.1, 4), {"reported": Effect(-1.2, 0.2, 4)}, "holds"),
        (Effect(-3.0, 0.2, 4), {"reported": Effect(-1.0, 0.1, 4)}, "holds"),  # more than was reported
        (Effect(1.0, 0.1, 4), {}, "does not hold"),
        (Effect(0.01, 0.1, 4), {"margin": 1.0}, "does not hold"),  # none, to within the margin
        (Effect(0.01, 0.1, 4), {}, "not decided"),  # nothing counts as none
        (Effect(0.01, 0.1, 4), {"margin": 0.1}, "not decided"),  # the margin is within the error
        (Effect(-0.3, 0.1, 4), {}, "holds"),  # p = 0.04
        (Effect(-0.3, 0.1, 4), {"tests": 2}, "not decided"),
        (Effect(0.3, 0.1, 4), {"tests": 2}, "not decided"),
        (Effect(0.01, 0.1, 4), {"margin": 0.25, "tests": 2}, "not decided"),  # p = 0.037 for one
        (Effect(0.01, 0.1, 4), {"margin": 0.25}, "does not hold"),
    ],
)
def test_verdicts_of_known_cases(effect, options, expected):
    assert statistics.verdict(effect, **options) == expected and expected in statistics.VERDICTS


@pytest.mark.parametrize(
    ("effect", "margin", "expected"),
    [
        (Effect(0.01, 0.1, 4), 1.0, "holds"),
        (Effect(-0.5, 0.1, 4), 1.0, "holds in part"),
        (Effect(-1.0, 0.1, 4), 1.0, "does not hold"),
        (Effect(0.01, 0.1, 4), 0.1, "not decided"),
        (Effect(0.01, 0.1, 4), 0.25, "holds"),
    ],
)
def test_verdicts_of_no_difference(effect, margin, expected):
    assert statistics.verdict_of_no_difference(effect, margin) == expected
    assert statistics.verdict_of_no_difference(Effect(0.01, 0.1, 4), 0.25, tests=2) == "not decided"


def test_two_series_that_grow_are_not_correlated_for_that():
    """Of independent random walks, plain Spearman finds a relation in most pairs; their steps in one of twenty."""
    generator = np.random.default_rng(1)
    plain = steps = 0
    for _ in range(200):
        one, two = (np.cumsum(generator.normal(size=15)) for _ in range(2))
        plain += scipy.stats.spearmanr(one, two).pvalue <= 0.05
        steps += statistics.rank_correlation_of_steps(one, two, resamples=199)[1] <= 0.05
    assert plain > 80 and steps <= 20


def test_steps_that_go_together_are_found():
    generator = np.random.default_rng(2)
    one = np.cumsum(generator.normal(size=15))
    two = one + 0.1 * generator.normal(size=15)
    statistic, p = statistics.rank_correlation_of_steps(one, two)
    assert statistic == pytest.approx(scipy.stats.spearmanr(np.diff(one), np.diff(two)).statistic)
    assert statistic > 0.9 and p < 0.02
    assert statistics.rank_correlation_of_steps(one, two) == (statistic, p)


def test_blocks_of_one_are_the_permutation_test():
    generator = np.random.default_rng(3)
    one, two = (np.cumsum(generator.normal(size=9)) for _ in range(2))

    def statistic(x):
        return scipy.stats.spearmanr(x, np.diff(two)).statistic

    expected = scipy.stats.permutation_test(
        (np.diff(one),), statistic, permutation_type="pairings", n_resamples=4000, rng=np.random.default_rng(0)
    )
    found = statistics.rank_correlation_of_steps(one, two, block=1, resamples=4000)[1]
    assert found == pytest.approx(expected.pvalue, abs=0.03)


def test_a_series_that_stands_still_has_no_rank_correlation():
    statistic, p = statistics.rank_correlation_of_steps([1, 2, 3, 4, 5], [1, 3, 2, 4, 3], resamples=9)
    assert np.isnan(statistic) and np.isnan(p)
