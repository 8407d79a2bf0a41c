"""The step of central differences: where truncation and rounding together change a product least."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import is_traced
from jaxhess._products import At
from jaxhess._programs import rounding_of
from jaxhess._trees import tree_norm
from jaxhess._versions import enable_x64
from jaxhess.problem import Problem, compute

PyTree = Any
_NARROWER = (jnp.float32, jnp.bfloat16, jnp.float16)
DEFAULT = 2.0**-8  # where nothing can be tried: under jit
_NARROW = 2.0 ** np.arange(-4, -20, -1)
_WIDE = 2.0 ** np.arange(-8, -36, -2)


class Step(NamedTuple):
    """A step of central differences.

    Attributes:
      size: relative to the parameters.
      error: of a product, as a share of it, as far as the trial shows.
      wide: whether gradients are taken in float64.
    """

    size: float
    error: float
    wide: bool


def finite_step(curvature: str, problem: Problem, wide: bool) -> Step:
    """The best step, by a trial along one direction of large curvature; in float64 if ``wide`` and possible.

    With a step h, truncation is of order h^2 and rounding of order 1 / h, so that the change from one h to the next is
    at least as large as the error at the smaller one. Piecewise linear nets want a step that crosses no kink, for which
    float32 has often too few digits. Numbers are powers of two: they are part of compiled programs.
    """
    if is_traced(problem.params, problem.first):
        return Step(_given(problem) or DEFAULT, 2.0**-6, False)
    if (curvature, wide) not in problem.steps:
        narrow = _tried(curvature, problem, False) if not wide else finite_step(curvature, problem, False)
        problem.steps[curvature, wide] = narrow
        if wide:
            with contextlib.suppress(Exception):  # of a net that insists on float32 the user's code may raise anything
                if _all_in_float64(problem):
                    tried = _tried(curvature, problem, True)
                    problem.steps[curvature, wide] = min(narrow, tried, key=lambda step: step.error)
    return problem.steps[curvature, wide]


def _given(problem):
    """The step that the user gave, if any."""
    return None if isinstance(problem.differentiation, str) else float(problem.differentiation)


def _all_in_float64(problem):
    """Whether nothing on the way of the loss is cast to fewer digits, in which short steps would be lost."""
    with enable_x64():
        params, batch = (jax.tree.map(_wider, tree) for tree in (problem.params, problem.first))
        return rounding_of(problem.loss, params, batch) < 1e-12


def _tried(curvature, problem, wide):
    at = _AnyStep(At(curvature, problem.loss, problem.whole))

    def product(v, step):
        # One at a time: JAX on CPUs in several processes stops for ever where programs that communicate, and what is
        # made of their results, are under way together.
        return jax.block_until_ready(in_precision(wide, at, problem.params, problem.first, v, np.float32(step)))

    v = _slope(problem.loss, problem.params, problem.first)
    steps = _WIDE if wide else _NARROW
    if given := _given(problem):
        steps = np.array([2 * given, given])
    for _ in range(2):  # of the power method
        v = _unit(product(v, steps[len(steps) // 2]))
    found = [product(v, step) for step in steps]
    sizes = np.array([float(tree_norm(one)) for one in found])
    changes = np.array([float(tree_norm(jax.tree.map(jnp.subtract, *pair))) for pair in itertools.pairwise(found)])
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.where(sizes[1:] > 0, changes / sizes[1:], 0.0)
    if not np.isfinite(errors).any():
        return Step(given or DEFAULT, 1.0, False)
    best = int(np.nanargmin(errors))
    error = max(errors[best], np.finfo(np.float32).eps)
    return Step(float(steps[best + 1]), float(2.0 ** np.ceil(np.log2(error))), wide)


def in_precision(wide: bool, function: Callable, params: PyTree, batch: PyTree, v: PyTree, *args: Any) -> PyTree:
    """``function(params, batch, v, *args)``, like v, compiled; in float64 inside if ``wide``."""
    if not wide:
        return compute(function, params, batch, (v, *args))
    return in_float64(partial(compute, function), params, batch, (v, *args))


def in_float64(function: Callable, params: PyTree, batch: PyTree, args: tuple) -> PyTree:
    """``function(params, batch, args)`` with float64 for floats; the result is like the first of args."""
    with enable_x64():
        found = function(*(jax.tree.map(_wider, tree) for tree in (params, batch, args)))
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), found, args[0])


@dataclasses.dataclass(frozen=True)
class Widened:
    """A function of a batch, of which floats are taken in float64; static under ``jit``."""

    function: Callable

    def __call__(self, params, batch, *args):
        return self.function(params, jax.tree.map(_wider, batch), *args)


def _wider(x):
    return jnp.asarray(x, jnp.float64) if jnp.result_type(x) in _NARROWER else x


@dataclasses.dataclass(frozen=True)
class _AnyStep:
    """A product whose step is an argument: one program for all that are tried."""

    at: At

    def __call__(self, params, batch, v, step):
        return dataclasses.replace(self.at, step=step)(params, batch, v)


@partial(jax.jit, static_argnums=0)
def _slope(loss, params, batch):
    return jax.grad(loss)(params, batch)


def _unit(tree):
    size = tree_norm(tree)
    return jax.tree.map(lambda x: jnp.where(size > 0, x / size.astype(x.dtype), x), tree)
