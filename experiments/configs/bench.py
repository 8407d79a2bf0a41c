"""Times every product and estimator, as milliseconds and as ratios to one gradient of the same net and batch.

    python -m experiments.run bench model=lenet batch_size=64

About 3 minutes for LeNet on two CPU cores, most of it compiling. All rows are timed in turn in each of ``repeats``
rounds, so that what slows the machine slows them all; the medians over rounds are printed. With the package
``matfree`` installed its Lanczos runs beside ours, on the same compiled product.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import platform
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jaxhess as jh
from experiments import models, results
from experiments.measure import progress_bar
from experiments.train import objective


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
      model: name of the net.
      batch_size: images in the batch; random, since the time does not depend on them.
      num_classes: number of classes.
      size: side of the images.
      channels: channels of the images.
      repeats: rounds.
      num_probes: probes at once, for the traces.
      num_steps: Lanczos steps.
      matfree: also time matfree's Lanczos, where it is installed.
    """

    model: str = "lenet"
    batch_size: int = 64
    num_classes: int = 10
    size: int = 28
    channels: int = 1
    repeats: int = 5
    num_probes: int = 8
    num_steps: int = 100
    matfree: bool = True


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Times all rows, prints the table and saves it."""
    rows = make_rows(config)
    first, times = {}, {name: [] for name in rows}
    with progress_bar("compiling and timing") as report:
        total = len(rows) * (config.repeats + 1)
        for name, (function, _) in rows.items():
            first[name] = _seconds(function)
            report(len(first), total)
        for repeat in range(config.repeats):
            for number, (name, (function, _)) in enumerate(rows.items(), 1):
                times[name].append(_seconds(function))
                report(len(rows) * (repeat + 1) + number, total)
    medians = {name: float(np.median(times[name])) / per for name, (_, per) in rows.items()}
    numbers = {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {jax.default_backend()}, jax {jax.__version__}",
        "rows": {
            name: {
                "ms": 1e3 * seconds,
                # Ratios within a round, then their median: a slow round slows both.
                "gradients": float(np.median(np.divide(times[name], times["gradient"]))) / rows[name][1],
                "first_call_s": first[name],
            }
            for name, seconds in medians.items()
        },
    }
    results.save_json(out_dir / "numbers.json", numbers)


def draw(out_dir: pathlib.Path) -> None:
    """Prints the table from the saved numbers."""
    numbers, config = results.load_json(out_dir / "numbers.json"), results.load_json(out_dir / "config.json")
    width = max(map(len, numbers["rows"]))
    about = f"{config['model']}, batch {config['batch_size']}, medians of {config['repeats']} rounds"
    print(f"{about}; {numbers['machine']}")
    print(f"{'':{width}}  {'ms':>9}  {'gradients':>9}  {'first call, s':>13}")
    for name, row in numbers["rows"].items():
        print(f"{name:{width}}  {row['ms']:9.2f}  {row['gradients']:9.2f}  {row['first_call_s']:13.1f}")


def make_rows(config: Config) -> dict[str, tuple[Callable, int]]:
    """{name: (function to time, what its time is divided by)}."""
    model = models.build(config.model, config.num_classes)
    keys = jax.random.split(jax.random.key(0), 5)
    images = jax.random.normal(keys[0], (config.batch_size, config.size, config.size, config.channels))
    variables = jax.jit(model.init)(keys[1], images[:1])
    params = variables["params"]
    batch = {"image": images, "label": jax.random.randint(keys[2], (config.batch_size,), 0, config.num_classes)}
    if "batch_stats" in variables:
        batch["batch_stats"] = variables["batch_stats"]
    loss = objective(model)

    gradient = jax.jit(jax.grad(loss))
    hessian, ggn = jh.hessian(loss, params, batch), jh.ggn(loss, params, batch)
    linear, linear_ggn = jh.linearize(hessian, like=params), jh.linearize(ggn, like=params)
    start = jax.tree.map(lambda x: jax.random.normal(keys[3], x.shape), params)
    probes = config.num_probes
    penalties = {
        curvature: jax.jit(partial(jh.hessian_trace_penalty, loss, key=keys[4], curvature=curvature))
        for curvature in ("ggn", "hessian")
    }

    def traces(curvature, count):
        return jh.layer_traces(
            loss, params, batch, key=keys[4], num_probes=count, chunk_size=probes, curvature=curvature
        )

    rows = {
        "gradient": (lambda: gradient(params, batch), 1),
        "HVP": (lambda: hessian(start), 1),
        "HVP, one of many at a point": (lambda: linear(start), 1),
        "GGN product": (lambda: ggn(start), 1),
        "GGN product, one of many": (lambda: linear_ggn(start), 1),
        "all layer traces, GGN, 1 probe": (lambda: traces("ggn", 1), 1),
        f"all layer traces, GGN, a probe of {probes}": (lambda: traces("ggn", probes), probes),
        "all layer traces, Hessian, 1 probe": (lambda: traces("hessian", 1), 1),
        f"all layer traces, Hessian, a probe of {probes}": (lambda: traces("hessian", probes), probes),
        "HTR gradient, GGN, 1 probe": (lambda: penalties["ggn"](params, batch), 1),
        "HTR gradient, Hessian, 1 probe": (lambda: penalties["hessian"](params, batch), 1),
        f"{config.num_steps} Lanczos steps": (lambda: jh.lanczos(linear, start, config.num_steps), 1),
        f"{config.num_steps} Lanczos steps, three vectors": (
            lambda: jh.lanczos(linear, start, config.num_steps, reorthogonalize=False),
            1,
        ),
        f"{config.num_steps} Lanczos steps, one program": (_inside_jit(linear, start, config.num_steps), 1),
    }
    if config.matfree and importlib.util.find_spec("matfree"):
        rows[f"{config.num_steps} Lanczos steps, matfree"] = (_matfree_lanczos(linear, start, config.num_steps), 1)
    return rows


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


def _seconds(function):
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
