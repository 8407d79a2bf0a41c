"""Which parameters are asked for: modules, globs, arrays, slices, predicates, lists and named groups of these."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import tree_util

from jaxhess._cover import repeated
from jaxhess._indices import Range, entry_name, plain, resolved, written
from jaxhess.layers import Modules, array_name, middle_layers, modules_of, natural, owner_name, subtree_of

PyTree = Any
Selection = Any  # str | part(...) | Callable[[str], bool] | Sequence[Selection]
Selections = Any  # Selection | int | {name: Selection}
_TEXT = (str, bytes)


class Piece(NamedTuple):
    """An array, or a part of it: the position of its leaf, and an entry for each axis that is cut."""

    leaf: int
    at: tuple[int | Range | tuple[int, ...], ...] | None = None

    def key(self, axes: int = 0) -> tuple:
        """The index for numpy, behind so many whole axes."""
        return (slice(None),) * axes + tuple(plain(entry) for entry in self.at or ())

    def of(self, leaf: Any, axes: int = 0) -> Any:
        """The part of an array, with so many axes in front."""
        return leaf if self.at is None else leaf[self.key(axes)]


class Layer(NamedTuple):
    """The parameters of a layer or a group: pieces of the leaves of a tree, in the order of their own subtree."""

    name: str
    pieces: tuple[Piece, ...]
    treedef: Any  # of its subtree

    def take(self, tree: PyTree) -> PyTree:
        """The layer's part of a tree like the parameters."""
        return self.unflatten(self.arrays(tree))

    def arrays(self, tree: PyTree, axes: int = 0) -> list:
        """The layer's arrays, as a list; of a tree whose leaves have so many axes in front."""
        leaves = tree_util.tree_leaves(tree)
        return [piece.of(leaves[piece.leaf], axes) for piece in self.pieces]

    def unflatten(self, arrays: Sequence) -> PyTree:
        """The layer's subtree from its arrays."""
        return tree_util.tree_unflatten(self.treedef, arrays)

    def put(self, tree: PyTree, part: PyTree) -> PyTree:
        """The tree with this layer's part replaced."""
        leaves, treedef = tree_util.tree_flatten(tree)
        for piece, new in zip(self.pieces, self.treedef.flatten_up_to(part), strict=True):
            leaf = leaves[piece.leaf]
            leaves[piece.leaf] = new if piece.at is None else leaf.at[piece.key()].set(new)
        return tree_util.tree_unflatten(treedef, leaves)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A slice of each array of a selection; `part` makes one."""

    selection: Selection
    index: tuple

    def __str__(self):
        return f"{name_of(self.selection)}[{', '.join(map(entry_name, self.index))}]"


def part(selection: Selection, index: Any) -> _Part:
    """A slice of arrays, as a selection: heads of an attention layer, experts, rows of an embedding.

    Each array of the selection is cut: A[index] in the notation of numpy.

    Args:
      selection: which arrays, such as "attn/qkv/kernel" or the glob "*/qkv/kernel".
      index: integers, slices, an ellipsis, and at most one list or vector of integers or bools, as `numpy.s_` makes
        them.

    Returns:
      What may stand wherever a layer is asked for.

    Raises:
      TypeError: for an index of another kind. An index out of range is an error where the arrays are known.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh, numpy as np
      >>> params = {"attn": {"qkv": {"kernel": jnp.arange(12.0).reshape(2, 6)}}}
      >>> jh.subtree(params, jh.part("attn/qkv/kernel", np.s_[:, 2:4]))
      Array([[2., 3.],
             [8., 9.]], dtype=float32)

    Reference: the indexing of numpy; arXiv 2402.16788 for the parts of a fused kernel taken one by one.
    """
    entries = index if isinstance(index, tuple) else (index,)
    return _Part(selection, tuple(map(written, entries)))


def subtree(params: PyTree, layer: Selection) -> PyTree:
    """The parameters of one layer or group, for instance {"kernel": ..., "bias": ...}.

    Args:
      params: a pytree of arrays.
      layer: a name from `layer_names`; "blocks[3]/attn" takes slice 3 of every array of blocks/attn. Or any other
        selection: the path of a module with all its submodules ("block1"); a glob ("block*/attn/*"), which matches
        paths of modules and arrays as `fnmatch` does, so that * crosses "/"; the path of an array ("fc1/kernel");
        `part` of arrays; a predicate on the paths of arrays; a list of these.

    Returns:
      The node of the tree for the path of a module; the array for the path of an array; else {path: array}. For a
      layer with submodules of other layers, a dict of the arrays that it owns itself.

    Raises:
      ValueError: for an unknown layer, or a selection of nothing; the message lists the layers. For arrays that are
        selected twice, or an index out of range.
      TypeError: for a selection of another kind.

    Example:
      >>> import jax.numpy as jnp, jaxhess as jh
      >>> jh.subtree({"fc": {"w": jnp.ones(2)}, "out": {"w": jnp.zeros(1)}}, "out")
      {'w': Array([0.], dtype=float32)}

    Reference: the paper's w_l; Hess_l is the Hessian with respect to it.
    """
    return find_layer(params, layer).take(params)


def find_layer(params: PyTree, selection: Selection, modules: Modules | None = None) -> Layer:
    """The `Layer` of a selection, named after it; ValueError that lists the layers where there is none."""
    return _Finder(params, modules_of(params) if modules is None else modules).layer(name_of(selection), selection)


def find_layers(params: PyTree, names: Sequence[str]) -> tuple[Layer, ...]:
    """The `Layer` of each name."""
    return select(params, list(names), modules_of(params), list)


def whole_net(params: PyTree) -> Layer:
    """All parameters, as one layer."""
    leaves, treedef = tree_util.tree_flatten(params)
    return Layer("total", tuple(map(Piece, range(len(leaves)))), treedef)


def select(
    params: PyTree, layers: Selections, modules: Modules, network: Callable[[], Sequence[str]]
) -> tuple[Layer, ...]:
    """The layers or groups that ``layers`` asks for; ``network()`` are the names of all layers in network order."""
    check_selections(layers)
    finder, named = _Finder(params, modules), dict[str, Selection]()
    if layers == "arrays":
        named = {name: name for layer in network() for name in finder.arrays_of(layer)}
    elif isinstance(layers, Integral):
        groups: dict[str, list[str]] = {}
        for name in network():
            groups.setdefault("/".join(name.split("/")[:layers]), []).append(name)
        named = {name: group[0] if group == [name] else group for name, group in groups.items()}
    elif isinstance(layers, Mapping):
        named = dict(layers)
    else:
        chosen = middle_layers(network()) if layers == "middle" else network() if layers in (None, "all") else layers
        several = isinstance(chosen, Sequence) and not isinstance(chosen, _TEXT)
        if several and layers is chosen and set(map(name_of, chosen)) <= set(known := network()):
            chosen = sorted(chosen, key=known.index)
        for one in chosen if several else [chosen]:
            if named.setdefault(name := name_of(one), one) is not one and named[name] != one:
                raise ValueError(f"two selections are called {name!r}; name them with {{name: selection}}")
    return tuple(finder.layer(name, selection) for name, selection in named.items())


def check_selections(layers: Selections) -> None:
    """ValueError or TypeError for a selection that is wrong whatever the parameters are."""
    if isinstance(layers, bool) or not (
        layers is None or isinstance(layers, (str, Integral, Mapping, Sequence, _Part))
    ):
        if not callable(layers):
            raise TypeError(
                f"layers must be 'all', 'middle', 'arrays', a depth, a selection, a list of these, or "
                f"{{name: selection}}, got {layers!r}"
            )
    if isinstance(layers, Integral) and layers < 1:
        raise ValueError(f"a depth of layers is at least 1, got {layers}")
    if isinstance(layers, (Mapping, Sequence)) and not layers:
        raise ValueError("layers selects no layer; name at least one, or use 'all'")
    names = list(layers) if isinstance(layers, Mapping) else [layers] if isinstance(layers, _TEXT) else layers
    if isinstance(names, Sequence) and "total" in names:
        raise ValueError(
            "'total' names the result of the whole net, which is always included, and is no layer; leave it out "
            "of the names, and rename a module of this name"
        )


def name_of(selection: Selection) -> str:
    """What a selection is called where it has no name of its own."""
    if isinstance(selection, (str, _Part)):
        return str(selection)
    if isinstance(selection, Sequence):
        return "+".join(map(name_of, selection))
    return getattr(selection, "__name__", repr(selection))


class _Finder:
    """Finds selections in one tree."""

    def __init__(self, params, modules):
        self._params, self._modules = params, modules
        self._leaves = tree_util.tree_leaves_with_path(params)
        self._names = [array_name(path) for path, _ in self._leaves]

    def layer(self, name, selection):
        return Layer(name, *self._node(selection))

    def arrays_of(self, layer):
        """The paths of the arrays of a layer; of scanned layers with the index of the slice."""
        index = re.search(r"\[\d+\]", layer) if layer not in self._modules else None
        pieces, _ = self._node(layer)
        base = layer.replace(index[0], "", 1) if index else layer
        return [
            f"{layer}{self._names[piece.leaf].removeprefix(base)}" if index else self._names[piece.leaf]
            for piece in sorted(pieces)
        ]

    def _node(self, selection):
        """(pieces, treedef): of a module its node, of an array itself, of all else {path: array}."""
        if isinstance(selection, str):
            return self._of_path(selection)
        if isinstance(selection, _Part):
            pieces, treedef = self._node(selection.selection)
            return tuple(self._cut(piece, selection) for piece in pieces), treedef
        if isinstance(selection, Sequence) and not isinstance(selection, bytes):
            pieces = [piece for one in selection for piece in self._node(one)[0]]
            return self._group(dict.fromkeys(pieces), selection)
        if callable(selection):
            return self._group([Piece(i) for i, name in enumerate(self._names) if selection(name)], selection)
        raise TypeError(
            f"a layer is given by a name, a glob, part(...), a predicate on paths or a list of these, got {selection!r}"
        )

    def _of_path(self, path):
        path = path.replace("[*]", "")  # of all slices
        found, index = self._exactly(path), None
        if found is None:  # an element of a list
            found = self._exactly(re.sub(r"\[(\d+)\]", r"/\1", path))
        if found is None and (index := re.search(r"\[(\d+)\]", path)):
            found = self._exactly(path.replace(index[0], "", 1))
        if found is None and re.search(r"[*?\[]", path):
            leaves = self._matching(path)
            if not leaves and index:
                leaves = self._matching(path.replace(index[0], "", 1))
            else:
                index = None
            pieces = [Piece(i) for i in leaves]
            return self._group([self._slice(p, int(index[1]), path) for p in pieces] if index else pieces, path)
        if found is None:
            glob = f"*/{path}"
            hint = f"; the glob {glob!r} takes all that end so" if self._matching(glob) else ""
            raise ValueError(f"unknown layer {path!r}; {self._known()}{hint}")
        leaves, treedef = found
        if not any(np.size(self._leaves[i][1]) for i in leaves):
            raise ValueError(f"{path!r} selects nothing, its arrays are empty; {self._known()}")
        pieces = (Piece(i) for i in leaves)
        return tuple(self._slice(p, int(index[1]), path) if index else p for p in pieces), treedef

    def _exactly(self, path):
        """(leaves, treedef) of a layer, of a module with submodules, or of an array; None if there is none."""
        if path in self._modules:
            return subtree_of(self._params, *self._modules[path])
        below = [i for i, (at, _) in enumerate(self._leaves) if path in _prefixes(at)]
        if below:
            at, _ = self._leaves[below[0]]
            return subtree_of(self._params, at[: _prefixes(at).index(path) + 1], tuple(below))
        if path in self._names:
            return (self._names.index(path),), tree_util.tree_structure(0)
        return None

    def _matching(self, glob):
        found = []
        for i, (at, _) in enumerate(self._leaves):
            if any(fnmatch.fnmatchcase(name, glob) for name in (*_prefixes(at), self._names[i])):
                found.append(i)
        return found

    def _group(self, pieces, selection):
        """{path: array}, each array once."""
        pieces = [piece for piece in pieces if np.size(self._leaves[piece.leaf][1])]
        if not pieces:
            raise ValueError(f"{name_of(selection)!r} selects nothing; {self._known()}")
        keys = {}
        for piece in pieces:
            key = self._names[piece.leaf] + ("" if piece.at is None else f"[{', '.join(map(_shown, piece.at))}]")
            keys[key] = piece
        if twice := repeated(self._params, pieces):
            raise ValueError(
                f"{name_of(selection)!r} selects entries of {self._names[twice[0]]!r} twice; select each once"
            )
        return tuple(keys[key] for key in sorted(keys)), tree_util.tree_structure(dict.fromkeys(keys, 0))

    def _slice(self, piece, number, path):
        shape = jnp.shape(self._leaves[piece.leaf][1])
        if not shape or number >= shape[0]:
            raise ValueError(
                f"unknown layer {path!r}: the array {self._names[piece.leaf]!r} of shape {shape} has no slice {number}"
            )
        return Piece(piece.leaf, (number,))

    def _cut(self, piece, cut):
        shape = jnp.shape(self._leaves[piece.leaf][1])
        axes = shape if piece.at is None else shape[len(piece.at) :]
        if piece.at is not None and any(not isinstance(entry, int) for entry in piece.at):
            raise ValueError(f"{cut} is a part of a part; give one index")
        where = f"{cut} of the array {self._names[piece.leaf]!r} of shape {axes}"
        return Piece(piece.leaf, (piece.at or ()) + resolved(cut.index, axes, where))

    def _known(self):
        return f"the layers are {sorted(self._modules, key=natural)}"


def _shown(entry):
    """An entry with known ends, in the notation of numpy."""
    if isinstance(entry, Range):
        return entry_name(("slice", entry.start, None if entry.stop < 0 else entry.stop, entry.step))
    return entry_name(("rows", *entry) if isinstance(entry, tuple) else entry)


def _prefixes(path):
    """The names of the modules on the way to an array."""
    return [owner_name(path[: i + 1]) for i in range(len(path) - 1)]
