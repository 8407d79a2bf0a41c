"""Numbers on disk: JSON and npz, written whole or not at all, read without pickle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from experiments import interrupts


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` if the block ends without error.

    Raises:
      ValueError: if the file cannot be written (a full disk, a folder that is read-only); what was there is whole.
    """
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        with interrupts.WRITING:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                with temporary.open("rb") as file:  # a full disk may be noticed here first
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def remove_temporaries(folder: pathlib.Path) -> None:
    """Removes the temporary files of `replacing` that killed processes left in a folder."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+-\d+\.(json|npz|png)", path.name):
            path.unlink(missing_ok=True)


def check_writable(folder: pathlib.Path) -> None:
    """ValueError if nothing can be written to a folder, which need not be there yet: said before hours of work."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: pathlib.Path, error: Exception) -> ValueError:
    """What to say of a file or folder that cannot be written."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{path} cannot be written ({reason}); free space or take another folder with out=FOLDER, and run it again: "
        f"what was written before is whole"
    )


def find(path: pathlib.Path) -> pathlib.Path | None:
    """``path``, or a file of this name in a folder beside its own; None if there is neither.

    Beside ``runs/`` stands ``results/``, where nets were left before there was ``runs/``.
    """
    others = path.parent.parent
    folders = (others, others.with_name("results")) if others.name == "runs" else (others,)
    candidates = (path, *(found for folder in folders for found in sorted(folder.glob(f"*/{path.name}"))))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def save_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain values as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def load_json(path: pathlib.Path) -> Any:
    """Reads JSON; ValueError if it cannot be read or is damaged."""
    return _parse(path, json.loads)


def save_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as npz; TypeError for what only pickle could hold."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    objects = [name for name, array in arrays.items() if array.dtype.hasobject]
    if objects:
        raise TypeError(f"{objects} are no arrays of numbers; save plain arrays")
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads an npz whole, and runs no code that it may hold; ValueError if it cannot be read or is damaged."""

    def parse(content):
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    return _parse(path, parse)


def _parse(path, parse):
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path} is not there; run the experiment without redraw=true first") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); see to its permissions and its disk") from error
    try:
        return parse(content)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is damaged ({error}); delete it and run the experiment again") from error
