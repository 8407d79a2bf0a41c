"""Files that lie, break or cannot be written, and signals: no code runs, nothing whole is lost, errors say what."""

import ast
import contextlib
import errno
import io
import json
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interruptible
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data, models, plot, run, store
from experiments.studies import demo

ROOT = pathlib.Path(run.__file__).parent.parent
SAVE = {
    "numbers.json": lambda path, seed=0: store.save_json(path, {"a": [seed] * 2000}),
    "net.npz": lambda path, seed=0: store.save_arrays(path, {"a/b": random_numbers(seed)}),
    "figure.png": lambda path, seed=0: plot.save(figure(seed), path),
}


def random_numbers(seed=0, size=20_000):
    return np.random.default_rng(seed).standard_normal(size)


def figure(seed):
    figure = plot.Figure()
    figure.subplots().plot(random_numbers(seed, 50))
    return figure


def read(path):
    return (store.load_json if path.suffix == ".json" else store.load_arrays)(path)


# ---- files that would run code ----


class Malicious:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (pathlib.Path.touch, (self.canary,))


@pytest.fixture
def canary(tmp_path):
    """A pickle that makes a file if it is loaded. After the test there must be no such file."""
    path = tmp_path / "canary"
    yield pickle.dumps(Malicious(path))
    assert not path.exists()


@pytest.mark.parametrize("name", ["numbers.json", "net.npz"])
def test_a_pickle_in_place_of_results_is_refused_and_not_run(canary, tmp_path, name):
    (tmp_path / name).write_bytes(canary)
    with pytest.raises(ValueError, match=f"{name} is damaged.*delete it"):
        read(tmp_path / name)


def test_a_pickle_inside_an_npz_is_refused_and_not_run(canary, tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, params=np.arange(3), recipe=np.array([Malicious(tmp_path / "canary")]))
    with pytest.raises(ValueError, match=r"net.npz is damaged.*allow_pickle=False"):
        store.load_arrays(path)
    content = io.BytesIO()
    np.save(content, np.array([Malicious(tmp_path / "canary")]))
    path.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="net.npz is damaged"):
        store.load_arrays(path)


def keep(folder, *epochs):
    """A folder of checkpoints of the arrays of these seeds."""
    kept = store.Checkpoints(folder, {"a": 1})
    for epoch in epochs:
        kept.save(epoch, {"w": jnp.asarray(random_numbers(epoch))}, {"x": [epoch]})
    return kept


def latest(kept):
    found = kept.latest({"w": jnp.zeros(20_000)})
    if found is not None:
        np.testing.assert_array_equal(found.state["w"], random_numbers(found.epoch).astype(np.float32))
    return found and found.epoch


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_pickles_in_place_of_a_checkpoint_are_put_aside_and_not_run(canary, tmp_path, capsys):
    """In every file at once, and in each alone."""
    kept = keep(tmp_path / "kept", 1, 2)
    whole = {path: path.read_bytes() for path in files(kept.folder / "2")}
    for chosen in ([*whole], *([path] for path in whole)):
        for path in chosen:
            path.write_bytes(canary)
        assert latest(kept) in (1, 2)  # some files say nothing that is needed
        aside = kept.folder / "damaged-2"
        if aside.exists():
            assert "epoch 2" in capsys.readouterr().err
            aside.rename(kept.folder / "2")
            kept._manager.reload()
        for path in chosen:
            path.write_bytes(whole[path])
    assert latest(kept) == 2
    kept.close()


def test_no_module_can_load_a_pickle():
    """No pickle and its kin, no eval and exec, and NumPy's switch is off wherever it is named."""
    found = []
    for path in [*ROOT.glob("experiments/**/*.py"), *ROOT.glob("jaxhess/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path, n) for n in names if n.split(".")[0] in {"pickle", "marshal", "shelve", "joblib", "dill"}]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                switch = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("allow_pickle")
                assert called not in ("eval", "exec"), f"{path}: {ast.unparse(node)}"
                assert switch == "False" or (switch is None and not called.endswith("np.load")), f"{path}: {called}"
    assert not found


# ---- files that are damaged ----


def contents():
    arrays, text = io.BytesIO(), json.dumps({"summary": {"total": [1.5, 0.25]}, "words": "é"}) + "\n"
    np.savez_compressed(arrays, **{"params/fc1": np.arange(6.0), "recipe": "text"})
    return {"numbers.json": text.encode(), "net.npz": arrays.getvalue()}


CONTENTS = contents()


def assert_whole_or_refused(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    try:
        found = read(path)
    except ValueError as error:
        assert str(path) in str(error) and "delete it and run the experiment again" in str(error)
        return False
    path.write_bytes(CONTENTS[name])
    assert name.endswith("json") or {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in read(path).items()
    }
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("name", CONTENTS)
def test_half_a_file_is_refused_wherever_it_ends(folder, name):
    assert assert_whole_or_refused(folder, name, CONTENTS[name])
    for length in range(len(CONTENTS[name].rstrip())):
        assert not assert_whole_or_refused(folder, name, CONTENTS[name][:length])


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(position=st.integers(0, len(CONTENTS["net.npz"]) - 1), flipped=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_says_nothing(folder, position, flipped):
    content = bytearray(CONTENTS["net.npz"])
    content[position] ^= flipped
    assert_whole_or_refused(folder, "net.npz", bytes(content))


class Small(models.MLP):
    hidden: tuple[int, ...] = (4,)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with all kinds of results of a table, the words that made them, and made data in place of MNIST."""
    rng, label = np.random.default_rng(0), np.arange(84, dtype=np.int32) % 10
    split = {"image": rng.integers(0, 256, (84, 28, 28, 1), dtype=np.uint8), "label": label}
    parts = ({key: values[part] for key, values in split.items()} for part in (slice(64), slice(64, 84)))
    made = data.Dataset.create("mnist", 10, *parts)
    out = tmp_path_factory.mktemp("table") / "out"
    words = [f"out={out}", "preset=paper", "epochs=1", "trials=1", "images_per_class=1", "num_probes=1", "num_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *args, **options: made)
        patch.setitem(models.MODELS, "lenet", Small)
        assert run.main(["table1", *words]) == 0
        yield out, ["table1", *words]


KINDS = ["config.json", "numbers.json", "spectra.npz", "net-*.npz", "measured-*.npz"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_result_is_named_by_the_command(table, kind, capsys):
    out, words = table
    path = sorted(out.glob(kind))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        assert run.main([*words, "overwrite=true" if "*" in kind else "redraw=true"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path} is damaged") and "delete it" in error and error.count("\n") == 1
    finally:
        path.write_bytes(whole)


def test_a_damaged_net_does_not_cost_its_checkpoints(table, capsys):
    out, words = table
    path = sorted(out.glob("net-*.npz"))[0]
    whole, folder = path.read_bytes(), path.with_suffix(".checkpoints")
    keep(folder, 1).close()
    path.write_bytes(b"half")
    again = [*words, "overwrite=true"]
    assert run.main(again) == 2 and str(path) in capsys.readouterr().err
    assert (folder / "1").is_dir()
    path.write_bytes(whole)
    assert run.main(again) == 0 and not folder.exists()


# ---- disks that are full, and folders that are read-only ----


@contextlib.contextmanager
def no_file_longer_than(size):
    """What a full disk does, by the kernel: a write beyond so many bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("name", SAVE)
def test_a_full_disk_leaves_what_was_there(tmp_path, name, there_before):
    path = tmp_path / "out" / name
    if there_before:
        SAVE[name](path)
    before = path.read_bytes() if there_before else None
    with no_file_longer_than(1000), pytest.raises(ValueError, match=f"{name} cannot be written.*free space.*out="):
        SAVE[name](path, 1)
    assert (path.read_bytes() if path.exists() else None) == before
    assert files(tmp_path) == [path] * there_before


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_late_leaves_what_was_there(tmp_path, monkeypatch, call, code):
    path = tmp_path / "numbers.json"
    store.save_json(path, {"a": 1})

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ValueError, match=f"numbers.json cannot be written.*{os.strerror(code)}"):
        store.save_json(path, {"a": 2})
    assert store.load_json(path) == {"a": 1} and files(tmp_path) == [path]


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    kept = keep(tmp_path / "kept", 1, 2)
    with no_file_longer_than(8000):
        with pytest.raises(ValueError, match=rf"{kept.folder}/3 cannot be written.*free space"):
            kept.save(3, {"w": jnp.asarray(random_numbers(3))}, {})
    assert latest(kept) == 2
    kept.close()
    again = keep(kept.folder, 3)  # when there is space again
    assert latest(again) == 3
    again.close()


@pytest.fixture
def nowhere(tmp_path):
    """A folder that cannot be made, for its parent is a file: so it is for root too, whom no permission stops."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "out"


@pytest.mark.parametrize("name", SAVE)
def test_a_folder_that_cannot_be_written_is_named(nowhere, name):
    with pytest.raises(ValueError, match=f"out/{name} cannot be written.*another folder with out="):
        SAVE[name](nowhere / name)


def test_checkpoints_that_cannot_be_kept_are_named(nowhere):
    with pytest.raises(ValueError, match=f"{nowhere} cannot be written.*another folder with out="):
        store.Checkpoints(nowhere, {})


def refuse(*args, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_run_asks_first_whether_it_can_write(nowhere, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("computed what cannot be saved"))
    assert run.main(["demo", f"out={nowhere}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {nowhere} cannot be written")
    monkeypatch.setattr(store.tempfile, "TemporaryFile", refuse)
    assert run.main(["demo", f"out={tmp_path / 'new' / 'out'}"]) == 2
    assert "cannot be written (Permission denied)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["numbers.json", "net.npz"])
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    SAVE[name](tmp_path / name)
    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=f"{name} cannot be read .Permission denied") as error:
        read(tmp_path / name)
    assert "delete" not in str(error.value)


def test_a_checkpoint_that_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    kept = keep(tmp_path / "kept", 1)
    before = files(kept.folder)
    with monkeypatch.context() as patch:
        patch.setattr(kept._manager, "restore", refuse)
        with pytest.raises(ValueError, match="epoch 1 in .* cannot be read .Permission denied"):
            latest(kept)
    assert files(kept.folder) == before and latest(kept) == 1
    kept.close()


# ---- signals ----


@pytest.fixture
def handled():
    """SIGTERM as the exception that Ctrl-C is, and Ctrl-C heard."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with interruptible():
        yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_what_was_there(tmp_path, handled, number):
    path = tmp_path / "numbers.json"
    store.save_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), store.replacing(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert store.load_json(path) == {"a": 1} and files(tmp_path) == [path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_its_status_and_whole_checkpoints(start, tmp_path, number):
    out = tmp_path / "out"
    words = ["demo", "model=mlp", "epochs=5000", "batch_size=1500", f"out={out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "experiments.run", *words]
    child = start(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(out.glob("*.checkpoints/[1-9]*[0-9]")) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(number)
    error = child.communicate(timeout=300)[1]
    assert child.returncode == 128 + number, error
    assert error == f"interrupted; the same command goes on from what was kept in {out}\n"
    marker, folder = sorted(out.iterdir(), key=lambda path: path.is_dir())  # no half-written file beside them
    assert json.loads(marker.read_text())["epochs"] == 5000
    epochs = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    kept = store.Checkpoints(folder, {})
    with pytest.raises(ValueError, match="another training"):  # it can be read: its recipe is another one
        kept.latest({})
    kept.close()
    assert epochs and not list(folder.glob("damaged-*"))
