"""What the figures share: which net on which data, which layers are shown, and curvature over training."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

import jaxhess as jh
from experiments import data, measure, models, plot, store
from experiments.data import Dataset
from experiments.models import objective
from experiments.plan import Plan, Training
from experiments.recipe import TrainConfig
from experiments.train import Trained, train_once

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is trained, and on what; the first keys that the help shows.

    Attributes:
      model: name of the net.
      dataset: name of the data set.
    """

    model: models.Name = "lenet"
    dataset: data.Name = "mnist"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of a net and of a data set is trained: what the tables share with the figures.

    Attributes:
      label: feature of the data set that holds the labels, such as coarse_label.
      width: factor on all numbers of channels, for nets that have this option.
      examples: number of training images, the same for each class, or of sequences; 0 for all of them.
    """

    label: str = "label"
    width: float = 1.0
    examples: int = 0


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig, Scale, Subject):
    """How to train, on what, and how the curvature is measured.

    Attributes:
      epochs: passes over the training images.
      images_per_class: training images of each class at which the curvature is measured; of text, sequences in all.
      norm_layers: whether normalisation layers are shown too. The paper shows convolutions and dense layers.
      method: how the Hessian's spectra are found: "lanczos", or "auto": exactly, through the Gram matrix, for layers
        in which the Hessian is the Gauss-Newton matrix, and by Lanczos for others and for the whole net.
    """

    epochs: int = 10
    images_per_class: int = 10
    norm_layers: bool = False
    method: Literal["lanczos", "auto"] = "auto"


def load_all(config: OverTraining, data_dir: str | None) -> dict[str, Dataset]:
    """All data sets of a configuration with several: what one of them lacks is said before anything is trained."""
    return {name: load(config, name, data_dir) for name in config.dataset}


def load(config: Scale, name: str, data_dir: str | None) -> Dataset:
    """A data set, or as much of it as is trained on; "cifar100:coarse_label" names the labels too."""
    name, _, label = name.partition(":")
    return reduced(config, data.load(name, data_dir, label=label or config.label))


def reduced(config: Scale, dataset: Dataset) -> Dataset:
    """As much of a data set as is trained on: the first training images of each class, or sequences."""
    if not config.examples:
        return dataset
    if dataset.is_text:
        return dataclasses.replace(dataset, train=data.first(dataset, config.examples))
    each, rest = divmod(config.examples, dataset.num_classes)
    if rest:
        raise ValueError(
            f"examples={config.examples} is no multiple of the {dataset.num_classes} classes of {dataset.name}"
        )
    return dataclasses.replace(dataset, train=data.per_class(dataset.train, each, dataset.num_classes))


def net(config: Config, name: str, dataset: Dataset, out_dir: pathlib.Path, **options) -> tuple[nn.Module, Trained]:
    """A net, trained or found; ``options`` as for `experiments.train.train_once`."""
    return train_once(name, dataset, config, out_dir, options=net_options(config), **options)


def net_options(config: Scale) -> dict[str, float]:
    """The options of a net for `experiments.models.build`; none at full width, as in nets kept before there was one."""
    return {} if config.width == 1 else {"width": config.width}


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of a figure by data set, net and trial."""
    datasets, names = ([part] if isinstance(part, str) else part for part in (config.dataset, config.model))
    trainings, interval = {}, getattr(config, "interval", 1)
    for dataset_name, dataset in {name: load(config, name, data_dir) for name in datasets}.items():
        for name in names:
            model = models.build(name, dataset.num_classes, **net_options(config))
            for trial in range(getattr(config, "trials", 1)):
                seeded = dataclasses.replace(config, seed=config.seed + trial)
                callback = Curvature(seeded, model, dataset) if isinstance(config, OverTraining) else None
                words = f"{about(config, name, dataset_name)}, seed {seeded.seed}"
                training = Training(words, name, dataset, seeded, net_options(config), callback, interval)
                trainings[dataset_name, name, trial] = training
    return Plan(trainings, out_dir)


def shown(config: Config, model: nn.Module, params: PyTree, batch: PyTree) -> list[str]:
    """The layers that are shown, in network order: those with a kernel, or all."""
    names = jh.layer_names(params, objective(model), batch)
    if config.norm_layers:
        return names
    return [name for name in names if any(x.ndim > 1 for x in jax.tree.leaves(jh.subtree(params, name)))]


def about(config: Scale, model: str, dataset: str) -> str:
    """The net and its data in words, with what was made smaller than the paper's."""
    net_words = plot.label(model) + (f" (width {config.width:g})" if config.width != 1 else "")
    name, _, label = dataset.partition(":")
    label = label or config.label
    data_words = plot.label(name) + (f" ({label.replace('_', ' ')}s)" if label != "label" else "")
    unit = "sequences" if name.partition("/")[0] == data.TEXT else "images"
    return f"{net_words} on {data_words}" + (f" ({config.examples:,} {unit})" if config.examples else "")


def how(config: Config) -> str:
    """How the Hessian's spectra were found, in words; of a configuration that has ``num_steps``."""
    steps = f"{config.num_steps} Lanczos steps"
    return steps if config.method == "lanczos" else f"exact where Hess = G, else {steps}"


# ---- curvature over training ----


class Curvature:
    """A callback of training that measures the Hessian of the net and of its layers.

    Its ``repr`` says what is measured, for that is one of the settings of a kept net.
    """

    def __init__(self, config: OverTraining, model: nn.Module, dataset: Dataset):
        """Takes the settings, the net and the data set of the training."""
        self._config, self._model, self._dataset = config, model, dataset

    def __repr__(self) -> str:
        fields = ("interval", "method", "num_steps", "num_probes", "images_per_class", "norm_layers")
        return f"Curvature({', '.join(f'{name}={getattr(self._config, name)}' for name in fields)})"

    def __call__(self, epoch: int, params: PyTree, batch_stats: PyTree) -> dict[str, float]:
        """{"trace/LAYER", "lambda_max/LAYER", "trace_norm2/LAYER": value}, "total" for the net; NaN where not due."""
        config = self._config
        batch = measure.measure_batch(self._dataset, config.images_per_class, batch_stats)
        layers = shown(config, self._model, params, batch)
        if epoch % config.interval and epoch != config.epochs:
            return {f"{name}/{layer}": np.nan for name in METRICS for layer in [*layers, "total"]}
        table = jh.summarize(
            objective(self._model),
            params,
            batch,
            key=jax.random.fold_in(jax.random.key(config.seed), epoch),
            num_probes=config.num_probes,
            num_steps=config.num_steps,
            method=config.method,
            max_bytes=measure.GRAM_BYTES,
            layers=layers,
        )
        found = {layer: (record.trace.mean, record.lambda_max, record.trace_norm2) for layer, record in table.items()}
        return {f"{name}/{layer}": float(row[i]) for i, name in enumerate(METRICS) for layer, row in found.items()}


METRICS = ("trace", "lambda_max", "trace_norm2")


@dataclasses.dataclass(frozen=True)
class OverTraining(Config):
    """What the figures over training compare.

    Attributes:
      model: names of nets.
      dataset: names of data sets.
      trials: trainings of each net, with the seeds seed, seed + 1, ...
      interval: epochs from one measurement to the next.
      num_steps: Lanczos steps for the largest eigenvalue.
      num_probes: probes of each trace.
    """

    model: tuple[models.Name, ...] = ("vgg11", "vgg11_bn")
    dataset: data.Names = ("mnist",)
    trials: int = 1
    interval: int = 1
    method: Literal["lanczos", "auto"] = "auto"
    num_steps: int = 32
    num_probes: int = 16


def run_over_training(config: OverTraining, out_dir: pathlib.Path, data_dir: str | None) -> None:
    """Trains (or finds) every net on every data set, measuring on the way, and saves all records."""
    numbers: dict[str, dict[str, list]] = {}
    todo = plan(config, out_dir, data_dir)
    for dataset_name, name, trial in todo.trainings:
        found = numbers.setdefault(about(config, name, dataset_name), {})
        _, trained = todo.net((dataset_name, name, trial))
        due = np.isfinite(trained.records["trace/total"])
        found["epochs"] = np.flatnonzero(due).tolist()
        gap = trained.history["test_error"] - 1 + trained.history["train_accuracy"]
        found.setdefault("gap", []).append(gap.tolist())
        found.setdefault("train_loss", []).append(trained.history["train_loss"].tolist())
        for metric, values in trained.records.items():
            found.setdefault(metric, []).append(values[due].tolist())
    store.save_json(out_dir / "numbers.json", numbers)


def told_apart(config: OverTraining, numbers: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The records of figures over training by names no longer than needed, and a title that says the rest."""
    trials = f", mean and standard deviation of {config.trials} trials" if config.trials > 1 else ""
    title = f"Hessian at {config.images_per_class} training images a class, over training{trials}"
    split = {name: re.split(r"(?= \(width| on )", name, maxsplit=1) for name in numbers}
    rests = {rest for _, rest in split.values()}
    if len(rests) > 1:
        return dict(numbers), title
    return {split[name][0]: record for name, record in numbers.items()}, f"Nets{rests.pop()}\n{title}"


def scale_free(record: Mapping[str, Any]) -> np.ndarray:
    """sum_l Tr(Hess_l) ||w_l||^2 over the layers that were measured, (trials, epochs)."""
    parts = [values for name, values in record.items() if name.startswith("trace_norm2/") and name[12:] != "total"]
    return np.sum(parts, axis=0)


def course(epochs: list[int], trials: list[list[float]]) -> str:
    """The mean over trials at the first, at the largest and at the last epoch, in words."""
    mean = np.mean(trials, 0)
    top = int(mean.argmax())
    return (
        f"{mean[0]:.4g} at epoch {epochs[0]}, at most {mean[top]:.4g} at {epochs[top]}, {mean[-1]:.4g} at {epochs[-1]}"
    )
