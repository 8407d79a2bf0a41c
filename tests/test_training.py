"""Training with the penalty, in slices, with sharpness-aware minimisation; checkpoints."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal
from helpers import made_dataset

import jaxhess as jh
from experiments import data, models, recipe, store, train

ROOT = pathlib.Path(train.__file__).parent.parent
SHORT = recipe.TrainConfig(epochs=3, batch_size=8, learning_rate=0.05, augment=True)
HTR = dataclasses.replace(SHORT, penalty=recipe.Penalty(1e-2, every=2, start_epoch=1))


@pytest.fixture(scope="module")
def made():
    """Forty random images of three classes."""
    return made_dataset(30, 10, (6, 6, 2), 3)


def mlp():
    return models.build("mlp", 3, hidden=(6, 5, 4))


def differ(one, two):
    """Whether two trainings part at the first step after the first penalty, by more than rounding."""
    return bool((abs(one.step_loss[4:] / two.step_loss[4:] - 1) > 3e-5).all())


# ---- steps ----


@pytest.mark.parametrize("sam", [0.0, 0.1])
def test_a_batch_in_slices_is_the_whole_batch(made, monkeypatch, sam):
    config = dataclasses.replace(SHORT, sam=sam)
    trained, calls = {}, []
    whole = train._in_slices
    monkeypatch.setattr(train, "_in_slices", lambda *args: calls.append(args) or whole(*args))
    for size in (2, 64):
        monkeypatch.setattr(train, "SLICE", size)
        trained[size] = train.train(mlp(), made, config, transform=optax.identity(), progress=False)  # compiles anew
    assert len(calls) == (4 if sam else 2)
    jax.tree.map(lambda *a: np.testing.assert_allclose(*a, rtol=1e-4, atol=1e-6), *map(tuple, trained.values()))


# ---- the penalty in training ----


def test_the_penalty_acts_from_its_first_epoch_and_is_recorded(made):
    plain = train.train(mlp(), made, SHORT, progress=False)
    found = train.train(mlp(), made, HTR, progress=False)
    # Step 3 is the first with a penalty, and its loss is still that of the parameters before it.
    np.testing.assert_allclose(plain.step_loss[:4], found.step_loss[:4], rtol=1e-5)
    assert found.step_loss.shape == (9,) and differ(plain, found)
    assert found.history["penalty"][0] == 0 and (found.history["penalty"][1:] > 0).all()
    np.testing.assert_array_equal(found.history["skipped"], 0)
    assert "penalty" not in plain.history
    np.testing.assert_allclose(found.step_loss.reshape(3, 3).mean(1), found.history["train_loss"], rtol=1e-5)


@pytest.mark.parametrize("options", [{"curvature": "hessian", "probe": "gaussian"}, {"layers": "middle"}])
def test_the_penaltys_settings_reach_it(made, options):
    penalty = dataclasses.replace(HTR.penalty, **options)
    other = train.train(mlp(), made, dataclasses.replace(HTR, penalty=penalty), progress=False)
    first = train.train(mlp(), made, HTR, progress=False)
    assert differ(other, first)


def test_bad_penalties_are_named(made):
    for options, message in (
        ({"gamma": -1.0}, "gamma must be"),
        ({"every": 0}, "every"),
        ({"layers": "most"}, "unknown layer 'most'"),
        ({"start_epoch": -1}, "start must be"),
    ):
        penalty = dataclasses.replace(HTR.penalty, **options)
        with pytest.raises(ValueError, match=message):
            train.train(mlp(), made, dataclasses.replace(HTR, penalty=penalty), progress=False)


def test_nets_that_were_kept_before_are_found(tmp_path):
    """The hash in the name of a file is that of earlier versions of this code."""
    config = recipe.TrainConfig(epochs=8, batch_size=50, learning_rate=2e-2, milestones=(0.7,))
    config = dataclasses.replace(config, penalty=recipe.Penalty(1e-3, start_epoch=0.5))
    sharp = dataclasses.replace(config, sam=0.1, penalty=None)
    names = [train.net_path("lenet", data.load("digits"), settings, tmp_path).name for settings in (config, sharp)]
    assert names == ["net-lenet-digits-4e82c0dc.npz", "net-lenet-digits-96279ae9.npz"]


def test_a_penalty_is_part_of_the_recipe(made, tmp_path):
    paths = {train.net_path("mlp", made, config, tmp_path) for config in (SHORT, HTR)}
    stronger = dataclasses.replace(HTR, penalty=dataclasses.replace(HTR.penalty, gamma=1e-1))
    assert len(paths | {train.net_path("mlp", made, stronger, tmp_path)}) == 3


# ---- augmentation ----


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint8])
def test_augmentation_keeps_shape_type_and_range(dtype):
    images = jnp.asarray(np.random.default_rng(0).integers(3, 200, (20, 9, 12, 2)), dtype)
    found = data.augment(jax.random.key(0), images)
    assert found.shape == images.shape and found.dtype == dtype
    low, high = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    assert ((found >= low) & (found <= high)).all()
    assert_trees_all_equal(found, data.augment(jax.random.key(0), images))
    assert (found != data.augment(jax.random.key(1), images)).any()


def test_augmentation_turns_by_at_most_15_degrees_and_flips_half():
    y, x = np.mgrid[:33, :33] - 16.0
    images = np.stack([x, y], axis=-1)[None].repeat(200, 0).astype(np.float32)
    found = np.asarray(data.augment(jax.random.key(0), jnp.asarray(images)))[
        :, 16, 17
    ]  # one to the right of the middle
    side, slope = np.sign(found[:, 0]), np.abs(found[:, 1])
    np.testing.assert_allclose(np.hypot(*found.T), 1, rtol=1e-3)  # a rotation, so lengths are kept
    assert 0.4 < (side > 0).mean() < 0.6
    assert np.sin(np.pi / 12) >= slope.max() - 1e-4 and slope.max() > 0.2


# ---- checkpoints ----

LONG = recipe.TrainConfig(
    epochs=12,
    batch_size=100,
    learning_rate=0.05,
    milestones=(0.5,),
    augment=True,
    penalty=recipe.Penalty(1e-3, every=4, start_epoch=1),
)


@dataclasses.dataclass(frozen=True)
class Norm:
    """A callback that prints the epoch and records two numbers."""

    def __call__(self, epoch, params, batch_stats):
        print(epoch, flush=True)
        return {"norm": abs(params["fc1"]["kernel"]).sum(), "epoch": epoch}


def long_training(out):
    train.train_once("mlp", data.load("digits"), LONG, out, callback=Norm(), progress=False)
    (path,) = out.glob("net-*.npz")
    assert not list(out.glob("*.checkpoints"))  # removed when the net is kept
    return store.load_arrays(path)


def kill_and_resume(start, tmp_path, kills, seed):
    """Kills a run again and again, each time a random number of epochs and milliseconds after it went on."""
    expected, draw, killed = long_training(tmp_path / "whole" / "out"), random.Random(seed), 0
    assert expected["records/epoch"].tolist() == list(range(13))
    cache = jax.config.jax_compilation_cache_dir
    code = "import conftest, pathlib, sys, test_training; test_training.long_training(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"JAXHESS_TEST_CACHE": str(cache), "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    while killed < kills:
        out = tmp_path / f"from{killed}" / "out"
        while killed < kills and not list(out.glob("net-*")):
            child = start([sys.executable, "-c", code, str(out)], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(draw.randint(1, 6)):
                child.stdout.readline()
            time.sleep(draw.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            child.communicate()
            assert child.returncode in (-signal.SIGKILL, 0)
            killed += child.returncode != 0
        assert_trees_all_equal(long_training(out), expected)


def test_killed_runs_go_on_bitwise(start, tmp_path):
    kill_and_resume(start, tmp_path, 3, seed=0)


@pytest.mark.slow
def test_twenty_killed_runs_go_on_bitwise(start, tmp_path):
    kill_and_resume(start, tmp_path, 20, seed=1)


class Stop(Exception):
    """Ends a training from its callback."""


def interrupted(made, folder, epoch):
    """A training that ends after this epoch, before its checkpoint."""

    def stop(done, params, stats):
        if done == epoch:
            raise Stop
        return {"done": done}

    with pytest.raises(Stop):
        train.train(mlp(), made, HTR, callback=stop, checkpoint_dir=folder, progress=False)


def resumed(made, folder):
    seen = []

    def note(done, params, stats):
        seen.append(done)
        return {"done": done}

    return train.train(mlp(), made, HTR, callback=note, checkpoint_dir=folder, progress=False), seen


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(folder):
    """In the largest file, which holds the arrays."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(made, tmp_path, capsys, damage):
    whole = train.train(mlp(), made, HTR, progress=False, callback=lambda done, *rest: {"done": done})
    interrupted(made, tmp_path, 3)
    assert steps_in(tmp_path) == [1, 2]
    damage(tmp_path / "2")
    found, seen = resumed(made, tmp_path)
    error = capsys.readouterr().err
    assert error.count("warning: the checkpoint of epoch 2") == 1 and error.count("\n") == 1
    assert seen == [2, 3] and steps_in(tmp_path) == [2, 3]  # only the last two are kept
    assert_trees_all_equal(found, whole)


def test_with_no_whole_checkpoint_training_starts_anew(made, tmp_path, capsys):
    whole = train.train(mlp(), made, HTR, progress=False, callback=lambda done, *rest: {"done": done})
    interrupted(made, tmp_path, 3)
    for folder in (tmp_path / "1", tmp_path / "2"):
        truncate(folder)
    found, seen = resumed(made, tmp_path)
    assert capsys.readouterr().err.count("is damaged and left out") == 2 and seen == [0, 1, 2, 3]
    assert_trees_all_equal(found, whole)


def test_checkpoints_of_another_training_are_refused(made, tmp_path):
    interrupted(made, tmp_path, 2)
    with pytest.raises(ValueError, match="holds checkpoints of another training"):
        train.train(mlp(), made, SHORT, checkpoint_dir=tmp_path, progress=False)
    assert steps_in(tmp_path) == [1]


def test_checkpoints_bring_back_keys_and_types(tmp_path):
    state = {"key": jax.random.key(3), "count": jnp.int32(2), "half": jnp.ones(2, jnp.bfloat16), "none": {}}
    kept = store.Checkpoints(tmp_path, {"a": 1})
    assert kept.latest(state) is None
    kept.save(4, state, {"x": [0.1]})
    epoch, found, records = kept.latest(jax.tree.map(jnp.zeros_like, state))
    kept.close()
    assert epoch == 4 and records == {"x": [0.1]} and found["half"].dtype == jnp.bfloat16
    assert_trees_all_equal(jax.random.key_data(found.pop("key")), jax.random.key_data(state.pop("key")))
    assert_trees_all_equal(found, state)


# ---- held-out images, sharpness-aware minimisation ----


def test_what_is_held_out_is_no_longer_trained_on(made):
    found = data.hold_out(made, 9)
    assert len(found.train["label"]) == 21 and len(found.test["label"]) == 9
    assert np.bincount(found.test["label"]).tolist() == [3, 3, 3]
    images = [image.tobytes() for part in (found.train, found.test) for image in part["image"]]
    assert sorted(images) == sorted(image.tobytes() for image in made.train["image"])
    assert found.name != made.name and found.mean is made.mean
    with pytest.raises(ValueError, match="cannot hold out 30 of 30 images of made"):
        data.hold_out(made, 30)


def test_sam_takes_the_gradient_at_the_worst_point_nearby(made):
    config = recipe.TrainConfig(epochs=1, batch_size=30, learning_rate=0.05, momentum=0.0)
    rho, batch = 0.7, made.batch(made.train)
    first = train.init_state(mlp(), recipe.optimizer(config, 1), config, made).params
    grad = jax.grad(models.objective(mlp()))
    at_first = grad(first, batch)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(at_first)))
    worst = grad(jax.tree.map(lambda p, g: p + rho * g / norm, first, at_first), batch)
    found = train.train(mlp(), made, dataclasses.replace(config, sam=rho), progress=False).params
    jax.tree.map(lambda p, g, q: np.testing.assert_allclose(p - 0.05 * g, q, atol=1e-6), first, worst, found)
    plain = train.train(mlp(), made, config, progress=False).params
    assert abs(plain["fc1"]["kernel"] - found["fc1"]["kernel"]).max() > 1e-4


def test_nets_kept_before_sam_are_still_found(made, tmp_path):
    assert "sam" not in recipe.settings(SHORT)
    paths = {train.net_path("mlp", made, dataclasses.replace(SHORT, sam=rho), tmp_path) for rho in (0.0, 0.1, 0.2)}
    assert len(paths) == 3


def test_noise_stability_takes_the_mean_of_the_gradients_to_both_sides(made):
    """Before momentum and L2, at the noise of the key that is this seed's."""
    config = recipe.TrainConfig(epochs=1, batch_size=30, learning_rate=0.05, momentum=0.0, seed=3)
    sigma, batch = 0.3, made.batch(made.train)
    first = train.init_state(mlp(), recipe.optimizer(config, 1), config, made).params
    objective, key = models.objective(mlp()), recipe.keys(3)["noise"]
    tx = jh.add_noise_stability(objective, sigma, key=key)
    wanted, _ = tx.update(jax.grad(objective)(first, batch), tx.init(first), first, batch=batch)
    found = train.train(mlp(), made, dataclasses.replace(config, noise_stability=sigma), progress=False).params
    jax.tree.map(lambda p, g, q: np.testing.assert_allclose(p - 0.05 * g, q, atol=1e-6), first, wanted, found)
    plain = train.train(mlp(), made, config, progress=False).params
    assert abs(plain["fc1"]["kernel"] - found["fc1"]["kernel"]).max() > 1e-4


def test_the_noise_has_a_key_of_its_own_and_goes_with_a_penalty(made):
    data = {name: jax.random.key_data(key).tolist() for name, key in recipe.keys(3).items()}
    assert len(data) == len(set(map(tuple, data.values()))) == 5
    config = dataclasses.replace(HTR, noise_stability=0.1)
    found = train.train(mlp(), made, config, progress=False)
    assert differ(found, train.train(mlp(), made, HTR, progress=False))
    assert np.isfinite(found.history["penalty"]).all() and found.history["skipped"][-1] == 0


def test_adam_takes_the_place_of_sgd():
    params, grads = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([0.5, 3.0])}
    config = recipe.TrainConfig(
        learning_rate=0.1, momentum=0.5, weight_decay=0.1, milestones=(1,), decay=0.5, adam=True
    )
    tx, twin = recipe.optimizer(config, 1), optax.adam(optax.piecewise_constant_schedule(0.1, {1: 0.5}), b1=0.5)
    state, other = tx.init(params), twin.init(params)
    for _ in range(3):
        found, state = tx.update(grads, state, params)
        expected, other = twin.update(jax.tree.map(lambda g, p: g + 0.1 * p, grads, params), other, params)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
    assert "adam" not in recipe.settings(SHORT) and recipe.settings(config)["adam"]


def test_nets_kept_before_noise_stability_are_still_found(made, tmp_path):
    assert "noise_stability" not in recipe.settings(SHORT)
    settings = [dataclasses.replace(SHORT, noise_stability=sigma) for sigma in (0.0, 0.1, 0.2)]
    assert len({train.net_path("mlp", made, config, tmp_path) for config in settings}) == 3
    with pytest.raises(ValueError, match="noise_stability must be not negative, got -0.1"):
        recipe.TrainConfig(noise_stability=-0.1)
