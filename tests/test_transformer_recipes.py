"""The recipes for transformers run as they stand, and their traces are those of dense matrices in float64."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from test_recipes import FLAX, run

import jaxhess as jh


@functools.cache
def recipe(name):
    return run(name)


def dense_ggn(names, params="params", objective="objective"):
    """(G, its blocks by layer or array) in float64, J' S J with S by its formula in numpy."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        tree, batch = helpers.cast(names[params], jnp.float64), helpers.cast(names["batch"], jnp.float64)
        flat, unravel = ravel_pytree(tree)

        def predict(w):
            outputs = names[objective].predict(unravel(w), batch)
            return outputs.reshape(-1, outputs.shape[-1])

        p = helpers.softmax(np.asarray(jax.jit(predict)(flat)))
        slopes = np.asarray(jax.jit(jax.jacrev(predict))(flat))
    return ggn(p, slopes)


def ggn(p, slopes):
    """J' S J / N of cross-entropy from probabilities (N, C) and slopes (N, C, P)."""
    half = p[..., None] * (slopes - np.einsum("nc,ncp->np", p, slopes)[:, None])
    return np.einsum("ncp,ncq->pq", slopes, half) / len(p)


def where(tree, *paths):
    return np.concatenate([helpers.positions(tree, path) for path in paths])


def close(estimate, exact):
    return abs(float(estimate.mean) - exact) <= 5 * float(estimate.std_error) + 1e-4 * abs(exact) + 1e-7


@pytest.mark.skipif(FLAX < (0, 11), reason="nnx.merge has no copy= before Flax 0.11")
def test_nnx():
    check_scanned("transformer_nnx")


def test_equinox():
    check_scanned("transformer_equinox")


def check_scanned(name):
    names, printed = recipe(name)
    depth = names["DEPTH"]
    layers = names["names"]
    assert layers[0] == "embed" and "blocks[2]/down" in layers
    per_block = [[x for x in layers if x.startswith(f"blocks[{i}]/")] for i in range(depth)]
    assert len({len(block) for block in per_block}) == 1 and len(per_block[0]) == 8
    traces = names["traces"]
    assert all(float(traces[f"block {i}"].mean) > 0 for i in range(depth)) and "MLP" in printed
    # Slice 1 of the stacked arrays of norm1, by the Jacobian in these entries alone.
    objective, params, batch = names["objective"], names["params"], names["batch"]
    with jax.numpy_rank_promotion("allow"):
        estimates = jh.layer_traces(
            objective, params, batch, key=jax.random.key(0), num_probes=64, curvature="ggn", method="hutchinson"
        )
        assert close(estimates["blocks[1]/norm1"], slice_trace(objective, params, batch))


def slice_trace(objective, params, batch):
    """Tr G of slice 1 of the arrays of norm1."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    at = [i for i, (path, _) in enumerate(paths) if "norm1" in jax.tree_util.keystr(path)]

    @jax.jit
    def outputs_and_slopes(w):
        def predict(w):
            moved = [leaf.at[1].set(w[at.index(i)]) if i in at else leaf for i, leaf in enumerate(leaves)]
            outputs = objective.predict(jax.tree_util.tree_unflatten(treedef, moved), batch)
            return outputs.reshape(-1, outputs.shape[-1])

        return predict(w), jax.jacfwd(predict)(w)

    outputs, slopes = outputs_and_slopes([leaves[i][1] for i in at])
    slopes = np.concatenate([np.asarray(x, np.float64) for x in slopes], -1)
    p = helpers.softmax(np.asarray(outputs, np.float64))
    return ggn(p, slopes).trace()


def test_lora_against_the_dense_matrix():
    names, printed = recipe("lora")
    adapters, traces = names["adapters"], names["traces"]
    matrix = dense_ggn(names, "adapters")
    for path in ("query/A", "query/B", "value/A", "value/B"):
        exact = np.diag(matrix)[where(adapters, path)].sum()
        assert close(traces[path], exact), path
        assert (exact == 0) == path.endswith("A")
    assert close(traces["total"], np.trace(matrix))
    # The chain rule: G of B is that of the layer between A and itself, for dW = A dB.
    names["layer"] = {"value": names["base"]["value"]}
    names["whole_layer"] = jh.Objective(names["predict_layer"], jh.cross_entropy)
    inner = dense_ggn(names, "layer", "whole_layer")
    lift = np.kron(np.asarray(adapters["value"]["A"], np.float64), np.eye(8))
    at = where(adapters, "value/B")
    np.testing.assert_allclose(matrix[np.ix_(at, at)], lift.T @ inner @ lift, rtol=1e-6, atol=1e-12)
    assert "of all weights" in printed


def test_experts_against_the_dense_matrix():
    names, printed = recipe("moe")
    params, traces, experts = names["params"], names["traces"], names["EXPERTS"]
    matrix = dense_ggn(names)
    places = [
        np.concatenate([where(params, f"experts/{leaf}").reshape(experts, -1)[i] for leaf in ("down", "up")])
        for i in range(experts)
    ]
    exact = [np.diag(matrix)[at].sum() for at in places]
    for i, trace in enumerate(exact):
        assert close(traces[f"expert {i}"], trace)
        assert (trace > 0) == (names["loads"][i] > 0)
    assert close(traces["experts"], sum(exact))
    for layer in ("router", "head"):
        assert close(traces[layer], np.diag(matrix)[where(params, layer)].sum())
    norms = np.array([[np.sum(matrix[np.ix_(a, b)] ** 2) for b in places] for a in places])
    np.testing.assert_allclose(names["found"].norms, norms, rtol=1e-3, atol=1e-6 * norms.max())
    assert names["found"].off_diagonal_share == pytest.approx(0, abs=1e-9) and "share of" in printed


def test_what_rounding_does_to_the_loss_is_predicted():
    names, printed = recipe("quantise")
    params, changes = names["params"], names["changes"]
    matrix = dense_ggn(names)
    flat = np.stack([helpers.ravel(change) for change in changes]).astype(np.float64)
    np.testing.assert_allclose(names["form"], flat @ matrix @ flat.T, rtol=1e-3, atol=1e-7)
    for i in range(len(changes)):
        kernel = np.asarray(params[names["names"][i]]["kernel"] + changes[i][names["names"][i]]["kernel"])
        assert len(np.unique(np.round(kernel / np.abs(kernel).max() * 15, 3))) <= 31
    with jax.numpy_rank_promotion("allow"):
        predicted, measured = ([f([i]) for i in range(len(changes))] for f in (names["predicted"], names["measured"]))
    np.testing.assert_allclose(predicted, measured, atol=0.5 * np.abs(measured).max())
    assert "the first two" in printed
