"""Peak memory of a call, by Linux's own count for the process."""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable

_STATUS, _RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def peak_memory(function: Callable[[], object]) -> float | None:
    """The most memory that a call holds beyond what was held before it.

    What the allocator keeps of freed memory is given back first, so that it is not taken for free of charge.

    Args:
      function: the call; its result is dropped.

    Returns:
      MiB, or None where the system does not tell.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")  # the high-water mark starts anew
        before = _field("VmRSS")
        function()
        return max(0.0, _field("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _field(name):
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) / 1024
