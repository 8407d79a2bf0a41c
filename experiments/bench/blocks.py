"""Traces and spectra of the blocks of a small GPT, jaxhess beside PyHessian and curvlinops on subsets of parameters.

    python -m experiments.run blocks model=gpt dataset=shakespeare

With repeats=3 it takes 18 minutes on two CPU cores, and eight more for the truth, which is kept. The same trained
weights and the same batch go to all, in float32. A block is a layer of the net. The truth is the set of eigenvalues of
each block's dense Hessian, in float64. PyHessian and curvlinops run in a process of their own, in an environment that
is made beside the folder of the results. All are called in turn, so that what slows the machine slows all of them. The
first call of each, which compiles, is timed by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from flax.traverse_util import flatten_dict

import jaxhess as jh
from experiments import data, figures, measure, models, plot, report, store, train
from experiments.bench import peers

PyTree = Any
OURS = {"trace": "jaxhess: layer_traces", "spectrum": "jaxhess: layer_spectra"}
SHARES = {"trace": "% of the sum of |eigenvalues|", "spectrum": "W1, % of the mean |eigenvalue|"}
COLUMNS = 64  # of a dense block at a time


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to compare; ``method`` and ``norm_layers`` play no part.

    Attributes:
      model: the net, which `experiments.bench.torch_blocks` has too.
      dataset: the text that it reads.
      width: factor on the 64 features. At half of them every block is small enough for a dense matrix.
      images_per_class: sequences at which it is measured.
      probes: numbers of probes of jaxhess, and of products with each block of the others.
      more_probes: further numbers of probes of jaxhess alone, whose probes serve all blocks.
      steps: numbers of Lanczos steps.
      more_steps: further numbers of PyHessian alone, whose steps take the least time.
      repeats: random keys of each estimate.
      peers_python: interpreter of an environment with the packages of experiments/bench/peers.txt; by default one is
        made beside the results.
    """

    model: models.Name = "gpt"
    dataset: data.Name = "shakespeare"
    width: float = 0.5
    epochs: int = 2
    batch_size: int = 64
    learning_rate: float = 0.1
    images_per_class: int = 16
    probes: tuple[int, ...] = (6, 24, 96)
    more_probes: tuple[int, ...] = (384,)
    steps: tuple[int, ...] = (8, 32, 128)
    more_steps: tuple[int, ...] = ()
    repeats: int = 4
    peers_python: str = dataclasses.field(default="", metadata={"kept": False})  # of this machine alone

    def __post_init__(self):
        super().__post_init__()
        if self.repeats < 2:
            raise ValueError(f"repeats must be at least 2, since the first one compiles, got {self.repeats}")
        for count in self.probes:
            if count < 6 or count % 6:
                raise ValueError(f"probes must be multiples of 6, which XTrace and Hutch++ take, got {count}")


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, finds the truth, calls all in turn, and saves errors and seconds."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    loss, params = models.objective(model), trained.params
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    names = jh.layer_names(params, loss, batch)
    with contextlib.ExitStack() as stack:
        python = config.peers_python or peers.environment(out_dir.parent / ".peers")
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store.save_arrays(folder / "weights.npz", {"/".join(k): np.asarray(x) for k, x in flatten_dict(params).items()})
        store.save_arrays(folder / "batch.npz", {name: np.asarray(batch[name]) for name in ("image", "label")})
        others = peers.Peers(python, "experiments.bench.torch_blocks", str(folder))
        stack.callback(others.close)
        theirs = others.ask("about", "")
        alike = agreement(loss, params, batch, names, theirs)
        path = train.net_path(config.model, dataset, config, out_dir, options=figures.net_options(config))
        path = path.with_name(f"truth-{config.images_per_class}-{path.name}")
        if not (kept := store.find(path)):
            store.save_arrays(path, eigenvalues(loss, params, batch, names))
        truth = store.load_arrays(kept or path)
        rows = [*OURS.items(), *map(_words, others.names)]
        calls = [(kind, row, n) for kind, row in rows for n in _budgets(config, kind, row)]

        def call(kind, row, budget, key):
            if row not in OURS.values():
                answer = others.ask(kind, f"{row}/{budget}/{key}")
                return answer["seconds"], answer["found"]
            return ours(kind, loss, params, batch, budget, key)

        found = in_turn(call, calls, config.repeats)
    numbers = {
        "machine": report.machine(jax.default_backend(), jax.__version__),
        "versions": {"jaxhess": importlib.metadata.version("jaxhess")} | theirs["versions"],
        "torch_threads": theirs["threads"],
        "test_loss": float(trained.history["test_loss"][-1]),
        "sequences": len(batch["label"]),
        "alike": alike,
        "blocks": {
            name: {
                "parameters": len(values),
                "trace": float(values.sum()),
                "absolute": float(np.abs(values).sum()),
                "lambda_max": float(values[-1]),
            }
            for name, values in truth.items()
        },
        "found": [
            {"kind": kind, "row": row, "budget": budget, "seconds": [seconds for seconds, _ in trials]}
            | errors(kind, [one for _, one in trials], truth)
            for (kind, row, budget), trials in found.items()
        ],
    }
    store.save_json(out_dir / "numbers.json", numbers)


def _words(name):
    """The kind and the row of what the other process calls "KIND ROW"."""
    kind, _, row = name.partition(" ")
    return kind, row


def _budgets(config, kind, row):
    if kind == "spectrum":
        return (*config.steps, *config.more_steps) if row.startswith("PyHessian") else config.steps
    return (*config.probes, *config.more_probes) if row in OURS.values() else config.probes


def agreement(loss: Any, params: PyTree, batch: PyTree, names: Sequence[str], theirs: Mapping[str, Any]) -> PyTree:
    """The losses, and the largest relative difference of the norm of a block's gradient; ValueError if not equal."""
    value, slope = jax.value_and_grad(loss)(params, batch)
    norms = {name: float(optax.tree.norm(jh.subtree(slope, name))) for name in names}
    worst = max(abs(theirs["gradient"][name] / norm - 1) for name, norm in norms.items())
    if abs(theirs["loss"] - value) > 1e-5 * abs(value) or worst > 1e-3:
        raise ValueError(f"the nets differ: losses {value} and {theirs['loss']}, gradients by up to {worst:.2g}")
    return {"loss": float(value), "torch_loss": theirs["loss"], "gradient": worst}


def eigenvalues(loss: Any, params: PyTree, batch: PyTree, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The eigenvalues of every block's dense Hessian, ascending, in float64: {layer: (parameters,)}."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        linear = jh.linearize(jh.hessian(loss, params, batch), like=params)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        places = unravel(jnp.arange(len(flat), dtype=flat.dtype))

        @jax.jit
        def rows(product, some):
            vectors = jax.vmap(lambda i: unravel(jnp.zeros_like(flat).at[i].set(1)))(some)
            return jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(v))[0])(vectors)

        found = {}
        with measure.progress_bar("dense blocks") as progress:
            for done, name in enumerate(names):
                progress(done, len(names))
                some = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jh.subtree(places, name))]).astype(np.int32)
                padded = np.resize(some, -(-len(some) // COLUMNS) * COLUMNS)
                block = [np.asarray(rows(linear, part))[:, some] for part in np.split(padded, len(padded) // COLUMNS)]
                dense = np.concatenate(block)[: len(some)]
                found[name] = np.linalg.eigvalsh(0.5 * (dense + dense.T))
        return found


def ours(kind: str, loss: Any, params: PyTree, batch: PyTree, budget: int, key: int) -> tuple[float, dict[str, Any]]:
    """Seconds, and {layer: the trace, or [nodes, weights]}."""
    key, start = jax.random.key(key), time.perf_counter()
    if kind == "trace":
        traces = jh.layer_traces(loss, params, batch, key=key, num_probes=budget)
        found = {name: float(estimate.mean) for name, estimate in traces.items()}
    else:
        spectra = jh.layer_spectra(loss, params, batch, key=key, num_steps=budget)
        found = {name: [spec.nodes, spec.weights] for name, spec in spectra.items()}
    return time.perf_counter() - start, found


def in_turn(call: Callable, calls: Sequence[tuple], repeats: int) -> dict[tuple, list]:
    """{one of the calls: its results with the keys 0, 1, ...}, called in turn for each key.

    With the first key nothing is compiled; each of ours is then called once more for nothing, which compiles it.
    """
    found: dict[tuple, list] = {one: [] for one in calls}
    with measure.progress_bar("estimating") as progress:
        for key in range(repeats):
            for done, one in enumerate(calls):
                progress(key * len(calls) + done, repeats * len(calls))
                ours_first = key == 0 and one[1] in OURS.values()
                if ours_first:
                    jax.clear_caches()
                found[one].append(call(*one, key))
            for one in calls if key == 0 else ():
                if one[1] in OURS.values():
                    call(*one, key)
    return found


# ---- errors ----


def errors(kind: str, trials: Sequence[Mapping], truth: Mapping[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """{"error": {block: [of each key]}}, and "lambda_max" likewise of a spectrum; as shares.

    Args:
      kind: "trace" or "spectrum".
      trials: {block: the trace, or [nodes, weights]} of each key; other blocks are left out.
      truth: all eigenvalues of each block.

    Returns:
      Errors of traces in shares of the sum of absolute eigenvalues, W1 distances in shares of their mean, and errors of
      the largest eigenvalue relative to it.
    """
    found: dict[str, dict[str, list[float]]] = {"error": {}}
    for name, values in truth.items():
        estimates, absolute = [trial[name] for trial in trials], np.abs(values)
        if kind == "trace":
            found["error"][name] = [float((x - values.sum()) / absolute.sum()) for x in estimates]
            continue
        distance = [scipy.stats.wasserstein_distance(nodes, values, weights) for nodes, weights in estimates]
        found["error"][name] = [float(x / absolute.mean()) for x in distance]
        largest = [max(nodes) / values[-1] - 1 for nodes, _ in estimates]
        found.setdefault("lambda_max", {})[name] = [float(x) for x in largest]
    return found


def overall(by_block: Mapping[str, Sequence[float]]) -> float:
    """The mean over blocks of the root mean square over keys."""
    return float(np.mean([np.sqrt(np.mean(np.square(values))) for values in by_block.values()]))


class Time(NamedTuple):
    """Seconds, and "<" or ">" where only a bound of them is known."""

    seconds: float
    sign: str = ""


def time_to(seconds: Sequence[float], errors: Sequence[float], error: float) -> Time:
    """The time that an estimator takes to an error, between its measured points on log scales.

    Args:
      seconds: of its budgets, ascending.
      errors: likewise; an error that does not fall is that of the smaller budget.
      error: the one that is asked for.

    Returns:
      `Time`: with "<" if the smallest budget is there already, and ">" if the largest is not.
    """
    errors = np.minimum.accumulate(errors)
    if error >= errors[0]:
        return Time(float(seconds[0]), "<" if error > errors[0] else "")
    if error < errors[-1]:
        return Time(float(seconds[-1]), ">")
    falling = np.append(True, np.diff(errors) < 0)
    x, y = (np.log(np.asarray(values)[falling][::-1]) for values in (errors, seconds))
    return Time(float(np.exp(np.interp(np.log(error), x, y))))


class Line(NamedTuple):
    """An estimator: its budgets, the seconds of its first and the median of its later calls, and its errors."""

    budgets: list[int]
    first: list[float]
    later: list[float]
    errors: list[float]


def lines(found: Sequence[Mapping[str, Any]], kind: str, what: str = "error") -> dict[str, Line]:
    """{row: `Line`} of the records of one kind, by the "error" or the "lambda_max"."""
    lines: dict[str, Line] = {}
    for record in (record for record in found if record["kind"] == kind):
        line = lines.setdefault(record["row"], Line([], [], [], []))
        first, *later = record["seconds"]
        for values, value in zip(line, (record["budget"], first, np.median(later), overall(record[what])), strict=True):
            values.append(value)
    return lines


def fastest(others: Mapping[str, Line], error: float, when: str = "later") -> tuple[str, Time]:
    """The row that reaches an error first, and its `Time`; if none does, the one that was tried longest."""
    times = {row: time_to(getattr(line, when), line.errors, error) for row, line in others.items()}
    reached = {row: time for row, time in times.items() if time.sign != ">"}
    if not reached:
        return max(times.items(), key=lambda item: item[1].seconds)
    return min(reached.items(), key=lambda item: item[1].seconds)


# ---- words and figure ----


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the tables from the saved errors and seconds, and draws error against time."""
    numbers = store.load_json(out_dir / "numbers.json")
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    words = f"{figures.about(config, config.model, config.dataset)}, {numbers['sequences']} training sequences"
    print(f"{words}, test loss {numbers['test_loss']:.3f}; {numbers['machine']}; {versions}")
    alike = numbers["alike"]
    print(f"loss {alike['loss']:.6f}, in torch {alike['torch_loss']:.6f}; gradients differ by {alike['gradient']:.1g}")
    print(f"threads of torch: {numbers['torch_threads']}, the faster of one and all")
    panels = {}
    for kind, ours in OURS.items():
        found = lines(numbers["found"], kind)
        panels[f"{TITLES[kind]}, {SHARES[kind]}"] = {
            row: (line.later, line.first if row == ours else None, [100 * x for x in line.errors])
            for row, line in found.items()
        }
        print(f"\n{TITLES[kind]}: {SHARES[kind]}, root mean square of {config.repeats} keys, mean over blocks")
        report.print_columns(_rows(found, lines(numbers["found"], kind, "lambda_max") if kind == "spectrum" else {}))
        print("\nseconds to equal error")
        report.print_columns(_equal(found, ours))
        print(f"\n{TITLES[kind]}, block by block, at the largest number: {SHARES[kind]}")
        report.print_columns(_by_block(numbers, kind))
    plot.save(plot.against_time(panels, f"Hessian of the blocks of {words}"), out_dir / "figure.png")


TITLES = {"trace": "traces", "spectrum": "spectra"}


def _rows(found, largest):
    """A line for each row and budget: seconds, first call, error."""
    table = [["", "products", "seconds", "first call", "error, %", *(["lambda_max, %"] if largest else [])]]
    for row, line in found.items():
        for i, budget in enumerate(line.budgets):
            cells = [f"{x:.3g}" for x in (line.later[i], line.first[i], 100 * line.errors[i])]
            more = [f"{100 * largest[row].errors[i]:.2g}"] if largest else []
            table.append([row, str(budget), *cells, *more])
    return table


def _equal(found, ours):
    """A line for each error of ours, with the fastest peer, and one for the smallest error of each peer."""
    mine, others = found[ours], {row: line for row, line in found.items() if row != ours}
    table = [["error, %", "jaxhess", "peer", "ratio", "with first call", "by"]]
    for later, first, error in zip(mine.later, mine.first, mine.errors, strict=True):
        row, time = fastest(others, error)
        cold = fastest(others, error, "first")[1]
        ratios = [f"{t.sign}{t.seconds / s:.3g}" for t, s in ((time, later), (cold, first))]
        table.append([f"{100 * error:.3g}", f"{later:.3g}", f"{time.sign}{time.seconds:.3g}", *ratios, row])
    for row, line in others.items():
        i = int(np.argmin(line.errors))
        pairs = [
            (time_to(own, mine.errors, line.errors[i]), theirs[i])
            for own, theirs in ((mine.later, line.later), (mine.first, line.first))
        ]
        ratios = [f"{INVERSE[own.sign]}{theirs / own.seconds:.3g}" for own, theirs in pairs]
        own, theirs = pairs[0]
        table.append([f"{100 * line.errors[i]:.3g}", f"{own.sign}{own.seconds:.3g}", f"{theirs:.3g}", *ratios, row])
    return table


INVERSE = {"": "", "<": ">", ">": "<"}


def _by_block(numbers, kind):
    records: dict[str, Mapping] = {}
    for record in (record for record in numbers["found"] if record["kind"] == kind):
        records[record["row"]] = record  # the last one is that of the largest budget
    table = [["block", "parameters", "trace", "lambda_max", *records]]
    for name, about in numbers["blocks"].items():
        rms = [100 * overall({name: record["error"][name]}) for record in records.values()]
        truth = [f"{about['parameters']:,}", f"{about['trace']:.4g}", f"{about['lambda_max']:.4g}"]
        table.append([name, *truth, *(f"{x:.2g}" for x in rms)])
    return table
