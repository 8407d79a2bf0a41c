"""How much of the curvature couples layers: the norms of all blocks of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import check_choice, check_count, check_key
from jaxhess._products import At
from jaxhess._trees import draw_keys, full_precision, random_like, sampler, squared_norm
from jaxhess.gram import gram_matrices
from jaxhess.operators import product_at
from jaxhess.problem import pose
from jaxhess.selections import Selections

PyTree = Any


class Interactions(NamedTuple):
    """Squared Frobenius norms of the blocks A_lk of a matrix, for all pairs of layers.

    Attributes:
      names: the layers, in network order.
      norms: (L, L) float64, ||A_lk||_F^2; their sum is ||A||_F^2.
      std_error: (L, L) float64, the standard errors; zeros where the norms are exact.

    Example:
      >>> import numpy as np, jaxhess as jh
      >>> found = jh.Interactions(["a", "b"], np.array([[2.0, 1.0], [1.0, 4.0]]), np.zeros((2, 2)))
      >>> found.off_diagonal_share
      0.25

    Reference: as `layer_interactions`.
    """

    names: list[str]
    norms: np.ndarray
    std_error: np.ndarray

    @property
    def off_diagonal_share(self) -> float:
        """The share of ||A||_F^2 that lies outside the diagonal blocks: what a layerwise picture does not see."""
        total = self.norms.sum()
        return float(1 - np.trace(self.norms) / total) if total else 0.0


def layer_interactions(
    objective: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    curvature: str = "ggn",
    method: str = "auto",
    key: jax.Array | None = None,
    num_probes: int = 64,
    layers: Selections = None,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> Interactions:
    """The map of layer interactions: ||A_lk||_F^2 for all pairs of layers l and k.

    Exactly for G: G_lk = R_l' R_k with the rows R = B' J, so that ||G_lk||_F^2 = <K_l, K_k>_F with the layers' Gram
    matrices K_l = R_l R_l'. By probes for any curvature: with a random v_l in layer l alone, E ||(A v_l)_k||^2 is
    ||A_lk||_F^2, one product for each layer and probe.

    Args:
      objective, params, batch, differentiation, has_aux: as for `hessian`.
      curvature: "ggn", "hessian" or "functional".
      method: "exact" from the Gram matrix, for "ggn" and one batch; "hutchinson" for probes; "auto" for the first where
        it is possible.
      key: a JAX random key, for probes.
      num_probes: probes of each layer.
      layers: which layers or groups; all layers by default, else as for `layer_spectra`.
      max_bytes, progress: as for `ggn_eigenvalues`.

    Returns:
      `Interactions`.

    Raises:
      TypeError, ValueError: as `hessian` and `ggn_eigenvalues`; ValueError for "exact" with another curvature.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, b: b["x"] @ p["a"]["w"] + b["x"] @ p["b"]["w"], jh.squared_error)
      >>> params = {"a": {"w": jnp.zeros((2, 1))}, "b": {"w": jnp.zeros((2, 1))}}
      >>> found = jh.layer_interactions(objective, params, {"x": jnp.eye(2), "label": jnp.ones((2, 1))})
      >>> found.norms.round(4).tolist(), round(found.off_diagonal_share, 4)
      ([[2.0, 2.0], [2.0, 2.0]], 0.5)

    Reference: the block-diagonal picture of the paper, whose error this is; Hutchinson 1990 (the probes).
    """
    check_choice("method", method, ("auto", "exact", "hutchinson"))
    if method == "exact" and curvature != "ggn":
        raise ValueError(f"only interactions in G are exact, not those of {curvature!r}; use method='hutchinson'")
    problem = pose(curvature, objective, params, batch, has_aux, layers, differentiation)
    names = [layer.name for layer in problem.layers]
    if method == "exact" or (method == "auto" and curvature == "ggn" and not problem.many):
        grams, _ = gram_matrices(problem, problem.layers, max_bytes, progress)
        stacked = np.stack([grams[name].ravel() for name in names])
        return Interactions(names, stacked @ stacked.T, np.zeros((len(names), len(names))))
    check_key(key)
    check_count("num_probes", num_probes)
    at, distribution = product_at(curvature, problem, problem.whole), sampler("rademacher")
    pushed: list[Any] = [_Pushed(at, layer, distribution) for layer in problem.layers]
    samples = []
    for probe in range(num_probes):
        args = (draw_keys(key, probe, 1)[0],)
        rows = [problem.mean(one, partial(_same, args)) for one in pushed]
        samples.append([[float(x) for x in _norms(problem.layers, row)] for row in rows])
        if progress is not None:
            progress(probe + 1, num_probes)
    table = np.asarray(samples)
    table = (table + table.swapaxes(1, 2)) / 2  # A is symmetric
    error = table.std(0, ddof=1) / num_probes**0.5 if num_probes > 1 else np.full(table.shape[1:], np.nan)
    return Interactions(names, table.mean(0), error)


def _same(args, number):
    return args


class _Pushed(NamedTuple):
    """A v_l for a random v_l in one layer; static under ``jit``."""

    at: At
    layer: Any
    distribution: Callable

    def __call__(self, params, batch, key):
        v = random_like(key, self.layer.take(params), self.distribution)
        return self.at(params, batch, self.layer.put(jax.tree.map(jnp.zeros_like, params), v))


@partial(jax.jit, static_argnums=0)
@full_precision
def _norms(layers, tree):
    return [squared_norm(layer.arrays(tree)) for layer in layers]
