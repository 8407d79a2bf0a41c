"""What some versions of JAX need and no others do."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import MutableMapping

import jax

_FLAG = "xla_cpu_use_xnnpack"


def turn_off_stale_matrices(
    jaxlib: str = importlib.metadata.version("jaxlib"), environment: MutableMapping[str, str] = os.environ
) -> None:
    """Turns off XNNPACK where it multiplies by numbers that an array held before, on CPUs.

    These versions pack the right matrix of a product once and know it again by its address. Memory that is used again,
    as that of parameters which a training step overwrites, holds other numbers. Without the flag, on a trained net of
    three dense layers, traces were wrong by up to twice their value, and so was everything else that JAX computes.
    """
    flags = environment.get("XLA_FLAGS", "")
    if jaxlib not in ("0.7.2", "0.8.0", "0.8.1") or _FLAG in flags:
        return
    from jax._src.xla_bridge import backends_are_initialized  # private; these versions have it

    if not backends_are_initialized():
        environment["XLA_FLAGS"] = f"{flags} --{_FLAG}=false".strip()
    elif jax.default_backend() == "cpu":
        warnings.warn(
            f"jaxlib {jaxlib} may multiply by numbers that an array held before, in your own programs and in those of "
            f"jaxhess: import jaxhess before JAX computes anything, or set XLA_FLAGS=--{_FLAG}=false, or install "
            f"another jaxlib (0.8.2 or later is right)",
            stacklevel=2,
        )


def enable_x64() -> contextlib.AbstractContextManager:
    """Double precision for a block, under its name of before and after JAX 0.8."""
    module = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return module.enable_x64(True)
