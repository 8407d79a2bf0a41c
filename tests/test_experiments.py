"""The experiments: data, nets, the trainer, results on disk, the command line."""

import dataclasses
import json
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxhess as jh
from experiments import data, measure, models, plot, recipe, run, store, train
from experiments.models import ops
from experiments.studies import demo, fig1


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def made():
    """Forty small images of three classes, a bright square in a place that tells the class."""
    rng = np.random.default_rng(0)
    label = np.arange(40, dtype=np.int32) % 3
    image = rng.integers(0, 100, (40, 6, 6, 2), dtype=np.uint8)
    for i, c in enumerate(label):
        image[i, 2 * c : 2 * c + 2] += 120
    split = {"image": image, "label": label}
    return data.Dataset.create("made", 3, {k: v[:30] for k, v in split.items()}, {k: v[30:] for k, v in split.items()})


class NormNet(nn.Module):
    """A net with batch norm."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(8, name="fc1")(images.reshape(len(images), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x))
        return nn.Dense(self.num_classes, name="fc2")(x)


# ---- data ----


def test_digits_are_whole_fixed_and_of_lenets_size(digits):
    again = data.load("digits")
    assert digits.train["image"].shape == (1500, 28, 28, 1) and digits.test["image"].shape == (297, 28, 28, 1)
    assert digits.train["image"].dtype == np.uint8 and digits.train["label"].dtype == np.int32
    assert digits.train["image"].max() > 240 and digits.train["image"].min() == 0
    np.testing.assert_array_equal(np.bincount(digits.test["label"], minlength=10) > 25, True)
    np.testing.assert_array_equal(again.train["image"], digits.train["image"])
    image = digits.batch(digits.train)["image"]
    assert image.dtype == np.float32 and abs(image.mean()) < 1e-3 and abs(image.std() - 1) < 1e-3


def test_enlarged_digits_keep_their_mass(digits):
    from sklearn.datasets import load_digits

    every = np.concatenate([digits.train["image"], digits.test["image"]])
    assert every.mean() / 255 == pytest.approx(load_digits().images.mean() / 16, rel=0.02)


def test_moments_are_those_of_every_channel_over_several_slices(monkeypatch, made):
    monkeypatch.setattr(data, "_SLICE", 7)
    mean, std = data._moments(made.train["image"])
    np.testing.assert_allclose(mean.ravel(), made.train["image"].mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std.ravel(), made.train["image"].std((0, 1, 2)), rtol=1e-6)
    assert data._moments(np.full((3, 2, 2, 1), 9, np.uint8))[1].item() == 1  # nothing is divided by zero


def test_per_class_takes_the_first_of_each(made):
    split = data.per_class(made.train, 2, 3)
    np.testing.assert_array_equal(split["label"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(split["image"], made.train["image"][[0, 3, 1, 4, 2, 5]])
    with pytest.raises(ValueError, match=r"count=11 .*\{0: 10, 1: 10, 2: 10\}"):
        data.per_class(made.train, 11, 3)
    with pytest.raises(ValueError, match="count=0"):
        data.per_class(made.train, 0, 3)


# ---- nets ----


def test_lenet_layers_and_size():
    model = models.build("lenet", 10)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 61_706
    batch = {"image": jnp.zeros((2, 28, 28, 1)), "label": jnp.zeros(2, int)}
    assert jh.layer_names(params, models.objective(model), batch) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert jax.eval_shape(model.apply, {"params": params}, jnp.zeros((3, 32, 32, 1))).shape == (3, 10)
    with pytest.raises(ValueError, match=r"28.*\(1, 8, 8, 1\)"):
        model.apply({"params": params}, jnp.zeros((1, 8, 8, 1)))


def test_lenet_equals_the_textbook_form():
    class Textbook(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
            for name, features in (("conv1", 6), ("conv2", 16)):
                x = nn.relu(nn.Conv(features, (5, 5), padding="VALID", name=name)(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
            for name, features in (("fc1", 120), ("fc2", 84)):
                x = nn.relu(nn.Dense(features, name=name)(x))
            return nn.Dense(10, name="fc3")(x)

    model, x = models.build("lenet", 10), jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    ours, theirs = jax.jit(model.apply)(variables, x), jax.jit(Textbook().apply)(variables, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "window", "options"),
    [
        ((2, 12, 10, 3), (5, 5), {"padding": "VALID"}),
        ((2, 4, 5, 2), (3, 3), {"padding": "SAME"}),
        ((2, 7, 7, 1), (3, 2), {"padding": [(1, 2), (0, 1)]}),
    ],
)
def test_row_convolution_equals_flax(shape, window, options):
    x = jax.random.normal(jax.random.key(0), shape)
    flax_conv = nn.Conv(6, window, **options)
    ours = nn.Conv(6, window, conv_general_dilated=ops.row_convolution, **options)
    variables = jax.jit(flax_conv.init)(jax.random.key(1), x)

    def gradients(conv):
        loss = jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(conv.apply(v, x))), argnums=(0, 1))
        return jax.jit(loss)(variables, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients(flax_conv), gradients(ours)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2},
        {"feature_group_count": 2},
        {"kernel_dilation": 2},
        {"input_dilation": 2, "padding": [(1, 1), (1, 1)]},
    ],
)
def test_what_row_convolution_leaves_to_xla(options):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    ours = nn.Conv(6, (3, 3), conv_general_dilated=ops.row_convolution, **options)
    variables = ours.init(jax.random.key(1), x)
    np.testing.assert_allclose(ours.apply(variables, x), nn.Conv(6, (3, 3), **options).apply(variables, x), rtol=1e-5)


def test_row_convolution_under_vmap_and_second_derivatives():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 7, 7, 2)), jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
    vectors = jax.random.normal(jax.random.key(2), (3, *kernel.shape))

    def products(convolution):
        def loss(k):
            y = convolution(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.sum(jnp.tanh(y))

        return jax.jit(jax.vmap(lambda v: jax.jvp(jax.grad(loss), (kernel,), (v,))[1]))(vectors)

    np.testing.assert_allclose(products(ops.row_convolution), products(lax.conv_general_dilated), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 5, 1)])
def test_max_pool_equals_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)

    def gradients(pool):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(pool(x)))))(x)

    theirs = gradients(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), theirs, gradients(ops.max_pool))


def test_mlp_options():
    model = models.build("mlp", 3, hidden=(5,), activation="tanh")
    params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))["params"]
    assert jax.tree.map(jnp.shape, params["fc1"]) == {"kernel": (4, 5), "bias": (5,)} and set(params) == {"fc1", "fc2"}
    with pytest.raises(ValueError, match=r"'selu'.*\['relu', 'tanh'\]"):
        models.build("mlp", 3, activation="selu").init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))


def test_unknown_nets_and_options():
    with pytest.raises(ValueError, match=r"'lenett'.*'lenet', 'mlp'"):
        models.build("lenett", 10)
    with pytest.raises(ValueError, match=r"no option \['width'\].*\['activation', 'hidden'\]"):
        models.build("mlp", 10, width=3)


def test_objectives_of_equal_nets_are_equal():
    one, two = (models.objective(models.build("mlp", 3, hidden=(4,))) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != models.objective(models.build("mlp", 3, hidden=(5,)))


# ---- training ----

SHORT = recipe.TrainConfig(epochs=2, batch_size=8, learning_rate=0.05)


def test_training_is_deterministic_and_the_seed_matters(made):
    model = models.build("mlp", 3, hidden=(4,))
    one, two = (train.train(model, made, SHORT, progress=False) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    other = train.train(model, made, dataclasses.replace(SHORT, seed=1), progress=False)
    assert not np.array_equal(one.params["fc1"]["kernel"], other.params["fc1"]["kernel"])


def test_training_is_sgd_written_out(made):
    """Two epochs by hand: permutation, batches, momentum, coupled L2, one fall of the rate."""
    config = dataclasses.replace(SHORT, weight_decay=0.1, milestones=(0.5,), decay=0.25)
    model = models.build("mlp", 3, hidden=(4,))
    found = train.train(model, made, config, progress=False)

    value_and_grad = jax.jit(jax.value_and_grad(models.objective(model)))
    state = train.init_state(model, recipe.optimizer(config, 3), config, made)
    params, velocity = state.params, jax.tree.map(jnp.zeros_like, state.params)
    batch, losses = made.batch(made.train), []
    for epoch in range(2):
        order = jax.random.permutation(jax.random.fold_in(state.key, epoch), 30)
        rate = config.learning_rate * (1, 0.25)[epoch]
        for i in range(3):
            part = {key: value[order[8 * i : 8 * i + 8]] for key, value in batch.items()}
            value, grads = value_and_grad(params, part)
            losses.append(value)
            velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 0.1 * p, velocity, grads, params)
            params = jax.tree.map(lambda p, v, rate=rate: p - rate * v, params, velocity)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, found.params)
    np.testing.assert_allclose(found.history["train_loss"], np.reshape(losses, (2, 3)).mean(1), rtol=1e-4)


def test_batch_statistics_are_carried_and_used(made):
    model = NormNet(3)
    seen = []
    trained = train.train(
        model,
        made,
        SHORT,
        progress=False,
        callback=lambda epoch, params, stats: seen.append((epoch, np.array(stats["norm"]["mean"]))),
    )
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert not seen[0][1].any() and np.abs(seen[2][1] - seen[1][1]).max() > 0
    np.testing.assert_array_equal(trained.batch_stats["norm"]["mean"], seen[2][1])

    batch = measure.measure_batch(made, 2, trained.batch_stats)
    logits = models.objective(model).predict(trained.params, batch)
    variables = {"params": trained.params, "batch_stats": trained.batch_stats}
    np.testing.assert_array_equal(logits, model.apply(variables, batch["image"]))
    # One example's loss does not depend on the others: what is measured is evaluation mode.
    one = {"image": batch["image"][:1], "label": batch["label"][:1], "batch_stats": batch["batch_stats"]}
    np.testing.assert_allclose(models.objective(model).predict(trained.params, one), logits[:1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", [models.build("mlp", 3, hidden=(4,)), NormNet(3)])
def test_a_transform_gets_the_batch_and_compiles_once(made, model):
    loss, traced = models.objective(model), []

    def update(updates, state, params=None, *, batch, **extra):
        traced.append(jax.tree.map(jnp.shape, batch))
        return jax.tree.map(jnp.add, updates, jax.grad(loss)(params, batch)), state + 1

    doubled = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)
    train.train(model, made, SHORT, transform=doubled, progress=False)
    assert len(traced) == 1
    assert traced[0]["image"] == (8, 6, 6, 2) and traced[0]["label"] == (8,) and "batch_stats" in traced[0]


def test_a_transform_that_knows_no_batch(made):
    model = models.build("mlp", 3, hidden=(4,))
    still = train.train(model, made, SHORT, transform=optax.set_to_zero(), progress=False)
    start = train.init_state(model, optax.identity(), SHORT, made).params
    jax.tree.map(np.testing.assert_array_equal, still.params, start)


def test_evaluation_counts_every_image_once(made):
    model = models.build("mlp", 3, hidden=(4,))
    params = train.init_state(model, optax.identity(), SHORT, made).params
    batch = made.batch(made.train)
    logits = model.apply({"params": params}, batch["image"])
    images = data.on_device(made, made.train)
    for size in (30, 7, 1000):
        loss, error = train._evaluate(model, params, {}, images, batch_size=size)
        assert float(loss) == pytest.approx(float(jh.cross_entropy(logits, batch)), rel=1e-5)
        assert float(error) == pytest.approx(np.mean(np.asarray(logits).argmax(-1) != batch["label"]), rel=1e-6)
    assert train.evaluate(model, params, {}, made, made.train) == pytest.approx((float(loss), float(error)))


def test_milestones_are_shares_or_epochs():
    assert recipe.TrainConfig(epochs=30, milestones=(0.5, 20)).milestone_epochs() == [15, 20]
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        recipe.TrainConfig(epochs=0)


def test_training_says_what_is_wrong(made):
    model = models.build("mlp", 3, hidden=(4,))
    with pytest.raises(ValueError, match="batch_size=64 is more than the 30 training images"):
        train.train(model, made, recipe.TrainConfig(batch_size=64), progress=False)
    with pytest.raises(ValueError, match="learning_rate=1e"):
        train.train(model, made, dataclasses.replace(SHORT, learning_rate=1e30), progress=False)


def test_demo_reaches_its_accuracy(digits):
    trained = train.train(models.build("lenet", 10), digits, demo.Config(), progress=False)
    assert trained.history["test_error"][-1] <= 0.04
    assert trained.history["train_loss"][-1] < trained.history["train_loss"][0] / 10


def test_a_net_is_trained_once(made, tmp_path, monkeypatch):
    config = dataclasses.replace(SHORT, epochs=1)
    model, first = train.train_once("mlp", made, config, tmp_path / "one", progress=False)
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained again"))
    wider = fig1.Config(**dataclasses.asdict(config), num_steps=7)  # how it is measured plays no part
    for folder in ("one", "two"):  # in its own folder, and in the one beside it
        again, kept = train.train_once("mlp", made, wider, tmp_path / folder, progress=False)
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, kept, first)
    with pytest.raises(pytest.fail.Exception):
        train.train_once("mlp", made, dataclasses.replace(config, seed=1), tmp_path / "one", progress=False)


# ---- results ----


def test_arrays_round_trip_without_pickle(tmp_path):
    arrays = {"a/b": np.arange(3), "c": np.float32(2.5), "recipe": "text"}
    store.save_arrays(tmp_path / "deep" / "numbers.npz", arrays)
    loaded = store.load_arrays(tmp_path / "deep" / "numbers.npz")
    assert list(loaded) == list(arrays)
    np.testing.assert_array_equal(loaded["a/b"], arrays["a/b"])
    with pytest.raises(TypeError, match=r"\['x'\]"):
        store.save_arrays(tmp_path / "numbers.npz", {"x": [None, {}]})
    assert [path.name for path in tmp_path.rglob("*.npz")] == ["numbers.npz"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "numbers.json"
    store.save_json(path, {"a": 1})
    with pytest.raises(RuntimeError), store.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert store.load_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["numbers.json", "numbers.npz"])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    read = store.load_json if name.endswith("json") else store.load_arrays
    with pytest.raises(ValueError, match=f"{name} is not there"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read(tmp_path / name)


def test_spectra_pack_and_unpack(tmp_path):
    spectra = {"block2/conv1": jh.Spectrum([0.0, 2.0], [0.75, 0.25], 4, 2), "total": jh.Spectrum([1.0], [1.0], 9, 1)}
    store.save_arrays(tmp_path / "numbers.npz", measure.pack(spectra, "hessian"))
    again = measure.unpack(store.load_arrays(tmp_path / "numbers.npz"), "hessian")
    assert list(again) == list(spectra)
    for name, spectrum in spectra.items():
        np.testing.assert_array_equal(again[name].nodes, spectrum.nodes)
        assert (again[name].dim, again[name].num_steps) == (spectrum.dim, spectrum.num_steps)
    with pytest.raises(ValueError, match="no spectra of 'ggn'"):
        measure.unpack({}, "ggn")


def test_figures_of_several_nets_and_of_many_layers(tmp_path):
    point = {metric: [0.5, 0.6] for metric in plot.METRICS}
    nets = {
        "a": {metric: dict.fromkeys(["fc1", "fc2"], value) for metric, value in point.items()},
        "b": {metric: dict.fromkeys(["conv1", "conv2", "fc"], value) for metric, value in point.items()},
    }
    figure = plot.layer_distances(nets, "two nets")
    assert figure.get_supxlabel() == "relative depth" and len(figure.axes[0].containers) == 2
    spectrum = jh.Spectrum([0.0, 2.0], [0.75, 0.25], 4)
    many = plot.log_densities({"hessian": {f"conv{i}": spectrum for i in range(19)} | {"total": spectrum}}, "many")
    assert sum(axis.get_visible() for axis in many.axes) == 20
    plot.save(many, tmp_path / "many.png")
    assert 0 < (tmp_path / "many.png").stat().st_size < 200_000


# ---- the command line ----


@dataclasses.dataclass(frozen=True)
class Everything:
    whole: int = 1
    real: float = 0.5
    yes: bool = False
    word: str = "w"
    words: tuple[str, ...] = ()
    reals: tuple[float, ...] = ()
    kind: Literal["one", "two"] = "one"


def test_words_become_a_typed_configuration():
    words = ["whole=3", "real=1e-3", "yes=true", "word=a=b", "words=a,b", "reals=0.5,20"]
    (config,) = run.parse(words, Everything)
    dashed = ["--whole", "3", "--real=1e-3", "--yes", "--word", "a=b", "--words", "a", "b", "--reals", "0.5", "20"]
    assert run.parse(dashed, Everything) == (config,)
    assert config == Everything(3, 1e-3, True, "a=b", ("a", "b"), (0.5, 20.0))
    assert run.parse([], Everything, run.Options) == (Everything(), run.Options())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("whole=1.5", "--whole: .*int.*'1.5'"),
        ("real=much", "--real: .*float.*'much'"),
        ("yes=1", r"unknown value of yes '1'; choose from \['false', 'true'\]"),
        ("reals=1,b", r"--reals: .*\['1', 'b'\]"),
        ("kind=a", r"unknown kind 'a'; choose from \['one', 'two'\]"),
        ("--kind=a", "invalid choice 'a' for argument '--kind'"),
        ("--hole", r"Unrecognized options: --hole; did you mean --whole\?"),
        ("--word", "--word"),
        ("hole=1", r"unknown key 'hole'; choose from .*; did you mean 'whole'"),
        ("whole", "Unrecognized options: whole"),
    ],
)
def test_bad_words_are_named(word, message):
    with pytest.raises(ValueError, match=message):
        run.parse([word], Everything)
    with pytest.raises(ValueError, match="'whole' is given twice"):
        run.parse(["whole=1", "whole=2"], Everything)


def test_listing_and_help(capsys):
    assert run.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in ("demo", "fig1", "fig3"))
    assert run.main(["fig3", "--help"]) == 0
    assert "mnist fashion_mnist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fig7b"], "unknown experiment 'fig7b'"),
        (["fig1", "epoch=3"], "unknown key 'epoch'"),
        (["fig1", "epochs=0"], "epochs must be at least 1"),
        (["fig1", "redraw=true", "out=nowhere"], "run the experiment without redraw=true"),
    ],
)
def test_user_errors_are_one_line_and_status_2(words, message, capsys):
    assert run.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_errors_can_be_debugged():
    with pytest.raises(ValueError, match="unknown key"):
        run.main(["fig1", "epoch=3", "debug=true"])


def test_an_experiment_from_end_to_end(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    words = ["demo", f"out={out}", "model=mlp", "epochs=1", "num_steps=4", "num_probes=2", "images_per_class=1"]
    assert run.main(words) == 0
    assert "total" in capsys.readouterr().out
    config, numbers = (json.loads((out / name).read_text()) for name in ("config.json", "numbers.json"))
    assert config["experiment"] == "demo" and config["epochs"] == 1 and "data_dir" not in config
    assert list(numbers["summary"]) == ["fc1", "fc2", "fc3", "total"]
    assert list(numbers["distances"]["hessian"]["wasserstein"]) == ["fc1", "fc2", "fc3"]

    first = (out / "figure.png").read_bytes()
    assert len(first) < 200_000
    (out / "figure.png").unlink()
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("computed again"))
    assert run.main(["demo", f"out={out}", "redraw=true"]) == 0
    assert (out / "figure.png").read_bytes() == first


def test_distances_of_two_nets_from_end_to_end(tmp_path, capsys):
    words = ["fig3", f"out={tmp_path}", "model=mlp", "dataset=digits", "epochs=1", "num_steps=4", "images_per_class=1"]
    assert run.main(words) == 0
    assert "closest: " in capsys.readouterr().out
    assert (tmp_path / "figure.png").exists()


def test_results_are_named_after_what_ran():
    assert run._title("fig1", fig1.Config(dataset="cifar10/plain")) == "fig1-lenet-cifar10-plain"
    assert run._title("fig3", run.parse([], run.load("fig3").Config)[0]) == "fig3-lenet-mnist+fashion_mnist"
    assert run._title("bench", object()) == "bench"
