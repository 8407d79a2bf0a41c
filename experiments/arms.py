"""The arms of the paper's tables: what each net is trained with, on each data set, and what the paper reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import flax.linen as nn

from experiments import figures, models, names
from experiments.data import Dataset
from experiments.recipe import Penalty, TrainConfig
from experiments.report import Claim, Reported

ARMS = {
    "ce": "CE",
    "htr": "CE + HTR",
    "htr_middle": "CE + HTR, middle layers",
    "htr_l2": "CE + HTR + L2",
    "l2": "CE + L2",
}
SETTINGS = {"released": "settings of the released scripts", "paper": "settings of the paper's text"}
Preset = Literal[*SETTINGS]


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
OTHER = dataclasses.replace(_VGG11, paper={})  # of a net and a data set that the paper does not have


@dataclasses.dataclass(frozen=True)
class Config(figures.Scale, figures.Subject):
    """Which net on which data set, how often, and how it is measured at the end.

    A net and a data set without a row in the paper have the settings of VGG11 on CIFAR-10.

    Attributes:
      preset: "released", the settings of the released scripts; or "paper": batch 64, learning rate 1e-2, no
        augmentation, Gaussian probes, and the released settings where the text is silent (epochs, milestones, gamma,
        n, first epoch).
      trials: trainings of each arm, with the seeds 0, 1, ..., the same in every arm.
      epochs: length of a training; milestones and first epoch of the penalty change in proportion. 0 for the preset's.
      learning_rate: of the first steps; 0 for the preset's.
      gamma: coefficient of the penalty, on the middle layers too; 0 for the preset's.
      curvature: curvature that is penalised, "hessian" as in the paper, or "ggn".
      every: steps from one penalty to the next (f_r in the paper).
      weight_decay: coefficient of L2 in the arms that have it.
      images_per_class: training images of each class at which the curvature is measured.
      num_probes: probes of the trace.
      num_steps: Lanczos steps of the spectrum.
    """

    preset: Preset = "released"
    trials: int = 5
    epochs: int = 0
    learning_rate: float = 0.0
    gamma: float = 0.0
    curvature: Literal["hessian", "ggn"] = "hessian"
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
        for name in ("learning_rate", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be positive, or 0 for the preset's, got {getattr(self, name)}")


def row(model: str, dataset: str) -> Row:
    """The settings of a net on a data set: of the paper's row, or `OTHER` if there is none."""
    return ROWS.get((model, dataset), OTHER)


def _row(config):
    """Other labels of a data set are another row."""
    return row(config.model, config.dataset if config.label == "label" else f"{config.dataset}:{config.label}")


def reported(config: Config) -> Reported:
    """What the paper reports of a row, with no arms where it has none; its text says that it ran 5 trials of each."""
    return Reported(_row(config).paper, 5, comparable=config.width == 1 and not config.examples)


def margin(config: Config) -> float:
    """Points of test error that count as none in a row; as of `experiments.report.Reported.margin`."""
    return reported(config).margin(Claim("htr", "ce", "HTR lowers the test error"))


def length(config: Config) -> int:
    """Epochs of a training."""
    return config.epochs or _row(config).epochs


def about(config: Config) -> str:
    """The net, its data, and how it is trained, in words."""
    words = SETTINGS[config.preset]
    if (config.model, config.dataset) not in ROWS or config.label != "label":
        words = f"{words} for VGG11, as the paper has no such row"
    for name in ("learning_rate", "gamma"):
        if value := getattr(config, name):
            words += f", {name.replace('_', ' ')} {value:g}"
    return f"{figures.about(config, config.model, config.dataset)}, {length(config)} epochs, {words}"


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
    settings, released, penalty = _row(config), config.preset == "released", None
    if arm in ("htr", "htr_middle", "htr_l2"):
        middle = arm == "htr_middle"
        gamma = settings.gamma_middle if middle and settings.gamma_middle is not None else settings.gamma
        penalty = Penalty(
            gamma=config.gamma or gamma,
            every=config.every,
            start_epoch=settings.start / settings.epochs,
            layers="middle" if middle else "all",
            num_probes=settings.num_probes_middle if middle and settings.num_probes_middle else settings.num_probes,
            curvature=config.curvature,
            probe="rademacher" if released and arm == "htr_l2" else "gaussian",
        )
        penalty = dataclasses.replace(penalty, **changes)
    return TrainConfig(
        epochs=length(config),
        batch_size=settings.batch_size if released else 64,
        learning_rate=config.learning_rate or (settings.learning_rate if released else 1e-2),
        milestones=tuple(epoch / settings.epochs for epoch in settings.milestones),
        weight_decay=config.weight_decay if arm in ("htr_l2", "l2") else 0.0,
        augment=released,
        seed=trial,
        penalty=penalty,
    )


def load(config: Config, data_dir: str | None) -> Dataset:
    """The data set of a row, or as much of it as is trained on, once the net is known to be there."""
    models.build(config.model, 10, **figures.net_options(config))
    return figures.load(config, config.dataset, data_dir)


def build(config: Config, dataset: Dataset) -> nn.Module:
    """The net of a row."""
    return models.build(config.model, dataset.num_classes, **figures.net_options(config))


def check(model: nn.Module, trainings: Iterable[TrainConfig]) -> None:
    """Raises what a penalty's settings would raise, before anything is trained."""
    for settings in trainings:
        if settings.penalty is not None:
            settings.penalty.transform(model, settings, 1)
