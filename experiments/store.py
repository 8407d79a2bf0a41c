"""What is on disk: JSON, npz, and the checkpoints of a training, written whole or not at all, read without pickle."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import interrupts

PyTree = Any


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


def net_path(folder: pathlib.Path, model: str, dataset: str, settings: str) -> pathlib.Path:
    """The file of a trained net: its name ends in a hash of all that the net depends on."""
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return folder / f"net-{model}-{dataset.replace('/', '-')}-{digest}.npz"


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


def save_tree(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as npz, under names such as "params/conv1/kernel"."""
    save_arrays(path, flatten_dict(dict(tree), sep="/"))


def load_tree(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `save_tree` wrote; empty dicts are not there."""
    return unflatten_dict(load_arrays(path), sep="/")


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


# ---- checkpoints ----


class Restored(NamedTuple):
    """What a checkpoint holds: the epochs done, the state behind them, and the records."""

    epoch: int
    state: PyTree
    records: dict[str, list[float]]


class Checkpoints:
    """The last two states of one training, in a folder.

    Orbax writes a checkpoint beside its place and renames it when it is whole; a digest of all arrays lies with it,
    so that what was damaged later is noticed too.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: pathlib.Path, recipe: dict[str, Any]):
        """Opens a folder, or makes it.

        Args:
          folder: for one training alone.
          recipe: plain values that say which training it is.

        Raises:
          ValueError: if the folder cannot be made.
        """
        self.folder, self._recipe = pathlib.Path(folder).absolute(), recipe
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def save(self, epoch: int, state: PyTree, records: dict[str, list[float]]) -> None:
        """Keeps the state behind an epoch; returns when it is on the disk.

        Raises:
          ValueError: if it cannot be written; the checkpoints before it are whole.
        """
        host = jax.tree.map(_to_host, state)
        about = {"recipe": self._recipe, "records": records, "digest": _digest(host)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(host), about=ocp.args.JsonSave(about))
        try:
            with interrupts.WRITING:
                self._manager.save(epoch, args=args, force=True)
        except (OSError, ValueError) as error:  # what writes the arrays says ValueError of a full disk
            raise unwritable(self.folder / str(epoch), error) from error

    def latest(self, like: PyTree) -> Restored | None:
        """The last whole checkpoint; None if there is none.

        Damaged ones are put aside, as "damaged-EPOCH", each with a line on stderr.

        Args:
          like: a state of the same structure; what is spread over devices there comes back spread like it, on however
            many devices it was kept.

        Raises:
          ValueError: if the checkpoint is one of another training, or the disk does not let it be read.
        """
        for epoch in sorted(self._manager.all_steps(), reverse=True):
            try:
                about = self._manager.restore(epoch, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
                if about["recipe"] == self._recipe:
                    host = jax.tree.map(_to_host, like)
                    args = ocp.args.Composite(state=ocp.args.StandardRestore(host))
                    host = self._manager.restore(epoch, args=args).state
                    if _digest(host) != about["digest"]:
                        raise ValueError("its arrays are not those that were saved")
            except Exception as error:  # a damaged file may raise anything
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise ValueError(
                        f"the checkpoint of epoch {epoch} in {self.folder} cannot be read ({error.strerror or error}); "
                        f"see to its permissions and its disk, or delete it"
                    ) from error
                reason = (str(error).splitlines() or [""])[0][:120]
                print(
                    f"warning: the checkpoint of epoch {epoch} in {self.folder} is damaged and left out "
                    f"({type(error).__name__}: {reason})",
                    file=sys.stderr,
                )
                aside = self.folder / f"damaged-{epoch}"
                remove_checkpoints(aside)
                (self.folder / str(epoch)).rename(aside)
                self._manager.reload()
                continue
            if about["recipe"] != self._recipe:
                raise ValueError(
                    f"{self.folder} holds checkpoints of another training, {about['recipe']}, not of {self._recipe}; "
                    f"name another folder or delete this one"
                )
            return Restored(epoch, jax.tree.map(_to_device, host, like), about["records"])
        return None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()


def remove_checkpoints(folder: pathlib.Path) -> None:
    """Deletes the checkpoints of a training, if there are any."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_key(x):
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_host(x):
    """A copy: on a CPU the array itself would be overwritten by the next step."""
    return np.array(jax.random.key_data(x) if _is_key(x) else x)


def _to_device(x, like):
    # copy=True: XLA may otherwise use NumPy's memory, and the state is donated.
    array = jnp.array(x, copy=True)
    if isinstance(like, jax.Array) and len(like.sharding.device_set) > 1:
        array = jax.device_put(array, like.sharding)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _is_key(like) else array


def _digest(host):
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(host):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return digest.hexdigest()
