"""How the probes of layers are scaled, so that flat ones are not lost among steep ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._trees import draw_keys, random_like, to_host, tree_norm
from jaxhess.problem import Problem
from jaxhess.selections import Layer

_RANGE = 2**10  # of the scales
_PILOT = 2**31 - 3  # folded into the key for the products by which probes are scaled
_PILOTS = 4  # of them: the part of one in a layer of a single parameter is often near zero by chance


def scales_of(operator: Callable, problem: Problem, layers: tuple[Layer, ...], key: jax.Array) -> np.ndarray | None:
    """(layers,) scales, by a few products with the whole net; None where there are none."""
    if problem.finite:  # the step would be spent on the layers of large scales
        return None
    if len(layers) < 2:
        return np.ones(len(layers), np.float32)
    pilots = draw_keys(jax.random.fold_in(key, _PILOT), 0, _PILOTS)
    norms = [to_host(_norms(operator(random_like(pilot, problem.params)), layers)) for pilot in pilots]
    return balanced(np.sqrt(np.mean(np.square(norms, dtype=np.float64), axis=0)))


def balanced(norms: np.ndarray) -> np.ndarray:
    """The scales of layers that even out their relative errors.

    The sum of squared relative errors is least for s_l = |Tr(A_l)|^(-1/2): ||A_lm||_F s_m / s_l over the trace of l is
    then symmetric in l and m. The traces are not known yet. The mean of ||(A v)_l||^2 for v over all layers stands for
    that of l: it is in proportion to t_l where ||A_lm||_F^2 = t_l t_m.

    Args:
      norms: (layers,), the root mean square of ||(A v)_l||.

    Returns:
      (layers,): powers of two, so that they round nothing, from 1 for the largest norm to `_RANGE`; 1 for a norm of
      zero, which no other layer feels.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = np.exp2(np.round(np.log2(norms.max() / norms)))
    return np.where(np.isfinite(scales), np.clip(scales, 1, _RANGE), 1).astype(np.float32)


@partial(jax.jit, static_argnums=1)
def _norms(tree, layers):
    return jnp.stack([tree_norm(layer.arrays(tree)) for layer in layers])
