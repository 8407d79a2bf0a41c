"""What verdicts rest on: falls over training, nets at equal training loss, outliers of random spectra."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

import jaxhess as jh
from experiments import nulls
from experiments.studies import fig2, fig4, fig5

CONFIG = fig5.Config(model=("vgg11_bn", "vgg11"), dataset=("mnist",), trials=3)


def record(losses, traces, factor=2.0):
    """Of three trials, measured at epochs 0, 1 and 3; a factor is between the trace and its scale-free form."""
    trials = [[99.0, *row] for row in traces]
    return {
        "epochs": [0, 1, 3],
        "train_loss": losses,
        "trace/total": trials,
        "trace_norm2/conv1": (factor * np.array(trials)).tolist(),
        "trace_norm2/total": trials,
    }


# The net with batch norm ends at a loss of 0.1, the other one at 0.4, where the first has the trace sqrt(10 * 40).
FAST = record([[1.6, 0.9, 0.1]] * 3, [[10.0, 40.0]] * 3)
SLOW = record([[1.6, 1.0, 0.4]] * 3, [[30.0, 2.0], [30.0, 4.0], [30.0, 8.0]], factor=1.0)


def test_ratios_are_those_of_each_trial_at_the_end_and_at_the_loss_that_both_reach():
    last, equal, losses = fig5.ratios([FAST, SLOW], [net["trace/total"] for net in (FAST, SLOW)])
    assert last == pytest.approx([20, 10, 5]) and losses == [0.4] * 3
    between = 40 ** (1.2 / 1.5) * 10 ** (0.3 / 1.5)  # the loss goes from 1.6 to 0.1
    halfway = np.sqrt(40 * 10)  # as 0.4 is between these in the logarithm
    assert equal["the loss"] == pytest.approx(between / np.array([2, 4, 8]))
    assert equal["its logarithm"] == pytest.approx(halfway / np.array([2, 4, 8]))


def test_a_pair_is_compared_in_words():
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": FAST, "VGG11 on MNIST": SLOW}))
    assert found[0] == "batch norm on MNIST: in times the trace without, 3 trials"
    low, high = np.exp(scipy.stats.t.interval(0.95, 2, np.log(10), scipy.stats.sem(np.log([20, 10, 5]))))
    assert found[1] == f"  Tr(Hess): 10 (95% interval {low:.3g} to {high:.3g}) at the last epoch"
    assert found[2].startswith("  Tr(Hess): 7.58 (95%") and "interpolated in the loss, p = " in found[2]
    assert found[3].startswith("  Tr(Hess): 5 (95%") and "interpolated in its logarithm, p = " in found[3]
    assert found[4] == "  Tr(Hess): lower at equal training loss: not decided"
    assert found[5].startswith("  scale-free: 20 (95%") and found[6].startswith("  scale-free: 15.2 (95%")
    assert found[9] == "  the training losses at which they are compared: 0.4, 0.4, 0.4"


def test_the_claim_holds_where_every_trial_says_so():
    low = record([[1.6, 0.9, 0.1]] * 3, [[0.2, 0.1], [0.2, 0.11], [0.2, 0.12]])
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": low, "VGG11 on MNIST": SLOW}))
    assert found[4] == "  Tr(Hess): lower at equal training loss: holds"
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": SLOW, "VGG11 on MNIST": low}))
    assert found[4] == "  Tr(Hess): lower at equal training loss: does not hold"


def test_interpolations_that_disagree_decide_nothing():
    """From a loss of 1 to one of 1e-4 the trace falls a hundredfold: at 0.01 by either scale it is another."""
    trials = [[100.0, 100.0, 1.0], [100.0, 101.0, 1.01], [100.0, 99.0, 0.99]]
    rare = {"epochs": [0, 1, 3], "train_loss": [[1.0, 0.5, 1e-4]] * 3, "trace/total": trials}
    often = {"epochs": [0, 1, 3], "train_loss": [[1.0, 0.5, 1e-2]] * 3, "trace/total": [[100.0, 50.0, 5.0]] * 3}
    for record in (rare, often):
        record["trace_norm2/conv1"] = record["trace/total"]
    _, equal, _ = fig5.ratios([often, rare], [net["trace/total"] for net in (often, rare)])
    linear, logarithmic = 100**0.0099, 100**0.5
    assert equal["the loss"][0] == pytest.approx(5 / linear, rel=1e-3)
    assert equal["its logarithm"][0] == pytest.approx(5 / logarithmic, rel=1e-3)
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": often, "VGG11 on MNIST": rare}))
    assert found[4] == "  Tr(Hess): lower at equal training loss: not decided"
    said = list(fig5.at_equal_loss({"often": often, "rare": rare}))
    assert said == [
        "often: Tr(Hess) 5 at a training loss of 0.01; 5 by its logarithm",
        "rare: Tr(Hess) 1.047 at a training loss of 0.01; 10 by its logarithm",
    ]


def test_one_trial_has_no_interval_and_decides_nothing():
    one = [{key: value if key == "epochs" else value[:1] for key, value in net.items()} for net in (FAST, SLOW)]
    config = dataclasses.replace(CONFIG, trials=1)
    found = list(fig5.compared(config, dict(zip(("VGG11-BN on MNIST", "VGG11 on MNIST"), one, strict=True))))
    assert found[0].endswith("without, 1 trial")
    assert found[1:4] == [
        "  Tr(Hess): 20 at the last epoch",
        "  Tr(Hess): 15.2 at equal training loss, interpolated in the loss",
        "  Tr(Hess): 10 at equal training loss, interpolated in its logarithm",
    ]
    assert found[4].endswith("not decided")


def test_nets_without_a_partner_are_not_compared():
    config = dataclasses.replace(CONFIG, model=("vgg11_bn", "resnet18"))
    assert list(fig5.compared(config, {})) == []


def test_falls_are_judged_from_the_start_and_from_the_first_measurement_after_it():
    traces = [[10.0, 100.0, 2.0], [10.0, 120.0, 2.1], [10.0, 90.0, 1.9]]
    record = {
        "epochs": [0, 5, 10],
        "trace/total": traces,
        "lambda_max/total": [[1.0, 1.0, 9.0], *[[1.0, 1.0, 10.0]] * 2],
    }
    largest, trace = fig4.falls(record, tests=2)
    logs = np.log([0.2, 0.21, 0.19])
    low, high = np.exp(scipy.stats.t.interval(0.95, 2, logs.mean(), scipy.stats.sem(logs)))
    middle = np.exp(logs.mean())
    p = 2 * scipy.stats.ttest_1samp(logs, 0).pvalue
    start = f"that at epoch 0 {middle:.3g} (95% interval {low:.3g} to {high:.3g}), p = {p:.2g}"
    assert trace.startswith(f"trace at epoch 10, in times {start}; that at epoch 5 0.0195 (95%")
    assert trace.endswith("; p multiplied by the 2 tests; falls: holds, holds; together: holds")
    assert largest.count("9.65 (95% interval") == 2
    assert largest.endswith("falls: does not hold, does not hold; together: does not hold")


def test_a_fall_from_the_start_alone_is_one_in_part():
    ends = [[100.0, 3.0, 1.0], [100.0, 1.0, 1.1], [100.0, 0.5, 0.9]]
    record = {"epochs": [0, 5, 10], "trace/total": ends, "lambda_max/total": ends}
    for line in fig4.falls(record, tests=4):
        assert line.endswith("p multiplied by the 4 tests; falls: holds, not decided; together: holds in part")


def test_every_layer_falls_as_surely_as_the_least_sure_one():
    sure, unsure = [[10.0, 9.0, 1.0], [10.0, 9.5, 1.1], [10.0, 9.2, 0.9]], [[10.0, 9.0, 8.0], [10.0, 9.0, 0.1]]
    record = {"epochs": [0, 5, 10], "lambda_max/a": sure, "lambda_max/b": [*unsure, [10.0, 9.0, 2.0]]}
    record["lambda_max/total"] = [[1.0, 1.0, 2.0]] * 3
    first, _ = fig4.layers_fall(record, tests=2)
    assert first == (
        "lambda_max of a layer falls from epoch 0 in every trial in 2 of 2; surely, p multiplied by 2, in 1; in every "
        "layer: not decided"
    )
    assert next(fig4.layers_fall(record | {"lambda_max/b": sure}, tests=2)).endswith("in 2; in every layer: holds")
    grows = [row[::-1] for row in sure]
    assert next(fig4.layers_fall(record | {"lambda_max/b": grows}, tests=2)).endswith("in every layer: does not hold")


def test_one_training_does_not_decide_whether_curvature_falls():
    record = {"epochs": [0, 5, 10], "trace/total": [[10.0, 100.0, 2.0]], "lambda_max/total": [[1.0, 1.0, 9.0]]}
    _, trace = fig4.falls(record)
    assert trace == (
        "trace at epoch 10, in times that at epoch 0 0.2; that at epoch 5 0.02; p multiplied by the 1 tests; falls: "
        "not decided, not decided; together: not decided"
    )


def test_outliers_are_counted_in_random_spectra_too():
    steps = jh.Spectrum.from_eigenvalues(np.array([100.0, 90.0, 80.0, *np.linspace(2.0, 1.0, 97)]), 1000)
    words = nulls.outliers([steps], draws=10)
    ours, random = words.split(";")
    assert ours == "outliers of the spectra of G: 0 or 1 in 0, 2 to 20 in 1, more in 0"
    counts = [int(part.split()[-1]) for part in random.split(",")]
    assert sum(counts) == 10 and counts[1] <= 1


def test_vectors_that_lie_together_by_output_are_told_from_those_by_class():
    """One-hot vectors of c, or of c', for four classes; the four behind them, delta_c, play no part."""
    index, noise = np.nonzero(~np.eye(4, dtype=bool)), np.random.default_rng(0).normal(size=(12, 4))
    by_class, by_output = (np.concatenate([10 * np.eye(4)[each] + noise, np.zeros((4, 4))]) for each in index)
    assert fig2.of_outputs(by_output, 4) > 0.6 and fig2.of_outputs(by_class, 4) < 0
    assert fig2.silhouettes(by_class, 4, 1, 0)["silhouette"] > 0.6
