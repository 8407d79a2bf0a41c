"""The recipes run as they stand against the published libraries, and their penalties are those of plain pytrees."""

import contextlib
import importlib.metadata
import io
import pathlib
import re
import tempfile
import warnings

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhess as jh

FLAX = tuple(map(int, importlib.metadata.version("flax").split(".")[:2]))
RECIPES = {path.stem: path for path in (pathlib.Path(__file__).parent.parent / "docs" / "recipes").glob("*.md")}


def run(name):
    """The names that a recipe's code leaves, and what it printed."""
    blocks = re.findall(r"^```python\n(.*?)^```", RECIPES[name].read_text(), re.DOTALL | re.MULTILINE)
    names, printed = {"__name__": name}, io.StringIO()
    # The tests' ban on rank promotion, and on warnings of other libraries, is no rule for the reader.
    with (
        contextlib.redirect_stdout(printed),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as folder,  # for the files that a recipe writes
        contextlib.chdir(folder),
    ):
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, str(RECIPES[name]), "exec"), names)
    return names, printed.getvalue()


def plain(layers, act=jnp.tanh):
    """A net of dense layers [(kernel, bias), ...] on plain pytrees."""
    params = {f"fc{i}": {"kernel": k, "bias": b} for i, (k, b) in enumerate(layers, 1)}

    def predict(params, batch):
        x = batch["x"]
        for i in range(1, len(params) + 1):
            x = x @ params[f"fc{i}"]["kernel"] + params[f"fc{i}"]["bias"][None]
            x = act(x) if i < len(params) else x
        return x

    return jh.Objective(predict, jh.cross_entropy), params


def penalties(objective, params, batch):
    # The GGN form's probes are drawn over the outputs, and do not depend on how the parameters are laid out.
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jh.hessian_trace_penalty(objective, params, batch, key=jax.random.key(9), curvature="ggn")


def assert_same_penalty(names, objective, params, pick):
    """``pick(gradient)`` brings the recipe's gradient into the order of the plain one's leaves."""
    batch = {key: names["batch"][key] for key in ("x", "label")}
    value, gradient = penalties(names["objective"], names["params"], names["batch"])
    expected, plain_gradient = penalties(objective, params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for layer, found in pick(gradient).items():
        for part, array in found.items():
            np.testing.assert_allclose(array, plain_gradient[layer][part], rtol=1e-3, atol=1e-6)


def test_equinox():
    names, printed = run("equinox")
    params = names["params"]
    objective, other = plain([(layer.weight.T, layer.bias) for layer in (params.fc1, params.fc2)])

    def pick(g):
        return {n: {"kernel": getattr(g, n).weight.T, "bias": getattr(g, n).bias} for n in ("fc1", "fc2")}

    assert_same_penalty(names, objective, other, pick)
    assert jh.layer_names(params) == ["fc1", "fc2"] and "fc2" in printed


def test_haiku():
    names, printed = run("haiku")
    names["params"] = names["net"].init(names["keys"][2], names["batch"]["x"])
    params = names["params"]
    objective, other = plain([(params[layer]["w"], params[layer]["b"]) for layer in ("fc1", "fc2")])
    assert_same_penalty(
        names, objective, other, lambda g: {n: {"kernel": g[n]["w"], "bias": g[n]["b"]} for n in ("fc1", "fc2")}
    )
    assert "batch_norm" in printed and "total" in printed


def test_flax_linen():
    names, printed = run("flax_linen")
    params, statistics = names["variables"]["params"], names["variables"]["batch_stats"]["norm"]
    names["params"], names["batch"] = params, names["measured"]

    def predict(p, batch):
        x = batch["x"] @ p["fc1"]["kernel"] + p["fc1"]["bias"][None]
        x = (x - statistics["mean"][None]) / jnp.sqrt(statistics["var"][None] + 1e-5)
        x = jnp.tanh(x * p["norm"]["scale"][None] + p["norm"]["bias"][None])
        return x @ p["fc2"]["kernel"] + p["fc2"]["bias"][None]

    assert_same_penalty(names, jh.Objective(predict, jh.cross_entropy), params, dict)
    table, penalty = printed.rsplit("\n", 2)[:2]
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["fc1", "norm", "fc2"]
    state = names["state"]
    assert state.step == state.opt_state[0].count == 4 and float(penalty) > 0
    assert not np.array_equal(state.batch_stats["norm"]["mean"], statistics["mean"])


@pytest.mark.skipif(FLAX < (0, 11), reason="nnx.merge has no copy= before Flax 0.11")
def test_flax_nnx():
    names, printed = run("flax_nnx")
    params, rest, names["batch"] = names["params"], names["rest"], names["measured"]
    norm = params["norm"]
    statistics = rest["norm"]

    def predict(p, batch):
        x = batch["x"] @ p["fc1"]["kernel"] + p["fc1"]["bias"][None]
        x = (x - statistics["mean"][...][None]) / jnp.sqrt(statistics["var"][...][None] + 1e-5)
        x = jnp.tanh(x * p["norm"]["scale"][None] + p["norm"]["bias"][None])
        return x @ p["fc2"]["kernel"] + p["fc2"]["bias"][None]

    def arrays(state):
        dense = {n: {part: state[n][part][...] for part in ("kernel", "bias")} for n in ("fc1", "fc2")}
        return dense | {"norm": {part: state["norm"][part][...] for part in ("scale", "bias")}}

    assert norm is not None and jh.layer_names(params) == ["fc1", "fc2", "norm"]
    assert_same_penalty(names, jh.Objective(predict, jh.cross_entropy), arrays(params), arrays)
    # What was trained is in the module again.
    np.testing.assert_array_equal(names["net"].fc1.kernel[...], params["fc1"]["kernel"][...])


@pytest.mark.skipif(FLAX < (0, 11), reason="nnx.merge has no copy= before Flax 0.11")
def test_the_nnx_optimizer_takes_the_step_of_plain_optax():
    names, _ = run("flax_nnx")
    nnx, objective, batch = names["nnx"], names["objective"], names["batch"]
    tx = optax.chain(jh.add_hessian_trace(objective, 0.5, key=jax.random.key(4)), optax.sgd(0.1))

    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = names["Net"](nnx.Rngs(1))
        net.eval()
        _, params, rest = nnx.split(net, nnx.Param, ...)
        measured = batch | {"rest": rest}
        grads = jax.grad(objective)(params, measured)
        updates, state = tx.update(grads, tx.init(params), params, batch=measured)
        expected = optax.apply_updates(params, updates)
        without = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))

        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
        optimizer.update(net, grads, batch=measured)
    found = nnx.state(net, nnx.Param)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimizer.opt_state[0].penalty[...], state[0].penalty, rtol=1e-5)
    # The penalty is part of the step.
    assert not np.allclose(found["fc1"]["kernel"][...], without["fc1"]["kernel"][...], atol=1e-4)


def test_transformer():
    names, printed = run("transformer")
    layers, depth = names["names"], names["DEPTH"]
    assert layers[0] == "embed" and layers[-1] == "norm" and "blocks[3]/attention/out" in layers
    order = [layers.index(f"blocks[{i}]/up") for i in range(depth)]
    assert order == sorted(order) and len(layers) == 3 + 8 * depth
    assert "% of Tr G" in printed
    # A slice of a scanned array has the trace that it has as a layer: that of the block, from the whole product.
    objective, params, batch = names["objective"], names["params"], names["batch"]
    with jax.numpy_rank_promotion("allow"):
        block = jh.ggn(objective, params, batch, layer="blocks[1]/norm1")
        exact = np.trace(helpers.matrix(block, jh.subtree(params, "blocks[1]/norm1")))
        estimates = jh.layer_traces(objective, params, batch, key=jax.random.key(0), num_probes=256, curvature="ggn")
    estimate = estimates["blocks[1]/norm1"]
    assert abs(estimate.mean - exact) < 5 * estimate.std_error


@pytest.mark.slow
def test_the_sharpness_that_is_followed():
    names, printed = run("sharpness")
    with jax.numpy_rank_promotion("allow"):
        flat, unravel = jax.flatten_util.ravel_pytree(names["trained"])
        dense = jax.hessian(lambda w: names["objective"](unravel(w), names["batch"]))(flat)
        scale = jh.preconditioner(names["opt_state"])
    root = np.asarray(jax.flatten_util.ravel_pytree(scale)[0], np.float64) ** -0.5
    true = np.linalg.eigvalsh(root[:, None] * np.asarray(dense, np.float64) * root)[::-1][:2]
    np.testing.assert_allclose(names["values"], true, rtol=1e-3)
    np.testing.assert_allclose(names["again"], true, rtol=1e-2)
    records = [line for line in printed.splitlines() if " of 4.0 " in line]
    assert len(records) == 4 and records[0].startswith("0 ")


@pytest.mark.parametrize("name", ["vit", "frozen", "accumulation"])
def test_it_runs(name):
    names, printed = run(name)
    assert printed
    if name == "accumulation":
        assert "float32 bfloat16" in printed


def test_every_recipe_is_tested_and_listed():
    tested = {"equinox", "haiku", "flax_linen", "flax_nnx", "transformer", "vit", "frozen", "accumulation", "sharpness"}
    elsewhere = {"transformer_nnx", "transformer_equinox", "lora", "moe", "quantise"}  # in test_transformer_recipes
    assert set(RECIPES) == tested | elsewhere
