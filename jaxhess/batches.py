"""Many batches as one: the loss is the mean over all their examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxhess._checks import check_arrays

PyTree = Any


def leading_axis(batch: PyTree) -> int:
    """The number of examples of a batch: the leading axis that all its arrays share.

    Raises:
      ValueError: if the batch has no arrays, or they do not share a leading axis.
    """
    shapes = {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"the arrays of the batch share no leading axis ({shapes or 'it has none'}), so its number of examples "
            f"is unknown; say it with Batches(batches, size=lambda batch: ...)"
        )
    return sizes.pop()[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Many batches in place of one: every result is the mean over all their examples, a ragged last one included.

    Takes the memory of one batch. The batches are read afresh at each product, in a loop on the host, so that an
    operator made from them cannot run under ``jit`` and says so.

    Args:
      batches: an iterable that can be read again and again: a list, or an object whose ``__iter__`` starts anew.
      size: ``size(batch)``, the number of examples or the sum of their weights; by default the leading axis that all
        arrays share.

    Raises:
      TypeError: if ``batches`` can be read only once (a generator), or is no iterable.

    Example:
      >>> import numpy as np, jaxhess as jh
      >>> images = np.zeros((10, 8, 8), np.float32)
      >>> len(list(jh.Batches([images[:4], images[4:8], images[8:]])))
      3

    Reference: Welford 1962, Note on a method for calculating corrected sums of squares (the running mean).
    """

    batches: Iterable[PyTree]
    size: Callable[[PyTree], float] = leading_axis

    def __post_init__(self):
        if not isinstance(self.batches, Iterable) or isinstance(self.batches, (Mapping, str)):
            got = type(self.batches).__name__
            raise TypeError(f"Batches takes an iterable of batches, got {got}; for one batch: Batches([batch])")
        # Whoever knows its length, like a loader that starts workers to iterate, is taken to start anew.
        once = not hasattr(self.batches, "__len__") and iter(self.batches) is iter(self.batches)
        if isinstance(self.batches, Iterator) or once:
            raise TypeError(
                f"Batches reads its batches once for each product, and a {type(self.batches).__name__} can be read "
                f"only once; give a list, or an object whose __iter__ starts anew"
            )

    def __iter__(self) -> Iterator[PyTree]:
        return iter(self.batches)

    def weighted(self) -> Iterator[tuple[float, PyTree]]:
        """Pairs (number of examples, batch); ValueError where there are no batches or an empty one."""
        empty = True
        for number, batch in enumerate(self.batches):
            check_arrays(batch)
            size = float(self.size(batch))
            if not 0 < size < float("inf"):
                raise ValueError(f"batch {number} has {size:g} examples; leave empty batches out")
            empty = False
            yield size, batch
        if empty:
            raise ValueError("Batches holds no batches; an exhausted or empty iterable has no mean")

    def fold(self, step: Callable[[Any, PyTree, float, int], Any]) -> Any:
        """A running mean: ``step(mean, batch, share, number)``, with None for the first mean, batch by batch.

        The next batch is read while the device works on this one, and no further ahead: a loop that does not wait
        would put all of them on the device.
        """
        total, mean = 0.0, None
        for number, (size, batch) in enumerate(self.weighted()):
            total += size
            following = step(mean, batch, size / total, number)
            jax.block_until_ready(mean)
            mean = following
        return mean


def first_batch(batch: PyTree) -> PyTree:
    """The batch itself, or the first of many."""
    return next(batch.weighted())[1] if isinstance(batch, Batches) else batch
