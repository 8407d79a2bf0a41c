"""Estimates with many keys at several numbers of products: what both processes of `experiments.bench.accuracy` record.

Imports NumPy and SciPy only, since the other process has no JAX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats


def traces(estimate: Callable[[int, int], tuple[float, float]], products: Sequence[int], repeats: int) -> np.ndarray:
    """(products, repeats, 3): mean, standard error (NaN for none) and seconds of ``estimate(products, key)``."""
    return _table(estimate, products, repeats)


def distances(
    quadrature: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    eigenvalues: np.ndarray,
    products: Sequence[int],
    repeats: int,
) -> np.ndarray:
    """(products, repeats, 2): W1 to the exact spectrum, and seconds, of the nodes and weights from ``quadrature``."""

    def distance(count, key):
        nodes, weights = quadrature(count, key)
        if not (np.isfinite(nodes).all() and np.isfinite(weights).all()):
            return (np.nan,)
        return (float(scipy.stats.wasserstein_distance(nodes, eigenvalues, weights)),)

    return _table(distance, products, repeats)


def _table(call, products, repeats):
    return np.array([[_timed(call, count, key) for key in range(repeats)] for count in products])


def _timed(call, count, key):
    start = time.perf_counter()
    found = call(count, key)
    return [*found, time.perf_counter() - start]
