"""Every number of the summary's table with its error: exact where it can be, and covered by it where it is not."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh


def relu_net(params, batch):
    return helpers.affine(params["fc2"], jax.nn.relu(helpers.affine(params["fc1"], batch["x"])))


def relu_problem():
    params = helpers.dense_layers([5, 30, 3])  # no layer is smaller than the steps below
    batch = {"x": helpers.normal(1, 6, 5), "label": helpers.labels(2, 3, 6)}
    return helpers.Problem(jh.Objective(relu_net, jh.cross_entropy), params, batch)


def test_where_the_functional_part_is_zero_all_traces_are_exact_and_the_same():
    p = relu_problem()
    table = jh.summarize(p.objective, p.params, p.batch, key=jax.random.key(0), num_probes=2, num_steps=8)
    for name, record in table.items():
        layer = None if name == "total" else name
        weights = helpers.ravel(p.params if layer is None else p.params[layer])
        exact = np.trace(helpers.dense(p, "hessian", layer))
        np.testing.assert_allclose(record.trace.mean, exact, rtol=1e-5)
        assert record.trace == record.ggn_trace
        assert record.trace.num_probes == 0 and record.trace.std_error < 1e-3 * exact
        np.testing.assert_allclose(record.trace_norm2, exact * weights @ weights, rtol=1e-5)
        assert record.trace_norm2_error < 1e-3 * record.trace_norm2
    rows = str(table).splitlines()
    assert all(row.count("exact") == 3 for row in rows if row.startswith(("fc", "total")))


def test_by_lanczos_every_column_has_an_error():
    p = relu_problem()
    options = dict(key=jax.random.key(0), num_probes=8, num_steps=8, method="lanczos")
    table = jh.summarize(p.objective, p.params, p.batch, **options)
    for record in table.values():
        assert (
            0
            < record.trace_norm2_error
            == pytest.approx(record.trace.std_error * record.trace_norm2 / record.trace.mean)
        )
    assert table["fc1"].wasserstein_error > 0
    low, high = table["fc1"].outliers_range
    assert low <= table["fc1"].outliers <= high


def test_a_column_of_noise_says_so():
    """A scale-free layer beside a steep one: Tr * |w|^2 of few probes would be thousands, and is -0.64."""

    def loss(params, batch):
        direction = params["rot"]["w"] / jnp.linalg.norm(params["rot"]["w"])
        return (direction @ params["out"]["w"] - 1) ** 2

    params = {"rot": {"w": 1e4 * jnp.array([1.0, 2.0])}, "out": {"w": jnp.array([0.5, -1.0])}}
    for seed in range(4):
        table = jh.summarize(loss, params, None, key=jax.random.key(seed), num_steps=2, num_probes=64)
        np.testing.assert_allclose(table["rot"].trace_norm2, -0.64164, atol=1e-3)
        few = {"num_probes": 64, "method": "hutchinson"}
        many = jh.layer_traces(loss, params, None, key=jax.random.key(seed), **few)["rot"]
        assert abs(many.mean * 5e8 + 0.64) < 4 * many.std_error * 5e8  # what the column would have been


def test_layers_can_be_asked_for_alone():
    p = relu_problem()
    options = dict(key=jax.random.key(0), num_probes=4, num_steps=8)
    table = jh.summarize(p.objective, p.params, p.batch, layers=["fc2"], **options)
    assert list(table) == ["fc2", "total"]
    assert table["fc2"].trace.num_probes == 0 and table["total"].trace.method == "exact"


# ---- the error of the Wasserstein distance, and of the count ----


@pytest.mark.parametrize("shape", ["bulk and outliers", "power law", "two points"])
def test_the_error_of_the_distance_covers(shape):
    """Diagonal operators: between the Lanczos spectrum of one start vector and the exact one, over 40 keys."""
    rng = np.random.default_rng(0)
    values = {
        "bulk and outliers": np.concatenate([rng.uniform(-1, 1, 395), [5, 6, 8, 9, 30.0]]),
        "power law": np.arange(1, 401.0) ** -1,
        "two points": np.repeat([0.0, 1.0], [300, 100]),
    }[shape]
    exact = jh.Spectrum.from_eigenvalues(values)
    operator, like = helpers.as_operator(values.astype(np.float32)), np.zeros(400, np.float32)
    ratios = []
    for seed in range(40):
        spec = jh.spectrum(operator, like=like, key=jax.random.key(seed), num_steps=60)
        distance, error = jh.wasserstein(spec, exact, with_error=True)
        assert distance == jh.wasserstein(spec, exact)
        ratios.append(distance / error)
    assert np.mean(np.array(ratios) < 2) >= 0.9  # of two points it is a standard error and no bound: 0.954
    assert np.mean(ratios) > 0.2  # a bound, and not an empty one


def test_exact_spectra_have_no_error():
    a, b = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2), jh.Spectrum([0.0, 2.0], [0.5, 0.5], 2)
    assert jh.wasserstein(a, b, with_error=True) == (0.5, 0.0)
    assert jh.wasserstein(a, b, with_error=True, normalize=True) == (0.25, 0.0)


def test_two_start_vectors_have_less_error_than_one():
    p = problem("mlp")
    errors = [
        jh.wasserstein(spec, spec, with_error=True)[1]
        for spec in (
            jh.spectrum(p.operator("hessian"), like=p.params, key=jax.random.key(0), num_steps=9, num_draws=draws)
            for draws in (1, 8)
        )
    ]
    assert errors[1] < 0.6 * errors[0]
