"""Peak memory of a call, by Linux's own count for the process."""

from __future__ import annotations

import ctypes
import pathlib
import time
from collections.abc import Callable

_MMAP_THRESHOLD = -3  # of mallopt: blocks as large as this go back to the system as soon as they are free
_STATUS, _RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def peak_memory(function: Callable[[], object]) -> float | None:
    """The most memory that a call holds beyond what was held before it.

    The allocator gives back what is free before the call, and during it at once; else what it keeps for later would
    count as held, or as held before.

    Args:
      function: the call; its result is dropped.

    Returns:
      MiB, or None where the system does not tell; then the call is not made. Its errors are passed on.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 2**16)
        time.sleep(0.2)  # a program of XLA gives its workspace back a little after its result
        libc.malloc_trim(0)
        _RESET.write_text("5")  # the high-water mark starts anew
        before = _field("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    try:
        function()
        return max(0.0, _field("VmHWM") - before)
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # where it ends up by itself


def timed_peak(timer: Callable[[], float]) -> tuple[float | None, float]:
    """The peak memory of a call of ``timer``, in MiB or None, and the seconds that this returned."""
    seconds: list[float] = []
    peak = peak_memory(lambda: seconds.append(timer()))
    return peak, seconds[0] if seconds else timer()


def _field(name):
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) / 1024
