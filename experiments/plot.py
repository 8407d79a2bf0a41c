"""Figures from saved numbers: nothing here computes curvature, so a figure redraws without the net or its data."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import jaxhess as jh
from experiments import store
from jaxhess import plot as jhplot
from jaxhess.plot import COLORS, DASHES, MARKERS

LABELS = {
    "hessian": r"Hess",
    "ggn": r"$G$",
    "functional": r"$H$",
    "lenet": "LeNet",
    "mlp": "MLP",
    "vgg11": "VGG11",
    "vgg13": "VGG13",
    "vgg16": "VGG16",
    "vgg11_bn": "VGG11-BN",
    "vgg13_bn": "VGG13-BN",
    "vgg16_bn": "VGG16-BN",
    "resnet18": "ResNet18",
    "resnet18_noskip": "ResNet18 without skips",
    "densenet": "DenseNet-40-12",
    "gpt": "GPT",
    "vit": "ViT",
    "gpt_10m": "GPT (10 M)",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn_cropped": "SVHN",
    "shakespeare": "Tiny Shakespeare",
}
METRICS = {
    "wasserstein": "Wasserstein (normalised)",
    "jensen_shannon": "Jensen-Shannon (normalised)",
    "kl_divergence": "KL(layer || net), nats",
    "legacy_wasserstein": 'legacy "Wasserstein"',
}
_STYLE = {"fontsize": 8}


def label(name: str) -> str:
    """How a net, a data set or a curvature is written in figures."""
    return LABELS.get(name, name)


def log_densities(spectra: Mapping[str, Mapping[str, jh.Spectrum]], title: str) -> Figure:
    """One panel a layer and, last, one of the whole net: log density over eigenvalues.

    Args:
      spectra: {curvature: {layer: `jaxhess.Spectrum`, ..., "total": ...}}, the curvatures with the same layers.
      title: what was run.

    Returns:
      The figure.
    """
    layers = list(next(iter(spectra.values())))
    figure, axes = _grid(len(layers), title)
    for axis, layer in zip(axes, layers, strict=False):
        jhplot.densities({label(kind): found[layer] for kind, found in spectra.items()}, axis, legend=False)
        axis.set(xlabel=None, ylabel=None)
        axis.set_title("full" if layer == "total" else layer, fontsize=8 if len(layers) <= 25 else 6.5)
    figure.supxlabel("eigenvalue", **_STYLE)
    figure.supylabel(r"$\log_{10}$ density", **_STYLE)
    if len(spectra) > 1:  # beside the label of the axis, which stands in the middle
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower right", fontsize=7, frameon=False, ncols=len(spectra))
    return figure


def layer_distances(distances: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> Figure:
    """One panel a distance, one line a net: the distance of every layer's spectrum to the whole net's.

    Args:
      distances: {net: {metric: {layer: [float, ...]}}}, metrics as in `METRICS`, of each draw and trial; mean and
        standard deviation are drawn.
      title: what was run.

    Returns:
      The figure. Where all nets have the same layers these are named and the middle ones shaded; otherwise the axis
      is the relative depth.
    """
    nets = {net: list(metrics["wasserstein"]) for net, metrics in distances.items()}
    shared = next(iter(nets.values()))
    same = all(layers == shared for layers in nets.values())
    figure, axes = _panels(2, 2, title)
    for axis, (metric, words) in zip(axes, METRICS.items(), strict=True):
        lines = {net: {layer: _estimate(distances[net][metric][layer]) for layer in nets[net]} for net in nets}
        jhplot.traces(lines, axis, legend=False)
        axis.set(xlabel=None, ylabel=None)
        if same:
            middle = [shared.index(name) for name in jh.middle_layers(shared)]
            axis.axvspan(middle[0] - 0.5, middle[-1] + 0.5, color="0.93", zorder=0)
        means = [estimate.mean for line in lines.values() for estimate in line.values()]
        if 0 < 100 * min(means) < max(means):  # large nets: of most layers nothing else could be seen
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(words, **_STYLE)
    words = "layer (shaded: the middle ones)" if same else "relative depth"
    if len(nets) > 3:
        for axis in axes[2:]:
            axis.set_xlabel(words, **_STYLE)
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    else:
        figure.supxlabel(words, **_STYLE)
        axes[0].legend(fontsize=7, frameon=False)
    return figure


def _estimate(values):
    """Mean and standard deviation, which stands where `jaxhess.plot` draws the standard error."""
    return jh.Estimate(np.mean(values), np.std(values, ddof=len(values) > 1), len(values))


def over_epochs(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    title: str,
    epochs: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """One panel a quantity, one line a setting: mean and standard deviation over trials, against epochs.

    Args:
      panels: {quantity: {setting: (trials, epochs)}}; with one value more the first is that before training.
      title: what was run.
      epochs: {setting: the epochs of its values}, which are then drawn on a log scale; by default all up to the last.

    Returns:
      The figure.
    """
    figure, axes = _panels(1, len(panels), title)
    last = min(len(trials[0]) for lines in panels.values() for trials in lines.values())
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, trials) in enumerate(lines.items()):
            x = np.arange(last + 1)[-len(trials[0]) :] if epochs is None else epochs[name]
            _band(axis, x, trials, color=COLORS[i % len(COLORS)], linestyle=DASHES[i % len(DASHES)], label=name)
        axis.set_title(quantity, **_STYLE)
        if epochs is not None:
            axis.set_yscale("log")
        axis.set_xlabel("epoch", **_STYLE)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=7, frameon=False, ncols=min(4, len(handles[0])))
    return figure


def accuracies(numbers: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], title: str) -> Figure:
    """Accuracy over epochs, and how far the last test errors are from those of the first setting.

    Left training solid and test dashed, a colour for each setting, mean and standard deviation; right the differences
    of trials with the same seed, as ticks, and their mean and standard deviation.

    Args:
      numbers: {setting: {"train_accuracy": (trials, epochs), "test_error": (trials, epochs)}}; the first setting, the
        reference, is black.
      title: what was run.

    Returns:
      The figure.
    """
    figure, (axis, differences) = _panels(1, 2, title, height=3)
    shades = colormaps["viridis"](np.linspace(0, 0.9, max(1, len(numbers) - 1)))
    for (name, metrics), color in zip(numbers.items(), ["black", *shades], strict=True):
        epochs = np.arange(1, len(metrics["train_accuracy"][0]) + 1)
        _band(axis, epochs, metrics["train_accuracy"], color=color, label=name)
        _band(axis, epochs, 1 - np.asarray(metrics["test_error"]), color=color, linestyle=DASHES[1])
    axis.set_xlabel("epoch", **_STYLE)
    axis.set_ylabel("accuracy (solid: training, dashed: test)", **_STYLE)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", fontsize=7, frameon=False, ncols=5)

    reference, *others = numbers
    last = {name: 100 * np.asarray(metrics["test_error"])[:, -1] for name, metrics in numbers.items()}
    differences.axhline(0, color="0.7", linewidth=1, zorder=0)
    for x, (name, color) in enumerate(zip(others, shades, strict=True)):
        values = last[name] - last[reference]
        style = dict(color=color, marker="o", markersize=4, capsize=3)
        differences.errorbar(x, values.mean(), values.std(ddof=len(values) > 1), **style)
        differences.plot(np.full(len(values), x + 0.2), values, "_", color="0.4", markersize=6)
    if max(abs(last[name] - last[reference]).max() for name in others) > 0.1:
        differences.set_yscale("symlog", linthresh=0.1)  # from nothing to what ruins the net
    differences.set_xticks(range(len(others)), others, rotation=45, ha="right")
    differences.set_ylabel(f"test error - that of {reference}, points", **_STYLE)
    return figure


def layers_over_epochs(
    panels: Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[Sequence[float]]]]], title: str
) -> Figure:
    """One panel a net, one line a layer from dark (first) to light (last), the whole net in black.

    Args:
      panels: {net: (epochs, {layer: lambda_max (trials, epochs), ..., "total": ...})}.
      title: what was run.

    Returns:
      The figure.
    """
    columns = min(2, len(panels))
    figure, axes = _panels(-(-len(panels) // columns), columns, title, height=2.6)
    for axis, (name, (epochs, layers)) in zip(axes, panels.items(), strict=False):
        shades = colormaps["viridis"](np.linspace(0, 0.9, len(layers) - 1))
        for (layer, trials), color in zip(layers.items(), [*shades, "black"], strict=True):
            words = "full" if layer == "total" else layer
            _band(axis, epochs, trials, color=color, label=words, linestyle=DASHES[layer == "total"])
        axis.set_yscale("log")
        axis.set_title(name, **_STYLE)
        where = dict(fontsize=6, frameon=False, labelspacing=0.2, handlelength=1.2)
        if len(layers) <= 12:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), **where)
            continue
        axis.legend(handles=axis.lines[-1:], **where)  # so many shades need a scale, not names
        names = [layer for layer in layers if layer != "total"]
        scale = ScalarMappable(cmap=ListedColormap(shades))
        bar = figure.colorbar(scale, ax=axis, ticks=[0, 1], aspect=30, pad=0.02)
        bar.ax.set_yticklabels([names[0], names[-1]], fontsize=6)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supylabel(r"$\lambda_{\max}$", **_STYLE)
    figure.supxlabel("epoch", **_STYLE)
    return figure


def clusters(panels: Mapping[str, tuple[np.ndarray, float]], classes: int, title: str) -> Figure:
    """One panel a layer: points of C classes in the plane, C - 1 of each, and behind them one cross of each class.

    Args:
      panels: {layer: ((C (C - 1) + C, 2) points, their silhouette in the space that they were taken from)}; "total"
        for the net.
      classes: C.
      title: what was run.

    Returns:
      The figure.
    """
    figure, axes = _grid(len(panels), title, height=2.2)
    colors = colormaps["tab10" if classes <= 10 else "gist_rainbow"](np.linspace(0, 1, classes))
    labels = np.repeat(np.arange(classes), classes - 1)
    for axis, (layer, (points, silhouette)) in zip(axes, panels.items(), strict=False):
        axis.scatter(*points[:-classes].T, color=colors[labels], s=8, linewidths=0)
        axis.scatter(*points[-classes:].T, color=colors, s=60, marker="X", edgecolors="black", linewidths=0.6)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(True)
        axis.set_title(f"{'full' if layer == 'total' else layer} (silhouette {silhouette:.2f})", **_STYLE)
    if classes <= 20:
        handles = [axes[0].scatter([], [], color=color, s=12, label=str(c)) for c, color in enumerate(colors)]
        style = dict(loc="outside lower center", fontsize=7, title_fontsize=7, frameon=False, columnspacing=0.8)
        figure.legend(handles=handles, title="class c of the examples", ncols=10, handletextpad=0.1, **style)
    return figure


def strengths(
    methods: Mapping[str, Sequence[Mapping]],
    none: Mapping,
    chosen: Mapping[str, Mapping],
    effects: Mapping[str, tuple[float, float, float]],
    margin: float,
    words: Mapping[str, tuple[str, str]],
    title: str,
) -> Figure:
    """One column a method: the held-out error and the trace against the strength; below, the effects on the test error.

    Args:
      methods: {method: [{"strength": float, "trials": [{"held_out_error", "trace": float}, ...]}, ...]}, of which mean
        and standard deviation over trials are drawn. An error of more than 1.25 times that without any stands at the
        upper edge as a number.
      none: such an entry without any of them, which is drawn as a band.
      chosen: {method: the entry that was chosen}, which has a ring.
      effects: {method: (mean, low, high)} of the test error minus that without any, in points.
      margin: effects up to it count as none.
      words: {method: (its name, the name of its strength)}.
      title: what was run.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    figure.suptitle(textwrap.fill(title, 105), fontsize=8)
    grid = figure.add_gridspec(3, len(methods), height_ratios=[1, 1, 0.7])
    rows = {"held_out_error": ("held-out error, %", 100), "trace": ("Tr(Hess) at the end", 1)}
    drawn = dict(zip(methods, zip(COLORS, MARKERS, strict=False), strict=False))
    for row, (metric, (axis_label, factor)) in enumerate(rows.items()):

        def moments(point, metric=metric, factor=factor):
            values = [factor * record[metric] for record in point["trials"]]
            return np.mean(values), np.std(values, ddof=len(values) > 1)

        mean, deviation = moments(none)
        top, shared = 1.25 * mean if metric.endswith("error") else np.inf, None
        for column, (method, points) in enumerate(methods.items()):
            axis = shared = figure.add_subplot(grid[row, column], sharey=shared)
            color, marker = drawn[method]
            axis.axhspan(mean - deviation, mean + deviation, color="0.88", linewidth=0, label="none")
            axis.axhline(mean, color="0.5", linewidth=1)
            inside = [point for point in points if moments(point)[0] <= top]
            y, error = np.reshape([moments(point) for point in inside], (-1, 2)).T
            style = dict(color=color, marker=marker, markersize=4, linewidth=1.2, capsize=2)
            axis.errorbar([point["strength"] for point in inside], y, error, **style)
            ring = dict(markersize=10, markerfacecolor="none", markeredgecolor="black", linestyle="none")
            axis.plot(chosen[method]["strength"], moments(chosen[method])[0], "o", label="chosen", **ring)
            axis.set_xscale("log")
            if metric == "trace":
                axis.set_yscale("log")
            for point in points:
                if np.isnan(value := moments(point)[0]):
                    place = dict(transform=axis.get_xaxis_transform(), fontsize=7, ha="center", va="top", rotation=90)
                    axis.text(point["strength"], 0.97, "diverged", color=color, **place)
                elif value > top:
                    axis.plot(
                        point["strength"], 0.97, "^", color=color, markersize=5, transform=axis.get_xaxis_transform()
                    )
                    place = dict(xycoords=axis.get_xaxis_transform(), xytext=(-4, -1), textcoords="offset points")
                    axis.annotate(f"{value:.0f}", (point["strength"], 0.97), ha="right", va="top", fontsize=7, **place)
            every = [point["strength"] for point in points]
            axis.set_xticks(every, [f"{strength:g}" for strength in every], rotation=45, ha="right")
            axis.set_xlim(min(every) / 1.5, max(every) * 1.5)
            axis.minorticks_off()
            _tidy(axis)
            axis.tick_params(labelleft=column == 0, labelbottom=row == 1, pad=1)
            if row == 0:
                axis.set_title(words[method][0], **_STYLE)
            else:
                axis.set_xlabel(words[method][1], **_STYLE)
            if column == 0:
                axis.set_ylabel(axis_label, **_STYLE)
        if row == 0:
            axis.legend(fontsize=7, frameon=False, loc="upper left")
    axis = figure.add_subplot(grid[2, :])
    axis.axvspan(-margin, margin, color="0.88", linewidth=0)
    axis.axvline(0, color="0.5", linewidth=1)
    for height, (method, (mean, low, high)) in enumerate(effects.items()):
        color, marker = drawn[method]
        axis.errorbar(mean, -height, xerr=[[mean - low], [high - mean]], color=color, marker=marker, capsize=2)
    axis.set_yticks(-np.arange(len(effects)), [words[method][0] for method in effects])
    axis.set_ylim(0.5 - len(effects), 0.5)
    axis.set_xlabel(
        "test error of the chosen strength - that of none, points: mean and 95% interval over new seeds", **_STYLE
    )
    _tidy(axis)
    return figure


def _tidy(axis):
    axis.tick_params(which="both", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def precision(panels: Mapping[str, Mapping[str, Mapping[str, tuple]]], title: str) -> Figure:
    """One panel a quantity, one colour an estimator: relative error against time in gradients, on log scales.

    Args:
      panels: {quantity: {estimator: {"whole net": (times, errors), "layers": (times, [median, least, largest])}}}.
      title: what was run.

    Returns:
      The figure: the whole net solid, the median layer dashed, and a band from the most to the least precise layer.
    """
    figure, axes = _panels(1, len(panels), title, height=2.6)
    for axis, (quantity, estimators) in zip(axes, panels.items(), strict=True):
        for i, (name, lines) in enumerate(estimators.items()):
            style = dict(color=COLORS[i], marker=MARKERS[i], markersize=4, linewidth=1.2)
            axis.plot(*lines["whole net"], label=f"{name}, whole net", **style)
            times, (median, least, largest) = lines["layers"]
            axis.plot(times, median, **style | dict(linestyle=DASHES[1], markersize=2.5), label=f"{name}, layers")
            axis.fill_between(times, least, largest, color=COLORS[i], alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(quantity, **_STYLE)
        axis.set_xlabel("time, gradients", **_STYLE)
        axis.grid(axis="y", color="0.92", linewidth=0.6)
    low, high = (f(axis.get_ylim()[i] for axis in axes) for i, f in ((0, min), (1, max)))
    for axis in axes:
        axis.set_ylim(low, high)
    figure.supylabel("relative error", **_STYLE)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=7, frameon=False, ncols=len(handles[0]))
    return figure


def against_time(panels: Mapping[str, Mapping[str, tuple]], title: str) -> Figure:
    """One panel a quantity, one colour an estimator: error against seconds, on log scales.

    Args:
      panels: {quantity: {estimator: (seconds, seconds of first calls or None, errors)}}.
      title: what was run.

    Returns:
      The figure: first calls, which compile, are dashed.
    """
    figure, axes = _panels(1, len(panels), title, height=4.4)
    for axis, (quantity, estimators) in zip(axes, panels.items(), strict=True):
        for i, (name, (seconds, first, errors)) in enumerate(estimators.items()):
            style = dict(color=COLORS[i], marker=MARKERS[i], markersize=4, linewidth=1.2)
            axis.plot(seconds, errors, label=name, **style)
            if first:
                words = f"{name}, first call"
                axis.plot(first, errors, **style | dict(linestyle=DASHES[1], markersize=2.5), label=words)
        axis.set(xscale="log", yscale="log")
        axis.set_title(quantity, **_STYLE)
        axis.set_xlabel("seconds for all blocks", **_STYLE)
        axis.grid(color="0.92", linewidth=0.6)
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return figure


def interactions(found: jh.Interactions, shares: Mapping[str, Sequence[float]], unit: str, title: str) -> Figure:
    """The map of layer interactions, and beside it which share of each trace the hardest examples make.

    Args:
      found: as from `jaxhess.layer_interactions`; the layers that ``shares`` names are drawn.
      shares: {layer: cumulative shares of the trace, the hardest example first, from 0 to 1}; "total" for the net.
      unit: what an example is called, such as "images".
      title: what was run.

    Returns:
      The figure.
    """
    names = [name for name in shares if name != "total"]
    count, places = len(names), [found.names.index(name) for name in names]
    part = jh.Interactions(names, *(table[np.ix_(places, places)] for table in (found.norms, found.std_error)))
    figure, (axis, curves) = _panels(1, 2, title, height=3 if count <= 8 else 4)
    jhplot.interactions(part, axis)
    axis.tick_params(which="both", labelsize=max(3.5, 7 - 0.1 * count))
    axis.spines[:].set_visible(False)
    axis.set_title("Frobenius norms of the blocks of G", **_STYLE)
    bar = axis.images[0].colorbar
    bar.set_label("")
    bar.ax.tick_params(which="both", labelsize=7)
    colors = dict(zip(names, colormaps["viridis"](np.linspace(0, 0.9, len(names))), strict=True)) | {"total": "black"}
    for name, values in shares.items():
        style = dict(linewidth=2.4, zorder=1) if name == "total" else dict(linewidth=0.9)
        label = "whole net" if name == "total" else name if count <= 8 or name in (names[0], names[-1]) else None
        x, y = np.linspace(0, 100, len(values)), 100 * np.asarray(values)
        curves.plot(x[1:], y[1:], color=colors[name], label=label, **style)
    curves.set_xscale("log")
    curves.set_xticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
    curves.minorticks_off()
    curves.set_ylim(0, 103)
    curves.set_xlabel(f"hardest {unit}, %", **_STYLE)
    curves.set_ylabel("share of the trace of G, %", **_STYLE)
    curves.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def blocks(
    nets: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], pairs: Mapping[str, np.ndarray], title: str
) -> Figure:
    """One column a net: largest eigenvalue and trace per parameter of each block; below, how far pairs are apart.

    Args:
      nets: {net: {block: [{"lambda_max", "trace", "parameters": float} of each training]}}. The mean is a dot, open
        where it is negative, and each training a tick.
      pairs: {net: (blocks, blocks)}, decades between their eigenvalues.
      title: what was run.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7.5 if len(nets) > 1 else 4.5, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    widths = [max(6, len(table)) for table in nets.values()]
    grid = figure.add_gridspec(3, len(nets), height_ratios=[1, 1, 2.1], width_ratios=widths)
    quantities = {
        r"$\lambda_{\max}$": lambda row: row["lambda_max"],
        "trace per parameter": lambda row: row["trace"] / row["parameters"],
    }
    for line, (quantity, of) in enumerate(quantities.items()):
        shared = None
        for column, ((net, table), color) in enumerate(zip(nets.items(), COLORS, strict=False)):
            axis = shared = figure.add_subplot(grid[line, column], sharey=shared)
            for x, trials in enumerate(table.values()):
                values = [of(row) for row in trials]
                axis.plot(np.full(len(values), x), np.abs(values), "_", color="0.5", markersize=8)
                fill = color if np.mean(values) > 0 else "white"
                axis.plot(x, abs(np.mean(values)), "o", color=color, markerfacecolor=fill, markersize=4)
            axis.set_yscale("log")
            axis.set_xlim(-0.6, len(table) - 0.4)
            axis.set_xticks(range(len(table)), list(table) if line else [], rotation=90)
            axis.grid(axis="y", color="0.92", linewidth=0.6)
            _tidy(axis)
            if column:
                axis.tick_params(labelleft=False)
            else:
                axis.set_ylabel(quantity, **_STYLE)
            if line == 0:
                axis.set_title(textwrap.fill(net, 30 if column else 60), **_STYLE)
    image, drawn, top = None, [], max(table.max() for table in pairs.values())
    for column, (net, table) in enumerate(pairs.items()):
        axis = figure.add_subplot(grid[2, column])
        image = axis.imshow(table, cmap="viridis", vmin=0, vmax=top)
        axis.set_xticks(range(len(table)), list(nets[net]), rotation=90)
        axis.set_yticks(range(len(table)), list(nets[net]))
        axis.tick_params(labelsize=7, length=2)
        axis.set_title(
            "decades between the eigenvalues that make the curvature" if column == 0 else "likewise", **_STYLE
        )
        drawn.append(axis)
    figure.colorbar(image, ax=drawn, location="right", aspect=30, pad=0.01).ax.tick_params(labelsize=7)
    return figure


def thresholds(
    panels: Mapping[str, tuple[Sequence[float], Mapping[str, np.ndarray], np.ndarray]], title: str
) -> Figure:
    """One column a panel: curvature in shares of a threshold over the steps of training, and below, the loss.

    Args:
      panels: {words: (steps, {quantity: (trials, steps) in shares of the threshold}, loss (trials, steps))}.
      title: what was run.

    Returns:
      The figure: mean and standard deviation over trials. The threshold is a line at 1.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.add_gridspec(2, len(panels), height_ratios=[2, 1])
    names = list(dict.fromkeys(name for _, curves, _ in panels.values() for name in curves))
    style = {name: dict(color=COLORS[i], linestyle=DASHES[i], label=name) for i, name in enumerate(names)}
    above = below = None
    for column, (words, (steps, curves, loss)) in enumerate(panels.items()):
        above = figure.add_subplot(grid[0, column], sharey=above)
        above.axhline(1, color="black", linewidth=0.8, zorder=0)
        for name in names:
            if name in curves:
                _band(above, np.asarray(steps), curves[name], **style[name])
        above.set_yscale("log")
        above.set_ylim(0.01, 5)
        above.set_title(words.replace(", ", "\n"), **_STYLE)
        below = figure.add_subplot(grid[1, column], sharey=below)
        _band(below, np.asarray(steps), loss, color="0.3")
        below.set_yscale("log")
        for axis in (above, below):
            _tidy(axis)
            axis.tick_params(labelleft=column == 0)
        if column == 0:
            above.set_ylabel("share of the threshold", **_STYLE)
            below.set_ylabel("training loss", **_STYLE)
        below.set_xlabel("step", **_STYLE)
    handles = [figure.axes[0].plot([], [], **style[name])[0] for name in names]
    figure.legend(handles=handles, loc="outside lower center", fontsize=7, frameon=False, ncols=len(names))
    return figure


def rounded(
    panels: Mapping[int, Sequence[Mapping]], scores: Mapping[str, str], orders: Mapping[str, str], title: str
) -> Figure:
    """One row for each number of bits: predicted against true increase of the loss, and the loss by number of layers.

    Args:
      panels: {bits: records of `experiments.studies.quantise.rounded`, one for each training}.
      scores: {score: words}.
      orders: {order: words}.
      title: what was run.

    Returns:
      The figure. On the left each dot is a layer of a training; layers whose loss falls are left out. On the right the
      mean and the range over trainings.
    """
    figure = Figure(figsize=(7.5, 2.9 * len(panels) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), (bits, records) in zip(grid, panels.items(), strict=True):
        ends = []
        for i, name in enumerate(("trace_norm", "ggn", "ggn_slope")):
            true = np.concatenate([one["true"] for one in records])
            guess = np.concatenate([one["scores"][name] for one in records])
            both = (true > 0) & (guess > 0)
            ends += [true[both].min(), true[both].max(), guess[both].min(), guess[both].max()]
            left.plot(guess[both], true[both], MARKERS[i], color=COLORS[i], markersize=3, label=scores[name])
        left.plot(*[(min(ends), max(ends))] * 2, color="0.6", linewidth=0.8, zorder=0)
        left.set(xscale="log", yscale="log", xlabel="predicted increase of the loss")
        left.set_ylabel(f"{bits} bits: true increase", **_STYLE)
        for i, name in enumerate(("trace", "trace_norm", "ggn", "joint", "true")):
            curves = np.array([one["sets"][name]["true"] for one in records])
            number = np.arange(1, curves.shape[1] + 1)
            color = "black" if name == "true" else COLORS[(3, 0, 1, 2)[i]]
            right.plot(number, curves.mean(0), color=color, linestyle=DASHES[i % 4], linewidth=1.2, label=orders[name])
            right.fill_between(number, curves.min(0), curves.max(0), color=color, alpha=0.12, linewidth=0)
        right.set(xlabel="layers rounded, the least sensitive first")
        right.set_yscale("symlog", linthresh=1e-3)
        right.set_ylabel("increase of the loss", **_STYLE)
        for axis in (left, right):
            _tidy(axis)
            axis.xaxis.label.set_size(8)
        left.legend(fontsize=6, frameon=False, loc="upper left")
        right.legend(fontsize=6, frameon=False, loc="lower right")
    return figure


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure, whole or not at all."""
    FigureCanvasAgg(figure)
    with store.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _band(axis, x, trials, **style):
    trials = np.asarray(trials)
    mean, deviation = trials.mean(0), trials.std(0, ddof=len(trials) > 1)
    axis.plot(x, mean, linewidth=1.2, **style)
    # No further than the trials: with few of them a deviation can reach below zero, which a log axis cannot show.
    low, high = np.maximum(mean - deviation, trials.min(0)), np.minimum(mean + deviation, trials.max(0))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _grid(count, title, height=1.9):
    """So many panels, smaller ones where there are many, that all stand on one page."""
    columns = min(3 if count <= 12 else 5 if count <= 25 else 7, count)
    figure, axes = _panels(-(-count // columns), columns, title, height=height * min(1, (3 / columns) ** 0.7))
    for axis in axes:
        axis.tick_params(which="both", labelsize=max(4.5, 8 - 0.6 * columns))
        axis.locator_params(nbins=4 if columns == 3 else 3)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _panels(rows, columns, title, height=1.9):
    figure = Figure(figsize=(7.5, 0.5 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        _tidy(axis)
    figure.suptitle(title, fontsize=9)
    return figure, axes
