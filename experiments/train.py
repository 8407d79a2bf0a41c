"""One trainer for every net: stochastic gradient descent on data that lives on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from tqdm import tqdm

import jaxhess as jh
from experiments import data, models, recipe, store
from experiments.data import Dataset, Split
from experiments.recipe import TrainConfig

PyTree = Any

SLICE = 64  # images of a gradient that a CPU takes at once: 256 of LeNet's whole take 1.5 times as long


class TrainState(NamedTuple):
    """All that training goes on from: one pytree of arrays."""

    step: jax.Array
    key: jax.Array
    augment_key: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    totals: dict[str, jax.Array]  # sums over the steps of the running epoch
    history: dict[str, jax.Array]  # (epochs,) each; NaN where still to come
    step_loss: jax.Array  # (all steps,) likewise


class Trained(NamedTuple):
    """A trained net, and how it came about.

    Attributes:
      params: its parameters.
      batch_stats: its batch statistics, {} without batch norm.
      history: {metric: (epochs,) float array}.
      step_loss: the loss of every step.
      records: what the callback returned, {name: (1 + epochs,) float array}.
    """

    params: PyTree
    batch_stats: PyTree
    history: dict[str, np.ndarray]
    step_loss: np.ndarray
    records: dict[str, np.ndarray]


class DivergedError(ValueError):
    """The training loss is no longer finite."""


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    transform: optax.GradientTransformation | None = None,
    callback: Callable[[int, PyTree, PyTree], Mapping[str, float] | None] | None = None,
    checkpoint_dir: pathlib.Path | None = None,
    progress: bool = True,
    left: Callable[[int], str] | None = None,
) -> Trained:
    """Trains a net.

    A host loop over one compiled step: convolutions inside ``lax.scan`` are slow on CPUs. The steps gather their
    images from the data set on the device.

    Args:
      model: a net of `experiments.models`.
      dataset: training data; its test split is evaluated after each epoch.
      config: the settings.
      transform: a gradient transformation in front of the optimizer, behind the penalty; its ``update`` is given
        ``batch=``, a dict of "image" (normalised), "label" and "batch_stats", as `models.objective` takes it.
      callback: ``callback(epoch, params, batch_stats)`` before the first epoch (0) and after each; the next step
        overwrites these arrays, so copy what is to be kept. Named numbers that it returns are kept as records.
      checkpoint_dir: where to keep the state behind each epoch (the last two), and from where to go on if it was kept
        before: a run that was killed ends with bitwise the same numbers as one that was not. The callback is called
        again for an epoch that was not kept.
      progress: whether to show a progress bar.
      left: ``left(steps done)`` in words, for the bar: how long all trainings take that this one is one of.

    Returns:
      `Trained`, with the history of "train_loss", "train_accuracy", "test_loss" and "test_error" (shares of 1); with
      a penalty also of "penalty", the last one of the epoch without gamma, and "skipped", those that were left out so
      far because they were not finite.

    Raises:
      DivergedError: if the loss is no longer finite.
      ValueError: if the batch is larger than the training set, text is to be augmented, or ``checkpoint_dir`` holds
        another training.
    """
    num_images = len(dataset.train["label"])
    steps = num_images // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size={config.batch_size} is more than the {num_images} training images; take fewer")
    tx = recipe.with_penalty(model, config, steps, transform)
    if transform is None:
        step = _shared_step(model, dataclasses.replace(config, seed=0), steps)
    else:
        step = _make_step(model, config, steps, transform)
    if config.augment and dataset.is_text:
        raise ValueError(f"augment=true flips and rotates images, and {dataset.name} is text; leave it out")
    images, test = data.on_device(dataset, dataset.train), data.on_device(dataset, dataset.test)
    state, done, records = init_state(model, tx, config, dataset), 0, {}

    with contextlib.ExitStack() as stack:
        kept = None
        if checkpoint_dir is not None:
            about = {"model": repr(model), "dataset": dataset.name, "images": num_images, **recipe.settings(config)}
            kept = stack.enter_context(store.Checkpoints(checkpoint_dir, json.loads(json.dumps(about))))
            if restored := kept.latest(state):
                done, state, records = restored
        title = dict(unit="step", desc="training", disable=None if progress else True)
        bar = stack.enter_context(tqdm(total=config.epochs * steps, initial=done * steps, **title))
        if done == 0:
            _record(records, callback, 0, state)
        for epoch in range(done, config.epochs):
            order = jax.random.permutation(jax.random.fold_in(state.key, epoch), num_images)
            for i in range(steps):
                state = step(epoch * steps + i, state, images, order)
                bar.update()
            loss, error = _evaluate(model, state.params, state.batch_stats, test)
            state = _end_epoch(state, epoch, steps * config.batch_size, loss, error)
            record = {name: float(values[epoch]) for name, values in state.history.items()}
            words = {name: f"{value:.4g}" for name, value in record.items()}
            bar.set_postfix(words | ({"all": left((epoch + 1) * steps)} if left is not None else {}))
            if not np.isfinite(record["train_loss"]):
                raise DivergedError(
                    f"the training loss is {record['train_loss']} in epoch {epoch + 1}; lower "
                    f"learning_rate={config.learning_rate}{_or_gamma(config)}"
                )
            _record(records, callback, epoch + 1, state)
            if kept is not None:
                kept.save(epoch + 1, state, records)
    history, records = ({k: np.asarray(v) for k, v in values.items()} for values in (state.history, records))
    return Trained(state.params, state.batch_stats, history, np.asarray(state.step_loss), records)


class Stepper:
    """The steps of a training one after another, without evaluation, for timing."""

    def __init__(self, model: nn.Module, dataset: Dataset, config: TrainConfig):
        """Takes what `train` takes."""
        steps = len(dataset.train["label"]) // config.batch_size
        tx = recipe.with_penalty(model, config, steps)
        self._step, self._images = _make_step(model, config, steps), data.on_device(dataset, dataset.train)
        self._state, self._done = init_state(model, tx, config, dataset), 0
        self._order = jax.random.permutation(self._state.key, len(dataset.train["label"]))

    @property
    def state(self) -> TrainState:
        """The state after the last step; the next one overwrites it."""
        return self._state

    def advance(self, steps: int) -> PyTree:
        """Goes on by so many steps, and returns the parameters."""
        for _ in range(steps):
            self._state = self._step(self._done, self._state, self._images, self._order)
            self._done += 1
        return self._state.params


def train_once(
    name: str,
    dataset: Dataset,
    config: TrainConfig,
    out_dir: pathlib.Path,
    *,
    options: Mapping[str, Any] | None = None,
    callback: Callable | None = None,
    progress: bool = True,
    left: Callable[[int], str] | None = None,
) -> tuple[nn.Module, Trained]:
    """Trains a net and keeps it, or takes one that was trained in just the same way before.

    Nets are kept in files whose names end in a hash of all the settings of their training, and looked for in
    ``out_dir`` and in the folders beside it, where other experiments leave theirs. A training that was interrupted
    goes on where it was; its checkpoints are deleted when the net is in its file.

    Args:
      name: of the net, as for `experiments.models.build`.
      dataset: as for `train`.
      config: the settings; fields that a subclass adds to those of `TrainConfig` play no part in training.
      out_dir: folder of the results.
      options: of the net, such as its width; part of the settings where there are any.
      callback: as for `train`; its ``repr`` is one of the settings, so a dataclass that shows all that matters.
      progress: whether to show a progress bar.
      left: as for `train`.

    Returns:
      The net, and `Trained`.

    Raises:
      ValueError: as `train` and `experiments.models.build`, or for a damaged file.
    """
    model = models.build(name, dataset.num_classes, **(options or {}))
    settings = recipe.written(name, dataset, config, callback, options)
    path = store.net_path(out_dir, name, dataset.name, settings)
    folder = path.with_suffix(".checkpoints")
    if kept := store.find(path):
        tree = store.load_tree(kept)
        store.remove_checkpoints(folder)  # only now, for a damaged file is no reason to lose them
        # What is empty is not in the file, and names of records may hold a slash, such as "trace/conv1".
        tree["records"] = flatten_dict(tree.get("records", {}), sep="/")
        return model, Trained(**{"batch_stats": {}} | {part: tree[part] for part in Trained._fields if part in tree})
    trained = train(model, dataset, config, callback=callback, checkpoint_dir=folder, progress=progress, left=left)
    store.save_tree(path, trained._asdict() | {"recipe": settings})
    store.remove_checkpoints(folder)
    return model, trained


def net_path(
    name: str,
    dataset: Dataset,
    config: TrainConfig,
    out_dir: pathlib.Path,
    *,
    options: Mapping[str, Any] | None = None,
    callback: Callable | None = None,
) -> pathlib.Path:
    """The file in which `train_once` keeps a net; arguments as there."""
    return store.net_path(out_dir, name, dataset.name, recipe.written(name, dataset, config, callback, options))


def init_state(model: nn.Module, tx: optax.GradientTransformation, config: TrainConfig, dataset: Dataset) -> TrainState:
    """The state before the first step."""
    keys, steps = recipe.keys(config.seed), len(dataset.train["label"]) // config.batch_size
    variables = jax.jit(model.init)(keys["init"], dataset.batch({k: v[:1] for k, v in dataset.train.items()})["image"])
    opt_state, metrics = tx.init(variables["params"]), ["train_loss", "train_accuracy", "test_loss", "test_error"]
    if recipe.penalty_state(opt_state) is not None:
        metrics += ["penalty", "skipped"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=keys["order"],
        augment_key=keys["augment"],
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=opt_state,
        totals={name: jnp.zeros(()) for name in ("loss", "correct")},
        history={name: jnp.full(config.epochs, jnp.nan) for name in metrics},
        step_loss=jnp.full(config.epochs * steps, jnp.nan),
    )


def evaluate(
    model: nn.Module, params: PyTree, batch_stats: PyTree, dataset: Dataset, split: Split
) -> tuple[float, float]:
    """The mean cross-entropy of a net in evaluation mode, and its share of wrong answers.

    Args:
      model: the net.
      params: its parameters.
      batch_stats: its batch statistics, {} without batch norm.
      dataset: where the split is from: its mean and deviation normalise the images.
      split: the images and labels.

    Returns:
      (loss, error).
    """
    return tuple(float(value) for value in _evaluate(model, params, batch_stats, data.on_device(dataset, split)))


def _record(records, callback, epoch, state):
    found = callback(epoch, state.params, state.batch_stats) if callback is not None else None
    for name, value in (found or {}).items():
        records.setdefault(name, []).append(float(value))


def _or_gamma(config):
    return "" if config.penalty is None else f" or gamma={config.penalty.gamma}"


@lru_cache(maxsize=16)
def _shared_step(model, config, steps):
    """The step, which does not depend on the seed: all keys are in the state, so several trials compile it once."""
    return _make_step(model, config, steps)


def _make_step(model, config, steps, transform=None):
    """``step(number, state, images, order) -> state``; the state is overwritten.

    The steps with and without the penalty are two programs, and the host chooses: inside ``lax.cond`` a CPU takes
    many times as long for convolutions.
    """
    programs = {
        due: _compile_step(model, recipe.with_penalty(model, config, steps, transform, due), config, steps)
        for due in ((False, True) if config.penalty is not None else (False,))
    }

    def step(number, *arguments):
        due = config.penalty is not None and config.penalty.due(number, config, steps)
        return programs[due](*arguments)

    return step


def _compile_step(model, tx, config, steps_per_epoch):
    batch_size = config.batch_size

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, order):
        start = (state.step % steps_per_epoch) * batch_size
        batch = images.take(jax.lax.dynamic_slice_in_dim(order, start, batch_size))
        batch["batch_stats"] = state.batch_stats
        if config.augment:
            batch["image"] = data.augment(jax.random.fold_in(state.augment_key, state.step), batch["image"])

        def loss_fn(params, batch):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            correct = _by_example(logits.argmax(-1) == batch["label"]).sum()
            return jh.cross_entropy(logits, batch), (correct, new.get("batch_stats", {}))

        def value_and_grad(params):
            return _in_slices(jax.value_and_grad(loss_fn, has_aux=True), params, batch)

        (loss, (correct, batch_stats)), grads = value_and_grad(state.params)
        extra = {"grad_fn": lambda params, _: value_and_grad(params)[1]} if config.sam else {}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, batch=batch, **extra)
        return state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            totals={
                "loss": state.totals["loss"] + loss * batch_size,
                "correct": state.totals["correct"] + correct,
            },
            step_loss=state.step_loss.at[state.step].set(loss),
        )

    return step


def _in_slices(value_and_grad, params, batch):
    """``value_and_grad(params, batch)`` as the mean over slices whose activations stay in a CPU's cache.

    Unrolled, for convolutions inside XLA's loops are slow there; batch norm needs the whole batch.
    """
    size = len(batch["label"])
    compiles_fast = SLICE < size <= 8 * SLICE
    if jax.default_backend() != "cpu" or batch["batch_stats"] or size % SLICE or not compiles_fast:
        return value_and_grad(params, batch)
    slices = [
        value_and_grad(params, batch | {name: batch[name][i : i + SLICE] for name in ("image", "label")})
        for i in range(0, size, SLICE)
    ]
    (losses, (correct, _)), grads = jax.tree.map(lambda *parts: sum(parts), *slices)
    return (losses / len(slices), (correct, {})), jax.tree.map(lambda g: g / len(slices), grads)


@partial(jax.jit, donate_argnums=0)
def _end_epoch(state, epoch, num_images, test_loss, test_error):
    """The state with this epoch's record in its history."""
    record = {
        "train_loss": state.totals["loss"] / num_images,
        "train_accuracy": state.totals["correct"] / num_images,
        "test_loss": test_loss,
        "test_error": test_error,
    }
    if (penalty := recipe.penalty_state(state.opt_state)) is not None:
        record |= {"penalty": penalty.penalty, "skipped": penalty.skipped.astype(jnp.float32)}
    history = {name: values.at[epoch].set(record[name]) for name, values in state.history.items()}
    return state._replace(totals=jax.tree.map(jnp.zeros_like, state.totals), history=history)


def _evaluate(model, params, batch_stats, images, batch_size=1000):
    total = len(images.split["label"])
    size = min(batch_size, total)
    sums = [_sums(model, size, params, batch_stats, images, start) for start in range(0, total, size)]
    return tuple(sum(parts) / total for parts in zip(*sums, strict=True))


@partial(jax.jit, static_argnums=(0, 1))
def _sums(model, size, params, batch_stats, images, start):
    """Loss and wrong answers summed over ``size`` images; the last slice may reach beyond the end."""
    index = start + jnp.arange(size)
    batch = images.take(index)  # beyond the end JAX repeats the last one, which then does not count
    logits = models.Predict(model)(params, batch | {"batch_stats": batch_stats})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    inside = index < len(images.split["label"])
    wrong = logits.argmax(-1) != batch["label"]
    return jnp.sum(_by_example(losses) * inside), jnp.sum(_by_example(wrong) * inside)


def _by_example(values):
    """The mean over the labels of each example, (N,), which is one for images."""
    return values.reshape(len(values), -1).mean(1)
