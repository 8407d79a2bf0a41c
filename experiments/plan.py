"""The trainings of an experiment before they run: which are there already, and how long the others take."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from experiments import models, report, store, train
from experiments.data import Dataset
from experiments.recipe import TrainConfig
from experiments.train import Stepper, Trained

PyTree = Any

# Seconds of what follows a training: after(model, dataset, params, batch_stats).
After = Callable[[nn.Module, Dataset, PyTree, PyTree], float]


class Training(NamedTuple):
    """One training, and what it is called.

    Attributes:
      words: what it is called, and behind the last comma which trial, as in "CE, trial 0".
      name: of the net.
      dataset: what it is trained on.
      config: how.
      options: of the net.
      callback: as for `experiments.train.train`.
      interval: epochs from one call of it that takes time to the next.
    """

    words: str
    name: str
    dataset: Dataset
    config: TrainConfig
    options: Mapping[str, Any] = {}
    callback: Callable | None = None
    interval: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return len(self.dataset.train["label"]) // self.config.batch_size

    def model(self) -> nn.Module:
        """The net."""
        return models.build(self.name, self.dataset.num_classes, **self.options)

    def path(self, out_dir: pathlib.Path) -> pathlib.Path:
        """The file for the trained net in a folder."""
        return train.net_path(
            self.name, self.dataset, self.config, out_dir, options=self.options, callback=self.callback
        )


class Plan:
    """The trainings of an experiment in the order in which they run.

    Attributes:
      trainings: {key: training}.
    """

    def __init__(self, trainings: Mapping[Hashable, Training], out_dir: pathlib.Path, after: After | None = None):
        """Looks for what is there already.

        Args:
          trainings: {key: training}, in order.
          out_dir: folder of the results; nets are looked for there and in the folders beside it.
          after: seconds of what is done with each net once it is trained, for the dry run.
        """
        self.trainings, self._out_dir, self._after = dict(trainings), out_dir, after
        self._kept = {key: store.find(training.path(out_dir)) for key, training in self.trainings.items()}
        self._epochs = {key: _epochs_kept(training.path(out_dir)) for key, training in self.trainings.items()}
        self._start, self._steps_done, self._trained = None, 0, 0

    def missing(self) -> dict[Hashable, Training]:
        """The trainings whose nets are not there."""
        return {key: training for key, training in self.trainings.items() if self._kept[key] is None}

    def net(self, key: Hashable) -> tuple[nn.Module, Trained]:
        """A net of the plan, trained or found; of one that is trained, it says how far the plan is.

        Raises:
          As `experiments.train.train_once`.
        """
        training, missing = self.trainings[key], key in self.missing()
        if self._start is None:
            self._start = time.monotonic()
        before = self._steps_done - self._epochs[key] * training.steps_per_epoch

        def left(steps):
            return f"{duration(self._seconds_left(before + steps))} left"

        try:
            return train.train_once(
                training.name,
                training.dataset,
                training.config,
                self._out_dir,
                options=training.options,
                callback=training.callback,
                left=left if missing and len(self.missing()) > 1 else None,
            )
        finally:
            if missing:
                self._steps_done, self._trained = self._steps_done + self._steps(key), self._trained + 1
                took, words = duration(time.monotonic() - self._start), duration(self._seconds_left(self._steps_done))
                print(f"{self._trained} of {len(self.missing())} trainings in {took}, about {words} left", flush=True)

    def _steps(self, key):
        """Steps that are still to do for a net that is missing."""
        training = self.trainings[key]
        return (training.config.epochs - self._epochs[key]) * training.steps_per_epoch

    def _seconds_left(self, steps):
        """By the time that so many steps of the plan have taken, with what was done after them."""
        total = sum(map(self._steps, self.missing()))
        return (time.monotonic() - self._start) * (total - steps) / max(steps, 1)

    def show(self) -> None:
        """Prints what is there, what would be trained, and for about how long, by a timed step of each kind."""
        missing = self.missing()
        for key, training in self.trainings.items():
            if key not in missing:
                state = f"there, {self._kept[key]}"
            elif done := self._epochs[key]:
                state = f"to train, from epoch {done} of {training.config.epochs} on"
            else:
                state = f"to train, {training.config.epochs} epochs of {training.steps_per_epoch} steps"
            print(f"{training.words}: {state}")
        if not missing:
            print("nothing to train")
            return
        kinds: dict[str, _Kind] = {}
        total = compiling = after = 0.0
        for key, training in missing.items():
            if (name := _kind_of(training)) not in kinds:
                kind = kinds[name] = _timed(training, self._after)
                compiling += kind.compiling
                penalty = "" if training.config.penalty is None else f", with the penalty {kind.penalised:.3g} s"
                print(f"a step of {training.words}: {kind.plain:.3g} s{penalty}")
            kind = kinds[name]
            total += kind.seconds(training, self._epochs[key])
            after += kind.after
        words = f", {duration(after)} of them for what follows the trainings" if self._after else ""
        print(
            f"{len(missing)} of {len(self.trainings)} trainings to do: about {duration(total + compiling + after)}"
            f"{words}, with this machine as busy as now"
        )


class _Kind(NamedTuple):
    """Seconds of the parts of a training."""

    plain: float
    penalised: float
    evaluation: float
    callback: float
    after: float
    compiling: float

    def seconds(self, training, epochs_done):
        config, steps = training.config, training.steps_per_epoch
        numbers = range(epochs_done * steps, config.epochs * steps)
        due = 0 if config.penalty is None else sum(config.penalty.due(number, config, steps) for number in numbers)
        epochs = config.epochs - epochs_done
        measuring = (1 + -(-epochs // training.interval)) * self.callback
        return (len(numbers) - due) * self.plain + due * self.penalised + epochs * self.evaluation + measuring


def _kind_of(training):
    """Trainings of equal kinds differ in nothing that changes the time of a step."""
    penalty = training.config.penalty
    if penalty is not None:
        penalty = dataclasses.replace(penalty, gamma=1.0, every=1, start_epoch=0)
    on = {name: float(getattr(training.config, name) > 0) for name in ("sam", "noise_stability")}
    config = dataclasses.replace(
        training.config, seed=0, epochs=1, milestones=(), learning_rate=0.0, weight_decay=0.0, penalty=penalty, **on
    )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    images = len(training.dataset.train["label"])
    return repr((training.name, sorted(training.options.items()), images, fields, training.callback is None))


def _timed(training, after):
    """Times each part of a training once it is compiled."""
    model, dataset, config = training.model(), training.dataset, training.config
    plain = dataclasses.replace(config, penalty=None)
    stepper, compiling, step = _stepper(model, dataset, plain)
    penalised = 0.0
    if config.penalty is not None:
        always = dataclasses.replace(config.penalty, every=1, start_epoch=0)
        _, more, penalised = _stepper(model, dataset, dataclasses.replace(config, penalty=always))
        compiling += more
    state = stepper.state
    calls = [
        lambda: train.evaluate(model, state.params, state.batch_stats, dataset, dataset.test),
        (lambda: training.callback(0, state.params, state.batch_stats)) if training.callback is not None else None,
    ]
    times = []
    for call in calls:
        first, second = [report.seconds(call, jax.block_until_ready) for _ in range(2)] if call else (0.0, 0.0)
        compiling += max(0.0, first - second)
        times.append(second)
    later = after(model, dataset, state.params, state.batch_stats) if after else 0.0
    return _Kind(step, penalised, *times, later, compiling)


def _stepper(model, dataset, config, steps=4):
    """(the steps, seconds of compiling, seconds of one step)."""
    stepper = Stepper(model, dataset, config)
    first = report.seconds(lambda: stepper.advance(1), jax.block_until_ready)
    each = report.seconds(lambda: stepper.advance(steps), jax.block_until_ready) / steps
    return stepper, max(0.0, first - each), each


def _epochs_kept(path):
    """Epochs behind the last checkpoint of a net that is not whole."""
    return max((int(p.name) for p in path.with_suffix(".checkpoints").glob("*") if p.name.isdigit()), default=0)


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def settings(trainings: Iterable[Training]) -> dict[str, dict[str, Any]]:
    """{what it is called: its settings}, both without trial and seed, for the file that says how a result was made."""
    found = {}
    for training in trainings:
        values = {"model": training.name, **training.options, "images": len(training.dataset.train["label"])}
        values |= train.recipe.settings(training.config)
        values.pop("seed")
        found[training.words.rpartition(", ")[0]] = values
    return found
