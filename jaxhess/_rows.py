"""The rows of B' J_l: a factor of the Gauss-Newton matrix, G_l = (J_l' B) (J_l' B)', one example at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import NotFiniteError, check_known
from jaxhess._diagnosis import why_not_finite
from jaxhess._examples import one_example
from jaxhess._programs import rounding_of
from jaxhess._trees import automatic, full_precision, jitter, own_eps
from jaxhess.logits import Logits
from jaxhess.objective import Objective, factored
from jaxhess.problem import Problem, outputs_of
from jaxhess.selections import Layer

PyTree = Any
_TRIED = 2  # perturbed parameters at which the rounding of rows is seen


def known_outputs(problem: Problem) -> jax.Array:
    """The outputs of the first batch; TypeError under ``jit``."""
    instead = "call it outside; ggn and layer_traces run inside too"
    if isinstance(problem.outputs_like, Logits):
        raise ValueError(
            "rows of G and probabilities are taken from an array of outputs, and predict returns Logits, which are "
            "never formed; take traces and spectra by products, or let predict return features @ kernel + bias"
        )
    check_known("the Gram matrix is put together", instead, problem.outputs)
    return problem.outputs


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of B' J_l, those of one example at a time.

    An example that depends on others has its rows differentiated through the batch, one by one, which takes as long as
    an example: then an example is an entry of the outputs.
    """

    loss: Objective  # with a criterion that knows its factor
    params: PyTree
    batch: PyTree
    of_examples: tuple[bool, ...] | None
    factor: jax.Array
    count: int  # of examples
    each: int  # rows of an example

    @classmethod
    def of(cls, problem: Problem) -> Rows:
        """Those of the first batch, on meshes from which rows can be cut."""
        params, batch = _off_explicit_meshes(problem.loss, problem.params, problem.first)
        outputs = known_outputs(problem)
        if automatic(outputs) is not outputs:
            outputs = outputs_of(problem.loss, params, batch)
            if automatic(outputs) is not outputs:
                raise NoGramError(f"its outputs are on {outputs.sharding}")
        if not bool(jnp.isfinite(outputs).all()):
            raise NotFiniteError(why_not_finite("ggn", problem.loss, params, batch))
        criterion: Any = factored(problem.loss.criterion, outputs, batch, max_classes=outputs.shape[-1])
        loss = Objective(problem.loss.predict, criterion)
        of_examples = problem.of_examples
        count = outputs.size if of_examples is None else len(outputs)
        factor = _factor(loss, params, batch)
        return cls(loss, params, batch, of_examples, factor, count, outputs.size // count)

    def __call__(self, group: tuple[Layer, ...], i: int) -> list[jax.Array]:
        """For each layer of the group (rows, dim)."""
        return _rows(self.loss, self.of_examples, group, self.params, self.batch, self.factor, i)

    def squares(self, layers: tuple[Layer, ...], i: int) -> list[jax.Array]:
        """For each layer the sum of the squares of all rows of an example."""
        return _distances(self(layers, i), None)

    def squares_of_columns(self, group: tuple[Layer, ...], i: int) -> jax.Array:
        """The sum of the squares of an example's rows in each column of the one layer of the group, (dim,)."""
        (rows,) = self(group, i)
        return jnp.sum(rows**2, axis=0)

    def noise(self, groups: Sequence[tuple[Layer, ...]], examples: np.ndarray) -> dict[str, float]:
        """{layer: relative error of the eigenvalues}, also of "total", by rows at parameters moved by one rounding.

        Of the examples with the largest rows. An eigenvalue is a square, hence the 2; 3 is for what a few rows miss.
        """
        eps = max(own_eps(self.params), rounding_of(self.loss.predict, self.params, self.batch))
        moved = []
        for number in range(_TRIED):
            params = jitter(jax.random.key(number), self.params, eps)
            factor = _factor(self.loss, params, self.batch)
            moved.append(dataclasses.replace(self, params=params, factor=factor))
        change, size = {"total": 0.0}, {"total": 0.0}
        for group in groups:
            for i in map(int, examples):
                here = self(group, i)
                changes = np.max([_distances(here, there(group, i)) for there in moved], axis=0)
                for layer, one, all_of_it in zip(group, changes, _distances(here, None), strict=True):
                    for name in (layer.name, "total"):
                        change[name] = change.get(name, 0.0) + float(one)
                        size[name] = size.get(name, 0.0) + float(all_of_it)
        return {name: 6 * (change[name] / size[name]) ** 0.5 if size[name] else 0.0 for name in size}


@jax.jit
def _distances(rows, others):
    """For each layer the squared norm of the rows, or of their difference from others."""
    others = [0.0] * len(rows) if others is None else others
    return [jnp.sum((a - b) ** 2) for a, b in zip(rows, others, strict=True)]


class NoGramError(ValueError):
    """A net of which the rows of the Gram matrix cannot be taken."""

    def __init__(self, found: str):
        super().__init__(
            f"rows of the Gram matrix are cut from arrays on a mesh with automatic axes, and the net, as under "
            f"shard_map, has its own mesh with explicit ones ({found}); use method='lanczos', or 'auto', which then is "
            f"that, or make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
        )


def _off_explicit_meshes(loss, params, batch):
    """Parameters and batch on meshes whose axes the compiler handles; NoGramError where the net needs other ones."""
    moved = jax.tree.map(automatic, (params, batch))
    if any(x is not y for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves((params, batch)), strict=True)):
        try:
            jax.eval_shape(partial(outputs_of, loss), *moved)
        except Exception as error:  # whatever jax says of the wrong mesh
            raise NoGramError(str(error)) from error
    return moved


@partial(jax.jit, static_argnums=0)
@full_precision
def _factor(loss, params, batch):
    """B e_c' of every output c', (C, *outputs.shape): B is block diagonal, one product serves all rows."""
    outputs = loss.predict(params, batch)
    basis = jnp.eye(outputs.shape[-1], dtype=outputs.dtype)
    return jax.vmap(lambda e: loss.criterion.factor_product(outputs, batch, jnp.broadcast_to(e, outputs.shape)))(basis)


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_precision
def _rows(loss, of_examples, layers, params, batch, factor, i):
    """For each layer the rows of B' J_l, (rows, dim), of one example, or the one row of an entry of the outputs."""
    shape = factor.shape[1:]
    if of_examples is not None:
        mine = factor[:, i].reshape(shape[-1], -1, shape[-1])
        places = jnp.eye(mine.shape[1], dtype=mine.dtype)
        cotangents = places[:, None, :, None] * mine[None]  # (position, class, position, output)
        cotangents, part = cotangents.reshape(-1, 1, *shape[1:]), one_example(batch, of_examples, i)
    else:
        position, output = jnp.divmod(i, shape[-1])
        column = factor[output].reshape(-1, shape[-1])
        cotangents, part = jnp.zeros_like(column).at[position].set(column[position]).reshape(1, *shape), batch
    pull = jax.vjp(lambda p: loss.predict(p, part), params)[1]
    gradients = jax.vmap(lambda cotangent: pull(cotangent)[0])(cotangents)

    def row(layer):
        arrays = layer.arrays(gradients, axes=1)  # the rows stand in front
        return jnp.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)

    return [row(layer) for layer in layers]
