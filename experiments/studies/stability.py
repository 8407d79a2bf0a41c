"""The largest eigenvalue under gradient descent and Adam, next to where they become unstable; not in the paper.

    python -m experiments.run stability model=lenet,gpt dataset=digits,shakespeare optimizer=sgd,adam

Each net is trained on one fixed batch, so that every step is one of the whole loss. Gradient descent without momentum
is unstable on a quadratic whose largest eigenvalue exceeds 2/eta (Cohen et al. 2021, arXiv 2103.00065). Adam divides
its updates by D, and its limit of (2 + 2 b1) / ((1 - b1) eta), which is 38/eta for b1 = 0.9, concerns D^-1/2 Hess
D^-1/2 (Cohen et al. 2022, arXiv 2207.14484). The eigenvalues are followed from the eigenvectors of the measurement
before. Next to them stands the critical sharpness along the update (Kalra et al. 2026, arXiv 2601.16979).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

import jaxhess as jh
from experiments import data, figures, measure, models, plot, report, store
from experiments.data import Dataset
from experiments.plan import duration

PyTree = Any
Optimizer = Literal["sgd", "adam"]
B1 = 0.9  # of Adam
REACHED = 0.95  # of the threshold: from where on the edge counts as reached
NEAR = (2 / 3, 1.5)  # of the threshold: what counts as staying at it
FIRST_FEW = 5  # measurements from the one that reaches it on
KEPT = 2  # eigenvectors that a measurement starts from
FIRST, LATER = 24, 6  # products with the Hessian of the first measurement, and of the others
RATIOS = {
    "lambda_max": "lambda_max / (2/eta)",
    "critical": "critical sharpness / (2/eta)",
    "preconditioned": "preconditioned / (38/eta)",
}


@dataclasses.dataclass(frozen=True)
class Config(figures.Scale):
    """What is trained, and how often it is measured.

    Attributes:
      model: names of nets.
      dataset: a data set for each net.
      optimizer: "sgd", which is gradient descent without momentum, and "adam".
      learning_rate: of the first net with each optimizer, then of the second net, and so on.
      b2: decay of Adam's second moment.
      images_per_class: training images of each class in the batch that every step takes.
      sequences: sequences in that batch, for text.
      steps: of a training.
      every: steps from one measurement to the next.
      trials: trainings of each, with the seeds seed, seed + 1, ...
      seed: of the first one.
    """

    model: tuple[models.Name, ...] = ("lenet", "gpt")
    dataset: data.Names = ("digits", "shakespeare")
    optimizer: tuple[Optimizer, ...] = ("sgd", "adam")
    learning_rate: tuple[float, ...] = (0.03, 2e-3, 0.05, 2e-3)
    b2: float = 0.999
    images_per_class: int = 10
    sequences: int = 16
    steps: int = 200
    every: int = 10
    trials: int = 3
    seed: int = 0


class Case(NamedTuple):
    """A net with an optimizer: a panel of the figure."""

    words: str
    name: str
    dataset: str
    optimizer: Optimizer
    rate: float


def cases(config: Config) -> list[Case]:
    """All nets with all optimizers; ValueError where the lists do not fit."""
    if len(config.dataset) != len(config.model):
        raise ValueError(
            f"dataset={','.join(config.dataset)} must name one for each of model={','.join(config.model)}, in order"
        )
    if len(config.learning_rate) != len(config.model) * len(config.optimizer):
        raise ValueError(
            f"learning_rate has {len(config.learning_rate)} values for {len(config.model)} nets with "
            f"{len(config.optimizer)} optimizers each; give {len(config.model) * len(config.optimizer)}"
        )
    if not (config.steps >= config.every >= 1 and config.trials >= 1):
        raise ValueError(
            f"steps={config.steps}, every={config.every}, trials={config.trials}: take 1 or more, in order"
        )
    rates = iter(config.learning_rate)
    return [
        Case(f"{figures.about(config, name, dataset)}, {NAMES[optimizer]}", name, dataset, optimizer, next(rates))
        for name, dataset in zip(config.model, config.dataset, strict=True)
        for optimizer in config.optimizer
    ]


NAMES = {"sgd": "gradient descent", "adam": "Adam"}


def size(config: Config, dataset: Dataset) -> int:
    """Images of each class, or sequences in all, of the batch."""
    return config.sequences if dataset.is_text else config.images_per_class


def threshold(case: Case) -> float:
    """The largest eigenvalue at which the optimizer is stable on a quadratic: of Hess, or of D^-1/2 Hess D^-1/2."""
    return 2 / case.rate if case.optimizer == "sgd" else (2 + 2 * B1) / ((1 - B1) * case.rate)


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a dry run says: how long the trainings take, by a first measurement and a second one of each case."""

    config: Config
    data_dir: str | None

    def show(self) -> None:
        """Prints the time of each case and of all."""
        config, total = self.config, 0.0
        for case in cases(config):
            dataset = figures.load(config, case.dataset, self.data_dir)
            rows = follow(config, case, dataset, config.seed)
            first, second = (report.seconds(lambda rows=rows: next(rows)) for _ in range(2))
            seconds = first + second * config.trials * (config.steps // config.every)
            total += seconds
            print(f"{case.words}: {config.trials} trainings of {config.steps} steps, about {duration(seconds)}")
        print(f"all together about {duration(total)}, with this machine as busy as now")


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Timing:
    """What is trained; no net is kept."""
    del out_dir
    return Timing(config, data_dir)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains and measures all, and saves the curves."""
    numbers: dict[str, dict[str, Any]] = {}  # of each case
    every = cases(config)
    datasets = {name: figures.load(config, name, data_dir) for name in config.dataset}
    total = len(every) * config.trials * (config.steps // config.every + 1)
    with measure.progress_bar("following lambda_max") as progress:
        done = 0
        for case in every:
            record = numbers[case.words] = {"optimizer": case.optimizer, "rate": case.rate, "trials": []}
            record["threshold"] = threshold(case)
            for trial in range(config.trials):
                curve: dict[str, list[float]] = {}
                for row in follow(config, case, datasets[case.dataset], config.seed + trial):
                    for name, value in row.items():
                        curve.setdefault(name, []).append(value)
                    done += 1
                    progress(min(done, total), total)
                record["trials"].append(curve)
                store.save_json(out_dir / "numbers.json", numbers)


def follow(config: Config, case: Case, dataset: Dataset, seed: int) -> Iterator[dict[str, float]]:
    """One training; before every so many steps {"step", "loss", "lambda_max", "preconditioned", "critical"}.

    The second moment before the first step is that of the first gradient. ``rises`` is the share of steps since the
    measurement before that raised the loss.
    """
    model = models.build(case.name, dataset.num_classes, **figures.net_options(config))
    batch = jax.device_put(measure.measure_batch(dataset, size(config, dataset), {}))
    loss, key = models.objective(model), jax.random.key(seed)
    params = jax.jit(model.init)(key, batch["image"][:1])["params"]
    tx = _transform(case.optimizer, case.rate, config.b2)
    state, starts, losses = tx.init(params), {}, []
    for number in range(config.steps + 1):
        value, updates, after = _update(loss, tx, params, state, batch)
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise ValueError(f"{case.words}: the loss is {losses[-1]} at step {number}; lower {case.rate}")
        if number % config.every == 0:
            operators = {"lambda_max": jh.hessian(loss, params, batch)}
            if case.optimizer == "adam":
                scale = jh.preconditioner(after, b2=config.b2)
                operators["preconditioned"] = jh.precondition(operators["lambda_max"], scale)
            rises = np.diff(losses[-config.every - 1 :]) > 0
            row = {"step": number, "loss": losses[-1], "rises": float(rises.mean()) if number else 0.0}
            for name, operator in operators.items():
                values, starts[name], residuals = jh.top_eigenpairs(
                    operator,
                    like=params,
                    key=jax.random.fold_in(key, number),
                    k=KEPT,
                    start=starts.get(name),
                    num_steps=FIRST if number == 0 else KEPT + LATER,
                )
                row |= {name: float(values[0]), f"{name}_residual": float(residuals[0])}
            row["critical"] = float(jh.critical_sharpness(loss, params, batch, updates, learning_rate=case.rate))
            yield row
        params, state = optax.apply_updates(params, updates), after


@lru_cache
def _transform(optimizer, rate, b2):
    """The same for the same settings, so that ``jit`` compiles once for all trials."""
    return optax.sgd(rate) if optimizer == "sgd" else optax.adam(rate, b1=B1, b2=b2)


@partial(jax.jit, static_argnums=(0, 1))
def _update(loss, tx, params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return value, updates, state


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the curves from the saved numbers, and says what they show."""
    numbers = store.load_json(out_dir / "numbers.json")
    panels, lines = {}, [["", "threshold", "reached", "first share", "later share", "last share", "steps up", "loss"]]
    claims = []
    for words, record in numbers.items():
        trials = [{name: np.array(values) for name, values in curve.items()} for curve in record["trials"]]
        found = [reached(curve, record) for curve in trials]
        loss = np.array([curve["loss"] for curve in trials])
        panels[words] = trials[0]["step"], shares(record, trials), loss
        lines.append(
            [
                words,
                f"{record['threshold']:,.1f}",
                "step " + ", ".join("-" if one is None else f"{one.step:.0f}" for one in found),
                *(_spread([getattr(one, name) for one in found if one], ".2f") for name in ("first", "share", "last")),
                _spread([100 * one.rises for one in found if one], ".0f", " %"),
                report.spread(loss[:, -1], ".3g"),
            ]
        )
        claims.append(f"{words}, eta = {record['rate']:g}: {verdict(found)}")
    report.print_columns(lines)
    print(
        f"\nfirst share: of the threshold, median over {FIRST_FEW} measurements from the first at {REACHED} times it; "
        f"later share: over all from there on"
    )
    print(f"the largest eigenvalue rises to the threshold and stays within a factor of {NEAR[1]} of it:")
    print("\n".join(claims))
    title = f"Curvature and its thresholds, full-batch training, {config.trials} trainings each"
    plot.save(plot.thresholds(panels, title), out_dir / "figure.png")


def _spread(values, form, unit=""):
    return report.spread(values, form) + unit if values else "-"


def shares(record: Mapping[str, Any], trials: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{quantity: (trials, measurements)} in shares of the thresholds, those of `RATIOS` that were measured."""
    raw = 2 / record["rate"]
    units = {"preconditioned": record["threshold"], "lambda_max": raw, "critical": raw}
    return {
        words: np.stack([curve[name] for curve in trials]) / units[name]
        for name, words in RATIOS.items()
        if name in trials[0]
    }


class Reached(NamedTuple):
    """What is seen from the step on at which the threshold is reached.

    Attributes:
      step: the first measured one at which the eigenvalue is at least `REACHED` times the threshold.
      first: the median, over `FIRST_FEW` measurements from there on, of the eigenvalue in shares of the threshold.
      share: that median over all measurements from there on.
      last: that share in the last measurement.
      rises: share of the steps from there on that raised the loss.
    """

    step: float
    first: float
    share: float
    last: float
    rises: float


def reached(curve: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> Reached | None:
    """When a training reached the threshold, and what it did then; None if it did not.

    An eigenvalue that is above the threshold before the first step has not risen to it. The training counts as having
    reached it where it comes back from below.
    """
    name = "preconditioned" if record["optimizer"] == "adam" else "lambda_max"
    ratio = np.asarray(curve[name]) / record["threshold"]
    below = np.flatnonzero(ratio < REACHED)
    if not len(below):
        return None
    over = below[0] + np.flatnonzero(ratio[below[0] :] >= REACHED)
    if not len(over):
        return None
    ratio, rises = ratio[over[0] :], np.asarray(curve["rises"])[over[0] + 1 :]
    few, every = np.median(ratio[:FIRST_FEW]), np.median(ratio)
    raised = float(rises.mean()) if len(rises) else 0.0
    return Reached(float(curve["step"][over[0]]), float(few), float(every), float(ratio[-1]), raised)


def verdict(found: Sequence[Reached | None]) -> str:
    """Whether the largest eigenvalue rises to the threshold and stays near it, from several trainings.

    Returns:
      "holds" if all reach it, and the medians and the last value are within `NEAR`; "holds in part" if all reach it and
      the median of the first measurements from there on is within; "does not hold" if all reach it and it is within in
      none; else "not decided".
    """
    if not found or None in found:
        return "not decided"
    near = [NEAR[0] <= one.first <= NEAR[1] for one in found]
    if all(near):
        stays = all(NEAR[0] <= value <= NEAR[1] for one in found for value in (one.share, one.last))
        return "holds" if stays else "holds in part"
    return "not decided" if any(near) else "does not hold"
