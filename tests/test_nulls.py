"""Nulls and scale-free spectra beside the distances of figure 3, against closed forms."""

import json

import numpy as np
import pytest

import jaxhess as jh
from experiments import nulls, run
from experiments.studies import fig3, fig5

EIGHT = jh.Spectrum.from_eigenvalues(np.array([4.0, 2.0]), 8)


def test_a_spectrum_of_zeros_is_as_far_as_the_mean_size_of_the_eigenvalues():
    zero = nulls.zeros(EIGHT)
    assert (zero.dim, zero.trace, zero.lambda_max) == (8, 0.0, 0.0)
    assert jh.wasserstein(zero, EIGHT) == pytest.approx(6 / 8)
    mixed = jh.Spectrum.from_eigenvalues(np.array([-3.0, 1.0, 5.0]), 9)
    assert nulls.compare(EIGHT, mixed, "wasserstein")["all zero"] == pytest.approx(1 / 8)  # 9 / 9, of a range of 8


def test_the_random_one_keeps_trace_size_and_number():
    found = [nulls.divided_at_random(EIGHT, np.random.default_rng(seed)) for seed in range(2000)]
    for one in found[:50]:
        assert one.dim == 8 and one.trace == pytest.approx(6.0) and one.lambda_min == 0.0
        assert np.sum(one.nodes > 0) == 2 and one.weights.sum() == pytest.approx(1.0)
    # Of two uniform shares the larger is uniform from a half to one.
    largest = np.array([one.lambda_max for one in found]) / 6
    assert largest.mean() == pytest.approx(0.75, abs=0.01) and largest.var() == pytest.approx(1 / 48, rel=0.1)
    full = nulls.divided_at_random(jh.Spectrum.from_eigenvalues(np.array([1.0, 2.0])), np.random.default_rng(0))
    assert full.dim == 2 and full.trace == pytest.approx(3.0)


@pytest.mark.parametrize(("by", "trace", "largest"), [("lmax", 1.5, 1.0), ("trace", 1.0, 2 / 3)])
def test_scaling(by, trace, largest):
    found = nulls.scaled(EIGHT, by)
    assert found.trace == pytest.approx(trace) and found.lambda_max == pytest.approx(largest) and found.dim == 8
    zero = nulls.zeros(EIGHT)
    assert nulls.scaled(zero, by).lambda_max == 0.0


def test_zeros_are_left_out_up_to_rounding():
    found = nulls.without_zeros(jh.Spectrum([-1e-6, 0.0, 1e-6, 2.0, 4.0], [0.25, 0.25, 0.25, 0.125, 0.125], 8))
    assert found.nodes.tolist() == [2.0, 4.0] and found.weights.tolist() == [0.5, 0.5]
    assert found.dim == 2 and found.trace == pytest.approx(6.0)
    negative = nulls.without_zeros(jh.Spectrum([-3.0, 0.0], [0.5, 0.5], 2))
    assert negative.nodes.tolist() == [-3.0]
    zero = nulls.zeros(EIGHT)
    assert nulls.without_zeros(zero) is zero


@pytest.mark.parametrize("distance", nulls.DISTANCES)
def test_what_differs_in_scale_and_in_zeros_alone_is_equal_without_them(distance):
    values = np.array([1.0, 2.0, 5.0])
    layer, total = jh.Spectrum.from_eigenvalues(values, 30), jh.Spectrum.from_eigenvalues(3 * values, 300)
    found = nulls.compare(layer, total, distance)
    assert list(found) == list(nulls.COMPARISONS)
    for name in ("/lmax, no 0", "/trace, no 0"):
        assert found[name] == pytest.approx(0.0, abs=1e-9)
    for name in ("as it is", "/lmax", "/trace", "all zero", "random"):
        assert found[name] > 1e-6
    if distance == "wasserstein":
        # The areas between the distributions from one eigenvalue to the next; scaled they lie on one side.
        areas = np.array([27, 17, 7, 2 * 8, 2, 9 * 1]) / 300
        assert found["as it is"] == pytest.approx(areas.sum() / 15)
        assert found["/trace"] == pytest.approx(1 / 30 - 1 / 300)
        assert found["/lmax"] == pytest.approx(8 / 5 * (1 / 30 - 1 / 300))


@pytest.mark.parametrize(
    ("distances", "expected"),
    [([4, 1, 1, 1, 4], 1.0), ([1, 4, 4, 4, 1], 0.0), ([1, 1, 1, 1, 1], 0.5), ([2, 1, 3, 3, 2], 1 / 3)],
)
def test_how_often_a_middle_layer_is_closer(distances, expected):
    assert nulls.closer(dict(zip("abcde", distances, strict=True))) == pytest.approx(expected)


def test_the_ratio_is_one_of_geometric_means():
    distances = dict(zip("abcde", [1.0, 2.0, 4.0, 8.0, 9.0], strict=True))
    assert nulls.ratio(distances) == pytest.approx(4 / 3)
    assert nulls.ratio(distances, dict.fromkeys("abcde", 8.0)) == pytest.approx(1 / 2)
    assert np.isnan(nulls.ratio(distances | {"c": 0.0})) and np.isnan(nulls.ratio({"a": 1.0}))


def trainings(changed=(), count=3):
    """Trainings in which the middle layers are the closest in each comparison, but for some."""
    rng = np.random.default_rng(0)

    def one(name):
        if name in nulls.NULLS:
            return dict.fromkeys("abcde", 0.5 if name in changed else 10.0 + rng.uniform())
        order = [1, 4, 5, 4.5, 2] if name in changed else [8, 1, 2, 1.5, 1.7]
        return dict(zip("abcde", order + 0.5 * rng.uniform(size=5), strict=True))

    return [{name: one(name) for name in nulls.COMPARISONS} for _ in range(count)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ((), "holds"),
        (("all zero",), "holds in part"),
        (("random",), "holds in part"),
        (("/lmax, no 0",), "holds in part"),
        (("as it is",), "does not hold"),
    ],
)
def test_the_verdict_needs_nulls_and_scale_free_distances(changed, expected):
    assert nulls.verdict(trainings(changed, count=12)) == expected


def test_one_training_decides_nothing():
    assert nulls.verdict(trainings(count=1)) == "not decided"


def test_what_fig1_kept_is_compared_without_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["model=mlp", "dataset=digits", "epochs=1", "images_per_class=1", "num_steps=4"]
    out = ["out=results/fig1-mlp-digits", "keep=true"]
    assert run.main(["fig1", *words, "num_probes=2", *out]) == 0
    capsys.readouterr()
    assert run.main(["fig3", "model=mlp", "dataset=digits", "from_fig1=true"]) == 0
    printed = capsys.readouterr().out
    assert "MLP on digits, Hess: test error" in printed and "MLP on digits, G: test error" in printed
    assert printed.count("1 training: not decided") == 6
    found = json.loads((tmp_path / "runs" / "fig3-mlp-digits" / "numbers.json").read_text())
    kept = json.loads((tmp_path / "results" / "fig1-mlp-digits" / "numbers.json").read_text())
    for name, kind in (("Hess", "hessian"), ("G", "ggn")):
        record = found[f"MLP on digits, {name}"]
        for metric, values in kept["distances"][kind].items():
            assert {layer: [value] for layer, value in values.items()} == record["distances"][metric]
            if metric in nulls.DISTANCES:
                assert record["comparisons"][metric][0]["as it is"] == pytest.approx(values)
    assert not list((tmp_path / "runs" / "fig3-mlp-digits").glob("net-*"))
    assert run.main(["fig12", "model=mlp", "dataset=digits", "from_fig1=true", "dry_run=true"]) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert run.main(["fig3", "model=lenet", "dataset=digits", "from_fig1=true"]) == 2
    assert "run fig1 model=lenet dataset=digits first" in capsys.readouterr().err


def test_comparisons_are_means_over_the_start_vectors_of_a_training():
    spectra = [{"a": EIGHT, "total": jh.Spectrum([0.0, scale], [0.5, 0.5], 16)} for scale in (6.0, 10.0)]
    found = fig3.compared([spectra, spectra[:1]])
    each = [nulls.compare(one["a"], one["total"], "wasserstein")["/trace"] for one in spectra]
    assert [one["/trace"]["a"] for one in found["comparisons"]["wasserstein"]] == pytest.approx(
        [np.mean(each), each[0]]
    )
    assert found["params"] == {"a": 8, "total": 16} and found["lambda_max"]["total"] == [6.0, 10.0, 6.0]


def test_traces_are_compared_at_equal_training_loss():
    def record(losses, traces, epochs=(0, 1, 2, 3)):
        return {"epochs": list(epochs), "train_loss": [losses], "trace/total": [[99.0, *traces]]}

    nets = {"a": record([2.0, 1.0, 0.5], [10.0, 100.0, 1000.0]), "b": record([1.6, 1.7, 0.75], [4.0, 8.0, 16.0])}
    # Of b the second epoch did not lower the loss; of a the trace is half way, in logarithms, at 0.75.
    assert list(fig5.at_equal_loss(nets)) == [
        f"a: Tr(Hess) 316.2 at a training loss of 0.75; {100 * 10 ** np.log2(1 / 0.75):.4g} by its logarithm",
        "b: Tr(Hess) 16 at a training loss of 0.75; 16 by its logarithm",
    ]
    apart = {"a": record([2.0, 1.5, 1.4], [1.0, 1.0, 1.0]), "b": record([0.9, 0.8, 0.7], [1.0, 1.0, 1.0])}
    (line,) = fig5.at_equal_loss(apart)
    assert line.startswith("no training loss is common to all nets")
