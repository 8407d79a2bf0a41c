"""The functional part H of a Hessian: its product, and the layers that have none."""

from typing import Any

import jax
import optax

from jaxhess._trees import random_like, to_host
from jaxhess.operators import block, linearize, product
from jaxhess.problem import Problem
from jaxhess.selections import Layer

PATIENCE = 3  # layers in turn with an H, after which those before them are taken to have one too


def h_product(problem: Problem) -> Any:
    """The product of H with the whole net."""
    functional: Any = product("functional", problem)
    return functional if problem.many else linearize(functional, like=problem.params)


def layers_without_h(
    functional: Any, problem: Problem, layers: tuple[Layer, ...], key: jax.Array, patience: int | None = None
) -> set[str]:
    """The names of the layers in which H_l is zero: its product with a random vector is, in all digits.

    From the last layer to the first. With ``patience``, the search ends when so many in turn are not zero: in a chain,
    what bends the net behind a layer bends it behind all earlier ones too. Layers that are not looked at are left out.
    """
    drawn, zeros = random_like(key, problem.params), optax.tree.zeros_like(problem.params)
    found, in_turn = set(), 0
    for layer in reversed(layers):
        product_v = block(functional, layer, zeros)(layer.take(drawn))
        bends = any(to_host(x).any() for x in jax.tree.leaves(product_v))
        in_turn = in_turn + 1 if bends else 0
        if not bends:
            found.add(layer.name)
        if in_turn == patience:
            break
    return found
