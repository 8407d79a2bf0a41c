"""A batch taken apart into its examples, where they do not depend on each other."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._trees import full_precision, gaussian
from jaxhess.logits import Logits
from jaxhess.objective import Objective

PyTree = Any
_GROUPS = 16  # of examples: with more of them the noise between examples is no longer felt
_GROUP_BYTES = 2**28  # for what all groups hold


def independent_examples(loss: Objective, params: PyTree, batch: PyTree, outputs: Any) -> tuple[bool, ...] | None:
    """For each array of the batch whether it holds one entry for each example; None if examples are not independent.

    They are if each taken alone has the outputs that it has in the batch, and the same slopes. Of ``outputs``, what
    ``predict`` says of the batch, only the shape and the type are looked at.
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
    noise = gaussian(jax.random.key(0), outputs.shape, outputs.dtype)
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


def fits_into(of_examples: Sequence[bool] | None, outputs: Any, bytes_each: int) -> int:
    """Into how many groups of one size the examples go: as many as fit, up to `_GROUPS`; 1 if they are not independent.

    Args:
      of_examples: as `independent_examples` returns it.
      outputs: of the whole batch, or their shape and type.
      bytes_each: what one group holds beside its examples.
    """
    if of_examples is None:
        return 1
    most = min(_GROUPS, _GROUP_BYTES // max(1, bytes_each))
    return next((count for count in range(most, 1, -1) if len(outputs) % count == 0), 1)


def cut(batch: PyTree, of_examples: Sequence[bool], count: int) -> tuple[list, Callable[[list], PyTree]]:
    """The arrays of examples as groups, (count, examples, ...), and the function that makes a batch of one group."""
    leaves, treedef = jax.tree.flatten(batch)
    groups = [x.reshape(count, -1, *x.shape[1:]) for x, mine in zip(leaves, of_examples, strict=True) if mine]

    def join(group):
        group = iter(group)
        return treedef.unflatten([next(group) if mine else x for x, mine in zip(leaves, of_examples, strict=True)])

    return groups, join
