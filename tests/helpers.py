"""The oracles: dense matrices in float64, closed forms in numpy, made spectra, and small nets in plain JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import jaxhess as jh

KINDS = ("hessian", "ggn", "functional")
OPERATORS = {"hessian": jh.hessian, "ggn": jh.ggn, "functional": jh.functional_hessian}


# ---- problems: an objective with parameters and a batch, in float32 ----


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """An objective at a point. Parameters are dicts of layers (of submodules "a/b") of arrays."""

    objective: jh.Objective
    params: dict
    batch: Any

    def cast(self, dtype):
        """The same with floating-point arrays of another type."""
        return dataclasses.replace(self, params=cast(self.params, dtype), batch=cast(self.batch, dtype))

    def operator(self, kind, layer=None):
        return OPERATORS[kind](self.objective, self.params, self.batch, layer=layer)


def cast(tree, dtype):
    """A tree with its floating-point arrays in another type."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def normal(seed, *shape, scale=1.0):
    """Normal numbers in float32, the same for the same seed."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def dense_layers(sizes, seed=0, names=None):
    """Parameters of fully connected layers, biases random too."""
    names = names or [f"fc{i}" for i in range(1, len(sizes))]
    return {
        name: {"b": normal([seed, i, 0], m, scale=0.3), "w": normal([seed, i, 1], n, m, scale=n**-0.5)}
        for i, (name, n, m) in enumerate(zip(names, sizes, sizes[1:], strict=False))
    }


def affine(layer, x):
    y = x @ layer["w"]
    return y + jnp.broadcast_to(layer["b"], y.shape)


def mlp(params, batch):
    """tanh(... tanh(x W + b) ...) W + b, layer after layer in the order of their names."""
    *hidden, last = (params[name] for name in sorted(params))
    x = batch["x"]
    for layer in hidden:
        x = jnp.tanh(affine(layer, x))
    return affine(last, x)


def batchnorm_net(params, batch):
    """fc1, batch norm, dropout, fc2: in training mode, or with statistics in the batch; dropout where it has a key."""
    x = affine(params["fc1"], batch["x"])
    mean, var = batch["stats"] if "stats" in batch else (x.mean(0), x.var(0))
    x = (x - mean[None]) / jnp.sqrt(var + 1e-3)[None]
    x = jnp.tanh(x * params["norm"]["scale"][None] + params["norm"]["bias"][None])
    if "key" in batch:
        x = x * jnp.where(jax.random.uniform(batch["key"], x.shape, jnp.float32) < 0.5, 2, 0)
    return affine(params["fc2"], x)


def conv_net(params, batch):
    """conv, batch norm, tanh, means over the pixels, fc on images (N, 1, H, W); statistics as in `batchnorm_net`."""
    x = jax.lax.conv_general_dilated(batch["x"], params["conv"]["w"], (1, 1), "SAME")
    mean, var = batch["stats"] if "stats" in batch else (x.mean((0, 2, 3)), x.var((0, 2, 3)))
    mean, scale = mean[None, :, None, None], params["norm"]["scale"] / jnp.sqrt(var + 1e-3)
    x = jnp.tanh((x - mean) * scale[None, :, None, None] + params["norm"]["bias"][None, :, None, None])
    return affine(params["fc"], x.mean((2, 3)))


def lenet(params, batch):
    """6-16-120-84-10 on images (N, 1, 28, 28)."""

    def conv(layer, x, padding):
        y = jax.lax.conv_general_dilated(x, layer["w"], (1, 1), padding)
        y = jax.nn.relu(y + layer["b"][None, :, None, None])
        n, c, h, w = y.shape
        return y.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))

    x = conv(params["conv1"], batch["x"], "SAME")
    x = conv(params["conv2"], x, "VALID").reshape(len(x), -1)
    x = jax.nn.relu(affine(params["fc1"], x))
    x = jax.nn.relu(affine(params["fc2"], x))
    return affine(params["fc3"], x)


def gpt(params, batch):
    """The experiments' GPT with 4 heads, written out: logits (N, T, C) of characters (N, T)."""

    def norm(layer, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * layer["scale"][None, None] + layer["bias"][None, None]

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"][None, None]

    tokens = batch["image"]
    x = params["token"]["embedding"][tokens] + params["position"]["embedding"][None, : tokens.shape[1]]
    earlier = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None, None]
    for name in sorted(name for name in params if name.startswith("block")):
        block, y = params[name], norm(params[name]["norm1"], x)
        heads = (*y.shape[:2], 4, y.shape[2] // 4)
        query, key, value = (dense(block["attn"][part], y).reshape(heads) for part in ("query", "key", "value"))
        scores = jnp.einsum("nthf,nshf->nhts", query, key) / heads[-1] ** 0.5
        mixed = jnp.einsum("nhts,nshf->nthf", jax.nn.softmax(jnp.where(earlier, scores, -1e30)), value)
        x = x + dense(block["attn"]["out"], mixed.reshape(x.shape))
        x = x + dense(block["proj"], jax.nn.gelu(dense(block["fc"], norm(block["norm2"], x))))
    return dense(params["head"], norm(params["norm"], x))


@functools.cache
def trained_gpt(sequences=4) -> Problem:
    """The net of tests/data/gpt.npz at some of its sequences; `make_gpt.py` beside it says how it was trained."""
    with np.load(pathlib.Path(__file__).parent / "data" / "gpt.npz") as kept:
        params: dict = {}
        for name in (name for name in kept.files if name.startswith("params/")):
            *path, leaf = name.split("/")[1:]
            functools.reduce(lambda tree, key: tree.setdefault(key, {}), path, params)[leaf] = kept[name]
        batch = {name: kept[name][:sequences].astype(np.int32) for name in ("image", "label")}
    return Problem(jh.Objective(gpt, jh.cross_entropy), params, batch)


def softplus_sum(outputs, batch):
    """A convex criterion that the library does not know: the mean over rows of sum_c softplus(o_c - o_{c+1} + y_c)."""
    margins = outputs - jnp.roll(outputs, 1, -1) + jax.nn.one_hot(batch["label"], outputs.shape[-1])
    return jax.nn.softplus(margins).sum(-1).mean()


def labels(seed, classes, *shape):
    # int32, for jit (jax 0.10) mixes up int64 numpy arrays that it has met with and without x64.
    return np.random.default_rng(seed).integers(classes, size=shape, dtype=np.int32)


def _classification(predict, params, x, classes, criterion=jh.cross_entropy, **more):
    batch = {"x": x, "label": labels(7, classes, *x.shape[:-1]), **more}
    return Problem(jh.Objective(predict, criterion), params, batch)


@functools.cache
def problem(name) -> Problem:
    """The problems that many tests share."""
    x = normal(1, 7, 3)
    match name:
        case "softmax regression":
            return _classification(mlp, dense_layers([3, 4]), x, 4)
        case "linear regression":
            batch = {"x": x, "label": normal(2, 7, 2)}
            return Problem(jh.Objective(mlp, jh.squared_error), dense_layers([3, 2]), batch)
        case "mlp":
            return _classification(mlp, dense_layers([3, 4, 3]), x, 3)
        case "mlp, squared error":
            batch = {"x": x, "label": normal(2, 7, 3)}
            return Problem(jh.Objective(mlp, jh.squared_error), dense_layers([3, 4, 3]), batch)
        case "mlp, own criterion":
            return _classification(mlp, dense_layers([3, 4, 3]), x, 3, softplus_sum)
        case "sequence":
            return _classification(mlp, dense_layers([3, 4, 3]), normal(1, 3, 2, 3), 3)
        case "batch norm":
            norm = {"scale": normal(3, 4) + 1, "bias": normal(4, 4)}
            params = dense_layers([3, 4, 3]) | {"norm": norm}
            return _classification(batchnorm_net, params, x, 3)
        case "batch statistics and dropout":
            bare = problem("batch norm")
            more = {"stats": (normal(5, 4), normal(6, 4) ** 2), "key": jax.random.key(3)}
            return Problem(bare.objective, bare.params, bare.batch | more)
        case "conv, batch norm":
            norm = {"scale": normal(3, 4) + 1, "bias": normal(4, 4)}
            conv = {"w": normal(11, 4, 1, 3, 3, scale=0.5)}
            params = {"conv": conv, "norm": norm} | dense_layers([4, 3], names=["fc"])
            batch = {"x": normal(15, 7, 1, 5, 5), "label": labels(7, 3, 7)}
            return Problem(jh.Objective(conv_net, jh.cross_entropy), params, batch)
        case "conv, batch statistics":
            bare = problem("conv, batch norm")
            return Problem(bare.objective, bare.params, bare.batch | {"stats": (normal(5, 4), normal(6, 4) ** 2)})
        case "lenet":
            params = {
                "conv1": {"w": normal(11, 6, 1, 5, 5, scale=0.3), "b": normal(12, 6, scale=0.3)},
                "conv2": {"w": normal(13, 16, 6, 5, 5, scale=0.1), "b": normal(14, 16, scale=0.3)},
            } | dense_layers([400, 120, 84, 10], names=["fc1", "fc2", "fc3"])
            batch = {"x": normal(15, 2, 1, 28, 28), "label": labels(16, 10, 2)}
            return Problem(jh.Objective(lenet, jh.cross_entropy), params, batch)
    raise KeyError(name)


SMALL = ["softmax regression", "linear regression", "mlp", "mlp, own criterion", "sequence", "batch norm"]


# ---- dense matrices ----


@functools.cache
def matrices(problem: Problem) -> dict[str, np.ndarray]:
    """Hess, G = J' S J and Hess - G of the whole net, in float64 by jax.hessian on raveled parameters."""
    with jax.enable_x64(True):
        problem = problem.cast(jnp.float64)
        flat, unravel = ravel_pytree(problem.params)

        def all_three(flat, batch):
            def predict(w):
                return problem.objective.predict(unravel(w), batch)

            outputs = predict(flat)
            slopes = jax.jacrev(predict)(flat).reshape(outputs.size, flat.size)
            curvature = jax.hessian(lambda o: problem.objective.criterion(o.reshape(outputs.shape), batch))(
                outputs.ravel()
            )
            hess = jax.hessian(lambda w: problem.objective(unravel(w), batch))(flat)
            return hess, slopes.T @ curvature @ slopes

        hess, ggn = map(np.asarray, jax.jit(all_three)(flat, problem.batch))
    return {"hessian": hess, "ggn": ggn, "functional": hess - ggn}


def positions(params, layer) -> np.ndarray:
    """Where a layer's parameters lie among the raveled ones; all of them for None."""
    numbers = np.arange(len(ravel(params)))
    return numbers if layer is None else ravel(node(unravel(numbers, params), layer))


def node(tree, path):
    """The node of nested dicts at a path "a/b"."""
    return functools.reduce(lambda t, key: t[key], path.split("/"), tree)


def dense(problem: Problem, kind: str, layer: str | None = None) -> np.ndarray:
    """The matrix of the whole net or the diagonal block of one layer."""
    where = positions(problem.params, layer)
    return matrices(problem)[kind][np.ix_(where, where)]


@functools.cache
def block_hessian(problem: Problem, layer: str) -> np.ndarray:
    """jax.hessian of the loss as a function of one layer, in float64; in chunks of columns, for large layers."""
    with jax.enable_x64(True):
        problem = problem.cast(jnp.float64)
        flat, unravel = ravel_pytree(problem.params[layer])

        @jax.jit
        def columns(params, batch, directions):
            def slope(w):
                return jax.grad(lambda w: problem.objective(params | {layer: unravel(w)}, batch))(w)

            return jax.vmap(lambda v: jax.jvp(slope, (flat,), (v,))[1])(directions)

        chunk = min(302, flat.size)
        return _in_chunks(lambda d: columns(problem.params, problem.batch, d), flat.size, flat.dtype, chunk)


@functools.cache
def block_ggn(problem: Problem, layer: str) -> np.ndarray:
    """J' S J of one layer for cross-entropy, with S by its formula in numpy, in float64."""
    with jax.enable_x64(True):
        problem = problem.cast(jnp.float64)
        flat, unravel = ravel_pytree(problem.params[layer])

        @jax.jit  # what it would close over, XLA up to JAX 0.7 computes wrongly while it compiles
        def rows(w, params, batch):
            def predict(w):
                return problem.objective.predict(params | {layer: unravel(w)}, batch)

            return predict(w), jax.jacrev(predict)(w)

        outputs, slopes = rows(flat, problem.params, problem.batch)
    p = softmax(np.asarray(outputs))
    slopes = np.asarray(slopes)
    half = p[..., None] * (slopes - np.einsum("nc,ncp->np", p, slopes)[:, None])
    return np.einsum("ncp,ncq->pq", slopes, half) / len(p)


def matrix(operator: Callable, like, chunk: int | None = None) -> np.ndarray:
    """The matrix of an operator, column by column in the order of ravel_pytree; with a chunk, so many at a time."""
    flat = ravel(like)
    if chunk:
        return _in_chunks(lambda directions: _columns(operator, like, directions), flat.size, flat.dtype, chunk)
    return np.stack([ravel(operator(unravel(row, like))) for row in np.eye(flat.size, dtype=flat.dtype)], 1)


@jax.jit
def _columns(operator, like, directions):
    _, unravel = ravel_pytree(like)
    return jax.vmap(lambda v: ravel_pytree(operator(unravel(v)))[0])(directions)


def _in_chunks(columns, dim, dtype, chunk):
    eye = np.eye(-(-dim // chunk) * chunk, dim, dtype=dtype)  # chunks of one shape: zeros at the end
    parts = [np.asarray(columns(eye[i : i + chunk])) for i in range(0, len(eye), chunk)]
    return np.concatenate(parts)[:dim].T


def ravel(tree) -> np.ndarray:
    """ravel_pytree in numpy, which compiles nothing; of what several processes hold too."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return np.concatenate([np.ravel(whole(x)) for x in jax.tree.leaves(tree)])


def unravel(flat, like):
    """A tree like another from its raveled entries, in numpy."""
    leaves, treedef = jax.tree.flatten(like)
    parts = np.split(flat, np.cumsum([np.size(x) for x in leaves])[:-1])
    return jax.tree.unflatten(treedef, [part.reshape(np.shape(x)) for part, x in zip(parts, leaves, strict=True)])


def distance(a, b, scale=None) -> float:
    """|a - b| / |scale| in the Frobenius norm, scale = b unless given."""
    return np.linalg.norm(a - b) / np.linalg.norm(b if scale is None else scale)


# ---- closed forms, in numpy ----


def softmax(outputs):
    p = np.exp(outputs - outputs.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def regression_hessian(x, output_hessians):
    """1/N sum_n S_n (x) (1, x_n)(1, x_n)' in the order of ravel_pytree({"b": (C,), "w": (D, C)})."""
    count, classes = output_hessians.shape[:2]
    x = np.concatenate([np.ones((len(x), 1)), np.asarray(x, np.float64)], 1)
    blocks = np.einsum("ni,nj,nab->iajb", x, x, output_hessians) / count
    return blocks.reshape(x.shape[1] * classes, -1)


def cross_entropy_hessians(outputs):
    """diag(p) - p p' of each row."""
    p = softmax(outputs)
    return p[..., None] * np.eye(p.shape[-1]) - p[..., None] * p[..., None, :]


# ---- matrices with prescribed spectra, as operators ----


def as_operator(array) -> Partial:
    """v -> A v for a matrix, or diag(a) v for a vector; one compilation a shape."""
    array = jnp.asarray(array)
    return Partial(_diagonal if array.ndim == 1 else _dense, array)


def _diagonal(array, v):
    return array * v


def _dense(array, v):
    with jax.default_matmul_precision("float32"):
        return array @ v


def rotated(values, seed=0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors, in float64."""
    q = scipy.stats.ortho_group.rvs(len(values), random_state=seed)
    return (q * values) @ q.T


@functools.cache
def bulk(name, count, seed=0) -> np.ndarray:
    """Eigenvalues without outliers."""
    rng = np.random.default_rng(seed)
    match name:
        case "Marchenko-Pastur":
            return np.linalg.svd(rng.standard_normal((count, 2 * count)), compute_uv=False) ** 2 / (2 * count)
        case "semicircle":
            noise = rng.standard_normal((count, count))
            return np.linalg.eigvalsh(noise + noise.T) / np.sqrt(8 * count)
        case "exponential decay":
            return 10.0 ** np.linspace(0, -6, count)
    raise KeyError(name)


# ---- other processes ----


@contextlib.contextmanager
def interruptible():
    """SIGINT interrupts in the block, and what starts there, where it is ignored: in a script's job or under nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def processes():
    """Popen for programs that SIGINT interrupts and that end with the block, and all that they started with them."""
    started = []

    def popen(*args, **options):
        with interruptible():
            started.append(subprocess.Popen(*args, start_new_session=True, **options))
        return started[-1]

    try:
        yield popen
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in started:
            with process:  # waits, and closes the pipes
                pass


# ---- counting ----


_COUNTS: list[list[float]] = []  # of the blocks that count now


@functools.cache
def _listen():
    """Registered once and for all: JAX 0.6 cannot unregister a listener."""

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            for events in _COUNTS:
                events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)


@contextlib.contextmanager
def counted_compilations():
    """A list that gets one entry for each compilation in the block."""
    _listen()
    events: list[float] = []
    _COUNTS.append(events)
    try:
        yield events
    finally:
        _COUNTS[:] = [open_list for open_list in _COUNTS if open_list is not events]


class Counter:
    """A function that counts its calls from Python: under jit, its traces."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


# ---- data ----


def made_dataset(train_images, test_images, shape, num_classes, name="made"):
    """Random images, the classes in turn."""
    from experiments import data  # which the two-process test's workers do without

    rng = np.random.default_rng(0)
    label = np.arange(train_images + test_images, dtype=np.int32) % num_classes
    image = rng.integers(0, 256, (len(label), *shape), dtype=np.uint8)
    splits = (slice(train_images), slice(train_images, None))
    return data.Dataset.create(name, num_classes, *({"image": image[part], "label": label[part]} for part in splits))
