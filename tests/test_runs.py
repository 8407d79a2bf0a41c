"""Folders of runs: nothing is overwritten, a result says how it was made, and an interrupt ends in one line."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from experiments import data, folders, names, run, store, train
from experiments.studies import demo

ROOT = pathlib.Path(__file__).parent.parent
WHOLE = ["config.json", "figure.png", "numbers.json"]
OUT, KEPT = pathlib.Path("runs", "demo-lenet-digits"), pathlib.Path("results", "demo-lenet-digits")


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def demo_run(monkeypatch, tmp_path):
    """The demo in an empty working folder, its epochs for numbers: a list of what was computed.

    With ``ends_by`` it raises that instead, with ``keeps`` after a net.
    """

    class Quick(list):
        ends_by, keeps = None, False

    quick = Quick()

    def compute(config, out_dir, data_dir=None):
        quick.append(config.epochs)
        if quick.keeps or not quick.ends_by:
            store.save_arrays(out_dir / f"net-{config.epochs}.npz", {"w": [1.0]})
        if quick.ends_by:
            raise quick.ends_by
        store.save_json(out_dir / "numbers.json", {"epochs": config.epochs})

    def draw(config, out_dir):
        numbers = store.load_json(out_dir / "numbers.json")
        assert isinstance(config, demo.Config) and config.epochs == numbers["epochs"]
        (out_dir / "figure.png").write_text(f"a figure of {numbers}")

    monkeypatch.setattr(demo, "run", compute)
    monkeypatch.setattr(demo, "draw", draw)
    monkeypatch.chdir(tmp_path)
    return quick


def error(capsys, *words):
    """What a command that the user can mend says, in one line."""
    capsys.readouterr()
    assert run.main(["demo", *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def child(code, *arguments, ignored=False, **options):
    """A process with its own SIGINT, which is ignored where these tests run in the background of a script."""
    handler = signal.SIG_IGN if ignored else signal.SIG_DFL
    code = f"import signal; signal.signal(signal.SIGINT, signal.{handler.name})\n{textwrap.dedent(code)}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process, *numbers):
    """Errors, output and status of a child after these signals, which come when it has printed a line."""
    try:
        process.stdout.readline()
        for number in numbers:
            process.send_signal(number)
        output, error = process.communicate(timeout=60)
        return error, output, process.returncode
    finally:
        process.kill()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- what is there stays ----


def test_runs_compute_in_runs_and_leave_no_marker(demo_run):
    assert run.main(["demo"]) == 0
    assert files(pathlib.Path()) == ["runs"] and files(OUT) == [*WHOLE[:2], "net-8.npz", *WHOLE[2:]]


def test_a_result_of_the_same_settings_is_found_and_drawn_again(demo_run, capsys):
    assert run.main(["demo"]) == 0
    before = (OUT / "config.json").read_bytes()
    (OUT / "figure.png").unlink()
    capsys.readouterr()
    assert run.main(["demo"]) == 0
    assert f"{OUT} holds this result" in (printed := capsys.readouterr().out) and "overwrite=true" in printed
    assert demo_run == [8] and (OUT / "figure.png").exists() and (OUT / "config.json").read_bytes() == before
    assert run.main(["demo", "overwrite=true"]) == 0 and demo_run == [8, 8]


def test_a_result_of_other_settings_is_refused_and_they_are_named(demo_run, capsys):
    assert run.main(["demo", "seed=3", "milestones=0.5,0.9"]) == 0
    before = {name: (OUT / name).read_bytes() for name in files(OUT)}
    message = error(capsys, "epochs=2", "seed=3")
    assert (
        f"{OUT} holds a result of other settings: epochs is 8 there, 2 here; milestones is 0.5,0.9 there, " in message
    )
    assert "overwrite=true" in message and "out=FOLDER" in message and "seed is" not in message
    assert demo_run == [8] and {name: (OUT / name).read_bytes() for name in files(OUT)} == before

    store.save_arrays(OUT / "numbers.npz", {"of another": [1]})
    assert run.main(["demo", "epochs=2", "seed=3", "overwrite=true"]) == 0
    assert read(OUT / "config.json")["epochs"] == 2 and read(OUT / "numbers.json") == {"epochs": 2}
    assert files(OUT) == [*WHOLE[:2], "net-2.npz", "net-8.npz", *WHOLE[2:]]  # nets are in nobody's way


def test_another_experiment_in_the_folder_is_other_settings(demo_run, capsys):
    assert run.main(["demo", "out=here"]) == 0
    config = read(pathlib.Path("here", "config.json"))
    store.save_json(pathlib.Path("here", "config.json"), config | {"experiment": "fig1"})
    assert "experiment is fig1 there, demo here" in error(capsys, "out=here")


def test_settings_that_are_newer_than_a_result_have_their_defaults(demo_run, capsys):
    assert run.main(["demo"]) == 0
    config = read(OUT / "config.json")
    for name in ("method", "chunk_size", "commit", "versions", "files", "date"):
        del config[name]
    store.save_json(OUT / "config.json", config)
    assert run.main(["demo"]) == 0 and demo_run == [8]
    assert "method is auto there, lanczos here" in error(capsys, "method=lanczos")


def test_numbers_that_were_deleted_are_computed_again(demo_run):
    assert run.main(["demo"]) == 0
    (OUT / "numbers.json").unlink()
    assert run.main(["demo"]) == 0 and demo_run == [8, 8] and (OUT / "numbers.json").exists()


# ---- runs that end early ----


def test_an_interrupted_run_goes_on_and_refuses_other_settings(demo_run, capsys):
    demo_run.ends_by, demo_run.keeps = KeyboardInterrupt(), True
    assert run.main(["demo"]) == 130
    assert capsys.readouterr().err == f"interrupted; the same command goes on from what was kept in {OUT}\n"
    assert read(OUT / "running.json")["epochs"] == 8 and not (OUT / "config.json").exists()
    assert "holds an interrupted run of other settings: epochs is 8 there, 2 here" in error(capsys, "epochs=2")
    assert "config.json is not there" in error(capsys, "redraw=true")

    demo_run.ends_by = None
    assert run.main(["demo"]) == 0
    assert read(OUT / "config.json")["resumed"] and not (OUT / "running.json").exists()


def test_what_kept_nothing_is_not_in_the_way(demo_run, capsys):
    demo_run.ends_by = KeyboardInterrupt()
    assert run.main(["demo"]) == 130
    assert capsys.readouterr().err == f"interrupted; nothing was kept in {OUT}\n"
    demo_run.ends_by = ValueError("no such data")
    assert "no such data" in error(capsys, "epochs=2") and not OUT.exists()
    demo_run.ends_by = None
    assert run.main(["demo", "epochs=3"]) == 0
    assert not read(OUT / "config.json")["resumed"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), ValueError("no such data")])
def test_overwriting_that_fails_leaves_the_result(demo_run, end):
    assert run.main(["demo"]) == 0
    demo_run.ends_by = end
    assert run.main(["demo", "epochs=2", "overwrite=true"]) in (2, 130)
    assert run.main(["demo", "redraw=true"]) == 0  # draws epochs=8 with its own numbers
    assert run.main(["demo"]) == 0 and demo_run == [8, 2]


def test_files_that_a_killed_process_was_writing_are_removed(demo_run):
    OUT.mkdir(parents=True)
    for name in (".numbers-77.json", ".net-lenet-0a1b-77.npz", ".figure-7.png", ".mine.json"):
        (OUT / name).write_text("half")
    assert run.main(["demo"]) == 0
    assert [name for name in files(OUT) if name.startswith(".")] == [".mine.json"]


# ---- two at once ----


def test_a_second_run_in_a_folder_says_so_and_a_killed_one_is_not_in_the_way(demo_run, capsys):
    first = child(
        """
        import pathlib, sys
        from experiments import folders
        with folders.locked(pathlib.Path(sys.argv[1])):
            print(flush=True)
            input()
        """,
        str(OUT),
        stdin=subprocess.PIPE,
    )
    try:
        first.stdout.readline()
        for words in ([], ["redraw=true"], ["overwrite=true"]):
            assert f"another run has the folder {OUT}" in error(capsys, *words)
        assert run.main(["demo", "out=elsewhere"]) == 0 and demo_run == [8]
    finally:
        first.kill()
        first.communicate()
    assert run.main(["demo"]) == 0 and demo_run == [8, 8]


# ---- what the repository keeps ----


def test_results_are_written_by_keep_alone(demo_run, capsys):
    for out in ("results", "results/mine", "runs/../results/mine", pathlib.Path("results", "mine").absolute()):
        assert "add keep=true" in error(capsys, f"out={out}")
    assert not pathlib.Path("results").exists() and demo_run == []
    assert run.main(["demo", "out=results/mine", "keep=true"]) == 0
    assert files(pathlib.Path("results/mine")) == WHOLE  # no nets
    assert "results in results/mine" in capsys.readouterr().out and pathlib.Path("runs/mine/net-8.npz").exists()


def test_a_result_that_is_there_is_kept_without_computing_it_again(demo_run):
    assert run.main(["demo"]) == 0 and run.main(["demo", "keep=true"]) == 0
    assert demo_run == [8] and read(KEPT / "config.json") == read(OUT / "config.json")


def test_what_is_kept_is_not_overwritten_by_other_settings(demo_run, capsys):
    assert run.main(["demo", "keep=true"]) == 0
    store.save_arrays(KEPT / "spectra.npz", {"of another": [1]})
    message = error(capsys, "out=elsewhere/demo-lenet-digits", "epochs=2", "keep=true")
    assert f"{KEPT} holds a result of other settings: epochs is 8 there, 2 here" in message and demo_run == [8]
    # The settings of a redrawn result are those that it was computed with.
    assert run.main(["demo", "out=elsewhere/demo-lenet-digits", "epochs=2"]) == 0
    assert "epochs is 8 there, 2 here" in error(capsys, "out=elsewhere/demo-lenet-digits", "redraw=true", "keep=true")
    assert run.main(["demo", "out=elsewhere/demo-lenet-digits", "epochs=2", "keep=true", "overwrite=true"]) == 0
    assert read(KEPT / "numbers.json") == {"epochs": 2} and files(KEPT) == WHOLE


def test_a_kept_result_is_drawn_again_in_runs(monkeypatch, tmp_path, capsys):
    """One that was made before results said how they were made."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / KEPT, KEPT)
    config = read(KEPT / "config.json")
    for name in ("commit", "versions", "files", "date", "wall_seconds", "resumed", "dirty", "platform"):
        config.pop(name, None)
    (KEPT / "config.json").write_text(json.dumps(config | {"jax": "0.10.2"}))
    before = {name: (KEPT / name).read_bytes() for name in files(KEPT)}
    assert run.main(["demo", "redraw=true"]) == 0
    assert {name: (KEPT / name).read_bytes() for name in files(KEPT)} == before
    assert (OUT / "figure.png").read_bytes()[:4] == b"\x89PNG" and files(OUT) == ["figure.png"]
    (KEPT / "figure.png").unlink()
    assert run.main(["demo", "redraw=true", "keep=true"]) == 0
    assert (KEPT / "figure.png").read_bytes() == (OUT / "figure.png").read_bytes()


def test_nets_are_found_beside_and_where_they_were_left_before(tmp_path):
    wanted = tmp_path / "runs" / "new" / "net-a.npz"
    assert store.find(wanted) is None
    (tmp_path / "results" / "old").mkdir(parents=True)
    (tmp_path / "results" / "old" / "net-a.npz").touch()
    assert store.find(wanted) == tmp_path / "results" / "old" / "net-a.npz"
    assert store.find(tmp_path / "elsewhere" / "new" / "net-a.npz") is None
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "net-a.npz").touch()
    assert store.find(wanted) == tmp_path / "runs" / "other" / "net-a.npz"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_git_ignores_runs_and_keeps_the_small_files_of_results():
    paths = ["runs/a/numbers.json", "results/a/net-a.npz"]
    paths += [f"results/a/{name}" for name in (*folders.NUMBERS, *WHOLE)]
    done = subprocess.run(["git", "-C", ROOT, "check-ignore", *paths], capture_output=True, text=True)
    assert done.stdout.split() == paths[:2]


# ---- how a result was made ----


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


def test_a_result_says_how_it_was_made(demo_run, monkeypatch, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "experiments").mkdir(parents=True)
    (checkout / "experiments" / "folders.py").write_text("code")
    monkeypatch.setattr(folders, "ROOT", checkout)
    assert run.main(["demo", "out=none", "seed=5"]) == 0
    config = read(pathlib.Path("none/config.json"))
    assert config["commit"] is None and config["dirty"] is None and config["seed"] == 5

    git(checkout, "init", "--quiet")
    git(checkout, "commit", "--quiet", "--allow-empty", "-m", "of something else")
    assert folders.made_with()["commit"] is None  # the code is not in it
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "one")
    (checkout / "notes").write_text("plays no part")
    assert run.main(["demo", "out=clean"]) == 0
    (checkout / "experiments" / "folders.py").write_text("other code")
    assert run.main(["demo", "out=dirty"]) == 0
    clean, dirty = (read(pathlib.Path(name, "config.json")) for name in ("clean", "dirty"))
    assert clean["commit"] == dirty["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert (clean["dirty"], dirty["dirty"]) == (False, True)

    import jax
    import jaxlib
    import numpy as np

    assert clean["versions"]["python"] == sys.version.split()[0] and clean["versions"]["numpy"] == np.__version__
    assert clean["versions"]["jax"] == jax.__version__ and clean["versions"]["jaxlib"] == jaxlib.__version__
    assert {"jaxhess", "flax"} <= set(clean["versions"])
    assert clean["device"] == jax.devices()[0].device_kind and sys.platform in clean["platform"].lower()
    assert 0 <= clean["wall_seconds"] < 60 and clean["date"][:2] == "20" and not clean["resumed"]


def test_the_wall_time_is_that_of_the_computation(demo_run, monkeypatch):
    clock = iter([100.0, 3725.25])
    monkeypatch.setattr(folders.time, "monotonic", lambda: next(clock))
    assert run.main(["demo"]) == 0 and read(OUT / "config.json")["wall_seconds"] == 3625.2


def test_where_the_code_is_another_now_the_result_says_so(demo_run, monkeypatch, capsys):
    made = folders.made_with() | {"commit": "0123456789abcdef", "dirty": False}
    monkeypatch.setattr(folders, "made_with", lambda: dict(made))
    assert run.main(["demo"]) == 0 and run.main(["demo"]) == 0
    assert f"made on {made['date'][:10]} by this code; " in capsys.readouterr().out
    made["commit"] = "another"
    assert run.main(["demo"]) == 0 and "by the code of commit 01234567; " in capsys.readouterr().out


# ---- interrupts ----


INSTALL = "from experiments import interrupts; interrupts.install()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_whatever_the_main_thread_does(number):
    process = child(
        """
        import time
        from experiments import interrupts
        interrupts.install()
        print(flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass  # a library that loses the interrupt
        """
    )
    error, output, status = ended(process, number, number)
    assert (status, error) == (128 + number, "interrupted; nothing was computed yet\n")


def test_what_was_printed_is_not_lost():
    code = f"import sys, time; {INSTALL}; print('in a buffer'); print(file=sys.stderr, flush=True); time.sleep(60)"
    process = child(code)
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("in a buffer\n", "interrupted; nothing was computed yet\n")


def test_an_interrupt_waits_for_the_file_that_is_written(tmp_path):
    process = child(
        """
        import pathlib, sys, time
        from experiments import interrupts, store
        interrupts.install()
        interrupts.say = lambda: "interrupted"
        with store.replacing(pathlib.Path(sys.argv[1]) / "numbers.json") as temporary:
            temporary.write_text("hal")
            print(flush=True)
            time.sleep(1)
            temporary.write_text("whole")
        time.sleep(60)
        """,
        str(tmp_path),
    )
    error, _, status = ended(process, signal.SIGINT, signal.SIGINT)
    assert (status, error) == (130, "interrupted\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("numbers.json", "whole")]


def test_a_disk_that_hangs_does_not_keep_the_process():
    code = f"{INSTALL}; interrupts.PATIENCE = 0.1; interrupts.WRITING.acquire(); print(flush=True)"
    assert ended(child(f"{code}; import time; time.sleep(60)"), signal.SIGINT)[2] == 130


def test_an_interrupt_that_is_ignored_stays_ignored():
    """As of a job that a script starts in the background."""
    code = f"{INSTALL}; print(flush=True); input(); print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    process = child(code, ignored=True, stdin=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate("\n", timeout=60) == ("True\n", "") and process.returncode == 0


@pytest.mark.parametrize("words", [["demo"], ["demo", "--help"], []])
def test_an_interrupt_while_libraries_are_imported(tmp_path, words):
    (tmp_path / "jax.py").write_text("print('importing', flush=True)\nimport time; time.sleep(60)")
    code = f"import runpy, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; sys.argv[1:] = {words}\n"
    process = child(code + "runpy.run_module('experiments.run', run_name='__main__', alter_sys=True)", cwd=tmp_path)
    assert ended(process, signal.SIGINT, signal.SIGINT)[::2] == ("interrupted; nothing was computed yet\n", 130)


def test_the_line_of_one_command_is_not_that_of_the_next(demo_run, capsys, monkeypatch):
    assert run.main(["demo"]) == 0

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load", interrupted)
    assert run.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was computed yet\n"


# ---- names ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fgi1"], r"unknown experiment 'fgi1'; .*did you mean 'fig1"),
        (["demo", "epoch=3"], "unknown key 'epoch'; .*did you mean 'epochs'"),
        (["demo", "--epoch=3"], "--epoch.*did you mean --epochs"),
        (["demo", "--keeep"], "--keeep; did you mean --keep"),
        (["demo", "--model", "lenett"], "invalid choice 'lenett' for argument '--model'. Expected one of .'lenet'"),
        (["table4", "curvatures=hesian"], "unknown curvatures 'hesian'; .*did you mean 'hessian'"),
        (["fig2", "weighting=q"], "unknown weighting 'q'; choose from"),
        (["demo", "model=lenett"], "unknown model 'lenett'; .*did you mean 'lenet'"),
        (["fig3", "model=mlp,vgg11bn"], "unknown model 'vgg11bn'; .*did you mean 'vgg11"),
        (["demo", "dataset=digit"], "unknown data set 'digit'; .*did you mean 'digits'"),
        (["fig3", "dataset=mnist,fashionmnist"], "unknown data set 'fashionmnist'; .*did you mean 'fashion_mnist'"),
        (["outliers", "dataset=cifar01:coarse_label"], "unknown data set 'cifar01'; .*did you mean 'cifar10'"),
        (["demo", "method=lancsoz"], "unknown method 'lancsoz'; .*did you mean 'lanczos'"),
        (["demo", "curvatures=hesian,ggn"], "unknown curvatures 'hesian'; .*did you mean 'hessian'"),
        (["table1", "curvature=gnn"], "unknown curvature 'gnn'; .*did you mean 'ggn'"),
        (["table1", "preset=realeased"], "unknown preset 'realeased'; .*did you mean 'released'"),
        (["bench", "model=resnet"], "unknown model 'resnet'; .*did you mean 'resnet18'"),
    ],
)
def test_what_was_meant_is_said_before_anything_is_loaded(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAXHESS_DATA_DIR", raising=False)
    for module, name in ((data, "load"), (train, "train")):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("loaded or trained"))
    assert run.main(words) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and not files(tmp_path)
    assert re.search(message, text)


def test_a_name_that_is_like_none_gets_the_list_alone():
    with pytest.raises(ValueError) as caught:
        names.check("colour", "qqq", ["red", "green"])
    assert str(caught.value) == "unknown colour 'qqq'; choose from ['green', 'red']"
    names.check("colour", "red", ["red", "green"])


def test_a_data_set_of_ones_own_is_known_by_its_folder(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'mine'"):
        data.check("mine/small", str(tmp_path))
    (tmp_path / "mine").mkdir()
    data.check("mine/small:colour", str(tmp_path))


def test_a_data_set_that_is_not_prepared_is_said_before_the_first_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained"))
    for experiment in ("fig3", "fig4", "outliers"):
        words = [experiment, "model=mlp", "dataset=digits,mnist", f"data_dir={tmp_path}", f"out={tmp_path / 'out'}"]
        assert run.main(words) == 2 and "'mnist' is not in" in capsys.readouterr().err
