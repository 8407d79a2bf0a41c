"""Exact eigenvalues of G from its Gram matrix, against dense matrices."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import problem

import jaxhess as jh

NETS = [
    "softmax regression",
    "linear regression",
    "mlp",
    "mlp, squared error",
    "mlp, own criterion",
    "sequence",
    "batch norm",
    "batch statistics and dropout",
]


def nonzero_eigenvalues(matrix, tolerance=1e-9):
    values = np.linalg.eigvalsh(matrix)[::-1]
    return values[values > tolerance * values[0]]


def assert_exact(p, layer=None, **options):
    double = p.cast(jnp.float64)
    found = jh.ggn_eigenvalues(p.objective, double.params, double.batch, layer=layer, **options)
    exact = nonzero_eigenvalues(helpers.dense(p, "ggn", layer))
    assert found.shape == exact.shape and found.dtype == np.float64
    np.testing.assert_allclose(found, exact, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", NETS)
def test_the_whole_net(name, x64):
    """Batch norm in training mode too, where an example's outputs depend on all examples."""
    assert_exact(problem(name))


@pytest.mark.parametrize(
    ("name", "layer"), [("mlp", "fc1"), ("mlp", "fc2"), ("sequence", "fc1"), ("batch norm", "norm")]
)
def test_a_layer(name, layer, x64):
    assert_exact(problem(name), layer)


@pytest.mark.parametrize("name", ["mlp", "sequence", "batch norm"])
@pytest.mark.parametrize("max_bytes", [1, 3000])
def test_blocks_of_rows_give_the_same(name, max_bytes, x64):
    """Of one row or example each, and of several with a rest."""
    calls = []
    assert_exact(problem(name), max_bytes=max_bytes, progress=lambda *args: calls.append(args))
    total = calls[0][1]
    assert total > 1
    assert calls == [(i, total) for i in range(1, total + 1)]


def test_lenet_in_float32():
    """20 rows, of which softmax leaves 18; rounding is not counted as rank."""
    p = problem("lenet")
    found = jh.ggn_eigenvalues(p.objective, p.params, p.batch, layer="conv1")
    exact = nonzero_eigenvalues(helpers.block_ggn(p, "conv1"), 1e-6)
    np.testing.assert_allclose(found[: len(exact)], exact, rtol=1e-3, atol=1e-6 * exact[0])
    assert len(exact) <= len(found) <= 18


def test_a_layer_without_curvature_has_no_eigenvalues():
    p = problem("mlp")
    params = p.params | {"frozen": {"w": np.ones((2, 2), np.float32)}}
    objective = jh.Objective(lambda q, b: helpers.mlp({k: q[k] for k in p.params}, b), jh.cross_entropy)
    assert jh.ggn_eigenvalues(objective, params, p.batch, layer="frozen").size == 0
    spectra = jh.layer_spectra(objective, params, p.batch, key=jax.random.key(0), curvature="ggn", method="gram")
    assert (spectra["frozen"].nodes.tolist(), spectra["frozen"].dim) == ([0.0], 4)


# ---- criteria whose mean is not one over the examples ----


def masked(outputs, batch):
    """The mean over the rows that a mask leaves: an example alone has another mean."""
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
    return (losses * batch["mask"]).sum() / batch["mask"].sum()


@pytest.mark.parametrize("mask", [[1.0, 0, 1, 1, 0, 1, 0], [0.5, 2, 1, 3, 1, 1, 1]])
def test_the_criterion_is_taken_on_the_whole_batch(mask, x64):
    p = problem("softmax regression")
    p = helpers.Problem(jh.Objective(helpers.mlp, masked), p.params, p.batch | {"mask": np.array(mask)})
    assert_exact(p)


def test_a_shared_array_as_long_as_the_batch_is_not_cut_apart(x64):
    """Statistics of 7 features beside 7 examples."""

    def predict(params, batch):
        return helpers.affine(params["fc1"], (batch["x"] - batch["mean"][None]) @ jnp.eye(7, 3))

    p = problem("softmax regression")
    batch = {"x": helpers.normal(1, 7, 7), "mean": helpers.normal(2, 7), "label": p.batch["label"]}
    assert_exact(helpers.Problem(jh.Objective(predict, jh.cross_entropy), p.params, batch))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: jh.ggn_eigenvalues(p.objective, p.params, p.batch, layer="fc7"), ValueError, r"fc7.*'fc1', 'fc2'"),
        (lambda p: jh.ggn_eigenvalues(lambda q, b: 0.0, p.params, p.batch), TypeError, "Objective"),
        (lambda p: jh.ggn_eigenvalues(p.objective, p.params, jh.Batches([p.batch])), TypeError, "one batch.*Batches"),
        (
            lambda p: jh.ggn_eigenvalues(jh.Objective(helpers.mlp, lambda o, b: -jnp.mean(o**2)), p.params, p.batch),
            ValueError,
            "not convex",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(problem("mlp"))
