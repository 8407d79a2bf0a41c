"""The memory of the penalty's probes, by the compiler's own account, and that they are still the same probes."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh

DEPTH, WIDTH = 8, 16
KEYS = jax.random.split(jax.random.key(0), 4)


def scanned(params, batch):
    """Residual blocks in a scan: what they keep for the backward pass is most of the memory."""

    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T) + x, None

    return jax.lax.scan(block, batch["x"], params["blocks"]["w"])[0] @ params["out"]["w"]


def convolutions(params, batch):
    x = batch["x"]
    for layer in ("conv1", "conv2", "conv3"):
        x = jnp.tanh(jax.lax.conv_general_dilated(x, params[layer]["w"], (1, 1), "SAME"))
    return x.mean((2, 3)) @ params["out"]["w"]


def net(kind):
    label = helpers.labels(1, 4, 512)
    if kind == "scan":
        w = jax.random.normal(KEYS[0], (DEPTH, WIDTH, WIDTH)) / 4
        params = {"blocks": {"w": w}, "out": {"w": jax.random.normal(KEYS[1], (WIDTH, 4))}}
        batch = {"x": jax.random.normal(KEYS[2], (512, WIDTH)), "label": label}
        return jh.Objective(scanned, jh.cross_entropy), params, batch
    shapes = {"conv1": (8, 1, 3, 3), "conv2": (8, 8, 3, 3), "conv3": (8, 8, 3, 3)}
    params = {name: {"w": jax.random.normal(KEYS[0], shape) / 4} for name, shape in shapes.items()}
    params["out"] = {"w": jax.random.normal(KEYS[1], (8, 4))}
    batch = {"x": jax.random.normal(KEYS[2], (32, 1, 16, 16)), "label": label[:32]}
    return jh.Objective(convolutions, jh.cross_entropy), params, batch


def temporary_bytes(kind, curvature, num_probes):
    objective, params, batch = net(kind)
    penalty = functools.partial(jh.hessian_trace_penalty, objective, num_probes=num_probes, curvature=curvature)
    lowered = jax.jit(lambda params, batch, key: penalty(params, batch, key=key)).lower(params, batch, KEYS[3])
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("kind", ["scan", "convolutions"])
def test_eight_probes_take_the_memory_of_one(kind, curvature):
    assert temporary_bytes(kind, curvature, 8) <= 1.5 * temporary_bytes(kind, curvature, 1)


@pytest.mark.parametrize("num_probes", [3, 16, 40])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_many_probes_are_the_mean_of_single_ones(curvature, num_probes):
    """Chained, chained in groups of several (with one left over), and in a loop: each the same mean."""
    p, key = problem("mlp"), jax.random.key(3)
    single = jax.vmap(lambda k: jh.hessian_trace_penalty(p.objective, p.params, p.batch, key=k, curvature=curvature))
    expected = jax.tree.map(lambda x: x.mean(0), single(jax.random.split(key, num_probes)))
    in_loop = jh.Objective(through_a_loop, jh.cross_entropy)
    for objective in (p.objective, in_loop):
        found = jh.hessian_trace_penalty(
            objective, p.params, p.batch, key=key, curvature=curvature, num_probes=num_probes
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def through_a_loop(params, batch):
    """The same net with its last layer in a scan of one step."""

    def last(x, layer):
        return x, helpers.affine(layer, x)

    hidden = jnp.tanh(helpers.affine(params["fc1"], batch["x"]))
    return jax.lax.scan(last, hidden, jax.tree.map(lambda x: x[None], params["fc2"]))[1][0]


def test_raw_keys_are_chained_too():
    p = problem("mlp")
    for key in (jax.random.PRNGKey(3), jax.random.key(3)):
        found = jh.hessian_trace_penalty(p.objective, p.params, p.batch, key=key, num_probes=3)
        assert np.isfinite(found[0])
