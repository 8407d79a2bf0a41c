"""How a net is trained: the settings, and the optimizer with the Hessian trace penalty that they make."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
import optax.contrib
import tyro

import jaxhess as jh
from experiments import models
from experiments.data import Dataset

PyTree = Any


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
    layers: Literal["all", "middle"] = "all"
    num_probes: int = 1
    curvature: Literal["hessian", "ggn"] = "ggn"
    probe: Literal["rademacher", "gaussian"] = "rademacher"

    def transform(
        self, model: nn.Module, config: TrainConfig, steps_per_epoch: int
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation that adds it to the gradients of a net; ValueError for settings that make no sense."""
        return jh.add_hessian_trace(
            models.objective(model),
            self.gamma,
            key=keys(config.seed)["penalty"],
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
      batch_size: images in a step; the images that do not fill a last one are left out of the epoch.
      learning_rate: learning rate of the first steps.
      momentum: momentum of SGD.
      milestones: where the learning rate falls, as shares of all epochs (0.5) or as epochs (10).
      decay: factor by which the learning rate falls there.
      weight_decay: coefficient of L2 regularisation, coupled as in SGD.
      sam: radius rho of sharpness-aware minimisation (Foret et al. 2021), 0 for none: the gradient is taken at the
        worst parameters within rho, to first order, for twice the time of a step.
      noise_stability: standard deviation sigma of the noise of `jaxhess.add_noise_stability`, 0 for none: the gradient
        is the mean of those at parameters that are moved by noise to both sides, in evaluation mode.
      adam: whether Adam takes the place of SGD, with the momentum as its b1 and with b2 = 0.999.
      augment: whether images are flipped, and rotated by up to 15 degrees, both at random.
      seed: seed of initialisation, order, augmentation and probes. Each has its own random numbers, so that trainings
        with the same seed and different penalties start from the same parameters and see the same images.
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
    noise_stability: float = 0.0
    adam: bool = False
    augment: bool = False
    seed: int = 0
    penalty: tyro.conf.Suppress[Penalty | None] = None  # no key of the command line

    def __post_init__(self):
        for name, low, words in (
            ("epochs", 1, "at least 1"),
            ("batch_size", 1, "at least 1"),
            ("learning_rate", 0, "not negative"),
            ("weight_decay", 0, "not negative"),
            ("sam", 0, "not negative"),
            ("noise_stability", 0, "not negative"),
        ):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)}")

    def milestone_epochs(self) -> list[float]:
        """The milestones, all as epochs."""
        return [_epochs(point, self.epochs) for point in self.milestones]


def optimizer(
    config: TrainConfig, steps_per_epoch: int, transform: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum or Adam, L2 and a piecewise constant rate, after a transformation that may take ``batch=``.

    Args:
      config: the settings.
      steps_per_epoch: steps of an epoch.
      transform: what to do with the gradients first, such as adding a penalty's.

    Returns:
      An optax transformation that is called with ``batch=``, and with ``grad_fn=`` if there is a radius for SAM.
    """
    falls = {round(epoch * steps_per_epoch): config.decay for epoch in config.milestone_epochs()}
    schedule = optax.piecewise_constant_schedule(config.learning_rate, falls)
    step = optax.adam(schedule, b1=config.momentum) if config.adam else optax.sgd(schedule, momentum=config.momentum)
    parts = [optax.add_decayed_weights(config.weight_decay), step]
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


def with_penalty(
    model: nn.Module,
    config: TrainConfig,
    steps_per_epoch: int,
    transform: optax.GradientTransformation | None = None,
    due: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with all that its settings say; for all steps, or those on which the penalty is due, or not due."""
    if config.penalty is not None:
        penalty = config.penalty.transform(model, config, steps_per_epoch)
        if due:
            always = dataclasses.replace(config.penalty, every=1, start_epoch=0)
            penalty = always.transform(model, config, steps_per_epoch)
        elif due is not None:
            penalty = optax.GradientTransformationExtraArgs(penalty.init, _count_only)
        transform = _before(penalty, transform)
    if config.noise_stability:
        key = keys(config.seed)["noise"]
        noise = jh.add_noise_stability(models.objective(model), config.noise_stability, key=key)
        transform = _before(noise, transform)
    return optimizer(config, steps_per_epoch, transform)


def _before(first, transform):
    return first if transform is None else optax.chain(first, transform)


def _count_only(updates, state, params=None, **extra):
    """An update of `jaxhess.add_hessian_trace` on a step without penalty."""
    return updates, state._replace(count=state.count + 1)


def penalty_state(opt_state: PyTree) -> jh.HessianTraceState | None:
    """The state of the first `jaxhess.add_hessian_trace` in an optimizer's; None without."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, jh.HessianTraceState))
    return next((node for node in nodes if isinstance(node, jh.HessianTraceState)), None)


def settings(config: TrainConfig) -> dict[str, Any]:
    """The fields of `TrainConfig` as plain values; without those of `_LATER` that are off, as in nets kept before."""
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    names = [name for name in fields if name not in _LATER or getattr(config, name)]
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}


_LATER = ("sam", "noise_stability", "adam")  # settings that came after the first nets were kept


def written(
    name: str,
    dataset: Dataset,
    config: TrainConfig,
    callback: Callable | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """All that a trained net depends on, as JSON; arguments as of `experiments.train.train_once`."""
    about = {"classes": dataset.num_classes, "images": len(dataset.train["label"])}  # tells samples and labels apart
    about |= {"model": name, "dataset": dataset.name, **settings(config)}
    if options:
        about["options"] = dict(options)
    if callback is not None:
        about["callback"] = repr(callback)
    return json.dumps(about, sort_keys=True)


def keys(seed: int) -> dict[str, jax.Array]:
    """The keys of a seed: of initialisation, order, augmentation, penalty and noise."""
    names, key = ("init", "order", "augment", "penalty"), jax.random.key(seed)
    found = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    return found | {"noise": jax.random.fold_in(key, len(names))}  # the others are as before there was noise


def _epochs(point, epochs):
    """A moment given as a share of all epochs (below 1) or as an epoch, as an epoch."""
    return point * epochs if point < 1 else point
