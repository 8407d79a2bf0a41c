"""Checks of what users give, with errors that say what to write instead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def check_count(name: str, value: int) -> None:
    """ValueError for a number of things that is not a whole number of at least one."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_key(key: Any, name: str = "key") -> None:
    """TypeError for what is not one JAX random key, typed or raw."""
    if (hint := _key_hint(key)) is not None:
        raise TypeError(f"{name} must be one JAX random key, as from jax.random.key(0), got {described(key)}{hint}")


def _key_hint(key):
    """None for one random key; else what to write, where it is nearly one."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        return ""
    several = "; of an array of keys give one, keys[0]"
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return several if key.ndim else None
    if key.dtype != np.uint32 or not key.ndim:
        return ""
    impl = jax.config.jax_default_prng_impl
    if key.shape[-1] != {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}.get(impl, key.shape[-1]):
        return f"; {impl!r}, the default, has no such raw key: say of which it is, wrap_key_data(key, impl='rbg')"
    return several if key.ndim > 1 else None


def described(thing: Any) -> str:
    """What a thing is, in a few words."""
    if hasattr(thing, "dtype") and hasattr(thing, "shape"):
        return f"an array {thing.dtype}[{','.join(map(str, thing.shape))}]"
    if isinstance(thing, Mapping):
        return f"a {type(thing).__name__} of {reprlib.repr(list(thing))}"
    if isinstance(thing, (list, tuple)):
        return f"a {type(thing).__name__} of {len(thing)}"
    return reprlib.repr(thing)


def check_like(name: str, tree: PyTree) -> None:
    """ValueError for a tree without a single entry, which no operator acts on."""
    if not any(np.size(x) for x in jax.tree.leaves(tree)):
        raise ValueError(
            f"{name} holds no numbers, so there is no operator on it: {described(tree)}; give a tree like v"
        )


def check_known(what: str, instead: str, *trees: PyTree) -> None:
    """TypeError for traced values where the host needs numbers."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees)):
        raise TypeError(f"{what} on the host and cannot run under jit, vmap or grad; {instead}")


# ---- batches and parameters ----


def check_batch(batch: PyTree) -> None:
    """ValueError for a batch that is not made of arrays with entries; the message names the place."""
    check_arrays(batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.size(leaf) == 0:
            at = jax.tree_util.keystr(path)
            raise ValueError(f"the batch is empty at {at!r} (shape {np.shape(leaf)}): a mean needs an example")


def check_arrays(batch: PyTree) -> None:
    """TypeError for what JAX cannot take as an array: where it is, what it is, and what to do with it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not _is_array(leaf):
            at = f"the batch holds at {jax.tree_util.keystr(path)}" if path else "the batch is"
            raise TypeError(f"{at} {_kind(leaf)}, which is no array; {_instead(leaf, whole=not path)}")


def _is_array(leaf):
    if isinstance(leaf, (jax.Array, bool, int, float, complex)):
        return True
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
        return True
    try:  # the rare ones: types that JAX adds to NumPy's, and what else it knows
        jax.eval_shape(lambda x: x, leaf)
    except Exception:  # mostly a TypeError; what else, is up to the thing
        return False
    return True


def _kind(leaf):
    if isinstance(leaf, (str, bytes)):
        return f"the string {leaf[:20]!r}"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return f"an array of NumPy's type {leaf.dtype}"
    return f"a {type(leaf).__name__}"


def _instead(leaf, whole):
    """What to do with something that is no array."""
    if isinstance(leaf, (str, bytes)):
        return "take strings out, or encode them as numbers"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return "take it out, or make it one array of numbers (rows of different lengths padded)"
    if isinstance(leaf, Mapping):
        return "make a dict of it, dict(...)"
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return f"give a dict, or make its class a pytree: jax.tree_util.register_dataclass({type(leaf).__name__})"
    if isinstance(leaf, Iterator):
        return "it can be read only once: give one batch, next(...), or all of them, Batches(list(...))"
    if hasattr(leaf, "__array__"):
        return "make one of it, np.asarray(...)"
    if whole and hasattr(leaf, "__iter__"):
        return "for the mean over the batches in it give Batches(...)"
    return "take it out, or make a pytree of arrays of it"


def likely_labels(batch: PyTree) -> Any:
    """The key of a batch under which its labels seem to be: one that is called so, else the only integers, else 1."""
    items = list(batch.items() if isinstance(batch, Mapping) else enumerate(batch if isinstance(batch, tuple) else ()))
    named = [key for key, _ in items if key in ("labels", "y", "target", "targets", "label_ids")]
    whole = [key for key, x in items if _is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.integer)]
    return next(iter([*named, *whole]), 1)


def check_parameters(params: PyTree) -> None:
    """TypeError or ValueError for a tree of something else than floating-point arrays that are to be differentiated."""
    if hasattr(params, "opt_state") and hasattr(params, "params"):
        raise TypeError(f"the parameters are a whole {type(params).__name__}; give its parameters, state.params")
    if isinstance(params, Mapping) and (found := [key for key in params if key in _COLLECTIONS]):
        if "params" in params or "batch_stats" in params:
            raise ValueError(
                f"the parameters hold Flax's collection {found[0]!r}, which is not to be differentiated; give "
                f"variables['params'] as the parameters, and the collection in the batch, for model.apply({{'params': "
                f"params, {found[0]!r}: batch[{found[0]!r}]}}, ...)"
            )
    states = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: _nnx_state(node) is not None)
    if found := [f"{_nnx_state(node)} at {jax.tree_util.keystr(at)}" for at, node in states if _nnx_state(node)]:
        raise ValueError(
            f"the parameters hold NNX variables that are not to be differentiated ({', '.join(found[:3])}); take them "
            f"apart, graph, params, rest = nnx.split(model, nnx.Param, ...), and give rest in the batch"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("the parameter tree holds no arrays")
    for path, leaf in leaves:
        at = jax.tree_util.keystr(path)
        if not _is_array(leaf):
            raise TypeError(f"parameter {at!r} is {_kind(leaf)}, no array; {_module(leaf) or _instead(leaf, False)}")
        dtype = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {at!r} has dtype {dtype}, and curvature needs real floating-point parameters; "
                f"convert it, or keep it in the batch"
            )


_COLLECTIONS = {"batch_stats", "cache", "intermediates", "perturbations", "losses", "constants", "params_axes"}
_NNX_STATES = {"BatchStat", "Cache", "Intermediate", "Perturbation", "RngState"}


def _nnx_state(node):
    """The kind of an NNX variable that is no parameter; None for all else."""
    kind = getattr(node, "type", None) if type(node).__name__ == "VariableState" else type(node)
    kinds = [
        c for c in getattr(kind, "__mro__", ()) if c.__module__.startswith("flax.nnx") and c.__name__ in _NNX_STATES
    ]
    return kind.__name__ if kinds else None


def _module(leaf):
    """What to do with a module or a function among the parameters."""
    homes = {c.__module__.split(".")[1] for c in type(leaf).__mro__ if c.__module__.startswith("flax.")}
    if "nnx" in homes:
        return "take the module apart, graph, params, rest = nnx.split(model, nnx.Param, ...)"
    if "linen" in homes:
        return "a Linen module holds none: give variables['params'] of variables = model.init(key, inputs)"
    if callable(leaf):
        return "take functions out of the tree: of an Equinox module, eqx.partition(model, eqx.is_inexact_array)"
    return None


@contextlib.contextmanager
def hints(params: PyTree, batch: PyTree) -> Iterator[None]:
    """Around the first call of the user's loss: where it fails, and its arguments look like a known slip, says so."""
    try:
        yield
    except Exception as error:
        if (hint := _hint(params, batch, error)) is None:
            raise
        raise TypeError(f"{type(error).__name__} in the loss: {error}. {hint}") from error


def _hint(params, batch, error):
    if isinstance(batch, jax.Array) and jnp.issubdtype(batch.dtype, jax.dtypes.prng_key):
        return "The batch is a random key; the batch comes third, and a key by name, key=key"
    if isinstance(batch, (list, tuple)) and _one_kind(batch):
        return (
            f"The batch is a {type(batch).__name__} of {len(batch)} trees of one kind; if these are batches, give "
            f"Batches(batch) for the mean over all of them, or one of them"
        )
    flat = isinstance(params, (jax.Array, np.ndarray)) and params.ndim == 1
    if flat and not isinstance(error, ValueError):  # which says that the loss knows what to do with a vector
        return (
            "The parameters are one flat vector. Under optax.flatten the loss is given such a one: put the "
            "transformation before it, optax.chain(add_hessian_trace(...), optax.flatten(...)). Elsewhere unravel it "
            "in the loss, or give the tree"
        )
    return None


def _one_kind(batch):
    """Whether a sequence holds trees of one structure and arrays of one kind but for their numbers of examples."""
    if len({jax.tree.structure(part) for part in batch}) != 1:
        return False
    if isinstance(batch, tuple) and jax.tree_util.all_leaves(batch):
        return False  # (x, y) is one batch
    kinds = {tuple((jnp.result_type(x), np.shape(x)[1:]) for x in jax.tree.leaves(part)) for part in batch}
    return len(kinds) == 1 and all(np.ndim(x) for x in jax.tree.leaves(batch))


# ---- types ----


def at_least_float32(*values: Any) -> Any:
    """The widest floating-point type of arrays or types, float32 at least, under strict promotion of types too."""
    found = [jnp.result_type(value) for value in values]
    wide = [dtype for dtype in found if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32]
    return max(wide, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def standard_promotion(function: Callable) -> Callable:
    """The function under JAX's standard promotion of types: for arithmetic of the library's own between two types."""

    @functools.wraps(function)
    def promoting(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return promoting
