"""Checks of arguments, with errors that say what to write instead."""

import functools
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class NotFiniteError(ValueError):
    """A result that is not finite."""


def check_count(name: str, value: Any) -> None:
    """ValueError for a number of things that is not a whole number of at least one."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_choice(what: str, value: Any, choices: Collection[str]) -> None:
    """ValueError for a word that is not one of the choices."""
    if value not in tuple(choices):
        raise ValueError(f"unknown {what} {value!r}; choose from {sorted(choices)}")


def check_key(key: Any, name: str = "key") -> None:
    """TypeError for what is not one JAX random key, typed or raw."""
    if (hint := _key_hint(key)) is not None:
        raise TypeError(f"{name} must be one JAX random key, as from jax.random.key(0), got {described(key)}{hint}")


def _key_hint(key):
    """None for one random key; otherwise what to write, where it is almost one."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        return ""
    several = "; of an array of keys give one, keys[0]"
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return several if key.ndim else None
    if key.dtype != np.uint32 or not key.ndim:
        return ""
    impl = jax.config.jax_default_prng_impl
    if key.shape[-1] != {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}.get(impl, key.shape[-1]):
        return f"; {impl!r}, the default, has no such raw key: name its kind, wrap_key_data(key, impl='rbg')"
    return several if key.ndim > 1 else None


def described(thing: Any) -> str:
    """What a thing is, in a few words."""
    if hasattr(thing, "dtype") and hasattr(thing, "shape"):
        return f"an array {thing.dtype}[{','.join(map(str, thing.shape))}]"
    if isinstance(thing, Mapping):
        return f"a {type(thing).__name__} of {reprlib.repr(list(thing))}"
    return f"a {type(thing).__name__} of {len(thing)}" if isinstance(thing, (list, tuple)) else reprlib.repr(thing)


def check_like(name: str, tree: PyTree) -> None:
    """ValueError for a tree without a single entry, on which no operator acts."""
    if not any(np.size(x) for x in jax.tree.leaves(tree)):
        raise ValueError(f"{name} holds no numbers, so no operator acts on it: {described(tree)}; give a tree like v")


def is_traced(*trees: PyTree) -> bool:
    """Whether some values are not known yet, because JAX is tracing."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def check_known(what: str, instead: str, *trees: PyTree) -> None:
    """TypeError for traced values where the host needs numbers."""
    if is_traced(trees):
        raise TypeError(f"{what} on the host and cannot run under jit, vmap or grad; {instead}")


def at_least_float32(*values: Any) -> Any:
    """The widest floating-point type of arrays or types, float32 at least, under strict promotion of types too."""
    found = [jnp.result_type(value) for value in values]
    wide = [dtype for dtype in found if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32]
    return max(wide, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def standard_promotion(function: Callable) -> Callable:
    """The function under JAX's standard promotion of types: for the library's own arithmetic between two types."""

    @functools.wraps(function)
    def promoting(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return promoting
