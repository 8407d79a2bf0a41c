"""Exact spectra of the Gauss-Newton matrix from its Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxhess.batches import Batches
from jaxhess.layers import Layer, find_layers, layer_names
from jaxhess.objective import Objective, check_factor, output_factor_product
from jaxhess.operators import prepare
from jaxhess.trace import random_like

PyTree = Any


def ggn_eigenvalues(
    objective: Objective,
    params: PyTree,
    batch: PyTree,
    *,
    layer: str | None = None,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> np.ndarray:
    """All non-zero eigenvalues of G, or of one layer's G_l, exactly.

    With B B' = S the matrix G = (J' B)(J' B)' has the non-zero eigenvalues of the Gram matrix (J' B)' (J' B), whose
    side is the number of examples times C. Cheap while that is a few thousand; use `layer_spectra` beyond. The
    Gram matrix is summed over layers and built in blocks of rows: no Jacobian of the whole net is ever held.

    Where examples do not depend on each other (the outputs of an example alone are its outputs in the batch), each
    row is differentiated through its own example only; otherwise (batch norm in training mode) through the batch.

    Args:
      objective: an `Objective` with a criterion convex in the outputs.
      params, has_aux: as for `hessian`.
      batch: one batch.
      layer: a name from `layer_names`; by default the whole net.
      max_bytes: memory for rows of the largest layer's Jacobian.
      progress: ``progress(done, total)`` in blocks of the Gram matrix.

    Returns:
      (r,) float64, descending; values that rounding cannot tell from zero are left out.

    Raises:
      TypeError, ValueError: as `hessian`; TypeError for `Batches`; ValueError for a criterion without a factor.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda w, batch: batch["x"] @ w, jh.squared_error)
      >>> batch = {"x": jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), "label": jnp.ones((2, 1))}
      >>> jh.ggn_eigenvalues(objective, jnp.zeros((3, 1)), batch)
      array([4., 1.])

    Reference: Papyan 2019, section 2 (G as the second moment of delta_{i,c,c'}).
    """
    loss, params = prepare("ggn", objective, params, batch, has_aux)
    layers = find_layers(params, layer_names(params) if layer is None else [layer])
    values = gram_eigenvalues(loss, params, batch, layers, max_bytes=max_bytes, progress=progress, only_total=True)
    return values["total"]


def gram_eigenvalues(
    loss: Objective,
    params: PyTree,
    batch: PyTree,
    layers: Sequence[Layer],
    *,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    only_total: bool = False,
) -> dict[str, np.ndarray]:
    """The non-zero eigenvalues of each layer's G_l (if wanted) and of their sum, "total"; see `ggn_eigenvalues`."""
    if isinstance(batch, Batches):
        raise TypeError(
            "the Gram matrix pairs every example with every other and takes one batch, not Batches; "
            "join them into one, or use method='lanczos'"
        )
    layers = tuple(layers)
    outputs = _predict(loss, params, batch)
    if not bool(jnp.isfinite(outputs).all()):
        raise ValueError("the outputs of predict are not finite; look for NaN or overflow in the batch or the network")
    check_factor(loss.criterion, outputs, batch)
    split = _independent(loss, params, batch, outputs)
    count = len(outputs) if split else outputs.size
    rows_each = outputs.size // count
    widest = max(sum(x.nbytes for x in layer.arrays(params)) for layer in layers)
    block = min(count, max(1, max_bytes // (2 * widest * rows_each)))
    starts = range(0, count, block)

    total = np.zeros((outputs.size, outputs.size))
    grams = {} if only_total else {layer.name: np.zeros_like(total) for layer in layers}
    pairs = [(a, b) for a in starts for b in starts if a <= b]
    for done, (a, b) in enumerate(pairs, 1):
        # One shape for all blocks; what is too many at the end is cut off again.
        left, right = (np.minimum(np.arange(s, s + block), count - 1) for s in (a, b))
        tiles = _gram_tiles(loss, layers, split, params, batch, left, None if a == b else right)
        rows, columns = (slice(s * rows_each, min(s + block, count) * rows_each) for s in (a, b))
        for layer, tile in zip(layers, tiles, strict=True):
            tile = np.asarray(tile, np.float64)[: rows.stop - rows.start, : columns.stop - columns.start]
            for gram in (total, grams[layer.name]) if layer.name in grams else (total,):
                gram[rows, columns] += tile
                if a != b:
                    gram[columns, rows] += tile.T
        if progress is not None:
            progress(done, len(pairs))
    grams["total"] = total
    # Rounding is that of the coarsest type on the way.
    eps = max(float(jnp.finfo(jnp.result_type(x)).eps) for x in (outputs, *jax.tree.leaves(params)))
    return {name: _nonzero(gram, 10 * eps) for name, gram in grams.items()}


def _nonzero(gram, rtol):
    values = scipy.linalg.eigvalsh(gram)[::-1]
    return values[values > rtol * max(values[0], 0)]


@partial(jax.jit, static_argnums=0)
def _predict(loss, params, batch):
    with jax.default_matmul_precision("float32"):
        return loss.predict(params, batch)


def _independent(loss, params, batch, outputs):
    """Whether each example taken alone has the outputs that it has in the batch, and the same slopes."""
    if outputs.ndim < 2:
        return False
    try:
        together, alone = _slopes(loss, params, batch)
    except (TypeError, ValueError):  # a batch that cannot be taken apart along its first axis
        return False
    return all(
        a.shape == b.shape and float(jnp.max(jnp.abs(a - b))) <= 1e-4 * float(jnp.max(jnp.abs(a)))
        for a, b in zip(together, alone, strict=True)
    )


@partial(jax.jit, static_argnums=0)
def _slopes(loss, params, batch):
    """Outputs and their derivatives in one direction: of the batch, and of each example alone."""
    direction = random_like(jax.random.key(0), params)

    def both(batch):
        return jax.jvp(lambda p: loss.predict(p, batch), (params,), (direction,))

    with jax.default_matmul_precision("float32"):
        together = both(batch)
        count = len(together[0])
        alone = jax.vmap(lambda i: [x[0] for x in both(_example(batch, count, i))])(jnp.arange(count))
    return together, alone


def _example(batch, count, i):
    """Example i as a batch of one: arrays with the examples' leading axis are cut, others are shared."""

    def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, i, 1) if jnp.shape(x)[:1] == (count,) else x

    return jax.tree.map(cut, batch)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _gram_tiles(loss, layers, independent, params, batch, left, right):
    """For each layer the inner products of the rows of B' J_l at two sets of examples (or of single rows)."""
    shape = jax.eval_shape(loss.predict, params, batch)
    count, classes = shape.shape[0], shape.shape[-1]

    def factor(outputs, noise):
        return output_factor_product(loss.criterion, outputs, batch, noise)

    def rows_of_example(columns, i):
        """One row for each position and class; B is block diagonal, so one product served all positions."""
        mine = columns[:, i].reshape(classes, -1, classes)
        places = jnp.eye(mine.shape[1], dtype=mine.dtype)
        cotangents = places[:, None, :, None] * mine[None]  # (position, class, position, output)
        pull = jax.vjp(lambda p: loss.predict(p, _example(batch, count, i)), params)[1]
        return jax.vmap(lambda c: pull(c.reshape(1, *shape.shape[1:]))[0])(cotangents.reshape(-1, *mine.shape[1:]))

    def row_of_batch(outputs, pull, i):
        basis = jnp.zeros(outputs.size, outputs.dtype).at[i].set(1).reshape(outputs.shape)
        return pull(factor(outputs, basis))[0]

    def rows(ids):
        outputs, pull = jax.vjp(lambda p: loss.predict(p, batch), params)
        if not independent:
            return jax.vmap(partial(row_of_batch, outputs, pull))(ids)
        basis = jnp.eye(classes, dtype=outputs.dtype)
        columns = jax.vmap(lambda e: factor(outputs, jnp.broadcast_to(e, outputs.shape)))(basis)
        stacked = jax.vmap(partial(rows_of_example, columns))(ids)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)

    def tile(layer, a, b):
        pick = [layer._replace(scan_index=None).arrays(side) for side in (a, b)]
        if layer.scan_index is not None:  # the rows stand before the axis of scanned layers
            pick = [[x[:, layer.scan_index] for x in side] for side in pick]
        return sum(x.reshape(len(x), -1) @ y.reshape(len(y), -1).T for x, y in zip(*pick, strict=True))

    with jax.default_matmul_precision("float32"):
        a = rows(left)
        b = a if right is None else rows(right)
        return [tile(layer, a, b) for layer in layers]
