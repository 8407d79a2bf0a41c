"""Indices of numpy with a hash: as they are written, and with known ends for an array."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Range(NamedTuple):
    """A slice with known ends; slices have no hash before Python 3.12."""

    start: int
    stop: int
    step: int


def written(entry: Any) -> Any:
    """One entry of an index, as it is written: an integer, an ellipsis, or (kind, values)."""
    if entry is Ellipsis:
        return entry
    if isinstance(entry, slice):
        return ("slice", *(None if x is None else operator.index(x) for x in (entry.start, entry.stop, entry.step)))
    try:
        if np.ndim(entry) == 0 and not isinstance(entry, (bool, np.bool_)):
            return operator.index(entry)
        array = np.asarray(entry)
        if array.ndim == 1 and array.dtype == bool:
            return ("mask", *array.tolist())
        if array.ndim == 1 and array.size and jnp.issubdtype(array.dtype, np.integer):
            return ("rows", *array.tolist())
    except TypeError:
        pass
    raise TypeError(f"an index holds integers, slices, an ellipsis, or a list of integers or bools, got {entry!r}")


def entry_name(entry: Any) -> str:
    """An entry in the notation of numpy."""
    if entry is Ellipsis:
        return "..."
    if not isinstance(entry, tuple):
        return str(entry)
    kind, *values = entry
    if kind == "slice":
        start, stop, step = ("" if x is None else str(x) for x in values)
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return str([i for i, kept in enumerate(values) if kept] if kind == "mask" else values).replace(" ", "")


def resolved(index: tuple, shape: tuple[int, ...], where: str) -> tuple:
    """An index with known ends, for an array of this shape; ValueError that names ``where`` if it is out of range."""
    wide = len(shape) - sum(entry is not Ellipsis for entry in index)
    if wide < 0 or sum(entry is Ellipsis for entry in index) > 1:
        raise ValueError(f"{where}: too many entries in the index; np.s_[..., i] fits arrays of any rank")
    full = []
    for entry in index if Ellipsis in index else (*index, Ellipsis):
        full += [("slice", None, None, None)] * wide if entry is Ellipsis else [entry]
    if sum(isinstance(entry, tuple) and entry[0] != "slice" for entry in full) > 1:
        raise ValueError(f"{where}: at most one axis is cut by a list")
    return tuple(_axis_entry(entry, size, where) for entry, size in zip(full, shape, strict=True))


def _axis_entry(entry, size, where):
    if not isinstance(entry, tuple):
        if not -size <= entry < size:
            raise ValueError(f"{where}: {entry} is out of range for an axis of {size}")
        return entry % size
    kind, *values = entry
    if kind == "slice":
        found = range(size)[slice(*values)]
        outside = [x for x in values[:2] if x is not None and not -size <= x <= size]
        if outside or not found:
            raise ValueError(f"{where}: {entry_name(entry)} is out of range for an axis of {size}, or selects nothing")
        return Range(found.start, found.stop, found.step)
    rows = [i for i, kept in enumerate(values) if kept] if kind == "mask" else [i % size for i in values]
    if kind == "mask" and len(values) != size or any(not -size <= i < size for i in values):
        raise ValueError(f"{where}: {entry_name(entry)} does not fit an axis of {size}")
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"{where}: {entry_name(entry)} selects nothing, or a row twice")
    return tuple(rows)


def plain(entry: Any) -> Any:
    """An entry with known ends, as numpy takes it."""
    if isinstance(entry, Range):
        return slice(entry.start, None if entry.stop < 0 else entry.stop, entry.step)
    return np.array(entry) if isinstance(entry, tuple) else entry
