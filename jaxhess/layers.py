"""Layers of a parameter tree: names, network order, subtrees.

A layer is a module that owns arrays, named by its path: "conv1", "block2/conv1". An array at the root of the tree
belongs to no named module and is a layer under its own key. A slice of layers that ``lax.scan`` runs over (one array
holds many) is written with its index, "blocks[3]/attn".
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import tree_util
from jax.extend.core import Literal

from jaxhess._checks import check_arrays, hints
from jaxhess.batches import first_batch

PyTree = Any
_VALUE = tree_util.GetAttrKey("value")  # the arrays of an NNX state end in ".value"


class Layer(NamedTuple):
    """Where a layer's arrays are: positions among the leaves of the tree, and the slice for scanned layers."""

    name: str
    leaves: tuple[int, ...]
    treedef: Any  # of its subtree
    scan_index: int | None

    def take(self, tree: PyTree) -> PyTree:
        """The layer's part of a tree like the parameters."""
        return self.unflatten(self.arrays(tree))

    def arrays(self, tree: PyTree) -> list:
        """The layer's arrays, as a list."""
        leaves = tree_util.tree_leaves(tree)
        return [leaves[i] if self.scan_index is None else leaves[i][self.scan_index] for i in self.leaves]

    def unflatten(self, arrays: Sequence) -> PyTree:
        """The layer's subtree from its arrays."""
        return tree_util.tree_unflatten(self.treedef, arrays)

    def put(self, tree: PyTree, part: PyTree) -> PyTree:
        """The tree with this layer's part replaced."""
        leaves, treedef = tree_util.tree_flatten(tree)
        for i, new in zip(self.leaves, self.treedef.flatten_up_to(part), strict=True):
            leaves[i] = new if self.scan_index is None else leaves[i].at[self.scan_index].set(new)
        return tree_util.tree_unflatten(treedef, leaves)


def layer_names(params: PyTree, loss: Callable | None = None, batch: PyTree = None) -> list[str]:
    """The names of the layers: in the natural order of their paths, or in network order.

    Natural order puts Conv_2 before Conv_10. Network order, with ``loss`` and ``batch``, is that of the first
    operation that joins a layer's parameters with data from the batch; a tied weight belongs to its first user, and
    layers that the loss does not use come last. Layers that a ``lax.scan`` in the loss runs over come out one by one.
    Where a new version of JAX writes a loop in a way that cannot be read, a warning says so, and these layers stay in
    one piece.

    Args:
      params: a pytree of arrays (dicts, lists, dataclasses, Flax, Equinox or Haiku parameters).
      loss: ``loss(params, batch)``, a callable that JAX can trace; only for network order.
      batch: an example batch, or `Batches`; only for network order.

    Returns:
      A list of names, each one owner of arrays.

    Raises:
      ValueError: if the tree holds no arrays, two modules have one name, or a ``batch`` is given without ``loss``.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> params = {f"Dense_{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in (0, 2, 10)}
      >>> jh.layer_names(params)
      ['Dense_0', 'Dense_2', 'Dense_10']

    Reference: the paper's layers, whose Hessians Hess_l are the diagonal blocks.
    """
    modules = _modules(params)
    natural = sorted(modules, key=_natural)
    if not natural:
        raise ValueError("the parameter tree holds no arrays, so it has no layers")
    if loss is None and batch is None:
        return natural
    if loss is None:
        raise ValueError("network order needs the loss too: layer_names(params, loss, batch)")
    batch = first_batch(batch)
    check_arrays(batch)
    found = _first_uses(loss, params, batch)
    used = {name: module for name, module in found.items() if module in modules}
    return list(used) + [name for name in natural if name not in used.values()]


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


def subtree(params: PyTree, layer: str) -> PyTree:
    """One layer's part of a parameter tree, for instance {"kernel": ..., "bias": ...}.

    Args:
      params: a pytree of arrays.
      layer: a name from `layer_names`; "blocks[3]/attn" takes slice 3 of every array of blocks/attn.

    Returns:
      The node of the tree, or a dict of the arrays that the module owns itself where it has submodules too.

    Raises:
      ValueError: for an unknown layer; the message lists the layers.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> jh.subtree({"fc": {"w": jnp.ones(2)}, "out": {"w": jnp.zeros(1)}}, "out")
      {'w': Array([0.], dtype=float32)}

    Reference: the paper's w_l, of which Hess_l is the Hessian.
    """
    return find_layer(params, layer).take(params)


def find_layer(params: PyTree, name: str) -> Layer:
    """The `Layer` of a name; ValueError that lists the layers for an unknown one."""
    modules = _modules(params)
    if not isinstance(name, str):
        raise TypeError(f"a layer is given by its name, a string, got {name!r}")
    index, base = None, name
    if name not in modules and (found := re.search(r"\[(\d+)\]", name)):
        index, base = int(found[1]), name.replace(found[0], "", 1)
    if base not in modules:
        raise ValueError(f"unknown layer {name!r}; the layers are {sorted(modules, key=_natural)}")
    owner, leaves = modules[base]
    if index is not None:
        lengths = {jnp.shape(tree_util.tree_leaves(params)[i])[:1] for i in leaves}
        if len(lengths) != 1 or lengths == {()} or index >= min(lengths)[0]:
            raise ValueError(f"unknown layer {name!r}: the arrays of {base!r} have leading axes {sorted(lengths)}")
    return Layer(name, *_subtree(params, owner, leaves), scan_index=index)


def find_layers(params: PyTree, names: Sequence[str]) -> tuple[Layer, ...]:
    """The `Layer` of each name. The name "total" is kept for the whole net."""
    if isinstance(names, str):
        raise TypeError(
            f"layers are given by a list of names, 'all' or 'middle', got the string {names!r}; write [{names!r}]"
        )
    if "total" in names:
        raise ValueError(
            "'total' is the name of the whole net's result, which is always there, and no layer; leave it out of the "
            "names, and rename a module that is called so"
        )
    return tuple(find_layer(params, name) for name in names)


def chosen_layers(names: Sequence[str], layers: str | Sequence[str] | None) -> Sequence[str]:
    """Those of the names, in network order, that are asked for: all of them, the middle ones, or these."""
    if layers is None or layers == "all":
        return names
    return middle_layers(names) if layers == "middle" else layers


def _natural(name):
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def _owner(path):
    """The path of the module that owns a leaf; of the leaf itself where it lies at the root."""
    path = tuple(path)
    if path and path[-1] == _VALUE:
        path = path[:-1]
    return path[:-1] if len(path) > 1 else path


def _name(owner):
    return tree_util.keystr(owner, simple=True, separator="/") or "params"


def _modules(params):
    """{name: (owner path, leaf positions)} of every module that owns arrays."""
    modules = {}
    for i, (path, _) in enumerate(tree_util.tree_leaves_with_path(params)):
        owner = _owner(path)
        found = modules.setdefault(_name(owner), (owner, []))
        if found[0] != owner:
            raise ValueError(f"two modules have the same name {_name(owner)!r}; rename one (keys with '/' may clash)")
        found[1].append(i)
    sizes = [math.prod(jnp.shape(x)) for x in tree_util.tree_leaves(params)]
    return {name: (owner, tuple(leaves)) for name, (owner, leaves) in modules.items() if any(sizes[i] for i in leaves)}


def _subtree(params, owner, leaves) -> tuple[tuple[int, ...], Any]:
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
    own = {_name(tuple(paths[i])[len(owner) :]): i for i in leaves}
    return tuple(own[key] for key in sorted(own)), tree_util.tree_structure(own)


# ---- network order: follow parameters and data through the jaxpr of the loss ----


class _Tag(NamedTuple):
    """What a value is made of: parameters alone (leaf, scan index or None), or data from the batch too."""

    params: frozenset = frozenset()
    data: bool = False


class _Scanned(NamedTuple):
    """A slice of a leaf, in the body of a scan over it."""

    leaf: int
    scan: object


class _Made(NamedTuple):
    """Of a leaf, and no longer it: slices of the value are no slices of the leaf."""

    leaf: int


# Operations behind which the first axis of a leaf is still its own: conversions, and what acts entry by entry.
_KEEPING = frozenset(
    "convert_element_type copy copy_p reduce_precision optimization_barrier sharding_constraint abs add clamp div exp "
    "integer_pow log logistic max min mul neg pow rsqrt select_n sign sqrt square sub tanh".split()
)


def _leaf(use):
    return use if isinstance(use, int) else use[0]


def _first_uses(loss, params, batch):
    """{name: name of its module} in order of first use; the two differ for slices of scanned layers."""
    with hints(params, batch):
        closed = jax.make_jaxpr(loss)(params, batch)
    leaves = tree_util.tree_leaves_with_path(params)
    count = len(leaves)
    tags = [_Tag(frozenset([i])) if i < count else _Tag(data=True) for i in range(len(closed.jaxpr.invars))]
    found: dict = {}  # an ordered set of leaves, and of (leaf, slice, its siblings in the scan, length of the scan)
    _walk(closed.jaxpr, tags, found)
    uses = dict.fromkeys(use.leaf if isinstance(use, _Made) else use for use in found)

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
            names[_name(owner)] = _name(owner)
        elif index is not None:  # used whole as well (in a weight penalty, say), it is the slices that are layers
            module = _common_prefix([owners[i] for i in siblings[owner]]) or owner
            rest = [_name(owner[len(module) :])] if owner != module else []
            names["/".join([f"{_name(module)}[{index}]", *rest])] = _name(owner)
    return names


def _common_prefix(paths):
    prefix = paths[0]
    for path in paths[1:]:
        prefix = prefix[: next((i for i, (a, b) in enumerate(zip(prefix, path, strict=False)) if a != b), len(path))]
    return prefix


def _walk(jaxpr, tags, uses):
    """Tags of the outputs of a jaxpr, given those of its inputs; first uses are added to ``uses`` in order."""
    env = dict(zip(jaxpr.invars, tags, strict=True))

    def read(var):
        return _Tag() if isinstance(var, Literal) else env.get(var, _Tag())

    for eqn in jaxpr.eqns:
        ins = [read(var) for var in eqn.invars]
        outs = _inner(eqn, ins, uses)
        if outs is None:  # an elementary operation
            data = any(tag.data for tag in ins)
            params = frozenset().union(*(tag.params for tag in ins))
            if eqn.primitive.name not in _KEEPING:
                params = frozenset(_Made(use) if isinstance(use, int) else use for use in params)
            if data:
                uses.update(dict.fromkeys(sorted(params, key=_leaf)))
            outs = [_Tag(frozenset(), True) if data else _Tag(params)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _inner(eqn, ins, uses):
    """The tags of the outputs of an operation that holds jaxprs of its own, or None.

    Shapes tell what a jaxpr is for. The parameters that say so have other names in other versions of JAX.
    """
    name, jaxprs = eqn.primitive.name, _opened(eqn.params.values())
    if name == "scan" and (scan := _read_scan(eqn, jaxprs)):
        return _walk_scan(*scan, ins, uses)
    if name == "while" and (loop := _read_while(eqn, jaxprs)):
        return _walk_while(*loop, ins, uses)
    if name == "cond" and (branches := _read_cond(eqn)):
        return [_merge(*tags) for tags in zip(*(_walk(branch, ins[1:], uses) for branch in branches), strict=True)]
    if name in ("scan", "while", "cond"):
        warnings.warn(
            f"jaxhess cannot read the {name!r} of JAX {jax.__version__}: the layers used in it come in the order of "
            f"the parameters' leaves, and arrays that hold many layers are not split. The numbers are right all the "
            f"same. Write layers= for another order, and please report this",
            stacklevel=2,
        )
    elif len(jaxprs) == 1 and _fits(jaxprs[0], ins, eqn.outvars):  # jit, checkpoint, custom_jvp, custom_vjp, shard_map
        return _walk(jaxprs[0], ins, uses)
    return None


def _opened(values):
    """The jaxprs among values, without their constants."""
    return [jaxpr for value in values if hasattr(jaxpr := getattr(value, "jaxpr", value), "eqns")]


def _fits(jaxpr, ins, outs):
    return len(jaxpr.invars) == len(ins) and len(jaxpr.outvars) == len(outs)


def _kinds(variables):
    """[(shape, type)] of variables."""
    return [(jnp.shape(var.aval), getattr(var.aval, "dtype", None)) for var in variables]


def _read_cond(eqn):
    """The jaxprs of a cond's branches, or None. The first input says which; the others go into each."""
    for value in eqn.params.values():
        branches = _opened(value) if isinstance(value, tuple | list) else []
        if branches and len(branches) == len(value) and all(_fits(b, eqn.invars[1:], eqn.outvars) for b in branches):
            return branches
    return None


def _fixpoint(body, ins, consts, carried, uses):
    """A loop's body once more than the tags of what it carries need to settle."""
    for _ in range(2):
        outs = _walk(body, ins, uses)
        ins = [_merge(tag, outs[i - consts]) if consts <= i < consts + carried else tag for i, tag in enumerate(ins)]
    return outs


def _read_while(eqn, jaxprs):
    """(test, body, number of the test's constants, of the body's) of a while loop, or None.

    The inputs are the test's constants, the body's, and what is carried: test and body take it, the body returns it.
    """
    carried = len(eqn.outvars)
    for test, body in itertools.permutations(jaxprs) if len(jaxprs) == 2 else ():
        skip, consts = len(test.invars) - carried, len(body.invars) - carried
        inside = _kinds([*test.invars, *body.invars, *body.outvars])
        outside = _kinds([*eqn.invars[:skip], *eqn.invars[skip + consts :], *eqn.invars[skip:], *eqn.outvars])
        if min(skip, consts) >= 0 and skip + consts + carried == len(eqn.invars) and inside == outside:
            return test, body, skip, consts
    return None


def _walk_while(test, body, skip, consts, ins, uses):
    _walk(test, ins[:skip] + ins[skip + consts :], uses)
    return _fixpoint(body, ins[skip:], consts, len(ins) - skip - consts, uses)


def _read_scan(eqn, jaxprs):
    """(body, number of constants, number of what is carried, indices in the order of time) of a scan, or None.

    The inputs are constants, what is carried, and what is scanned; the outputs are what is carried and what is stacked.
    Scanned and stacked arrays, and they alone, have an axis that the body does not see.
    """
    if len(jaxprs) != 1 or not _fits(jaxprs[0], eqn.invars, eqn.outvars) or "reverse" not in eqn.params:
        return None
    (body,) = jaxprs
    ins, outs = _leading(eqn.invars, body.invars), _leading(eqn.outvars, body.outvars)
    carried = outs.count(())
    consts = ins.count(()) - carried
    lengths = {*ins, *outs} - {()}
    if (
        consts < 0
        or () in [*ins[consts + carried :], *outs[carried:]]
        or len(lengths) > 1
        or any(axes is None or len(axes) != 1 for axes in lengths)
        or _kinds(body.invars[consts : consts + carried]) != _kinds(body.outvars[:carried])
    ):
        return None
    indices = range(lengths.pop()[0] if lengths else 0)
    return body, consts, carried, indices[::-1] if eqn.params["reverse"] else indices


def _leading(outer, inner):
    """The axes that each outer variable has in front of those of the inner one, or None where the others differ."""
    shapes = [(jnp.shape(a.aval), jnp.shape(b.aval)) for a, b in zip(outer, inner, strict=True)]
    return [a[: len(a) - len(b)] if a[max(0, len(a) - len(b)) :] == b else None for a, b in shapes]


def _walk_scan(body, consts, carried, indices, ins, uses):
    here = object()  # slices of a scan around this one are not this one's

    def enter(tag):
        return tag._replace(
            params=frozenset(_Scanned(use, here) if isinstance(use, int) else use for use in tag.params)
        )

    def leave(tag):
        return tag._replace(params=frozenset(_Made(use.leaf) if own(use) else use for use in tag.params))

    def own(use):
        return isinstance(use, _Scanned) and use.scan is here

    inner: dict = {}
    ins = [enter(tag) if i >= consts + carried else tag for i, tag in enumerate(ins)]
    outs = _fixpoint(body, ins, consts, carried, inner)
    scanned = tuple(use.leaf for use in inner if own(use))
    for i in indices or [0]:
        uses.update(dict.fromkeys((use.leaf, i, scanned, len(indices)) if own(use) else use for use in inner))
    return [leave(tag) for tag in outs]


def _merge(*tags):
    data = any(tag.data for tag in tags)
    return _Tag(frozenset() if data else frozenset().union(*(tag.params for tag in tags)), data)
