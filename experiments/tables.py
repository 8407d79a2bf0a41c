"""The arms of the paper's tables trained, measured and compared: the tables, and the sweeps over one setting."""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jaxhess as jh
from experiments import arms, figures, measure, models, plan, plot, report, store, train
from experiments.data import Dataset
from experiments.plan import Plan, Training
from experiments.recipe import TrainConfig
from experiments.report import Claim
from experiments.train import DivergedError, Trained


def plan_table(config: arms.Config, names: Iterable[str], out_dir: pathlib.Path, data_dir: str | None) -> Plan:
    """The trainings of a table, by trial and arm: trial by trial, so that what an interrupted table left is paired."""
    dataset = arms.load(config, data_dir)
    trainings = {
        (trial, arm): planned(config, dataset, f"{arms.ARMS[arm]}, trial {trial}", arms.training(config, arm, trial))
        for trial in range(config.trials)
        for arm in names
    }
    return checked(trainings, out_dir, config)


def planned(config: arms.Config, dataset: Dataset, words: str, training: TrainConfig, callback=None) -> Training:
    """A training of the net of a configuration."""
    return Training(words, config.model, dataset, training, figures.net_options(config), callback)


def checked(trainings: Mapping[Any, Training], out_dir: pathlib.Path, measured: arms.Config | None = None) -> Plan:
    """A plan, once all its settings are known to make sense; with `final` as ``measured`` says after each training."""
    arms.check(next(iter(trainings.values())).model(), (training.config for training in trainings.values()))
    return Plan(trainings, out_dir, partial(_seconds_of_final, measured) if measured else None)


def run_table(config: arms.Config, names: Sequence[str], out_dir: pathlib.Path, data_dir: str | None) -> dict[str, Any]:
    """Trains and measures every arm in every trial, and saves the numbers and the spectra; returns the settings.

    What is trained and measured is kept, so that an interrupted table goes on, and another table uses it too.
    """
    todo = plan_table(config, names, out_dir, data_dir)
    numbers, arrays = {arm: [] for arm in names}, {}
    for trial, arm in todo.trainings:
        record, spectrum = _train_and_measure(config, todo, (trial, arm), out_dir)
        numbers[arm].append(record)
        arrays |= measure.pack({f"trial{trial}": spectrum}, arm)
        print(
            f"{arms.ARMS[arm]}, trial {trial}: test error {record['test_error']:.2%}, "
            f"train accuracy {record['train_accuracy']:.2%}, trace {record['trace']:.4g}",
            flush=True,
        )
    store.save_arrays(out_dir / "spectra.npz", arrays)
    store.save_json(out_dir / "numbers.json", numbers)
    return trained_as(todo)


def trained_as(todo: Plan) -> dict[str, Any]:
    """How the nets of a plan were trained, for the file with the settings of the result."""
    return {"trained": plan.settings(todo.trainings.values())}


def _train_and_measure(config, todo, key, out_dir):
    (trial, _), training = key, todo.trainings[key]
    model, trained = todo.net(key)
    how = f"{config.images_per_class}-{config.num_probes}-{config.num_steps}"
    path = training.path(out_dir)
    path = path.with_name(f"measured-{how}-{path.name}")
    if not (kept := store.find(path)):
        dataset = training.dataset
        record, spectrum = final(config, dataset, model, trained, trial)
        store.save_arrays(path, record | measure.pack({"total": spectrum}, "hessian"))
        kept = path
    arrays = store.load_arrays(kept)
    record = {name: value.tolist() for name, value in arrays.items() if "/" not in name}
    return record, measure.unpack(arrays, "hessian")["total"]


def final(
    config: arms.Config, dataset: Dataset, model: nn.Module, trained: Trained, seed: int
) -> tuple[dict[str, float], jh.Spectrum]:
    """What the tables say of a trained net, and the spectrum of its Hessian."""
    train_loss, train_error = train.evaluate(model, trained.params, trained.batch_stats, dataset, dataset.train)
    loss, keys = models.objective(model), jax.random.split(jax.random.key(seed))
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    trace = jh.layer_traces(loss, trained.params, batch, key=keys[0], num_probes=config.num_probes)["total"]
    hessian = jh.hessian(loss, trained.params, batch)
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


def _seconds_of_final(config, model, dataset, params, batch_stats):
    """Seconds that `final` takes, by one product with the Hessian and one evaluation of the test images."""
    batch = measure.measure_batch(dataset, config.images_per_class, batch_stats)
    product = partial(jax.jit(lambda hessian, v: hessian(v)), jh.hessian(models.objective(model), params, batch))
    evaluation = partial(train.evaluate, model, params, batch_stats, dataset, dataset.test)
    one, images = (
        [report.seconds(call, jax.block_until_ready) for _ in range(2)][1]
        for call in (partial(product, params), evaluation)
    )
    share = len(dataset.train["label"]) / len(dataset.test["label"])
    return (config.num_probes + config.num_steps) * one + share * images


COLUMNS = {
    "test error %": report.ERROR,
    "train acc. %": report.ACCURACY,
    "train loss": report.TRAIN_LOSS,
    "gap %": report.GAP,
    "Tr Hess": report.TRACE,
    "lambda_max": report.LAMBDA_MAX,
    "lambda_min": report.LAMBDA_MIN,
}


def print_table(config: arms.Config, out_dir: pathlib.Path, claims: Sequence[Claim]) -> None:
    """Prints the table of the saved numbers and what they say of the paper's claims, and draws the mean densities."""
    numbers, reported = store.load_json(out_dir / "numbers.json"), arms.reported(config)
    trials = len(next(iter(numbers.values())))
    print(
        f"{arms.about(config)}, penalty: {config.curvature} every {config.every} steps; "
        f"mean +- standard deviation of {trials} trials"
    )
    lines = [["", *COLUMNS, "paper's error %"]]
    for arm, records in numbers.items():
        paper = "{:.2f} +- {:.2f}".format(*reported.errors[arm]) if arm in reported.errors else "-"
        lines.append([arms.ARMS[arm], *(column.cell(records) for column in COLUMNS.values()), paper])
    report.print_columns(lines)
    print(f"p multiplied by the {len(claims)} tests:")
    for claim in claims:
        values = {arm: [record[claim.metric] for record in records] for arm, records in numbers.items()}
        print(report.judge(claim, values, len(claims), reported))
    if trials > 2:
        for arm, records in numbers.items():
            traces, gaps = ([record[name] for record in records] for name in ("trace", "gap"))
            print(f"{arms.ARMS[arm]}: {report.rank_correlation(traces, gaps, f'over {trials} seeds')}")
    _draw_densities(config, numbers, out_dir)
    skipped = {arms.ARMS[arm]: sum(record["skipped"] for record in records) for arm, records in numbers.items()}
    if any(skipped.values()):
        print(f"penalties left out because they were not finite: {skipped}")


def _draw_densities(config, numbers, out_dir):
    if not (out_dir / "spectra.npz").exists():
        print("the spectra of this result were not kept, so its figure is not drawn again")
        return
    spectra = store.load_arrays(out_dir / "spectra.npz")
    merged = {arms.ARMS[arm]: {"total": _merged(measure.unpack(spectra, arm).values())} for arm in numbers}
    words = textwrap.fill(f"Hessian at the end of training; {title(config, 'mean')}", 100)
    plot.save(plot.log_densities(merged, words), out_dir / "figure.png")


def _merged(spectra):
    """The mean of the spectra of several trials."""
    spectra = list(spectra)
    nodes, weights, residuals = (
        np.concatenate([getattr(spectrum, field) for spectrum in spectra])
        for field in ("nodes", "weights", "residuals")
    )
    return jh.Spectrum(nodes, weights / len(spectra), spectra[0].dim, spectra[0].num_steps, residuals)


@dataclasses.dataclass(frozen=True)
class LayerTraces:
    """A callback of training that records the traces of all G_l, which for ReLU nets are those of Hess_l.

    Beside them stand the loss and the accuracy of the net on all training images: those in the history of a training
    are of the nets during the epoch, on augmented images.

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
        """{"trace/LAYER", "trace/total", "evaluated/train_loss", "evaluated/train_accuracy": value}."""
        batch = measure.measure_batch(self.dataset, self.images_per_class, batch_stats)
        key = jax.random.fold_in(jax.random.key(self.seed), epoch)
        traces = jh.layer_traces(
            models.objective(self.model), params, batch, key=key, num_probes=self.num_probes, curvature="ggn"
        )
        loss, error = train.evaluate(self.model, params, batch_stats, self.dataset, self.dataset.train)
        found = {f"trace/{layer}": float(estimate.mean) for layer, estimate in traces.items()}
        return found | {"evaluated/train_loss": loss, "evaluated/train_accuracy": 1 - error}


def plan_sweep(
    config: arms.Config,
    settings: Mapping[str, Mapping | None],
    out_dir: pathlib.Path,
    data_dir: str | None,
    *,
    traces: bool = False,
) -> Plan:
    """The trainings of a sweep, by trial and name; arguments as of `run_sweep`."""
    dataset = arms.load(config, data_dir)
    model, trainings = arms.build(config, dataset), {}
    for trial in range(config.trials):
        for name, changes in settings.items():
            training = arms.training(config, "ce" if changes is None else "htr", trial, **(changes or {}))
            callback = None
            if traces:
                callback = LayerTraces(config.images_per_class, config.num_probes, trial, model, dataset)
            trainings[trial, name] = planned(config, dataset, f"{name}, trial {trial}", training, callback)
    return checked(trainings, out_dir)


def run_sweep(
    config: arms.Config,
    settings: Mapping[str, Mapping | None],
    out_dir: pathlib.Path,
    data_dir: str | None,
    *,
    traces: bool = False,
) -> dict[str, Any]:
    """Trains several settings of the penalty in every trial, and saves how each went on over the epochs.

    Args:
      config: as for `run_table`.
      settings: {name: fields of `experiments.recipe.Penalty` to change, or None for no penalty}.
      out_dir: folder of the results.
      data_dir: folder of the data sets.
      traces: whether to measure the layers' traces after each epoch.

    Returns:
      The settings of the trainings.
    """
    todo, numbers = plan_sweep(config, settings, out_dir, data_dir, traces=traces), {name: {} for name in settings}
    for (trial, name), training in todo.trainings.items():
        try:
            _, trained = todo.net((trial, name))
        except DivergedError as error:
            print(f"{name}, trial {trial}: {error}; its numbers are NaN")
            found = {metric: np.full(training.config.epochs, np.nan) for metric in ("train_accuracy", "test_error")}
        else:
            found = trained.history | trained.records
        for metric, values in found.items():
            numbers[name].setdefault(metric, []).append(values.tolist())
        print(f"{name}, trial {trial}: test error {found['test_error'][-1]:.2%}{_skipped_words(found)}", flush=True)
    store.save_json(out_dir / "numbers.json", numbers)
    return trained_as(todo)


def _skipped_words(history):
    """What is said of penalties that were left out, if any were."""
    count = int(history["skipped"][-1]) if "skipped" in history else 0
    return f", {count} penalties left out because they were not finite" if count else ""


def draw_sweep(config: arms.Config, out_dir: pathlib.Path, reference: str) -> None:
    """Draws accuracies from the saved numbers, and prints the last test errors with their tests against a reference."""
    numbers = store.load_json(out_dir / "numbers.json")
    plot.save(plot.accuracies(numbers, title(config)), out_dir / "figure.png")
    errors = {name: [values[-1] for values in metrics["test_error"]] for name, metrics in numbers.items()}
    for name, values in errors.items():
        print(f"{name:>16}: test error {report.percent(values)} %")
    others = [name for name in errors if name != reference]
    print(f"against {reference}, p multiplied by the {len(others)} tests:")
    for name in others:
        claim = Claim(name, reference, f"{name} lowers the test error")
        print(report.judge(claim, errors, tests=len(others), margin=arms.margin(config)))


def title(config: arms.Config, words: str = "mean and standard deviation") -> str:
    """What was run, for figures."""
    return f"{arms.about(config)}; {words} of {config.trials} trials"
