"""Pictures of what jaxhess measures, each on one Matplotlib axis, which you may pass and which you get back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jaxhess as jh

Axes = Any  # of Matplotlib, which is imported when something is drawn

# Okabe and Ito: colours for readers with any common colour blindness; dashes tell the lines apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)), "-.")
MARKERS = "osD^vP*"


def densities(
    spectra: jh.Spectrum | jh.Summary | Mapping[str, jh.Spectrum],
    ax: Axes = None,
    *,
    kappa: float = 1.25,
    bands: bool = False,
    legend: bool = True,
) -> Axes:
    """The densities of one or more spectra, on a log scale.

    An eigenvalue that Lanczos has found for certain is always visible; see `at_least_one`.

    Args:
      spectra: a `jaxhess.Spectrum`; or {name: spectrum}, such as what `jaxhess.layer_spectra` returns; or a
        `jaxhess.Summary`, whose spectra are drawn.
      ax: where to draw; by default the current axis of Matplotlib, as in seaborn.
      kappa: as for `jaxhess.Spectrum.density`; a larger value makes the bumps narrower.
      bands: whether two standard errors are shown on either side, as for `jaxhess.Spectrum.density_band`. An exact
        spectrum has none.
      legend: whether the names are shown, if there are several.

    Returns:
      The axis.

    Raises:
      ValueError: if there is no spectrum.
      TypeError: for anything other than spectra.

    Example:
      >>> import jaxhess as jh
      >>> from matplotlib.figure import Figure
      >>> from jaxhess import plot
      >>> spectra = {"a": jh.Spectrum([0.0, 2.0], [0.75, 0.25], 4), "b": jh.Spectrum([1.0], [1.0], 3)}
      >>> ax = plot.densities(spectra, Figure().subplots())
      >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
      ('eigenvalue', ['a', 'b'])

    Reference: Lin, Saad and Yang 2016, Approximating spectral densities of large matrices.
    """
    if isinstance(spectra, jh.Summary):
        spectra = spectra.spectra
    named: dict[str, Any] = {"": spectra} if isinstance(spectra, jh.Spectrum) else dict(spectra)
    _check("spectra", named, jh.Spectrum)
    ax, floor, top = _axis(ax), np.inf, -np.inf
    for i, (name, spectrum) in enumerate(named.items()):
        shown = at_least_one(spectrum)
        grid, log_density = shown.log_density(kappa=kappa)
        log_density = log_density / np.log(10)
        ax.plot(grid, log_density, color=_nth(COLORS, i), linestyle=_nth(DASHES, i), linewidth=1.2, label=name)
        # There is nothing to see below a hundredth of the density of one eigenvalue spread over the whole range.
        floor = min(floor, -np.log10(spectrum.dim * (grid[-1] - grid[0])) - 2)
        top = max(top, log_density.max())
        if bands:
            _, *ends = shown.density_band(kappa=kappa)
            low, high = (np.log10(np.maximum(end, np.finfo(float).tiny)) for end in ends)
            ax.fill_between(grid, low, high, color=_nth(COLORS, i), alpha=0.2, linewidth=0)
            top = max(top, high.max())
    ax.set_ylim(floor, top + 0.5)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel(r"$\log_{10}$ density")
    return _with_legend(ax, legend and len(named) > 1)


def converged(spectrum: jh.Spectrum) -> np.ndarray:
    """Which nodes of a spectrum are single eigenvalues, and do not stand for several nearby ones.

    An eigenvalue lies within the residual of each Ritz value. If the residual is at most a quarter of the distance to
    the neighbouring nodes, these eigenvalues are different ones.

    Args:
      spectrum: a `jaxhess.Spectrum`.

    Returns:
      (m,) bool, in the order of ``spectrum.nodes``.

    Example:
      >>> import jaxhess as jh
      >>> from jaxhess import plot
      >>> plot.converged(jh.Spectrum([0.0, 1.0, 9.0], [0.5, 0.25, 0.25], 8, residuals=[0.1, 0.5, 0.1])).tolist()
      [True, False, True]

    Reference: Parlett 1998, The symmetric eigenvalue problem, section 4.5 (the bound by the residual).
    """
    apart = np.minimum(np.diff(spectrum.nodes, prepend=-np.inf), np.diff(spectrum.nodes, append=np.inf))
    return spectrum.residuals <= apart / 4


def at_least_one(spectrum: jh.Spectrum) -> jh.Spectrum:
    """A spectrum in which each node that has `converged` has at least the weight of one eigenvalue.

    An unlucky start vector may give such a node so little weight that a picture does not show it.

    Args:
      spectrum: a `jaxhess.Spectrum`.

    Returns:
      A spectrum with the same nodes.

    Example:
      >>> import jaxhess as jh
      >>> from jaxhess import plot
      >>> plot.at_least_one(jh.Spectrum([0.0, 5.0], [1 - 1e-9, 1e-9], 4)).weights.round(3).tolist()
      [0.8, 0.2]

    Reference: as `converged`.
    """
    weights = np.maximum(spectrum.weights, np.where(converged(spectrum), 1 / spectrum.dim, 0))
    return dataclasses.replace(spectrum, weights=weights / weights.sum())


def traces(
    traces: Mapping[str, jh.Estimate] | Mapping[str, Mapping[str, jh.Estimate]], ax: Axes = None, *, legend: bool = True
) -> Axes:
    """The traces of the layers, in the order given, with their standard errors as bars.

    Args:
      traces: {layer: `jaxhess.Estimate`} as from `jaxhess.layer_traces`, or a `jaxhess.Summary`; or {name: one of
        these} for several lines. "total" is left out. If not all lines have the same layers, the axis is the relative
        depth.
      ax: where to draw; by default the current axis of Matplotlib, as in seaborn.
      legend: whether the names are shown, if there are several.

    Returns:
      The axis; its scale is linear, and ``ax.set_yscale("log")`` changes it.

    Raises:
      ValueError: if there is no layer.
      TypeError: for anything other than estimates.

    Example:
      >>> import jaxhess as jh
      >>> from matplotlib.figure import Figure
      >>> from jaxhess import plot
      >>> ax = plot.traces({"conv1": jh.Estimate(3.0, 0.1, 8), "fc": jh.Estimate(1.0, 0.2, 8)}, Figure().subplots())
      >>> [text.get_text() for text in ax.get_xticklabels()]
      ['conv1', 'fc']

    Reference: as `jaxhess.layer_traces`.
    """
    several = all(isinstance(value, Mapping) for value in traces.values())
    lines = {name: _estimates(line) for name, line in (traces.items() if several else [("", traces)])}
    _check("traces", lines, dict)
    names = [list(line) for line in lines.values()]
    same, ax = all(layers == names[0] for layers in names), _axis(ax)
    for i, (name, line) in enumerate(lines.items()):
        _check("traces", line, jh.Estimate)
        depth = np.arange(len(line)) if same else np.linspace(0, 1, len(line))
        mean, error = ([float(getattr(x, part)) for x in line.values()] for part in ("mean", "std_error"))
        style = dict(color=_nth(COLORS, i), marker=_nth(MARKERS, i), linestyle=_nth(DASHES, i), label=name)
        ax.errorbar(depth, mean, np.nan_to_num(error), capsize=2, markersize=4, linewidth=1.2, **style)
    if same:
        ax.set_xticks(range(len(names[0])), names[0], rotation=45 if len(names[0]) < 8 else 90)
    ax.set_xlabel("layer" if same else "relative depth")
    ax.set_ylabel("trace")
    return _with_legend(ax, legend and len(lines) > 1)


def evolution(
    records: Sequence[Mapping[str, float]], ax: Axes = None, *, metric: str = "trace", legend: bool = True
) -> Axes:
    """One line for each layer over training, from dark (first) to light (last), and the whole net in black.

    Each record has a marker, so that a single one is visible too.

    Args:
      records: what `jaxhess.monitor.Monitor` returned or `jaxhess.monitor.read` reads: dicts with "step" and
        "METRIC/LAYER", and with "METRIC_std_error/LAYER" where a band shows the standard error.
      ax: where to draw; by default the current axis of Matplotlib, as in seaborn.
      metric: what is drawn.
      legend: whether the layers are named.

    Returns:
      The axis; its scale is logarithmic if all values are positive.

    Raises:
      ValueError: if no record has the metric, listing those that there are.

    Example:
      >>> from matplotlib.figure import Figure
      >>> from jaxhess import plot
      >>> records = [{"step": 0, "trace/fc": 2.0}, {"step": 10, "trace/fc": 1.0}]
      >>> ax = plot.evolution(records, Figure().subplots())
      >>> ax.get_xlabel(), ax.lines[0].get_ydata().tolist()
      ('step', [2.0, 1.0])

    Reference: as `jaxhess.layer_traces`.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    layers = [name.partition("/")[2] for name in names if name.startswith(f"{metric}/")]
    if not layers:
        known = sorted({name.partition("/")[0] for name in names if "/" in name and "_std_error/" not in name})
        raise ValueError(f"no record has the metric {metric!r}; choose from {known}")
    inner, ax = [layer for layer in layers if layer != "total"], _axis(ax)
    colors = dict(zip(inner, _shades(len(inner)), strict=True)) | {"total": "black"}
    for layer in sorted(layers, key=lambda layer: layer == "total"):
        found = [record for record in records if f"{metric}/{layer}" in record]
        x, y = ([record[name] for record in found] for name in ("step", f"{metric}/{layer}"))
        error = np.array([record.get(f"{metric}_std_error/{layer}", 0.0) for record in found])
        style = dict(color=colors[layer], linestyle=DASHES[layer == "total"], marker="o", markersize=2.5)
        ax.plot(x, y, linewidth=1.2, label="whole net" if layer == "total" else layer, **style)
        ax.fill_between(x, y - error, y + error, color=colors[layer], alpha=0.15, linewidth=0)
    if all(value > 0 for line in ax.lines for value in line.get_ydata() if np.isfinite(value)):
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(metric)
    return _with_legend(ax, legend)


def eigenvalues(
    values: np.ndarray | jh.Spectrum | Mapping[str, Any], ax: Axes = None, *, k: int | None = None, legend: bool = True
) -> Axes:
    """The largest eigenvalues as stems, by their rank.

    Args:
      values: eigenvalues in any order, as from `jaxhess.ggn_eigenvalues` or `jaxhess.top_eigenpairs`; or a
        `jaxhess.Spectrum`, whose `converged` nodes are drawn; or {name: one of these}.
      ax: where to draw; by default the current axis of Matplotlib, as in seaborn.
      k: how many to draw; all by default.
      legend: whether the names are shown, if there are several.

    Returns:
      The axis.

    Raises:
      ValueError: if there are no eigenvalues.

    Example:
      >>> from matplotlib.figure import Figure
      >>> from jaxhess import plot
      >>> ax = plot.eigenvalues([1.0, 5.0, 3.0], Figure().subplots(), k=2)
      >>> ax.lines[0].get_ydata().tolist()
      [5.0, 3.0]

    Reference: as `jaxhess.top_eigenpairs`.
    """
    named = dict(values) if isinstance(values, Mapping) else {"": values}
    named = {name: _largest(found, k) for name, found in named.items()}
    if not sum(map(len, named.values())):
        raise ValueError("there are no eigenvalues to draw; of a Spectrum those that have converged are drawn")
    ax = _axis(ax)
    for i, (name, found) in enumerate(named.items()):
        rank = np.arange(1, len(found) + 1) + 0.8 * (i - (len(named) - 1) / 2) / len(named)
        ax.vlines(rank, 0, found, color=_nth(COLORS, i), linewidth=1)
        ax.plot(rank, found, color=_nth(COLORS, i), marker=_nth(MARKERS, i), markersize=4, linestyle="", label=name)
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue")
    return _with_legend(ax, legend and len(named) > 1)


def interactions(found: jh.Interactions, ax: Axes = None) -> Axes:
    """A map of how strongly layers are coupled: ||A_lk||_F for each pair of layers, on a log scale.

    Values below a millionth of the largest one have the lowest colour; zeros are left white.

    Args:
      found: what `jaxhess.layer_interactions` returns.
      ax: where to draw; by default the current axis of Matplotlib, as in seaborn.

    Returns:
      The axis, with a colour bar next to it.

    Raises:
      ValueError: if there is no layer.
      TypeError: for anything other than interactions.

    Example:
      >>> import numpy as np, jaxhess as jh
      >>> from matplotlib.figure import Figure
      >>> from jaxhess import plot
      >>> found = jh.Interactions(["a", "b"], np.array([[4.0, 1.0], [1.0, 9.0]]), np.zeros((2, 2)))
      >>> ax = plot.interactions(found, Figure().subplots())
      >>> ax.images[0].get_array().tolist()
      [[2.0, 1.0], [1.0, 3.0]]

    Reference: as `jaxhess.layer_interactions`.
    """
    if not isinstance(found, jh.Interactions):
        raise TypeError(f"interactions must be an object of Interactions, got {found!r}; layer_interactions makes one")
    if not found.names:
        raise ValueError("there are no interactions to draw")
    ax = _axis(ax)
    from matplotlib.colors import LogNorm

    norms = np.ma.masked_less_equal(np.sqrt(np.maximum(found.norms, 0)), 0)
    top = norms.max() if norms.count() else 1.0
    scale = LogNorm(max(norms.min(), 1e-6 * top) if norms.count() else 0.1, top)
    image = ax.imshow(norms, norm=scale, cmap="viridis")
    ax.set_xticks(range(len(found.names)), found.names, rotation=45 if len(found.names) < 8 else 90)
    ax.set_yticks(range(len(found.names)), found.names)
    ax.figure.colorbar(image, ax=ax, label="Frobenius norm of the block")
    return ax


def _largest(values, k):
    """(k,) the largest first."""
    if isinstance(values, jh.Spectrum):
        values = values.nodes[converged(values)]
    return np.sort(np.asarray(values, float).ravel())[::-1][:k]


def _estimates(line):
    """{layer: Estimate} without the whole net, of traces or of a Summary."""
    pairs = ((name, value.trace if isinstance(value, jh.Record) else value) for name, value in line.items())
    return {name: value for name, value in pairs if name != "total"}


def _check(what, named, kind):
    if not named:
        raise ValueError(f"there are no {what} to draw")
    for name, value in named.items():
        if not isinstance(value, kind):
            raise TypeError(f"{what} must be objects of {kind.__name__}, got {value!r} under {name!r}")


def _axis(ax):
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("drawing needs Matplotlib: `pip install matplotlib`") from error
    return plt.gca()


def _shades(count):
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, count))


def _nth(cycle, i):
    return cycle[i % len(cycle)]


def _with_legend(ax, wanted):
    if wanted:
        ax.legend(fontsize="small", frameon=False)
    return ax
