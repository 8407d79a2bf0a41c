"""Which layers can be rounded to few bits, predicted by curvature and measured by the loss; not in the paper.

    python -m experiments.run quantise model=gpt dataset=shakespeare

About half an hour while other programs run. The weights of each layer, without biases and norms, are rounded to the
nearest of 2^bits - 1 evenly spaced values. Scores of how much this raises the loss are compared with the true increase:
the trace of G_l; the trace per parameter times the squared norm of the change dW (as in HAWQ-V2, Dong et al. 2020,
arXiv 1911.03852); the quadratic form dW' G dW / 2; the same with the gradient, g' dW, and with the Hessian in place of
G. For several layers at once the quadratic form is the sum of the layers' own, or has the interactions dW_l' G dW_k.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import jaxhess as jh
from experiments import figures, measure, models, plot, report, statistics, store

PyTree = Any
SINGLE = {  # how each score is written, of one layer
    "norm": "|dW|^2",
    "trace": "trace",
    "trace_norm": "trace/param x |dW|^2",
    "ggn": "dW' G dW",
    "ggn_slope": "dW' G dW + g' dW",
    "hessian_slope": "dW' Hess dW + g' dW",
}
PREDICT = ("trace_norm", "ggn", "ggn_slope", "hessian_slope")  # those that are in units of the loss
SETS = {"sum": "sum over layers", "joint": "with interactions"}
ORDERS = ("trace", "trace_norm", "ggn", "ggn_slope", "joint")
ORDER_WORDS = SINGLE | {"joint": "with interactions, one by one", "true": "the true loss, one by one"}


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train, and how it is rounded; ``norm_layers`` and ``method`` play no part.

    Attributes:
      images_per_class: training images of each class, or sequences, at which curvature and loss are measured.
      held_out: test images, or sequences, at which the loss is measured too.
      bits: of the rounded weights.
      num_probes: probes of each trace.
      trials: trainings, with the seeds seed, seed + 1, ...
    """

    model: models.Name = "gpt"
    dataset: figures.data.Name = "shakespeare"
    width: float = 0.5
    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 0.1
    images_per_class: int = 256
    held_out: int = 1000
    bits: tuple[int, ...] = (4, 3)
    num_probes: int = 32
    trials: int = 3


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the nets, predicts and measures, and saves the numbers."""
    if min(config.bits, default=0) < 2:
        raise ValueError(f"bits={','.join(map(str, config.bits))} must be 2 or more each")
    todo = figures.plan(config, out_dir, data_dir)
    numbers: dict[str, Any] = {"trials": []}
    with measure.progress_bar("rounding") as progress:
        for done, (key, training) in enumerate(todo.trainings.items()):
            model, trained = todo.net(key)
            found = {"train_loss": float(trained.history["train_loss"][-1])}
            for bits in config.bits:
                found[str(bits)] = rounded(config, model, training.dataset, trained, bits, training.config.seed)
            numbers["trials"].append(found)
            store.save_json(out_dir / "numbers.json", numbers)
            progress(done + 1, len(todo.trainings))


def rounded(config: Config, model: Any, dataset: Any, trained: Any, bits: int, seed: int) -> dict[str, Any]:
    """Scores and true increases of one net at one number of bits.

    Returns:
      {"layers": names, "scores": {score: one value a layer}, "forms": {"ggn", "hessian": (layers, layers) of
      dW_l' A dW_k, "slopes": (layers,)}, "true", "held_out": increase of the loss with each layer rounded, "sets":
      {order: {"layers": positions, "predicted": {way: values}, "true", "held_out": values}}}, where the n-th value is
      that of the first n layers of the order.
    """
    loss = models.objective(model)
    batch = jax.device_put(measure.measure_batch(dataset, config.images_per_class, trained.batch_stats))
    names = [
        f"{name}/{leaf}"
        for name in figures.shown(config, model, trained.params, batch)
        for leaf in _matrix(trained.params, name)
    ]
    changes = [change(trained.params, name, bits) for name in names]
    held_out = dataset.batch({name: values[: config.held_out] for name, values in dataset.test.items()})
    held_out |= {name: batch[name] for name in ("batch_stats",) if name in batch}
    rises = {
        "true": _rises(loss, trained.params, changes, batch),
        "held_out": _rises(loss, trained.params, changes, jax.device_put(held_out)),
    }
    traces = jh.layer_traces(
        loss,
        trained.params,
        batch,
        key=jax.random.key(seed),
        num_probes=config.num_probes,
        curvature="ggn",
        method="hutchinson",
        layers={name: name for name in names},
    )
    forms = quadratic_forms(loss, trained.params, batch, changes)
    scores = single_scores([float(traces[name].mean) for name in names], changes, forms)
    singles = {where: [rise([i]) for i in range(len(names))] for where, rise in rises.items()}
    sets = {}
    for name in (*ORDERS, "true"):
        order = _order(name, scores, forms, rises["true"])
        prefixes = [order[: count + 1] for count in range(len(order))]
        sets[name] = {
            "layers": order,
            "predicted": {way: [predicted(forms, chosen, way) for chosen in prefixes] for way in SETS},
            **{where: [rise(chosen) for chosen in prefixes] for where, rise in rises.items()},
        }
    found = {name: np.asarray(form).tolist() for name, form in forms.items()}
    return {"layers": names, "scores": scores, "forms": found, **singles, "sets": sets}


def _matrix(params, name):
    """The arrays of a layer that are rounded: those with two axes or more."""
    layer = jh.subtree(params, name)
    return [leaf for leaf, x in layer.items() if np.ndim(x) > 1]


def change(params: PyTree, name: str, bits: int) -> PyTree:
    """dW of one array rounded to the nearest of 2^bits - 1 multiples of its largest entry; zeros elsewhere."""

    def of(array):
        unit = jnp.abs(array).max() / (2 ** (bits - 1) - 1)
        return jnp.where(unit > 0, jnp.round(array / unit) * unit - array, 0)

    *path, leaf = name.split("/")

    def moved(tree, path):
        if not path:
            return {key: of(x) if key == leaf else jnp.zeros_like(x) for key, x in tree.items()}
        zeros = {key: jax.tree.map(jnp.zeros_like, x) for key, x in tree.items() if key != path[0]}
        return zeros | {path[0]: moved(tree[path[0]], path[1:])}

    return moved(params, path)


def quadratic_forms(loss: jh.Objective, params: PyTree, batch: PyTree, changes: Sequence[PyTree]) -> dict[str, Any]:
    """{"ggn", "hessian": (L, L) of dW_l' A dW_k, "slopes": (L,) of g' dW_l}, from one product a change."""
    slope = jax.grad(loss)(params, batch)
    operators = {"ggn": jh.ggn(loss, params, batch), "hessian": jh.hessian(loss, params, batch)}
    forms = {"slopes": np.array([_dot(slope, v) for v in changes])}
    for name, operator in operators.items():
        product = jax.jit(jh.linearize(operator, like=params))
        images = [product(v) for v in changes]
        form = np.array([[_dot(v, image) for image in images] for v in changes])
        forms[name] = (form + form.T) / 2
    return forms


@jax.jit
def _dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _rises(loss, params, changes, batch):
    """A function of positions: how much the loss rises with these layers rounded."""
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *changes)

    @jax.jit
    def value(chosen, params, stacked, batch):
        moved = jax.tree.map(lambda x, parts: x + jnp.tensordot(chosen, parts, 1), params, stacked)
        return loss(moved, batch)

    def rise(positions):
        chosen = np.zeros(len(changes), np.float32)
        chosen[list(positions)] = 1
        return float(value(chosen, params, stacked, batch)) - before

    before = float(value(np.zeros(len(changes), np.float32), params, stacked, batch))
    return rise


def single_scores(
    traces: Sequence[float], changes: Sequence[PyTree], forms: Mapping[str, np.ndarray]
) -> dict[str, list[float]]:
    """Each of `SINGLE` for each layer; those of `PREDICT` are increases of the loss."""
    norms = np.array([float(_dot(v, v)) for v in changes])
    sizes = np.array([sum(x.size for x in jax.tree.leaves(v) if np.any(x != 0)) for v in changes])
    ggn, hess = (np.diag(forms[name]) / 2 for name in ("ggn", "hessian"))
    found = {
        "norm": norms,
        "trace": np.asarray(traces),
        "trace_norm": np.asarray(traces) * norms / (2 * np.maximum(sizes, 1)),
        "ggn": ggn,
        "ggn_slope": ggn + forms["slopes"],
        "hessian_slope": hess + forms["slopes"],
    }
    return {name: np.asarray(values, float).tolist() for name, values in found.items()}


def predicted(forms: Mapping[str, Any], chosen: Sequence[int], way: str) -> float:
    """The increase of the loss with several layers rounded, g' dW + dW' G dW / 2: with interactions or without."""
    block = np.asarray(forms["ggn"])[np.ix_(chosen, chosen)]
    curved = block.sum() if way == "joint" else np.trace(block)
    return float(curved / 2 + np.asarray(forms["slopes"])[list(chosen)].sum())


def _order(name, scores, forms, rise):
    """Positions of the layers, the least sensitive one first."""
    if name == "joint":
        return greedy(len(scores["norm"]), lambda chosen: predicted(forms, chosen, "joint"))
    if name == "true":
        return greedy(len(scores["norm"]), rise)
    return np.argsort(scores[name], kind="stable").tolist()


def greedy(count: int, cost: Callable[[list[int]], float]) -> list[int]:
    """All positions, each time the one with which ``cost(positions so far)`` is least."""
    chosen: list[int] = []
    while len(chosen) < count:
        left = [i for i in range(count) if i not in chosen]
        chosen.append(min(left, key=lambda i: cost([*chosen, i])))
    return chosen


# ---- words and figure ----


def agreement(record: Mapping[str, Any], where: str = "true") -> dict[str, tuple[float, float]]:
    """{score: (rank correlation with the true increase over layers, median relative error; NaN if it is no loss)}."""
    true = np.array(record[where])
    found = {}
    for name, values in record["scores"].items():
        rank = float(scipy.stats.spearmanr(values, true).statistic)
        errors = np.abs(np.array(values) - true) / np.abs(true)
        found[name] = rank, float(np.median(errors)) if name in PREDICT else np.nan
    return found


def set_errors(record: Mapping[str, Any], way: str) -> float:
    """The median relative error of a prediction for sets of two layers or more, over all orders by a score."""
    found = []
    for name in ORDERS:
        order = record["sets"][name]
        true, guess = np.array(order["true"])[1:], np.array(order["predicted"][way])[1:]
        found.extend(np.abs(guess - true) / np.abs(true))
    return float(np.median(found))


def interactions(record: Mapping[str, Any]) -> float:
    """The sum of dW_l' G dW_k over all pairs of layers, in shares of that over single layers."""
    form = np.array(record["forms"]["ggn"])
    return float(form.sum() / np.trace(form) - 1)


def half(record: Mapping[str, Any], order: str, where: str = "true") -> float:
    """The true increase with the first half of the layers of an order rounded."""
    values = record["sets"][order][where]
    return values[len(values) // 2 - 1]


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints what predicts the loss from the saved numbers, and draws it."""
    trials = store.load_json(out_dir / "numbers.json")["trials"]
    about = figures.about(config, config.model, config.dataset)
    losses = report.spread([trial["train_loss"] for trial in trials], ".3f")
    layers = len(trials[0][str(config.bits[0])]["layers"])
    print(f"{about}, {len(trials)} trainings: training loss {losses}, {layers} layers rounded one by one")
    for bits in config.bits:
        records = [trial[str(bits)] for trial in trials]
        print()
        report.print_columns(_single_rows(bits, records))
        print()
        report.print_columns(_set_rows(bits, records))
    if len(trials) > 1:
        print()
        print("\n".join(claims(config, trials)))
    panels = {bits: [trial[str(bits)] for trial in trials] for bits in config.bits}
    plot.save(plot.rounded(panels, SINGLE, ORDER_WORDS, f"{about}: layers rounded to few bits"), out_dir / "figure.png")


def _single_rows(bits, records):
    lines = [[f"{bits} bits, one layer", "rank correlation", "median error", "held out: rank", "error"]]
    for name, words in SINGLE.items():
        line = [words]
        for where in ("true", "held_out"):
            found = [agreement(record, where)[name] for record in records]
            error = report.percent([one[1] for one in found], ".0f") + " %" if name in PREDICT else "-"
            line += [report.spread([one[0] for one in found], ".2f"), error]
        lines.append(line)
    return lines


def _set_rows(bits, records):
    lines = [[f"{bits} bits, half of the layers, by", "loss +", "held out +"]]
    for name in (*ORDERS, "true"):
        cells = [
            report.spread([half(record, name, where) for record in records], ".3f") for where in ("true", "held_out")
        ]
        lines.append([ORDER_WORDS[name], *cells])
    for way, words in SETS.items():
        error = report.percent([set_errors(record, way) for record in records], ".0f")
        lines.append([f"median error for sets, {words}", f"{error} %", ""])
    share = report.percent([interactions(record) for record in records], ".1f")
    lines.append(["all layers: interactions / own terms", f"{share} %", ""])
    return lines


def claims(config: Config, trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each claim with its verdict: paired t-tests over trainings, p multiplied by the number of claims."""
    found = []
    for bits in config.bits:
        records = [trial[str(bits)] for trial in trials]
        every = [agreement(record) for record in records]
        pairs = {
            "dW' G dW orders the layers better than the trace": [
                [-one[name][0] for one in every] for name in ("ggn", "trace")
            ],
            "dW' G dW orders the layers better than trace/param x |dW|^2": [
                [-one[name][0] for one in every] for name in ("ggn", "trace_norm")
            ],
            "dW' G dW + g' dW has a smaller error than trace/param x |dW|^2": [
                [one[name][1] for one in every] for name in ("ggn_slope", "trace_norm")
            ],
            "for sets, interactions lower the error": [
                [set_errors(record, way) for record in records] for way in ("joint", "sum")
            ],
        }
        tests = len(pairs) * len(config.bits)
        for words, (one, other) in pairs.items():
            effect = statistics.paired(one, other)
            verdict = statistics.verdict(effect, tests=tests)
            evidence = f"{report.interval(effect, '.3f')}{report.p_words(effect, tests)}"
            found.append(f"{bits} bits: {words}: {verdict} ({evidence})")
    return found
