"""The figures on curvature: from end to end on a small net, and what their parts compute."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import scipy.stats

import jaxhess as jh
from experiments import data, figures, measure, models, plot, run
from experiments.studies import estimators, fig2, interactions, outliers

MLP = ["model=mlp", "dataset=digits", "epochs=2", "images_per_class=2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all: nets that are trained alike are trained once."""
    return tmp_path_factory.mktemp("results")


def numbers(folder):
    return json.loads((folder / "numbers.json").read_text())


def ran(out, capsys, name, *words):
    assert run.main([name, f"out={out / name}", *MLP, *words]) == 0
    return capsys.readouterr().out


def redraws_alike(out, name):
    figure = out / name / "figure.png"
    first = figure.read_bytes()
    assert run.main([name, f"out={out / name}", "redraw=true"]) == 0
    assert figure.read_bytes() == first and len(first) < 200_000


def test_class_structure(out, capsys, monkeypatch):
    monkeypatch.setattr(fig2, "TSNE", functools.partial(fig2.TSNE, max_iter=250))  # the fewest that it takes
    printed = ran(out, capsys, "fig2", "shuffles=5")
    found = numbers(out / "fig2")["layers"]
    assert list(found) == ["fc1", "fc2", "fc3", "total"] and all(layer in printed for layer in found)
    for record in found.values():
        parts = sum(record["traces"][part] for part in fig2.PARTS)
        assert parts == pytest.approx(record["traces"]["total"], rel=1e-5)
        assert -1 <= record["shuffled"] <= record["shuffled_max"] <= 1
    redraws_alike(out, "fig2")  # t-SNE with a fixed seed too: what is drawn is kept
    before = (out / "fig2" / "figure.png").read_bytes()
    ran(out, capsys, "fig2", "shuffles=5", "overwrite=true")
    assert (out / "fig2" / "figure.png").read_bytes() == before


def test_silhouettes_tell_clusters_from_none():
    rng = np.random.default_rng(0)
    noise, centres = rng.normal(size=(20, 3)), np.repeat(np.eye(5) * 20, 4, axis=0)[:, :3]
    for points, clustered in ((noise, False), (noise + centres, True)):
        found = fig2.silhouettes(np.concatenate([points, np.zeros((5, 3))]), 5, 20, 0)
        assert (found["silhouette"] > found["shuffled_max"] + 0.1) == clustered


def test_distances_with_trials_and_draws(out, capsys):
    printed = ran(out, capsys, "fig3", "trials=2", "draws=3", "num_steps=4")
    (record,) = numbers(out / "fig3").values()
    assert set(record["distances"]) == set(plot.METRICS)
    for values in record["distances"].values():
        assert list(values) == ["fc1", "fc2", "fc3"]
        assert all(len(six) == 6 and len(set(six)) == 6 for six in values.values())
    assert " of 6" in printed and "lambda_max" in printed
    redraws_alike(out, "fig3")


def test_the_legacy_distance_is_one_of_density_values():
    a, b = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2), jh.Spectrum([5.0, 6.0], [0.5, 0.5], 2)
    # Shifted by five it is the same set of values, and the distance zero, where the real one is five.
    assert measure.legacy_wasserstein(a, b) == pytest.approx(0, abs=1e-12)
    assert jh.wasserstein(a, b) == pytest.approx(5)
    values = [spectrum.density()[1] for spectrum in (a, jh.Spectrum([0.0, 2.0], [0.5, 0.5], 2))]
    assert measure.legacy_wasserstein(a, jh.Spectrum([0.0, 2.0], [0.5, 0.5], 2)) == pytest.approx(
        scipy.stats.wasserstein_distance(*values)
    )


@pytest.mark.parametrize("name", ["fig4", "fig5", "fig6"])
def test_curvature_over_training(out, capsys, name):
    words = ("epochs=4", "interval=3", "num_steps=4", "num_probes=2", "trials=2", "examples=1000", "images_per_class=1")
    printed = run.main([name, f"out={out / name}", "model=mlp", "dataset=digits", *words]) or capsys.readouterr().out
    (record,) = numbers(out / name).values()
    assert record["epochs"] == [0, 3, 4]
    for layer in ("fc1", "fc3", "total"):
        for metric in figures.METRICS:
            assert np.shape(record[f"{metric}/{layer}"]) == (2, 3) and np.isfinite(record[f"{metric}/{layer}"]).all()
    assert "Nets on digits (1,000 images)" in printed and "MLP: " in printed
    redraws_alike(out, name)
    # The three figures show the same trainings.
    assert len(list(out.glob("fig[456]/net-*.npz"))) == 2


@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_what_is_recorded_over_training_is_the_summary(method):
    config = figures.OverTraining(method=method, num_steps=5, num_probes=3, images_per_class=1, epochs=4, interval=3)
    digits, model = data.load("digits"), models.build("mlp", 10)
    params = model.init(jax.random.key(0), digits.batch(digits.test)["image"])["params"]
    callback = figures.Curvature(config, model, digits)
    found = callback(3, params, {})
    table = jh.summarize(
        models.objective(model),
        params,
        measure.measure_batch(digits, 1, {}),
        key=jax.random.fold_in(jax.random.key(0), 3),
        num_probes=3,
        num_steps=5,
        method=method,
    )
    for layer, record in table.items():
        assert found[f"trace/{layer}"] == pytest.approx(float(record.trace.mean), rel=1e-4)
        assert found[f"lambda_max/{layer}"] == pytest.approx(record.lambda_max, rel=1e-4)
        assert found[f"trace_norm2/{layer}"] == pytest.approx(record.trace_norm2, rel=1e-4)
    assert set(callback(2, params, {})) == set(found) and np.isnan(list(callback(2, params, {}).values())).all()
    assert repr(callback) != repr(figures.Curvature(dataclasses.replace(config, num_probes=4), model, digits))


def test_outliers_for_several_numbers_of_classes(out, capsys, monkeypatch):
    digits = data.load("digits")
    halves = dataclasses.replace(
        digits, num_classes=5, train=digits.train | {"label": digits.train["label"] // 2}, test=digits.test
    )
    halves = dataclasses.replace(halves, test=digits.test | {"label": digits.test["label"] // 2})
    monkeypatch.setattr(data, "load", lambda name, data_dir=None, label="label": halves if label == "half" else digits)
    words = ["model=mlp", "dataset=digits,digits:half", "epochs=2", "images_per_class=2", "trials=2"]
    assert run.main(["outliers", f"out={out / 'outliers'}", *words]) == 0
    printed = capsys.readouterr().out
    assert "C = 10" in printed and "C = 5" in printed and "MLP on digits (halfs)" in printed
    for record in numbers(out / "outliers").values():
        assert all(len(counts) == 2 and min(counts) >= 0 for counts in record["outliers"].values())


def test_the_gap_near_the_number_of_classes():
    values = np.concatenate([[400.0, 90.0], np.linspace(20, 11, 8), np.linspace(5, 1, 30), [1e-3]])
    assert outliers.gap_near(jh.Spectrum.from_eigenvalues(values, dim=10_000), 10) == "2.20 at 10"
    assert outliers.gap_near(jh.Spectrum.from_eigenvalues(values[:3], dim=10_000), 10) == "-"


@pytest.mark.slow
def test_the_precision_of_estimators(out, capsys):
    words = ["probes=4,60", "images=10,20", "subsets=3", "steps=4,64", "repeats=12", "spectra_repeats=3"]
    printed = ran(out, capsys, "estimators", *words)
    found = numbers(out / "estimators")
    digits = data.load("digits")
    model, trained = figures.net(estimators.Config(epochs=2), "mlp", digits, out / "estimators")
    loss, params, batch = models.objective(model), trained.params, measure.measure_batch(digits, 2, {})
    traces = found["traces"]
    assert found["unit"] == "images" and found["measured"] == {"traces": 20, "spectra": 20}
    # The exact ones: of G from its Gram matrix, of Hess too, since a net with ReLU is linear in each layer.
    values = {layer: jh.ggn_eigenvalues(loss, params, batch, layer=layer) for layer in ("fc1", "fc2", "fc3")}
    for layer, some in values.items():
        assert traces["exact"]["ggn"][layer] == pytest.approx(some.sum(), rel=1e-4)
    assert traces["exact"]["hessian"] == traces["exact"]["ggn"]
    assert set(traces["exact"]["ggn"]) == {*values, "total"}
    # Textbook probes of Hess: 2 (||A||^2 - sum of squares of the diagonal), of which the second part is small here.
    whole = jh.trace(jh.hessian(loss, params, batch), like=params, key=jax.random.key(1), num_probes=1000)
    expected = float(whole.std_error) * (1000 / 60) ** 0.5 / traces["exact"]["hessian"]["total"]
    record = traces["found"]["hessian"]["hutchinson"]["60"]
    error, kind = estimators.errors(record, traces["exact"]["hessian"])["total"]
    assert kind == "rms" and error == pytest.approx(expected, rel=0.6)
    assert traces["found"]["hessian"]["auto"]["60"]["exact"] == [*values, "total"] and " exact" in printed
    assert "RMS over 12 keys" in printed and "Tr G of 3 sets of images" in printed
    spectra = found["spectra"]["found"]
    for layer in ("fc1", "total"):
        plain, deflated = (np.mean(spectra[weights]["64"]["wasserstein"][layer]) for weights in estimators.WEIGHTS)
        assert deflated < plain / 2
    assert all(len(record["trace"]["fc2"]) == 3 for record in found["images"].values())
    redraws_alike(out, "estimators")
    assert run.main(["estimators", "repeats=1", f"out={out / 'one'}"]) == 2
    assert "repeats must be at least 2" in capsys.readouterr().err


def test_errors_of_estimates():
    record = {"mean": {"a": [9.0, 13.0], "b": [4.0, 4.0], "c": [2.0, 2.0]}, "exact": ["c"]}
    record["std_error"] = {"a": [0.0, 0.0], "b": [3.0, 5.0], "c": [2e-6, 2e-6]}
    found = estimators.errors(record, {"a": 10.0, "c": 2.0})
    assert found["a"] == (pytest.approx(5**0.5 / 10), "rms")
    assert found["b"] == (pytest.approx(17**0.5 / 4), "std_error")
    assert found["c"] == (pytest.approx(1e-6), "exact")


def test_layers_spread_over_the_depth():
    layers = list("abcdefg")
    assert estimators.spread_out(layers, 3) == ["a", "d", "g"] and estimators.spread_out(layers, 2) == ["a", "g"]
    assert estimators.spread_out(layers, 0) == estimators.spread_out(layers, 9) == layers


def test_first_calls_compile_and_later_ones_take_turns():
    compiled, called = [], []

    def call(name, key):
        def traced(x):
            compiled.append(name)
            return x + 1

        called.append(name)
        return float(jax.jit(traced)(1.0))

    calls = {name: functools.partial(call, name) for name in "ab"}
    found = estimators.repeated(calls, 3, jax.random.key(0))
    assert "".join(called) == "ababab" and compiled[:2] == ["a", "b"]
    for first, times, results in found.values():
        assert first > 0 and len(times) == 2 and results == [2.0] * 3


def test_layer_interactions(out, capsys):
    printed = ran(out, capsys, "interactions", "ranked=40")
    found = numbers(out / "interactions")
    digits = data.load("digits")
    model, trained = figures.net(interactions.Config(epochs=2), "mlp", digits, out / "interactions")
    loss, params, batch = models.objective(model), trained.params, measure.measure_batch(digits, 2, {})
    norms = np.array(found["map"]["norms"])
    for i, layer in enumerate(found["map"]["names"]):
        assert norms[i, i] == pytest.approx(np.sum(jh.ggn_eigenvalues(loss, params, batch, layer=layer) ** 2), rel=1e-4)
    assert norms.sum() == pytest.approx(found["map"]["squared_norm"][0], rel=1e-5)
    assert f"off the diagonal blocks: {1 - np.trace(norms) / norms.sum():.1%}" in printed
    curves = found["examples"]["cumulative"]
    assert list(curves) == ["fc1", "fc2", "fc3", "total"]
    for values in curves.values():
        assert values[0] == 0 and values[-1] == pytest.approx(1) and (np.diff(values, 2) < 1e-9).all()  # concave
    redraws_alike(out, "interactions")
    assert run.main(["interactions", *MLP, "ranked=1501", f"out={out / 'many'}"]) == 2
    assert "ranked=1501 must lie between 1 and the 1500 training examples" in capsys.readouterr().err


def test_shares_of_the_hardest():
    found = interactions.cumulative(np.array([1.0, 6.0, 0.0, 3.0]))
    np.testing.assert_allclose(found[[0, 25, 50, 75, 100]], [0, 0.6, 0.9, 1, 1])
    assert found[10] == pytest.approx(0.24)  # between examples it grows evenly


def test_the_strongest_pairs():
    norms = np.array([[4.0, 2.0, 0.0], [2.0, 1.0, 0.5], [0.0, 0.5, 1.0]])
    found = interactions.pairs(["a", "b", "c"], norms, 2)
    assert found == [("a", "b", pytest.approx(4 / 11), pytest.approx(1.0)), ("b", "c", pytest.approx(1 / 11), 0.5)]


def test_few_images_and_all(out, capsys):
    printed = ran(out, capsys, "whole", "num_steps=8", "num_probes=4", "images_at_once=400")
    assert "Tr G, fc2" in printed and "20 images" in printed and "1,500 images" in printed
    digits = data.load("digits")
    model, trained = figures.net(estimators.Config(epochs=2), "mlp", digits, out / "whole")
    batch = digits.batch(digits.train)  # at once, where the experiment takes 400, 400, 400 and the rest
    hessian = jh.hessian(models.objective(model), trained.params, batch)
    key = jax.random.split(jax.random.key(0))[0]
    exact = jh.spectrum(hessian, like=trained.params, key=key, num_steps=8)
    found = numbers(out / "whole")["images"]["1500"]
    assert found["lambda_max"] == pytest.approx(exact.lambda_max, rel=1e-4)
    redraws_alike(out, "whole")


def test_which_layers_are_shown():
    params = {"conv1": {"kernel": np.ones((1, 1, 1, 1))}, "bn1": {"scale": np.ones(1), "bias": np.ones(1)}}
    params |= {"fc": {"kernel": np.ones((1, 1)), "bias": np.ones(1)}}

    class Fake:
        @staticmethod
        def apply(variables, images, train):
            p = variables["params"]
            x = images.reshape(-1, 1) @ p["conv1"]["kernel"][0, 0] * p["bn1"]["scale"][None] + p["bn1"]["bias"][None]
            return x @ p["fc"]["kernel"] + p["fc"]["bias"][None]

    batch = {"image": np.ones((2, 1, 1, 1), np.float32), "label": np.zeros(2, np.int32)}
    assert figures.shown(figures.Config(), Fake(), params, batch) == ["conv1", "fc"]
    assert figures.shown(figures.Config(norm_layers=True), Fake(), params, batch) == ["conv1", "bn1", "fc"]


def test_smaller_data_and_nets_are_named(capsys, tmp_path):
    config = figures.Config(width=0.25, examples=2000)
    assert figures.about(config, "vgg11_bn", "cifar10") == "VGG11-BN (width 0.25) on CIFAR-10 (2,000 images)"
    assert figures.about(figures.Config(), "lenet", "cifar100:coarse_label") == ("LeNet on CIFAR-100 (coarse labels)")
    assert run.main(["fig1", *MLP, "examples=1005", f"out={tmp_path}"]) == 2
    assert "examples=1005 is no multiple of the 10 classes of digits" in capsys.readouterr().err
