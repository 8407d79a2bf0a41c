"""How much penalty, weight decay or sharpness-aware minimisation is best, chosen on held-out training images.

    python -m experiments.run gamma model=lenet dataset=fashion_mnist trials=3 epochs=15

Beyond the paper: one probe of Tr(G) at every step, from the first on. Every strength of every method is trained on
the same images with the same seeds, and the strength with the lowest mean error on the held-out images is chosen. What
was chosen, and training without any, is then trained with as many new seeds and tested on the test images: the nets of
the search would be the luckier ones of the strength that won by luck.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np

from experiments import arms, data, plot, report, store, tables
from experiments.plan import Plan
from experiments.report import Claim
from experiments.train import DivergedError, TrainConfig, evaluate


@dataclasses.dataclass(frozen=True)
class Config(arms.Config):
    """Which net on which data set, how often, and which strengths are compared.

    Attributes:
      penalty_probes: probes of the penalty; num_probes are those of the trace that is measured.
      held_out: number of training images that are held out, to choose the strengths on.
      gammas: coefficients of the penalty that are tried.
      weight_decays: coefficients of L2 regularisation that are tried.
      radii: radii rho of sharpness-aware minimisation that are tried.
    """

    dataset: data.Name = "fashion_mnist"
    preset: arms.Preset = "paper"
    trials: int = 3
    curvature: Literal["hessian", "ggn"] = "ggn"
    every: int = 1
    penalty_probes: int = 1
    held_out: int = 5000
    gammas: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)
    weight_decays: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    radii: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)


METHODS = {
    "htr": ("HTR", r"$\gamma$"),
    "l2": ("weight decay", "coefficient"),
    "sam": ("SAM", r"$\rho$"),
}


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of the search, and of the first strength of each method as long as none is chosen."""
    held_out = data.hold_out(arms.load(config, data_dir), config.held_out)
    first = {method: strengths[0] for method, strengths in _strengths(config).items()}
    return _planned(config, held_out, out_dir, _strengths(config), first)


def _strengths(config):
    return {"none": (0.0,), "htr": config.gammas, "l2": config.weight_decays, "sam": config.radii}


def _planned(config, held_out, out_dir, searched, tested):
    """The plan by method, strength and seed: of strengths to search, and of strengths to test with new seeds."""
    seeds = range(config.trials)
    keys = [(method, s, seed) for seed in seeds for method, strengths in searched.items() for s in strengths]
    keys += [(method, s, config.trials + seed) for seed in seeds for method, s in tested.items()]
    trainings = {
        key: tables.planned(config, held_out, "{} {:g}, seed {}".format(*key), _training(config, *key)) for key in keys
    }
    return tables.checked(trainings, out_dir, config)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """Trains (or finds) all nets, chooses on the held-out images, tests what was chosen, and saves the numbers.

    Returns:
      How the nets were trained.
    """
    dataset = arms.load(config, data_dir)
    held_out, model = data.hold_out(dataset, config.held_out), arms.build(config, dataset)
    numbers = {
        method: [{"strength": s, "trials": [], "tested": []} for s in values]
        for method, values in _strengths(config).items()
    }
    todo = search = _planned(config, held_out, out_dir, _strengths(config), {})

    def trained(method, strength, seed):
        _, net = todo.net((method, strength, seed))
        record, _ = tables.final(config, held_out, model, net, seed)
        record = {name.replace("test_", "held_out_"): value for name, value in record.items()}
        print(f"{method} {strength:g}, seed {seed}: held-out error {record['held_out_error']:.2%}", flush=True)
        return net, record

    for seed in range(config.trials):
        for method, points in numbers.items():
            for point in points:
                try:
                    point["trials"].append(trained(method, point["strength"], seed)[1])
                except DivergedError as error:
                    print(f"{method} {point['strength']:g}, seed {seed}: {error}; it is not chosen")
                    point["trials"].append({"held_out_error": float("nan"), "trace": float("nan")})
    chosen = {method: best_of(points) for method, points in numbers.items()}
    todo = _planned(config, held_out, out_dir, {}, {method: best["strength"] for method, best in chosen.items()})
    for seed in range(config.trials, 2 * config.trials):
        for method, best in chosen.items():
            net, record = trained(method, best["strength"], seed)
            record["test_error"] = evaluate(model, net.params, net.batch_stats, dataset, dataset.test)[1]
            best["tested"].append(record)
    store.save_json(out_dir / "numbers.json", numbers)
    return tables.trained_as(search)


def best_of(points: list[dict]) -> dict:
    """The strength with the lowest mean held-out error, of those of which no training diverged."""
    means = [np.mean([record["held_out_error"] for record in point["trials"]]) for point in points]
    if np.isnan(means).all():
        raise ValueError(f"training diverged with every strength of {[p['strength'] for p in points]}; take lower ones")
    return points[int(np.nanargmin(means))]


def _training(config: Config, method: str, strength: float, trial: int) -> TrainConfig:
    if method == "htr":
        changes = {"gamma": strength, "start_epoch": 0, "num_probes": config.penalty_probes, "probe": "rademacher"}
        return arms.training(config, "htr", trial, **changes)
    base = arms.training(config, "ce", trial)
    if method == "none":
        return base
    return dataclasses.replace(base, **{{"l2": "weight_decay", "sam": "sam"}[method]: strength})


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the curves from the saved numbers, and says what was chosen and how it does on the test images."""
    numbers = store.load_json(out_dir / "numbers.json")
    none = numbers.pop("none")[0]
    panels = {"held_out_error": "held-out error, %", "trace": "Tr(Hess) at the end"}
    figure = plot.strengths(numbers, none, METHODS, panels, tables.title(config))
    plot.save(figure, out_dir / "figure.png")
    columns = {
        "test error %": report.ERROR,
        "train acc. %": report.ACCURACY,
        "Tr Hess": report.TRACE,
        "of negative eigenvalues": report.NEGATIVE,
        "lambda_max": report.LAMBDA_MAX,
        "lambda_min": report.LAMBDA_MIN,
    }
    shown = {"none": none} | {method: best_of(points) for method, points in numbers.items()}
    lines = [["", "strength", "held-out error % of the search", *columns]]
    for method, point in shown.items():
        searched = report.percent([record["held_out_error"] for record in point["trials"]])
        cells = [column.cell(point["tested"]) for column in columns.values()]
        lines.append([METHODS.get(method, ("none",))[0], f"{point['strength']:g}", searched, *cells])
    print(f"the strengths with the lowest held-out error, and {config.trials} nets of new seeds of each:")
    report.print_columns(lines)
    for method, points in numbers.items():
        strengths = [point["strength"] for point in points]
        if (best := shown[method]["strength"]) in (min(strengths), max(strengths)):
            print(f"{METHODS[method][0]}: {best:g} is an end of the grid, beyond which the best may be")
    errors = {method: [record["test_error"] for record in point["tested"]] for method, point in shown.items()}
    print(f"on the test images, p multiplied by the {len(METHODS)} tests:")
    for method, (words, _) in METHODS.items():
        print(report.judge(Claim(method, "none", f"{words}, as chosen, lowers the test error"), errors, len(METHODS)))
