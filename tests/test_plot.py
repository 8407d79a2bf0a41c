"""The pictures of the library: what stands on the axis is what was given."""

import doctest
import inspect
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import jaxhess as jh

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from jaxhess import plot

ONE = jh.Spectrum([0.0, 2.0], [0.75, 0.25], 4)
TWO = jh.Spectrum([-1.0, 0.0, 5.0], [0.2, 0.6, 0.2], 5)


@pytest.fixture(autouse=True)
def no_window():
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return Figure().subplots()


def names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ---- densities ----


def test_the_density_of_one_spectrum(ax):
    assert plot.densities(ONE, ax) is ax
    (line,) = ax.lines
    grid, log_density = line.get_data()
    np.testing.assert_allclose(scipy.integrate.trapezoid(10.0**log_density, grid), 1, rtol=1e-3)
    np.testing.assert_array_equal(grid, ONE.density()[0])
    np.testing.assert_allclose(log_density, plot.at_least_one(ONE).log_density()[1] / math.log(10))
    assert ax.get_legend() is None and ax.get_xlabel() == "eigenvalue"


def test_several_spectra_share_an_axis_and_a_legend(ax):
    plot.densities({"one": ONE, "two": TWO}, ax)
    assert names(ax) == ["one", "two"] and len(ax.lines) == 2
    assert len({line.get_color() for line in ax.lines}) == len({line.get_linestyle() for line in ax.lines}) == 2
    plot.densities({"three": ONE, "four": TWO}, other := Figure().subplots(), legend=False, kappa=3.0)
    assert other.get_legend() is None
    assert max(other.lines[0].get_ydata()) > max(ax.lines[0].get_ydata())  # a narrower kernel is higher


def test_an_eigenvalue_that_was_found_is_seen(ax):
    """Whatever the start vector gave it: half of nothing, and no more than it had where it is not known for itself."""
    weights = [1 - 3e-6, 1e-6, 1e-6, 1e-6 - 1e-12, 1e-12]
    spectrum = jh.Spectrum([0.0, 1.0, 1.1, 5.0, 9.0], weights, 1000, residuals=[0.4, 0.05, 0.05, 1e-3, 1e-3])
    np.testing.assert_array_equal(plot.converged(spectrum), [False, False, False, True, True])
    shown = plot.at_least_one(spectrum)
    np.testing.assert_allclose(shown.weights * 1000, [998, 1e-3, 1e-3, 1, 1], rtol=0.01)
    plot.densities(spectrum, ax)
    grid, log_density = ax.lines[0].get_data()
    assert log_density[np.argmin(np.abs(grid - 9))] > ax.get_ylim()[0] + 1


def test_exact_eigenvalues_have_all_converged():
    assert plot.converged(jh.Spectrum([1.0, 1.0, 2.0], [1 / 3] * 3, 3)).all()  # repeated ones too
    assert plot.converged(jh.Spectrum([3.0], [1.0], 7, residuals=[0.5])).all()  # there is no other to confuse it with


def test_a_summary_shows_its_spectra(ax):
    loss = lambda w, batch: jnp.sum(w["a"] ** 2) + 3 * jnp.sum(w["b"] ** 2)
    table = jh.summarize(loss, {"a": jnp.ones(2), "b": jnp.ones(3)}, None, key=jax.random.key(0))
    plot.densities(table, ax)
    assert names(ax) == ["a", "b", "total"]
    plot.densities(table.spectra, other := Figure().subplots())
    for line, expected in zip(ax.lines, other.lines, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), expected.get_xydata())


def test_bands_are_two_standard_errors_wide_and_come_where_asked(ax):
    drawn = jh.Spectrum([0.0, 1.0, 5.0], [0.5, 0.3, 0.2], 50, num_draws=2, residuals=[9.0, 9.0, 9.0])
    plot.densities({"drawn": drawn, "exact": ONE}, ax)
    assert not ax.collections
    plot.densities({"drawn": drawn, "exact": ONE}, other := Figure().subplots(), bands=True)
    ends = [band.get_paths()[0].vertices for band in other.collections]
    grid, low, high = drawn.density_band()
    for x in (0.0, 1.0, 5.0):
        point = np.argmin(np.abs(grid - x))
        here = ends[0][np.isclose(ends[0][:, 0], grid[point]), 1]
        np.testing.assert_allclose([here.min(), here.max()], np.log10([low[point], high[point]]))
        assert here.max() > here.min()
    line, band = other.lines[1].get_xydata(), ends[1][ends[1][:, 1] > -100]  # above underflow
    assert len(band) > 100
    np.testing.assert_allclose(np.interp(band[:, 0], *line.T), band[:, 1])  # exact: no width


# ---- traces ----


def test_traces_of_layers_with_their_standard_errors(ax):
    estimates = {"conv1": jh.Estimate(3.0, 0.5, 8), "fc": jh.Estimate(-1.0, 0.25, 8), "total": jh.Estimate(2.0, 1.0, 8)}
    assert plot.traces(estimates, ax) is ax
    line, _, (bars,) = ax.containers[0]
    np.testing.assert_array_equal(line.get_xydata(), [[0, 3], [1, -1]])
    np.testing.assert_array_equal([s[:, 1] for s in bars.get_segments()], [[2.5, 3.5], [-1.25, -0.75]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["conv1", "fc"] and ax.get_legend() is None


def test_traces_of_a_summary_and_of_several_nets(ax):
    loss = lambda w, batch: jnp.sum(w["a"] ** 2) + 3 * jnp.sum(w["b"] ** 2)
    table = jh.summarize(loss, {"a": jnp.ones(2), "b": jnp.ones(3)}, None, key=jax.random.key(0))
    plot.traces(table, ax)
    np.testing.assert_allclose(
        ax.containers[0][0].get_ydata().astype(float), [float(r.trace.mean) for r in table.values()][:-1]
    )
    np.testing.assert_allclose(sorted(ax.containers[0][0].get_ydata().astype(float))[-1], 18, rtol=1e-4)
    other = {"x": jh.Estimate(1.0, math.nan, 1), "y": jh.Estimate(1.0, 0.0, 0), "z": jh.Estimate(1.0, 0.1, 2)}
    plot.traces({"net": table, "other": other}, axis := Figure().subplots())
    assert names(axis) == ["net", "other"] and axis.get_xlabel() == "relative depth"
    np.testing.assert_array_equal(axis.containers[1][0].get_xdata(), [0, 0.5, 1])


# ---- evolution ----


def record(step, scale=1.0):
    return {"step": step, "trace/fc": 2.0 * scale, "trace_std_error/fc": 0.5, "trace/total": 3.0 * scale}


def test_evolution_has_a_line_for_each_layer_and_the_net_in_black(ax):
    late = record(20, 3.0) | {"trace/new": 1.0}
    assert plot.evolution([record(0), record(10, 2.0), late], ax) is ax
    assert names(ax) == ["fc", "new", "whole net"] and ax.get_ylabel() == "trace" and ax.get_yscale() == "log"
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(lines["fc"].get_xydata(), [[0, 2], [10, 4], [20, 6]])
    np.testing.assert_array_equal(lines["new"].get_xydata(), [[20, 1]])
    assert lines["whole net"].get_color() == "black"
    assert all(line.get_marker() == "o" and line.get_markersize() > 0 for line in ax.lines)  # one record is seen
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1.5 and band[:, 1].max() == 6.5


def test_evolution_of_values_below_zero_and_of_what_is_missing(ax):
    records = [{"step": 0, "lambda_min/total": -1.0}, {"step": 1, "lambda_min/total": math.nan}]
    plot.evolution(records, ax, metric="lambda_min", legend=False)
    assert ax.get_yscale() == "linear" and ax.get_legend() is None
    with pytest.raises(ValueError, match=r"no record has the metric 'lambda_max'; choose from \['trace'\]"):
        plot.evolution([record(0)], ax, metric="lambda_max")
    with pytest.raises(ValueError, match="no record has the metric 'trace'"):
        plot.evolution([], ax)


def test_evolution_of_what_the_monitor_wrote(tmp_path, ax):
    from jaxhess import monitor

    path = tmp_path / "log.jsonl"
    loss = lambda w, batch: jnp.sum(w**2) * batch
    watch = monitor.Monitor(loss, key=jax.random.key(0), sinks=[monitor.jsonl(path)], every=1, share=1.0)
    for step in range(2):
        watch(jnp.ones(2), 0.5 + step, step)
    plot.evolution(monitor.read(path), ax)
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(2.0)


# ---- eigenvalues ----


def test_eigenvalues_by_rank(ax):
    assert plot.eigenvalues(jnp.array([1.0, 5.0, -2.0]), ax) is ax
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 5], [2, 1], [3, -2]])
    stems = [segment[:, 1].tolist() for segment in ax.collections[0].get_segments()]
    assert stems == [[0, 5], [0, 1], [0, -2]]
    spectrum = jh.Spectrum([0.0, 4.0, 4.1, 9.0], [0.25] * 4, 4, residuals=[0.1, 1.0, 1.0, 0.1])
    plot.eigenvalues({"a": spectrum, "b": [1.0]}, other := Figure().subplots(), k=2)
    assert names(other) == ["a", "b"]
    np.testing.assert_array_equal(other.lines[0].get_ydata(), [9, 0])  # those at 4 are not known apart
    with pytest.raises(ValueError, match="there are no eigenvalues"):
        plot.eigenvalues([], ax)


# ---- interactions ----

NORMS = jh.Interactions(["conv", "fc"], np.array([[4.0, 0.01], [0.01, 9.0]]), np.zeros((2, 2)))


def test_interactions_are_a_map_on_a_log_scale(ax):
    assert plot.interactions(NORMS, ax) is ax
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), [[2, 0.1], [0.1, 3]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["conv", "fc"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["conv", "fc"]
    assert image.norm(0.1) == 0 and image.norm(3.0) == 1
    assert image.norm(math.sqrt(0.3)) == pytest.approx(0.5)
    (bar,) = [other for other in ax.figure.axes if other is not ax]
    assert bar.get_ylabel() == "Frobenius norm of the block"


def test_zeros_are_left_out_of_the_scale_and_so_is_rounding(ax):
    plot.interactions(NORMS._replace(norms=np.array([[4.0, 0.0], [1e-30, 1.0]])), ax)
    (image,) = ax.images
    assert image.get_array().mask.tolist() == [[False, True], [False, False]]
    assert image.norm(2e-6) == pytest.approx(0) and image.norm(2.0) == 1
    plot.interactions(NORMS._replace(norms=np.zeros((2, 2))), other := Figure().subplots())
    assert other.images[0].get_array().mask.all()
    other.figure.canvas.draw()


# ---- all of them ----

CALLS = {
    plot.densities: ONE,
    plot.traces: {"fc": jh.Estimate(1.0, 0.1, 2)},
    plot.evolution: [record(0)],
    plot.eigenvalues: [1.0],
    plot.interactions: NORMS,
}


@pytest.mark.parametrize("draw", CALLS, ids=lambda draw: draw.__name__)
def test_without_an_axis_the_current_one_is_taken(draw):
    import matplotlib.pyplot as plt

    _, (first, second) = plt.subplots(1, 2)
    plt.sca(first)
    assert draw(CALLS[draw]) is first and not second.has_data()


@pytest.mark.parametrize(
    ("draw", "given", "error", "message"),
    [
        (plot.densities, {}, ValueError, "there are no spectra"),
        (plot.densities, {"a": [1.0]}, TypeError, r"objects of Spectrum, got \[1.0\] under 'a'"),
        (plot.traces, {}, ValueError, "there are no traces"),
        (plot.traces, {"total": jh.Estimate(1.0, 0.1, 2)}, ValueError, "there are no traces"),
        (plot.interactions, [[1.0]], TypeError, r"object of Interactions, got \[\[1.0\]\]"),
        (plot.interactions, jh.Interactions([], np.zeros((0, 0)), np.zeros((0, 0))), ValueError, "no interactions"),
        (plot.traces, {"fc": 2.0}, TypeError, "objects of Estimate, got 2.0 under 'fc'"),
    ],
)
def test_what_cannot_be_drawn_is_named(ax, draw, given, error, message):
    with pytest.raises(error, match=message):
        draw(given, ax)


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, jaxhess.plot; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.densities(ONE)


def test_its_documentation_is_whole_and_runs():
    assert doctest.testmod(plot).failed == 0
    for function in (*CALLS, plot.converged, plot.at_least_one):
        text = inspect.getdoc(function)
        places = [text.find(section) for section in ("Args:", "Returns:", "Example:", "Reference:")]
        assert -1 not in places and places == sorted(places), function
        assert all(f"{argument}: " in text for argument in inspect.signature(function).parameters)
