"""Time and memory of every product and estimator; one gradient of the same net and batch is the unit.

    python -m experiments.run bench model=lenet batch_size=64
    python -m experiments.run bench model=resnet18 batch_size=32 one_program=false peers=true

About 3 minutes for LeNet on two CPU cores with the peers. All rows are timed in turn in each of ``repeats``
rounds, so that what slows the machine slows them all; the medians over rounds are printed, of ratios those within a
round. With the package ``matfree`` installed its Lanczos runs beside ours, on the same compiled product. With
``peers=true`` PyHessian, curvlinops and plain PyTorch do the same work in the same rounds, in an environment of their
own that is made beside the folder of the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jaxhess as jh
from experiments import measure, models, report, store
from experiments.bench import peers
from experiments.bench.memory import timed_peak
from experiments.data import Dataset
from experiments.recipe import Penalty, TrainConfig
from experiments.train import Stepper


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
      model: name of the net.
      batch_size: images in the batch; random, since the time does not depend on them.
      repeats: rounds of timing, of which the medians are shown.
      patience: seconds; a row that takes longer is timed once, while its memory is measured.
      num_probes: probes of the traces, all at once.
      num_steps: Lanczos steps.
      penalty_probes: probes of the penalty in the training steps.
      lanczos: time Lanczos and the spectra by the Gram matrix too, which take most of the time for large nets.
      one_program: time Lanczos inside one program too, ours, and that of matfree where it is installed; convolutions
        are slow there on CPUs.
      peers: time the same work in PyTorch too, by PyHessian, curvlinops and plain double backward.
      peers_python: interpreter of an environment with the packages of experiments/bench/peers.txt; by default one is
        made beside the results.
    """

    model: models.Name = "lenet"
    batch_size: int = 64
    repeats: int = 5
    patience: float = 20.0
    num_probes: int = 8
    num_steps: int = 100
    penalty_probes: int = 3
    lanczos: bool = True
    one_program: bool = True
    peers: bool = False
    peers_python: str = dataclasses.field(default="", metadata={"kept": False})  # of this machine alone


INTERVALS = (1, 25, 50, 100, 200)
STEP, STEP_WITH = "training step", "training step, penalty {}, {} probe(s)"
LAYERS = "spectra of all layers and the net, Gram"
TRACES, PENALTY = "all layer traces, {}, {}", "HTR gradient, {}, 1 probe"
PRODUCT, LANCZOS, MATFREE = "HVP, one of many at a point", "{} Lanczos steps", "{} Lanczos steps, matfree"


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Times all rows, and saves the seconds of every round."""
    rows = make_rows(config)
    with contextlib.ExitStack() as stack:
        timers = {name: partial(report.seconds, call, jax.block_until_ready) for name, (call, _) in rows.items()}
        peaks = {name: partial(timed_peak, timer) for name, timer in timers.items()}
        if config.peers:
            python = config.peers_python or peers.environment(out_dir.parent / ".peers")
            words = config.model, str(config.batch_size), str(config.num_steps * config.lanczos)
            others = peers.Peers(python, "experiments.bench.torch_work", *words)
            stack.callback(others.close)
            timers |= {name: partial(others.ask, "time", name) for name in others.names}
            peaks |= {name: partial(others.ask, "memory", name) for name in others.names}
        progress = stack.enter_context(measure.progress_bar("compiling and timing"))
        first, peak, times = _in_rounds(config, timers, peaks, progress)
    numbers = {
        "machine": report.machine(jax.default_backend(), jax.__version__),
        "layers": len(_problem(config)[3]),
        "rows": {
            name: {
                "seconds": times[name],
                "per": rows[name][1] if name in rows else 1,
                "first_call_s": first[name],
                "peak_mib": peak[name],
            }
            for name in timers
        },
    }
    store.save_json(out_dir / "numbers.json", numbers)


def _in_rounds(config, timers, peaks, progress):
    """Seconds of the first calls, peaks in MiB, and the seconds of all rounds; a slow row has those of the first."""
    total, done = len(timers) * (config.repeats + 2), 0

    def one_more():
        nonlocal done
        progress(done := done + 1, total)

    first = report.in_turn(timers, 1, one_more)
    measured = report.in_turn(peaks, 1, one_more)
    seconds = {name: of_one[0][1] for name, of_one in measured.items()}
    quick = {name: timer for name, timer in timers.items() if seconds[name] <= config.patience}
    times = {name: [seconds[name]] + [None] * (config.repeats - 1) for name in timers}
    times |= report.in_turn(quick, config.repeats, one_more)
    return {name: of_one[0] for name, of_one in first.items()}, {n: found[0][0] for n, found in measured.items()}, times


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the tables from the saved numbers."""
    numbers = store.load_json(out_dir / "numbers.json")
    rows = numbers["rows"]
    print(f"{config.model}, batch {config.batch_size}, medians of {config.repeats} rounds; {numbers['machine']}")
    lines = [["", "ms", "gradients", "peak MiB", "first call, s"]]
    for name, row in rows.items():
        own = peers.GRADIENT if name.partition(":")[0] in ("torch", "PyHessian", "curvlinops") else "gradient"
        ms = 1e3 * np.median([t for t in row["seconds"] if t is not None]) / row["per"]
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append([name, f"{ms:.2f}", f"{ratio(rows, name, own):.2f}", peak, f"{row['first_call_s']:.1f}"])
    report.print_columns(lines)

    print("\nan epoch with the penalty at every f_r-th step, by the two steps, as a ratio to one without:")
    lines = [["", *(f"f_r = {every}" for every in INTERVALS)]]
    for name in rows:
        if name.startswith(f"{STEP},"):
            more = ratio(rows, name, STEP) - 1
            lines.append([name.removeprefix(f"{STEP}, "), *(f"{1 + more / every:.2f}" for every in INTERVALS)])
    report.print_columns(lines)

    if compared := comparisons(config, numbers):
        print("\nours and theirs, the ratio of times within a round:")
        lines = [["", "beside", "ours / theirs", "ahead"]]
        for ours, theirs, quotient in compared:
            ahead = "ours" if quotient < 1 else theirs.partition(":")[0]
            lines.append([ours, theirs, f"{quotient:.2f}", ahead])
        report.print_columns(lines)


def ratio(rows: dict, name: str, other: str) -> float:
    """The median over rounds of the time of a row (for one probe) in times of another."""
    quotients = report.ratio(rows[name]["seconds"], rows[other]["seconds"])
    return float(np.median(quotients)) / rows[name]["per"] * rows[other]["per"]


def comparisons(config: Config, numbers: dict) -> list[tuple[str, str, float]]:
    """(our row, that of a peer, time of ours / time of theirs) of those that were timed."""
    rows, steps, probes = numbers["rows"], config.num_steps, config.num_probes
    theirs = peers.LANCZOS.format(steps)
    pairs = [
        ("gradient", peers.GRADIENT),
        (PRODUCT, peers.PRODUCT),
        (PRODUCT, peers.HVP),
        ("GGN product, one of many", peers.GGN),
        (LANCZOS.format(steps), theirs),
        (LANCZOS.format(steps), MATFREE.format(steps)),
        (TRACES.format("GGN", f"a probe of {probes}"), peers.TRACES),
        (TRACES.format("GGN", "1 probe"), peers.TRACES),
        (PENALTY.format("GGN"), peers.PENALTY),
        (PENALTY.format("Hessian"), peers.PENALTY),
    ]
    found = [(ours, other, ratio(rows, ours, other)) for ours, other in pairs if {ours, other} <= set(rows)]
    if theirs in rows:
        # PyHessian has no GGN and no layers: what it could give is a run of Lanczos for each layer and for the net.
        runs = numbers["layers"] + 1
        found.append((LAYERS, f"{theirs}, {runs} times", ratio(rows, LAYERS, theirs) / runs))
    return found


def _problem(config):
    """(net, parameters, batch, layers)."""
    model = models.build(config.model, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (28, 28, 1) if config.model == "lenet" else (32, 32, 3)
    images = jax.random.normal(keys[0], (config.batch_size, *shape))
    variables = jax.jit(model.init)(keys[1], images[:1])
    batch = {"image": images, "label": jax.random.randint(keys[2], (config.batch_size,), 0, 10)}
    if "batch_stats" in variables:
        batch["batch_stats"] = variables["batch_stats"]
    params = variables["params"]
    return model, params, batch, jh.layer_names(params, models.objective(model), batch)


def make_rows(config: Config) -> dict[str, tuple[Callable, int]]:
    """{name: (function to time, what its time is divided by)}."""
    model, params, batch, _ = _problem(config)
    loss, key = models.objective(model), jax.random.key(1)

    gradient = jax.jit(jax.grad(loss))
    hessian, ggn = jh.hessian(loss, params, batch), jh.ggn(loss, params, batch)
    linear, linear_ggn = jh.linearize(hessian, like=params), jh.linearize(ggn, like=params)
    start = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
    probes, steps = config.num_probes, config.num_steps
    curvatures = {"GGN": "ggn", "Hessian": "hessian"}
    penalties = {
        words: jax.jit(partial(jh.hessian_trace_penalty, loss, key=key, curvature=curvature))
        for words, curvature in curvatures.items()
    }

    def traces(curvature, count):
        few = {"num_probes": count, "chunk_size": probes, "method": "hutchinson"}
        return jh.layer_traces(loss, params, batch, key=key, curvature=curvature, **few)

    def gram():
        options = dict(curvature="ggn", method="gram", max_bytes=measure.GRAM_BYTES)
        return jh.layer_spectra(loss, params, batch, key=key, **options)["total"].nodes

    rows = {
        "gradient": (lambda: gradient(params, batch), 1),
        "HVP": (lambda: hessian(start), 1),
        PRODUCT: (lambda: linear(start), 1),
        "GGN product": (lambda: ggn(start), 1),
        "GGN product, one of many": (lambda: linear_ggn(start), 1),
    }
    for words, curvature in curvatures.items():
        rows[TRACES.format(words, "1 probe")] = (partial(traces, curvature, 1), 1)
        rows[TRACES.format(words, f"a probe of {probes}")] = (partial(traces, curvature, probes), probes)
    for words, penalty in penalties.items():
        rows[PENALTY.format(words)] = (partial(penalty, params, batch), 1)
    if config.lanczos:
        rows[LANCZOS.format(steps)] = (lambda: jh.lanczos(linear, start, steps), 1)
        short = partial(jh.lanczos, linear, start, steps, reorthogonalize=False)
        rows[f"{LANCZOS.format(steps)}, three vectors"] = (short, 1)
        rows[LAYERS] = (gram, 1)
    if config.lanczos and config.one_program:
        rows[f"{LANCZOS.format(steps)}, one program"] = (_inside_jit(linear, start, steps), 1)
        if importlib.util.find_spec("matfree"):
            rows[MATFREE.format(steps)] = (_matfree_lanczos(linear, start, steps), 1)
    return rows | _training_steps(config, model, batch)


def _training_steps(config, model, batch):
    """A step of SGD, and with the penalty: of one probe by the GGN, and of n by either form."""
    count = config.batch_size
    split = {
        "image": np.random.default_rng(0).integers(256, size=batch["image"].shape, dtype=np.uint8),
        "label": np.asarray(batch["label"], np.int32),
    }
    dataset, plain = Dataset.create("random", 10, split, split), TrainConfig(batch_size=count)
    steps = {STEP: plain}
    for words, curvature, probes in (
        ("GGN", "ggn", 1),
        ("GGN", "ggn", config.penalty_probes),
        ("Hessian", "hessian", config.penalty_probes),
    ):
        penalty = Penalty(gamma=1e-6, every=1, num_probes=probes, curvature=curvature)
        steps[STEP_WITH.format(words, probes)] = dataclasses.replace(plain, penalty=penalty)
    return {name: (partial(Stepper(model, dataset, settings).advance, 1), 1) for name, settings in steps.items()}


def _inside_jit(operator, start, num_steps):
    return partial(jax.jit(lambda op, v: jh.lanczos(op, v, num_steps)), operator, start)


def _matfree_lanczos(operator, start, num_steps):
    """matfree's tridiagonalisation, full reorthogonalisation, in one program with the product."""
    from matfree import decomp

    flat, unravel = ravel_pytree(start)

    @jax.jit
    def decompose(op, vector):
        tridiag = decomp.tridiag_sym(num_steps, reortho="full", materialize=True)
        return tridiag(lambda v: ravel_pytree(op(unravel(v)))[0], vector / jnp.linalg.norm(vector))

    return partial(decompose, operator, flat)
