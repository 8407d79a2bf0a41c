"""How precise the estimators are, and how long they take: textbook ones and the default ones, and what images add.

    python -m experiments.run estimators model=lenet dataset=mnist

All is measured on one trained net. Errors are those from exact values where these are known: traces of G from all rows
of its factor, those of Hess where it equals G, and spectra of G from its Gram matrix.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

import jaxhess as jh
from experiments import figures, measure, models, plot, report, store

CURVATURES = {"hessian": "Tr Hess", "ggn": "Tr G"}
METHODS = {"hutchinson": "textbook", "auto": "default"}
WEIGHTS = {"plain": "textbook", "deflated": "default"}
METRICS = {"wasserstein": "W1 / mean eigenvalue", "trace": "relative error of the trace"}
EXACT = "exact"


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to compare.

    Attributes:
      probes: numbers of probes of the traces.
      repeats: keys with which each trace is estimated, at least 2; with the first of them it also compiles.
      tolerance: relative error to which each layer's Tr Hess is found with as many probes as it takes; 0 leaves it out.
      steps: numbers of Lanczos steps of the spectra, with one start vector.
      spectra_repeats: likewise of the spectra.
      spectra_images: training images of each class, or sequences, for the spectra; 0 for as many as for the traces.
      spectra_layers: layers whose spectra are compared, spread over the depth; 0 for all.
      images: numbers of images that the exact G is measured at; none leaves this out.
      subsets: sets of each number of images, drawn from the training images.
    """

    probes: tuple[int, ...] = (16, 64)
    repeats: int = 8
    tolerance: float = 0.1
    steps: tuple[int, ...] = (16, 32, 64, 128)
    spectra_repeats: int = 4
    spectra_images: int = 0
    spectra_layers: int = 0
    images: tuple[int, ...] = (10, 30, 100)
    subsets: int = 5

    def __post_init__(self):
        super().__post_init__()
        for name in ("repeats", "spectra_repeats"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, since the first one compiles, got {getattr(self, name)}")


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, measures, and saves the numbers."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    loss, params = models.objective(model), trained.params
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    few = measure.measure_batch(dataset, config.spectra_images or config.images_per_class, trained.batch_stats)
    layers = figures.shown(config, model, params, batch)
    keys = jax.random.split(jax.random.key(config.seed), 2)
    numbers = {
        "unit": "sequences" if dataset.is_text else "images",
        "measured": {"traces": len(batch["label"]), "spectra": len(few["label"])},
        "test": {name: float(trained.history[name][-1]) for name in ("test_loss", "test_error")},
        "traces": _traces(config, loss, params, batch, [*layers, "total"], keys[0]),
        "spectra": _spectra(config, loss, params, few, spread_out(layers, config.spectra_layers), keys[1]),
        "images": _by_images(config, loss, params, dataset, trained.batch_stats, layers),
    }
    store.save_json(out_dir / "numbers.json", numbers)


def spread_out(layers: list[str], count: int) -> list[str]:
    """So many of the layers, the first and the last among them, at equal distances; all for 0."""
    if not count or count >= len(layers):
        return layers
    return [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, count).round().astype(int))]


# ---- measurements ----


def _traces(config, loss, params, batch, names, key):
    """{"gradient": seconds, "exact": {curvature: {layer: Tr}}, "found": {curvature: {method: {probes: record}}}}.

    A record is {"seconds": [...], "first": seconds, "mean": {layer: [...]}, "std_error": ..., "exact": [layers]}.
    """

    def call(curvature, method, probes, key):
        options = {"num_probes": probes, "curvature": curvature, "method": method}
        return jh.layer_traces(loss, params, batch, key=key, **options)

    gradient = jax.jit(jax.grad(loss))
    second = seconds(lambda: gradient(params, batch))
    calls = {(c, m, n): partial(call, c, m, n) for c in CURVATURES for m in METHODS for n in config.probes}
    found: dict[str, dict] = {}
    for (curvature, method, probes), (first, times, estimates) in repeated(calls, config.repeats, key).items():
        record = {"seconds": times, "first": first}
        record |= {name: _by_layer(estimates, name, names) for name in ("mean", "std_error")}
        record["exact"] = [name for name in names if estimates[0][name].method == EXACT]
        found.setdefault(curvature, {}).setdefault(method, {})[probes] = record
    truth = jh.layer_traces(loss, params, batch, key=key, curvature="ggn", method="exact")
    values = {name: float(truth[name].mean) for name in names}
    same = found["hessian"]["auto"][max(config.probes)]["exact"]  # Hess_l = G_l in these
    exact = {"ggn": values, "hessian": {name: values[name] for name in same}}
    return {
        "gradient": second,
        "exact": exact,
        "found": found,
        "to_tolerance": _to_tolerance(config, loss, params, batch, key) if config.tolerance else {},
    }


def _to_tolerance(config, loss, params, batch, key):
    """{method: {"seconds": [...], "first": seconds, "worst": [...], "met": [...]}} of Tr Hess of all layers.

    The worst relative error of a layer, and the share of the layers in which it is within the tolerance.
    """

    def call(method, key):
        return jh.layer_traces(loss, params, batch, key=key, rtol=config.tolerance, method=method)

    found = {}
    calls = {method: partial(call, method) for method in METHODS}
    for method, (first, times, estimates) in repeated(calls, config.repeats, key).items():
        errors = np.array([[float(e.std_error / abs(e.mean)) for e in one.values()] for one in estimates])
        met = (errors <= config.tolerance).mean(1).tolist()
        found[method] = {"seconds": times, "first": first, "worst": errors.max(1).tolist(), "met": met}
    return found


def _by_layer(estimates, field, names):
    return {name: [float(getattr(one[name], field)) for one in estimates] for name in names}


def _spectra(config, loss, params, batch, layers, key):
    """{"gradient": seconds, "found": {weights: {steps: {"seconds": [...], "first": s, METRIC: {layer: [...]}}}}}."""

    def call(weights, steps, key):
        options = {"num_steps": steps, "weights": weights, "curvature": "ggn", "layers": layers}
        return jh.layer_spectra(loss, params, batch, key=key, **options)

    gradient = jax.jit(jax.grad(loss))
    second = seconds(lambda: gradient(params, batch))
    calls = {(w, n): partial(call, w, n) for w in WEIGHTS for n in config.steps}
    results = repeated(calls, config.spectra_repeats, key)
    exact = _exact(loss, params, batch, layers)
    found: dict[str, dict] = {}
    for (weights, steps), (first, times, spectra) in results.items():
        record = found.setdefault(weights, {})[steps] = {"seconds": times, "first": first}
        record |= {metric: {name: [] for name in exact} for metric in METRICS}
        for one in spectra:
            for name, true in exact.items():
                record["wasserstein"][name].append(jh.wasserstein(one[name], true) * true.dim / true.trace)
                record["trace"][name].append(one[name].trace / true.trace - 1)
    return {"gradient": second, "found": found}


def _exact(loss, params, batch, layers):
    """The spectra of G_l and of G from the Gram matrix."""
    options = {"curvature": "ggn", "method": "gram", "layers": layers, "max_bytes": measure.GRAM_BYTES}
    return jh.layer_spectra(loss, params, batch, key=jax.random.key(0), **options)  # nothing is random


def _by_images(config, loss, params, dataset, batch_stats, layers):
    """{number: {"trace": {layer: [of each set]}, "lambda_max": ...}}, of G."""
    rng, numbers = np.random.default_rng(config.seed), {}
    for count in config.images:
        found = numbers[count] = {"trace": {}, "lambda_max": {}}
        for _ in range(config.subsets):
            chosen = rng.choice(len(dataset.train["label"]), count, replace=False)
            batch = dataset.batch({name: values[chosen] for name, values in dataset.train.items()})
            batch |= {"batch_stats": batch_stats} if batch_stats else {}
            for layer, spectrum in _exact(loss, params, batch, layers).items():
                found["trace"].setdefault(layer, []).append(spectrum.trace)
                found["lambda_max"].setdefault(layer, []).append(spectrum.lambda_max)
    return numbers


def repeated(calls: Mapping, repeats: int, key: jax.Array) -> dict:
    """{name: (seconds of the first call, [seconds of the later ones], [all results])}.

    The calls are made in turn, one round for each key. In the first round they compile what none before has needed.
    """
    results: dict = {name: [] for name in calls}

    def call(name):
        results[name].append(calls[name](jax.random.fold_in(key, len(results[name]))))

    timers = {name: partial(report.seconds, partial(call, name)) for name in calls}
    times = report.in_turn(timers, repeats)
    return {name: (times[name][0], times[name][1:], results[name]) for name in calls}


def seconds(call: Callable) -> float:
    """The median of five calls after a first one, which compiles."""
    timer = partial(report.seconds, call, jax.block_until_ready)
    return float(np.median(report.in_turn({"call": timer}, 6)["call"][1:]))


# ---- what they say ----


def errors(record: Mapping, exact: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    """{layer: (relative error, its kind)} of a record of `run`.

    The kind is "exact" where nothing is random, and the error is that of rounding; "rms" where the exact trace is
    known, and else "std_error", the root of the mean squared standard error of the estimates.
    """
    found = {}
    for layer, values in record["mean"].items():
        errors, true = np.array(record["std_error"][layer]), exact.get(layer)
        kind = EXACT if layer in record["exact"] else "std_error" if true is None else "rms"
        deviations = np.array(values) - true if kind == "rms" else errors
        scale = abs(np.mean(values) if true is None else true)
        found[layer] = float(np.mean(deviations**2) ** 0.5 / scale), kind
    return found


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the tables from the saved numbers, and draws error against time."""
    numbers = store.load_json(out_dir / "numbers.json")
    unit, about = numbers["unit"], figures.about(config, config.model, config.dataset)
    print(f"{about}, test loss {numbers['test']['test_loss']:.3f}, test error {numbers['test']['test_error']:.1%}")
    for curvature, words in CURVATURES.items():
        _print_traces(numbers, curvature, words)
    _print_to_tolerance(config, numbers["traces"])
    _print_spectra(numbers)
    if numbers["images"]:
        _print_images(config, numbers["images"], unit)
    title = f"{about}, {numbers['measured']['traces']} training {unit}"
    plot.save(plot.precision(_panels(numbers), title), out_dir / "figure.png")


def _print_traces(numbers, curvature, words):
    records = {
        f"{METHODS[method]}, {probes} probes": record
        for method, found in numbers["traces"]["found"][curvature].items()
        for probes, record in found.items()
    }
    found = [errors(record, numbers["traces"]["exact"][curvature]) for record in records.values()]
    repeats = 1 + len(next(iter(records.values()))["seconds"])
    print(
        f"\n{words} at {numbers['measured']['traces']} training {numbers['unit']}: relative error, RMS over {repeats} "
        f"keys (~: standard error, where the exact value is not known)"
    )
    report.print_columns([["", *records], *_times(records.values(), numbers["traces"]["gradient"]), *_cells(found)])


def _print_to_tolerance(config, traces):
    records = {METHODS[method]: record for method, record in traces.get("to_tolerance", {}).items()}
    if records:
        print(f"\nTr Hess of each layer to {config.tolerance:.0%}, with as many probes as it takes:")
        rows = _times(records.values(), traces["gradient"])
        rows.append(["worst error", *(f"{np.median(r['worst']):.2g}" for r in records.values())])
        rows.append(["within it", *(f"{np.mean(r['met']):.0%}" for r in records.values())])
        report.print_columns([["", *records], *rows])


def _times(records, gradient):
    """The rows with times: the median of the later calls, in seconds and gradients, and what the first took longer."""
    medians = [float(np.median(record["seconds"])) for record in records]
    return [
        ["seconds", *(f"{x:.3g}" for x in medians)],
        ["gradients", *(f"{x / gradient:.3g}" for x in medians)],
        ["compiling, s", *(f"{max(0, r['first'] - x):.2g}" for r, x in zip(records, medians, strict=True))],
    ]


def _cells(found):
    words = {EXACT: lambda x: EXACT, "rms": "{:.2g}".format, "std_error": "~{:.2g}".format}
    return [[layer, *(words[one[layer][1]](one[layer][0]) for one in found)] for layer in found[0]]


def _print_spectra(numbers):
    found = numbers["spectra"]["found"]
    records = {f"{WEIGHTS[w]}, {n}": record for w in found for n, record in found[w].items()}
    for metric, words in METRICS.items():
        print(
            f"\nSpectrum of G at {numbers['measured']['spectra']} training {numbers['unit']}, one start vector, by "
            f"Lanczos steps: {words}, mean over keys"
        )
        rows = [
            [layer, *(f"{np.mean(np.abs(record[metric][layer])):.2g}" for record in records.values())]
            for layer in next(iter(records.values()))[metric]
        ]
        times = _times(records.values(), numbers["spectra"]["gradient"]) if metric == "wasserstein" else []
        report.print_columns([["", *records], *times, *rows])


def _print_images(config, records, unit):
    for metric, words in (("trace", "Tr G"), ("lambda_max", "lambda_max(G)")):
        print(f"\n{words} of {config.subsets} sets of {unit}:")
        layers = next(iter(records.values()))[metric]
        rows = [[n, *(report.spread(record[metric][k], ".4g") for k in layers)] for n, record in records.items()]
        report.print_columns([[unit, *layers], *rows])


def _panels(numbers):
    """{title: {textbook or default: {"whole net" or "layers": (gradients, relative errors)}}}."""
    traces, spectra = numbers["traces"], numbers["spectra"]
    panels: dict[str, dict] = {}
    for curvature, words in CURVATURES.items():
        panels[words] = {}
        for method, records in traces["found"][curvature].items():
            found = [{k: e for k, (e, _) in errors(r, traces["exact"][curvature]).items()} for r in records.values()]
            panels[words][METHODS[method]] = _lines(records.values(), found, traces["gradient"])
    panels["spectrum of G, W1"] = {
        WEIGHTS[weights]: _lines(
            records.values(),
            [{k: np.mean(values) for k, values in record["wasserstein"].items()} for record in records.values()],
            spectra["gradient"],
        )
        for weights, records in spectra["found"].items()
    }
    return panels


def _lines(records, found, gradient):
    time = [float(np.median(record["seconds"])) / gradient for record in records]
    inner = [[error for layer, error in one.items() if layer != "total"] for one in found]
    return {
        "whole net": (time, [float(one["total"]) for one in found]),
        "layers": (time, [[float(f(errors)) for errors in inner] for f in (np.median, np.min, np.max)]),
    }
