"""One trainer for every net: stochastic gradient descent on data that lives on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.scipy.ndimage import map_coordinates
from tqdm import tqdm

import jaxhess as jh
from experiments import checkpoints, data, models, results
from experiments.data import Dataset, Split

PyTree = Any

SLICE = 64  # images of a gradient that a CPU takes at once: 256 of LeNet's whole take 1.5 times as long


@dataclasses.dataclass(frozen=True)
class Penalty:
    """The Hessian trace penalty of a training, of the loss in evaluation mode on the batch of the step.

    Attributes:
      gamma: its coefficient.
      every: f_r, steps from one penalty to the next. They are counted over all steps from the start, where the
        released code counts anew in each epoch; if ``every`` divides the steps of an epoch that is the same.
      start_epoch: when it begins, as a share of all epochs (0.5) or as an epoch (10).
      layers: "all" or "middle".
      num_probes: probes of each penalty.
      curvature: "hessian" or "ggn".
      probe: "rademacher" or "gaussian".
    """

    gamma: float
    every: int = 50
    start_epoch: float = 0
    layers: str = "all"
    num_probes: int = 1
    curvature: str = "ggn"
    probe: str = "rademacher"

    def transform(
        self, model: nn.Module, config: TrainConfig, steps_per_epoch: int
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation that adds it to the gradients of a net; ValueError for settings that make no sense."""
        return jh.add_hessian_trace(
            objective(model),
            self.gamma,
            key=_keys(config.seed)["penalty"],
            every=self.every,
            start=self._start(config, steps_per_epoch),
            layers=self.layers,
            num_probes=self.num_probes,
            curvature=self.curvature,
            probe=self.probe,
        )

    def due(self, step: int, config: TrainConfig, steps_per_epoch: int) -> bool:
        """Whether the transformation acts on a step."""
        since = step - self._start(config, steps_per_epoch)
        return since >= 0 and since % self.every == 0

    def _start(self, config, steps_per_epoch):
        return round(_epochs(self.start_epoch, config.epochs) * steps_per_epoch)


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
      sam: radius rho of sharpness-aware minimisation (Foret et al. 2021), 0 for none: the gradient is taken at the
        worst parameters within rho, to first order, for twice the time of a step.
      augment: whether images are flipped and rotated, see `augment`.
      seed: of initialisation, order, augmentation and probes; each has random numbers of its own, so that trainings
        with one seed and different penalties start from the same parameters and see the same images.
      penalty: the Hessian trace penalty, if any.
    """

    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 1e-2
    momentum: float = 0.9
    milestones: tuple[float, ...] = ()
    decay: float = 0.25
    weight_decay: float = 0.0
    sam: float = 0.0
    augment: bool = False
    seed: int = 0
    penalty: Penalty | None = None

    def __post_init__(self):
        for name, low, words in (
            ("epochs", 1, "at least 1"),
            ("batch_size", 1, "at least 1"),
            ("learning_rate", 0, "not negative"),
            ("weight_decay", 0, "not negative"),
            ("sam", 0, "not negative"),
        ):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)}")

    def milestone_epochs(self) -> list[float]:
        """The milestones, all as epochs."""
        return [_epochs(point, self.epochs) for point in self.milestones]


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
      An optax transformation that is called with ``batch=``, and with ``grad_fn=`` if there is a radius for SAM.
    """
    falls = {round(epoch * steps_per_epoch): config.decay for epoch in config.milestone_epochs()}
    schedule = optax.piecewise_constant_schedule(config.learning_rate, falls)
    parts = [optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=config.momentum)]
    if transform is not None:
        parts.insert(0, transform)
    if config.sam:
        parts.insert(0, _sharpness_aware(config.sam))
    return optax.with_extra_args_support(optax.chain(*parts))


def _sharpness_aware(radius):
    """Replaces the gradient by ``grad_fn`` at the radius from the parameters along it."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(radius))
    sam = optax.contrib.sam(optax.identity(), ascent, opaque_mode=True)

    def update(updates, state, params=None, *, grad_fn, **extra):
        del extra
        return sam.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(sam.init, update)


def train(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    transform: optax.GradientTransformation | None = None,
    callback: Callable[[int, PyTree, PyTree], Mapping[str, float] | None] | None = None,
    checkpoint_dir: pathlib.Path | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a net.

    A host loop over one compiled step: convolutions inside ``lax.scan`` are slow on CPUs. The steps gather their
    images from the data set on the device.

    Args:
      model: a net of `experiments.models`.
      dataset: training data; its test split is evaluated after each epoch.
      config: the settings.
      transform: a gradient transformation in front of the optimizer, behind the penalty; its ``update`` is given
        ``batch=``, a dict of "image" (normalised), "label" and "batch_stats", as `objective` takes it.
      callback: ``callback(epoch, params, batch_stats)`` before the first epoch (0) and after each; the next step
        overwrites these arrays, so copy what is to be kept. Named numbers that it returns are kept as records.
      checkpoint_dir: where to keep the state behind each epoch (the last two), and from where to go on if it was kept
        before: a run that was killed ends with bitwise the same numbers as one that was not. The callback is called
        again for an epoch that was not kept.
      progress: whether to show a progress bar.

    Returns:
      `Trained`, with the history of "train_loss", "train_accuracy", "test_loss" and "test_error" (shares of 1); with
      a penalty also of "penalty", the last one of the epoch without gamma, and "skipped", those that were left out so
      far because they were not finite.

    Raises:
      DivergedError: if the loss is no longer finite.
      ValueError: if the batch is larger than the training set, or ``checkpoint_dir`` holds another training.
    """
    num_images = len(dataset.train["label"])
    steps = num_images // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size={config.batch_size} is more than the {num_images} training images; take fewer")
    tx = _with_penalty(model, config, steps, transform)
    if transform is None:
        step = _shared_step(model, dataclasses.replace(config, seed=0), steps)
    else:
        step = _make_step(model, config, steps, transform)
    images, test = _on_device(dataset, dataset.train), _on_device(dataset, dataset.test)
    state, done, records = init_state(model, tx, config, dataset), 0, {}

    with contextlib.ExitStack() as stack:
        kept = None
        if checkpoint_dir is not None:
            recipe = {"model": repr(model), "dataset": dataset.name, "images": num_images, **_settings(config)}
            kept = checkpoints.Checkpoints(checkpoint_dir, json.loads(json.dumps(recipe)))
            stack.callback(kept.close)
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
            bar.set_postfix({name: f"{value:.4g}" for name, value in record.items()})
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
        tx = _with_penalty(model, config, steps)
        self._step, self._images = _make_step(model, config, steps), _on_device(dataset, dataset.train)
        self._state, self._done = init_state(model, tx, config, dataset), 0
        self._order = jax.random.permutation(self._state.key, len(dataset.train["label"]))

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

    Returns:
      The net, and `Trained`.

    Raises:
      ValueError: as `train` and `experiments.models.build`, or for a damaged file.
    """
    model = models.build(name, dataset.num_classes, **(options or {}))
    recipe, path = _kept_as(name, dataset, config, out_dir, callback, options)
    folder = path.with_suffix(".checkpoints")
    if kept := results.find(path):
        tree = unflatten_dict(results.load_arrays(kept), sep="/")
        checkpoints.remove(folder)  # only now, for a damaged file is no reason to lose them
        tree["records"] = flatten_dict(tree.get("records", {}), sep="/")  # names such as "trace/conv1"
        parts = (
            tree[part] if part in ("params", "history", "step_loss") else tree.get(part, {}) for part in Trained._fields
        )
        return model, Trained(*parts)
    trained = train(model, dataset, config, callback=callback, checkpoint_dir=folder, progress=progress)
    results.save_arrays(path, flatten_dict(trained._asdict(), sep="/") | {"recipe": recipe})
    checkpoints.remove(folder)
    return model, trained


def net_path(name: str, dataset: Dataset, config: TrainConfig, out_dir: pathlib.Path) -> pathlib.Path:
    """The file in which `train_once` keeps a net."""
    return _kept_as(name, dataset, config, out_dir)[1]


def _kept_as(name, dataset, config, out_dir, callback=None, options=None):
    settings = _settings(config)
    if options:
        settings["options"] = dict(options)
    if callback is not None:
        settings["callback"] = repr(callback)
    about = {"classes": dataset.num_classes, "images": len(dataset.train["label"])}  # tells samples and labels apart
    recipe = json.dumps({"model": name, "dataset": dataset.name, **about, **settings}, sort_keys=True)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    return recipe, out_dir / f"net-{name}-{dataset.name.replace('/', '-')}-{digest}.npz"


def _settings(config):
    """The fields of `TrainConfig` as plain values; without ``sam`` where it is off, as in nets kept before it was."""
    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "sam" or config.sam]
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


def init_state(model: nn.Module, tx: optax.GradientTransformation, config: TrainConfig, dataset: Dataset) -> TrainState:
    """The state before the first step."""
    keys, steps = _keys(config.seed), len(dataset.train["label"]) // config.batch_size
    variables = jax.jit(model.init)(keys["init"], dataset.batch({k: v[:1] for k, v in dataset.train.items()})["image"])
    opt_state, metrics = tx.init(variables["params"]), ["train_loss", "train_accuracy", "test_loss", "test_error"]
    if _penalty_state(opt_state) is not None:
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
    return tuple(float(value) for value in _evaluate(model, params, batch_stats, _on_device(dataset, split)))


@jax.jit
def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Every image flipped left to right or not, and rotated by up to 15 degrees, both at random.

    Between pixels it is interpolated linearly; what comes in from outside continues the border.

    Args:
      key: a JAX random key.
      images: (N, H, W, C).

    Returns:
      Images of the same shape and type, within the range of each.
    """
    number, height, width, _ = images.shape
    flip_key, angle_key = jax.random.split(key)
    sides = jax.random.rademacher(flip_key, (number,), jnp.float32)
    angles = jax.random.uniform(angle_key, (number,), minval=-jnp.pi / 12, maxval=jnp.pi / 12)
    middle = ((height - 1) / 2, (width - 1) / 2)
    y, x = jnp.meshgrid(jnp.arange(height) - middle[0], jnp.arange(width) - middle[1], indexing="ij")

    def turn(image, side, angle):
        rows = jnp.cos(angle) * y - jnp.sin(angle) * x + middle[0]
        columns = side * (jnp.sin(angle) * y + jnp.cos(angle) * x) + middle[1]

        def channel(values):
            return map_coordinates(values, (rows, columns), order=1, mode="nearest")

        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(turn)(images, sides, angles)


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


def _epochs(point, epochs):
    """A moment given as a share of all epochs (below 1) or as an epoch, as an epoch."""
    return point * epochs if point < 1 else point


def _keys(seed):
    names = ("init", "order", "augment", "penalty")
    return dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))


def _record(records, callback, epoch, state):
    found = callback(epoch, state.params, state.batch_stats) if callback is not None else None
    for name, value in (found or {}).items():
        records.setdefault(name, []).append(float(value))


def _or_gamma(config):
    return "" if config.penalty is None else f" or gamma={config.penalty.gamma}"


def _penalty_state(opt_state):
    """The state of the first `jaxhess.add_hessian_trace` in an optimizer's; None without."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, jh.HessianTraceState))
    return next((node for node in nodes if isinstance(node, jh.HessianTraceState)), None)


def _with_penalty(model, config, steps, transform=None, due=None):
    """The optimizer, its penalty included; with ``due`` for steps on which that acts, or for those on which not."""
    if config.penalty is not None:
        penalty = config.penalty.transform(model, config, steps)
        if due:
            always = dataclasses.replace(config.penalty, every=1, start_epoch=0)
            penalty = always.transform(model, config, steps)
        elif due is not None:
            penalty = optax.GradientTransformationExtraArgs(penalty.init, _count_only)
        transform = penalty if transform is None else optax.chain(penalty, transform)
    return optimizer(config, steps, transform)


@lru_cache(maxsize=16)
def _shared_step(model, config, steps):
    """The step, which does not depend on the seed: all keys are in the state, so several trials compile it once."""
    return _make_step(model, config, steps)


def _count_only(updates, state, params=None, **extra):
    """An update of `jaxhess.add_hessian_trace` on a step without penalty."""
    return updates, state._replace(count=state.count + 1)


def _make_step(model, config, steps, transform=None):
    """``step(number, state, images, order) -> state``; the state is overwritten.

    The steps with and without the penalty are two programs, and the host chooses: inside ``lax.cond`` a CPU takes
    many times as long for convolutions.
    """
    programs = {
        due: _compile_step(model, _with_penalty(model, config, steps, transform, due), config, steps)
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
            batch["image"] = augment(jax.random.fold_in(state.augment_key, state.step), batch["image"])

        def loss_fn(params, batch):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
            correct = jnp.sum(logits.argmax(-1) == batch["label"])
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
    if (penalty := _penalty_state(state.opt_state)) is not None:
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
    logits = Predict(model)(params, batch | {"batch_stats": batch_stats})
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    inside = index < len(images.split["label"])
    return jnp.sum(losses * inside), jnp.sum((logits.argmax(-1) != batch["label"]) & inside)
