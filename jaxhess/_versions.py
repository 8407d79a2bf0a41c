"""What some versions of JAX need and no others do."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import MutableMapping
from typing import NamedTuple

import jax


class _Fault(NamedTuple):
    """What some versions of jaxlib compute wrongly on CPUs, and the flag without which they do.

    XNNPACK packs the right matrix of a product once and knows it again by its address. Memory that is used again, as
    that of parameters which a training step overwrites, holds other numbers: on a trained net of three dense layers,
    traces were wrong by up to twice their value. YNNPACK fuses what surrounds batched products: of a small transformer,
    Hessian products with four vectors under ``jit`` and ``vmap`` were wrong by a tenth. So is everything else that JAX
    computes there.
    """

    versions: tuple[str, ...]
    flag: str
    value: str
    words: str


_FAULTS = (
    _Fault(("0.7.2", "0.8.0", "0.8.1"), "xla_cpu_use_xnnpack", "false", "multiply by what an array held before"),
    _Fault(("0.10.2",), "xla_cpu_experimental_ynn_fusion_type", "", "compute batched products wrongly"),
)


def turn_off_faults(
    jaxlib: str = importlib.metadata.version("jaxlib"), environment: MutableMapping[str, str] = os.environ
) -> None:
    """Turns off what is known to compute wrongly on CPUs in this version of jaxlib, or warns where it is too late."""
    flags = environment.get("XLA_FLAGS", "")
    fault = next((fault for fault in _FAULTS if jaxlib in fault.versions), None)
    if fault is None or fault.flag in flags:
        return
    from jax._src.xla_bridge import backends_are_initialized  # private; these versions have it

    switch = f"--{fault.flag}={fault.value}"
    if not backends_are_initialized():
        environment["XLA_FLAGS"] = f"{flags} {switch}".strip()
    elif jax.default_backend() == "cpu":
        warnings.warn(
            f"jaxlib {jaxlib} may {fault.words}, in your own programs and in those of jaxhess: import jaxhess before "
            f"JAX computes anything, or set XLA_FLAGS={switch}, or install another jaxlib",
            stacklevel=2,
        )


def enable_x64() -> contextlib.AbstractContextManager:
    """Double precision for a block, under its name of before and after JAX 0.8."""
    module = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    return module.enable_x64(True)
