"""Traces: unbiased, with honest standard errors, reproducible, and sure to stop."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_operator, problem

import jaxhess as jh
from jaxhess._trees import random_like, sampler

DIM = 12
DIAGONAL = np.linspace(-1, 3, DIM).astype(np.float32)
MATRIX = helpers.rotated(np.linspace(-1, 3, DIM)).astype(np.float32)


def trace(array, seed=0, **options):
    return jh.trace(as_operator(array), like=jnp.zeros(DIM), key=jax.random.key(seed), **options)


# ---- what is estimated ----


@pytest.mark.parametrize("num_probes", [2, 5])
def test_rademacher_is_exact_on_diagonal_matrices(num_probes):
    found = trace(DIAGONAL, num_probes=num_probes)
    np.testing.assert_allclose(found.mean, DIAGONAL.sum(), rtol=1e-5)
    assert found.std_error < 1e-5
    assert found.num_probes == num_probes


@pytest.mark.parametrize(
    ("probe", "variance"),
    [
        ("rademacher", 2 * (np.sum(MATRIX**2) - np.sum(np.diag(MATRIX) ** 2))),
        ("gaussian", 2 * np.sum(MATRIX**2)),
    ],
)
def test_variance_of_a_probe_is_the_formula(probe, variance):
    found = trace(MATRIX, num_probes=4096, probe=probe, chunk_size=1024)
    np.testing.assert_allclose(found.std_error**2 * 4096, variance, rtol=0.1)
    assert abs(found.mean - np.trace(MATRIX)) < 4 * found.std_error


def test_a_tree_of_arrays():
    like = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros(4), jnp.zeros(()))}
    found = jh.trace(lambda v: jax.tree.map(lambda x: 3 * x, v), like=like, key=jax.random.key(0), num_probes=4)
    assert (found.mean, found.std_error) == (33, 0)


def test_a_single_probe_has_no_standard_error():
    found = trace(MATRIX, num_probes=1)
    assert np.isfinite(found.mean) and np.isnan(found.std_error)


def test_prints_as_value_and_error():
    assert str(jh.Estimate(np.float64(12.3456), np.float64(0.0321), 64)) == "12.35 +- 0.032"


# ---- probes ----


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_probes_have_mean_zero_and_unit_covariance(probe):
    """Over all leaves together, more of them than a word has bits."""
    like = {"a": jnp.zeros((5, 7)), "b": jnp.zeros(6)}
    draws = jax.vmap(lambda key: random_like(key, like, sampler(probe)))(jax.random.split(jax.random.key(0), 20_000))
    assert jax.tree.map(jnp.shape, draws) == {"a": (20_000, 5, 7), "b": (20_000, 6)}
    flat = np.concatenate([draws["a"].reshape(20_000, -1), draws["b"]], 1).astype(np.float64)
    np.testing.assert_allclose(flat.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(flat.T @ flat / 20_000, np.eye(41), atol=0.06)
    assert (set(np.unique(flat)) == {-1.0, 1.0}) == (probe == "rademacher")


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("dtype", "drawn"), [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32)])
def test_probes_are_at_least_in_float32(probe, dtype, drawn):
    draw = random_like(jax.random.key(0), {"a": jnp.zeros(3, dtype), "b": jnp.zeros((), dtype)}, sampler(probe))
    assert {x.dtype for x in jax.tree.leaves(draw)} == {jnp.dtype(drawn)}


# ---- calibration ----


KEYS = 200


def z_scores(estimates, exact):
    return (np.asarray(estimates.mean) - exact) / np.asarray(estimates.std_error)


def assert_calibrated(z, name=""):
    assert 0.85 < z.std() < 1.15, (name, z.std())
    assert abs(z.mean()) < 4 / len(z) ** 0.5, (name, z.mean())


def stack(estimates):
    return jh.Estimate(*(np.array(column) for column in zip(*estimates, strict=True)))


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_standard_errors_of_a_trace_are_calibrated(probe):
    found = stack([trace(MATRIX, seed, probe=probe, chunk_size=64) for seed in range(KEYS)])
    assert_calibrated(z_scores(found, np.trace(MATRIX)))


@pytest.mark.parametrize(
    ("name", "curvature"), [("mlp", "hessian"), ("mlp", "ggn"), ("mlp", "functional"), ("sequence", "ggn")]
)
def test_standard_errors_of_layer_traces_are_calibrated(name, curvature):
    p = problem(name)
    exact = {layer: np.trace(helpers.dense(p, curvature, layer)) for layer in ("fc1", "fc2")}
    exact["total"] = np.trace(helpers.dense(p, curvature))

    @jax.jit
    def estimate(params, key):
        return jh.layer_traces(p.objective, params, p.batch, key=key, curvature=curvature, chunk_size=64)

    found = [estimate(p.params, jax.random.key(seed)) for seed in range(KEYS)]
    assert list(found[0]) == list(exact)
    for layer, value in exact.items():
        assert_calibrated(z_scores(stack([f[layer] for f in found]), value), layer)


def test_the_standard_error_of_the_total_counts_that_layers_share_probes():
    """Their estimates are correlated, so that the root of the sum of squares would be wrong."""
    p = problem("sequence")
    found = jh.layer_traces(
        p.objective,
        p.params,
        p.batch,
        key=jax.random.key(0),
        num_probes=512,
        curvature="ggn",
        method="hutchinson",
        chunk_size=64,
    )
    alone = np.hypot(found["fc1"].std_error, found["fc2"].std_error)
    assert abs(found["total"].std_error / alone - 1) > 0.1
    np.testing.assert_allclose(found["total"].mean, found["fc1"].mean + found["fc2"].mean, rtol=1e-5)


@functools.cache
def lenet_traces(curvature):
    p = problem("lenet")
    return jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), num_probes=64, curvature=curvature)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc3"])
def test_lenet(layer):
    exact = np.trace(helpers.block_ggn(problem("lenet"), layer))
    found = lenet_traces("ggn")
    assert list(found) == ["conv1", "conv2", "fc1", "fc2", "fc3", "total"]
    assert abs(found[layer].mean - exact) < 4 * found[layer].std_error


def test_unused_parameters_count_as_zero():
    p = problem("mlp")
    params = p.params | {"frozen": {"w": np.ones((2, 2), np.float32)}}
    objective = jh.Objective(lambda q, b: helpers.mlp({k: q[k] for k in p.params}, b), jh.cross_entropy)
    for curvature in ("hessian", "ggn"):
        found = jh.layer_traces(objective, params, p.batch, key=jax.random.key(0), num_probes=2, curvature=curvature)
        assert list(found) == ["fc1", "fc2", "frozen", "total"]
        assert found["frozen"][:2] == (0, 0)


def test_ggn_probes_are_fresh_for_each_batch_and_hessian_probes_are_not():
    """Two equal batches: independent noise halves the variance of one, a shared v leaves it."""
    p = problem("softmax regression")
    twice = jh.Batches([p.batch, p.batch])

    def errors(curvature):
        return [
            jh.layer_traces(
                p.objective,
                p.params,
                batch,
                key=jax.random.key(0),
                num_probes=512,
                curvature=curvature,
                method="hutchinson",
                chunk_size=64,
            )["total"].std_error
            for batch in (twice, p.batch)
        ]

    two, one = errors("hessian")
    np.testing.assert_allclose(two, one, rtol=1e-3)
    two, one = errors("ggn")
    np.testing.assert_allclose(two, one / 2**0.5, rtol=0.15)


def test_own_criteria_and_has_aux():
    p = problem("mlp, own criterion")
    objective = jh.Objective(lambda q, b: (helpers.mlp(q, b), None), helpers.softplus_sum)
    found = jh.layer_traces(
        objective, p.params, p.batch, key=jax.random.key(0), num_probes=128, curvature="ggn", has_aux=True
    )
    for layer in ("fc1", "fc2"):
        exact = np.trace(helpers.dense(p, "ggn", layer))
        assert abs(found[layer].mean - exact) < 4 * found[layer].std_error


# ---- keys, chunks, jit ----


def test_the_same_key_gives_the_same_result():
    assert trace(MATRIX, seed=1) == trace(MATRIX, seed=1)
    assert trace(MATRIX, seed=1).mean != trace(MATRIX, seed=2).mean


def test_raw_keys_are_keys():
    found = jh.trace(as_operator(MATRIX), like=jnp.zeros(DIM), key=jax.random.PRNGKey(3), num_probes=4)
    assert found == trace(MATRIX, seed=3, num_probes=4)


def test_more_probes_begin_with_the_fewer():
    means = {n: n * trace(MATRIX, num_probes=n).mean for n in (1, 2, 3)}
    singles = [means[1], means[2] - means[1], means[3] - means[2]]
    found = trace(MATRIX, num_probes=3)
    np.testing.assert_allclose(np.std(singles, ddof=1) / 3**0.5, found.std_error, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_chunks_do_not_change_the_result(chunk_size):
    found = trace(MATRIX, num_probes=33, chunk_size=chunk_size)  # at most 16 unrolled, or all 33 vmapped
    np.testing.assert_allclose(found, trace(MATRIX, num_probes=33), rtol=1e-5)


def test_layer_traces_have_the_same_prefix_in_all_chunks():
    p = problem("mlp")
    one, two = (
        jh.layer_traces(
            p.objective, p.params, p.batch, key=jax.random.key(0), num_probes=6, curvature="ggn", chunk_size=c
        )
        for c in (2, 3)
    )
    for layer in one:
        np.testing.assert_allclose(one[layer], two[layer], rtol=1e-5)


def test_under_jit_the_result_is_the_same():
    operator = as_operator(MATRIX)
    found = jax.jit(lambda o, key: jh.trace(o, like=jnp.zeros(DIM), key=key, num_probes=10))(
        operator, jax.random.key(0)
    )
    np.testing.assert_allclose(found, trace(MATRIX, num_probes=10), rtol=1e-5)
    p = problem("mlp")
    eager, jitted = (
        function(p.params, p.batch, jax.random.key(0))
        for function in (layer_traces_of_ggn, jax.jit(layer_traces_of_ggn))
    )
    for layer in eager:
        np.testing.assert_allclose(jitted[layer], eager[layer], rtol=1e-4)


def layer_traces_of_ggn(params, batch, key):
    return jh.layer_traces(
        problem("mlp").objective, params, batch, key=key, num_probes=6, curvature="ggn", method="hutchinson"
    )


# ---- when to stop ----


@pytest.mark.parametrize("tolerance", [{"rtol": 0.05}, {"atol": 0.5}, {"rtol": 0.05, "atol": 0.5}])
def test_probes_are_added_until_the_error_is_small(tolerance):
    found = trace(MATRIX, num_probes=8, max_probes=10_000, chunk_size=64, **tolerance)
    allowed = max(tolerance.get("atol", 0), tolerance.get("rtol", 0) * abs(found.mean))
    assert found.std_error <= allowed
    assert 8 < found.num_probes < 10_000
    np.testing.assert_allclose(found, trace(MATRIX, num_probes=found.num_probes, chunk_size=64), rtol=1e-5)


@pytest.mark.parametrize("limit", [20, 64])
def test_at_most_max_probes(limit):
    found = trace(MATRIX, num_probes=8, rtol=1e-6, max_probes=limit)
    assert found.num_probes == limit
    assert found.std_error > 1e-6 * abs(found.mean)


def test_a_tolerance_that_is_met_at_once_takes_num_probes():
    assert trace(DIAGONAL, num_probes=10, rtol=1e-3).num_probes == 10
    assert trace(np.zeros(DIM, np.float32), num_probes=10, rtol=1e-3)[:] == (0, 0, 10)
    assert trace(np.zeros(DIM, np.float32), num_probes=10, atol=0.0)[:] == (0, 0, 10)


def test_a_single_first_probe_does_not_end_the_search():
    assert trace(MATRIX, num_probes=1, rtol=0.5, chunk_size=1).num_probes > 1


@pytest.mark.parametrize("curvature", ["hessian", "functional"])
def test_layer_traces_end_where_a_layer_has_none(curvature):
    """H_l = 0 in both layers of this net, with noise of mean zero from the blocks between them."""
    p = problem("softmax regression")
    params = {"fc1": p.params["fc1"], "fc2": {"b": np.zeros(2, np.float32), "w": np.eye(4, 2, dtype=np.float32)}}
    objective = jh.Objective(lambda q, b: helpers.affine(q["fc2"], helpers.affine(q["fc1"], b["x"])), jh.cross_entropy)
    batch = p.batch | {"label": p.batch["label"] % 2}
    options = dict(key=jax.random.key(0), num_probes=8, max_probes=64, curvature=curvature, chunk_size=16)
    found = jh.layer_traces(objective, params, batch, rtol=1e-9, method="hutchinson", **options)
    assert {e.num_probes for e in found.values()} == {64}
    found = jh.layer_traces(objective, params, batch, atol=1e3, method="hutchinson", **options)
    assert {e.num_probes for e in found.values()} == {8}
    for tolerance, most in ({"rtol": 1e-9}, 64), ({"atol": 1e3}, 16):
        found = jh.layer_traces(objective, params, batch, **tolerance, **options)
        assert max(e.num_probes for e in found.values()) <= most


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_probes": 0}, ValueError, "num_probes.*at least 1, got 0"),
        ({"num_probes": -3}, ValueError, "num_probes.*-3"),
        ({"num_probes": 2.0}, ValueError, "num_probes.*2.0"),
        ({"num_probes": True}, ValueError, "num_probes.*True"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"rtol": 0.1, "max_probes": 0}, ValueError, "max_probes"),
        ({"rtol": -0.1}, ValueError, "negative.*rtol=-0.1"),
        ({"atol": -1.0}, ValueError, "negative.*atol=-1.0"),
        ({"probe": "uniform"}, ValueError, r"unknown probe 'uniform'.*gaussian.*rademacher"),
    ],
)
def test_invalid_options(options, error, message):
    with pytest.raises(error, match=message):
        trace(MATRIX, **options)
    p = problem("mlp")
    with pytest.raises(error, match=message):
        jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), **options)


def test_a_stopping_rule_cannot_run_under_jit():
    with pytest.raises(TypeError, match="jit.*rtol, atol"):
        jax.jit(lambda key: jh.trace(as_operator(MATRIX), like=jnp.zeros(DIM), key=key, rtol=0.1))(jax.random.key(0))


def test_products_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite.*operator"):
        trace(np.full(DIM, np.inf, np.float32), num_probes=2)
    p = problem("mlp")

    def explodes(params, batch):
        return p.objective(params, batch) + jnp.exp(jnp.sum(params["fc2"]["b"]) + 100.0)

    with pytest.raises(ValueError, match=r"not finite.*'fc2'"):
        jh.layer_traces(explodes, p.params, p.batch, key=jax.random.key(0), num_probes=2)


@pytest.mark.parametrize(
    ("objective", "options", "error", "message"),
    [
        (lambda p: lambda q, b: p.objective(q, b), {"curvature": "ggn"}, TypeError, r"Objective\(predict, criterion\)"),
        (lambda p: p.objective, {"curvature": "fisher"}, ValueError, "'fisher'.*functional.*ggn.*hessian"),
        (lambda p: helpers.mlp, {}, TypeError, "scalar"),
    ],
)
def test_layer_traces_check_the_loss(objective, options, error, message):
    p = problem("mlp")
    with pytest.raises(error, match=message):
        jh.layer_traces(objective(p), p.params, p.batch, key=jax.random.key(0), **options)
