"""Accuracy of traces and spectra beside other libraries: the same matrices, the same numbers of products.

    python -m experiments.run accuracy model=lenet dataset=mnist peers=true

The matrices are made once, in float32, and are given to all. Five have prescribed eigenvalues; two are blocks of the
curvature of a trained net. With the package ``matfree`` installed its estimators run beside ours. With ``peers=true``
PyHessian and curvlinops do the same work in an environment of their own, which is made beside the folder of the
results. Times are those of a dense matrix on a machine that may be busy: a hint, no more.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.tree_util import Partial

import jaxhess as jh
from experiments import figures, folders, measure, models, names, report, store
from experiments.bench import peers, trials


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to estimate.

    Attributes:
      products: numbers of products with the matrix, even.
      repeats: random keys of each estimate.
      dim: width of the matrices with prescribed eigenvalues.
      ggn_layer: the layer of the net whose block of the Gauss-Newton matrix is taken.
      hessian_layers: the layers of the net whose common block of the Hessian is taken. With several it is indefinite;
        for a single layer of a piecewise linear net it would be that of the Gauss-Newton matrix.
      peers: ask PyHessian and curvlinops too.
      peers_python: interpreter of an environment with the packages of experiments/bench/peers.txt; by default one is
        made beside the results.
    """

    products: tuple[int, ...] = (32, 64, 128)
    repeats: int = 20
    dim: int = 1000
    ggn_layer: str = "conv2"
    hessian_layers: tuple[str, ...] = ("conv1", "fc3")
    peers: bool = False
    peers_python: str = dataclasses.field(default="", metadata={"kept": False})  # of this machine alone


CHECKS = 6  # products of `jaxhess.spectrum` that tell how far its products can be trusted
ROUNDING = 1e-6  # of the sum of absolute eigenvalues: errors below it are those of float32
SPECTRUM = "jaxhess: spectrum"
DEFLATED, PLAIN = f"{SPECTRUM}, deflated", f"{SPECTRUM}, plain"


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Makes the matrices, estimates, and saves the errors of every key."""
    _check(config)
    made = made_matrices(config.dim, config.seed) | _net_matrices(config, out_dir, data_dir)
    matrices = {name: (0.5 * (matrix + matrix.T)).astype(np.float32) for name, matrix in made.items()}
    eigenvalues = {name: np.linalg.eigvalsh(matrix.astype(np.float64)) for name, matrix in matrices.items()}
    wanted = {"products": list(config.products), "repeats": config.repeats}
    found: dict[str, np.ndarray] = {}
    versions = {"jaxhess": importlib.metadata.version("jaxhess")}
    if importlib.util.find_spec("matfree"):
        versions["matfree"] = importlib.metadata.version("matfree")
    with measure.progress_bar("estimating") as progress:
        for done, (name, matrix) in enumerate(matrices.items()):
            progress(done, len(matrices))
            traces, spectra = _estimators(jnp.asarray(matrix), eigenvalues[name], "matfree" in versions)
            for row, estimate in traces.items():
                found[f"{name}/trace/{row}"] = trials.traces(estimate, **wanted)
            for row, quadrature in spectra.items():
                found[f"{name}/spectrum/{row}"] = trials.distances(quadrature, eigenvalues[name], **wanted)
    if config.peers:
        python = config.peers_python or peers.environment(out_dir.parent / ".peers")
        theirs, more = _ask(python, matrices, eigenvalues, wanted)
        found, versions = found | theirs, versions | more
    truths = {name: float(np.trace(matrix.astype(np.float64))) for name, matrix in matrices.items()}
    arrays = {
        path: scaled(path.split("/")[1], trial, truths[path.split("/")[0]], eigenvalues[path.split("/")[0]])
        for path, trial in found.items()
    }
    store.save_arrays(out_dir / "numbers.npz", {path: x.astype(np.float32) for path, x in arrays.items()})
    about = {
        name: {
            "dim": len(values),
            "trace": truths[name],
            "sum_of_absolute_values": float(np.abs(values).sum()),
            "lambda_max": float(values[-1]),
            "lambda_min": float(values[0]),
        }
        for name, values in eigenvalues.items()
    }
    machine = report.machine(jax.default_backend(), jax.__version__)
    store.save_json(out_dir / "numbers.json", {"machine": machine, "versions": versions, "matrices": about})


def _check(config):
    for count in config.products:
        if count % 2 or not 12 <= count < config.dim:
            raise ValueError(
                f"products must be even, at least 12 and fewer than dim={config.dim}, since XTrace takes two for each "
                f"vector and {CHECKS} of those of jaxhess.spectrum are checks; got {count}"
            )


def scaled(kind: str, found: np.ndarray, trace: float, eigenvalues: np.ndarray) -> np.ndarray:
    """Errors as shares: of the sum of absolute eigenvalues for a "trace", of their mean for a "spectrum".

    Args:
      kind: "trace" or "spectrum".
      found: from `experiments.bench.trials`: (..., 3) with estimate, standard error and seconds, or (..., 2) with the
        distance and seconds.
      trace: the exact one.
      eigenvalues: all of them.

    Returns:
      An array of the same shape, with the error in place of the estimate.
    """
    absolute = np.abs(eigenvalues)
    *columns, seconds = np.moveaxis(found, -1, 0)
    if kind == "trace":
        mean, error = columns
        columns = [(mean - trace) / absolute.sum(), error / absolute.sum()]
    else:
        columns = [columns[0] / absolute.mean()]
    return np.stack([*columns, seconds], axis=-1)


# ---- matrices ----


def made_matrices(dim: int, seed: int) -> dict[str, np.ndarray]:
    """Symmetric float64 matrices with prescribed eigenvalues and random eigenvectors, {name: (dim, dim)}."""
    rng = np.random.default_rng(seed)
    bulk, top, tenth = rng.normal(size=dim), np.linspace(1, 10, 10), dim // 10
    eigenvalues = {
        "flat": np.linspace(0.5, 1.5, dim),
        "bulk and outliers": np.append(top, 0.02 * bulk[10:] ** 2),
        "power law": 1 / np.arange(1.0, dim + 1),
        "indefinite": np.concatenate([top, -0.2 * top, 0.02 * bulk[20:]]),
        "low rank": np.append(np.linspace(0.1, 10, tenth), np.zeros(dim - tenth)),
    }
    found = {}
    for name, values in eigenvalues.items():
        basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
        found[name] = (basis * values) @ basis.T
    return found


def _net_matrices(config, out_dir, data_dir):
    """Dense blocks of G and of the Hessian of the trained net."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    loss, params = models.objective(model), trained.params
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    there = jh.layer_names(params, loss, batch)
    for layer in (config.ggn_layer, *config.hessian_layers):
        names.check("layer", layer, there)
    products = {"G": jh.ggn(loss, params, batch), "Hess": jh.hessian(loss, params, batch)}
    layers = {"G": (config.ggn_layer,), "Hess": config.hessian_layers}
    return {
        f"{kind}, {' and '.join(layers[kind])}": dense_block(operator, params, layers[kind])
        for kind, operator in products.items()
    }


def dense_block(operator: Callable, params: Any, layers: Sequence[str]) -> np.ndarray:
    """The block of an operator that belongs to some layers, column by column."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    numbers = unravel(jnp.arange(len(flat), dtype=flat.dtype))  # exact below 2^24
    leaves = [x for layer in layers for x in jax.tree.leaves(jh.subtree(numbers, layer))]
    some = np.sort(np.concatenate([np.asarray(x, np.int64).ravel() for x in leaves]))
    linear = jh.linearize(operator, like=params)

    @jax.jit
    def column(product, i):
        v = unravel(jnp.zeros_like(flat).at[i].set(1))
        return jax.flatten_util.ravel_pytree(product(v))[0][some]

    return np.stack([np.asarray(column(linear, i), np.float64) for i in some], axis=1)


# ---- estimates ----


def num_steps(products: int, deflated: bool = True) -> int:
    """The most Lanczos steps with which `jaxhess.spectrum` takes no more than so many products, all counted."""
    taken = {s: s + CHECKS + (s // 4 if deflated else 0) for s in range(1, products)}
    return max(s for s, count in taken.items() if count <= products)


def _product(matrix, v):
    return matrix @ v


def _estimators(matrix, eigenvalues, with_matfree):
    """{name: (products, key) -> (trace, standard error)}, {name: (products, key) -> (nodes, weights)}."""
    options = {"operator": Partial(_product, matrix), "like": jnp.zeros(len(matrix), matrix.dtype)}

    def trace(method):
        def estimate(count, key):
            found = jh.trace(key=jax.random.key(key), num_probes=count, method=method, **options)
            return float(found.mean), float(found.std_error)

        return estimate

    def spectrum(count, key, weights):
        steps = num_steps(count, weights == "deflated")
        return jh.spectrum(key=jax.random.key(key), num_steps=steps, weights=weights, **options)

    def trace_of_spectrum(count, key):
        found = spectrum(count, key, "deflated")
        return found.trace, found.std_error("trace")

    def quadrature(weights):
        def nodes_and_weights(count, key):
            found = spectrum(count, key, weights)
            return found.nodes, found.weights

        return nodes_and_weights

    traces = {
        "jaxhess: Hutchinson": trace("hutchinson"),
        "jaxhess: XTrace": trace("xtrace"),
        SPECTRUM: trace_of_spectrum,
    }
    spectra = {DEFLATED: quadrature("deflated"), PLAIN: quadrature("plain")}
    if with_matfree:
        positive = eigenvalues[0] >= -1e-5 * eigenvalues[-1]
        theirs, lanczos = _matfree(matrix, positive)
        traces, spectra = traces | theirs, spectra | {"matfree: Lanczos": lanczos}
    return traces, spectra


def _matfree(matrix, positive):
    """The same of matfree; XNysTrace is for matrices without negative eigenvalues."""
    from matfree import decomp, stochtrace

    like, programs = jnp.zeros(len(matrix), matrix.dtype), {}

    def estimator(integrand, each):
        def estimate(count, key):
            if (each, count) not in programs:
                sampler = stochtrace.sampler_normal(like, num=count // each)
                both = stochtrace.estimator_leave_one_out_mean_and_sem(integrand, sampler)
                programs[each, count] = jax.jit(lambda matrix, key: both(lambda v: matrix @ v, key))
            mean, error = programs[each, count](matrix, jax.random.key(key))
            return float(mean), float(error)

        return estimate

    def lanczos(count, key):
        if count not in programs:
            tridiag = decomp.tridiag_sym(count, reortho="full", materialize=True)
            programs[count] = jax.jit(lambda matrix, v: tridiag(lambda x: matrix @ x, v)[1])
        start = jax.random.normal(jax.random.key(key), like.shape, like.dtype)
        dense = np.asarray(programs[count](matrix, start / jnp.linalg.norm(start)), np.float64)
        if not np.isfinite(dense).all():
            return np.full(count, np.nan), np.full(count, np.nan)
        nodes, vectors = np.linalg.eigh(dense)
        return nodes, vectors[0] ** 2

    traces = {"matfree: XTrace": estimator(stochtrace.leave_one_out_xtrace(), 2)}
    if positive:
        traces["matfree: XNysTrace"] = estimator(stochtrace.leave_one_out_xnystrace(), 1)
    return traces, lanczos


def _ask(python, matrices, eigenvalues, wanted):
    """What `experiments.bench.torch_accuracy` finds, and its versions."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        store.save_arrays(folder / "matrices.npz", matrices)
        store.save_arrays(folder / "eigenvalues.npz", eigenvalues)
        store.save_json(folder / "trials.json", wanted)
        words = [python, "-m", "experiments.bench.torch_accuracy", str(folder)]
        status = subprocess.run(words, cwd=folders.ROOT, stdout=subprocess.DEVNULL).returncode
        if status:
            raise ValueError(f"the peers' process ended with status {status}; what it said is above")
        return store.load_arrays(folder / "peers.npz"), json.loads((folder / "peers.json").read_text())


# ---- tables ----


class Cell(NamedTuple):
    """One number of a table, with what tells it apart from others.

    Attributes:
      value: the root mean square of errors, or the mean of distances; NaN if any is not finite.
      error: the standard error of a mean; NaN for a root mean square.
      count: keys.
    """

    value: float
    error: float
    count: int


def rms(errors: np.ndarray) -> Cell:
    """The root mean square of errors, (keys,)."""
    return Cell(float(np.sqrt(np.mean(np.square(errors)))), np.nan, len(errors))


def mean(distances: np.ndarray) -> Cell:
    """The mean of distances, (keys,)."""
    error = np.std(distances, ddof=1) / len(distances) ** 0.5 if len(distances) > 1 else np.inf
    return Cell(float(np.mean(distances)), float(error), len(distances))


def calibration(errors: np.ndarray, std_errors: np.ndarray) -> float:
    """The root mean square of errors in units of their standard errors: 1 if these are right, more if too small.

    NaN where there are none, or where the errors are those of rounding.
    """
    if not np.isfinite(std_errors).all() or rms(errors).value < ROUNDING:
        return np.nan
    with np.errstate(divide="ignore"):
        return float(np.sqrt(np.mean(np.square(np.abs(errors) / std_errors))))


def leaders(cells: Mapping[str, Cell]) -> set[str]:
    """The name with the smallest value, and those that so few keys do not tell apart from it.

    Two root mean squares are told apart by the F test, two means by twice the standard error of their difference; both
    at 5%, each pair by itself. Values of rounding are alike.
    """
    finite = {name: cell for name, cell in cells.items() if np.isfinite(cell.value)}
    if not finite:
        return set()
    best = min(finite.values(), key=lambda cell: cell.value)

    def alike(cell):
        if cell.value <= ROUNDING:
            return True
        if np.isnan(cell.error):
            limit = scipy.stats.f.ppf(0.975, cell.count, best.count) ** 0.5
            return cell.value <= limit * max(best.value, ROUNDING)
        return cell.value - best.value <= 2 * float(np.hypot(cell.error, best.error))

    return {name for name, cell in finite.items() if alike(cell)}


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the tables from the saved errors."""
    numbers, arrays = store.load_json(out_dir / "numbers.json"), store.load_arrays(out_dir / "numbers.npz")
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {"trace": {}, "spectrum": {}}
    for path, array in arrays.items():
        matrix, kind, row = path.split("/")
        found[kind].setdefault(row, {})[matrix] = array
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    print(f"{figures.about(config, config.model, config.dataset)}; {numbers['machine']}; {versions}")
    if "matfree" not in numbers["versions"]:
        print("without matfree, which is not installed")
    matrices = numbers["matrices"]
    lines = [["matrix", "width", "trace", "lambda_max", "lambda_min"]]
    for name, about in matrices.items():
        values = [about[key] for key in ("trace", "lambda_max", "lambda_min")]
        lines.append([name, str(about["dim"]), *(f"{value:.4g}" for value in values)])
    report.print_columns(lines)
    told = "* the smallest of its column, and all that it is not told apart from"
    for i, count in enumerate(config.products):
        print(f"\ntrace, {count} products: rms error of {config.repeats} keys, % of the sum of |eigenvalues|; {told}")
        _print_block(found["trace"], matrices, lambda x, i=i: rms(x[i, :, 0].astype(float)))
    print(f"\nrms of error / standard error at {', '.join(map(str, config.products))} products; right: 1")
    lines = [["", *matrices]]
    for row, by_matrix in found["trace"].items():
        if any(np.isfinite(x[..., 1]).all() for x in by_matrix.values()):
            lines.append([row, *(_calibrations(by_matrix.get(name)) for name in matrices)])
    report.print_columns(lines)
    for i, count in enumerate(config.products):
        print(f"\nspectrum, {count} products: mean W1 of {config.repeats} keys, % of the mean |eigenvalue|; {told}")
        _print_block(found["spectrum"], matrices, lambda x, i=i: mean(x[i, :, 0].astype(float)))


def _print_block(rows, matrices, cell_of):
    cells = {
        name: {row: cell_of(by_matrix[name]) for row, by_matrix in rows.items() if name in by_matrix}
        for name in matrices
    }
    best = {name: leaders(of_matrix) for name, of_matrix in cells.items()}
    lines = [["", *matrices, "ms (a hint)"]]
    for row, by_matrix in rows.items():
        words = [_word(cells[name].get(row), row in best[name]) for name in matrices]
        seconds = np.median([np.median(x[-1, :, -1]) for x in by_matrix.values()])
        lines.append([row, *words, f"{1e3 * seconds:.0f}"])
    report.print_columns(lines)


def _word(cell, leads):
    if cell is None:
        return "- "
    if not np.isfinite(cell.value):
        return "not finite "
    return ("<0.0001" if cell.value < ROUNDING else f"{100 * cell.value:.3g}") + ("*" if leads else " ")


def _calibrations(found):
    if found is None:
        return "-"
    values = [calibration(x[:, 0].astype(float), x[:, 1].astype(float)) for x in found]
    return " ".join("-" if np.isnan(value) else f"{value:.2f}" for value in values)
