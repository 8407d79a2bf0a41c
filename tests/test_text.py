"""Text: the data set of characters, and the GPT that reads it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import jaxhess as jh
from experiments import data, figures, measure, models, recipe, run, train

TEXT = "To be, or not to be: that is the question.\n" * 40
GPT = {"layers": 1, "heads": 2, "width": 0.125, "context": 8}  # 8 features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of data sets beside which the text lies."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    (folder / "text" / "tinyshakespeare.txt").write_text(TEXT)
    (folder / "tfds").mkdir()
    return folder / "tfds"


@pytest.fixture(scope="module")
def text(folder):
    return data.load("shakespeare/8", str(folder))


@pytest.fixture(scope="module")
def net(text):
    model = models.build("gpt", text.num_classes, **GPT)
    return model, jax.jit(model.init)(jax.random.key(0), text.train["image"][:1])["params"]


# ---- data ----


def test_labels_are_the_next_characters_and_nothing_is_lost(text):
    alphabet = sorted(set(TEXT))
    assert text.num_classes == len(alphabet) and text.is_text and not data.load("digits").is_text
    cut = int(0.9 * len(TEXT))
    for split, part in ((text.train, TEXT[:cut]), (text.test, TEXT[cut:])):
        count = (len(part) - 1) // 8
        for name, start in (("image", 0), ("label", 1)):
            assert split[name].shape == (count, 8) and split[name].dtype == np.int32
            assert "".join(alphabet[i] for i in split[name].ravel()) == part[start : start + 8 * count]
    np.testing.assert_array_equal(text.batch(text.train)["image"], text.train["image"])


def test_the_default_length_and_the_folder_itself(folder, tmp_path):
    found = data.load("shakespeare", str(folder))
    assert found.train["image"].shape[1] == data.SEQUENCE == models.build("gpt", 9).context
    (tmp_path / "tinyshakespeare.txt").write_text("ab" * 100)
    assert data.load("shakespeare/4", str(tmp_path)).num_classes == 2


@pytest.mark.parametrize("name", ["shakespeare/", "shakespeare/x", "shakespeare/0", "shakespeare/-3"])
def test_lengths_that_are_none(folder, name):
    if name == "shakespeare/":
        assert data.load(name, str(folder)).train["image"].shape[1] == data.SEQUENCE
        return
    with pytest.raises(ValueError, match=rf"'{name}' must name a number of characters.*shakespeare/32"):
        data.load(name, str(folder))


def test_a_text_that_is_too_short(folder):
    with pytest.raises(ValueError, match="5000 characters, and there are 1548; take fewer"):
        data.load("shakespeare/5000", str(folder))


def test_an_absent_text_names_both_places_and_the_remedy(tmp_path, monkeypatch):
    folder = tmp_path / "tfds"
    with pytest.raises(ValueError) as error:
        data.load("shakespeare", str(folder))
    places = [folder / "tinyshakespeare.txt", tmp_path / "text" / "tinyshakespeare.txt"]
    assert all(str(words) in str(error.value) for words in (*places, "curl", "JAXHESS_DATA_DIR"))
    monkeypatch.setenv("JAXHESS_DATA_DIR", str(folder))
    with pytest.raises(ValueError, match=f"neither {folder}/"):
        data.load("shakespeare")


def test_the_name_is_known(tmp_path):
    data.check("shakespeare/64", str(tmp_path))
    with pytest.raises(ValueError, match="did you mean 'shakespeare'"):
        data.check("shakespear", str(tmp_path))


def test_first_takes_sequences_of_text_and_images_of_each_class(text):
    np.testing.assert_array_equal(data.first(text, 3)["label"], text.train["label"][:3])
    digits = data.load("digits")
    np.testing.assert_array_equal(data.first(digits, 2)["label"], np.repeat(np.arange(10), 2))
    total = len(text.train["label"])
    for count in (0, total + 1):
        with pytest.raises(ValueError, match=f"1 to {total} sequences to take, got count={count}"):
            data.first(text, count)


def test_shakespeare_whole(data_dir):
    whole = data.load("shakespeare", data_dir)
    assert whole.num_classes == 65 and whole.train["image"].shape == (31_370, 32)
    counts = np.bincount(whole.train["label"].ravel())
    assert scipy.special.entr(counts / counts.sum()).sum() == pytest.approx(3.31, abs=0.01)


# ---- the net ----


def test_layers_in_network_order(text, net):
    model, params = net
    block = ["norm1", "attn/query", "attn/key", "attn/value", "attn/out", "norm2", "fc", "proj"]
    expected = ["token", "position", *(f"block1/{name}" for name in block), "norm", "head"]
    found = jh.layer_names(params, models.objective(model), measure.measure_batch(text, 2, {}))
    assert sorted(found) == sorted(expected) and [x for x in found if "attn" not in x] == [
        x for x in expected if "attn" not in x
    ]


def test_a_position_sees_no_later_one(text, net):
    model, params = net
    tokens = jnp.asarray(text.train["image"][:2])
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % text.num_classes)
    one, two = (np.asarray(jax.jit(model.apply)({"params": params}, x)) for x in (tokens, changed))
    np.testing.assert_array_equal(one[:, :5], two[:, :5])
    assert (np.abs(one[:, 5:] - two[:, 5:]).max(-1) > 1e-6).all()


def test_the_net_written_out_in_numpy(text, net):
    model, params = net
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tokens = text.train["image"][:2]

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    block = params["block1"]
    x = params["token"]["embedding"][tokens] + params["position"]["embedding"]
    y = norm(block["norm1"], x)
    query, key, value = (dense(block["attn"][name], y) for name in ("query", "key", "value"))
    mixed = np.zeros_like(y)
    for head in (slice(0, 4), slice(4, 8)):
        for t in range(8):
            scores = np.einsum("nf,nsf->ns", query[:, t, head], key[:, : t + 1, head]) / 2
            mixed[:, t, head] = np.einsum("ns,nsf->nf", scipy.special.softmax(scores, -1), value[:, : t + 1, head])
    x = x + dense(block["attn"]["out"], mixed)
    y = dense(block["fc"], norm(block["norm2"], x))
    y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + dense(block["proj"], y)
    expected = dense(params["head"], norm(params["norm"], x))
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_end_of_the_training_text_is_held_out(text):
    held_out = data.hold_out(text, 3)
    assert held_out.name == f"{text.name}/held-out-3" and held_out.is_text
    for name, values in text.train.items():
        np.testing.assert_array_equal(held_out.train[name], values[:-3])
        np.testing.assert_array_equal(held_out.test[name], values[-3:])
    count = len(text.train["label"])
    for wrong in (0, count):
        with pytest.raises(ValueError, match=f"cannot hold out {wrong} of {count} sequences"):
            data.hold_out(text, wrong)


def test_the_large_one_has_nanogpts_size():
    model = models.build("gpt_10m", 65)
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    # nanoGPT's 10.65 million, and what it lacks: biases, positions in the count, and a head of its own.
    block = 12 * 384**2 + (4 + 4 + 1) * 384 + 4 * 384
    assert sum(x.size for x in jax.tree.leaves(params)) == 6 * block + (65 + 256) * 384 + 2 * 384 + 385 * 65


def test_what_a_gpt_does_not_take(text, net):
    model, params = net
    with pytest.raises(ValueError, match=r"reads text.*float32 \(1, 28, 28, 1\).*dataset=shakespeare"):
        model.apply({"params": params}, jnp.zeros((1, 28, 28, 1)))
    with pytest.raises(ValueError, match=r"9 characters are longer than context=8.*shakespeare/8"):
        model.apply({"params": params}, jnp.zeros((1, 9), int))
    with pytest.raises(ValueError, match="heads=3 does not divide the 64 features"):
        models.build("gpt", 9, heads=3).init(jax.random.key(0), jnp.zeros((1, 8), int))


# ---- training and measuring ----


def test_training_is_of_the_mean_over_characters(text, net):
    model, _ = net
    config = recipe.TrainConfig(epochs=4, batch_size=16, learning_rate=0.3)
    trained = train.train(model, text, config, progress=False)
    logits = model.apply({"params": trained.params}, text.test["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text.test["label"])
    assert trained.history["test_loss"][-1] == pytest.approx(float(losses.mean()), rel=1e-5)
    wrong = np.mean(np.asarray(logits).argmax(-1) != text.test["label"])
    assert trained.history["test_error"][-1] == pytest.approx(wrong, rel=1e-5)
    assert trained.history["train_loss"][-1] < trained.history["train_loss"][0] < np.log(text.num_classes) + 0.5
    assert 0 < trained.history["train_accuracy"][-1] < 1
    with pytest.raises(ValueError, match="augment=true flips and rotates images, and shakespeare/8 is text"):
        train.train(model, text, dataclasses.replace(config, augment=True), progress=False)


def test_fewer_examples_and_the_measured_ones(folder):
    config = figures.Config(model="gpt", dataset="shakespeare/8", examples=20, images_per_class=3)
    fewer = figures.load(config, config.dataset, str(folder))
    assert len(fewer.train["label"]) == 20 and measure.measure_batch(fewer, 3, {})["image"].shape == (3, 8)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


WORDS = ["model=gpt", "dataset=shakespeare/2", "epochs=1", "batch_size=32", "images_per_class=2"]


def ran(out, folder, monkeypatch, capsys, name, *words):
    def small(config):
        return {"layers": 1, "heads": 1, "width": 0.0625, "context": 2}

    monkeypatch.setattr(figures, "net_options", small)
    assert run.main([name, f"out={out / name}", f"data_dir={folder}", *WORDS, *words]) == 0
    return capsys.readouterr().out, json.loads((out / name / "numbers.json").read_text())


@pytest.mark.slow
def test_estimators_of_a_gpt(out, folder, monkeypatch, capsys):
    words = ["probes=8", "repeats=2", "spectra_repeats=2", "steps=4", "spectra_layers=2", "images="]
    printed, found = ran(out, folder, monkeypatch, capsys, "estimators", *words)
    assert found["unit"] == "sequences" and found["measured"] == {"traces": 2, "spectra": 2} and found["images"] == {}
    assert "Tr Hess at 2 training sequences" in printed and "GPT on " in printed
    hess = found["traces"]["found"]["hessian"]["auto"]["8"]
    assert "total" not in hess["exact"] and "~" in printed  # attention is not piecewise linear
    assert set(found["spectra"]["found"]["plain"]["4"]["wasserstein"]) == {"token", "head", "total"}


@pytest.mark.slow
def test_interactions_of_a_gpt_by_probes_and_exactly(out, folder, monkeypatch, capsys):
    words = ["ranked=20", "num_probes=200"]
    printed, found = ran(out, folder, monkeypatch, capsys, "interactions", *words, "method=hutchinson")
    assert "by probes" in printed and "hardest of 20 training sequences" in printed
    _, exact = ran(out, folder, monkeypatch, capsys, "interactions", *words, "overwrite=true")
    assert exact["map"]["exact"] and not found["map"]["exact"]
    value, error = found["map"]["squared_norm"]
    assert abs(value - exact["map"]["squared_norm"][0]) < 4 * error
    z = np.subtract(found["map"]["norms"], exact["map"]["norms"]) / np.maximum(found["map"]["std_error"], 1e-12)
    assert np.mean(np.abs(z) < 3) > 0.9
