"""How far the products of an operator can be trusted: how well they repeat, and how rounding changes them.

Lanczos's residuals count what Lanczos left undone, as if products were exact. Here a few further products, at Ritz
vectors, tell what the products themselves are worth: A y - lambda y against the residual that the recurrence claims
(an operator that changes from call to call, or is not symmetric, breaks the claim), and A y at parameters that are
moved by one rounding, which every digit that the loss loses on its way makes larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxhess._lanczos import Tridiagonal, ritz
from jaxhess._trees import combine, own_eps, take_row, to_host

PyTree = Any
_MOVES = 2  # perturbed parameters that are tried
_SAFETY = 3.0  # between what a few products show and what is printed
_REFUSED = 1e-2  # of the largest eigenvalue: what products may fail to repeat and still be called an operator


class Run(NamedTuple):
    """Where the noise of products is measured.

    Attributes:
      values: (k,) Ritz values.
      vectors: their Ritz vectors, a pytree of (k, ...).
      residuals: (k,) the norms of A y - lambda y according to the recurrence; None if it kept no basis, and the vectors
        are random.
    """

    values: np.ndarray
    vectors: PyTree
    residuals: np.ndarray | None


def ritz_run(found: Tridiagonal, vectors_of: Sequence[int] | None = None) -> Run:
    """The Ritz pairs with these indices, by default the two extreme ones, with the residuals from the recurrence."""
    values, coefficients, _ = ritz(found.alphas, found.betas)
    some = sorted({0, len(values) - 1} if vectors_of is None else set(vectors_of))
    claimed = np.abs(np.float64(found.betas[-1]) * coefficients[-1, some])
    return Run(values[some], combine(found.basis, coefficients[:, some]), claimed)


def noise(
    product: Any,
    wrap: Callable[[Partial, str], Callable],
    runs: Mapping[str, Run],
    like: PyTree,
    key: jax.Array,
    apply: Callable[[Any, Mapping[str, PyTree]], Mapping[str, PyTree]] | None = None,
) -> dict[str, float]:
    """How much to add to the residuals of each run, for the runs of one product.

    Args:
      product: the operator that all runs come from.
      wrap: ``wrap(product, name)``, the operator of a run.
      runs: {name: `Run`}.
      like: a pytree like what ``product`` takes.
      key: a JAX random key.
      apply: ``apply(product, {name: rows})``, the products of each run's rows; by default one run after the other.

    Returns:
      {name: float}, in units of the eigenvalues.

    Raises:
      ValueError: if products do not repeat themselves, or are those of a matrix that is not symmetric.
    """

    def one_by_one(product, rows):
        return {name: apply_rows(wrap(product, name), of_run) for name, of_run in rows.items()}

    apply = apply or one_by_one
    eps, own = product.func.rounding(*product.args, like), own_eps(like)
    found, products = {}, apply(product, {name: run.vectors for name, run in runs.items()})
    for name, run in runs.items():
        operator, scale = wrap(product, name), float(np.abs(run.values).max())
        if run.residuals is None:
            excess = _turned(operator, run.vectors, products[name])[0] * _growth(products[name], scale)
        else:
            excess = float(np.max(_norms(_residuals(products[name], run)) - run.residuals))
        if excess > max(_REFUSED, 10 * eps) * scale:
            _refuse(operator, run, products[name], excess / scale)
        found[name] = _SAFETY * max(excess, 0.0) + (eps * scale if eps > own else 0.0)
    changes = dict.fromkeys(runs, 0.0)
    for number in range(_MOVES):
        moved = product.func.perturbed(jax.random.fold_in(key, number), eps, *product.args)
        if moved is None:
            there = apply(product, {name: _jittered(run.vectors, eps, number) for name, run in runs.items()})
        else:
            there = apply(moved, {name: run.vectors for name, run in runs.items()})
        for name, run in runs.items():
            scale = float(np.abs(run.values).max())
            change = float(np.max(_norms(_minus(there[name], products[name]))))
            if run.residuals is None:
                change *= _growth(products[name], scale)
            changes[name] = max(changes[name], change if np.isfinite(change) else scale)
    return {name: value + _SAFETY * changes[name] for name, value in found.items()}


def _growth(products, scale):
    """From the noise of any vector's product to that of the largest eigenvalue's, taken to be as large a share."""
    size = float(np.max(_norms(products)))
    return scale / size if size else 0.0


def apply_rows(operator: Callable, vectors: PyTree) -> PyTree:
    """Row by row, so that the one compiled product of Lanczos serves; in float64 on the host."""
    count = len(jax.tree.leaves(vectors)[0])
    # Not device_put, which refuses rows that are spread over several processes.
    rows = [operator(jax.tree.map(jnp.asarray, take_row(vectors, i))) for i in range(count)]
    return jax.tree.map(lambda *parts: np.stack([to_host(part).astype(np.float64) for part in parts]), *rows)


def _residuals(products, run):
    values = run.values.astype(np.float64)
    return jax.tree.map(lambda a, y: a - to_host(y) * values.reshape(-1, *[1] * (a.ndim - 1)), products, run.vectors)


def _minus(a, b):
    return jax.tree.map(np.subtract, a, b)


def _norms(tree):
    return np.sqrt(sum(np.sum(x.reshape(len(x), -1) ** 2, axis=1) for x in jax.tree.leaves(tree)))


def _jittered(vectors, size, number):
    """For an operator whose inside is unknown: the roundings of its argument are all that can be moved."""
    generator = np.random.default_rng(number)
    return jax.tree.map(lambda y: y * (1 + size * generator.choice([-1.0, 1.0], y.shape)).astype(y.dtype), vectors)


def _turned(operator, vectors, products):
    """The largest of |r' A y - y' A r|, zero of a symmetric A, for r = x / |x|; and the largest |x|.

    The x are ``products`` A y, or what is left of them without their parts along y.
    """
    norms = _norms(products)
    rests = jax.tree.map(lambda x: x / np.maximum(norms, 1e-300).reshape(-1, *[1] * (x.ndim - 1)), products)
    turned = apply_rows(operator, jax.tree.map(lambda x, y: x.astype(y.dtype), rests, vectors))
    forms = sum(
        np.sum((a * to_host(y)).reshape(len(a), -1), axis=1)
        for a, y in zip(jax.tree.leaves(turned), jax.tree.leaves(vectors), strict=True)
    )
    return float(np.max(np.abs(norms - forms))), float(np.max(norms))


def _refuse(operator, run, products, share):
    """Says why the products are not those of one symmetric matrix, if they are not."""
    said = f"by {share:.1%} of its largest eigenvalue"
    rests = products if run.residuals is None else _residuals(products, run)
    different, size = _turned(operator, run.vectors, rests)
    if np.max(_norms(_minus(apply_rows(operator, run.vectors), products))) > 0.1 * different:
        raise ValueError(
            f"the operator gives another product for the same vector, {said}, so it has no spectrum; fix what changes "
            f"from call to call: put a dropout key into the batch, and give batches that repeat themselves"
        )
    if different > 0.1 * size or run.residuals is None:
        raise ValueError(
            f"the operator is not symmetric, {said}, and Lanczos is for symmetric ones; give a product with a Hessian "
            f"or another symmetric matrix A, or with (A + A') / 2"
        )
