"""Checks of what users give, with errors that say what to write instead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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


def equations(jaxpr: Any, in_loop: bool = False) -> Iterator[tuple[Any, bool]]:
    """All equations of a jaxpr and of those inside it, each with whether it runs in a loop."""
    for eqn in jaxpr.eqns:
        yield eqn, in_loop
        inside = in_loop or eqn.primitive.name in ("scan", "while")
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inside)


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
        if not any(eqn.primitive.name == "custom_lin" for eqn, _ in equations(made.jaxpr)):
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
    for eqn, _ in equations(closed.jaxpr):
        if eqn.primitive.name.startswith("custom_vjp_call"):
            bodies = (getattr(p, "jaxpr", p) for name, p in eqn.params.items() if name.endswith("_jaxpr"))
            infos = (getattr(body, "debug_info", None) for body in bodies)
            names[next((info.func_src_info for info in infos if info is not None), "a function")] = None
    return list(names)
