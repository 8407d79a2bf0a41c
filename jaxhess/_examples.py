"""A batch taken apart into its examples, where they do not depend on each other."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._trees import full_precision
from jaxhess.logits import Logits
from jaxhess.objective import Objective

PyTree = Any


def independent_examples(loss: Objective, params: PyTree, batch: PyTree, outputs: jax.Array) -> tuple[bool, ...] | None:
    """For each array of the batch whether it holds one entry for each example; None if examples are not independent.

    They are if each taken alone has the outputs that it has in the batch, and the same slopes.
    """
    if outputs.ndim < 2 or isinstance(outputs, Logits):
        return None
    of_examples = _of_examples(loss, params, batch, outputs)
    if of_examples is None:
        return None
    try:
        same = _alike(loss, of_examples, params, batch)
    except Exception:  # of a batch that cannot be taken apart along its first axis the user's code may raise anything
        return None
    return of_examples if bool(same) else None


def _of_examples(loss, params, batch, outputs):
    """For each array of the batch whether it holds one entry for each example; None where that cannot be told.

    The first axis of an array of another kind may happen to be as long: of the statistics of 100 channels in a batch of
    100. So it must be possible to lengthen the arrays of examples, and the outputs must lengthen with them: tried with
    all arrays of this length, then without those under one key of the batch, under two, ...
    """
    count = len(outputs)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(batch)
    lengths = [jnp.shape(x)[:1] == (count,) for _, x in leaves]
    keys = [path[:1] for path, _ in leaves]
    names = list(dict.fromkeys(key for key, fits in zip(keys, lengths, strict=True) if fits))

    def longer(x):
        return jax.ShapeDtypeStruct((count + 1, *x.shape[1:]), x.dtype)

    choices = (chosen for size in range(len(names), 0, -1) for chosen in itertools.combinations(names, size))
    for chosen in itertools.islice(choices, 64):
        found = tuple(fits and key in chosen for key, fits in zip(keys, lengths, strict=True))
        with contextlib.suppress(Exception):  # of arrays that do not go together the user's code may raise anything
            shapes = [longer(x) if cut else x for cut, (_, x) in zip(found, leaves, strict=True)]
            lengthened = jax.eval_shape(loss.predict, params, jax.tree.unflatten(treedef, shapes))
            if lengthened.shape == (count + 1, *outputs.shape[1:]):
                return found
    return None


@partial(jax.jit, static_argnums=(0, 1))
@full_precision
def _alike(loss, of_examples, params, batch):
    """Whether the batch has the outputs of its examples taken alone, and the gradient of one random sum of them.

    In reverse mode, as the rows of the Gram matrix: a net may have no other.
    """

    def together(p):
        return loss.predict(p, batch)

    def alone(p):
        return jax.vmap(lambda i: loss.predict(p, one_example(batch, of_examples, i))[0])(jnp.arange(len(outputs)))

    outputs, pull = jax.vjp(together, params)
    noise = jax.random.normal(jax.random.key(0), outputs.shape, outputs.dtype)
    apart, pull_apart = jax.vjp(alone, params)
    return _same(outputs, apart) & _same(pull(noise), pull_apart(noise))


def _same(a, b):
    """Whether two trees agree but for rounding, in each array beside its largest entry.

    Beside that of the whole tree in a small array, for what vanishes, like the gradient of a bias that a softmax does
    not see, is nothing but rounding.
    """
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    sizes = jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x, _ in pairs])
    differences = jnp.stack([jnp.max(jnp.abs(x - y), initial=0).astype(jnp.float32) for x, y in pairs])
    return (differences <= jnp.maximum(1e-4 * sizes, 1e-5 * sizes.max())).all()


def one_example(batch: PyTree, of_examples: tuple[bool, ...], i: Any) -> PyTree:
    """Example i as a batch of one: arrays of examples are cut, others are shared."""
    leaves, treedef = jax.tree.flatten(batch)
    cut = [jax.lax.dynamic_slice_in_dim(x, i, 1) if mine else x for mine, x in zip(of_examples, leaves, strict=True)]
    return jax.tree.unflatten(treedef, cut)
