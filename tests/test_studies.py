"""The studies of transformers and of stability: what they compute against closed forms and dense matrices."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

import jaxhess as jh
from experiments import data, measure, models, run
from experiments.models.gpt import GPT
from experiments.studies import sharded, stability, transformer

TEXT = "To be, or not to be: that is the question.\n" * 40
SMALL = partial(GPT, layers=1, heads=2, width=0.125, context=8)  # 8 features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "tinyshakespeare.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def made():
    """Thirty small images of three classes."""
    rng = np.random.default_rng(0)
    split = {"image": rng.integers(0, 256, (30, 4, 4, 1), dtype=np.uint8), "label": np.arange(30, dtype=np.int32) % 3}
    return data.Dataset.create("made", 3, split, split)


def redraws_alike(out, name):
    first = (out / "figure.png").read_bytes()
    assert run.main([name, f"out={out}", "redraw=true"]) == 0
    assert (out / "figure.png").read_bytes() == first and len(first) < 200_000


# ---- stability ----


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_is_followed_is_that_of_the_dense_matrix_on_a_trajectory_by_hand(made, monkeypatch, optimizer):
    model = models.build("mlp", 3, hidden=(4,), activation="tanh")
    monkeypatch.setattr(stability.models, "build", lambda name, classes, **options: model)
    monkeypatch.setattr(stability, "LATER", 30)
    config = stability.Config(steps=6, every=3, images_per_class=4, b2=0.9)
    rate = 0.1 if optimizer == "sgd" else 0.02
    rows = list(stability.follow(config, stability.Case("", "mlp", "made", optimizer, rate), made, 5))
    assert [row["step"] for row in rows] == [0, 3, 6]

    batch, loss = measure.measure_batch(made, 4, {}), models.objective(model)
    params = jax.jit(model.init)(jax.random.key(5), batch["image"][:1])["params"]
    flat, unravel = ravel_pytree(params)
    flat_loss = jax.jit(lambda w: loss(unravel(w), batch))
    gradient, hessian = jax.jit(jax.grad(flat_loss)), jax.jit(jax.hessian(flat_loss))
    first = second = np.zeros(len(flat))
    for number in range(7):
        grad = np.asarray(gradient(flat), np.float64)
        first, second = 0.9 * first + 0.1 * grad, 0.9 * second + 0.1 * grad**2
        scale = np.sqrt(second / (1 - 0.9 ** (number + 1))) + 1e-8
        step = rate * (grad if optimizer == "sgd" else first / (1 - 0.9 ** (number + 1)) / scale)
        if number % 3 == 0:
            row, matrix = rows[number // 3], np.asarray(hessian(flat), np.float64)
            assert row["loss"] == pytest.approx(float(flat_loss(flat)), rel=1e-4)
            assert row["lambda_max"] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-3)
            if optimizer == "adam":
                divided = matrix / np.sqrt(np.outer(scale, scale))
                assert row["preconditioned"] == pytest.approx(np.linalg.eigvalsh(divided)[-1], rel=2e-2)
            shorter, longer = (flat_loss(flat - c * 2 / (row["critical"] * rate) * step) for c in (0.9, 1.1))
            assert shorter < flat_loss(flat) < longer
        flat = flat - jnp.asarray(step, jnp.float32)


def test_thresholds_are_those_of_the_papers():
    case = stability.Case("", "mlp", "digits", "sgd", 0.1)
    assert stability.threshold(case) == pytest.approx(20)
    assert stability.threshold(case._replace(optimizer="adam", rate=1e-3)) == pytest.approx(38_000)


def curve(values, rises=0.0):
    return {"step": 10 * np.arange(len(values)), "lambda_max": np.array(values), "rises": np.full(len(values), rises)}


SGD = {"optimizer": "sgd", "threshold": 10.0, "rate": 0.2}


def test_when_the_threshold_is_reached_and_what_follows():
    found = stability.reached(curve([2, 5, 9.6, 11, 9, 12], 0.25), SGD)
    assert found == pytest.approx((20, 1.03, 1.03, 1.2, 0.25))
    assert stability.reached(curve([2, 5, 9.4]), SGD) is None
    assert stability.reached(curve([30, 20, 15]), SGD) is None  # above it from the start: it has not risen to it
    assert stability.reached(curve([30, 9, 8, 10, 10]), SGD).step == 30
    adam = curve([1]) | {"preconditioned": np.array([39.0])}
    assert stability.reached(adam, {"optimizer": "adam", "threshold": 38.0}) is None
    both = stability.shares(SGD, [curve([5, 10]) | {"critical": np.array([1, 20])}] * 2)
    np.testing.assert_allclose(both["lambda_max / (2/eta)"], [[0.5, 1]] * 2)
    np.testing.assert_allclose(both["critical sharpness / (2/eta)"], [[0.1, 2]] * 2)


@pytest.mark.parametrize(
    ("courses", "words"),
    [
        ([[5, 10, 11, 9], [5, 10, 9, 10]], "holds"),
        ([[5, 10, 11, 3], [5, 10, 9, 10]], "holds in part"),
        ([[5, 10, 11, 9, 9, 9, 1, 1, 1, 1, 1, 1, 9], [5, 10, 9, 10]], "holds in part"),
        ([[5, 10, 30, 30], [5, 10, 40, 50]], "does not hold"),
        ([[5, 10, 30, 30], [5, 10, 9, 10]], "not decided"),
        ([[5, 10, 11, 9], [5, 6, 7, 8]], "not decided"),
    ],
)
def test_verdicts_on_the_edge(courses, words):
    assert stability.verdict([stability.reached(curve(values), SGD) for values in courses]) == words


def test_stability_from_end_to_end(tmp_path, capsys):
    words = ["model=mlp", "dataset=digits", "learning_rate=0.05,0.001", "steps=4", "every=2", "trials=2"]
    assert run.main(["stability", f"out={tmp_path}", *words, "images_per_class=1"]) == 0
    printed = capsys.readouterr().out
    assert "MLP on digits, Adam" in printed and "38,000.0" in printed and printed.count("not decided") == 2
    found = json.loads((tmp_path / "numbers.json").read_text())
    for record in found.values():
        assert [len(trial["loss"]) for trial in record["trials"]] == [3, 3]
        one, two = (trial["lambda_max"] for trial in record["trials"])
        assert one != two
    redraws_alike(tmp_path, "stability")
    assert run.main(["stability", *words, "dry_run=true"]) == 0
    assert "MLP on digits, gradient descent: 2 trainings of 4 steps, about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=digits"], "dataset=digits must name one for each of model=lenet,gpt"),
        (["learning_rate=0.1"], "learning_rate has 1 values for 2 nets with 2 optimizers each; give 4"),
        (["every=0"], "every=0"),
    ],
)
def test_stability_says_what_does_not_fit(tmp_path, capsys, words, message):
    assert run.main(["stability", f"out={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err


# ---- transformer ----


def points(*values):
    return {str(i): jh.Spectrum([float(value)], [1.0], 1) for i, value in enumerate(values)} | {
        "total": jh.Spectrum([0.0], [1.0], 1)
    }


def test_heterogeneity_of_made_spectra():
    mean, table = transformer.heterogeneity(points(1, 1, 9))
    np.testing.assert_allclose(table, [[0, 0, 1], [0, 0, 1], [1, 1, 0]], atol=1e-5)
    assert mean == pytest.approx(2 / 3, abs=1e-5)
    assert transformer.heterogeneity(points(1, 1, 9), scaled=True)[0] == pytest.approx(0, abs=1e-5)
    halves = {"a": jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2), "b": jh.Spectrum([0.0], [1.0], 2)}
    # A half of the mass is shared.
    a, b = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    m = (a + b) / 2
    expected = (np.sum(a * np.log(a / m)) + np.log(1 / m[0])) / 2 / np.log(2)
    assert transformer.heterogeneity(halves)[0] == pytest.approx(expected, abs=1e-3)


def test_decades_between_made_spectra():
    """A spectrum ten times as large is one decade away, and zeros do not count, however many."""
    assert transformer.between(points(1, 10, -100))[0] == pytest.approx(4 / 3)
    many = {"a": jh.Spectrum([0.0, 1.0], [0.9, 0.1], 10), "b": jh.Spectrum([0.0, 2.0, 0.2], [0.4, 0.1, 0.5], 10)}
    # Of b, 0.2 of the size lies at 2 and 0.1 at 0.2: shares of two thirds and one third.
    assert transformer.between(many)[0] == pytest.approx((2 * np.log10(2) + np.log10(5)) / 3)


def test_decades_of_the_trace_per_parameter():
    table = {str(i): {"trace": -5 * 10.0**i, "parameters": 5} for i in range(3)} | {"total": {}}
    assert transformer.decades(table) == pytest.approx(1)


@pytest.mark.parametrize(
    ("shifts", "words"),
    [
        ((5, 5, 5, 5), "holds"),
        ((-5, -5, -5, -5), "does not hold"),
        ((5, 0, -5, 0), "holds in part"),
        ((0, 0, 0, 0), "not decided"),
    ],
)
def test_verdicts_on_heterogeneity(shifts, words):
    others = {name: [1.0, 1.1, 0.9] for name in transformer.MEASURES}
    ours = {name: [1.05 + shift, 0.97 + shift, 1.01 + shift] for name, shift in zip(others, shifts, strict=True)}
    assert transformer.verdict(ours, others) == words


def test_the_groups_of_a_gpt_are_its_parameters_each_once():
    model = SMALL(num_classes=5)
    batch = {"image": jnp.zeros((2, 8), int), "label": jnp.zeros((2, 8), int)}
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])["params"]
    found = transformer.groups(jh.layer_names(params, models.objective(model), batch))
    assert list(found)[:4] == ["embedding", "positions", "block1 query", "block1 key"] and len(found) == 11
    counts = jax.tree.map(jnp.zeros_like, params)
    for selection in found.values():
        arrays = jax.tree.leaves(jh.subtree(params, selection))
        counts = jax.tree.map(lambda c, p, arrays=arrays: c + sum(p is x for x in arrays), counts, params)
    assert all(bool((x == 1).all()) for x in jax.tree.leaves(counts))
    assert transformer.groups(["conv1", "fc1"]) == {"conv1": "conv1", "fc1": "fc1"}


def test_blocks_and_kinds_of_parts_hold_every_parameter_once():
    """Of a GPT and of a vision transformer, in the order of their use."""
    images = jnp.zeros((2, 8, 8, 3))
    nets = {"gpt": (jnp.zeros((2, 8), int), {"layers": 2, "heads": 2}), "vit": (images, {"heads": 2})}
    for name, (inputs, options) in nets.items():
        model = models.build(name, 5, width=0.25, **options)
        shape = (2, 8) if name == "gpt" else (2,)
        batch = {"image": inputs, "label": jnp.zeros(shape, int)}
        params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
        names = jh.layer_names(params, models.objective(model), batch)
        first = "embedding" if name == "gpt" else "patches"
        expected = {
            "blocks": [first, "positions", "block1", "block2", "last norm", "head"],
            "kinds": [first, "positions", *transformer.PARTS, "last norm", "head"],
        }
        size = sum(x.size for x in jax.tree.leaves(params))
        for by, words in expected.items():
            found = transformer.groups(names, by)
            assert list(found) == words
            sizes = [sum(x.size for x in jax.tree.leaves(jh.subtree(params, one))) for one in found.values()]
            assert sum(sizes) == size and all(sizes)


def test_what_is_measured_is_that_of_the_dense_blocks(folder):
    text = data.load("shakespeare/8", str(folder))
    model, batch = SMALL(num_classes=text.num_classes), measure.measure_batch(text, 2, {})
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])["params"]
    config = transformer.Config(num_steps=200, num_probes=200)
    table, spectra = transformer.measured(config, model, params, batch, 0)
    loss = models.objective(model)
    query = params["block1"]["attn"]["query"]
    flat, unravel = ravel_pytree(query)

    def of_query(w):
        attention = params["block1"]["attn"] | {"query": unravel(w)}
        return loss(params | {"block1": params["block1"] | {"attn": attention}}, batch)

    dense = np.asarray(jax.jit(jax.hessian(of_query))(flat), np.float64)
    row = table["block1 query"]
    assert row["parameters"] == len(flat) == spectra["block1 query"].dim
    assert row["lambda_max"] == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-3)
    assert abs(row["trace"] - np.trace(dense)) < 5 * row["std_error"] + 1e-6
    assert (
        sum(record["parameters"] for name, record in table.items() if name != "total") == table["total"]["parameters"]
    )


def test_transformer_from_end_to_end(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.MODELS, "gpt", SMALL)
    words = ["dataset=shakespeare/8", "beside=mlp", "beside_dataset=digits", "beside_examples=100", "epochs=1"]
    words += ["beside_epochs=1", "batch_size=50", "trials=2", "num_steps=5", "num_probes=2", "images_per_class=2"]
    words += ["beside_images_per_class=1", f"data_dir={folder}", f"out={tmp_path / 'one'}"]
    assert run.main(["transformer", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("block1 query") == 2 and printed.count("are less alike than those of MLP") == 2
    found = json.loads((tmp_path / "one" / "numbers.json").read_text())
    assert list(found) == ["gpt", "mlp"] and all(len(record["trials"]) == 2 for record in found.values())
    start, end = (found["gpt"]["trials"][0][when]["head"]["lambda_max"] for when in ("start", "end"))
    assert start != end
    redraws_alike(tmp_path / "one", "transformer")
    assert run.main(["transformer", *words, "dry_run=true"]) == 0
    assert capsys.readouterr().out.count(": there, ") == 4


@pytest.mark.slow
def test_a_transformer_alone(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.MODELS, "gpt", SMALL)
    words = ["dataset=shakespeare/8", "beside=none", "by=blocks", "epochs=1", "examples=100", "batch_size=50"]
    words += ["trials=1", "num_steps=5", "num_probes=2", "images_per_class=2", f"data_dir={folder}"]
    assert run.main(["transformer", *words, f"out={tmp_path / 'one'}"]) == 0
    printed = capsys.readouterr().out
    assert "(100 sequences), 1 trainings" in printed and "less alike" not in printed
    assert printed.count("measuring took") == 2 and printed.count("block1 ") == 2
    found = json.loads((tmp_path / "one" / "numbers.json").read_text())["gpt"]["trials"][0]
    assert found["end_seconds"] > 0 and found["end"]["block1"]["parameters"] > found["end"]["head"]["parameters"]
    redraws_alike(tmp_path / "one", "transformer")


def test_a_net_is_not_compared_with_itself(folder, tmp_path, capsys):
    words = ["beside=gpt", "beside_dataset=shakespeare/8", f"data_dir={folder}", f"out={tmp_path}"]
    assert run.main(["transformer", *words]) == 2
    assert "beside=gpt is the net itself" in capsys.readouterr().err


# ---- sharded ----


def test_a_net_on_two_devices_has_the_numbers_of_one_and_half_of_the_memory(tmp_path, capsys):
    words = ["model=mlp", "dataset=digits", "devices=2", "images_per_class=1", "num_steps=3", "num_probes=2"]
    assert run.main(["sharded", *words, f"out={tmp_path / 'one'}"]) == 0
    assert "MLP on digits, on one device and spread over 2" in capsys.readouterr().out
    one, two = json.loads((tmp_path / "one" / "numbers.json").read_text()).values()
    assert {"loss", "Tr Hess total", "Tr G total", "lambda_max total"} < set(one["values"]) == set(two["values"])
    for name, value in one["values"].items():
        assert two["values"][name] == pytest.approx(value, rel=1e-3, abs=1e-4 * abs(one["values"]["Tr G total"])), name
    for name in ("parameters", "3 Lanczos vectors"):
        assert 0.5 <= two["mebibytes"][name] / one["mebibytes"][name] < 0.55


def test_arrays_lie_along_their_longest_axis_that_divides():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    tree = {"long": jnp.zeros((4, 6)), "odd": jnp.zeros((7, 2)), "none": jnp.zeros((3, 5)), "bias": jnp.zeros(4)}
    placed = sharded.spread(mesh, tree)
    shapes = {name: x.addressable_shards[0].data.shape for name, x in placed.items()}
    assert shapes == {"long": (4, 3), "odd": (7, 1), "none": (3, 5), "bias": (2,)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=1000"], "XLA_FLAGS=--xla_force_host_platform_device_count=1000"),
        (["devices=4", "images_per_class=1"], "10 examples cannot be spread evenly over devices=4"),
    ],
)
def test_sharded_says_what_does_not_fit(tmp_path, capsys, words, message):
    assert run.main(["sharded", "model=mlp", "dataset=digits", f"out={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err
