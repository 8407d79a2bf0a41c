"""The arms of the paper's tables: what each net is trained with, on each data set, and what is measured at the end."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import scipy.stats

import jaxhess as jh
from experiments import data, measure, models, names, plot, results
from experiments.data import Dataset
from experiments.train import (
    DivergedError,
    Penalty,
    TrainConfig,
    Trained,
    evaluate,
    net_path,
    objective,
    train_once,
)

ARMS = {
    "ce": "CE",
    "htr": "CE + HTR",
    "htr_middle": "CE + HTR, middle layers",
    "htr_l2": "CE + HTR + L2",
    "l2": "CE + L2",
}
SETTINGS = {"released": "settings of the released scripts", "paper": "settings of the paper's text"}
METRICS = {"test_error": "test error", "trace": "trace"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A net on a data set, as the released scripts train it, and what the paper reports.

    Attributes:
      learning_rate, batch_size, epochs: every arm as long as the longest of the released ones.
      milestones: epochs at which the rate falls.
      gamma: of the penalty.
      num_probes: n.
      start: first epoch with the penalty.
      gamma_middle: of the penalty on the middle layers; ``gamma`` where there is none.
      num_probes_middle: likewise n.
      paper: {arm: (mean, standard deviation)} of the test error in %.
    """

    learning_rate: float
    batch_size: int
    epochs: int
    milestones: tuple[int, int]
    gamma: float
    num_probes: int
    start: int = 0
    gamma_middle: float | None = None
    num_probes_middle: int | None = None
    paper: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def _errors(ce, htr, middle=None, l2=None):
    found = {"ce": ce, "htr": htr, "htr_middle": middle, "htr_l2": l2}
    return {arm: value for arm, value in found.items() if value is not None}


_MNIST = _errors((1.25, 0.03), (1.19, 0.07), (1.18, 0.07), (1.15, 0.02))
_FMNIST = _errors((11.22, 0.11), (11.14, 0.04), (11.10, 0.07), (11.11, 0.05))
_RESNET = _errors((11.97, 0.14), (11.95, 0.22), (11.87, 0.12), (11.89, 0.13))
_CIFAR100 = _errors((45.25, 0.44), (44.98, 0.05), (44.81, 0.15), (44.32, 0.29))
_VGG11 = Row(1e-2, 64, 50, (20, 35), 1e-6, 5, paper=_errors((18.20, 0.45), (15.11, 0.22), l2=(15.08, 0.16)))

ROWS = {
    ("lenet", "mnist"): Row(1e-2, 256, 30, (10, 20), 1e-3, 10, 10, 1e-4, paper=_MNIST),
    ("lenet", "fashion_mnist"): Row(1e-2, 256, 40, (10, 20), 1e-5, 10, 20, 1e-6, paper=_FMNIST),
    ("lenet", "svhn_cropped"): Row(
        1e-1, 256, 50, (20, 35), 1e-7, 10, paper=_errors((10.94, 0.06), (10.77, 0.26), l2=(9.96, 0.10))
    ),
    ("vgg11", "cifar10"): _VGG11,
    ("vgg11_bn", "cifar10"): dataclasses.replace(_VGG11, paper={}),  # in table 4 alone; there are no released settings
    ("vgg13", "svhn_cropped"): Row(5e-4, 64, 50, (20, 35), 1e-3, 5, 0, 1e-6, paper=_errors((7.73, 0.28), (7.47, 0.01))),
    ("resnet18", "cifar10"): Row(1e-2, 64, 40, (20, 30), 1e-6, 3, 10, 1e-5, paper=_RESNET),
    ("vgg11_bn", "cifar100"): Row(1e-2, 64, 60, (20, 35), 1e-6, 5, 0, 1e-7, 10, paper=_CIFAR100),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which row, how often, and how the nets are measured at the end.

    Attributes:
      model: name of the net.
      dataset: name of the data set.
      preset: "released", the settings of the released scripts; or "paper": batch 64, learning rate 1e-2, no
        augmentation, Gaussian probes, and the released settings where the text is silent (epochs, milestones, gamma,
        n, first epoch).
      trials: trainings of each arm, with seeds 0, 1, ...: the same in every arm.
      epochs: length of a training, milestones and first epoch of the penalty in proportion; 0 for the preset's.
      curvature: of the penalty, "hessian" as in the paper, or "ggn".
      every: f_r, steps from one penalty to the next.
      weight_decay: of the arms with L2.
      images_per_class: training images of each class that the curvature is measured on.
      num_probes: probes of the trace.
      num_steps: Lanczos steps of the spectrum.
    """

    model: str = "lenet"
    dataset: str = "mnist"
    preset: str = "released"
    trials: int = 5
    epochs: int = 0
    curvature: str = "hessian"
    every: int = 50
    weight_decay: float = 1e-3
    images_per_class: int = 10
    num_probes: int = 64
    num_steps: int = 64

    def __post_init__(self):
        names.check("preset", self.preset, SETTINGS)
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if self.epochs < 0:
            raise ValueError(f"epochs must be at least 1, or 0 for the preset's, got {self.epochs}")


class Claim(NamedTuple):
    """That ``lower`` has a lower ``metric`` than ``higher``."""

    lower: str
    higher: str
    words: str
    metric: str = "test_error"


def row(model: str, dataset: str) -> Row:
    """The settings of a net on a data set; ValueError that lists the rows if there are none."""
    if (model, dataset) not in ROWS:
        raise ValueError(
            f"the paper has no row model={model!r} dataset={dataset!r}; choose from "
            f"{[' '.join(names) for names in ROWS]}"
        )
    return ROWS[model, dataset]


def training(config: Config, arm: str, trial: int, **changes) -> TrainConfig:
    """How an arm is trained.

    Args:
      config: the row, the preset and the length.
      arm: a key of `ARMS`.
      trial: the seed.
      **changes: fields of `Penalty` to change.

    Returns:
      `TrainConfig`.
    """
    names.check("arm", arm, ARMS)
    settings, released, penalty = row(config.model, config.dataset), config.preset == "released", None
    if arm in ("htr", "htr_middle", "htr_l2"):
        middle = arm == "htr_middle"
        penalty = Penalty(
            gamma=settings.gamma_middle if middle and settings.gamma_middle is not None else settings.gamma,
            every=config.every,
            start_epoch=settings.start / settings.epochs,
            layers="middle" if middle else "all",
            num_probes=settings.num_probes_middle if middle and settings.num_probes_middle else settings.num_probes,
            curvature=config.curvature,
            probe="rademacher" if released and arm == "htr_l2" else "gaussian",
        )
        penalty = dataclasses.replace(penalty, **changes)
    return TrainConfig(
        epochs=config.epochs or settings.epochs,
        batch_size=settings.batch_size if released else 64,
        learning_rate=settings.learning_rate if released else 1e-2,
        milestones=tuple(epoch / settings.epochs for epoch in settings.milestones),
        weight_decay=config.weight_decay if arm in ("htr_l2", "l2") else 0.0,
        augment=released,
        seed=trial,
        penalty=penalty,
    )


def load(config: Config, data_dir: str | None) -> Dataset:
    """The data set of a row, once its settings and its net are known to be there."""
    row(config.model, config.dataset)
    models.build(config.model, 10)
    return data.load(config.dataset, data_dir)


def run_table(config: Config, arms: Iterable[str], out_dir: pathlib.Path, data_dir: str | None) -> None:
    """Trains and measures every arm in every trial, and saves the numbers and the spectra.

    What is trained and measured is kept, so that an interrupted table goes on, and another table uses it too.
    """
    dataset = load(config, data_dir)
    numbers, arrays = {arm: [] for arm in arms}, {}
    check(models.build(config.model, dataset.num_classes), (training(config, arm, 0) for arm in numbers))
    for trial in range(config.trials):
        for arm in numbers:
            record, spectrum = _train_and_measure(config, dataset, arm, trial, out_dir)
            numbers[arm].append(record)
            arrays |= measure.pack({f"trial{trial}": spectrum}, arm)
            print(
                f"{ARMS[arm]}, trial {trial}: test error {record['test_error']:.2%}, "
                f"train accuracy {record['train_accuracy']:.2%}, trace {record['trace']:.4g}"
            )
    results.save_arrays(out_dir / "spectra.npz", arrays)
    results.save_json(out_dir / "numbers.json", numbers)


def _train_and_measure(config, dataset, arm, trial, out_dir):
    settings = training(config, arm, trial)
    model, trained = train_once(config.model, dataset, settings, out_dir)
    how = f"{config.images_per_class}-{config.num_probes}-{config.num_steps}"
    path = net_path(config.model, dataset, settings, out_dir)
    path = path.with_name(f"measured-{how}-{path.name}")
    if not (kept := results.find(path)):
        record, spectrum = final(config, dataset, model, trained, trial)
        results.save_arrays(path, record | measure.pack({"total": spectrum}, "hessian"))
        kept = path
    arrays = results.load_arrays(kept)
    record = {name: value.tolist() for name, value in arrays.items() if "/" not in name}
    return record, measure.unpack(arrays, "hessian")["total"]


def final(
    config: Config, dataset: Dataset, model: nn.Module, trained: Trained, seed: int
) -> tuple[dict[str, float], jh.Spectrum]:
    """What the tables say of a trained net, and the spectrum of its Hessian."""
    train_loss, train_error = evaluate(model, trained.params, trained.batch_stats, dataset, dataset.train)
    batch, keys = (
        measure.measure_batch(dataset, config.images_per_class, trained.batch_stats),
        jax.random.split(jax.random.key(seed)),
    )
    trace = jh.layer_traces(objective(model), trained.params, batch, key=keys[0], num_probes=config.num_probes)["total"]
    hessian = jh.hessian(objective(model), trained.params, batch)
    spectrum = jh.spectrum(hessian, like=trained.params, key=keys[1], num_steps=config.num_steps)
    test_error = float(trained.history["test_error"][-1])
    record = {
        "test_error": test_error,
        "test_loss": float(trained.history["test_loss"][-1]),
        "train_loss": train_loss,
        "train_accuracy": 1 - train_error,
        "gap": test_error - train_error,
        "trace": float(trace.mean),
        "trace_std_error": float(trace.std_error),
        "lambda_max": spectrum.lambda_max,
        "lambda_min": spectrum.lambda_min,
        "negative_trace": float(spectrum.dim * np.minimum(spectrum.nodes, 0) @ spectrum.weights),
        "skipped": float(trained.history["skipped"][-1]) if "skipped" in trained.history else 0.0,
    }
    return record, spectrum


def print_table(out_dir: pathlib.Path, claims: Sequence[Claim]) -> None:
    """Prints the table of the saved numbers and what they say of the paper's claims, and draws the mean densities."""
    config, numbers = results.load_json(out_dir / "config.json"), results.load_json(out_dir / "numbers.json")
    paper = row(config["model"], config["dataset"]).paper
    length = config["epochs"] or f"{row(config['model'], config['dataset']).epochs} (the preset's)"
    trials = len(next(iter(numbers.values())))
    print(
        f"{plot.label(config['model'])} on {plot.label(config['dataset'])}, {SETTINGS[config['preset']]}, "
        f"epochs: {length}, penalty: {config['curvature']} every {config['every']} steps; "
        f"mean +- standard deviation of {trials} trials"
    )
    columns = {
        "test error %": ("test_error", 100, ".2f"),
        "train acc. %": ("train_accuracy", 100, ".2f"),
        "gap %": ("gap", 100, ".2f"),
        "Tr Hess": ("trace", 1, ".4g"),
        "lambda_max": ("lambda_max", 1, ".4g"),
        "lambda_min": ("lambda_min", 1, ".3g"),
    }
    lines = [["", *columns, "paper's error %"]]
    for arm, records in numbers.items():
        cells = [spread([scale * r[name] for r in records], form) for name, scale, form in columns.values()]
        lines.append([ARMS[arm], *cells, "{:.2f} +- {:.2f}".format(*paper[arm]) if arm in paper else "-"])
    print_columns(lines)
    print(f"p multiplied by the {len(claims)} tests:")
    for claim in claims:
        values = {arm: [r[claim.metric] for r in records] for arm, records in numbers.items()}
        print(judge(claim, values, tests=len(claims)))
    if trials > 2:
        for arm, records in numbers.items():
            found = rank_correlation(*([r[name] for r in records] for name in ("trace", "gap")), f"over {trials} seeds")
            print(f"{ARMS[arm]}: {found}")
    spectra = results.load_arrays(out_dir / "spectra.npz")
    merged = {ARMS[arm]: {"total": _merged(measure.unpack(spectra, arm).values())} for arm in numbers}
    words = f"Hessian at the end of training; {title(config, 'mean')}"
    plot.save(plot.log_densities(merged, words), out_dir / "figure.png")
    skipped = {ARMS[arm]: sum(r["skipped"] for r in records) for arm, records in numbers.items()}
    if any(skipped.values()):
        print(f"penalties left out because they were not finite: {skipped}")


def _merged(spectra):
    """The mean of the spectra of several trials."""
    spectra = list(spectra)
    nodes, weights, residuals = (
        np.concatenate([getattr(spectrum, field) for spectrum in spectra])
        for field in ("nodes", "weights", "residuals")
    )
    return jh.Spectrum(nodes, weights / len(spectra), spectra[0].dim, spectra[0].num_steps, residuals)


def print_columns(lines: Sequence[Sequence[str]]) -> None:
    """Prints a table of words, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip())


def spread(values: Sequence[float], form: str) -> str:
    """Mean +- standard deviation; of one value the value alone."""
    mean = format(np.mean(values), form)
    return f"{mean} +- {format(np.std(values, ddof=1), form)}" if len(values) > 1 else mean


def paired_p(one: Sequence[float], two: Sequence[float]) -> float:
    """The p-value of the paired t-test; NaN for a single pair, or differences that vary by rounding alone."""
    differences = np.subtract(one, two)
    # Errors are kept in float32: equal counts of wrong answers differ in the eighth digit, and the test would see that.
    if len(one) < 2 or not np.ptp(differences) > 1e-6 * np.abs([one, two]).max():
        return float("nan")
    return float(scipy.stats.ttest_rel(one, two).pvalue)


def judge(claim: Claim, values: Mapping[str, Sequence[float]], tests: int = 1) -> str:
    """Whether a claim is seen, in words.

    Args:
      claim: what is claimed.
      values: {arm: one value for each trial}, the same seeds in all.
      tests: how many such claims are looked at, by which p is multiplied (Bonferroni).

    Returns:
      A line with the mean difference, its standard deviation and p.
    """
    lower, higher = values[claim.lower], values[claim.higher]
    p = float(np.minimum(1.0, tests * paired_p(lower, higher)))  # NaN stays NaN
    if not p <= 0.05:
        verdict = "not decided at this size"
    else:
        verdict = "seen" if np.mean(lower) < np.mean(higher) else "the opposite is seen"
    percent = claim.metric == "test_error"
    difference = spread(np.subtract(lower, higher) * (100 if percent else 1), ".3f" if percent else ".4g")
    of = f"{METRICS[claim.metric]} {claim.lower} - {claim.higher}"
    test = "no paired t-test" if np.isnan(p) else f"paired t-test p = {p:.3g}"
    return f"{claim.words}: {verdict} ({of}: {difference}{' points' if percent else ''}, {test})"


@dataclasses.dataclass(frozen=True)
class LayerTraces:
    """A callback of training that records the traces of all G_l, which for ReLU nets are those of Hess_l.

    Attributes:
      images_per_class: training images of each class.
      num_probes: probes of each trace.
      seed: of the probes.
      model, dataset: what is trained.
    """

    images_per_class: int
    num_probes: int
    seed: int
    model: nn.Module = dataclasses.field(repr=False)
    dataset: Dataset = dataclasses.field(repr=False)

    def __call__(self, epoch, params, batch_stats):
        """{"trace/LAYER": value, ..., "trace/total": value}."""
        batch = measure.measure_batch(self.dataset, self.images_per_class, batch_stats)
        key = jax.random.fold_in(jax.random.key(self.seed), epoch)
        traces = jh.layer_traces(
            objective(self.model), params, batch, key=key, num_probes=self.num_probes, curvature="ggn"
        )
        return {f"trace/{layer}": float(estimate.mean) for layer, estimate in traces.items()}


def run_sweep(
    config: Config,
    settings: Mapping[str, Mapping],
    out_dir: pathlib.Path,
    data_dir: str | None,
    *,
    traces: bool = False,
) -> None:
    """Trains several settings of the penalty in every trial, and saves how each went on over the epochs.

    Args:
      config: as for `run_table`.
      settings: {name: fields of `Penalty` to change, or None for no penalty}.
      out_dir: folder of the results.
      data_dir: folder of the data sets.
      traces: whether to measure the layers' traces after each epoch.
    """
    dataset, numbers = load(config, data_dir), {name: {} for name in settings}
    model = models.build(config.model, dataset.num_classes)
    trainings = {
        (trial, name): training(config, "ce" if changes is None else "htr", trial, **(changes or {}))
        for trial in range(config.trials)
        for name, changes in settings.items()
    }
    check(model, trainings.values())
    for (trial, name), settings_of in trainings.items():
        callback = None
        if traces:
            callback = LayerTraces(config.images_per_class, config.num_probes, trial, model, dataset)
        try:
            _, trained = train_once(config.model, dataset, settings_of, out_dir, callback=callback)
        except DivergedError as error:
            print(f"{name}, trial {trial}: {error}; its numbers are NaN")
            found = {metric: np.full(settings_of.epochs, np.nan) for metric in ("train_accuracy", "test_error")}
        else:
            found = trained.history | trained.records
        for metric, values in found.items():
            numbers[name].setdefault(metric, []).append(values.tolist())
        print(f"{name}, trial {trial}: test error {found['test_error'][-1]:.2%}{skipped_words(found)}")
    results.save_json(out_dir / "numbers.json", numbers)


def check(model: nn.Module, trainings: Iterable[TrainConfig]) -> None:
    """Raises what a penalty's settings would raise, before anything is trained."""
    for settings in trainings:
        if settings.penalty is not None:
            settings.penalty.transform(model, settings, 1)


def skipped_words(history: Mapping[str, np.ndarray]) -> str:
    """What is said of penalties that were left out, if any were."""
    count = int(history["skipped"][-1]) if "skipped" in history else 0
    return f", {count} penalties left out because they were not finite" if count else ""


def rank_correlation(traces: Sequence[float], gaps: Sequence[float], where: str) -> str:
    """How far the trace goes with the generalisation gap, in words: Spearman's rank correlation."""
    found = scipy.stats.spearmanr(traces, gaps)
    # The p-value is asymptotic: of three epochs in a row it would be zero.
    p_value = f" (p = {found.pvalue:.2g})" if len(traces) >= 10 else ""
    return f"rank correlation of trace and generalisation gap {where} {found.statistic:.2f}{p_value}"


def print_sweep(numbers: Mapping[str, Mapping], reference: str, words: str = "{} lowers the test error") -> None:
    """Prints the last test error of every setting, and its paired test against a reference."""
    errors = {name: [values[-1] for values in metrics["test_error"]] for name, metrics in numbers.items()}
    for name, values in errors.items():
        print(f"{name:>16}: test error {spread([100 * value for value in values], '.2f')} %")
    others = [name for name in errors if name != reference]
    print(f"against {reference}, p multiplied by the {len(others)} tests:")
    for name in others:
        print(judge(Claim(name, reference, words.format(name)), errors, tests=len(others)))


def title(config: Mapping, words: str = "mean and standard deviation") -> str:
    """What was run, for figures."""
    epochs = config["epochs"] or row(config["model"], config["dataset"]).epochs
    return (
        f"{plot.label(config['model'])} on {plot.label(config['dataset'])}, {epochs} epochs, "
        f"{SETTINGS[config['preset']]}; {words} of {config['trials']} trials"
    )
