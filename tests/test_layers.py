"""Layers: names in natural and network order, the middle, subtrees, whatever holds the parameters."""

import dataclasses
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import jaxhess as jh
from jaxhess.selections import find_layer, find_layers

X = helpers.normal(0, 4, 3)


def square(seed):
    """A 3 x 3 layer."""
    return {"w": helpers.normal([1, seed], 3, 3), "b": helpers.normal([2, seed], 3)}


def squares(*names):
    return {name: square(i) for i, name in enumerate(names)}


def apply(layer, x):
    return jnp.tanh(helpers.affine(layer, x))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def chain(*names):
    """A loss that uses these layers one after the other."""

    def loss(params, x):
        for name in names:
            x = apply(params[name], x)
        return x.mean()

    return loss


# ---- names ----


def test_natural_order():
    params = {name: {"kernel": np.ones(1)} for name in ["Conv_10", "Conv_2", "BatchNorm_0", "Conv_0", "Dense_1"]}
    assert jh.layer_names(params) == ["BatchNorm_0", "Conv_0", "Conv_2", "Conv_10", "Dense_1"]
    nested = {"block10": {"conv1": {"w": 1.0}}, "block9": {"conv2": {"w": 1.0}, "conv1": {"w": 1.0}}}
    assert jh.layer_names(nested) == ["block9/conv1", "block9/conv2", "block10/conv1"]


def test_network_order_where_the_order_of_keys_lies():
    names = ["z", "conv_10", "conv_2", "a"]
    params = squares(*names)
    assert jh.layer_names(params) == ["a", "conv_2", "conv_10", "z"]
    assert jh.layer_names(params, chain(*names), X) == names


def cast_first(params, x):
    """Looks at all parameters before any data."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32) * 1.0, params)
    return chain("z", "m", "a")(params, x)


def penalty_first(params, x):
    """Weight decay in the loss, computed before the net and after it."""
    decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return chain("z", "m", "a")(params, x) + decay


def weights_of_weights_first(params, x):
    """Weight standardisation: operations among parameters alone."""
    params = {k: v | {"w": v["w"] - v["w"].mean(0)[None]} for k, v in params.items()}
    return chain("z", "m", "a")(params, x)


@jax.custom_jvp
def custom_tanh(x):
    return jnp.tanh(x)


custom_tanh.defjvp(lambda primals, tangents: (jnp.tanh(*primals), (1 - jnp.tanh(*primals) ** 2) * tangents[0]))


def in_custom_jvp(params, x):
    for name in "zma":
        x = custom_tanh(helpers.affine(params[name], x))
    return x.mean()


def in_custom_vjp(params, x):
    layer = jax.custom_vjp(apply)
    layer.defvjp(lambda p, x: jax.vjp(apply, p, x), lambda pull, g: pull(g))
    for name in "zma":
        x = layer(params[name], x)
    return x.mean()


def in_jit(params, x):
    for name in "zma":
        x = jax.jit(apply)(params[name], x)
    return x.mean()


def in_checkpoint(params, x):
    for name in "zma":
        x = jax.checkpoint(apply)(params[name], x)
    return x.mean()


def in_cond(params, x):
    x = apply(params["z"], x)
    x = lax.cond(x.sum() > 0, lambda p, x: apply(p["m"], x), lambda p, x: x, params, x)
    return apply(params["a"], x).mean()


def in_loops(params, x):
    """Constants of a scan, a fori_loop and a while_loop: the same layer several times, not a slice each."""
    x = lax.scan(lambda x, _: (apply(params["z"], x), None), x, length=2)[0]
    x = lax.fori_loop(0, 2, lambda _, x: apply(params["m"], x), x)
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, apply(params["a"], s[1])), (0, x))[1].mean()


def carried(params, x):
    """The parameters travel in the carry of a scan."""

    def body(carry, name):
        params, x = carry
        return (params, apply(params["m"], apply(params["z"], x))), None

    (params, x), _ = lax.scan(body, (params, x), jnp.arange(2))
    return apply(params["a"], x).mean()


LOSSES = [
    cast_first,
    penalty_first,
    weights_of_weights_first,
    in_custom_jvp,
    in_custom_vjp,
    in_jit,
    in_checkpoint,
    in_cond,
    in_loops,
    carried,
    jax.jit(chain("z", "m", "a")),
    jax.checkpoint(chain("z", "m", "a")),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: getattr(f, "__name__", ""))
def test_network_order_whatever_the_loss_is_made_of(loss):
    assert jh.layer_names(squares("a", "m", "z"), loss, X) == ["z", "m", "a"]


def test_a_tied_weight_belongs_to_its_first_user():
    params = {"embed": {"table": helpers.normal(1, 5, 3)}, "body": square(0), "a_bias": {"b": helpers.normal(2, 5)}}

    def loss(params, ids):
        x = apply(params["body"], params["embed"]["table"][ids])
        return (x @ params["embed"]["table"].T + params["a_bias"]["b"][None]).mean()

    assert jh.layer_names(params, loss, np.arange(4)) == ["embed", "body", "a_bias"]


def test_unused_layers_come_last_in_natural_order():
    params = squares("a10", "a9", "z", "m")
    assert jh.layer_names(params, chain("z", "m"), X) == ["z", "m", "a9", "a10"]
    assert jh.layer_names(params, lambda params, x: x.mean(), X) == ["a9", "a10", "m", "z"]


def test_network_order_from_the_first_of_many_batches():
    batches = jh.Batches([X[:2], X[2:]])
    assert jh.layer_names(squares("a", "z"), chain("z", "a"), batches) == ["z", "a"]


def test_network_order_under_jit():
    names = []
    jax.jit(lambda p, x: names.append(jh.layer_names(p, chain("z", "a"), x)))(squares("a", "z"), X)
    assert names == [["z", "a"]]


# ---- scanned layers ----


def stacked(*names, count=3):
    """{name: layer} with ``count`` layers in each array."""
    return {
        name: {"w": helpers.normal([3, i], count, 3, 3), "b": helpers.normal([4, i], count, 3)}
        for i, name in enumerate(names)
    }


def block(x, layers):
    for name in sorted(layers, reverse=True):
        x = apply(layers[name], x)
    return x, None


def test_scanned_layers_come_out_one_by_one():
    params = {"blocks": stacked("attn", "mlp"), "a_head": square(0), "z_stem": square(1)}

    def loss(params, x):
        x = lax.scan(block, apply(params["z_stem"], x), params["blocks"])[0]
        return apply(params["a_head"], x).mean()

    slices = [f"blocks[{i}]/{name}" for i in range(3) for name in ("mlp", "attn")]
    assert jh.layer_names(params, loss, X) == ["z_stem", *slices, "a_head"]
    assert_equal(jh.subtree(params, "blocks[2]/attn"), jax.tree.map(lambda x: x[2], params["blocks"]["attn"]))


def single(layers, x):
    return lax.scan(lambda x, layer: (apply(layer, x), None), x, layers)[0]


def cast_and_scanned(params, x):
    return single(jax.tree.map(lambda p: p * 2, params["blocks"]), x).mean()


def scanned_with_decay(params, x):
    """The whole array is used too, outside the scan."""
    return single(params["blocks"], x).mean() + sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def scanned_in_reverse(params, x):
    return lax.scan(lambda x, layer: (apply(layer, x), None), x, params["blocks"], reverse=True)[0].mean()


def scanned_at_the_root(params, x):
    return single(params, x).mean()


def first_alone_then_scanned(params, x):
    """The slices of the scan are not those of the array."""
    x = apply(jax.tree.map(lambda p: p[0], params["blocks"]), x)
    return single(jax.tree.map(lambda p: p[1:], params["blocks"]), x).mean()


def scanned_twice(params, x):
    """Once beside another module and once alone."""
    x = lax.scan(block, x, params["blocks"])[0]
    return single(params["blocks"]["attn"], x).mean()


def scanned_alone_first(params, x):
    x = single(params["blocks"]["attn"], x)
    return lax.scan(block, x, params["blocks"])[0].mean()


ONE = {"blocks": stacked("only")["only"]}
TWO = {"blocks": stacked("attn", "mlp")}


@pytest.mark.parametrize(
    ("params", "loss", "names"),
    [
        (ONE, cast_and_scanned, ["blocks[0]", "blocks[1]", "blocks[2]"]),
        (ONE, scanned_with_decay, ["blocks[0]", "blocks[1]", "blocks[2]"]),
        (ONE, scanned_in_reverse, ["blocks[2]", "blocks[1]", "blocks[0]"]),
        (ONE["blocks"], scanned_at_the_root, None),
        # The three below fail at the time of writing: layer_names loses blocks[2], or names slices of attn twice.
        (ONE, first_alone_then_scanned, None),
        (TWO, scanned_twice, None),
        (TWO, scanned_alone_first, None),
    ],
)
def test_scanned_layers_hold_each_parameter_once(params, loss, names):
    """Else the traces of the layers would not sum to the total."""
    found = jh.layer_names(params, loss, X)
    if names is not None:
        assert found == names
    layers = find_layers(params, found)
    assert sum(np.size(x) for layer in layers for x in layer.arrays(params)) == len(helpers.ravel(params))


def test_a_slice_can_be_put_back():
    params = jax.tree.map(jnp.asarray, {"blocks": stacked("attn"), "head": square(0)})
    layer = find_layer(params, "blocks[1]/attn")
    changed = layer.put(params, jax.tree.map(lambda x: x + 1, layer.take(params)))
    step = {"w": np.zeros((3, 3, 3)), "b": np.zeros((3, 3))}
    for x in step.values():
        x[1] = 1
    assert_equal(changed, params | {"blocks": {"attn": jax.tree.map(jnp.add, params["blocks"]["attn"], step)}})


# ---- trees of all kinds ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """As Equinox has it: arrays in the fields of a module."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return apply({"w": self.weight, "b": self.bias}, x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module that owns an array and has submodules."""

    layers: list
    shift: jax.Array


def module():
    first, second = square(0), square(1)
    layers = [Linear(second["w"], second["b"]), Linear(first["w"], first["b"])]
    return Module(layers, np.zeros(3, np.float32))


def module_loss(params, x):
    for layer in params.layers[::-1]:
        x = layer(x)
    return (x + params.shift[None]).mean()


class Net(nnx.Module):
    def __init__(self, rngs):
        self.z_first = nnx.Linear(3, 3, rngs=rngs)
        self.a_last = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.a_last(jnp.tanh(self.z_first(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(3, name="Stem")(x)
        return linen.Dense(3)(linen.LayerNorm()(x))


@pytest.mark.parametrize("container", [list, tuple])
def test_lists_and_tuples(container):
    params = container([square(0), {"inner": container([square(1), square(2)])}])

    def loss(params, x):
        return apply(params[0], apply(params[1]["inner"][0], apply(params[1]["inner"][1], x))).mean()

    assert jh.layer_names(params) == ["0", "1/inner/0", "1/inner/1"]
    assert jh.layer_names(params, loss, X) == ["1/inner/1", "1/inner/0", "0"]
    assert_equal(jh.subtree(params, "1/inner/0"), params[1]["inner"][0])


def test_dataclasses():
    params = module()
    assert jh.layer_names(params) == ["layers/0", "layers/1", "shift"]
    assert jh.layer_names(params, module_loss, X) == ["layers/1", "layers/0", "shift"]
    part = jh.subtree(params, "layers/0")
    assert isinstance(part, Linear)
    product = jh.hessian(module_loss, params, X, layer="layers/0")(part)
    whole = jh.hessian(module_loss, params, X)
    zeros = jax.tree.map(jnp.zeros_like, params)
    expected = whole(dataclasses.replace(zeros, layers=[part, zeros.layers[1]])).layers[0]
    np.testing.assert_allclose(helpers.ravel(product), helpers.ravel(expected), atol=1e-6)


def test_nnx():
    graph, state = nnx.split(Net(nnx.Rngs(0)))

    def loss(state, x):
        return (nnx.merge(graph, state)(x) ** 2).mean()

    assert jh.layer_names(state) == ["a_last", "z_first"]
    assert jh.layer_names(state, loss, X) == ["z_first", "a_last"]
    part = jh.subtree(state, "a_last")
    assert [x.shape for x in jax.tree.leaves(part)] == [(3,), (3, 3)]
    product = jh.hessian(loss, state, X, layer="a_last")(part)
    assert jax.tree.structure(product) == jax.tree.structure(part)


def test_linen():
    params = LinenNet().init(jax.random.key(0), X)["params"]
    assert jh.layer_names(params) == ["Dense_0", "LayerNorm_0", "Stem"]
    loss = lambda params, x: LinenNet().apply({"params": params}, x).mean()
    assert jh.layer_names(params, loss, X) == ["Stem", "LayerNorm_0", "Dense_0"]


# "fc[0]" fails at the time of writing: network order takes brackets of the user's own for slices, and lists it twice.
@pytest.mark.parametrize("names", [["mlp/~/linear_0", "mlp/~/linear_1"], ["fc[0]", "fc[1]"]])
def test_names_with_slashes_or_brackets_of_their_own(names):
    """As Haiku writes them, or a user."""
    params = squares(*names)
    assert jh.layer_names(params) == names
    assert jh.layer_names(params, chain(*reversed(names)), X) == names[::-1]
    assert_equal(jh.subtree(params, names[1]), params[names[1]])


def test_a_module_that_owns_arrays_and_has_submodules():
    params = {"block": {"scale": np.ones(3), "attn": square(0), "mlp": square(1)}}
    assert jh.layer_names(params) == ["block", "block/attn", "block/mlp"]
    own = jh.subtree(params, "block")
    assert list(own) == ["scale"]

    def loss(params, x):
        x = apply(params["block"]["attn"], x)
        return ((x * params["block"]["scale"][None]) ** 2).mean()

    assert jh.layer_names(params, loss, X) == ["block/attn", "block", "block/mlp"]
    product = jh.hessian(loss, params, X, layer="block")(own)
    x = apply(params["block"]["attn"], X)
    np.testing.assert_allclose(product["scale"], 2 * (x**2).mean(0) / 3, rtol=1e-5)


def test_arrays_at_the_root_are_layers_of_their_own():
    assert jh.layer_names({"w": X, "b": X, "fc": {"w": X}}) == ["b", "fc", "w"]
    np.testing.assert_array_equal(jh.subtree({"w": X, "b": X + 1}, "b"), X + 1)
    assert jh.layer_names(X) == ["params"]
    np.testing.assert_array_equal(jh.subtree(X, "params"), X)


@pytest.mark.parametrize("params", [squares("a", "b"), module(), [square(0), (square(1),)], {"w": X, "m": {"s": X}}])
def test_layers_partition_the_parameters_and_go_back_where_they_came_from(params):
    layers = find_layers(params, jh.layer_names(params))
    assert sorted(piece.leaf for layer in layers for piece in layer.pieces) == list(range(len(jax.tree.leaves(params))))
    rebuilt = jax.tree.map(np.zeros_like, params)
    for layer in layers:
        rebuilt = layer.put(rebuilt, layer.take(params))
    assert_equal(rebuilt, params)


# ---- the middle ----


@pytest.mark.parametrize("count", range(1, 21))
def test_middle_layers(count):
    names = [f"layer{i}" for i in range(count)]
    middle = jh.middle_layers(names)
    assert middle == [names[i] for i in range(count) if math.floor(count / 4) <= i <= math.ceil(3 * count / 4) - 1]
    assert middle


# ---- what is refused ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jh.subtree(squares("a", "b10", "b9"), "c"), ValueError, r"'c'; the layers are \['a', 'b9', 'b10'\]"),
        (lambda: jh.subtree({"a": squares("c")}, "c"), ValueError, r"\['a/c'\]; the glob '\*/c' takes all that end so"),
        (lambda: jh.subtree(squares("a"), "a/c"), ValueError, r"'a/c'; the layers are \['a'\]"),
        (lambda: jh.subtree(squares("a"), ""), ValueError, r"''; the layers are \['a'\]"),
        (lambda: jh.subtree(squares("a"), 0), TypeError, "by a name, a glob.*got 0"),
        (lambda: jh.subtree({"s": stacked("m")}, "s[3]/m"), ValueError, r"s\[3\]/m"),
        (lambda: jh.subtree({"s": stacked("m")}, "t[0]/m"), ValueError, r"t\[0\]/m.*\['s/m'\]"),
        (lambda: jh.layer_names({}), ValueError, "no arrays"),
        (
            lambda: jh.layer_names(squares("a"), batch=X),
            ValueError,
            r"needs the loss.*layer_names\(params, loss, batch\)",
        ),
        (lambda: jh.middle_layers([]), ValueError, "empty"),
        (lambda: find_layers(squares("total"), ["total"]), ValueError, "'total'.*rename"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_is_scanned_beside_what_is_not_stays_one_layer():
    params = {"net": {"stack": jnp.ones((3, 2, 2)), "head": jnp.ones((2, 2))}}

    def loss(p, x):
        x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["net"]["stack"])
        return jnp.sum(x @ p["net"]["head"])

    assert jh.layer_names(params, loss, jnp.ones((1, 2))) == ["net"]


@pytest.mark.parametrize("change", [lambda w: w.T, lambda w: w[::-1], lambda w: w @ w])
def test_what_a_scan_makes_of_an_array_has_no_slices(change):
    params = {"blocks": {"w": jnp.ones((3, 3))}}

    def loss(p, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h * w), None), x, change(p["blocks"]["w"]))[0])

    assert jh.layer_names(params, loss, jnp.ones(3)) == ["blocks"]


def test_scanned_layers_in_half_precision_have_slices():
    params = {"blocks": {"w": jnp.ones((3, 2))}}

    def loss(p, x):
        w = p["blocks"]["w"].astype(jnp.bfloat16)
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h * w), None), x.astype(jnp.bfloat16), w)[0])

    assert jh.layer_names(params, loss, jnp.ones(2)) == ["blocks[0]", "blocks[1]", "blocks[2]"]


def test_layers_without_entries_are_none():
    params = {"a": {"w": jnp.ones(2)}, "c": {"w": jnp.ones((0, 2))}}

    def loss(p, x):
        return jnp.sum(x * p["a"]["w"] ** 2) + jnp.sum(p["c"]["w"] @ x)

    assert jh.layer_names(params) == ["a"] == jh.layer_names(params, loss, jnp.ones(2))
    assert list(jh.layer_spectra(loss, params, jnp.ones(2), key=jax.random.key(0))) == ["a", "total"]


def test_a_string_is_no_list_of_layers():
    params = {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(2)}}
    with pytest.raises(ValueError, match="unknown layer 'ab'"):
        jh.layer_spectra(lambda p, _: p["a"]["w"] @ p["b"]["w"], params, None, key=jax.random.key(0), layers="ab")
