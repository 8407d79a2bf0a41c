"""Rules by which verdicts are made, on made numbers of which the answer is known."""

import json

import numpy as np
import pytest
import scipy.stats

from experiments import arms, report, statistics
from experiments.statistics import Effect
from experiments.studies import fig8, fig14, gamma

FMNIST = fig14.Config(model="lenet", dataset="fashion_mnist", trials=3)
LARGE = report.Reported({"ce": (18.20, 0.45), "htr": (15.11, 0.22)}, 5, comparable=False)
SMALL = report.Reported({"ce": (11.22, 0.11), "htr": (11.14, 0.04)}, 5)
CLAIM = report.Claim("htr", "ce", "HTR lowers the test error")


def arms_that_differ(points, by=(0.0, 0.01, -0.01)):
    """Test errors of two arms in three trials, whose differences are so many points, more or less."""
    ce = np.array([0.40, 0.41, 0.39])
    return {"ce": ce, "htr": ce + (points + np.array(by)) / 100}


def test_excluding_a_large_effect_is_not_excluding_one_that_counts():
    wide = arms_that_differ(0.4, (0.0, 0.5, -0.5))  # no gain of 3 points, and perhaps one of 0.8
    said = report.judge(CLAIM, wide, 2, LARGE).splitlines()
    p = 2 * statistics.paired(100 * wide["htr"], 100 * wide["ce"]).p_equivalence(3.09)
    assert p < 0.05
    assert said[0] == (
        f"HTR lowers the test error: not decided (a difference as large as the paper's is excluded, p = {p:.2g})"
    )
    assert "within +-0.100: p = 1;" in said[1]
    narrow = report.judge(CLAIM, arms_that_differ(0.0), 2, LARGE)
    assert narrow.startswith("HTR lowers the test error: does not hold\n")


def test_a_small_effect_of_the_paper_is_the_margin_itself():
    assert SMALL.margin(CLAIM) == pytest.approx(0.08) and LARGE.margin(CLAIM) == report.NO_MARGIN == 0.1
    assert report.Reported({}, 5).margin(CLAIM) == 0.1
    assert arms.margin(FMNIST) == pytest.approx(0.08)
    assert arms.margin(fig14.Config(model="vgg11", dataset="cifar10")) == 0.1
    found = arms_that_differ(0.0, (0.0, 0.03, -0.03))
    p = statistics.paired(100 * found["htr"], 100 * found["ce"]).p_equivalence(0.08)
    assert f"within +-0.080: p = {p:.3g};" in report.judge(CLAIM, found, 1, SMALL)
    unsure = report.judge(CLAIM, arms_that_differ(0.0, (0.0, 0.2, -0.2)), 1, SMALL)
    assert unsure.startswith("HTR lowers the test error: not decided\n")  # and nothing is excluded


@pytest.mark.parametrize(
    ("rivals", "expected"),
    [
        ([Effect(-1.0, 0.1, 4), Effect(-2.0, 0.1, 4)], "holds"),
        ([Effect(-1.0, 0.1, 4), Effect(1.0, 0.1, 4)], "does not hold"),
        ([Effect(-1.0, 0.1, 4), Effect(-0.1, 0.1, 4)], "not decided"),
        ([Effect(0.3, 0.1, 4)], "does not hold"),  # p = 0.04
        ([Effect(0.3, 0.1, 4)] * 2, "not decided"),  # for two rivals 0.08
        ([Effect(-1.0, float("nan"), 4)], "not decided"),
    ],
)
def test_the_best_is_judged_against_each_rival(rivals, expected):
    assert statistics.best(rivals) == expected


@pytest.mark.parametrize(
    ("verdicts", "agreed", "together"),
    [
        (["holds", "holds"], "holds", "holds"),
        (["holds", "not decided"], "not decided", "holds in part"),
        (["holds", "does not hold"], "not decided", "holds in part"),
        (["does not hold", "not decided"], "not decided", "not decided"),
        (["does not hold", "does not hold"], "does not hold", "does not hold"),
        (["not decided", "holds in part"], "not decided", "holds in part"),
    ],
)
def test_verdicts_of_ways_to_look_and_of_parts(verdicts, agreed, together):
    assert statistics.agreed(verdicts) == agreed and statistics.together(verdicts) == together
    assert statistics.agreed(verdicts[::-1]) == agreed and statistics.together(verdicts[::-1]) == together


def saved(folder, errors):
    """A kept sweep with these test errors, of which each has a history of two epochs."""
    numbers = {
        name: {"test_error": [[0.5, e] for e in values], "train_accuracy": [[0.5, 0.6]] * 3}
        for name, values in errors.items()
    }
    (folder / "numbers.json").write_text(json.dumps(numbers))


def test_the_coefficient_of_the_paper_is_compared_with_each_other_one(tmp_path, capsys):
    errors = {"no HTR": [0.12, 0.13, 0.14], "gamma = 0.001": [0.1201, 0.13, 0.1399]}
    errors["gamma = 0.01"] = [0.125, 0.1351, 0.1449]
    saved(tmp_path, errors)
    fig14.draw(FMNIST, tmp_path)
    printed = capsys.readouterr().out
    p = 2 * scipy.stats.ttest_rel(errors["gamma = 0.01"], errors["no HTR"]).pvalue
    assert "gamma = 0.01 is the best, p multiplied by the 2 tests: does not hold" in printed
    assert (
        f"test error gamma = 0.01 - no HTR: 0.500 points, 95% interval 0.475 to 0.525, paired t-test p = {p:.3g}"
        in (printed)
    )
    saved(tmp_path, {name: values for name, values in errors.items() if name != "gamma = 0.01"})
    fig14.draw(FMNIST, tmp_path)
    assert "is the best" not in capsys.readouterr().out


def test_rare_penalties_lose_nothing_where_they_stay_within_the_effect_of_the_paper(tmp_path, capsys):
    errors = {"no HTR": [0.12, 0.13, 0.14], "f_r = 25": [0.12, 0.13, 0.14], "f_r = 50": [0.1202, 0.1302, 0.1397]}
    saved(tmp_path, errors)
    fig8.draw(fig8.Config(model="lenet", dataset="fashion_mnist", intervals=(25, 50)), tmp_path)
    printed = capsys.readouterr().out
    effect = statistics.paired(*(100 * np.array(errors[name]) for name in ("f_r = 50", "f_r = 25")))
    assert effect.p_equivalence(0.08) < effect.p_equivalence(0.07)
    assert f"within +-0.080: p = {effect.p_equivalence(0.08):.3g};" in printed and "+-0.100" not in printed


# ---- the search for strengths ----


def tried(errors):
    return {"strength": 9.0, "trials": [{"held_out_error": error} for error in errors]}


def test_what_became_of_a_strength_at_which_training_fails():
    none = tried([0.2, 0.21, 0.22, 0.2])
    said = gamma.failing(tried([float("nan"), 0.9, 0.895, 0.215]), none, 0.9)
    assert said == (
        "at 9 1 of 4 trainings diverged; the others have held-out errors of 21.5 to 90.0%, 67.0% on average; 2 ended "
        "at chance, and 2 are worse than all without"
    )
    assert gamma.failing(tried([0.2, 0.3, 0.4, 0.5]), none, 0.9) == ""
    assert gamma.failing(tried([float("nan")] * 4), none, 0.9) == "at 9 4 of 4 trainings diverged"
    assert "2 of 4 trainings diverged" in gamma.failing(tried([float("nan"), 0.2] * 2), none, 0.9)


def test_stopping_early_for_all_seeds_and_for_each():
    errors = [[0.30, 0.20, 0.21], [0.30, 0.22, 0.24], [0.19, 0.21, 0.24]]
    said = gamma.stopping_early(errors)
    common, own = (scipy.stats.ttest_1samp(gains, 0).confidence_interval() for gains in ([1, 2, 3], [1, 2, 5]))
    assert said == (
        "the held-out error is 21.00% at its lowest, after epoch 2, and 23.00% after epoch 3: a gain of 2.00 (95% "
        f"interval {common.low:.2f} to {common.high:.2f}) points, of 2.67 (95% interval {own.low:.2f} to "
        f"{own.high:.2f}) with the best epoch of each seed"
    )


def test_traces_are_compared_seed_by_seed():
    records, others = ([{"trace": trace} for trace in some] for some in ([1.0, 2.0, 4.2], [2.0, 4.0, 8.0]))
    logs = np.log([0.5, 0.5, 0.525])
    low, high = np.exp(scipy.stats.t.interval(0.95, 2, logs.mean(), scipy.stats.sem(logs)))
    assert gamma.in_times(records, others) == f"0.508 (95% interval {low:.3g} to {high:.3g})"
    assert gamma.in_times([{"trace": -1.0}, *records[1:]], others) == "no ratio, for a trace is negative"


def test_eigenvalues_are_compared_by_sign():
    records = [{"trace": 5.0, "negative_trace": n} for n in (-2.0, -3.0, -4.0)]
    others = [{"trace": 5.0, "negative_trace": n} for n in (-1.0, -1.0, -3.0)]
    expected = scipy.stats.ttest_1samp([-1, -2, -1], 0)
    low, high = expected.confidence_interval()
    assert gamma.by_sign(records, others) == (
        f"sums of eigenvalues less those of none: negative -1.33 (95% interval {low:.3g} to {high:.3g}), p = "
        f"{expected.pvalue:.2g}; positive 1.33 (95% interval {-high:.3g} to {-low:.3g}), p = {expected.pvalue:.2g}"
    )


def test_held_out_errors_are_compared_in_points():
    records, others = ([{"held_out_error": e} for e in some] for some in ([0.1, 0.2, 0.3], [0.11, 0.22, 0.33]))
    expected = scipy.stats.ttest_1samp([-1, -2, -3], 0)
    low, high = expected.confidence_interval()
    assert gamma.held_out(records, others) == (
        f"-2.000 (95% interval {low:.3f} to {high:.3f}) points, p = {expected.pvalue:.2g}, not corrected"
    )
