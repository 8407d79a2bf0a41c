"""Time of an epoch with the Hessian trace penalty, as a ratio to SGD (Table 4 of the paper).

    python -m experiments.run table4 model=lenet dataset=mnist

With ``num_probes=1 repeats=2`` 6 minutes on two CPU cores. All are timed in turn in each round, over so many steps that
each f_r has its share of penalties; medians over rounds of the ratios within a round. Expected: a ratio that grows with
n / f_r.
"""

from __future__ import annotations

import dataclasses
import pathlib
from functools import partial
from typing import Literal

import jax
import numpy as np

from experiments import arms, figures, report, store
from experiments.measure import progress_bar
from experiments.train import Stepper, TrainConfig

PAPER = {
    ("lenet", "mnist"): (1.07, 1.14, 1.14, 1.00),
    ("vgg11", "cifar10"): (3.85, 2.40, 1.71, 1.42),
    ("vgg11_bn", "cifar10"): (4.93, 2.98, 1.99, 1.49),
    ("resnet18", "cifar10"): (17.19, 9.09, 5.07, 3.00),
    ("vgg11_bn", "cifar100"): (3.01, 2.00, 1.50, 1.25),
}


@dataclasses.dataclass(frozen=True)
class Config(figures.Scale, figures.Subject):
    """What to time.

    Attributes:
      preset: "released", the settings of the released scripts, or "paper", those of the paper's text.
      intervals: steps from one penalty to the next (f_r).
      curvatures: curvatures that are penalised, of "hessian" and "ggn".
      num_probes: probes of each penalty (n); 0 for the preset's.
      steps: steps of a round; 0 for the largest interval, so that each interval has its share of penalties.
      repeats: rounds of timing, of which the medians are shown.
    """

    preset: arms.Preset = "released"
    intervals: tuple[int, ...] = (1, 25, 50, 100, 200)
    curvatures: tuple[Literal["hessian", "ggn"], ...] = ("hessian", "ggn")
    num_probes: int = 0
    steps: int = 0
    repeats: int = 3


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Times SGD and every interval, and saves the seconds."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(figures.Scale)}
    common = arms.Config(model=config.model, dataset=config.dataset, preset=config.preset, **shared)
    dataset, steps = arms.load(common, data_dir), config.steps or max(config.intervals)
    model = arms.build(common, dataset)
    changes = {"start_epoch": 0} | ({"num_probes": config.num_probes} if config.num_probes else {})
    settings: dict[str, TrainConfig] = {"SGD": arms.training(common, "ce", 0)}
    for curvature in config.curvatures:
        for every in config.intervals:
            changed = arms.training(common, "htr", 0, **changes, every=every, curvature=curvature)
            settings[f"{curvature} {every}"] = changed
    with progress_bar("compiling and timing") as progress:
        total, done = len(settings) * (config.repeats + 1), 0

        def one_more():
            nonlocal done
            progress(done := done + 1, total)

        steppers = {name: Stepper(model, dataset, setting) for name, setting in settings.items()}
        timers = {
            name: partial(report.seconds, partial(stepper.advance, steps), jax.block_until_ready)
            for name, stepper in steppers.items()
        }
        report.in_turn(timers, 1, one_more)  # compiles
        times = report.in_turn(timers, config.repeats, one_more)
    epoch = len(dataset.train["label"]) // settings["SGD"].batch_size
    numbers = {
        "machine": report.machine(jax.default_backend(), jax.__version__),
        "num_probes": next((s.penalty.num_probes for s in settings.values() if s.penalty), 0),
        "seconds_per_epoch": {name: (np.array(values) * epoch / steps).tolist() for name, values in times.items()},
    }
    store.save_json(out_dir / "numbers.json", numbers)


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the table from the saved numbers."""
    numbers = store.load_json(out_dir / "numbers.json")
    seconds = numbers["seconds_per_epoch"]
    print(
        f"{figures.about(config, config.model, config.dataset)}, {numbers['num_probes']} probes; "
        f"an epoch of SGD takes {np.median(seconds['SGD']):.2f} s; {numbers['machine']}"
    )
    paper = dict(zip((25, 50, 100, 200), PAPER.get((config.model, config.dataset), ()), strict=False))
    print(f"{'f_r':>5}  " + "  ".join(f"{kind:>14}" for kind in config.curvatures) + f"  {'paper':>6}")
    for every in config.intervals:
        ratios = [report.ratio(seconds[f"{kind} {every}"], seconds["SGD"]) for kind in config.curvatures]
        cells = "  ".join(f"{np.median(r):5.2f} ({r.min():.2f}-{r.max():.2f})".rjust(14) for r in ratios)
        print(f"{every:5}  {cells}  {paper.get(every, '-'):>6}")
    middle = 50 if 50 in config.intervals else config.intervals[0]
    for kind in config.curvatures:
        ratio = float(np.median(report.ratio(seconds[f"{kind} {middle}"], seconds["SGD"])))
        words = f"the paper has {paper[middle]}" if middle in paper else "the paper has no number"
        print(f"{kind}: HTR at f_r = {middle} takes {ratio:.2f} times as long as SGD; {words}")
