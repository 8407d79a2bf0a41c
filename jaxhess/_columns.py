"""Traces without probes, column by column, where there are only a few columns."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._linear import as_linear
from jaxhess._trees import automatic, own_eps, tree_size
from jaxhess.estimates import Estimate, Plan
from jaxhess.operators import block, product
from jaxhess.problem import Problem
from jaxhess.selections import Layer

PyTree = Any


def columns_of(problem: Problem, curvature: str, layers: Sequence[Layer]) -> dict[str, Estimate]:
    """The traces of the blocks of some layers."""
    if not layers:
        return {}
    operator, zeros = as_linear(product(curvature, problem)), optax.tree.zeros_like(problem.params)
    moved = operator.func.perturbed(jax.random.key(0), own_eps(problem.params), *operator.args)
    found = {}
    for layer in layers:
        like = layer.take(problem.params)
        value, error = columns(block(operator, layer, zeros), like)
        if moved is not None:  # the rounding inside of the products
            error += 3 * abs(columns(block(moved, layer, zeros), like)[0] - value)
        found[layer.name] = Estimate(value, error, 0, "exact")
    return found


def columns(operator: Callable, like: PyTree) -> tuple[float, float]:
    """The trace of an operator, column by column, and its rounding."""
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    entries = []
    for i in range(flat.size):
        column, _ = jax.flatten_util.ravel_pytree(operator(unravel(jnp.zeros_like(flat).at[i].set(1))))
        entries.append(float(column[i]))
    return sum(entries), 10 * own_eps(like) * float(np.linalg.norm(entries))


def small_layers(problem: Problem, plan: Plan) -> list[Layer]:
    """Those that take few columns in all beside the probes that are asked for, or that a tolerance may take.

    A column takes two products, one of them for its rounding.
    """
    left, found = (plan.max_probes if plan.adaptive else plan.num_probes) // 4, []
    if any(automatic(x) is not x for x in jax.tree.leaves((problem.params, problem.first))):
        return []
    for layer in sorted(problem.layers, key=lambda layer: tree_size(layer.arrays(problem.params))):
        left -= tree_size(layer.arrays(problem.params))
        if left >= 0:
            found.append(layer)
    return found
