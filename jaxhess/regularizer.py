"""The Hessian trace penalty and its gradient, a third derivative, without reverse over reverse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._checks import at_least_float32, check_count, check_key
from jaxhess._cover import repeated
from jaxhess._programs import check_forward_mode, equations, program, used_inputs
from jaxhess._trees import UNROLLED, full_precision, inner, random_like, sampler
from jaxhess.batches import Batches
from jaxhess.logits import Logits
from jaxhess.objective import as_criterion
from jaxhess.problem import pose
from jaxhess.selections import Piece, check_selections, name_of, select

PyTree = Any
INSTEAD = (
    "The penalty is a third derivative and needs them; add_noise_stability flattens with gradients alone, or give the "
    "function its rule with jax.custom_jvp"
)
Weighted = Any  # Selections, or {selection: weight}


def hessian_trace_penalty(
    loss: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    layers: Weighted = "all",
    num_probes: int = 1,
    curvature: str = "hessian",
    probe: str = "rademacher",
    has_aux: bool = False,
) -> tuple[jax.Array, PyTree]:
    """The penalty sum_l w_l Tr(A_l) and its gradient, both unbiased, from the same probes.

    "hessian": with v_l scaled by sqrt(w_l), the penalty is v' Hess v and its gradient the second directional
    derivative of the gradient of the loss, jvp(jvp(grad)) along v, v. "ggn": with B B' = S and random e over the
    outputs, the penalty is sum_l w_l ||g_l||^2 with g = J' B e; its gradient is one Hessian product of ``<B e, f>``
    along w g, plus a term through B. Terms that couple two layers have mean zero, so the penalty is the trace of the
    diagonal blocks only. With equal weights, this is the trace of the whole Hessian.

    For piecewise linear nets with fixed batch statistics both forms have the same mean. In measurements "ggn" varied
    less, at about the same cost. For a criterion without a closed-form factor, "ggn" draws v over the parameters.

    Args:
      loss: ``loss(params, batch) -> scalar``; for "ggn" an `Objective`.
      params: a pytree of floating-point arrays. Half precision is converted to float32.
      batch: one batch, any pytree of arrays. `Batches` are refused, because their loop runs on the host.
      key: a JAX random key.
      layers: "all"; "middle" (`middle_layers` in network order; of three layers, all); groups that do not overlap, as
        for `layer_spectra`; or {selection: weight} with weights >= 0, such as {"block1": 0.5}.
      num_probes: number of probes. Up to 16 are computed one after another, in the memory of one; more are computed in
        16 groups. The program contains each of these, so it takes longer to compile with more of them. For a net that
        runs in a ``lax.scan``, it contains a loop over the probes instead.
      curvature: "hessian" or "ggn".
      probe: "rademacher" or "gaussian".
      has_aux: as for `hessian`.

    Returns:
      The penalty, a float32 scalar (float64 for float64 parameters), and its gradient, a pytree with the structure and
      dtypes of ``params``. Works under ``jit``.

    Raises:
      TypeError, ValueError: as `hessian`; ValueError for layers that select nothing, unknown names (the message lists
        the layers) or overlapping ones, a weight that is negative or not finite, or a loss that uses none of
        the parameters or none of the selected ones; TypeError for `Batches`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> loss = lambda p, batch: jnp.sum(p["fc"]["w"] ** 3) * batch
      >>> penalty, gradient = jh.hessian_trace_penalty(
      ...     loss, {"fc": {"w": jnp.array([1.0, 2.0])}}, 1.0, key=jax.random.key(0))
      >>> float(penalty), gradient["fc"]["w"]
      (18.0, Array([6., 6.], dtype=float32))

    Reference: equation (5) of the paper.
    """
    penalty = Penalty(loss, layers, num_probes, curvature, probe, has_aux)
    value, gradient = penalty(params, batch, key)
    return value, optax.tree.cast_like(gradient, params)


@dataclasses.dataclass(frozen=True, eq=False)
class Penalty:
    """A penalty, checked as far as is possible without parameters; arguments as for `hessian_trace_penalty`."""

    loss: Callable
    layers: Weighted = "all"
    num_probes: int = 1
    curvature: str = "hessian"
    probe: str = "rademacher"
    has_aux: bool = False

    def __post_init__(self):
        check_count("num_probes", self.num_probes)
        if self.curvature not in ("hessian", "ggn"):
            raise ValueError(f"the penalty takes curvature 'hessian' or 'ggn', got {self.curvature!r}")
        check_layers(self.layers)
        sampler(self.probe)

    def __call__(self, params: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        """The penalty and its gradient, in at least the precision of float32, whatever the parameters have."""
        check_key(key)
        if isinstance(batch, Batches):
            raise TypeError("the penalty takes one batch, not Batches; give the batch of the step")
        problem = pose(self.curvature, self.loss, params, batch, self.has_aux)
        loss, params = problem.loss, problem.params
        in_loop = self.num_probes > 1 and _runs_in_loop(loss, params, batch)
        weights = leaf_weights(problem, self.layers)
        spec = _Form(loss, self.curvature, sampler(self.probe), self.num_probes, weights, in_loop)
        check_forward_mode(loss, (params, batch), partial(_penalty, spec), (params, batch, key), INSTEAD)
        value, gradient = _penalty(spec, params, batch, key)
        return value.astype(at_least_float32(*jax.tree.leaves(params))), gradient


def leaf_weights(problem, layers):
    """((index, weight), ...) of the parts of each leaf of the parameters; the index None stands for the whole leaf."""
    leaves = jax.tree.leaves(problem.params)
    used = used_inputs(program(problem.loss, problem.params, problem.batch))[: len(leaves)]
    if not any(used):
        raise ValueError("the loss does not use the parameters, so its Hessian is zero; check what it closes over")
    if layers == "all":
        return (((None, 1.0),),) * len(leaves)
    weights, selections = {}, layers
    if isinstance(layers, Mapping):
        weights = {name_of(name): float(value) for name, value in layers.items() if _is_number(value)}
        selections = {name_of(name): name if _is_number(value) else value for name, value in layers.items()}
    chosen = select(problem.params, selections, problem.modules, lambda: problem.names)
    if twice := repeated(problem.params, [piece for layer in chosen for piece in layer.pieces]):
        path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(problem.params)[twice[0]][0])
        raise ValueError(
            f"the layers {[layer.name for layer in chosen]} overlap at {path!r}; name each parameter once, a layer or "
            f"its slices"
        )
    entries: list[list] = [[] for _ in leaves]
    for layer in chosen:
        for piece in layer.pieces:
            entries[piece.leaf].append((piece.at, weights.get(layer.name, 1.0)))
    if not any(mine and used[i] for i, mine in enumerate(entries)):
        names = [layer.name for layer in chosen]
        raise ValueError(f"the loss uses none of the layers {names}, so the penalty is zero; choose others")
    return tuple(tuple(mine) for mine in entries)


def check_layers(layers):
    """ValueError or TypeError for a selection of layers that is wrong whatever the parameters are."""
    check_selections(layers)
    if isinstance(layers, Mapping):
        if any(isinstance(weight, jax.core.Tracer) for weight in layers.values()):
            raise TypeError("weights of layers are part of the program and cannot be traced; vary gamma instead")
        weights = {name: weight for name, weight in layers.items() if _is_number(weight)}
        bad = {name: weight for name, weight in weights.items() if not _is_weight(weight)}
        if bad:
            raise ValueError(f"weights of layers must be finite and not negative, got {bad}")
        if len(weights) == len(layers) and not any(weights.values()):
            raise ValueError("the weights of all layers are zero; give at least one layer a weight")


def _is_number(value):
    """Whether a value of {name: value} is a weight, and no selection."""
    return isinstance(value, Number) or (hasattr(value, "dtype") and np.ndim(value) == 0)


def _is_weight(weight):
    return not isinstance(weight, (bool, complex)) and 0 <= float(weight) < float("inf")


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is static under ``jit``."""

    loss: Callable
    curvature: str
    distribution: Callable
    num_probes: int
    weights: tuple[tuple[tuple, ...], ...]
    in_loop: bool

    def scale(self, tree: PyTree, power: float) -> PyTree:
        """Each layer times its weight to this power."""
        return scaled(tree, self.weights, power)


def scaled(tree: PyTree, weights: Sequence, power: float) -> PyTree:
    """Each layer times its weight, of `leaf_weights`, to this power."""
    leaves, treedef = jax.tree.flatten(tree)
    found = [_scaled_leaf(x, entries, power) for x, entries in zip(leaves, weights, strict=True)]
    return jax.tree.unflatten(treedef, found)


def _scaled_leaf(x, entries, power):
    """An array times the weight of each of its parts; zero where no part is named."""
    if not entries:
        return jnp.zeros_like(x)
    if entries[0][0] is None:
        return jnp.asarray(entries[0][1], x.dtype) ** power * x
    slices = all(len(index) == 1 and isinstance(index[0], int) for index, _ in entries)
    factor = jnp.zeros(x.shape[:1] if slices else x.shape, x.dtype)
    for index, weight in entries:
        factor = factor.at[Piece(0, index).key()].set(jnp.asarray(weight, x.dtype) ** power)
    return jax.vmap(jnp.multiply)(factor, x) if slices else factor * x


@partial(jax.jit, static_argnums=0)
@full_precision
def _penalty(spec, params, batch, key):
    if spec.curvature == "hessian":
        form = _hessian_form
    else:
        form = _ggn_form if as_criterion(spec.loss.criterion).knows_factor else _ggn_form_without_factor
    one = partial(form, spec, params, batch)
    if spec.num_probes == 1:
        return one(key)
    keys = jax.random.split(key, spec.num_probes)
    if spec.in_loop:
        return jax.tree.map(lambda x: x.mean(0), jax.lax.map(one, keys))
    return _mean_over_probes(one, keys)


def _mean_over_probes(one, keys):
    """The mean of ``one(key)``, at most `UNROLLED` groups of probes one after another, each group vmapped.

    The groups are not in a loop, because XLA's CPU backend is slow with convolutions inside a loop, and with those that
    vmap makes of them. Each group waits for the sum before it; otherwise all would be in memory at once. What does not
    depend on the probe is still computed once.
    """
    size = -(-len(keys) // UNROLLED)
    total = None
    for start in range(0, len(keys), size):
        group = keys[start : start + size]
        if total is not None:
            group = _after(total, group)
        found = one(group[0]) if len(group) == 1 else jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(group))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return jax.tree.map(lambda x: x / len(keys), total)


def _after(total, keys):
    """The keys, once a sum is known: XLA's CPU backend would remove a barrier before it orders the program."""
    known = sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(total) if x.size)
    data = jax.random.key_data(keys)
    # If the sum is NaN, it does not matter what is added.
    return jax.random.wrap_key_data(data + jnp.isnan(known).astype(data.dtype), impl=jax.random.key_impl(keys))


def _hessian_form(spec, params, batch, key):
    v = spec.scale(random_like(key, params, spec.distribution), 0.5)

    def slope(p):
        return jax.jvp(jax.value_and_grad(lambda q: spec.loss(q, batch)), (p,), (v,))[1]

    # The second derivative of the loss along v is v'Hv; the product Hv itself is not needed.
    return jax.jvp(slope, (params,), (v,))[1]


def _ggn_form(spec, params, batch, key):
    criterion = as_criterion(spec.loss.criterion)

    def predict(p):
        return spec.loss.predict(p, batch)

    def noisy(outputs):
        return criterion.factor_product(outputs, batch, noise)

    def transposed(p, cotangent):
        return jax.vjp(predict, p)[1](cotangent)[0]

    outputs = predict(params)
    if isinstance(outputs, Logits):
        return _ggn_form_without_factor(spec, params, batch, key)
    noise = spec.distribution(key, outputs.shape, outputs.dtype)
    u, pull_noisy = jax.vjp(noisy, outputs)
    g = transposed(params, u)
    direction = spec.scale(g, 1.0)

    # d/dt of J(p + t w g)' (u + D'(f - f0)), D the derivative of B e in the outputs: both terms in one pass. The
    # cotangent at t = 0 is u itself, so that the compiler shares the passes of g.
    (slope_of_u,) = pull_noisy(jax.jvp(predict, (params,), (direction,))[1])
    slope = jax.jvp(transposed, (params, u), (direction, slope_of_u))[1]
    return inner(g, direction), optax.tree.scale(2.0, slope)


def _ggn_form_without_factor(spec, params, batch, key):
    v = spec.scale(random_like(key, params, spec.distribution), 0.5)

    def form(p):
        outputs, tangent = jax.jvp(lambda q: spec.loss.predict(q, batch), (p,), (v,))
        return inner(tangent, as_criterion(spec.loss.criterion).hessian_product(outputs, batch, tangent))

    return jax.value_and_grad(form)(params)


def _runs_in_loop(loss, params, batch):
    """Whether probes should run in a loop: the net runs in one itself, and has no convolutions outside of it.

    Without a loop over probes, XLA's CPU backend reserves what a scan keeps for the backward pass for all probes at
    once, in whatever order they run.
    """
    found = list(equations(program(loss, params, batch)))
    convolves = any(eqn.primitive.name == "conv_general_dilated" and not inside for eqn, inside in found)
    return not convolves and any(inside for _, inside in found)
