"""Checkpoints of a training, with which a run that was killed goes on as if it had not been."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments import interrupts, results

PyTree = Any


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
            raise results.unwritable(self.folder, error) from error

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
            raise results.unwritable(self.folder / str(epoch), error) from error

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
                remove(aside)
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

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()


def remove(folder: pathlib.Path) -> None:
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
