"""Layers of a parameter tree: names, network order, subtrees.

A layer is a module that owns arrays, named by its path: "conv1", "block2/conv1". An array at the root of the tree
belongs to no named module and is a layer under its own key. Layers that ``lax.scan`` runs over share one array; each
is a slice of it, written with its index: "blocks[3]/attn".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import tree_util

from jaxhess._order import first_uses
from jaxhess._programs import program
from jaxhess._slips import check_arrays, hints
from jaxhess.batches import first_batch

PyTree = Any
Modules = dict[str, tuple[tuple, tuple[int, ...]]]  # {name: (path, positions of its leaves)}
_VALUE = tree_util.GetAttrKey("value")  # the arrays of an NNX state end in ".value"


def layer_names(params: PyTree, loss: Callable | None = None, batch: PyTree = None) -> list[str]:
    """The names of the layers: in the natural order of their paths, or in network order.

    Natural order puts Conv_2 before Conv_10. Network order needs ``loss`` and ``batch``: it sorts layers by the first
    operation that joins their parameters with data from the batch. A tied weight belongs to its first user, and layers
    that the loss does not use come last. Layers that a ``lax.scan`` in the loss runs over are listed one by one. If a
    new version of JAX represents the loop in an unknown way, a warning says so, and these layers are listed as one.

    Args:
      params: a pytree of arrays (dicts, lists, dataclasses, Flax, Equinox or Haiku parameters).
      loss: ``loss(params, batch)``, a callable that JAX can trace; only for network order.
      batch: an example batch, or `Batches`; only for network order.

    Returns:
      A list of names, one for each module that owns arrays.

    Raises:
      ValueError: if the tree holds no arrays, two modules have one name, or a ``batch`` is given without ``loss``.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> params = {f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in (0, 2, 10)}
      >>> jh.layer_names(params)
      ['Dense_0', 'Dense_2', 'Dense_10']

    Reference: the paper's layers, whose Hessians Hess_l are the diagonal blocks.
    """
    if loss is None and batch is not None:
        raise ValueError("network order needs the loss too: layer_names(params, loss, batch)")
    return ordered_names(params, modules_of(params), loss, first_batch(batch))


def middle_layers(names: Sequence[str]) -> list[str]:
    """The layers from a quarter to three quarters of the depth: indices floor(L/4) .. ceil(3L/4) - 1.

    Args:
      names: layer names in network order.

    Returns:
      The names in the middle, at least one.

    Raises:
      ValueError: if ``names`` is empty.

    Example:
      >>> import jaxhess as jh
      >>> jh.middle_layers(["conv1", "conv2", "fc1", "fc2", "fc3"])
      ['conv2', 'fc1', 'fc2']

    Reference: the paper's section on Layerwise Hessian Trace Regularization ("between 1/4 and 3/4").
    """
    names = list(names)
    if not names:
        raise ValueError("no layers to take the middle of: names is empty")
    return names[len(names) // 4 : -(-3 * len(names) // 4)]


def modules_of(params: PyTree) -> Modules:
    """{name: (path, positions of its leaves)} of every module that owns arrays, empty ones aside."""
    modules: dict[str, tuple[tuple, list[int]]] = {}
    leaves = tree_util.tree_leaves_with_path(params)
    for i, (path, _) in enumerate(leaves):
        owner = _owner(path)
        found = modules.setdefault(owner_name(owner), (owner, []))
        if found[0] != owner:
            raise ValueError(
                f"two modules have the same name {owner_name(owner)!r}; rename one (keys with '/' may clash)"
            )
        found[1].append(i)
    sizes = [math.prod(jnp.shape(x)) for _, x in leaves]
    return {name: (owner, tuple(own)) for name, (owner, own) in modules.items() if any(sizes[i] for i in own)}


def ordered_names(params: PyTree, modules: Modules, loss: Callable | None, batch: PyTree) -> list[str]:
    """The names of layers: in network order with a loss, else in natural order."""
    names = sorted(modules, key=natural)
    if not names:
        raise ValueError("the parameter tree holds no arrays, so it has no layers")
    if loss is None:
        return names
    check_arrays(batch)
    with hints(params, batch):
        jaxpr = program(loss, params, batch)
    found = _names_of(first_uses(jaxpr, len(tree_util.tree_leaves(params))), params)
    used = {name: module for name, module in found.items() if module in modules}
    return list(used) + [name for name in names if name not in used.values()]


def _names_of(uses, params):
    """{name: name of its module} in order of first use; the two differ for slices of scanned layers."""
    leaves = tree_util.tree_leaves_with_path(params)
    owners = [_owner(path) for path, _ in leaves]
    siblings: dict = {}  # of each owner, in the first scan over all of its arrays
    for use in uses:
        if not isinstance(use, int):
            own = [i for i, owner in enumerate(owners) if owner == owners[use[0]]]
            if set(own) <= set(use[2]) and all(jnp.shape(leaves[i][1])[:1] == (use[3],) for i in own):
                siblings.setdefault(owners[use[0]], use[2])
    names: dict = {}
    for use in uses:
        leaf, index = (use, None) if isinstance(use, int) else use[:2]
        owner = owners[leaf]
        if owner not in siblings:
            names[owner_name(owner)] = owner_name(owner)
        elif index is not None:  # even if it is used as a whole too, as in a weight penalty
            module = _common_prefix([owners[i] for i in siblings[owner]]) or owner
            rest = [owner_name(owner[len(module) :])] if owner != module else []
            names["/".join([f"{owner_name(module)}[{index}]", *rest])] = owner_name(owner)
    return names


def _common_prefix(paths):
    prefix = paths[0]
    for path in paths[1:]:
        prefix = prefix[: next((i for i, (a, b) in enumerate(zip(prefix, path, strict=False)) if a != b), len(path))]
    return prefix


def natural(name: str) -> list:
    """A key to sort by: numbers by value."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _owner(path):
    """The path of the module that owns a leaf, or of the leaf itself if it lies at the root."""
    path = tuple(path)
    if path and path[-1] == _VALUE:
        path = path[:-1]
    return path[:-1] if len(path) > 1 else path


def owner_name(owner: tuple) -> str:
    """The name of the module at a path."""
    return tree_util.keystr(owner, simple=True, separator="/") or "params"


def array_name(path: tuple) -> str:
    """The name of the array at a path."""
    path = tuple(path)
    return owner_name(path[:-1] if path and path[-1] == _VALUE else path)


def subtree_of(params: PyTree, owner: tuple, leaves: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
    """The leaves and the structure of a module's subtree: the node itself, or a dict where it has submodules too."""
    treedef: Any = tree_util.tree_structure(params)
    first = leaves[0]  # among the leaves of the node that is reached
    for _ in owner:
        for child in treedef.children():
            if first < child.num_leaves:
                break
            first -= child.num_leaves
        treedef = child
    if treedef.num_leaves == len(leaves):
        return leaves, treedef
    paths = [path for path, _ in tree_util.tree_leaves_with_path(params)]
    own = {owner_name(tuple(paths[i])[len(owner) :]): i for i in leaves}
    return tuple(own[key] for key in sorted(own)), tree_util.tree_structure(own)
