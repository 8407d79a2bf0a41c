"""Slips in the batch, the parameters and the call of a loss: what is not an array, and what was meant."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def check_batch(batch: PyTree) -> None:
    """ValueError for a batch that is not made of arrays with entries; the message names the place."""
    check_arrays(batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.size(leaf) == 0:
            at = jax.tree_util.keystr(path)
            raise ValueError(f"the batch is empty at {at!r} (shape {np.shape(leaf)}): a mean needs an example")


def check_arrays(batch: PyTree) -> None:
    """TypeError for what JAX cannot take as an array: where it is, what it is, and what to do with it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not _is_array(leaf):
            at = f"the batch holds at {jax.tree_util.keystr(path)}" if path else "the batch is"
            raise TypeError(f"{at} {_kind(leaf)}, which is no array; {_instead(leaf, whole=not path)}")


def _is_array(leaf):
    if isinstance(leaf, (jax.Array, bool, int, float, complex)):
        return True
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
        return True
    try:  # the rare ones: types that JAX adds to NumPy's, and whatever else it knows
        jax.eval_shape(lambda x: x, leaf)
    except Exception:  # mostly a TypeError; the thing itself may raise anything
        return False
    return True


def _kind(leaf):
    if isinstance(leaf, (str, bytes)):
        return f"the string {leaf[:20]!r}"
    numpy = isinstance(leaf, (np.ndarray, np.generic))
    return f"an array of NumPy's type {leaf.dtype}" if numpy else f"a {type(leaf).__name__}"


def _instead(leaf, whole):
    """What to do with something that is no array."""
    if isinstance(leaf, (str, bytes)):
        return "take strings out, or encode them as numbers"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return "take it out, or make it one array of numbers (rows of different lengths padded)"
    if isinstance(leaf, Mapping):
        return "make a dict of it, dict(...)"
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return f"give a dict, or make its class a pytree: jax.tree_util.register_dataclass({type(leaf).__name__})"
    if isinstance(leaf, Iterator):
        return "it can be read only once: give one batch, next(...), or all of them, Batches(list(...))"
    if hasattr(leaf, "__array__"):
        return "make one of it, np.asarray(...)"
    if whole and hasattr(leaf, "__iter__"):
        return "for the mean over the batches in it give Batches(...)"
    return "take it out, or make a pytree of arrays of it"


def likely_labels(batch: PyTree) -> Any:
    """The key of a batch under which its labels seem to be: one with such a name, the only integers, or else 1."""
    items = list(batch.items() if isinstance(batch, Mapping) else enumerate(batch if isinstance(batch, tuple) else ()))
    named = [key for key, _ in items if key in ("labels", "y", "target", "targets", "label_ids")]
    whole = [key for key, x in items if _is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.integer)]
    return next(iter([*named, *whole]), 1)


def check_parameters(params: PyTree) -> None:
    """TypeError or ValueError for a tree of anything but floating-point arrays that are to be differentiated."""
    if hasattr(params, "opt_state") and hasattr(params, "params"):
        raise TypeError(f"the parameters are a whole {type(params).__name__}; give its parameters, state.params")
    if isinstance(params, Mapping) and (found := [key for key in params if key in _COLLECTIONS]):
        if "params" in params or "batch_stats" in params:
            raise ValueError(
                f"the parameters hold Flax's collection {found[0]!r}, which is not to be differentiated; give "
                f"variables['params'] as the parameters, and the collection in the batch, for model.apply({{'params': "
                f"params, {found[0]!r}: batch[{found[0]!r}]}}, ...)"
            )
    states = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: _nnx_state(node) is not None)
    if found := [f"{_nnx_state(node)} at {jax.tree_util.keystr(at)}" for at, node in states if _nnx_state(node)]:
        raise ValueError(
            f"the parameters hold NNX variables that are not to be differentiated ({', '.join(found[:3])}); take them "
            f"apart, graph, params, rest = nnx.split(model, nnx.Param, ...), and give rest in the batch"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("the parameter tree holds no arrays")
    for path, leaf in leaves:
        at = jax.tree_util.keystr(path)
        if not _is_array(leaf):
            raise TypeError(f"parameter {at!r} is {_kind(leaf)}, no array; {_module(leaf) or _instead(leaf, False)}")
        dtype = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            need = "and curvature needs real floating-point parameters; convert it, or keep it in the batch"
            raise TypeError(f"parameter {at!r} has dtype {dtype}, {need}")


_COLLECTIONS = {"batch_stats", "cache", "intermediates", "perturbations", "losses", "constants", "params_axes"}
_NNX_STATES = {"BatchStat", "Cache", "Intermediate", "Perturbation", "RngState"}


def _nnx_state(node):
    """The kind of an NNX variable that is no parameter; None for everything else."""
    kind = getattr(node, "type", None) if type(node).__name__ == "VariableState" else type(node)
    bases = getattr(kind, "__mro__", ())
    return (
        kind.__name__ if any(c.__module__.startswith("flax.nnx") and c.__name__ in _NNX_STATES for c in bases) else None
    )


def _module(leaf):
    """What to do with a module or a function among the parameters."""
    homes = {c.__module__.split(".")[1] for c in type(leaf).__mro__ if c.__module__.startswith("flax.")}
    if "nnx" in homes:
        return "take the module apart, graph, params, rest = nnx.split(model, nnx.Param, ...)"
    if "linen" in homes:
        return "a Linen module holds none: give variables['params'] of variables = model.init(key, inputs)"
    if callable(leaf):
        return "take functions out of the tree: of an Equinox module, eqx.partition(model, eqx.is_inexact_array)"
    return None


@contextlib.contextmanager
def hints(params: PyTree, batch: PyTree) -> Iterator[None]:
    """Around the first call of the user's loss: if it fails and its arguments show a known slip, the error says so."""
    try:
        yield
    except Exception as error:
        if (hint := _hint(params, batch, error)) is None:
            raise
        raise TypeError(f"{type(error).__name__} in the loss: {error}. {hint}") from error


def _hint(params, batch, error):
    if isinstance(batch, jax.Array) and jnp.issubdtype(batch.dtype, jax.dtypes.prng_key):
        return "The batch is a random key; the batch comes third, and a key by name, key=key"
    if isinstance(batch, (list, tuple)) and _one_kind(batch):
        return (
            f"The batch is a {type(batch).__name__} of {len(batch)} trees of one kind; if these are batches, give "
            f"Batches(batch) for the mean over all of them, or one of them"
        )
    flat = isinstance(params, (jax.Array, np.ndarray)) and params.ndim == 1
    if flat and not isinstance(error, ValueError):  # a ValueError comes from a loss that can use a vector
        return (
            "The parameters are one flat vector. optax.flatten gives the loss such a vector: put the transformation "
            "before it, optax.chain(add_hessian_trace(...), optax.flatten(...)). Elsewhere unravel it in the loss, or "
            "give the tree"
        )
    return None


def _one_kind(batch):
    """Whether a sequence holds trees of one structure whose arrays differ at most in their numbers of examples."""
    if len({jax.tree.structure(part) for part in batch}) != 1:
        return False
    if isinstance(batch, tuple) and jax.tree_util.all_leaves(batch):
        return False  # (x, y) is one batch
    kinds = {tuple((jnp.result_type(x), np.shape(x)[1:]) for x in jax.tree.leaves(part)) for part in batch}
    return len(kinds) == 1 and all(np.ndim(x) for x in jax.tree.leaves(batch))
