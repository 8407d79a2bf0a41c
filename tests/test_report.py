"""What the experiments say of numbers: spreads, correlations, tables, and times taken in turn."""

import numpy as np
import pytest
import scipy.stats

from experiments import report, statistics


def test_spread_is_the_mean_and_the_sample_deviation():
    assert report.spread([1.0, 2.0, 6.0], ".3f") == f"3.000 +- {np.sqrt(7):.3f}"
    assert report.spread([2.0], ".1f") == "2.0"
    assert report.percent([0.01, 0.03]) == "2.00 +- 1.41"


def test_a_column_scales_what_it_shows():
    records = [{"gap": 0.5, "trace": 3.0}, {"gap": 0.25, "trace": 5.0}]
    assert report.GAP.cell(records) == "37.50 +- 17.68" and report.TRACE.cell(records) == "4 +- 1.414"


def test_tables_are_aligned(capsys):
    report.print_columns([["", "a", "long"], ["name", "10", "2"]])
    assert capsys.readouterr().out == "       a  long\nname  10     2\n"


def test_rank_correlation_has_a_p_value_of_many_only():
    x, y = [1, 2, 3, 5], [1, 3, 2, 4]
    assert report.rank_correlation(x, y, "here") == (
        f"rank correlation of trace and generalisation gap here {scipy.stats.spearmanr(x, y).statistic:.2f}"
    )
    assert "(p = " in report.rank_correlation(list(range(12)), list(range(12)), "there")


def test_rank_correlation_of_a_series_has_the_p_value_of_its_steps():
    rising, other = np.arange(15.0) + np.resize([0, 0.1], 15), np.arange(15.0) ** 2
    said = report.rank_correlation_of_series(rising, other)
    assert said.startswith("rank correlation of trace and generalisation gap over 15 epochs 1.00, of their changes")
    steps, p = statistics.rank_correlation_of_steps(rising, other)
    assert said.endswith(f"{steps:.2f} (p = {p:.2g})") and p > 0.05


def test_timers_take_turns_in_each_round():
    called, clock = [], iter(range(100))

    def timer(name):
        def call():
            called.append(name)
            return float(next(clock))

        return call

    done = []
    times = report.in_turn({name: timer(name) for name in "ab"}, 3, lambda: done.append(None))
    assert called == list("ababab") and len(done) == 6
    assert times == {"a": [0.0, 2.0, 4.0], "b": [1.0, 3.0, 5.0]}


def test_seconds_wait_for_what_a_call_leaves_undone(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])

    def later(seconds):
        now[0] += seconds
        return 2 * seconds

    assert report.seconds(lambda: later(1.5)) == 1.5
    assert report.seconds(lambda: later(1.5), later) == 4.5


def test_ratios_leave_out_rounds_that_were_not_timed():
    np.testing.assert_array_equal(report.ratio([2.0, None, 9.0, 1.0], [1.0, 1.0, 3.0, None]), [2.0, 3.0])


def test_a_claim_is_of_known_arms():
    with pytest.raises(KeyError):
        report.judge(report.Claim("a", "b", "words"), {"a": [1.0]})
