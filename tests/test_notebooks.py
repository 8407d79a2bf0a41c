"""The notebooks: kept without outputs, opened alike, and run from top to bottom."""

import re
import sys

import conftest
import pytest

from notebooks import render

NAMES = render.names()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_they_are_there():
    assert NAMES == ["htr_in_your_loop", "paper", "tour"]
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


def test_installing_does_nothing_where_all_is_there_and_says_what_it_needs_elsewhere(monkeypatch, tmp_path):
    source = code(render.read("tour"))[0].source
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail(f"ran {args}"))
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(render.HERE.parent)])
    monkeypatch.chdir(render.HERE)
    exec(source, names := {})
    assert names["root"] == render.HERE.parent and sys.path[0] == str(render.HERE.parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="REPOSITORY is empty"):
        exec(source, {})
    # With an address it clones, and goes on from there.
    commands = []
    monkeypatch.setattr("subprocess.run", lambda words, check: commands.append(words))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(re.sub('= ""', '= "git@example.org:jaxhess"', source, count=1), {})
    assert commands[0][:2] == ["git", "clone"] and commands[0][-2] == "git@example.org:jaxhess"
    assert f"{tmp_path / 'jaxhess'}[experiments]" in commands[1]


# Of a notebook that trains: its length in the tests that are not slow.
SHORT = {
    "tour": {"epochs=8": "epochs=1", "measure_batch(digits, 10,": "measure_batch(digits, 2,"},
    "htr_in_your_loop": {"epochs=60": "epochs=5", "range(8)": "range(2)", "1e-3, 3e-3, 1e-2, 3e-2": "1e-2,"},
    "paper": {},
}
PRINTED = {
    "tour": ["test accuracy ", "conv1", "+-"],
    "htr_in_your_loop": ["gamma = 0.01", "left out 0", "p = "],
    "paper": ["CE + HTR", "silhouette", "HTR lowers the trace", "outliers of G_l", "generalisation gap at the end"],
}


def check(monkeypatch, name, changes):
    """Runs a notebook; returns what it printed."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(conftest.CACHE))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    notebook = render.execute(name, changes=changes)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for words in PRINTED[name]:
        assert words in printed, words
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
