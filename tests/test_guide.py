"""The user guide's examples run after those of the README, and what is measured shows in what they print."""

import contextlib
import io
import math
import pathlib
import re

import jax
import matplotlib
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the examples leave, what those of the guide print, and the folder they write to."""
    matplotlib.use("agg")
    names, printed, folder = {}, io.StringIO(), tmp_path_factory.mktemp("guide")
    # The tests' ban on rank promotion is no rule for the reader.
    with contextlib.chdir(folder), jax.numpy_rank_promotion("allow"):
        with contextlib.redirect_stdout(io.StringIO()):
            for code in blocks("README.md"):
                exec(compile(code, "README.md", "exec"), names)
        with contextlib.redirect_stdout(printed):
            for code in blocks("docs/guide.md"):
                exec(compile(code, "docs/guide.md", "exec"), names)
    yield names, printed.getvalue(), folder
    names["plt"].close("all")


def test_eigenpairs_satisfy_their_equation(ran):
    names, *_ = ran
    params = names["params"]
    assert names["values"].shape == (3,) and set(names["vectors"]) == set(params["fc1"])
    with jax.numpy_rank_promotion("allow"):
        # The guide's operator was made before its training step.
        images = jax.vmap(names["hv"])(names["vectors"])
    for part, image in images.items():
        scaled = names["values"].reshape(-1, *[1] * (image.ndim - 1)) * names["vectors"][part]
        np.testing.assert_allclose(image, scaled, atol=1e-4)


def test_labels_from_a_tuple_and_many_batches_give_the_traces_of_one(ran):
    names, printed, _ = ran
    traces = [tuple(map(float, found)) for found in re.findall(r"^(\S+) \+- (\S+)$", printed, re.MULTILINE)]
    assert len(traces) == 2
    (ggn, ggn_error), (hessian, hessian_error) = traces
    total = names["table"]["total"]
    assert abs(ggn - total.ggn_trace.mean) < 4 * ggn_error
    assert abs(hessian - total.trace.mean) < 4 * math.hypot(hessian_error, total.trace.std_error)


def test_traces_by_each_method_agree(ran):
    names, printed, _ = ran
    assert "hutchinson exact\n" in printed
    for layer, estimate in names["probed"].items():
        exact = names["table"][layer].trace
        assert abs(estimate.mean - exact.mean) < 4 * math.hypot(estimate.std_error, exact.std_error)


def test_deflated_weights_have_smaller_errors(ran):
    names, printed, _ = ran
    deflated, plain = (names[name]["fc1"].std_error("trace") for name in ("spectra", "plain"))
    assert 0 < deflated < plain and f"{deflated}\n" in printed and f"{plain}\n" in printed
    grid, density = names["spectra"]["fc1"].density()
    np.testing.assert_array_equal(names["grid"], grid)
    assert (names["low"] <= density).all() and (density <= names["high"]).all() and (names["low"] < names["high"]).any()


def test_what_is_beyond_single_layers_adds_up(ran):
    names, printed, _ = ran
    found, table = names["found"], names["table"]
    layers = [name for name in table if name != "total"]
    assert found.names == layers and 0 < found.off_diagonal_share < 1 and f"{found.off_diagonal_share}\n" in printed
    assert names["shares"].sum() == pytest.approx(table["total"].ggn_trace.mean, rel=1e-4)
    entries = jax.tree.leaves(names["exact"])
    assert sum(float(x.sum()) for x in entries) == pytest.approx(table["total"].ggn_trace.mean, rel=1e-4)
    for mean, error, exact in zip(*map(jax.tree.leaves, names["estimated"][:2]), entries, strict=True):
        assert np.mean(np.abs(mean - exact) <= 4 * error + 1e-6) > 0.98
    # ||G_l||_F^2 is the sum of the squared eigenvalues.
    ggn_values = names["ggn_values"]
    assert ggn_values.shape == (3,) and (np.diff(ggn_values) <= 0).all()
    assert 0 < (ggn_values**2).sum() < found.norms[0, 0]
    kernel = names["ggn_vectors"]["kernel"].reshape(3, -1)
    bias = names["ggn_vectors"]["bias"]
    np.testing.assert_allclose(kernel @ kernel.T + bias @ bias.T, np.eye(3), atol=1e-4)


def test_interactions_are_drawn(ran):
    names, *_ = ran
    np.testing.assert_allclose(names["coupling"].images[0].get_array() ** 2, names["found"].norms, rtol=1e-6)


def test_the_penalty_was_added(ran):
    names, *_ = ran
    state = names["opt_state"][0]
    # Of one step alone, three that the host chooses, and three with the monitor.
    assert int(state.count) == 7 and float(state.penalty) > 0 and int(state.skipped) == 0


def test_pictures_show_every_layer(ran):
    names, _, folder = ran
    densities, traces, eigenvalues = names["axes"]
    assert [text.get_text() for text in densities.get_legend().get_texts()] == list(names["table"])
    assert [text.get_text() for text in traces.get_xticklabels()] == [
        name for name in names["table"] if name != "total"
    ]
    assert [text.get_text() for text in traces.get_legend().get_texts()] == ["Hess", "G"]
    assert len(eigenvalues.lines[0].get_ydata()) == 20 and (folder / "curvature.png").stat().st_size > 10_000


def test_scipy_finds_the_eigenvalues_of_the_operator(ran):
    names, printed, _ = ran
    (found,) = re.findall(r"^\[(.*)\]$", printed, re.MULTILINE)
    np.testing.assert_allclose(sorted(map(float, found.split())), sorted(names["values"]), rtol=1e-4)


def test_the_monitor_measured_the_first_step(ran):
    names, _, folder = ran
    assert (folder / "curvature.jsonl").exists() and names["mon"].left_out == 0
    (record,) = names["records"]
    assert record["step"] == 0 and {f"trace/{name}" for name in names["table"]} < set(record)
    # After two steps with a learning rate of 0.01, the largest eigenvalue is close to that of the table.
    assert record["lambda_max/total"] == pytest.approx(names["table"]["total"].lambda_max, rel=0.5)
