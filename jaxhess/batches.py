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
_MOST = 10_000  # batches after which a loader without a length is taken to be endless
_TOLERANCE = 1e-5  # the relative difference allowed between sums over the same examples in another order


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
            f"is unknown; give it with Batches(batches, size=lambda batch: ...)"
        )
    return sizes.pop()[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Many batches in place of one: every result is the mean over all their examples, also those of a ragged last one.

    This takes the memory of one batch. Each product reads the batches again, in a loop on the host. An operator over
    `Batches` therefore cannot run under ``jit``; it raises an error that says so.

    Two conditions are checked. The loss must be a mean over independent examples: a sum, a contrastive loss, or batch
    norm in training mode takes different values over many small batches and over one large batch. And every pass must
    read the same examples, in any order: with ``shuffle`` and ``drop_last`` together, or with random augmentation, each
    product would belong to a different loss, and eigenvalues would have no meaning.

    Args:
      batches: something that can be read repeatedly: a list, an object whose ``__iter__`` starts from the beginning, or
        one with ``__getitem__`` and ``__len__``.
      size: ``size(batch)``, the number of examples or the sum of their weights; by default the leading axis that all
        arrays share.
      check: whether the two conditions are checked.

    Raises:
      TypeError: if ``batches`` can be read only once (a generator), or is not iterable.
      ValueError: when it is read, if there are no batches, one is empty, the loader does not end, or passes differ.

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
        # An object with a length, such as a loader that starts workers, is taken to start from the beginning.
        once = not hasattr(self.batches, "__len__") and iter(self.batches) is iter(self.batches)
        if isinstance(self.batches, Iterator) or once:
            raise TypeError(
                f"Batches reads its batches once for each product, and a {type(self.batches).__name__} can be read "
                f"only once; give a list, or an object whose __iter__ starts from the beginning"
            )

    def __iter__(self) -> Iterator[PyTree]:
        batches: Any = self.batches
        return (batches[i] for i in range(len(batches))) if _is_indexed(batches) else iter(batches)

    def weighted(self) -> Iterator[tuple[float, PyTree]]:
        """Pairs (number of examples, batch); ValueError for no batches, an empty one, or a pass unlike the first.

        Every pass that is read to its end is compared with the first one, by sums that do not depend on the order.
        """
        sums: dict[str, np.ndarray] = {}
        number, most = 0, max(_MOST, 10 * (_length(self.batches) or 0))
        for number, batch in enumerate(self, 1):
            if number > most:
                raise ValueError(
                    f"the loader still went on after {most:,} batches; give one pass over the data, as with take(n), "
                    f"or an object with a length, __len__"
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
        """Reads a loader without a length once, without products, so that an endless one is noticed."""
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
                f"two passes over the batches read different data (at {changed[:4]}), so each product would belong "
                f"to a different loss; turn off random augmentation, turn off drop_last if the order is shuffled, or "
                f"read the batches once: Batches(list(loader))"
            )

    def fold(self, step: Callable[[Any, PyTree, float, int], Any]) -> Any:
        """A running mean: ``step(mean, batch, share, number)``, with None for the first mean, batch by batch.

        The next batch is read while the device works on this one. The loop waits before it reads further; otherwise
        all batches would be on the device at once.
        """
        total, mean = 0.0, None
        for number, (size, batch) in enumerate(self.weighted()):
            total += size
            following = step(mean, batch, size / total, number)
            jax.block_until_ready(mean)
            mean = following
        return mean


def _is_indexed(batches):
    """Whether this is a data set that is read by index and does not iterate."""
    return not isinstance(batches, Iterable) and hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _length(batches):
    """The number of batches, or None if it is unknown; the ``__len__`` of endless loaders raises."""
    try:
        return len(batches)
    except TypeError:
        return None


def _add(sums, size, batch):
    """Adds one batch to the sums of a pass: for every array a fixed linear function of its examples, and its scale."""
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
    if x.dtype.kind not in "biuf":  # numpy cannot sum bfloat16 and similar types
        x = x.astype(np.float32)
    rows = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    # The plain sum would not tell flipped or shifted images apart.
    pattern = np.cos(np.arange(rows.shape[1]) + 1.0)
    return np.array([rows.sum(0, dtype=np.float64) @ pattern, np.abs(rows).sum(dtype=np.float64)])


@jax.jit
def _sums_on_device(x):
    rows = x.astype(jnp.float32).reshape(len(x), -1) if x.ndim else x.astype(jnp.float32).reshape(1, 1)
    return jnp.stack([rows.sum(0) @ jnp.cos(jnp.arange(rows.shape[1]) + 1.0), jnp.abs(rows).sum()])


def first_batch(batch: PyTree) -> PyTree:
    """The batch itself, or the first of many."""
    return next(batch.weighted())[1] if isinstance(batch, Batches) else batch
