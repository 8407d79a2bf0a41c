"""Pytrees as vectors: random draws, norms, rows stacked along a leading axis, and the precision of products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxhess._checks import at_least_float32, check_choice, is_traced, standard_promotion

PyTree = Any
UNROLLED = 16  # rows of `map_rows` up to here stand one after another; the time to compile grows with them


def full_precision(function: Callable) -> Callable:
    """The function with matrix products in float32: TF32, the default of some GPUs, is too coarse for curvature."""

    @functools.wraps(function)
    def precise(*args):
        with jax.default_matmul_precision("float32"):
            return function(*args)

    return precise


# ---- draws ----


def _rademacher(key, shape, dtype):
    """Signs from one random bit each; jax.random.rademacher draws a whole word, which takes noticeable time."""
    size = int(np.prod(shape, dtype=int))
    words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (1 - 2 * bits.ravel()[:size].astype(dtype)).reshape(shape)


def gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers, drawn flat: a draw of several axes takes XLA a second longer to compile."""
    return jax.random.normal(key, (int(np.prod(shape, dtype=int)),), dtype).reshape(shape)


def _row_by_row(function: Callable) -> Callable:
    """A function of a key and other arrays that gives each row under vmap what it gives that row alone.

    With threefry keys every function does. With other keys (rbg) JAX draws all rows from the first key.
    """
    alone = jax.custom_batching.custom_vmap(function)

    @alone.def_vmap
    def each(size, batched, *args):
        def one(rows):
            rows = iter(rows)
            return alone(*(next(rows) if mapped else x for x, mapped in zip(args, batched, strict=True)))

        return jax.lax.map(one, [x for x, mapped in zip(args, batched, strict=True) if mapped]), True

    def call(key, *more):
        return (function if str(jax.random.key_impl(key)) == "threefry2x32" else alone)(key, *more)

    return call


fold_in = _row_by_row(jax.random.fold_in)


def _sampler(draw):
    return lambda key, shape, dtype: _row_by_row(lambda k: draw(k, shape, dtype))(key)


_SAMPLERS = {"rademacher": _sampler(_rademacher), "gaussian": _sampler(gaussian)}


def sampler(probe: str) -> Callable:
    """``sampler(key, shape, dtype)`` of a probe's name."""
    check_choice("probe", probe, _SAMPLERS)
    return _SAMPLERS[probe]


@functools.partial(jax.jit, static_argnums=2)
def draw_keys(key: jax.Array, first: int, count: int) -> jax.Array:
    """Keys number first, first + 1, ...: the same for the same number, however many are drawn."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.vmap(functools.partial(fold_in, key))(first + jnp.arange(count))


def random_like(key: jax.Array, like: PyTree, distribution: Callable = jax.random.normal) -> PyTree:
    """A random pytree like another, at least in float32, spread over devices as that one is."""
    return _draw_spread(key, like, distribution, tuple(map(spread, jax.tree.leaves(like))))


@functools.partial(jax.jit, static_argnums=2)
def random_rows(keys: jax.Array, like: PyTree, distribution: Callable) -> PyTree:
    """One draw of `random_like` for each key, stacked."""
    return jax.vmap(lambda key: _draw(key, like, distribution))(keys)


def spread(x: Any) -> NamedSharding | None:
    """How an array is spread over devices; None for one device, or where it is not known yet."""
    known = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    sharding = x.sharding if known else None
    return sharding if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1 else None


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw_spread(key, like, distribution, shardings):
    drawn = _draw(key, like, distribution)
    meshes = [sharding.mesh for sharding in shardings if sharding is not None]
    if not meshes:
        return drawn
    # A program runs on one set of devices, so what is not spread itself is copied to all of them.
    copied = NamedSharding(meshes[0], PartitionSpec())
    leaves, treedef = jax.tree.flatten(drawn)
    placed = [jax.lax.with_sharding_constraint(x, s or copied) for x, s in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(treedef, placed)


@standard_promotion
def _draw(key, like, distribution):
    """One draw, cut into leaves: a draw for each leaf takes XLA many times as long to compile."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), at_least_float32(x)), like))
    return unravel(distribution(key, flat.shape, flat.dtype))


@jax.jit
def jitter(key: jax.Array, tree: PyTree, size: float) -> PyTree:
    """A tree with every number moved by a relative ``size``, up or down."""
    signs = optax.tree.cast_like(_draw(key, tree, _rademacher), tree)
    return jax.tree.map(lambda x, sign: x * (1 + jnp.asarray(size, x.dtype) * sign), tree, signs)


def automatic(x: Any) -> Any:
    """An array of a mesh with explicit axes, from which no row can be cut, as one whose axes the compiler handles."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
        mesh = x.sharding.mesh
        if set(mesh.axis_types) != {AxisType.Auto}:
            return jax.device_put(x, NamedSharding(Mesh(mesh.devices, mesh.axis_names), x.sharding.spec))
    return x


# ---- norms and inner products ----


@standard_promotion
def inner(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product of two trees."""
    return optax.tree.vdot(a, b)


squared_norm = standard_promotion(functools.partial(optax.tree.norm, squared=True))


@jax.jit
@standard_promotion
def tree_norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm, by no square that is out of range: the square of 1e-20 is zero in float32."""
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)])
    # Dividing by a power of two is exact. Zero, infinity and NaN are left as they are.
    exponent = jnp.frexp(largest)[1] - 1
    unit = jnp.where(jnp.isfinite(largest) & (largest > 0), jnp.ldexp(jnp.ones_like(largest), exponent), 1)
    return unit * optax.tree.norm(jax.tree.map(lambda x: x / unit.astype(jnp.result_type(x)), tree))


def tree_size(tree: PyTree) -> int:
    """The number of entries of all arrays; optax has it from 0.2.6 on."""
    return sum(int(np.size(x)) for x in jax.tree.leaves(tree))


def tree_bytes(tree: PyTree) -> int:
    """What all arrays take."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def own_eps(like: PyTree) -> float:
    """Rounding of the precision in which products are taken: that of ``like``, but at least float32."""
    return max(float(jnp.finfo(at_least_float32(x)).eps) for x in jax.tree.leaves(like))


def leaves_finite(tree: PyTree) -> list[Any]:
    """For each leaf whether all of its numbers are finite."""
    leaves = jax.tree.leaves(tree)
    if not is_traced(leaves) and all(map(numpy_reads, leaves)):  # where there is nothing to compile
        return [np.isfinite(x).all() for x in leaves]
    return _leaves_finite(leaves)


@jax.jit
def _leaves_finite(leaves):
    return [jnp.isfinite(x).all() for x in leaves]


# ---- rows, stacked along a leading axis ----


def take_row(stacked: PyTree, i: Any) -> PyTree:
    """Row i of a stacked tree."""
    return jax.tree.map(lambda x: x[i], stacked)


def map_rows(function: Callable, stacked: PyTree) -> PyTree:
    """``jax.vmap(function)(stacked)``, where a few rows stand one after another in the program.

    Faster for products: each row has its own tangents of the kernels, and vmap turns convolutions with them into
    grouped ones. What the rows share the compiler computes once either way.
    """
    count = len(jax.tree.leaves(stacked)[0])
    if count > UNROLLED:
        return jax.vmap(function)(stacked)
    return stack_rows([function(take_row(stacked, i)) for i in range(count)])


def stack_rows(rows: list[PyTree]) -> PyTree:
    """Trees of one structure as one tree with a leading axis."""
    return jax.tree.map(lambda *parts: standard_promotion(jnp.stack)(parts), *rows)


def combine(basis: PyTree, coefficients: np.ndarray) -> PyTree:
    """Combinations of the rows of a basis, (k, ...), with coefficients (m, k), computed where the basis is."""

    @full_precision
    def one(rows):
        # On a CPU numpy reads JAX's memory, and nothing is compiled for each shape.
        xp = np if numpy_reads(rows) else jnp
        return xp.tensordot(coefficients.T.astype(rows.dtype), xp.asarray(rows), 1)

    return jax.tree.map(one, basis)


@jax.jit
@full_precision
def without(rows: PyTree, v: PyTree) -> PyTree:
    """A vector less its projection onto orthonormal rows."""
    pairs = list(zip(jax.tree.leaves(rows), jax.tree.leaves(v), strict=True))
    coefficients = sum(r.reshape(len(r), -1) @ x.ravel() for r, x in pairs)
    return jax.tree.map(lambda r, x: x - jnp.tensordot(coefficients, r, 1).astype(x.dtype), rows, v)


def on_cpu(x: jax.Array) -> bool:
    """Whether numpy can read an array without a transfer."""
    return all(device.platform == "cpu" for device in x.devices())


def numpy_reads(x: Any) -> bool:
    """Whether numpy has an array where it is, without a transfer."""
    return isinstance(x, np.ndarray) or (x.is_fully_addressable and len(x.devices()) == 1 and on_cpu(x))


def to_host(x: Any) -> np.ndarray:
    """An array in numpy, whole, also where other processes hold parts of it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
