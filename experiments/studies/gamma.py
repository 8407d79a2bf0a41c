"""How much penalty, weight decay, noise or sharpness-aware minimisation is best, chosen on held-out images.

    python -m experiments.run gamma model=mlp dataset=fashion_mnist examples=1000 held_out=2000 epochs=40
        learning_rate=0.05 trials=8

About a quarter of an hour on one CPU core. Expected: with so few images HTR and noise stability lower the test error
by more than half a point.

Beyond the paper: one probe of Tr(G) at every step, from the first on. Every strength of every method is trained on
the same images with the same seeds, and the strength with the lowest mean error on the held-out images is chosen. A
grid whose end wins is extended beyond it. What was chosen, and training without any, is then trained with as many new
seeds and tested on the test images: the nets of the search would be the luckier ones of the strength that won by luck.
With ``examples``, the held-out images are training images that are left out. A dry run counts the grids as they are
given.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from experiments import arms, data, figures, plot, report, statistics, store, tables
from experiments.data import Dataset
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
      sigmas: standard deviations of the noise of noise stability that are tried.
      extensions: how many strengths are added to a grid at most, each beyond the end that has won.
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
    radii: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    sigmas: tuple[float, ...] = (1e-3, 3e-3, 0.01, 0.03, 0.1)
    extensions: int = 2

    def __post_init__(self):
        super().__post_init__()
        for name in ("gammas", "weight_decays", "radii", "sigmas"):
            strengths = getattr(self, name)
            if not strengths or not all(0 < strength < np.inf for strength in strengths):
                raise ValueError(f"{name} must be one positive number or more, got {strengths}")
        if self.extensions < 0:
            raise ValueError(f"extensions must not be negative, got {self.extensions}")


METHODS = {
    "htr": ("HTR", r"$\gamma$"),
    "l2": ("weight decay", "coefficient"),
    "sam": ("SAM", r"$\rho$"),
    "noise": ("noise stability", r"$\sigma$"),
}
NOTICED = 0.1  # share of the trace by which a strength must lower it, to be counted as one that does
BY_EPOCH = "held_out_error_by_epoch"  # in the records of training without any, for what stopping early would do
CLASSES = {("cifar100", "label"): 100, ("cifar100", "coarse_label"): 20}  # 10 in all others
CHANCE = 0.01  # share of images; an error no farther from that of guessing is one at chance
EXTENDED = "extended"  # in the saved numbers, beside the methods: {method: the strengths that were added}


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of the grids, and of the first strength of each method as long as none is chosen."""
    strengths = _strengths(config)
    first = {method: values[0] for method, values in strengths.items()}
    return _planned(config, _held_out(config, data_dir), out_dir, strengths, first)


def _strengths(config):
    grids = {"htr": config.gammas, "l2": config.weight_decays, "sam": config.radii, "noise": config.sigmas}
    return {"none": (0.0,)} | {method: tuple(sorted(set(grid))) for method, grid in grids.items()}


def _held_out(config: Config, data_dir: str | None) -> Dataset:
    """What is trained on, with held-out images in place of the test images; they are not among ``examples``."""
    whole = arms.load(dataclasses.replace(config, examples=0), data_dir)
    return figures.reduced(config, data.hold_out(whole, config.held_out))


def _planned(config, held_out, out_dir, searched, tested):
    """The plan by method, strength and seed: of strengths to search, and of strengths to test with new seeds."""
    seeds = range(config.trials)
    keys = [(method, s, seed) for method, strengths in searched.items() for s in strengths for seed in seeds]
    keys += [(method, s, config.trials + seed) for method, s in tested.items() for seed in seeds]
    trainings = {
        key: tables.planned(config, held_out, "{} {:g}, seed {}".format(*key), _training(config, *key)) for key in keys
    }
    return tables.checked(trainings, out_dir, config)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> dict[str, Any]:
    """Trains (or finds) all nets, chooses on the held-out images, tests what was chosen, and saves the numbers.

    Returns:
      How the nets were trained.
    """
    dataset, held_out = arms.load(config, data_dir), _held_out(config, data_dir)
    model = arms.build(config, dataset)
    grids = _planned(config, held_out, out_dir, _strengths(config), {})

    def trained(todo, method, strength, seed):
        _, net = todo.net((method, strength, seed))
        record, _ = tables.final(config, held_out, model, net, seed)
        record = {name.replace("test_", "held_out_"): value for name, value in record.items()}
        if method == "none":
            record[BY_EPOCH] = net.history["test_error"].tolist()
        print(f"{method} {strength:g}, seed {seed}: held-out error {record['held_out_error']:.2%}", flush=True)
        return net, record

    def tried(method, strength):
        given = (method, strength, 0) in grids.trainings
        todo = grids if given else _planned(config, held_out, out_dir, {method: (strength,)}, {})
        point = {"strength": strength, "trials": [], "tested": []}
        for seed in range(config.trials):
            try:
                point["trials"].append(trained(todo, method, strength, seed)[1])
            except DivergedError as error:
                print(f"{method} {strength:g}, seed {seed}: {error}; it is not chosen")
                point["trials"].append({"held_out_error": float("nan"), "trace": float("nan")})
        return point

    numbers = {
        method: search(lambda strength, method=method: tried(method, strength), strengths, config.extensions)
        for method, strengths in _strengths(config).items()
    }
    chosen = {method: best_of(points) for method, points in numbers.items()}
    todo = _planned(config, held_out, out_dir, {}, {method: best["strength"] for method, best in chosen.items()})
    for method, strength, seed in todo.trainings:
        net, record = trained(todo, method, strength, seed)
        record["test_error"] = evaluate(model, net.params, net.batch_stats, dataset, dataset.test)[1]
        chosen[method]["tested"].append(record)
    strengths = {method: tuple(point["strength"] for point in points) for method, points in numbers.items()}
    given = _strengths(config)
    added = {method: [s for s in values if s not in given[method]] for method, values in strengths.items()}
    store.save_json(out_dir / "numbers.json", numbers | {EXTENDED: added})
    return tables.trained_as(_planned(config, held_out, out_dir, strengths, {}))


def search(tried: Callable[[float], dict], strengths: tuple[float, ...], extensions: int) -> list[dict]:
    """The points of a grid, which is extended beyond the end that has won until the best is inside.

    An end at which training diverged is never the best, so that it closes the grid on its side.

    Args:
      tried: the point of a strength: {"strength": float, "trials": [{"held_out_error": float}, ...]}.
      strengths: the grid, ascending; without strength it is (0,), which is not extended.
      extensions: how many strengths are added at most.

    Returns:
      The points, by ascending strength.
    """
    points = [tried(strength) for strength in strengths]
    for _ in range(extensions if strengths != (0.0,) else 0):
        found = [point["strength"] for point in points]
        best = best_of(points)["strength"]
        if best == found[-1]:
            points.append(tried(_rounded(best * _factor(found[-2:]))))
        elif best == found[0]:
            points.insert(0, tried(_rounded(best / _factor(found[:2]))))
        else:
            break
        print(f"{best:g} is an end of the grid and has won, so the grid is extended", flush=True)
    return points


def _factor(neighbours):
    """From an end of a grid to the next strength: as between its neighbours, at least 2; 3 where there are none."""
    return max(2.0, neighbours[1] / neighbours[0]) if len(neighbours) > 1 else 3.0


def _rounded(strength):
    return float(f"{strength:.2g}")


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
    field = {"l2": "weight_decay", "sam": "sam", "noise": "noise_stability"}[method]
    return dataclasses.replace(base, **{field: strength})


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Draws the curves from the saved numbers, and says what was chosen and how it does on the test images."""
    numbers = store.load_json(out_dir / "numbers.json")
    added, none = numbers.pop(EXTENDED, {}), numbers.pop("none")[0]
    shown = {"none": none} | {method: best_of(points) for method, points in numbers.items()}
    errors = {method: [record["test_error"] for record in point["tested"]] for method, point in shown.items()}
    words = {method: METHODS[method] for method in numbers}
    claims = {
        method: Claim(method, "none", f"{words[method][0]}, as chosen, lowers the test error") for method in words
    }
    effects = {method: report.effect(claim, errors) for method, claim in claims.items()}
    points_and_ends = {method: (effect.mean, *effect.interval()) for method, effect in effects.items()}
    title = tables.title(config)
    figure = plot.strengths(numbers, none, shown, points_and_ends, report.NO_MARGIN, words, title)
    plot.save(figure, out_dir / "figure.png")
    print("the search, mean +- standard deviation over the seeds:")
    lines = [["", "strength", "held-out error %", "Tr Hess"]]
    for method, point in itertools.chain([("none", none)], *([(m, p) for p in ps] for m, ps in numbers.items())):
        errors_here, traces = ([record[name] for record in point["trials"]] for name in ("held_out_error", "trace"))
        star = "*" if method != "none" and point is shown[method] else ""
        diverged = int(np.isnan(errors_here).sum())
        cells = [report.percent(errors_here), report.spread(traces, ".4g")]
        if diverged:
            cells = [f"diverged in {diverged} of {len(traces)}", "-"]
        lines.append([_name(method), f"{star}{point['strength']:g}", *cells])
    report.print_columns(lines)
    for method, points in numbers.items():
        print(f"{_name(method)}: {_ends(points, shown[method], added.get(method, []))}; {_with_trace(points, none)}")
        guessing = 1 - 1 / CLASSES.get((config.dataset, config.label), 10)
        for point in points:
            if words := failing(point, none, guessing):
                print(f"{_name(method)}: {words}")
    if all(BY_EPOCH in record for record in none["trials"]):
        print(f"none: {stopping_early([record[BY_EPOCH] for record in none['trials']])}")
    columns = {
        "test error %": report.ERROR,
        "train acc. %": report.ACCURACY,
        "train loss": report.TRAIN_LOSS,
        "Tr Hess": report.TRACE,
        "of negative eigenvalues": report.NEGATIVE,
        "lambda_max": report.LAMBDA_MAX,
        "lambda_min": report.LAMBDA_MIN,
    }
    print(f"the strengths with the lowest held-out error, and {config.trials} nets of new seeds of each:")
    lines = [["", "strength", *columns]]
    for method, point in shown.items():
        cells = [column.cell(point["tested"]) for column in columns.values()]
        lines.append([_name(method), f"{point['strength']:g}", *cells])
    report.print_columns(lines)
    for method in claims:
        print(f"{_name(method)}, in times the trace of none: {in_times(shown[method]['tested'], none['tested'])}")
    for method in claims:
        print(f"{_name(method)}: {by_sign(shown[method]['tested'], none['tested'])}")
    print("on the held-out images, the same nets:")
    for one, two in [*((method, "none") for method in claims), *(("htr", m) for m in claims if m != "htr")]:
        print(f"  {_name(one)} - {_name(two)}: {held_out(shown[one]['tested'], shown[two]['tested'])}")
    print(f"on the test images, p multiplied by the {len(claims)} tests:")
    for claim in claims.values():
        print(report.judge(claim, errors, len(claims)))
    if "htr" in claims:
        others = [method for method in claims if method != "htr"]
        print(f"against the other methods, each as chosen, p multiplied by the {len(others)} tests:")
        for method in others:
            claim = Claim("htr", method, f"HTR has a lower test error than {_name(method)}")
            print(report.judge(claim, errors, len(others)))
    outcomes = [f"{_name(method)} {report.outcome(claim, errors, len(claims))}" for method, claim in claims.items()]
    print(f"in short: {'; '.join(outcomes)}")


def failing(point: dict, none: dict, guessing: float) -> str:
    """What became of the trainings at a strength at which some diverged or ended at chance, in words; "" if none did.

    Args:
      point: of the strength.
      none: the point without any.
      guessing: the error of guessing.
    """
    errors = np.array([record["held_out_error"] for record in point["trials"]])
    without = [record["held_out_error"] for record in none["trials"]]
    kept = errors[np.isfinite(errors)]
    chance = int(np.sum(kept >= guessing - CHANCE))
    if len(kept) == len(errors) and not chance:
        return ""
    words = f"at {point['strength']:g} {len(errors) - len(kept)} of {len(errors)} trainings diverged"
    if not len(kept):
        return words
    return (
        f"{words}; the others have held-out errors of {100 * kept.min():.1f} to {100 * kept.max():.1f}%, "
        f"{100 * kept.mean():.1f}% on average; {chance} ended at chance, and {int(np.sum(kept > np.max(without)))} are "
        "worse than all without"
    )


def stopping_early(errors: Sequence[Sequence[float]]) -> str:
    """What the best epoch would gain, for all seeds the same or for each its own, in words.

    Both are chosen on the images on which they are judged, so that the gains are too large.

    Args:
      errors: held-out errors, (seeds, epochs).
    """
    errors = 100 * np.array(errors)
    means = errors.mean(0)
    best, last = int(np.argmin(means)), len(means) - 1
    common, own = (statistics.paired(errors[:, -1], each) for each in (errors[:, best], errors.min(1)))
    return (
        f"the held-out error is {means[best]:.2f}% at its lowest, after epoch {best + 1}, and {means[last]:.2f}% after "
        f"epoch {last + 1}: a gain of {report.interval(common, '.2f')} points, of {report.interval(own, '.2f')} with "
        "the best epoch of each seed"
    )


def in_times(records: Sequence[dict], others: Sequence[dict]) -> str:
    """The traces of nets in times those of others with the same seeds, in words."""
    traces, below = (np.array([record["trace"] for record in some]) for some in (records, others))
    if not (np.all(traces > 0) and np.all(below > 0)):
        return "no ratio, for a trace is negative"
    return report.times(traces / below)


def by_sign(records: Sequence[dict], others: Sequence[dict]) -> str:
    """How far the sums of the negative and of the positive eigenvalues differ from those of others, in words."""
    sums = {
        "negative": lambda record: record["negative_trace"],
        "positive": lambda record: record["trace"] - record["negative_trace"],
    }
    parts = []
    for name, of in sums.items():
        effect = statistics.paired([of(record) for record in records], [of(record) for record in others])
        parts.append(f"{name} {report.interval(effect, '.3g')}{report.p_words(effect)}")
    return f"sums of eigenvalues less those of none: {'; '.join(parts)}"


def held_out(records: Sequence[dict], others: Sequence[dict]) -> str:
    """The difference of the held-out errors of nets and of others with the same seeds, in words."""
    one, two = ([100 * record["held_out_error"] for record in some] for some in (records, others))
    effect = statistics.paired(one, two)
    return f"{report.interval(effect, '.3f')} points{report.p_words(effect)}, not corrected"


def _name(method):
    return METHODS.get(method, (method,))[0]


def _ends(points, best, added):
    """Whether the best strength is inside the grid, and how the grid was extended, in words."""
    extended = f", of which {' and '.join(f'{s:g}' for s in added)} extended the grid" if added else ""
    at, strengths = points.index(best), [point["strength"] for point in points]
    words = f"{best['strength']:g} is the best of {len(strengths)} strengths{extended}"
    if at in (0, len(points) - 1):
        return f"{words}; it is an end of the grid, beyond which the best may be"
    diverged = [f"{s:g}" for s, point in zip(strengths, points, strict=True) if np.isnan(_mean(point))]
    return words + (f"; training diverged at {' and '.join(diverged)}" if diverged else "")


def _with_trace(points, none):
    """Whether the held-out error falls where the trace does, in words."""
    flatter = [point for point in points if _mean(point, "trace") < (1 - NOTICED) * _mean(none, "trace")]
    better = sum(_mean(point) < _mean(none) for point in flatter)
    return (
        f"the trace is lower by {NOTICED:.0%} or more at {len(flatter)} of {len(points)} strengths, and at {better} of "
        f"them so is the held-out error"
    )


def _mean(point, metric="held_out_error"):
    return np.mean([record[metric] for record in point["trials"]])
