"""Old and new versions of JAX: loops are read whatever JAX calls their parts, and wrong numbers are kept out."""

import importlib
import re
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxhess as jh
from jaxhess import _order, _versions
from jaxhess.selections import find_layers

X = helpers.normal(0, 4, 3)


def square(seed):
    return {"w": helpers.normal([1, seed], 3, 3), "b": helpers.normal([2, seed], 3)}


def stack(seed, *counts):
    """Layers of 3 x 3 in arrays with leading axes of these lengths."""
    return {"w": helpers.normal([3, seed], *counts, 3, 3), "b": helpers.normal([4, seed], *counts, 3)}


def apply(layer, x):
    return jnp.tanh(helpers.affine(layer, x))


def over(layers, x, **options):
    return lax.scan(lambda x, layer: (apply(layer, x), None), x, layers, **options)[0]


# ---- scans: (parameters, loss, names in order) ----


def empty_carry(p, x):
    """Of length zero, and changed by the body, so that no version of JAX takes it for a constant."""

    def body(carry, layer):
        x, nothing = carry
        return (apply(layer, x), 2 * nothing), None

    return lax.scan(body, (x, jnp.zeros(0)), p["blocks"])[0][0].mean()


def carry_like_a_slice(p, x):
    """A matrix is carried, another is constant, and slices have the same shape."""
    constant = jnp.ones((3, 3))

    def body(carry, layer):
        x, matrix = carry
        return (apply(layer, x) @ matrix @ constant, matrix + layer["w"]), matrix

    (x, _), stacked = lax.scan(body, (x, p["carried"]["w"]), p["blocks"])
    return apply(p["after"], x).mean() + stacked.mean()


def carry_like_the_stack(p, x):
    """What is carried has the shape of the whole array, as in a scan of as many steps as a matrix has rows."""

    def body(carry, layer):
        x, whole = carry
        return (apply(layer, x) + whole.sum(), whole * 2), None

    return lax.scan(body, (x, jnp.ones((3, 3, 3))), p["blocks"])[0][0].mean()


def first_slice_then_constant(p, x):
    def body(x, layer):
        return apply(p["a_shared"], apply(layer, x)), None

    return lax.scan(body, x, p["blocks"])[0].mean()


def stacked_outputs_alone(p, x):
    """No carry: `lax.map`."""
    return lax.map(lambda layer: apply(layer, x), p["blocks"]).mean()


def scanned_and_not_used(p, x):
    def body(x, slices):
        return apply(slices[0], x), None

    return lax.scan(body, x, (p["blocks"], p["idle"]))[0].mean()


def data_scanned(p, x):
    """The scan runs over data, the parameters are constants of it."""
    return lax.scan(lambda h, row: (apply(p["cell"], h + row[None]), None), jnp.zeros((1, 3)), x)[0].mean()


def nested(p, x):
    """A scan over groups, and in each one over its layers: the slices of the outer one are layers."""
    return lax.scan(lambda x, group: (over(group, x), None), x, p["blocks"])[0].mean()


def nested_with_a_stack_of_its_own(p, x):
    def body(x, layer):
        return over(p["inner"], apply(layer, x)), None

    return lax.scan(body, x, p["outer"])[0].mean()


def in_checkpoint(p, x):
    return lax.scan(jax.checkpoint(lambda x, layer: (apply(layer, x), None)), x, p["blocks"])[0].mean()


def in_vmap(p, x):
    return jax.vmap(lambda row: over(p["blocks"], row[None]))(x).mean()


def in_grad(p, x):
    """A loss of slopes: the scan is differentiated before it is measured."""
    return (jax.grad(lambda x: over(p["blocks"], x).mean())(x) ** 2).mean()


def number_carried(p, x):
    def body(carry, layer):
        x, i = carry
        return (apply(layer, x) * i, i + 1), None

    return lax.scan(body, (x, 0), p["blocks"])[0][0].mean()


SLICES = [f"blocks[{i}]" for i in range(3)]
SCANS = {
    "empty carry": ({"blocks": stack(0, 3)}, empty_carry, SLICES),
    "one step": ({"blocks": stack(0, 1)}, lambda p, x: over(p["blocks"], x).mean(), ["blocks[0]"]),
    "reverse": ({"blocks": stack(0, 3)}, lambda p, x: over(p["blocks"], x, reverse=True).mean(), SLICES[::-1]),
    "unrolled": ({"blocks": stack(0, 3)}, lambda p, x: over(p["blocks"], x, unroll=2).mean(), SLICES),
    "carry like a slice": (
        {"after": square(1), "blocks": stack(0, 3), "carried": {"w": square(2)["w"]}},
        carry_like_a_slice,
        ["blocks[0]", "carried", "blocks[1]", "blocks[2]", "after"],
    ),
    "carry like the stack": ({"blocks": stack(0, 3)}, carry_like_the_stack, SLICES),
    "a slice, then a constant": (
        {"a_shared": square(1), "blocks": stack(0, 3)},
        first_slice_then_constant,
        ["blocks[0]", "a_shared", "blocks[1]", "blocks[2]"],
    ),
    "map": ({"blocks": stack(0, 3)}, stacked_outputs_alone, SLICES),
    "not used": ({"blocks": stack(0, 3), "idle": stack(1, 3)}, scanned_and_not_used, [*SLICES, "idle"]),
    "data": ({"cell": square(0)}, data_scanned, ["cell"]),
    "nested": ({"blocks": stack(0, 2, 3)}, nested, ["blocks[0]", "blocks[1]"]),
    "nested of one length": ({"blocks": stack(0, 3, 3)}, nested, SLICES),
    "nested, reverse inside": (
        {"blocks": stack(0, 3, 3)},
        lambda p, x: lax.scan(lambda x, g: (over(g, x, reverse=True), None), x, p["blocks"])[0].mean(),
        SLICES,
    ),
    "nested with its own": (
        {"inner": stack(0, 2), "outer": stack(1, 2)},
        nested_with_a_stack_of_its_own,
        ["outer[0]", "inner[0]", "inner[1]", "outer[1]"],
    ),
    "checkpoint": ({"blocks": stack(0, 3)}, in_checkpoint, SLICES),
    "vmap": ({"blocks": stack(0, 3)}, in_vmap, SLICES),
    "grad": ({"blocks": stack(0, 3)}, in_grad, SLICES),
    "number carried": ({"blocks": stack(0, 3)}, number_carried, SLICES),
}


# ---- other operations that hold programs ----


def while_with_constants(p, x):
    """The test has parameters and data of its own, the body others."""

    def go_on(state):
        return (state[0] < 2) & (apply(p["z_test"], x).sum() < 100)

    return apply(p["a"], lax.while_loop(go_on, lambda s: (s[0] + 1, apply(p["m_body"], s[1])), (0, x))[1]).mean()


def while_of_one_truth(p, x):
    """All that is carried is a truth value, so that the test and the body have the same shapes."""
    positive = lax.while_loop(lambda go: go & (apply(p["m"], x).sum() > 0), lambda go: ~go, x.sum() < 9)
    return apply(p["a"], apply(p["z"], x * positive)).mean()


def branches(p, x):
    x = lax.switch(x.sum().astype(int) % 3, [apply, lambda q, x: x, lambda q, x: x * q["w"].sum()], p["z"], x)
    return apply(p["a"], apply(p["m"], x)).mean()


def solved(p, x):
    """A solver, whose several programs are not followed: all that goes in is used there."""
    matrix = p["z"]["w"] @ p["z"]["w"].T + jnp.eye(3)
    x = lax.custom_linear_solve(lambda v: matrix @ v, x[0], lambda mv, b: jnp.linalg.solve(matrix, b), symmetric=True)
    return apply(p["a"], apply(p["m"], x[None])).mean()


def on_many_devices(p, x):
    shard_map = getattr(jax, "shard_map", None) or importlib.import_module("jax.experimental.shard_map").shard_map
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = dict(mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data"))
    net = shard_map(lambda p, x: apply(p["m"], apply(p["z"], x)), **specs)
    return apply(p["a"], net(p, x)).mean()


OTHERS = {
    "while": (
        {"a": square(0), "m_body": square(1), "z_test": square(2)},
        while_with_constants,
        ["z_test", "m_body", "a"],
    ),
    "truth": ({"a": square(0), "m": square(1), "z": square(2)}, while_of_one_truth, ["m", "z", "a"]),
    "switch": ({"a": square(0), "m": square(1), "z": square(2)}, branches, ["z", "m", "a"]),
    "solver": ({"a": square(0), "m": square(1), "z": square(2)}, solved, ["z", "m", "a"]),
    "shard_map": ({"a": square(0), "m": square(1), "z": square(2)}, on_many_devices, ["z", "m", "a"]),
}
CASES = SCANS | OTHERS


@pytest.mark.parametrize("case", CASES)
def test_network_order(case):
    params, loss, names = CASES[case]
    assert jh.layer_names(params, loss, X) == names
    found = [layer.arrays(params) for layer in find_layers(params, names)]
    assert sum(np.size(x) for arrays in found for x in arrays) == len(helpers.ravel(params))


def change_parameters(monkeypatch, change):
    """Every operation that holds programs shows its parameters as ``change`` has them."""
    inner = _order._inner

    def changed(eqn, ins, uses):
        shown = types.SimpleNamespace(primitive=eqn.primitive, invars=eqn.invars, outvars=eqn.outvars)
        shown.params = change(eqn.params)
        return inner(shown, ins, uses)

    monkeypatch.setattr(_order, "_inner", changed)


@pytest.mark.parametrize("case", CASES)
def test_network_order_under_other_names_of_all_parameters(case, monkeypatch):
    """But ``reverse``, an argument of `lax.scan` that cannot be told from shapes."""
    params, loss, names = CASES[case]
    change_parameters(monkeypatch, lambda p: {k if k == "reverse" else f"new_{k}": v for k, v in p.items()})
    assert jh.layer_names(params, loss, X) == names


@pytest.mark.parametrize(
    ("case", "change", "names"),
    [
        ("reverse", lambda p: {k: v for k, v in p.items() if k != "reverse"}, ["blocks"]),
        ("nested with its own", lambda p: {k: v for k, v in p.items() if k != "reverse"}, ["inner", "outer"]),
        ("reverse", lambda p: {k: v for k, v in p.items() if not hasattr(v, "eqns")}, ["blocks"]),
        ("while", lambda p: {k: v for k, v in p.items() if not k.startswith("body")}, ["m_body", "z_test", "a"]),
        ("switch", lambda p: {k: v for k, v in p.items() if k != "branches"}, ["z", "m", "a"]),
    ],
)
def test_what_cannot_be_read_is_one_operation_and_is_told(case, change, names, monkeypatch):
    params, loss, _ = CASES[case]
    change_parameters(monkeypatch, change)
    with pytest.warns(UserWarning, match=rf"cannot read the '(scan|while|cond)' of JAX {re.escape(jax.__version__)}"):
        assert jh.layer_names(params, loss, X) == names


def test_scanned_layers_have_traces_that_sum_to_the_total():
    params, loss, names = SCANS["reverse"]
    found = jh.layer_traces(loss, params, X, key=jax.random.key(0), num_probes=8)
    assert list(found) == [*names, "total"]
    blocks = [np.trace(helpers.matrix(jh.hessian(loss, params, X, layer=n), jh.subtree(params, n))) for n in names]
    whole = np.trace(helpers.matrix(jh.hessian(loss, params, X), params))
    np.testing.assert_allclose(sum(blocks), whole, rtol=1e-4)
    for name, block in zip(names, blocks, strict=True):
        assert abs(found[name].mean - block) < 5 * found[name].std_error


# ---- what some versions do wrong ----


@pytest.mark.parametrize("unused", [(2, 2), (0, 2), ()])
def test_products_of_which_a_part_is_zero_for_every_v(unused):
    """JAX 0.6 and 0.7 made these zeros under jit, from where they could not come out."""
    params = {"a": {"w": np.ones(3, np.float32)}, "b": {"w": np.ones(unused, np.float32)}}
    loss = lambda p, x: jnp.sum(x @ p["a"]["w"] ** 2) + jnp.sum(p["b"]["w"])
    product = jh.hessian(loss, params, X)
    kept = jh.linearize(product, like=params)
    for v in (params, jax.tree.map(lambda x: 3 * x, params)):
        np.testing.assert_allclose(helpers.ravel(kept(v)), helpers.ravel(product(v)), rtol=1e-6)
    linear = jh.linearize(lambda v: {"twice": 2 * v["a"]["w"], "zero": jnp.zeros(4)}, like=params)
    np.testing.assert_array_equal(linear(params)["twice"], np.full(3, 2))
    np.testing.assert_array_equal(linear(params)["zero"], np.zeros(4))


def test_parameters_that_a_step_overwrites_are_read_anew():
    """jaxlib 0.7.2 to 0.8.1 went on with the matrix that was at their address before, for sizes such as these."""
    params = {"fc1": {"w": helpers.normal(1, 400, 120) / 20}, "fc2": {"w": helpers.normal(2, 120, 10) / 11}}
    batch = {"x": helpers.normal(0, 297, 400), "label": np.arange(297) % 10}
    objective = jh.Objective(lambda p, b: jnp.tanh(b["x"] @ p["fc1"]["w"]) @ p["fc2"]["w"], jh.cross_entropy)
    step = jax.jit(lambda p: jax.tree.map(lambda w: -0.5 * w, p), donate_argnums=0)
    penalty = jax.jit(lambda p: jh.hessian_trace_penalty(objective, p, batch, key=jax.random.key(0))[0])

    def measured(p):
        traces = jh.layer_traces(objective, p, batch, key=jax.random.key(0), num_probes=2, curvature="ggn")
        product = jh.hessian(objective, p, batch)(params)
        return [*(trace.mean for trace in traces.values()), optax.tree.norm(product), penalty(p), objective(p, batch)]

    overwritten, found, copies = jax.tree.map(jnp.array, params), [], []
    for _ in range(3):
        found.append(measured(overwritten))
        copies.append(jax.tree.map(np.array, overwritten))
        overwritten = step(overwritten)
    for one, copy in zip(found, copies, strict=True):  # afterwards: another address would hide it
        np.testing.assert_allclose(one, measured(copy), rtol=1e-3)


@pytest.mark.parametrize(
    ("jaxlib", "before", "after"),
    [
        ("0.7.2", {}, "--xla_cpu_use_xnnpack=false"),
        ("0.8.1", {"XLA_FLAGS": "--xla_a=1"}, "--xla_a=1 --xla_cpu_use_xnnpack=false"),
        ("0.8.0", {"XLA_FLAGS": "--xla_cpu_use_xnnpack=true"}, "--xla_cpu_use_xnnpack=true"),
        ("0.7.1", {}, None),
        ("0.8.2", {"XLA_FLAGS": ""}, ""),
        ("0.10.2", {"XLA_FLAGS": "--xla_a=1"}, "--xla_a=1 --xla_cpu_experimental_ynn_fusion_type="),
        ("0.10.1", {}, None),
    ],
)
def test_a_flag_where_jaxlib_computes_wrongly(jaxlib, before, after, monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    _versions.turn_off_faults(jaxlib, before)
    assert before.get("XLA_FLAGS") == after


def test_it_is_told_where_the_flag_comes_too_late(monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: True)
    environment = {}
    if jax.default_backend() == "cpu":
        with pytest.warns(
            UserWarning, match=r"jaxlib 0\.7\.2 .*import jaxhess before .*XLA_FLAGS=--xla_cpu_use_xnnpack"
        ):
            _versions.turn_off_faults("0.7.2", environment)
    assert not environment


@pytest.mark.parametrize("shape", [(32, 16), (512,)])
def test_products_with_many_vectors_are_those_with_single_ones(shape):
    """In jaxlib 0.10.2 they are not on a CPU, without the flag: half of the largest entry is wrong."""
    weights, x = helpers.normal([11], 24, 20), helpers.normal([12], *shape, 24)
    batch, vectors = {"label": helpers.labels(13, 20, *shape)}, helpers.normal([14], 20, 24, 20)

    def product(v):
        return jax.jvp(jax.grad(lambda w: jh.cross_entropy(x @ w, batch)), (weights,), (v,))[1]

    single = jnp.stack([jax.jit(product)(v) for v in vectors])
    assert helpers.distance(jax.jit(jax.vmap(product))(vectors), single) < 1e-5
    params = {"fc": {"w": weights}}
    objective = jh.Objective(lambda p, b: x @ p["fc"]["w"], jh.cross_entropy)
    few, many = (
        jh.trace(jh.hessian(objective, params, batch), like=params, key=jax.random.key(0), num_probes=32, chunk_size=c)
        for c in (8, 32)
    )
    assert float(many.mean) == pytest.approx(float(few.mean), rel=1e-5)
