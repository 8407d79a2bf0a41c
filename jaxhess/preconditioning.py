"""Curvature in the geometry of an optimizer: D^-1/2 A D^-1/2, with D read from the state of an optax optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from jaxhess._checks import at_least_float32, is_traced
from jaxhess._linear import Linear, as_linear

PyTree = Any


def precondition(operator: Callable[[PyTree], PyTree], scale: PyTree) -> Partial:
    """The operator v -> D^-1/2 A D^-1/2 v, with the diagonal matrix D.

    It has the eigenvalues of D^-1 A, and is symmetric. Gradient descent that divides its updates by D, as Adam does
    without momentum, is stable on a quadratic while they stay below 2 / learning rate.

    Args:
      operator: a symmetric v -> A v, as from `hessian`.
      scale: the diagonal of D, a pytree of positive arrays like v, as from `preconditioner`. Scalars stand for an array
        of equal entries. For the block of a layer, give ``subtree(scale, layer)``.

    Returns:
      An operator as ``operator``, which `spectrum`, `top_eigenpairs`, `trace` and `linearize` take.

    Raises:
      ValueError: for a scale that is not positive and finite; when called, for a v of another structure.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> pv = jh.precondition(lambda v: jnp.array([2.0, 8.0]) * v, jnp.array([1.0, 4.0]))
      >>> pv(jnp.ones(2))
      Array([2., 2.], dtype=float32)

    Reference: Cohen et al. 2022, Adaptive gradient methods at the edge of stability (arXiv 2207.14484), section 3.
    """
    scale = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), scale)
    if not is_traced(scale):
        paths = jax.tree_util.tree_leaves_with_path(scale)
        bad = [jax.tree_util.keystr(p) for p, x in paths if not bool((jnp.isfinite(x) & (x > 0)).all())]
        if bad:
            raise ValueError(f"the scale must be positive and finite, and is not at {bad}")
    linear = as_linear(operator)
    return Partial(_Preconditioned(linear.func.on_host), linear, jax.tree.map(jax.lax.rsqrt, scale))


@dataclasses.dataclass(frozen=True)
class _Preconditioned(Linear):
    """R A R with R = D^-1/2; ``on_host`` is that of A."""

    on_host: bool  # type: ignore[mutable-override]

    def __call__(self, linear, roots, v):
        return _times(roots, linear(_times(roots, v)))

    def stacked(self, linear, roots, vectors):
        return _times(roots, linear.func.stacked(*linear.args, _times(roots, vectors, 1)), 1)

    def perturbed(self, key, size, linear, roots):
        moved = linear.func.perturbed(key, size, *linear.args)
        return None if moved is None else Partial(self, moved, roots)

    def rounding(self, linear, roots, like):
        return linear.func.rounding(*linear.args, like)

    def why_not_finite(self, linear, roots, v):
        return linear.func.why_not_finite(*linear.args, _times(roots, v))


def _times(roots, v, axes=0):
    """Entry by entry, of rows too."""
    if jax.tree.structure(roots) != jax.tree.structure(v):
        raise ValueError(
            f"v does not match the scale: {jax.tree.structure(v)} for {jax.tree.structure(roots)}; give a scale like "
            f"v, such as subtree(scale, layer) for one layer"
        )

    def times(root, x):
        if root.shape not in ((), x.shape[axes:]):
            raise ValueError(f"the scale has shape {root.shape} where v has {x.shape[axes:]}; give a scale like v")
        return x * jnp.broadcast_to(root, x.shape[axes:])[(None,) * axes].astype(x.dtype)

    return jax.tree.map(times, roots, v)


# ---- D of an optimizer ----


class _Kind(NamedTuple):
    """How an optax transformation divides: by D = of(state, b2, eps, eps_root); with optax's own defaults."""

    of: Callable[[Any, Any, Any, Any], PyTree]
    b2: float | None
    eps: float
    eps_root: float = 0.0


def _corrected(moment, b2, count):
    """Adam's nu / (1 - b2^t); nothing is known before the first step, and nu is zero."""
    left = 1 - jnp.asarray(b2, jnp.float32) ** jnp.maximum(count, 1)
    return jax.tree.map(lambda x: x.astype(at_least_float32(x)) / left, moment)


def _adam(state, b2, eps, eps_root):
    return jax.tree.map(lambda x: jnp.sqrt(x + eps_root) + eps, _corrected(state.nu, b2, state.count))


def _amsgrad(state, b2, eps, eps_root):
    return jax.tree.map(lambda x: jnp.sqrt(x) + eps, state.nu_max)


def _rms(state, b2, eps, eps_root):
    nu = _corrected(state.nu, b2, state.count) if "count" in state._fields else state.nu
    return jax.tree.map(lambda x: jnp.sqrt(x + eps), nu)


def _centered(state, b2, eps, eps_root):
    moments = state.nu, state.mu
    if "count" in state._fields:  # every tuple has a method of this name
        moments = tuple(_corrected(moment, b2, state.count) for moment in moments)
    return jax.tree.map(lambda nu, mu: jnp.sqrt(nu - mu**2 + eps), *moments)


def _adagrad(state, b2, eps, eps_root):
    return jax.tree.map(lambda x: jnp.sqrt(x + eps), state.sum_of_squares)


# By name, for some classes are not in every version of optax.
_KINDS = {
    "ScaleByAdamState": _Kind(_adam, 0.999, 1e-8),
    "ScaleByBeliefState": _Kind(_adam, 0.999, 1e-16, 1e-16),
    "ScaleByAmsgradState": _Kind(_amsgrad, None, 1e-8),
    "ScaleByRmsState": _Kind(_rms, None, 1e-8),
    "ScaleByRmsWithCountState": _Kind(_rms, 0.9, 1e-8),
    "ScaleByRStdDevState": _Kind(_centered, None, 1e-8),
    "ScaleByRStdDevWithCountState": _Kind(_centered, 0.9, 1e-8),
    "ScaleByRssState": _Kind(_adagrad, None, 1e-7),
}


def preconditioner(
    opt_state: PyTree,
    *,
    params: PyTree = None,
    b2: float | None = None,
    eps: float | None = None,
    eps_root: float | None = None,
) -> PyTree:
    """The D by which an adaptive optimizer divides its updates, read from its optax state.

    Adam and AdamW: D = sqrt(nu / (1 - b2^t) + eps_root) + eps after t steps; before the first one nu is zero. RMSProp:
    D = sqrt(nu + eps), centred sqrt(nu - mu^2 + eps). Adagrad: D = sqrt(sum of squares + eps). Also AMSGrad and
    AdaBelief. The state is found inside of ``optax.chain``, ``optax.multi_transform``, ``optax.masked``,
    ``optax.MultiSteps`` and ``optax.inject_hyperparams``.

    Optimizers that keep something else in the state of Adam or RMSProp (AdaMax, Yogi, ADOPT, schedule-free ones,
    RMSProp with ``eps_in_sqrt=False``) cannot be told from them.

    Args:
      opt_state: the state of an optax optimizer.
      params: the parameters, if some of them are changed by another, not adaptive optimizer of ``multi_transform``:
        their D is 1.
      b2: decay of the second moment, for the bias correction. By default what ``inject_hyperparams`` keeps, or optax's
        default: 0.999 for Adam, 0.9 for RMSProp with bias correction.
      eps: likewise; optax's defaults are 1e-8, for Adagrad 1e-7 and for AdaBelief 1e-16.
      eps_root: likewise, of Adam; by default 0, for AdaBelief 1e-16.

    Returns:
      A pytree like the parameters, at least in float32.

    Raises:
      ValueError: for a state without second moments, as of SGD, with two of them for the same parameter, or with none
        for some parameters where ``params`` is not given.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh, optax
      >>> tx = optax.adam(1e-3)
      >>> _, state = tx.update(jnp.array([3.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(x), 3) for x in jh.preconditioner(state)]
      [3.0, 0.0]

    Reference: Kingma and Ba 2015, Adam, algorithm 1; Cohen et al. 2022 (arXiv 2207.14484), equation (2).
    """
    given = {"b2": b2, "eps": eps, "eps_root": eps_root}
    found = list(_scales(opt_state, {}, {name: value for name, value in given.items() if value is not None}))
    if not found:
        raise ValueError(
            f"the optimizer state holds no second moments (looked for {sorted(_KINDS)} in a "
            f"{type(opt_state).__name__}); SGD has no preconditioner, its curvature is the Hessian as it is"
        )
    merged = functools.reduce(_merged, found)
    masked = [node for node in jax.tree.leaves(merged, is_leaf=_is_masked) if _is_masked(node)]
    if masked and params is None:
        raise ValueError(
            "some parameters are changed by an optimizer without second moments; give params=, and their scale is 1"
        )
    if not masked:
        return merged

    def filled(scale, like):
        return jax.tree.map(lambda x: jnp.ones_like(x, at_least_float32(x)), like) if _is_masked(scale) else scale

    return jax.tree.map(filled, merged, params, is_leaf=_is_masked)


def _scales(state: Any, known: Mapping, given: Mapping) -> Iterator[PyTree]:
    """D of every adaptive transformation in a state; ``known`` are the hyperparameters that stand around it."""
    kind = _KINDS.get(type(state).__name__)
    if kind is not None:
        own = {"b2": known.get("decay", kind.b2), "eps": kind.eps, "eps_root": kind.eps_root}
        values = {**own, **{name: value for name, value in known.items() if name in own}, **given}
        yield kind.of(state, values["b2"], values["eps"], values["eps_root"])
        return
    known = {**known, **getattr(state, "hyperparams", {})}
    if isinstance(state, Mapping):
        inner: Any = state.values()
    else:
        inner = state if isinstance(state, (tuple, list)) else ()
    for one in inner:
        yield from _scales(one, known, given)


def _is_masked(node):
    return isinstance(node, optax.MaskedNode)


def _merged(a, b):
    """Of two optimizers the one that changes an array, where the other has a mask."""
    if _is_masked(a) or _is_masked(b):
        return b if _is_masked(a) else a
    (mine, treedef), (theirs, _) = (jax.tree.flatten(x, is_leaf=lambda node, x=x: node is not x) for x in (a, b))
    if not mine or mine[0] is a:
        raise ValueError("two transformations hold second moments of one parameter; give the state of one of them")
    return jax.tree.unflatten(treedef, [_merged(*pair) for pair in zip(mine, theirs, strict=True)])
