"""Trace of the Hessian over training, with and without batch norm and skip connections (Figure 5 of the paper).

    python -m experiments.run fig5 model=vgg11,vgg11_bn,resnet18,resnet18_noskip dataset=cifar10

The paper finds less curvature with batch norm and with skip connections. Batch norm makes weights scale-free: they can
grow and the trace fall without anything changing, so that Tr(Hess) ||w||^2 stands beside it. A net that fits faster has
another trace at the same epoch, so that the nets are compared at the same training loss too. Between measurements the
trace is interpolated twice, in the loss and in its logarithm: where the two disagree, too little was measured.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import figures, plot, report, statistics, store
from experiments.figures import OverTraining as Config

__all__ = ["Config", "draw", "run"]

run = figures.run_over_training

PAIRS = {"batch norm": ("vgg11_bn", "vgg11"), "skip connections": ("resnet18", "resnet18_noskip")}  # with, without
FORMS = {"Tr(Hess)": lambda record: record["trace/total"], "scale-free": figures.scale_free}
SCALES = {"the loss": lambda losses: losses, "its logarithm": np.log}  # in which traces are interpolated


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the figure from the saved numbers, and prints them at the end of training and at equal loss."""
    found = store.load_json(out_dir / "numbers.json")
    numbers, title = figures.told_apart(config, found)
    print(title)
    panels = {
        "Tr(Hess)": {name: record["trace/total"] for name, record in numbers.items()},
        r"$\sum_l$ Tr(Hess$_l$) $\|w_l\|^2$": {name: figures.scale_free(record) for name, record in numbers.items()},
    }
    epochs = {name: record["epochs"] for name, record in numbers.items()}
    plot.save(plot.over_epochs(panels, title, epochs=epochs), out_dir / "figure.png")
    for name, record in numbers.items():
        print(f"{name}: Tr(Hess) {figures.course(record['epochs'], record['trace/total'])}")
        print(f"{name}: sum of Tr(Hess_l) ||w_l||^2 {figures.course(record['epochs'], figures.scale_free(record))}")
    if not all("train_loss" in record for record in numbers.values()):
        print("training losses were not kept: the nets are compared at equal epochs alone")
        return
    for line in [*at_equal_loss(numbers), *compared(config, found)]:
        print(line)


def at_equal_loss(numbers: Mapping[str, Any]) -> Iterator[str]:
    """The traces of the nets at the lowest training loss that each of them reaches, in words; means over trials.

    The logarithm of the trace is interpolated in each of `SCALES`, between measurements that each lower the loss.
    """
    curves = {
        name: _curve(record["epochs"], np.mean(record["train_loss"], 0), np.mean(record["trace/total"], 0))
        for name, record in numbers.items()
    }
    common, found = _at_common_loss(list(curves.values()))
    if found is None:
        first = min(losses[0] for losses, _ in curves.values())
        yield f"no training loss is common to all nets: one starts at {first:.3g}, one ends at {common:.3g}"
        return
    for name, (linear, logarithmic) in zip(curves, zip(*found.values(), strict=True), strict=True):
        yield f"{name}: Tr(Hess) {linear:.4g} at a training loss of {common:.3g}; {logarithmic:.4g} by its logarithm"


def compared(config: Config, numbers: Mapping[str, Any]) -> Iterator[str]:
    """What each of `PAIRS` does to the trace, trial by trial, in words: at the last epoch and at equal training loss.

    The claim that it lowers the trace is a t-test of the logarithm of the ratio at equal loss, with p multiplied by the
    number of pairs and of forms of the trace. It is decided only if it is decided alike in each of `SCALES`.
    """
    names = {
        f"{words} on {plot.label(dataset)}": [figures.about(config, model, dataset) for model in models]
        for dataset in config.dataset
        for words, models in PAIRS.items()
        if set(models) <= set(config.model)
    }
    for words, pair in names.items():
        records = [numbers[name] for name in pair]
        yield f"{words}: in times the trace without, {config.trials} trial{'s' if config.trials > 1 else ''}"
        for form, values in FORMS.items():
            last, equal, losses = ratios(records, [values(record) for record in records])
            tests = len(names) * len(FORMS)
            verdicts = []
            yield f"  {form}: {report.times(last)} at the last epoch"
            for scale, each in equal.items():
                verdicts.append(statistics.verdict(effect := report.log_effect(each), tests=tests))
                p = report.p_words(effect, tests)
                yield f"  {form}: {report.times(each)} at equal training loss, interpolated in {scale}{p}"
            yield f"  {form}: lower at equal training loss: {statistics.agreed(verdicts)}"
        yield f"  the training losses at which they are compared: {', '.join(f'{loss:.3g}' for loss in losses)}"


def ratios(
    records: Sequence[Mapping[str, Any]], traces: Sequence[Sequence]
) -> tuple[np.ndarray, dict[str, np.ndarray], list]:
    """The traces of the first of two nets in times those of the second, trial by trial.

    Args:
      records: of the two nets, with "epochs" and "train_loss" of each trial.
      traces: of the two nets, (trials, epochs).

    Returns:
      The ratios at the last epoch, those at the lowest training loss that both nets of a trial reach, by the scale of
      the loss (NaN if there is none), and these losses.
    """
    last, equal, common = [], {scale: [] for scale in SCALES}, []
    for trial in range(len(records[0]["train_loss"])):
        curves = [
            _curve(record["epochs"], record["train_loss"][trial], values[trial])
            for record, values in zip(records, traces, strict=True)
        ]
        loss, found = _at_common_loss(curves)
        last.append(traces[0][trial][-1] / traces[1][trial][-1])
        for scale, both in equal.items():
            both.append(np.nan if found is None else found[scale][0] / found[scale][1])
        common.append(loss)
    return np.array(last), {scale: np.array(both) for scale, both in equal.items()}, common


def _curve(epochs, losses, traces):
    """(losses, traces) at the measured epochs after the start of training that each lower the loss."""
    due = np.array([epoch for epoch in epochs if epoch > 0])
    losses, traces = np.asarray(losses)[due - 1], np.asarray(traces)[-len(due) :]
    lower = losses < np.minimum.accumulate([np.inf, *losses[:-1]])
    return losses[lower], traces[lower]


def _at_common_loss(curves):
    """The lowest loss that all reach, and each one's value there, {scale: values}; None if one starts below it."""
    common = max(losses[-1] for losses, _ in curves)
    if common > min(losses[0] for losses, _ in curves):
        return common, None
    found = {}
    for scale, of in SCALES.items():  # of losses that rise
        logs = [np.interp(of(common), of(losses[::-1]), np.log(traces[::-1])) for losses, traces in curves]
        found[scale] = np.exp(logs).tolist()
    return common, found
