"""Time of an epoch with the Hessian trace penalty, as a ratio to SGD (Table 4 of the paper).

    python -m experiments.run table4 model=lenet dataset=mnist

With ``num_probes=1 repeats=2`` 6 minutes on two CPU cores. All are timed in turn in each round, over so many steps that
each f_r has its share of penalties; medians over rounds of the ratios within a round. Expected: a ratio that grows with
n / f_r.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import time

import jax
import numpy as np

from experiments import arms, models, plot, results
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
class Config:
    """What to time.

    Attributes:
      model: name of the net.
      dataset: name of the data set.
      preset: as for `arms.Config`.
      intervals: the f_r.
      curvatures: of the penalty.
      num_probes: n; 0 for the preset's.
      steps: steps of a round; the largest f_r if 0, so that the penalties of a round are those of as many steps.
      repeats: rounds.
    """

    model: str = "lenet"
    dataset: str = "mnist"
    preset: str = "released"
    intervals: tuple[int, ...] = (1, 25, 50, 100, 200)
    curvatures: tuple[str, ...] = ("hessian", "ggn")
    num_probes: int = 0
    steps: int = 0
    repeats: int = 3


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Times SGD and every interval, and saves the seconds."""
    common = arms.Config(config.model, config.dataset, config.preset)
    dataset, steps = arms.load(common, data_dir), config.steps or max(config.intervals)
    model = models.build(config.model, dataset.num_classes)
    changes = {"start_epoch": 0} | ({"num_probes": config.num_probes} if config.num_probes else {})
    settings: dict[str, TrainConfig] = {"SGD": arms.training(common, "ce", 0)}
    for curvature in config.curvatures:
        for every in config.intervals:
            changed = arms.training(common, "htr", 0, **changes, every=every, curvature=curvature)
            settings[f"{curvature} {every}"] = changed
    times = {name: [] for name in settings}
    with progress_bar("compiling and timing") as report:
        total, done = len(settings) * (config.repeats + 1), 0
        steppers = {}
        for name, setting in settings.items():
            steppers[name] = Stepper(model, dataset, setting)
            jax.block_until_ready(steppers[name].advance(steps))
            report(done := done + 1, total)
        for _ in range(config.repeats):
            for name, stepper in steppers.items():
                start = time.perf_counter()
                jax.block_until_ready(stepper.advance(steps))
                times[name].append(time.perf_counter() - start)
                report(done := done + 1, total)
    epoch = len(dataset.train["label"]) // settings["SGD"].batch_size
    numbers = {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {jax.default_backend()}, jax {jax.__version__}",
        "num_probes": next((s.penalty.num_probes for s in settings.values() if s.penalty), 0),
        "seconds_per_epoch": {name: (np.array(values) * epoch / steps).tolist() for name, values in times.items()},
    }
    results.save_json(out_dir / "numbers.json", numbers)


def draw(out_dir: pathlib.Path) -> None:
    """Prints the table from the saved numbers."""
    config, numbers = results.load_json(out_dir / "config.json"), results.load_json(out_dir / "numbers.json")
    seconds = numbers["seconds_per_epoch"]
    print(
        f"{plot.label(config['model'])} on {plot.label(config['dataset'])}, {numbers['num_probes']} probes; "
        f"an epoch of SGD takes {np.median(seconds['SGD']):.2f} s; {numbers['machine']}"
    )
    paper = dict(zip((25, 50, 100, 200), PAPER.get((config["model"], config["dataset"]), ()), strict=False))
    print(f"{'f_r':>5}  " + "  ".join(f"{kind:>14}" for kind in config["curvatures"]) + f"  {'paper':>6}")
    for every in config["intervals"]:
        ratios = [np.divide(seconds[f"{kind} {every}"], seconds["SGD"]) for kind in config["curvatures"]]
        cells = "  ".join(f"{np.median(r):5.2f} ({r.min():.2f}-{r.max():.2f})".rjust(14) for r in ratios)
        print(f"{every:5}  {cells}  {paper.get(every, '-'):>6}")
    middle = 50 if 50 in config["intervals"] else config["intervals"][0]
    for kind in config["curvatures"]:
        ratio = float(np.median(np.divide(seconds[f"{kind} {middle}"], seconds["SGD"])))
        words = f"the paper has {paper[middle]}" if middle in paper else "the paper has no number"
        print(f"{kind}: HTR at f_r = {middle} takes {ratio:.2f} times as long as SGD; {words}")
