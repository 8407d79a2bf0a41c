"""Many batches as one: the loss is the mean over all their examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._slips import check_arrays

PyTree = Any
_MOST = 10_000  # batches of a loader that does not say its length, before it is taken to be endless
_TOLERANCE = 1e-5  # relative, by which sums over the same examples in another order may differ


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

    Two things must hold, and are checked. The loss must be a mean over independent examples: a sum, a contrastive loss,
    or batch norm in training mode has another value over many small batches than over one large one. And every pass
    must read the same examples, in any order: with ``shuffle`` together with ``drop_last``, or with random
    augmentation, each product would be that of another loss, and no eigenvalue would mean anything.

    Args:
      batches: what can be read again and again: a list, an object whose ``__iter__`` starts anew, or one with
        ``__getitem__`` and ``__len__``.
      size: ``size(batch)``, the number of examples or the sum of their weights; by default the leading axis that all
        arrays share.
      check: False leaves both checks out.

    Raises:
      TypeError: if ``batches`` can be read only once (a generator), or is no iterable.
      ValueError: while it is read: for no batches, an empty one, a loader without an end, or passes that differ.

    Example:
      >>> import numpy as np, jaxhess as jh
      >>> images = np.zeros((10, 8, 8), np.float32)
      >>> len(list(jh.Batches([images[:4], images[4:8], images[8:]])))
      3

    Reference: Welford 1962, Note on a method for calculating corrected sums of squares (the running mean).
    """

    batches: Iterable[PyTree]
    size: Callable[[PyTree], float] = leading_axis
    check: bool = True
    _first_pass: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        readable = isinstance(self.batches, Iterable) or _is_indexed(self.batches)
        if not readable or isinstance(self.batches, (Mapping, str)):
            got = type(self.batches).__name__
            raise TypeError(f"Batches takes an iterable of batches, got {got}; for one batch: Batches([batch])")
        if _is_indexed(self.batches):
            return
        # Whoever knows its length, like a loader that starts workers to iterate, is taken to start anew.
        once = not hasattr(self.batches, "__len__") and iter(self.batches) is iter(self.batches)
        if isinstance(self.batches, Iterator) or once:
            raise TypeError(
                f"Batches reads its batches once for each product, and a {type(self.batches).__name__} can be read "
                f"only once; give a list, or an object whose __iter__ starts anew"
            )

    def __iter__(self) -> Iterator[PyTree]:
        batches: Any = self.batches
        return (batches[i] for i in range(len(batches))) if _is_indexed(batches) else iter(batches)

    def weighted(self) -> Iterator[tuple[float, PyTree]]:
        """Pairs (number of examples, batch); ValueError for no batches, an empty one, or a pass that is not the first.

        Every pass that is read to its end is compared with the first one, by sums that do not depend on the order.
        """
        sums: dict[str, np.ndarray] = {}
        number, most = 0, max(_MOST, 10 * (_length(self.batches) or 0))
        for number, batch in enumerate(self, 1):
            if number > most:
                raise ValueError(
                    f"the loader still went on after {most:,} batches; give one pass over the data, as with take(n), "
                    f"or an object that says its length, with __len__"
                )
            check_arrays(batch)
            size = float(self.size(batch))
            if not 0 < size < float("inf"):
                raise ValueError(f"batch {number - 1} has {size:g} examples; leave empty batches out")
            if self.check:
                _add(sums, size, batch)
            yield size, batch
        if number == 0:
            raise ValueError("Batches holds no batches; an exhausted or empty iterable has no mean")
        if self.check:
            self._compare(sums)

    def look_ahead(self) -> None:
        """Reads a loader that does not say its length once, without products, so that one without an end is noticed."""
        if not self._first_pass and _length(self.batches) is None:
            for _ in self.weighted():
                pass

    def _compare(self, sums):
        if not self._first_pass:
            self._first_pass.append(sums)
        first, none = self._first_pass[0], np.zeros(2)
        changed = []
        for name in first | sums:
            (value, scale), (now, _) = first.get(name, none), sums.get(name, none)
            if not abs(now - value) <= _TOLERANCE * scale and np.isfinite(value):
                changed.append(name)
        if changed:
            raise ValueError(
                f"two passes over the batches read different data (at {changed[:4]}), so that each product would be "
                f"that of another loss; turn off random augmentation, and drop_last where the order is shuffled, or "
                f"read the batches once: Batches(list(loader))"
            )

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


def _is_indexed(batches):
    """A data set that is read by number, and does not iterate."""
    return not isinstance(batches, Iterable) and hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _length(batches):
    """The number of batches, or None where it is not said; loaders without an end have a ``__len__`` that raises."""
    try:
        return len(batches)
    except TypeError:
        return None


def _add(sums, size, batch):
    """Adds one batch to the sums of a pass: of every array a fixed linear function of its examples, and its scale."""
    parts = [("the number of examples", np.array([size, size]))]
    parts += [(jax.tree_util.keystr(path), _sums(x)) for path, x in jax.tree_util.tree_leaves_with_path(batch)]
    for name, part in parts:
        sums[name] = sums.get(name, 0.0) + part


def _sums(x):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array) and not (x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())):
        return np.asarray(_sums_on_device(x), np.float64)
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":  # bfloat16 and its like are of no kind that numpy can sum
        x = x.astype(np.float32)
    rows = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    # Of flipped or shifted images the plain sum is the same.
    pattern = np.cos(np.arange(rows.shape[1]) + 1.0)
    return np.array([rows.sum(0, dtype=np.float64) @ pattern, np.abs(rows).sum(dtype=np.float64)])


@jax.jit
def _sums_on_device(x):
    rows = x.astype(jnp.float32).reshape(len(x), -1) if x.ndim else x.astype(jnp.float32).reshape(1, 1)
    return jnp.stack([rows.sum(0) @ jnp.cos(jnp.arange(rows.shape[1]) + 1.0), jnp.abs(rows).sum()])


def first_batch(batch: PyTree) -> PyTree:
    """The batch itself, or the first of many."""
    return next(batch.weighted())[1] if isinstance(batch, Batches) else batch
