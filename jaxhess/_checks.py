"""Checks of what users give, with errors that say what to write instead."""

from __future__ import annotations

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
    if isinstance(key, (jax.Array, np.ndarray)):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == 0 if typed else (key.ndim == 1 and key.dtype == np.uint32):
            return
    raise TypeError(f"{name} must be one JAX random key, as from jax.random.key(0), got {key!r}")


def check_like(name: str, tree: PyTree) -> None:
    """ValueError for a tree without a single entry, which no operator acts on."""
    if not any(np.size(x) for x in jax.tree.leaves(tree)):
        raise ValueError(f"{name} holds no numbers, so there is no operator on it: {tree!r}; give a tree like v")


def check_known(what: str, instead: str, *trees: PyTree) -> None:
    """TypeError for traced values where the host needs numbers."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees)):
        raise TypeError(f"{what} on the host and cannot run under jit, vmap or grad; {instead}")
