"""Sharper for the same products: deflated weights, exact and split traces, what the rows of G hold, diagonals."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh
from jaxhess import _weights
from jaxhess._lanczos import drive, lanczos_beside
from jaxhess._linear import as_linear

DIM = 200
BULK = np.sort(np.random.default_rng(0).uniform(0, 1, DIM))


def with_top(*top):
    return np.sort(np.append(BULK[: DIM - len(top)], top))


MADE = {
    "bulk and outliers": with_top(3, 4, 6, 9, 14, 20),
    "three times repeated": with_top(5, 5, 5, 9, 14),
    "ten times repeated": with_top(*[6] * 10, 12),
    "all repeated": np.repeat(np.linspace(0.2, 5, 25) ** 2, 8),
    "power law": np.arange(1.0, DIM + 1) ** -1.5 * 50,
    "indefinite": np.sort(np.append(-with_top(3, 5)[DIM // 2 :], with_top(4, 8, 9)[DIM // 2 :])),
}


@pytest.fixture(scope="module", params=MADE)
def made(request):
    """(exact spectrum, plain ones, deflated ones) over keys."""
    values = MADE[request.param]
    operator = helpers.as_operator(values.astype(np.float32))
    found = {
        weights: [
            jh.spectrum(operator, like=jnp.zeros(DIM), key=jax.random.key(k), num_steps=30, weights=weights)
            for k in range(keys)
        ]
        for weights, keys in (("plain", 40), ("deflated", 80))
    }
    return jh.Spectrum.from_eigenvalues(values), found["plain"], found["deflated"]


def test_deflated_weights_are_never_worse_than_plain_ones(made):
    exact, plain, deflated = made
    errors = [np.mean([jh.wasserstein(spec, exact) for spec in spectra[:40]]) for spectra in (plain, deflated)]
    assert errors[1] <= 1.02 * errors[0]


def test_deflated_weights_have_no_bias_and_their_errors_are_right(made):
    exact, _, deflated = made
    # Squares of a spectrum with repeated outliers are skewed: a start vector may miss most of their weight.
    for quantity, truth, most in [("trace", exact.trace, 1.2), (np.square, exact.weights @ exact.nodes**2, 1.45)]:
        found = [s.trace if quantity == "trace" else s.weights @ s.nodes**2 for s in deflated]
        z = (np.array(found) - truth) / [s.std_error(quantity) for s in deflated]
        deviation = (np.mean(found) - truth) / (np.std(found) / len(found) ** 0.5)
        assert abs(deviation) < 4
        assert 0.8 < np.sqrt(np.mean(z**2)) < most


def test_an_exactly_found_spectrum_has_the_error_of_its_rounding():
    values = np.append(np.zeros(DIM - 20), np.arange(1.0, 21))
    operator = helpers.as_operator(values.astype(np.float32))
    for k in range(5):
        spec = jh.spectrum(operator, like=jnp.zeros(DIM), key=jax.random.key(k), num_steps=40)
        assert spec.fixed.sum() == 20
        assert abs(spec.trace - values.sum()) < spec.std_error("trace") < 1e-2 * values.sum()


def test_outliers_weigh_what_they_must():
    operator = helpers.as_operator(MADE["bulk and outliers"].astype(np.float32))
    spec = jh.spectrum(operator, like=jnp.zeros(DIM), key=jax.random.key(0), num_steps=30)
    np.testing.assert_allclose(spec.nodes[spec.fixed][-6:], [3, 4, 6, 9, 14, 20], rtol=1e-5)
    np.testing.assert_allclose(spec.weights[spec.fixed], 1 / DIM, rtol=1e-12)


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("values", [[0] * 195 + [5] * 5, [0] * 180 + [1] * 20, [0] * 180 + [2] * 10 + [5] * 10])
def test_a_few_values_that_are_repeated_often_keep_their_weight(values, num_draws):
    """The Krylov space is exhausted after two or three steps."""
    operator, truth = helpers.as_operator(helpers.rotated(np.array(values, float)).astype(np.float32)), sum(values)
    z = []
    for k in range(20):
        spec = jh.spectrum(operator, like=jnp.zeros(200), key=jax.random.key(k), num_steps=64, num_draws=num_draws)
        z.append((spec.trace - truth) / spec.std_error("trace"))
        assert len(np.unique(spec.nodes)) == len(spec.nodes)  # what two draws have found is one node
    assert np.sqrt(np.mean(np.square(z))) < 2 and abs(np.mean(z)) < 1


@pytest.mark.parametrize("values", [np.repeat(np.geomspace(1e-2, 10, 60), 2), np.repeat(1 / np.arange(1.0, 61), 2)])
def test_eigenvalues_that_come_in_pairs_are_no_single_ones(values):
    operator, exact = (
        helpers.as_operator(helpers.rotated(values).astype(np.float32)),
        jh.Spectrum.from_eigenvalues(values),
    )
    errors, z = {}, []
    for k in range(20):
        for weights in ("plain", "deflated"):
            spec = jh.spectrum(operator, like=jnp.zeros(120), key=jax.random.key(k), num_steps=32, weights=weights)
            errors.setdefault(weights, []).append(jh.wasserstein(spec, exact))
        z.append((spec.trace - values.sum()) / spec.std_error("trace"))
    assert np.mean(errors["deflated"]) < 1.05 * np.mean(errors["plain"])
    assert np.sqrt(np.mean(np.square(z))) < 1.6


def test_draws_are_merged():
    operator = helpers.as_operator(MADE["bulk and outliers"].astype(np.float32))
    spec = jh.spectrum(operator, like=jnp.zeros(DIM), key=jax.random.key(0), num_steps=30, num_draws=3)
    assert [int(np.sum(np.abs(spec.nodes - top) < 1e-3)) for top in (3, 4, 6, 9, 14, 20)] == [1] * 6
    assert jh.count_outliers(spec) == 6 and spec.num_draws == 4  # with the run in the complement


def test_repeated_eigenvalues_are_told_by_a_second_run():
    nodes = np.array([0.5, 2.0, 5.0])
    whole = _weights.Nodes(nodes, np.full(3, 1 / 3), np.full(3, 1e-6), np.zeros(3, bool))
    rest = whole._replace(nodes=np.array([0.4, 2.0, 2.5]), weights=np.array([0.9, 0.05, 0.05]))
    found = _weights.check(whole, whole, rest, 10)
    assert found.repeated == {1} and found.single == {0, 2}
    np.testing.assert_allclose(found.draw.nodes, [0.5, 2, 5, 0.4, 2, 2.5])
    np.testing.assert_allclose(found.draw.weights, [0.1] * 3 + [0.63, 0.035, 0.035])


def test_a_run_that_is_too_coarse_for_the_rest_is_no_draw():
    whole = _weights.Nodes(np.linspace(-1, 1, 40), np.full(40, 1 / 40), np.full(40, 1e-6), np.zeros(40, bool))
    rest = _weights.Nodes(np.linspace(-0.9, 0.9, 10), np.full(10, 0.1), np.ones(10), np.zeros(10, bool))
    assert _weights.check(whole, whole, rest, 100).draw is None


def test_bands_are_as_wide_as_densities_vary():
    operator = helpers.as_operator(MADE["indefinite"].astype(np.float32))
    grid = np.linspace(-6, 10, 400)
    densities, widths = [], []
    for k in range(24):
        spec = jh.spectrum(operator, like=jnp.zeros(DIM), key=jax.random.key(k), num_steps=30)
        points, low, high = spec.density_band(width=1.0)
        assert np.all(low >= 0) and np.all(high >= low)
        inner = low > 0
        np.testing.assert_allclose((low + high)[inner] / 2, spec.density(grid=points)[1][inner], rtol=1e-6)
        densities.append(spec.density(grid=grid)[1])
        widths.append(np.interp(grid, points, (high - low) / 2))
    varied, said = np.std(densities, axis=0), np.mean(widths, axis=0)
    assert 0.5 < np.linalg.norm(said) / np.linalg.norm(varied) < 2
    _, low, high = jh.Spectrum.from_eigenvalues(MADE["indefinite"]).density_band()
    np.testing.assert_array_equal(low, high)


def test_errors_of_exact_spectra_are_zero_and_unknown_quantities_are_refused():
    exact = jh.Spectrum.from_eigenvalues([1.0, 2.0])
    assert exact.std_error("trace") == exact.std_error(np.square) == 0
    with pytest.raises(ValueError, match="unknown quantity 'median'; choose from"):
        exact.std_error("median")
    with pytest.raises(ValueError, match="unknown weights 'sharp'"):
        jh.spectrum(lambda v: v, like=jnp.zeros(3), key=jax.random.key(0), weights="sharp")


def test_the_distance_to_an_exact_spectrum_has_a_fair_error():
    operator = helpers.as_operator(MADE["power law"].astype(np.float32))
    other = jh.Spectrum.from_eigenvalues(MADE["power law"] * 1.5)
    truth = jh.wasserstein(jh.Spectrum.from_eigenvalues(MADE["power law"]), other)
    z = []
    for k in range(40):
        spec = jh.spectrum(operator, like=jnp.zeros(DIM), key=jax.random.key(k), num_steps=30)
        distance, error = jh.wasserstein(spec, other, with_error=True)
        z.append((distance - truth) / error)
    assert 0.6 < np.std(z) < 1.4 and abs(np.mean(z)) < 0.7


# ---- traces ----


@pytest.mark.parametrize("name", MADE)
def test_xtrace_has_no_bias_and_a_fair_error(name):
    values = MADE[name]
    operator = helpers.as_operator(helpers.rotated(values).astype(np.float32))
    found = [
        jh.trace(operator, like=jnp.zeros(DIM), key=jax.random.key(k), num_probes=32, method="xtrace")
        for k in range(40)
    ]
    errors = np.array([e.mean for e in found]) - values.sum()
    assert abs(errors.mean()) < 4 * errors.std() / len(found) ** 0.5
    assert 0.7 < np.sqrt(np.mean((errors / [e.std_error for e in found]) ** 2)) < 1.3
    assert {(e.method, e.num_probes) for e in found} == {("xtrace", 32)}


def test_xtrace_is_exact_where_the_range_is_small():
    values = np.append(np.zeros(DIM - 5), np.arange(1.0, 6))
    operator = helpers.as_operator(helpers.rotated(values).astype(np.float32))
    like = {"a": jnp.zeros((DIM // 2, 1)), "b": jnp.zeros(DIM // 2)}

    def on_tree(v):
        product = operator(jnp.concatenate([v["a"].ravel(), v["b"]]))
        return {"a": product[: DIM // 2, None], "b": product[DIM // 2 :]}

    found = jh.trace(on_tree, like=like, key=jax.random.key(0), num_probes=24, method="xtrace")
    np.testing.assert_allclose(found.mean, 15, rtol=1e-5)
    assert found.std_error < 1e-4
    assert jh.trace(lambda v: 0 * v, like=jnp.zeros(90), key=jax.random.key(0), method="xtrace").mean == 0
    few = jh.trace(lambda v: 2 * v, like=jnp.zeros(9), key=jax.random.key(0), method="xtrace")
    assert few.mean == 18 and few.method == "exact"


def test_xtrace_of_the_identity_is_its_dimension():
    found = jh.trace(lambda v: 1.0 * v, like=jnp.zeros(90), key=jax.random.key(0), num_probes=40, method="xtrace")
    np.testing.assert_allclose(found.mean, 90, rtol=1e-5)


def test_the_complement_of_the_range_of_an_operator_is_zero():
    values = np.append(np.zeros(DIM - 20), np.arange(1.0, 21))
    operator = helpers.as_operator(helpers.rotated(values).astype(np.float32))
    rows = jnp.zeros((30, DIM)).at[:20].set(np.linalg.eigh(helpers.matrix(operator, jnp.zeros(DIM)))[1][:, -20:].T)
    start = jax.random.normal(jax.random.key(0), (DIM,))
    found = drive(lanczos_beside(rows, 20, 20.0, start, 10), as_linear(operator))
    assert found.num_steps == 1 and abs(found.alphas[0]) < 1e-4


def test_what_xtrace_cannot_do_is_refused():
    def ask(**options):
        return jh.trace(lambda v: v, like=jnp.zeros(90), key=jax.random.key(0), method="xtrace", **options)

    with pytest.raises(ValueError, match="takes no tolerance"):
        ask(rtol=0.1)
    with pytest.raises(ValueError, match="at least 8 products, got num_probes=7"):
        ask(num_probes=7)
    with pytest.raises(TypeError, match="cannot run under jit"):
        jax.jit(lambda x: jh.trace(lambda v: v, like=x, key=jax.random.key(0), method="xtrace"))(jnp.zeros(9))
    with pytest.raises(ValueError, match="not finite"):
        jh.trace(lambda v: v / 0, like=jnp.zeros(90), key=jax.random.key(0), method="xtrace")


@pytest.mark.parametrize("curvature", ["hessian", "functional"])
@pytest.mark.parametrize("name", ["mlp", "sequence", "batch norm"])
def test_layers_get_probes_of_their_own_under_a_tolerance(name, curvature):
    p = problem(name)
    layers = [*jh.layer_names(p.params), "total"]
    traces = {x: np.trace(helpers.dense(p, curvature, None if x == "total" else x)) for x in layers}
    z = []
    for k in range(6):
        found = jh.layer_traces(
            p.objective, p.params, p.batch, key=jax.random.key(k), curvature=curvature, rtol=0.1, atol=0.02
        )
        for layer, estimate in found.items():
            assert estimate.std_error <= max(0.02, 0.1 * abs(estimate.mean)) or estimate.num_probes >= 1024
            z.append((estimate.mean - traces[layer]) / max(estimate.std_error, 1e-5))
    assert abs(np.mean(z)) < 0.5 and np.std(z) < 1.5


def test_a_quiet_layer_beside_loud_ones_takes_few_probes():
    """Of a block of trace 1 whose rows hold large blocks with another layer; neither is small enough for columns."""
    rng, n = np.random.default_rng(0), 300
    a = {"quiet": jnp.eye(n) / n, "loud": jnp.eye(n), "between": jnp.asarray(rng.normal(size=(n, n)), jnp.float32)}

    def loss(p, batch):
        quiet, loud = p["quiet"]["w"], p["loud"]["w"]
        cross = quiet @ a["between"] @ loud
        return 0.5 * (quiet @ a["quiet"] @ quiet + loud @ a["loud"] @ loud) + cross + 0 * batch.sum()

    params = {"quiet": {"w": jnp.zeros(n)}, "loud": {"w": jnp.zeros(n)}}
    found = {
        method: jh.layer_traces(
            loss, params, jnp.ones(1), key=jax.random.key(0), rtol=0.1, max_probes=128, method=method
        )
        for method in ("auto", "hutchinson")
    }
    assert found["auto"]["quiet"].num_probes == 8 and abs(found["auto"]["quiet"].mean - 1) < 1e-5
    assert found["hutchinson"]["quiet"].num_probes == 128 and found["hutchinson"]["quiet"].std_error > 1


def relu_net(params, batch):
    return helpers.affine(params["fc2"], jax.nn.relu(helpers.affine(params["fc1"], batch["x"])))


@pytest.mark.parametrize("name", ["mlp", "mlp, squared error", "mlp, own criterion"])
def test_traces_of_g_are_exact_where_rows_are_cheap(name):
    p = problem(name)
    found = jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), curvature="ggn")
    assert {e.method for e in found.values()} == {"exact"} and {e.num_probes for e in found.values()} == {0}
    for layer in [name for name in found if name != "total"]:
        np.testing.assert_allclose(found[layer].mean, np.trace(helpers.dense(p, "ggn", layer)), rtol=1e-4)
    by_probes = jh.layer_traces(
        p.objective, p.params, p.batch, key=jax.random.key(0), curvature="ggn", method="hutchinson"
    )
    for layer, estimate in by_probes.items():
        assert estimate.method == "hutchinson"
        assert abs(estimate.mean - found[layer].mean) < 4 * estimate.std_error + 1e-5


def test_exact_traces_over_batches_are_those_of_all_examples():
    p = problem("mlp")
    parts = [jax.tree.map(lambda x, s=s: x[s], p.batch) for s in (slice(0, 4), slice(4, 7))]
    many, one = (
        jh.layer_traces(p.objective, p.params, batch, key=jax.random.key(0), curvature="ggn", method="exact")
        for batch in (jh.Batches(parts), p.batch)
    )
    for layer, estimate in one.items():
        np.testing.assert_allclose(many[layer].mean, estimate.mean, rtol=1e-5)


@pytest.mark.parametrize("curvature", ["hessian", "functional"])
def test_exact_traces_column_by_column(curvature):
    p = problem("mlp")
    found = jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), curvature=curvature, method="exact")
    for layer, estimate in found.items():
        dense = helpers.dense(p, curvature, None if layer == "total" else layer)
        np.testing.assert_allclose(estimate.mean, np.trace(dense), atol=1e-4)


def test_where_h_is_zero_the_traces_of_hess_are_those_of_g():
    params = helpers.dense_layers([5, 12, 3])
    objective = jh.Objective(relu_net, jh.cross_entropy)
    batch = {"x": helpers.normal(1, 6, 5), "label": helpers.labels(2, 3, 6)}
    hessian, ggn = (
        jh.layer_traces(objective, params, batch, key=jax.random.key(0), curvature=c) for c in ("hessian", "ggn")
    )
    for name, exact in ggn.items():
        assert hessian[name].method == exact.method == "exact"
        assert abs(hessian[name].mean - exact.mean) < hessian[name].std_error + exact.std_error < 1e-4


@pytest.mark.parametrize("method", ["auto", "split"])
@pytest.mark.parametrize("name", ["mlp", "sequence", "batch norm"])
def test_split_traces_are_unbiased_with_fair_errors(method, name):
    p = problem(name)
    layers = [None, *jh.layer_names(p.params)]
    traces = {layer or "total": np.trace(helpers.dense(p, "hessian", layer)) for layer in layers}
    z = {layer: [] for layer in traces}
    for k in range(12):
        found = jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(k), num_probes=16, method=method)
        for layer, truth in traces.items():
            z[layer].append((found[layer].mean - truth) / found[layer].std_error)
    for layer, values in z.items():
        assert abs(np.mean(values)) < 4 / 12**0.5 and np.std(values) < 2, layer


def test_groups_of_examples_make_probes_of_g_quieter():
    """A net of one output a position, so that rows are not cheap: 64 examples of which the products are noise."""
    params = helpers.dense_layers([5, 12, 40])
    objective = jh.Objective(relu_net, jh.squared_error)
    batch = {"x": helpers.normal(1, 64, 5), "label": helpers.normal(2, 64, 40)}
    options = dict(key=jax.random.key(0), curvature="ggn", num_probes=32)
    apart = jh.layer_traces(objective, params, batch, **options)["total"]
    together = jax.jit(lambda p: jh.layer_traces(objective, p, batch, **options)["total"])(params)
    assert together.method == "hutchinson"  # an Estimate leaves jit
    exact = jh.layer_traces(objective, params, batch, **options | {"method": "exact"})["total"].mean
    assert apart.std_error < 0.7 * together.std_error
    for estimate in (apart, together):
        assert abs(estimate.mean - exact) < 4 * estimate.std_error


def test_what_cannot_be_split_is_refused():
    p = problem("mlp")
    with pytest.raises(ValueError, match="only the Hessian is split"):
        jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), curvature="ggn", method="split")
    with pytest.raises(ValueError, match="unknown method 'best'; choose from"):
        jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), method="best")


# ---- what the rows hold ----


def test_traces_by_example_sum_to_the_trace_and_are_each_examples_own():
    p = problem("mlp")
    found = jh.example_traces(p.objective, p.params, p.batch)
    count = len(p.batch["x"])
    for layer, values in found.items():
        dense = helpers.dense(p, "ggn", None if layer == "total" else layer)
        assert values.shape == (count,)
        np.testing.assert_allclose(values.sum(), np.trace(dense), rtol=1e-5)
    alone = jh.example_traces(p.objective, p.params, jax.tree.map(lambda x: x[2:3], p.batch))
    np.testing.assert_allclose(found["fc1"][2], alone["fc1"][0] / count, rtol=1e-5)


def test_examples_that_depend_on_each_other_have_no_traces_of_their_own():
    p = problem("batch norm")
    with pytest.raises(ValueError, match="depend on each other"):
        jh.example_traces(p.objective, p.params, p.batch)
    with pytest.raises(TypeError, match="not of Batches"):
        jh.example_traces(p.objective, p.params, jh.Batches([p.batch]))


@pytest.mark.parametrize("layer", [None, "fc1"])
@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_eigenpairs_of_g(name, layer):
    p = problem(name)
    dense = helpers.dense(p, "ggn", layer)
    values, vectors, residuals = jh.ggn_eigenpairs(p.objective, p.params, p.batch, k=4, layer=layer)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:4], rtol=1e-4)
    flat = np.stack([helpers.ravel(jax.tree.map(lambda x, i=i: x[i], vectors)) for i in range(4)])
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-4)
    assert np.all(np.linalg.norm(flat @ dense - values[:, None] * flat, axis=1) <= residuals + 1e-5 * values[0])


@pytest.mark.parametrize("name", ["mlp", "batch norm", "sequence"])
def test_diagonals(name):
    p = problem(name)
    exact = jh.ggn_diagonal(p.objective, p.params, p.batch)
    np.testing.assert_allclose(helpers.ravel(exact), np.diag(helpers.dense(p, "ggn")), atol=1e-5)
    for kind in ("hessian", "ggn"):
        found = jh.diagonal(p.operator(kind), like=p.params, key=jax.random.key(0), num_probes=50, chunk_size=16)
        z = (helpers.ravel(found.mean) - np.diag(helpers.dense(p, kind))) / np.maximum(
            helpers.ravel(found.std_error), 1e-6
        )
        assert np.mean(np.abs(z) < 2.5) > 0.9 and found.num_probes == 50
        trace = jh.trace(p.operator(kind), like=p.params, key=jax.random.key(0), num_probes=50)
        np.testing.assert_allclose(helpers.ravel(found.mean).sum(), trace.mean, rtol=1e-4, atol=1e-5)


def test_interactions_of_g_are_those_of_the_dense_blocks(x64):
    p = problem("mlp").cast(np.float64)
    found = jh.layer_interactions(p.objective, p.params, p.batch)
    dense = helpers.dense(p, "ggn")
    places = {name: helpers.positions(p.params, name) for name in found.names}
    for i, a in enumerate(found.names):
        for j, b in enumerate(found.names):
            block = dense[np.ix_(places[a], places[b])]
            np.testing.assert_allclose(found.norms[i, j], (block**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(found.norms.sum(), (dense**2).sum(), rtol=1e-6)
    assert 0 < found.off_diagonal_share < 1 and not found.std_error.any()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_interactions_by_probes(curvature):
    p = problem("mlp")
    found = jh.layer_interactions(
        p.objective, p.params, p.batch, curvature=curvature, method="hutchinson", key=jax.random.key(0), num_probes=40
    )
    dense = helpers.dense(p, curvature)
    places = [helpers.positions(p.params, name) for name in found.names]
    truth = np.array([[(dense[np.ix_(a, b)] ** 2).sum() for b in places] for a in places])
    assert np.all(np.abs(found.norms - truth) < 4 * found.std_error)
    with pytest.raises(ValueError, match="only interactions in G are exact"):
        jh.layer_interactions(p.objective, p.params, p.batch, curvature="hessian", method="exact")
