"""Checks of what users give, with errors that say what to write instead."""

from __future__ import annotations

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
    except TypeError:
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
        return "take strings out of the batch, or encode them as numbers"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return "take it out of the batch, or make it one array of numbers (rows of different lengths padded)"
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
    return "take it out of the batch, or make a pytree of arrays of it"


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


# ---- functions without forward mode ----

REVERSE_ONLY = (
    "What works as it is: Tr G of an Objective, layer_traces(..., curvature='ggn'), and its Gram matrix, "
    "ggn_eigenvalues, class_structure and layer_spectra(..., curvature='ggn', method='gram'). For all else give the "
    "function its rule with jax.custom_jvp, or leave it without one"
)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs inside it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def check_forward_mode(
    function: Callable, args: tuple, derived: Callable, derived_args: tuple, instead: str = REVERSE_ONLY
) -> None:
    """TypeError where ``derived`` needs derivatives in forward mode of a ``jax.custom_vjp`` inside ``function``.

    Such a function is no fault by itself: it may see no parameters, and the Hessian, forward over reverse, takes it if
    its two rules have forward mode. So it is tried, and only where there is one.
    """
    names = _custom_vjps(jax.make_jaxpr(jax.jit(function))(*args))  # under jit the trace is kept
    if not names:
        return
    cause = None
    try:
        made = jax.make_jaxpr(derived)(*derived_args)
    except Exception as error:  # what jax raises here has changed with its versions
        cause = error
    else:
        if not any(eqn.primitive.name == "custom_lin" for eqn in equations(made.jaxpr)):
            return
        names = _custom_vjps(made) or names
    said = "" if cause is None else f" ({type(cause).__name__}: {cause})"
    raise TypeError(
        f"derivatives in forward mode are needed here, and {' and '.join(names)}, a function with jax.custom_vjp, has "
        f"them in reverse mode only{said}. {instead}"
    ) from cause


def _custom_vjps(closed):
    """The names of the functions with ``jax.custom_vjp`` in a jaxpr, each with its file and line."""
    names: dict[str, None] = {}
    for eqn in equations(closed.jaxpr):
        if eqn.primitive.name.startswith("custom_vjp_call"):
            bodies = (getattr(p, "jaxpr", p) for name, p in eqn.params.items() if name.endswith("_jaxpr"))
            infos = (getattr(body, "debug_info", None) for body in bodies)
            names[next((info.func_src_info for info in infos if info is not None), "a function")] = None
    return list(names)
