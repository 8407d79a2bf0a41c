"""The notebooks: kept without outputs, opened alike, and run from top to bottom."""

import configparser
import importlib.metadata
import re
import sys
import types

import conftest
import pytest

from notebooks import render

NAMES = render.names()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_they_are_there():
    assert NAMES == ["htr_in_your_loop", "paper", "tour", "transformer"]
    with pytest.raises(ValueError, match="unknown notebook 'x'; choose from .'htr_in_your_loop'"):
        render.read("x")


@pytest.mark.parametrize("name", NAMES)
def test_kept_without_outputs(name):
    notebook = render.read(name)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}


def test_all_open_with_the_same_install_cell():
    (first,) = {code(render.read(name))[0].source for name in NAMES}
    assert first.startswith("REPOSITORY = ")
    others = [cell.source for name in NAMES for cell in code(render.read(name))[1:]]
    assert not any("pip" in source.split() or "REPOSITORY" in source for source in others)


FIRST = code(render.read("tour"))[0].source
VERSIONS = {"jaxhess": "0.1.0", "jax": "0.10.2"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Runs the first cell on a machine with these versions installed; returns its names and the commands it ran."""

    def run(folder=tmp_path, loaded=None, after_pip=None, **versions):
        commands = []

        def version(package):
            if (found := versions.get(package)) is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return found

        def command(words, check):
            assert check
            commands.append(words)
            if "pip" in words:
                versions.update(after_pip or {})

        monkeypatch.setattr("importlib.metadata.version", version)
        monkeypatch.setattr("subprocess.run", command)
        monkeypatch.setattr("shutil.which", lambda name: None)
        monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(render.HERE.parent)])
        if loaded:
            numbers = tuple(map(int, loaded.split(".")))
            monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(__version_info__=numbers))
        else:
            monkeypatch.delitem(sys.modules, "jax", raising=False)
        monkeypatch.chdir(folder)
        exec(FIRST, names := {})
        return names, commands

    return run


ALL = dict.fromkeys(("jaxhess", "flax", "optax", "orbax-checkpoint", "scikit-learn", "matplotlib", "tqdm"), "1.0.0")


def test_installing_does_nothing_in_a_checkout_where_all_is_there(machine):
    names, commands = machine(render.HERE, **ALL, jax="0.10.2")
    assert commands == [] and names["root"] == render.HERE.parent and sys.path[0] == str(render.HERE.parent)


def test_elsewhere_it_clones_and_installs(machine, tmp_path):
    # As on Colab: an old JAX, and no jaxhess. The clone is a folder here, and is not taken for the installed library.
    (tmp_path / "jaxhess").mkdir()
    colab = {name: found for name, found in ALL.items() if name != "jaxhess"} | {"jax": "0.7.2"}
    names, (clone, pip) = machine(**colab, after_pip=VERSIONS)
    checkout = str(tmp_path / "jaxhess-checkout")
    assert clone[:2] == ["git", "clone"] and clone[-2:] == [names["REPOSITORY"], checkout]
    assert pip[:4] == [sys.executable, "-m", "pip", "install"] and pip[-1] == f"{checkout}[experiments]"
    assert sys.path[0] == checkout


def test_a_jax_that_is_too_old_is_renewed_and_refused_if_it_stays(machine):
    _, commands = machine(render.HERE, **ALL, jax="0.7.2", after_pip={"jax": "0.10.2"})
    assert len(commands) == 1
    with pytest.raises(RuntimeError, match="needs JAX 0.10, and this is 0.7: restart the runtime"):
        machine(render.HERE, **ALL, jax="0.7.2")
    # Installed is a newer one, but the old one runs already.
    with pytest.raises(RuntimeError, match="needs JAX 0.10, and this is 0.7: restart the runtime"):
        machine(render.HERE, **ALL, jax="0.10.2", loaded="0.7.2")


def test_the_first_cell_needs_what_setup_cfg_needs():
    config = configparser.ConfigParser()
    config.read(render.HERE.parent / "setup.cfg")
    (bound,) = re.findall(r"^jax>=(.*)$", config["options.extras_require"]["experiments"], re.MULTILINE)
    assert f"NEEDED_JAX = ({bound.replace('.', ', ')})" in FIRST


SHOWS = r'show\("(\w+)"\)', r"for name in (\(.*\)):\n    show\(name\)"


def test_kept_figures_of_experiments_are_those_that_a_cell_draws():
    drawn = []
    for cell in code(render.read("paper")):
        (called, looped) = (re.findall(rf"^{words}$", cell.source, re.MULTILINE) for words in SHOWS)
        names = called + [name for found in looped for name in re.findall(r'"(\w+)"', found)]
        assert cell.metadata.get("results", []) == names
        drawn += names
    assert len(drawn) == len(set(drawn)) > 10


# Of a notebook that trains: its length in the tests that are not slow.
SHORT = {
    "tour": {"epochs=8": "epochs=1", "measure_batch(digits, 10,": "measure_batch(digits, 2,"},
    "htr_in_your_loop": {"epochs=60": "epochs=5", "range(8)": "range(2)", "1e-3, 3e-3, 1e-2, 3e-2": "1e-2,"},
    "paper": {},
    "transformer": {"range(800)": "range(20)", "num_steps=24, num_probes=16": "num_steps=4, num_probes=4"},
}
PRINTED = {
    "tour": ["test accuracy "],
    "htr_in_your_loop": ["gamma = 0.01", "left out 0", "p = "],
    "paper": [
        "silhouette",
        "HTR lowers the trace",
        "closer than all zeros",
        "of random spectra",
        "VERDICT  H_l is about 0",
    ],
    "transformer": [
        "largest eigenvalue: ",
        "as Adam sees it",
        "of the trace: ",
        "lies between blocks",
        "after a penalised step",
    ],
}
SHOWN = {
    "tour": "<th>conv1</th>",
    "htr_in_your_loop": "",
    "paper": "",
    "transformer": "<th>attention out</th>",
}  # as HTML


def check(monkeypatch, name, changes):
    """Runs a notebook; returns what it printed."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(conftest.CACHE))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    notebook = render.execute(name, changes=changes)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for words in PRINTED[name]:
        assert words in printed, words
    shown = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert SHOWN[name] in shown
    assert not any(output.output_type == "stream" and output.name == "stderr" for output in outputs)
    figures = [cell for cell in notebook.cells if "figure" in cell.metadata]
    assert figures
    for cell in figures:
        (image,) = render.images(cell)
        assert 5_000 < len(image) < 120_000
        assert (render.FIGURES / f"{cell.metadata['figure']}.png").exists()
    return printed


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(monkeypatch, name):
    check(monkeypatch, name, SHORT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if SHORT[name]])
def test_it_runs_at_full_length(monkeypatch, name):
    printed = check(monkeypatch, name, {})
    assert name != "tour" or "test accuracy 9" in printed


def test_words_to_change_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="'tour' has no cell with 'epochs=77'"):
        render.execute("tour", changes={"epochs=77": "epochs=1"})
