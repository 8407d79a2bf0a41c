"""What selections cover: each entry of the parameters once, more than once, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import tree_util

PyTree = Any


def repeated(params: PyTree, pieces: Sequence) -> list[int]:
    """The leaves of which entries are selected more than once."""
    return [i for i, (low, high) in _counts(params, pieces).items() if high > 1]


def partition(params: PyTree, layers: Sequence) -> bool:
    """Whether the layers hold every entry of the parameters once."""
    counts = _counts(params, [piece for layer in layers for piece in layer.pieces])
    sizes = [np.size(x) for x in tree_util.tree_leaves(params)]
    return all(counts.get(i, (0, 0)) == (1, 1) for i, size in enumerate(sizes) if size)


def _counts(params, pieces):
    """{leaf: (smallest, largest number of times that an entry is selected)}."""
    leaves, by_leaf = tree_util.tree_leaves(params), dict[int, list]()
    for piece in pieces:
        by_leaf.setdefault(piece.leaf, []).append(piece)
    found = {}
    for i, mine in by_leaf.items():
        if all(piece.at is None for piece in mine):
            found[i] = (len(mine), len(mine))
            continue
        count = np.zeros(jnp.shape(leaves[i]), np.uint8)
        for piece in mine:
            count[piece.key()] += 1
        found[i] = (int(count.min()), int(count.max()))
    return found
