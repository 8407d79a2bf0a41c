"""One trainer for every net: stochastic gradient descent on data that lives on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

import jaxhess as jh
from experiments import data, models, results
from experiments.data import Dataset, Split

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      epochs: passes over the training images.
      batch_size: images in a step; what is left over in an epoch is left out of it.
      learning_rate: of the first steps.
      momentum: of SGD.
      milestones: when the learning rate falls, as shares of all epochs (0.5) or as epochs (10).
      decay: factor by which it falls.
      weight_decay: coefficient of L2 regularisation, coupled as in SGD.
      seed: of initialisation and order.
    """

    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 1e-2
    momentum: float = 0.9
    milestones: tuple[float, ...] = ()
    decay: float = 0.25
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, low, words in (
            ("epochs", 1, "at least 1"),
            ("batch_size", 1, "at least 1"),
            ("learning_rate", 0, "not negative"),
            ("weight_decay", 0, "not negative"),
        ):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)}")

    def milestone_epochs(self) -> list[float]:
        """The milestones, all as epochs."""
        return [point * self.epochs if point < 1 else point for point in self.milestones]


class TrainState(NamedTuple):
    """All that training goes on from: one pytree of arrays."""

    step: jax.Array
    key: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    totals: dict[str, jax.Array]  # sums over the steps of the running epoch
    history: dict[str, jax.Array]  # (epochs,) each; NaN where still to come


class Trained(NamedTuple):
    """A trained net: parameters, batch statistics ({} without batch norm), and {metric: (epochs,) float array}."""

    params: PyTree
    batch_stats: PyTree
    history: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Predict:
    """``predict(params, batch)`` of a net in evaluation mode; equal for equal nets, so that ``jit`` compiles once."""

    model: nn.Module

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Logits (N, C) of ``batch["image"]``, with the batch statistics ``batch["batch_stats"]`` if there are any."""
        variables = {"params": params, "batch_stats": batch.get("batch_stats", {})}
        return self.model.apply(variables, batch["image"], train=False)


def objective(model: nn.Module) -> jh.Objective:
    """The cross-entropy of a net in evaluation mode, as jaxhess takes it.

    Args:
      model: a net of `experiments.models`.

    Returns:
      An `jaxhess.Objective` of batches {"image": (N, H, W, C), "label": int (N,)}, and "batch_stats" for nets with
      batch norm.
    """
    return jh.Objective(Predict(model), jh.cross_entropy)


def optimizer(
    config: TrainConfig, steps_per_epoch: int, transform: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum, L2 and a piecewise constant rate, after a transformation that may take ``batch=``.

    Args:
      config: the settings.
      steps_per_epoch: steps of an epoch.
      transform: what to do with the gradients first, such as adding a penalty's.

    Returns:
      An optax transformation that is called with ``batch=``.
    """
    falls = {round(epoch * steps_per_epoch): config.decay for epoch in config.milestone_epochs()}
    schedule = optax.piecewise_constant_schedule(config.learning_rate, falls)
    parts = [optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=config.momentum)]
    return optax.with_extra_args_support(optax.chain(*([] if transform is None else [transform]), *parts))


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    transform: optax.GradientTransformation | None = None,
    callback: Callable[[int, PyTree, PyTree], None] | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a net.

    A host loop over one compiled step: convolutions inside ``lax.scan`` are slow on CPUs. The steps gather their
    images from the data set on the device.

    Args:
      model: a net of `experiments.models`.
      dataset: training data; its test split is evaluated after each epoch.
      config: the settings.
      transform: a gradient transformation in front of the optimizer; its ``update`` is given ``batch=``, a dict of
        "image" (normalised), "label" and "batch_stats", as `objective` takes it.
      callback: ``callback(epoch, params, batch_stats)`` before the first epoch (0) and after each; the next step
        overwrites these arrays, so copy what is to be kept.
      progress: whether to show a progress bar.

    Returns:
      `Trained`, with the history of "train_loss", "train_accuracy", "test_loss" and "test_error" (shares of 1).

    Raises:
      ValueError: if the batch is larger than the training set, or the loss is no longer finite.
    """
    num_images = len(dataset.train["label"])
    steps = num_images // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size={config.batch_size} is more than the {num_images} training images; take fewer")
    tx = optimizer(config, steps, transform)
    step = _make_step(model, tx, config.batch_size, steps)
    images, test = _on_device(dataset, dataset.train), _on_device(dataset, dataset.test)
    state = init_state(model, tx, config, dataset)

    with tqdm(total=config.epochs * steps, unit="step", desc="training", disable=None if progress else True) as bar:
        if callback is not None:
            callback(0, state.params, state.batch_stats)
        for epoch in range(config.epochs):
            order = jax.random.permutation(jax.random.fold_in(state.key, epoch), num_images)
            for _ in range(steps):
                state = step(state, images, order)
                bar.update()
            loss, error = _evaluate(model, state.params, state.batch_stats, test)
            state = _end_epoch(state, epoch, steps * config.batch_size, loss, error)
            record = {name: float(values[epoch]) for name, values in state.history.items()}
            bar.set_postfix({name: f"{value:.4f}" for name, value in record.items()})
            if not np.isfinite(record["train_loss"]):
                raise ValueError(
                    f"the training loss is {record['train_loss']} in epoch {epoch + 1}; lower "
                    f"learning_rate={config.learning_rate}"
                )
            if callback is not None:
                callback(epoch + 1, state.params, state.batch_stats)
    return Trained(state.params, state.batch_stats, {k: np.asarray(v) for k, v in state.history.items()})


def train_once(
    name: str, dataset: Dataset, config: TrainConfig, out_dir: pathlib.Path, *, progress: bool = True
) -> tuple[nn.Module, Trained]:
    """Trains a net and keeps it, or takes one that was trained in just the same way before.

    Nets are kept in files whose names end in a hash of all the settings of their training, and looked for in
    ``out_dir`` and in the folders beside it, where other experiments leave theirs.

    Args:
      name: of the net, as for `experiments.models.build`.
      dataset: as for `train`.
      config: the settings; fields that a subclass adds to those of `TrainConfig` play no part in training.
      out_dir: folder of the results.
      progress: whether to show a progress bar.

    Returns:
      The net, and `Trained`.

    Raises:
      ValueError: as `train` and `experiments.models.build`, or for a damaged file.
    """
    model = models.build(name, dataset.num_classes)
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}
    about = {"classes": dataset.num_classes, "images": len(dataset.train["label"])}  # tells samples and labels apart
    recipe = json.dumps({"model": name, "dataset": dataset.name, **about, **settings}, sort_keys=True)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    path = out_dir / f"net-{name}-{dataset.name.replace('/', '-')}-{digest}.npz"
    for kept in (path, *sorted(out_dir.parent.glob(f"*/{path.name}"))):
        if kept.exists():
            tree = unflatten_dict(results.load_arrays(kept), sep="/")
            return model, Trained(tree["params"], tree.get("batch_stats", {}), tree["history"])
    trained = train(model, dataset, config, progress=progress)
    results.save_arrays(path, flatten_dict(trained._asdict(), sep="/") | {"recipe": recipe})
    return model, trained


def init_state(model: nn.Module, tx: optax.GradientTransformation, config: TrainConfig, dataset: Dataset) -> TrainState:
    """The state before the first step."""
    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    variables = jax.jit(model.init)(init_key, dataset.batch({k: v[:1] for k, v in dataset.train.items()})["image"])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=order_key,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        totals={name: jnp.zeros(()) for name in ("loss", "correct")},
        history={
            name: jnp.full(config.epochs, jnp.nan)
            for name in ("train_loss", "train_accuracy", "test_loss", "test_error")
        },
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
    return tuple(float(value) for value in _evaluate(model, params, batch_stats, _on_device(dataset, split)))


class _Images(NamedTuple):
    """A split on the device, and what normalises it."""

    split: dict[str, jax.Array]
    mean: jax.Array
    std: jax.Array

    def take(self, index):
        batch = jax.tree.map(lambda x: x[index], self.split)
        return batch | {"image": data.normalise(batch["image"], self.mean, self.std)}


def _on_device(dataset, split):
    return jax.device_put(_Images(split, dataset.mean, dataset.std))


def _make_step(model, tx, batch_size, steps_per_epoch):
    """``step(state, images, order) -> state``, compiled; the state is overwritten."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, images, order):
        start = (state.step % steps_per_epoch) * batch_size
        batch = images.take(jax.lax.dynamic_slice_in_dim(order, start, batch_size))
        batch["batch_stats"] = state.batch_stats

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            return jh.cross_entropy(logits, batch), (logits, new.get("batch_stats", {}))

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, batch=batch)
        correct = jnp.sum(logits.argmax(-1) == batch["label"])
        return state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            totals={
                "loss": state.totals["loss"] + loss * batch_size,
                "correct": state.totals["correct"] + correct,
            },
        )

    return step


@partial(jax.jit, donate_argnums=0)
def _end_epoch(state, epoch, num_images, test_loss, test_error):
    """The state with this epoch's record in its history."""
    record = {
        "train_loss": state.totals["loss"] / num_images,
        "train_accuracy": state.totals["correct"] / num_images,
        "test_loss": test_loss,
        "test_error": test_error,
    }
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
    logits = Predict(model)(params, batch | {"batch_stats": batch_stats})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    inside = index < len(images.split["label"])
    return jnp.sum(losses * inside), jnp.sum((logits.argmax(-1) != batch["label"]) & inside)
