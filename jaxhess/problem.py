"""A loss at these parameters on these data: checked once, with its layers, its program and its means."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._checks import at_least_float32, check_choice, is_traced
from jaxhess._cover import partition
from jaxhess._examples import independent_examples
from jaxhess._programs import ends_in_softmax, rounding_of
from jaxhess._slips import check_batch, check_parameters, hints
from jaxhess._trees import automatic, full_precision, leaves_finite
from jaxhess.batches import Batches, first_batch, leading_axis
from jaxhess.criteria import Criterion, CrossEntropy
from jaxhess.layers import Modules, modules_of, ordered_names
from jaxhess.logits import Logits
from jaxhess.objective import Objective, as_criterion, factored
from jaxhess.selections import Layer, Selection, Selections, check_selections, find_layer, select, whole_net

PyTree = Any
CURVATURES = ("hessian", "ggn", "functional")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What every measurement starts from; `pose` makes one.

    Attributes:
      loss: the loss without its aux, an `Objective` or a plain function.
      params: the parameters, at least in float32.
      batch: one batch, or `Batches`.
      selections: the layers or groups that are asked for; None for all layers.
      differentiation: "exact", or "finite" or a relative step for products by central differences.
    """

    loss: Any
    params: PyTree
    batch: PyTree
    selections: Selections = None
    differentiation: str | float = "exact"

    @cached_property
    def first(self) -> PyTree:
        """The batch, or the first of many."""
        return first_batch(self.batch)

    @cached_property
    def modules(self) -> Modules:
        """The modules of the parameters."""
        return modules_of(self.params)

    @cached_property
    def names(self) -> list[str]:
        """The names of all layers, in network order."""
        return ordered_names(self.params, self.modules, self.loss, self.first)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers or groups that are asked for; layers in network order."""
        return select(self.params, self.selections, self.modules, lambda: self.names)

    @cached_property
    def covered(self) -> bool:
        """Whether these hold every parameter once, so that what they add up to is that of the whole net."""
        return self.selections in (None, "all") or partition(self.params, self.layers)

    @cached_property
    def whole(self) -> Layer:
        """The whole net as one layer, "total"."""
        return whole_net(self.params)

    def layer(self, selection: Selection) -> Layer:
        """The layer of a selection, or the whole net for None."""
        return self.whole if selection is None else find_layer(self.params, selection, self.modules)

    def parts(self) -> tuple[Layer, ...]:
        """The modules as layers, in no order that costs a look at the loss: for what is summed over all of them."""
        return select(self.params, None, self.modules, lambda: list(self.modules))

    @cached_property
    def steps(self) -> dict[tuple[str, bool], Any]:
        """The steps of central differences, as far as they were looked for."""
        return {}

    @property
    def finite(self) -> bool:
        """Whether products are central differences."""
        return self.differentiation != "exact"

    @property
    def many(self) -> bool:
        """Whether the data are `Batches`."""
        return isinstance(self.batch, Batches)

    @cached_property
    def outputs(self) -> jax.Array:
        """What ``predict`` says of the first batch."""
        return outputs_of(self.loss, self.params, self.first)

    @cached_property
    def outputs_like(self) -> Any:
        """The shape and type of the outputs, for which nothing is compiled."""
        return jax.eval_shape(partial(outputs_of, self.loss), self.params, self.first)

    def factored(self, **options: Any) -> Criterion | None:
        """As `jaxhess.objective.factored`, of the criterion of an objective at the first batch."""
        if isinstance(self.outputs_like, Logits):
            return None
        known = as_criterion(self.loss.criterion)
        return known if known.knows_factor else factored(self.loss.criterion, self.outputs, self.first, **options)

    @cached_property
    def of_examples(self) -> tuple[bool, ...] | None:
        """Which arrays of the first batch hold an entry for each example; None where examples are not independent."""
        params, batch = jax.tree.map(automatic, (self.params, self.first))
        return independent_examples(self.loss, params, batch, self.outputs_like)

    def mean(self, function: Callable, args: Callable[[int | None], tuple]) -> PyTree:
        """The mean of ``function(params, batch, *args(number))`` over all examples; number is None for one batch."""
        if not self.many:
            return compute(function, self.params, self.batch, args(None))
        return mean_over(self.batch, self.loss, self.params, function, args)


def mean_over(batches: Batches, loss: Callable, params: PyTree, function: Callable, args: Callable) -> PyTree:
    """The mean of ``function(params, batch, *args(number))`` over many batches, in a loop on the host."""

    def step(mean, batch, share, number):
        return compute(function, params, batch, args(number), mean, share)

    mean = batches.fold(step)
    if not all(leaves_finite(mean)):
        for batch in batches:
            check_values(loss, params, batch)
    return mean


@partial(jax.jit, static_argnums=0)
@full_precision
def compute(function: Callable, params: PyTree, batch: PyTree, args: tuple, mean: PyTree = None, share: Any = None):
    """``function(params, batch, *args)``, or the running mean with it, where it holds this share of the examples."""
    new = function(params, batch, *args)
    return new if mean is None else jax.tree.map(lambda m, n: m + jnp.asarray(share, m.dtype) * (n - m), mean, new)


@partial(jax.jit, static_argnums=0)
@full_precision
def outputs_of(objective: Objective, params: PyTree, batch: PyTree) -> jax.Array:
    """What an objective's ``predict`` says, compiled, in full precision."""
    return objective.predict(params, batch)


# ---- what is checked before the first product ----


def check_differentiation(value: Any) -> None:
    """ValueError for anything other than "exact", "finite" and a step."""
    if isinstance(value, str):
        check_choice("differentiation", value, ("exact", "finite"))
    elif isinstance(value, bool) or np.ndim(value) or not 0 < value < np.inf:
        raise ValueError(f"the step of central differences must be positive and finite, got {value!r}")


def pose(
    curvature: str,
    loss: Any,
    params: PyTree,
    batch: PyTree,
    has_aux: bool = False,
    selections: Selections = None,
    differentiation: str | float = "exact",
) -> Problem:
    """Checks a loss, its parameters and its batch, once, and what is selected of the parameters.

    Values (NaN, labels) are checked where they are concrete; under ``jit`` a NaN is carried through.
    """
    check_choice("curvature", curvature, CURVATURES)
    check_differentiation(differentiation)
    check_selections(selections)
    loss = _checked_loss(curvature, loss, has_aux)
    params = _differentiable(params)
    weighted = isinstance(loss, Objective) and as_criterion(loss.criterion).weighted
    if weighted and isinstance(batch, Batches) and batch.size is leading_axis:
        raise ValueError(
            "a criterion with weights is a mean by their sums, which Batches cannot know; say them with "
            "Batches(batches, size=lambda batch: ...), the sum of the weights of a batch"
        )
    problem = Problem(loss, params, batch, selections, differentiation)
    check_batch(problem.first)
    if isinstance(batch, Batches):
        batch.look_ahead()
    check_values(loss, params, problem.first)
    with hints(params, problem.first):
        value = jax.eval_shape(jax.jit(loss), params, problem.first)
    if not (hasattr(value, "shape") and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)):
        hint = "; for (value, aux) say has_aux=True" if isinstance(value, tuple) else "; take the mean over examples"
        raise TypeError(f"the loss must return a floating-point scalar, got {value}{hint}")
    if isinstance(batch, Batches) and batch.check:
        _check_mean(loss, params, batch)
    return problem


def _checked_loss(curvature, loss, has_aux):
    """The loss without its aux."""
    said = f"{type(loss).__name__} {getattr(loss, '__name__', loss)!r}"
    if curvature != "hessian" and not isinstance(loss, Objective):
        raise TypeError(
            f"{curvature} needs the two halves of the loss, got {said}; "
            f"make an Objective(predict, criterion), or ask for the Hessian"
        )
    if not callable(loss):
        raise TypeError(f"a loss is a function loss(params, batch), got {said}")
    try:
        hash(loss)
    except TypeError:
        raise TypeError(
            f"the loss, a {type(loss).__name__}, has no hash, and is compiled for its identity; give a function or a "
            f"frozen dataclass, and put arrays into the parameters or the batch"
        ) from None
    if not has_aux:
        return loss
    return Objective(_First(loss.predict), loss.criterion) if isinstance(loss, Objective) else _First(loss)


@dataclasses.dataclass(frozen=True)
class _First:
    """A function without its aux; equal for equal functions, so that it compiles once."""

    function: Callable

    def __call__(self, *args):
        result = self.function(*args)
        if not isinstance(result, tuple):
            raise TypeError(f"has_aux=True takes a function that returns (value, aux), got {type(result).__name__}")
        return result[0]


def _differentiable(params):
    check_parameters(params)
    # Half precision has too few digits for second derivatives.
    params = jax.tree.map(lambda x: jnp.asarray(x, at_least_float32(x)), params)
    finite = leaves_finite(params)
    if not is_traced(finite):
        paths = jax.tree_util.tree_leaves_with_path(params)
        if bad := [jax.tree_util.keystr(path) for (path, _), ok in zip(paths, finite, strict=True) if not ok]:
            raise ValueError(f"the parameters are not finite at {bad}; curvature there means nothing")
    return params


def check_values(loss, params, batch):
    """What an objective's halves say of a batch: shapes, and labels where their values are known."""
    if not isinstance(loss, Objective):
        return
    with hints(params, batch):
        # Under jit the trace is kept for the next time.
        outputs = jax.eval_shape(jax.jit(loss.predict), params, batch)
    if not (hasattr(outputs, "shape") and outputs.ndim and jnp.issubdtype(outputs.dtype, jnp.floating)):
        raise TypeError(f"predict must return one floating-point array of shape (..., C), got {outputs}")
    criterion = as_criterion(loss.criterion)
    if isinstance(outputs, Logits) and not isinstance(criterion, CrossEntropy):
        raise TypeError(
            f"predict returns Logits, which CrossEntropy alone takes in blocks, got {loss.criterion!r}; return "
            f"features @ kernel + bias for other criteria"
        )
    if criterion.takes_logits and ends_in_softmax(loss.predict, params, batch):
        raise ValueError(
            "predict ends in a softmax, but cross_entropy takes logits and applies the softmax itself; return "
            "what goes into the softmax, or jnp.log of the probabilities. If the loss is meant to take two, give it a "
            "function as criterion: lambda outputs, batch: cross_entropy(outputs, batch)"
        )
    criterion.check(outputs, batch)


def _check_mean(loss, params, batches):
    """ValueError for a loss over several batches that is not a mean over independent examples, by a trial on some."""
    some = list(itertools.islice(batches, 2))
    # A random key that is cut in halves would give other random numbers than the whole.
    if len(some) < 2 or is_traced(params, first := some[0]) or any(map(_is_key, jax.tree.leaves((params, first)))):
        return
    try:
        most = len(jax.eval_shape(loss.predict, params, first)) if isinstance(loss, Objective) else leading_axis(first)
        count = min(8, most) // 2 * 2
        whole, *halves = [_rows(first, *ends) for ends in ((0, count), (0, count // 2), (count // 2, count))]
        sizes = [float(batches.size(half)) for half in halves]
        values = [float(compute(loss, params, part, ())) for part in (whole, *halves)]
        rounding = rounding_of(loss, params, whole)
    except Exception:  # of a batch that cannot be cut the user's code may raise anything
        return
    mean = float(np.average(values[1:], weights=sizes)) if sum(sizes) else np.nan
    if abs(values[0] - mean) > max(1e-3, 20 * rounding) * np.max(np.abs(values)):
        raise ValueError(
            f"over Batches a loss must be a mean over independent examples, and this one is {values[0]:.5g} on {count} "
            f"examples where the mean over their halves is {mean:.5g}. Divide a sum by the number of examples; give "
            f"one batch to a loss that couples examples (batch norm in training mode, a contrastive loss); where "
            f"examples have weights, size= must be the sum of the weights. Batches(..., check=False) takes the mean "
            f"over batches as it is"
        )


def _rows(batch, start, stop):
    """Examples of a batch: of arrays with its most common leading axis."""
    lengths = [np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    count = max(set(lengths), key=lengths.count)
    return jax.tree.map(lambda x: x[start:stop] if np.shape(x)[:1] == (count,) else x, batch)


def _is_key(x):
    raw = np.shape(x) in ((2,), (4,)) and jnp.result_type(x) == jnp.uint32
    return raw or jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
