"""Digits of nets that are sure of their answers: products and eigenvalues against float64, as the loss vanishes."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, Problem, problem

import jaxhess as jh

LOSSES = [1e-1, 1e-3, 1e-5, 1e-8]


def sure_net(loss):
    """A small tanh net whose last layer is scaled until its loss, with its own answers for labels, is what is asked."""
    params = helpers.dense_layers([5, 8, 4], seed=3)
    params["fc2"]["b"][:] = 0
    x = helpers.normal(1, 12, 5)
    outputs = helpers.mlp(params, {"x": x})
    batch = {"x": x, "label": np.argmax(outputs, -1).astype(np.int32)}
    sure = np.sort(outputs, -1)
    keep = np.argsort(sure[:, -1] - sure[:, -2])[-8:]  # of the closest calls no scale makes a small loss
    batch = jax.tree.map(lambda a: a[keep], batch)

    def scaled(factor):
        return params | {"fc2": {"w": np.float32(factor) * params["fc2"]["w"], "b": params["fc2"]["b"]}}

    low, high = 1e-3, 1e4
    for _ in range(60):
        middle = (low * high) ** 0.5
        p = float(jh.cross_entropy(helpers.mlp(scaled(middle), batch), batch))
        low, high = (middle, high) if p > loss else (low, middle)
    return Problem(jh.Objective(helpers.mlp, jh.cross_entropy), scaled(low), batch)


def confidently_wrong(loss):
    """The same with labels that are not the net's: the slopes are large, and S vanishes all the same."""
    p = sure_net(loss)
    return dataclasses.replace(p, batch=p.batch | {"label": (p.batch["label"] + 1) % 4})


def exact_loss(params, batch):
    """The same loss by the logits' distances to the label's, for float64."""
    outputs = helpers.mlp(params, batch)
    label = jax.nn.one_hot(batch["label"], outputs.shape[-1], dtype=bool)
    rest = outputs - jnp.where(label, outputs, 0).sum(-1, keepdims=True)
    return jnp.log1p(jnp.where(label, 0, jnp.exp(rest)).sum(-1)).mean()


@pytest.mark.parametrize("make", [sure_net, confidently_wrong])
@pytest.mark.parametrize("loss", LOSSES)
def test_products_keep_their_digits_as_the_loss_vanishes(make, loss):
    p = make(loss)
    value = float(jh.cross_entropy(helpers.mlp(p.params, p.batch), p.batch))
    if make is sure_net:
        assert loss / 2 < value < 2 * loss
    for kind in KINDS:
        exact = helpers.dense(p, kind)
        norm = np.linalg.norm(exact, 2)
        error = np.linalg.norm(helpers.matrix(p.operator(kind), p.params) - exact, 2)
        assert error < 1e-4 * norm, kind


@pytest.mark.parametrize("loss", LOSSES)
def test_eigenvalues_lie_within_their_residuals_as_the_loss_vanishes(loss):
    p = sure_net(loss)
    for seed in range(3):
        key = jax.random.key(seed)
        hess = np.linalg.eigvalsh(helpers.dense(p, "hessian"))
        found = jh.spectrum(p.operator("hessian"), like=p.params, key=key, num_steps=84)
        assert np.all(np.abs(found.nodes - hess) <= found.residuals)
        assert found.residuals.max() < 1e-3 * hess[-1]  # and says something
        values, _, residuals = jh.top_eigenpairs(p.operator("hessian"), like=p.params, key=key, k=2)
        assert np.all(np.abs(values - hess[::-1][:2]) <= residuals)
    spectra = jh.layer_spectra(p.objective, p.params, p.batch, key=key, curvature="ggn", method="gram")
    for layer, found in spectra.items():
        exact = np.linalg.eigvalsh(helpers.dense(p, "ggn", None if layer == "total" else layer))
        assert abs(found.lambda_max - exact[-1]) <= found.residuals[-1]


def test_the_truth_of_these_tests_is_itself_exact(x64):
    """float64 loses its digits too, but 1e9 times later: the oracle against the loss by distances."""
    p = sure_net(1e-8).cast(jnp.float64)
    flat, unravel = jax.flatten_util.ravel_pytree(p.params)
    exact = jax.jit(jax.hessian(lambda w, batch: exact_loss(unravel(w), batch)))(flat, p.batch)
    assert helpers.distance(helpers.dense(sure_net(1e-8), "hessian"), np.asarray(exact)) < 1e-6


def test_the_slope_at_the_label_is_minus_the_sum_of_the_others():
    outputs, batch = jnp.array([[14.0, 0.0, 1.0]]), {"label": jnp.array([0])}
    others = np.exp([-14.0, -13.0])
    others /= 1 + others.sum()
    np.testing.assert_allclose(jax.grad(jh.cross_entropy)(outputs, batch)[0], [-others.sum(), *others], rtol=1e-6)
    np.testing.assert_allclose(jh.cross_entropy(outputs, batch), -np.log1p(-others.sum()), rtol=1e-6)


def test_one_class_has_no_curvature():
    outputs, batch = jnp.array([[3.0], [-2.0]]), {"label": jnp.array([0, 0])}
    assert jh.cross_entropy(outputs, batch) == 0
    for form in (jh.cross_entropy.hessian_product, jh.cross_entropy.factor_product):
        np.testing.assert_array_equal(form(outputs, batch, outputs), 0)
    np.testing.assert_array_equal(jax.hessian(jh.cross_entropy)(outputs, batch), 0)


def test_the_penalty_of_a_sure_net_keeps_its_digits():
    """The third derivative too: the gradient of Tr G and Tr Hess against float64, by the same probes."""
    p = sure_net(1e-6)
    for curvature in ("hessian", "ggn"):
        options = dict(key=jax.random.key(1), curvature=curvature, num_probes=2)
        low = jh.hessian_trace_penalty(p.objective, p.params, p.batch, **options)
        with jax.enable_x64(True):
            q = p.cast(jnp.float64)
            signs = jh.hessian_trace_penalty(q.objective, q.params, q.batch, **options)
        assert abs(float(low[0]) / float(signs[0]) - 1) < 1e-3
        assert helpers.distance(helpers.ravel(low[1]), helpers.ravel(signs[1])) < 1e-3


@pytest.mark.slow
def test_lenet_trained_to_saturation_on_digits_keeps_its_digits():
    """Products with a random vector and the top eigenvector: scikit-learn's digits, until the loss is below 1e-7."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.pad(np.repeat(np.repeat(digits.images[:40] / 16, 3, 1), 3, 2), ((0, 0), (2, 2), (2, 2)))
    # Equal pixels would tie in the max pooling, and the two precisions break ties differently.
    batch = {"x": images[:, None].astype(np.float32) + helpers.normal(8, 40, 1, 28, 28, scale=0.1)}
    batch["label"] = digits.target[:40].astype(np.int32)
    p = dataclasses.replace(problem("lenet"), batch=batch)
    tx, params = optax.adam(1e-3), p.params
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(p.objective)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    reached = []
    for threshold in (1e-2, 1e-5, 1e-7):
        for _ in range(20000):
            params, state, loss = step(params, state)
            if loss < threshold:
                break
        reached.append(float(loss))
        here = dataclasses.replace(p, params=jax.tree.map(np.asarray, params))
        hv = here.operator("hessian")
        value, top, _ = jh.top_eigenpairs(hv, like=here.params, key=jax.random.key(0), k=1, num_steps=20)
        v = jax.tree.map(lambda x: helpers.normal(5, *x.shape), here.params)
        for w in (v, jax.tree.map(lambda x: np.asarray(x[0]), top)):
            size = value[0] * np.linalg.norm(helpers.ravel(w))
            for kind in KINDS:
                low = helpers.ravel(here.operator(kind)(w))
                with jax.enable_x64(True):
                    exact = helpers.ravel(here.cast(jnp.float64).operator(kind)(helpers.cast(w, jnp.float64)))
                assert np.linalg.norm(low - exact) < 1e-4 * size, (kind, reached)
    assert reached[-1] < 1e-7
