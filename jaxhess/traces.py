"""Traces, each with its standard error: Hutchinson's of one operator, and those of all layers at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxhess._checks import NotFiniteError, check_choice, check_key, check_like, is_traced
from jaxhess._columns import columns, columns_of, small_layers
from jaxhess._diagnosis import why_not_finite
from jaxhess._functional import PATIENCE, h_product, layers_without_h
from jaxhess._linear import as_linear
from jaxhess._probing import by_probes, by_sweeps, to_tolerance, zeros
from jaxhess._rows import NoGramError
from jaxhess._scales import scales_of
from jaxhess._sweep import sweep_of
from jaxhess._trees import (
    draw_keys,
    inner,
    random_like,
    random_rows,
    sampler,
    tree_bytes,
    tree_size,
)
from jaxhess._xtrace import samples as xtrace
from jaxhess.estimates import Estimate, Plan
from jaxhess.gram import row_traces
from jaxhess.objective import NoFactorError, Objective
from jaxhess.operators import product
from jaxhess.problem import Problem, check_values, pose
from jaxhess.selections import Selections

PyTree = Any
METHODS = ("auto", "hutchinson", "split", "exact")


def trace(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    num_probes: int = 64,
    probe: str = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    max_probes: int = 1024,
    chunk_size: int = 8,
    method: str = "hutchinson",
) -> Estimate:
    """An estimate of a trace: the mean of v' A v over random v with E[v v'] = I (Hutchinson), or XTrace.

    A Rademacher probe has the variance 2 * (||A||_F^2 - sum_i A_ii^2), a Gaussian one 2 * ||A||_F^2.

    XTrace takes the trace on the range of the products of m random vectors, and probes what is left with each of them
    in turn. It is far more precise where a few eigenvalues make most of the trace, and less where all are alike.

    Args:
      operator: v -> A v, as from `hessian`; traceable by JAX, or over `Batches`.
      like: a pytree of arrays like v.
      key: a JAX random key; the same key gives the same probes, and a longer run begins with those of a shorter one.
      num_probes: number of products. With a tolerance it is the smallest number (at least 8: with fewer, the standard
        error is too often small by chance).
      probe: "rademacher" or "gaussian".
      rtol, atol: with either, probes are added until the standard error is at most max(atol, rtol * |mean|), or
        ``max_probes`` is reached. The standard error of the result tells which happened.
      max_probes: largest number of probes under a tolerance.
      chunk_size: probes computed at a time; they take the memory of as many products.
      method: "hutchinson" or "xtrace". XTrace takes Gaussian vectors, half as many as products, and holds three times
        as many vectors like v. Its estimates share their vectors, so that the variance of their mean is up to twice
        that of independent ones; the standard error says so. With as many products as dimensions it is exact.

    Returns:
      `Estimate` of scalars. Hutchinson's works under ``jit`` without tolerances.

    Raises:
      ValueError: for fewer than one probe, an unknown probe, a negative tolerance, an empty ``like``, or a product that
        is not finite; for XTrace with a tolerance, or fewer than eight products.
      TypeError: if ``key`` is not a JAX random key, or for a tolerance or XTrace under ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> est = jh.trace(lambda v: 2.0 * v, like=jnp.zeros(5), key=jax.random.key(0), num_probes=4)
      >>> float(est.mean), float(est.std_error), est.num_probes
      (10.0, 0.0, 4)

    Reference: Hutchinson 1990; Avron and Toledo 2011; Algorithm 1 of the paper; Epperly, Tropp and Webber 2024, XTrace:
    making the most of every sample in stochastic trace estimation.
    """
    check_key(key)
    check_like("like", like)
    check_choice("method", method, ("hutchinson", "xtrace"))
    distribution, operator = sampler(probe), as_linear(operator)
    plan = Plan(num_probes, rtol, atol, max_probes, chunk_size)

    def draw(keys):
        vectors = random_rows(keys, like, distribution)
        return _dots(vectors, operator.func.stacked(*operator.args, vectors))

    def why():
        return operator.func.why_not_finite(*operator.args, random_like(key, like, distribution))

    if method == "xtrace":
        return _xtrace(operator, like, key, plan, why)
    return plan.estimate(draw, why, key, ["the operator"])[0]


def _xtrace(operator, like, key, plan, why):
    if plan.adaptive:
        raise ValueError('XTrace takes no tolerance; give num_probes, or use method="hutchinson"')
    if plan.num_probes < 8:
        raise ValueError(f"XTrace takes at least 8 products, got num_probes={plan.num_probes}")
    if is_traced(like, key):
        raise TypeError('XTrace cannot run under jit; use method="hutchinson" there')
    if tree_size(like) <= plan.num_probes:
        value, error = columns(operator, like)
        return Estimate(value, error, 0, "exact")
    count = plan.num_probes // 2
    found = xtrace(operator, like, draw_keys(key, 0, count))
    if not np.isfinite(found).all():
        raise NotFiniteError(f"products of the operator are not finite: {why()}")
    return Estimate(found.mean(), (2 * found.var(ddof=1) / count) ** 0.5, 2 * count, "xtrace")


def layer_traces(
    objective: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_probes: int = 64,
    curvature: str = "hessian",
    method: str = "auto",
    probe: str = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    max_probes: int = 1024,
    chunk_size: int = 8,
    layers: Selections = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> dict[str, Estimate]:
    """The traces of every layer's block, and of the whole, each with its standard error.

    By probes of the whole net: with one v over all parameters, v_l . (A v)_l is unbiased for Tr(A_l) for every layer at
    once, for one product. By sweeps: v_l . H_l v_l is the second derivative along v_l of the outputs times the slope of
    the criterion; one pass back and one forward find that of all layers, each by itself and each example with a v of
    its own. For "ggn": with B B' = S and random e over the outputs, ||(J' B e)_l||^2 is unbiased for Tr(G_l), for one
    backward pass; "auto" sums it over groups of examples that do not depend on each other, which is less noisy.
    Exactly: Tr(G_l) = sum ||(J' b)_l||^2 over the columns b of B, one backward pass of an example for each of its
    outputs. Tr(Hess_l) = Tr(G_l) + Tr(H_l), where H_l is zero in piecewise linear nets.

    Args:
      objective: a loss, or an `Objective` (which "ggn" and "functional" need).
      params: a pytree of floating-point arrays.
      batch: any pytree, or `Batches`.
      key: a JAX random key.
      num_probes, probe, rtol, atol, max_probes, chunk_size: as for `trace`; a tolerance must hold for every layer and
        for the total. Under a tolerance, "auto" begins with 16 probes of all layers. A sweep over many layers takes
        longer than a product; as many are drawn as take the time of ``num_probes`` products, at least 8.
      curvature: "hessian", "ggn" or "functional".
      method: "hutchinson" for probes of that curvature alone. "exact": G from its rows, other curvatures column by
        column. "split": Hess as G + H, with H in sweeps, or by probes of the whole net where forward mode cannot
        differentiate the outputs twice, or has no room for it. "auto": G exactly where an example has at most twice as
        many outputs as there are probes; Hess by the split where examples do not depend on each other; otherwise by
        probes that are scaled layer by layer, so that flat layers are not lost among steep ones (four products more
        find the scales). Layers of a few parameters go column by column. Under a tolerance, layers that would need many
        probes over all layers get probes of their own. ``Estimate.method`` says which it was.
      layers: which layers or groups; all layers by default, else as for `layer_spectra`.
      differentiation: as for `hessian`.
      has_aux: as for `hessian`.

    Returns:
      {layer: Estimate} in network order, and "total" with the standard error of the sum. Layers share probes, so
      it is not the root of the sum of squares.

    Raises:
      TypeError, ValueError: as `hessian` and `trace`; ValueError for "ggn" with a criterion that is not convex.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, batch: batch["x"] @ p["fc"]["w"], jh.squared_error)
      >>> batch = {"x": jnp.eye(2), "label": jnp.ones((2, 1))}
      >>> params = {"fc": {"w": jnp.zeros((2, 1))}}
      >>> traces = jh.layer_traces(objective, params, batch, key=jax.random.key(0), num_probes=4)
      >>> {name: float(est.mean) for name, est in traces.items()}
      {'fc': 2.0, 'total': 2.0}

    Reference: Hutchinson 1990; for the one-backward estimator Schraudolph 2002 and Martens et al. 2012 (curvature
    propagation).
    """
    check_key(key)
    check_choice("method", method, METHODS)
    problem = pose(curvature, objective, params, batch, has_aux, layers, differentiation)
    plan = Plan(num_probes, rtol, atol, max_probes, chunk_size)
    return traces_of(problem, curvature, key, plan, probe, method)


def traces_of(
    problem: Problem, curvature: str, key: jax.Array, plan: Plan, probe: str = "rademacher", method: str = "auto"
) -> dict[str, Estimate]:
    """As `layer_traces`, of a `Problem`."""
    sampler(probe)  # raises an error for an unknown one, also where no probe is drawn
    if method == "split" and curvature != "hessian":
        raise ValueError(f"only the Hessian is split, into G and H; ask for {curvature!r} by another method")
    if method == "split" and not isinstance(problem.loss, Objective):
        raise TypeError("the split of the Hessian into G and H needs an Objective; make one of predict and criterion")
    if method == "exact":
        return _exact(problem, curvature)
    if method != "auto" or is_traced(problem.params, problem.first, key):
        if method == "split":
            return _split(problem, key, plan, probe)
        return by_probes(problem, curvature, problem.layers, key, plan, probe)
    if curvature == "ggn":
        if _rows_are_cheap(problem, plan):
            return _exact(problem, "ggn")
        return by_probes(problem, curvature, problem.layers, key, plan, probe, "auto")
    small = small_layers(problem, plan)
    if len(small) == len(problem.layers) and problem.covered:
        return _exact(problem, curvature)
    if curvature == "hessian" and _splits(problem):
        found = _split(problem, key, plan, probe)
    elif curvature == "functional" and (sweep := sweep_of(problem, sampler(probe))):
        found = zeros(problem, "exact") | by_sweeps(problem, sweep, key, plan, probe, zeros(problem, "hutchinson"))
    else:
        by = to_tolerance if plan.adaptive else partial(by_probes, layers=problem.layers)
        scales = scales_of(product(curvature, problem), problem, problem.layers, key)
        found = by(problem, curvature, key=key, plan=plan, probe=probe, scales=scales)
    return found | columns_of(problem, curvature, [x for x in small if found[x.name].method != "exact"])


# ---- exact ones ----


def _exact(problem, curvature):
    if curvature == "ggn":
        found = {name: Estimate(*pair, 0, "exact") for name, pair in row_traces(problem).items()}
    else:
        found = columns_of(problem, curvature, problem.layers)
    whole = found.pop("total", None)
    if whole is None and not problem.covered:
        whole = _sum(columns_of(problem, curvature, problem.parts()))
    if bad := [name for name, e in found.items() if not np.isfinite(e.mean)]:
        for batch in problem.batch if problem.many else ():
            check_values(problem.loss, problem.params, batch)  # says what is wrong with it, where it can
        why = why_not_finite(curvature, problem.loss, problem.params, problem.batch)
        raise NotFiniteError(f"exact traces are not finite for {[*bad, 'total']}: {why}")
    return found | {"total": whole or _sum(found)}


def _sum(found):
    """Of exact values."""
    total = sum(e.mean for e in found.values()), sum(e.std_error**2 for e in found.values()) ** 0.5
    return Estimate(*total, 0, "exact")


def _rows_are_cheap(problem, plan):
    """Whether an example has not many more outputs than there are probes, and does not depend on others."""
    outputs = problem.outputs_like
    each = outputs.size // max(1, len(outputs)) if outputs.ndim > 1 else np.inf
    if each > 2 * plan.num_probes:  # for twice the time the error is gone
        return False
    return each * tree_bytes(problem.params) <= 2**30 and problem.of_examples is not None


# ---- Hess = G + H ----


def _splits(problem):
    """Whether G and H can be had one by one, and G without the noise between examples."""
    if not isinstance(problem.loss, Objective) or problem.of_examples is None:
        return False
    try:
        return problem.factored() is not None
    except NoFactorError:
        return False


def _split(problem, key, plan, probe):
    ggn_key, key = jax.random.split(key)
    sweep = sweep_of(problem, sampler(probe))
    ggn = _ggn(problem, ggn_key, plan.of_ggn(4 if sweep is None or plan.adaptive else 1), probe)
    part = {name: Estimate(e.mean, e.std_error, e.num_probes, "split") for name, e in ggn.items()}
    if sweep is not None:
        return ggn | by_sweeps(problem, sweep, key, plan, probe, part)
    functional = h_product(problem)
    zero = layers_without_h(functional, problem, problem.layers, key, PATIENCE)
    left = {name: e for name, e in part.items() if name not in zero}
    if list(left) == ["total"]:  # which takes in what no group holds
        rest = () if problem.covered else problem.parts()
        if len(layers_without_h(functional, problem, rest, key, patience=1)) == len(rest):
            return ggn
    layers = tuple(layer for layer in problem.layers if layer.name in left)
    scales = scales_of(functional, problem, layers, key)
    if plan.adaptive:
        return ggn | to_tolerance(problem, "functional", key, plan, probe, left, scales)
    found = by_probes(problem, "functional", layers, key, plan, probe, scales=scales)
    return ggn | {name: left[name].plus(e) for name, e in found.items()}


def _ggn(problem, key, plan, probe):
    """G as a part of the Hessian."""
    try:
        found = traces_of(problem, "ggn", key, plan, probe, "auto")
    except NoGramError:
        found = traces_of(problem, "ggn", key, plan, probe, "hutchinson")
    return {name: Estimate(*e, "split" if e.num_probes else "exact") for name, e in found.items()}


@jax.jit
def _dots(vectors, products):
    return jax.vmap(inner)(vectors, products)[:, None]
