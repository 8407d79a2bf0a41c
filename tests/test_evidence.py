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
    assert equal == pytest.approx(between / np.array([2, 4, 8]))


def test_a_pair_is_compared_in_words():
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": FAST, "VGG11 on MNIST": SLOW}))
    assert found[0] == "batch norm on MNIST: in times the trace without, 3 trials"
    low, high = np.exp(scipy.stats.t.interval(0.95, 2, np.log(10), scipy.stats.sem(np.log([20, 10, 5]))))
    assert found[1].startswith(f"  Tr(Hess): 10 (95% interval {low:.3g} to {high:.3g}) at the last epoch, 7.58 (95%")
    assert found[2] == "  Tr(Hess): lower at equal training loss: not decided"
    assert found[3].startswith("  scale-free: 20 (95%") and "15.2 (95%" in found[3]
    assert found[5] == "  the training losses at which they are compared: 0.4, 0.4, 0.4"


def test_the_claim_holds_where_every_trial_says_so():
    low = record([[1.6, 0.9, 0.1]] * 3, [[10.0, 0.1], [10.0, 0.11], [10.0, 0.12]])
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": low, "VGG11 on MNIST": SLOW}))
    assert found[2] == "  Tr(Hess): lower at equal training loss: holds"
    found = list(fig5.compared(CONFIG, {"VGG11-BN on MNIST": SLOW, "VGG11 on MNIST": low}))
    assert found[2] == "  Tr(Hess): lower at equal training loss: does not hold"


def test_one_trial_has_no_interval_and_decides_nothing():
    one = [{key: value if key == "epochs" else value[:1] for key, value in net.items()} for net in (FAST, SLOW)]
    config = dataclasses.replace(CONFIG, trials=1)
    found = list(fig5.compared(config, dict(zip(("VGG11-BN on MNIST", "VGG11 on MNIST"), one, strict=True))))
    assert found[0].endswith("without, 1 trial")
    assert found[1] == "  Tr(Hess): 20 at the last epoch, 15.2 at equal training loss"
    assert found[2].endswith("not decided")


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
    start = f"that at epoch 0 {middle:.3g} (95% interval {low:.3g} to {high:.3g}), falls: holds"
    assert trace.startswith(f"trace at epoch 10, in times {start}; that at epoch 5 0.0195 (95%")
    assert trace.endswith(", falls: holds")
    assert largest.count("9.65 (95% interval") == 2 and largest.count("falls: does not hold") == 2


def test_one_training_does_not_decide_whether_curvature_falls():
    record = {"epochs": [0, 5, 10], "trace/total": [[10.0, 100.0, 2.0]], "lambda_max/total": [[1.0, 1.0, 9.0]]}
    _, trace = fig4.falls(record)
    assert trace == (
        "trace at epoch 10, in times that at epoch 0 0.2, falls: not decided; that at epoch 5 0.02, falls: not decided"
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
