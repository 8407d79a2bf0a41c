"""The penalty: its value is unbiased for the traces, and its gradient is the derivative of its value."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import problem

import jaxhess as jh
from jaxhess import _trees

NETS = {"mlp": "fc1", "conv, batch norm": "norm", "lenet": "conv2"}
FORMS = ["hessian", "ggn"]
KEY = jax.random.key(5)


def selection(net, kind):
    return [NETS[net]] if kind == "named" else kind


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _penalty(objective, params, batch, key, layers, curvature, num_probes):
    layers = dict(layers) if layers and isinstance(layers[0], tuple) else layers
    return jh.hessian_trace_penalty(
        objective, params, batch, key=key, layers=layers, curvature=curvature, num_probes=num_probes
    )


def penalty(p, layers="all", curvature="hessian", key=KEY, num_probes=1, params=None):
    layers = tuple(layers.items()) if isinstance(layers, dict) else layers
    layers = tuple(layers) if isinstance(layers, list) else layers
    params = p.params if params is None else params
    return _penalty(p.objective, params, p.batch, key, layers, curvature, num_probes)


# ---- the gradient ----


@pytest.mark.parametrize("curvature", FORMS)
@pytest.mark.parametrize("layers", ["all", "middle", "named"])
@pytest.mark.parametrize("net", NETS)
def test_gradient_equals_central_differences(x64, net, layers, curvature):
    p = problem(net).cast(jnp.float64)
    layers = selection(net, layers)
    _, gradient = penalty(p, layers, curvature)
    count = len(helpers.ravel(p.params))
    direction = helpers.unravel(np.random.default_rng(0).standard_normal(count) / 10, p.params)
    size = 1e-4 if net != "lenet" else 1e-6  # LeNet has kinks, and they must not be crossed

    def at(t):
        return float(penalty(p, layers, curvature, params=optax.tree.add_scale(p.params, t, direction))[0])

    # Richardson's combination of two central differences: an error of fourth order.
    slopes = [(at(h) - at(-h)) / (2 * h) for h in (size, 2 * size)]
    expected = (4 * slopes[0] - slopes[1]) / 3
    scale = np.linalg.norm(helpers.ravel(gradient)) * np.linalg.norm(helpers.ravel(direction))
    assert abs(float(optax.tree.vdot(gradient, direction)) - expected) < 1e-6 * max(abs(expected), 1e-2 * scale)


@pytest.mark.parametrize("curvature", FORMS)
@pytest.mark.parametrize("layers", ["all", "middle", "named"])
@pytest.mark.parametrize("net", NETS)
def test_gradient_equals_nested_autodiff(net, layers, curvature):
    # The value is a function of the parameters like any other: reverse mode through it is the naive way.
    p, layers = problem(net), selection(net, layers)
    value, gradient = penalty(p, layers, curvature)
    same, expected = jax.value_and_grad(lambda params: penalty(p, layers, curvature, params=params)[0])(p.params)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    assert helpers.distance(helpers.ravel(gradient), helpers.ravel(expected)) < 1e-5


def test_on_a_cubic_it_is_exact():
    # sum_i a_i x_i^3 has the diagonal Hessian 6 a x, and every Rademacher probe sees its trace.
    a, x = np.array([1.0, -2.0, 0.5], np.float32), np.array([0.3, 1.0, -2.0], np.float32)
    value, gradient = jh.hessian_trace_penalty(lambda p, b: jnp.sum(b * p["w"] ** 3), {"w": x}, a, key=KEY)
    np.testing.assert_allclose(value, 6 * a @ x, rtol=1e-6)
    np.testing.assert_allclose(gradient["w"], 6 * a, rtol=1e-6)


# ---- the value ----


@pytest.mark.parametrize("num_probes", [3, _trees.UNROLLED + 1])
@pytest.mark.parametrize("curvature", FORMS)
def test_of_many_probes_it_is_the_mean(curvature, num_probes):
    p = problem("mlp")
    value, gradient = penalty(p, curvature=curvature, num_probes=num_probes)
    alone = [penalty(p, curvature=curvature, key=key) for key in jax.random.split(KEY, num_probes)]
    np.testing.assert_allclose(value, np.mean([v for v, _ in alone]), rtol=1e-5)
    assert helpers.distance(helpers.ravel(gradient), np.mean([helpers.ravel(g) for _, g in alone], 0)) < 1e-5


@pytest.mark.parametrize("curvature", FORMS)
@pytest.mark.parametrize("net", ["mlp", "batch norm", "mlp, squared error", "mlp, own criterion", "sequence"])
def test_value_is_unbiased(net, curvature):
    p = problem(net)
    weights = {"fc1": 2.0, "fc2": 0.5}
    expected = sum(w * np.trace(helpers.dense(p, curvature, name)) for name, w in weights.items())
    keys = jax.random.split(KEY, 64)
    values = np.array([penalty(p, weights, curvature, key=key, num_probes=8)[0] for key in keys])
    assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / 8


def test_forms_agree_in_the_mean_on_a_piecewise_linear_net():
    p = problem("lenet")
    found = {}
    for curvature in FORMS:
        samples = [helpers.ravel(penalty(p, ["fc3"], curvature, key=k)[1]) for k in jax.random.split(KEY, 200)]
        found[curvature] = np.mean(samples, 0), np.std(samples, 0) / 200**0.5
    (a, da), (b, db) = found.values()
    z = (a - b) / np.sqrt(da**2 + db**2 + 1e-12)
    assert abs(a).max() > 1e-3 and np.abs(z).mean() < 1.1


def test_traced_weights_are_named():
    p = problem("mlp")
    with pytest.raises(TypeError, match="vary gamma"):
        jax.jit(lambda w: jh.hessian_trace_penalty(p.objective, p.params, p.batch, key=KEY, layers={"fc1": w}))(0.5)


def test_weights_scale_and_zero_weights_switch_off():
    p = problem("mlp")
    once, twice = (penalty(p, {"fc1": w})[0] for w in (1.0, 2.0))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    np.testing.assert_allclose(penalty(p, {"fc1": 1.0, "fc2": 0.0})[0], once, rtol=1e-5)
    np.testing.assert_allclose(penalty(p, ["fc1"])[0], once, rtol=1e-5)


def test_slices_of_scanned_layers():
    params = {"blocks": {"w": helpers.normal(0, 3, 2, 2)}}

    def loss(params, x):
        return jnp.sum(jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"]), None), x, params["blocks"])[0] ** 2)

    x = helpers.normal(1, 4, 2)
    value, gradient = jh.hessian_trace_penalty(loss, params, x, key=KEY, layers=["blocks[1]"], num_probes=256)
    flat = jax.hessian(lambda w: loss({"blocks": {"w": params["blocks"]["w"].at[1].set(w)}}, x))
    params = jax.tree.map(jnp.asarray, params)
    expected = np.trace(np.asarray(flat(params["blocks"]["w"][1])).reshape(4, 4))
    np.testing.assert_allclose(value, expected, rtol=0.2)
    assert np.abs(gradient["blocks"]["w"][0]).max() > 0  # the trace of one layer depends on the others


def test_half_precision_is_computed_in_float32():
    p = problem("mlp")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), p.params)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    (value, gradient), (same, expected) = (penalty(p, params=params) for params in (half, exact))
    assert value.dtype == jnp.float32 and value == same
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        helpers.ravel(gradient), helpers.ravel(jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))
    )


def test_an_underflowing_probability_leaves_the_gradient_finite():
    objective = jh.Objective(lambda params, batch: batch["x"] @ params["w"], jh.cross_entropy)
    params = {"w": 1e3 * jnp.eye(3)}
    batch = {"x": jnp.eye(3), "label": jnp.arange(3)}
    value, gradient = jh.hessian_trace_penalty(objective, params, batch, key=KEY, curvature="ggn")
    assert np.isfinite(value) and np.isfinite(gradient["w"]).all()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["conv9"]}, r"conv9.*\['fc1', 'fc2'\]"),
        ({"layers": []}, "selects no layer"),
        ({"layers": "fc9"}, r"'fc9'; the layers are \['fc1', 'fc2'\]"),
        ({"layers": {"fc1": -1.0}}, "not negative.*fc1"),
        ({"layers": {"fc1": float("nan")}}, "finite.*fc1"),
        ({"layers": {"fc1": 0.0}}, "all layers are zero"),
        ({"layers": {"fc1": 1j}}, "finite.*fc1.*1j"),
        ({"num_probes": 0}, "num_probes.*at least 1.*0"),
        ({"curvature": "functional"}, "'hessian' or 'ggn'.*functional"),
        ({"probe": "uniform"}, "unknown probe 'uniform'"),
    ],
)
def test_bad_arguments(options, message):
    p = problem("mlp")
    with pytest.raises(ValueError, match=message):
        jh.hessian_trace_penalty(p.objective, p.params, p.batch, key=KEY, **options)


def test_a_loss_that_ignores_the_parameters():
    with pytest.raises(ValueError, match="does not use the parameters"):
        jh.hessian_trace_penalty(lambda p, batch: jnp.sum(batch**2), {"w": jnp.ones(2)}, jnp.ones(2), key=KEY)

    with pytest.raises(ValueError, match="does not use the parameters"):
        jh.hessian_trace_penalty(lambda p, batch: jnp.float32(1.0), {"w": jnp.ones(2)}, jnp.ones(2), key=KEY)
    params = {"used": {"w": jnp.ones(2)}, "aux": {"w": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"none of the layers \['aux'\]"):
        jh.hessian_trace_penalty(lambda p, b: jnp.sum(p["used"]["w"] ** 3), params, None, key=KEY, layers=["aux"])


@pytest.mark.parametrize("names", [["blocks", "blocks[0]"], ["blocks[0]", "blocks"]])
def test_a_layer_and_its_slices_are_not_both_selected(names):
    def loss(params, batch):
        return jax.lax.scan(lambda h, w: (h + jnp.sum(w**3), None), 0.0, params["blocks"]["w"])[0]

    params = {"blocks": {"w": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match="overlap at"):
        jh.hessian_trace_penalty(loss, params, None, key=KEY, layers=names)
    value, _ = jh.hessian_trace_penalty(loss, params, None, key=KEY, layers={"blocks[0]": 1.0, "blocks[2]": 2.0})
    assert value == pytest.approx(36.0)


def test_many_batches_are_refused():
    with pytest.raises(TypeError, match="one batch, not Batches"):
        jh.hessian_trace_penalty(lambda p, b: jnp.sum(p**3), jnp.ones(2), jh.Batches([jnp.ones(1)]), key=KEY)


def test_ggn_of_a_plain_loss():
    with pytest.raises(TypeError, match="Objective"):
        jh.hessian_trace_penalty(lambda p, b: jnp.sum(p["w"] ** 2), {"w": jnp.ones(2)}, None, key=KEY, curvature="ggn")
