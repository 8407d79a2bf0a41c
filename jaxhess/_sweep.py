"""Samples of Tr(H_l) of all layers from one sweep forward, each layer by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import at_least_float32, is_traced
from jaxhess._curves import curves_of, leaves_of, tape_of, work_along
from jaxhess._examples import cut, fits_into
from jaxhess._programs import array_bytes, program
from jaxhess._samples import fresh
from jaxhess._trees import automatic, fold_in, on_cpu, random_like, spread
from jaxhess.estimates import LEAST
from jaxhess.logits import Logits
from jaxhess.objective import Objective
from jaxhess.problem import Problem, compute
from jaxhess.selections import Layer

PyTree = Any
_CACHED = 2**24  # bytes of the widest array of a sweep, up to which probes go side by side on a CPU
_ROOM = 2**28  # the same on other devices, and for groups of examples side by side
_MOST = 2**30  # the same of one probe of one group: where it takes more, there is no sweep
PRODUCT = 8  # passes forward that a product with the whole net takes the time of
_OF_PARAMETER = 128  # the work, in multiplications and additions, of making and reading an entry of a vector
_OF_CALL = 2**24  # the same of starting a program
# What JAX raises where there is no forward mode (a custom_vjp, a callback), or none for several rows.
NO_SWEEP = (TypeError, ValueError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class SweepSamples:
    """v_l . (H_l v_l) of every layer by itself, with a v of its own for each group of examples.

    With the slope g of the criterion it is <g, d^2 predict(p + t v_l) / dt^2>, from one sweep forward. The variance,
    2 * (sum over groups of ||H_l||_F^2), has nothing of the blocks between layers or of the products between groups.

    A call returns the samples, and for each layer 0 where no operation bends what it moves, so that H_l = 0; else 1.
    """

    objective: Objective
    layers: tuple[Layer, ...]
    distribution: Callable
    parts: tuple[Layer, ...] = ()  # that add up to the whole net, where the layers do not
    of_examples: tuple[bool, ...] | None = None  # which arrays of the batch hold an entry for each example
    share: float = 0.0  # of the examples, at most, in the groups that are taken side by side
    side_by_side: int = 1  # the most probes that are

    def keys_of_batch(self, keys, number):
        """A fresh draw for each batch: the estimate is a sum over examples."""
        return fresh(keys, number)

    def __call__(self, params, batch, keys):
        outputs = self.objective.predict(params, batch)
        slope = jax.grad(self.objective.criterion)(outputs.astype(at_least_float32(outputs)), batch)
        width = divisor(len(keys), self.side_by_side)
        count = fits_into(self.of_examples, outputs, width * held_by(params, self.layers + self.parts))
        if count == 1:
            return self._with_total(*self._forms(params, batch, slope, keys))

        def of_group(some, slope, number):
            return self._forms(params, join(some), slope, jax.vmap(fold_in, (0, None))(keys, number))

        split, join = cut(batch, self.of_examples, count)
        groups = split, slope.reshape(count, -1, *slope.shape[1:]), jnp.arange(count)
        size = divisor(count, max(1, int(self.share * count)))
        if size == count:
            samples, bent = jax.vmap(of_group)(*groups)
        else:
            samples, bent = jax.lax.map(lambda group: of_group(*group), groups, batch_size=size)
        return self._with_total(samples.sum(0), bent[0])

    def _forms(self, params, batch, slope, keys):
        """(layers, probes) forms of the layers and parts; and for each whether it bends."""
        leaves, layers = jax.tree.leaves(params), self.layers + self.parts
        tape = tape_of(lambda p: self.objective.predict(p, batch), params, leaves_of(layers))
        # Slopes of a mean over many examples are too small for float16, which the net may use inside.
        unit = jnp.ldexp(jnp.ones_like(slope, shape=()), jnp.frexp(jnp.max(jnp.abs(slope)))[1])
        slopes = tape.slopes([(slope / unit).astype(tape.values[place].dtype) for place in tape.outs])

        def along(keys):
            vectors = jax.vmap(lambda key: random_like(key, params, self.distribution))(keys)
            curves = curves_of(leaves, layers, [jax.vmap(layer.arrays)(vectors) for layer in layers])
            forms, bent = tape.seconds(curves, slopes, len(layers))
            return unit * forms.T.astype(slope.dtype), jnp.array([float(i in bent) for i in range(len(layers))])

        width = divisor(len(keys), self.side_by_side)
        if width == len(keys):
            forms, bent = along(keys)
            return forms.T, bent
        forms, bent = jax.lax.map(along, keys.reshape(-1, width))
        return forms.reshape(len(keys), -1).T, bent[0]

    def _with_total(self, forms, bent):
        """(probes, layers + 1), and the same of what bends."""
        first = len(self.layers) if self.parts else 0
        samples = [*forms[: len(self.layers)], forms[first:].sum(0)]
        return jnp.stack(samples, axis=1), jnp.append(bent[: len(self.layers)], bent[first:].max())


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Sweeps over all layers of a problem.

    Attributes:
      samples: what one gives.
      price: of a sweep, in products with the whole net.
    """

    problem: Problem
    samples: SweepSamples
    price: float

    def draw(self, keys: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """(keys, layers + 1) samples, and (layers + 1,) whether there is an H."""
        samples, bent = self.problem.mean(self.samples, lambda number: (self.samples.keys_of_batch(keys, number),))
        return np.asarray(samples), np.asarray(bent) > 0

    def count(self, num_probes: int) -> int:
        """As many as take the time of so many products with the whole net, but not too few; in whole chunks."""
        return min(num_probes, LEAST * max(1, round(num_probes / self.price / LEAST)))


def sweep_of(problem: Problem, distribution: Callable) -> Sweep | None:
    """Where the outputs have second derivatives in forward mode, and room for those along all layers; else None."""
    if not isinstance(problem.loss, Objective) or isinstance(problem.outputs_like, Logits):
        return None
    parts = () if problem.covered else problem.parts()
    groups = fits_into(problem.of_examples, problem.outputs_like, held_by(problem.params, problem.layers + parts))
    side_by_side, share = room_for(problem, problem.loss.predict, problem.layers + parts, groups)
    samples = SweepSamples(problem.loss, problem.layers, distribution, parts, problem.of_examples, share, side_by_side)
    if side_by_side and works(problem, samples, jax.random.split(jax.random.key(0), LEAST)):
        predict = program(problem.loss.predict, problem.params, problem.first)
        work, along = work_along(predict, problem.layers + parts)
        read = _OF_PARAMETER * held_by(problem.params, problem.layers + parts) // 4
        price = (along + groups * read + _OF_CALL) / (PRODUCT * (work + read) + _OF_CALL)
        return Sweep(problem, samples, max(1.0, price))
    return None


def divisor(count: int, most: int) -> int:
    """The largest divisor of a count that is not above ``most``."""
    return next(size for size in range(min(most, count), 0, -1) if count % size == 0)


def held_by(params: PyTree, layers: Sequence[Layer]) -> int:
    """The bytes of one direction in each layer; one in a slice of an array takes as much as the whole array."""
    leaves = jax.tree.leaves(params)
    return sum(leaves[piece.leaf].nbytes for layer in layers for piece in layer.pieces)


def room_for(problem: Problem, function: Callable, layers: Sequence[Layer], groups: int = 1) -> tuple[int, float]:
    """(directions in each layer side by side, share of the examples side by side) of a sweep; (0, 0) for no sweep.

    Args:
      problem: whose derivatives in forward mode are asked for.
      function: ``function(params, batch)``.
      layers: that are moved.
      groups: of examples, which may be taken one after another.
    """
    leaves = jax.tree.leaves((problem.params, problem.first))
    if problem.finite or is_traced(leaves) or any(automatic(x) is not x for x in leaves):
        return 0, 0.0
    made = array_bytes(program(function, problem.params, problem.first))
    wide, held = 2 * len(layers) * max((size for size, _ in made), default=0), held_by(problem.params, layers)
    spare = _ROOM if any(map(spread, leaves)) else _MOST  # vectors are not spread over devices
    if wide > groups * _MOST or held > spare:
        return 0, 0.0
    room = _CACHED if all(on_cpu(x) for x in leaves if isinstance(x, jax.Array)) else _ROOM
    return max(1, room // max(wide, held, 1)), min(1.0, _ROOM / max(wide, 1))


def twice_differentiated(curvature: str, loss: Any, params: PyTree, batch: PyTree) -> Callable[[PyTree], jax.Array]:
    """The function of the parameters whose Hessian is asked for: the loss, or for H the outputs with a fixed slope."""
    if curvature == "hessian":
        return lambda p: loss(p, batch)
    slope = jax.grad(loss.criterion)(loss.predict(params, batch), batch)
    return lambda p: jnp.sum(slope * loss.predict(p, batch))


def works(problem: Problem, function: Callable, *args: Any) -> bool:
    """Whether a sweep can be traced."""
    try:  # the trace is kept for the first sweep
        jax.eval_shape(partial(compute, function), problem.params, problem.first, args)
    except NO_SWEEP:
        return False
    return True
