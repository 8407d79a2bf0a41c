"""Numbers on disk: JSON and npz, written whole or not at all, read without pickle."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` if the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find(path: pathlib.Path) -> pathlib.Path | None:
    """``path``, or a file of this name in a folder beside its own; None if there is neither."""
    candidates = (path, *sorted(path.parent.parent.glob(f"*/{path.name}")))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def save_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain values as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def load_json(path: pathlib.Path) -> Any:
    """Reads JSON; ValueError if it is not there or damaged."""
    with _readable(path):
        return json.loads(path.read_text())


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as npz; TypeError for what only pickle could hold."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise TypeError(f"{objects} are no arrays of numbers; save plain arrays")
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads an npz whole; ValueError if it is not there or damaged."""
    with _readable(path), path.open("rb") as file:  # np.load would leave a damaged file open
        return dict(np.load(file, allow_pickle=False))


@contextlib.contextmanager
def _readable(path):
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there; run the experiment without redraw=true first") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the experiment again") from error
