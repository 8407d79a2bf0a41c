"""Traces without probes, column by column, where there are only a few columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._curves import curves_of, leaves_of, tape_of
from jaxhess._linear import as_linear
from jaxhess._programs import rounding_of
from jaxhess._sweep import room_for, twice_differentiated, works
from jaxhess._trees import automatic, jitter, own_eps, tree_size
from jaxhess.estimates import Estimate, Plan
from jaxhess.operators import block, product
from jaxhess.problem import Problem
from jaxhess.selections import Layer

PyTree = Any
_TRIED = 4  # entries of either kind by which the rounding of all is judged


@dataclasses.dataclass(frozen=True)
class _Diagonals:
    """Entries of the diagonals of blocks, second derivatives along single parameters: (layers, entries)."""

    curvature: str
    loss: Callable
    layers: tuple[Layer, ...]

    def __call__(self, params, batch, numbers):
        leaves = jax.tree.leaves(params)
        units = [_units(layer.arrays(params), of_layer) for layer, of_layer in zip(self.layers, numbers, strict=True)]
        function = twice_differentiated(self.curvature, self.loss, params, batch)
        tape = tape_of(function, params, leaves_of(self.layers))
        slopes = tape.slopes([jnp.ones_like(tape.values[place]) for place in tape.outs])
        return tape.seconds(curves_of(leaves, self.layers, units), slopes, len(self.layers))[0]


def _units(arrays, numbers):
    """Unit vectors of these numbers, as arrays with an axis for them in front; zero for numbers beyond the last."""
    ends = np.cumsum([0, *(x.size for x in arrays)])
    return [
        jax.nn.one_hot(numbers - int(start), x.size, dtype=x.dtype).reshape(len(numbers), *x.shape)
        for x, start in zip(arrays, ends[:-1], strict=True)
    ]


def columns_of(problem: Problem, curvature: str, layers: Sequence[Layer]) -> dict[str, Estimate]:
    """The traces of the blocks of some layers."""
    ordered = sorted(layers, key=lambda layer: _columns(problem, layer))
    found: dict[str, Estimate] = {}
    alike: list[Layer] = []
    for layer in ordered:  # of like sizes, since they are taken side by side
        if alike and _columns(problem, layer) > 4 * _columns(problem, alike[0]):
            found |= _of_alike(problem, curvature, tuple(alike))
            alike = []
        alike.append(layer)
    found |= _of_alike(problem, curvature, tuple(alike)) if alike else {}
    return {layer.name: found[layer.name] for layer in layers}


def _columns(problem, layer):
    return tree_size(layer.arrays(problem.params))


def _of_alike(problem, curvature, layers):
    diagonals, sizes = _Diagonals(curvature, problem.loss, layers), [_columns(problem, layer) for layer in layers]
    # Those that are tried are as many as one program takes, and compile nothing more.
    width = min(room_for(problem, problem.loss, layers)[0], max(sizes), 2 * _TRIED)
    if not width or not works(problem, diagonals, jnp.zeros((len(layers), width), jnp.int32)):
        return {layer.name: _by_products(problem, curvature, layer) for layer in layers}
    eps = max(own_eps(problem.params), rounding_of(problem.loss, problem.params, problem.first))
    moved = dataclasses.replace(problem, params=jitter(jax.random.key(0), problem.params, eps))

    def entries(of, numbers):
        padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % width)), constant_values=max(sizes))
        parts = np.split(padded.astype(np.int32), padded.shape[1] // width, axis=1)
        rows = [np.asarray(of.mean(diagonals, lambda _, part=part: (part,)), np.float64) for part in parts]
        return np.concatenate(rows, axis=1)[:, : numbers.shape[1]]

    found = entries(problem, np.tile(np.arange(max(sizes)), (len(layers), 1)))
    # The largest ones, and others, since many may be zero whatever the parameters are.
    drawn = np.random.default_rng(0).random((_TRIED, 1))
    tried = np.concatenate([np.argsort(-np.abs(found), axis=1)[:, :_TRIED], (drawn * sizes).astype(int).T], axis=1)
    changes = entries(moved, tried) - np.take_along_axis(found, tried, axis=1)
    estimates = {}
    for layer, size, row, change in zip(layers, sizes, found, changes, strict=True):
        rounding = 10 * eps * np.linalg.norm(row)
        rounding += 3 * size * np.sqrt(np.mean(change**2) / len(change))
        estimates[layer.name] = Estimate(float(row.sum()), float(rounding), 0, "exact")
    return estimates


def _by_products(problem, curvature, layer):
    operator, zeros = as_linear(product(curvature, problem)), optax.tree.zeros_like(problem.params)
    like = layer.take(problem.params)
    value, error = columns(block(operator, layer, zeros), like)
    moved = operator.func.perturbed(jax.random.key(0), own_eps(problem.params), *operator.args)
    if moved is not None:  # the rounding inside of the products
        error += 3 * abs(columns(block(moved, layer, zeros), like)[0] - value)
    return Estimate(value, error, 0, "exact")


def columns(operator: Callable, like: PyTree) -> tuple[float, float]:
    """The trace of an operator, column by column, and its rounding."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    entries = []
    for i in range(flat.size):
        column, _ = jax.flatten_util.ravel_pytree(operator(unravel(jnp.zeros_like(flat).at[i].set(1))))
        entries.append(float(column[i]))
    return sum(entries), 10 * own_eps(like) * float(np.linalg.norm(entries))


def small_layers(problem: Problem, plan: Plan) -> list[Layer]:
    """Those whose columns take at most an eighth of the time of the probes: by sweeps, as many as there are probes.

    A column takes about the time of a pass forward then. Without sweeps it takes two products, one of them for its
    rounding, and the columns may take half of the time. Under a tolerance, the probes are all that it may take.
    """
    if any(automatic(x) is not x for x in jax.tree.leaves((problem.params, problem.first))):
        return []
    ordered = sorted(problem.layers, key=lambda layer: _columns(problem, layer))
    left = (plan.max_probes if plan.adaptive else plan.num_probes) // 4
    if room_for(problem, problem.loss, ordered)[0]:
        left = max(left, plan.num_probes)
    found = []
    for layer in ordered:
        left -= _columns(problem, layer)
        if left >= 0:
            found.append(layer)
    return found
