"""Probes whose parts are scaled layer by layer: the mean, the variance by its formula, and what is gained."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxhess as jh
from jaxhess._functional import h_product, layers_without_h
from jaxhess._samples import ProductSamples
from jaxhess._scales import balanced
from jaxhess._trees import draw_keys, sampler
from jaxhess.problem import pose

SIZES = {"a": 6, "b": 4, "c": 5}
LIKE = {name: {"w": np.zeros(size, np.float32)} for name, size in SIZES.items()}
PLACES = {"a": range(6), "b": range(6, 10), "c": range(10, 15), "a and b": range(10), "b and c": range(6, 15)}


def matrix(seed=0):
    """A random symmetric matrix in which "a" is steep and "c" flat."""
    size = np.repeat([10.0, 1.0, 0.1], list(SIZES.values()))
    a = np.random.default_rng(seed).standard_normal((15, 15))
    return (a + a.T) * np.sqrt(np.outer(size, size))


def layers(selections=None):
    return pose("hessian", lambda p, _: jnp.sum(p["a"]["w"]), LIKE, None, False, selections, "exact").layers


class Dense:
    """A product with a dense matrix, in place of that of a loss."""

    def __init__(self, a):
        self.a = jnp.asarray(a, jnp.float32)

    def __call__(self, params, batch, v):
        y = self.a @ jnp.concatenate([v[name]["w"] for name in SIZES])
        parts = jnp.split(y, np.cumsum(list(SIZES.values()))[:-1])
        return {name: {"w": part} for name, part in zip(SIZES, parts, strict=True)}


def draw(a, scales, selections=None, covered=True, only=None, probes=20_000):
    found = ProductSamples(Dense(a), layers(selections), sampler("rademacher"), covered)
    keys = draw_keys(jax.random.key(0), 0, probes)
    return np.asarray(jax.jit(found.__call__, static_argnums=1)(LIKE, None, keys, scales, only), np.float64)


def variance(a, scales):
    """2 (||A_ll||^2 - sum of its squared diagonal) + sum over m of (s_m / s_l)^2 ||A_lm||^2."""
    spread = np.repeat(scales, list(SIZES.values()))
    scaled, found = (a * spread / spread[:, None]) ** 2, []
    for name in SIZES:
        own = a[np.ix_(PLACES[name], PLACES[name])]
        found.append(np.sum(own**2) - 2 * np.sum(np.diag(own) ** 2) + scaled[PLACES[name]].sum())
    return np.array(found)


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1.0, 4.0, 16.0], [2.0, 1.0, 0.5]])
def test_scales_leave_the_mean_and_change_the_variance_as_the_formula_says(scales):
    samples = draw(a := matrix(), np.float32(scales))
    exact = np.array([np.trace(a[np.ix_(PLACES[name], PLACES[name])]) for name in SIZES])
    error = samples.std(0) / len(samples) ** 0.5
    assert (np.abs(samples.mean(0) - [*exact, exact.sum()]) < 5 * error).all()
    np.testing.assert_allclose(samples[:, :3].var(0), variance(a, np.array(scales)), rtol=0.05)


def test_groups_that_overlap_and_parameters_in_none_keep_their_means():
    samples = draw(a := matrix(), np.float32([1.0, 8.0]), {"a and b": ["a", "b"], "b and c": ["b", "c"]}, covered=False)
    exact = [np.trace(a[np.ix_(PLACES[name], PLACES[name])]) for name in ("a and b", "b and c")]
    assert (np.abs(samples.mean(0) - [*exact, np.trace(a)]) < 5 * samples.std(0) / len(samples) ** 0.5).all()
    alone = draw(a, np.float32([8.0]), "c", covered=False)
    exact = [np.trace(a[10:, 10:]), np.trace(a)]
    assert (np.abs(alone.mean(0) - exact) < 5 * alone.std(0) / len(alone) ** 0.5).all()


def test_what_no_layer_holds_gets_no_probe_where_the_total_does_not_need_it():
    samples = draw(a := matrix(), np.float32([4.0]), "c")
    own = a[10:, 10:]
    np.testing.assert_allclose(samples[:, 0].var(), 2 * (np.sum(own**2) - np.sum(np.diag(own) ** 2)), rtol=0.05)


def test_a_probe_of_one_layer_alone_has_no_scale():
    scaled, plain = (draw(matrix(), s, only=jnp.int32(2), probes=8) for s in (np.float32([1, 4, 16]), None))
    np.testing.assert_allclose(scaled[:, 2], plain[:, 2], rtol=1e-5)


@pytest.mark.parametrize("only", [0, 1])
def test_a_probe_of_one_group_alone_holds_all_of_it_where_groups_overlap(only):
    groups = {"a and b": ["a", "b"], "b and c": ["b", "c"]}
    own = matrix()[np.ix_(*[list(PLACES[list(groups)[only]])] * 2)]
    for scales in (None, np.float32([1.0, 8.0])):
        samples = draw(matrix(), scales, groups, covered=False, only=jnp.int32(only))[:, only]
        assert abs(samples.mean() - np.trace(own)) < 5 * samples.std() / len(samples) ** 0.5
        if scales is None:
            np.testing.assert_allclose(samples.var(), 2 * (np.sum(own**2) - np.sum(np.diag(own) ** 2)), rtol=0.05)


def test_the_scales_even_out_relative_errors():
    """Beside the best ones there are, which balance the matrix of squared relative couplings (Osborne 1960)."""
    count = 40  # numbers in each layer
    size = np.repeat([10.0, 1.0, 0.1], count)
    a = np.random.default_rng(0).standard_normal((3 * count, 3 * count))
    blocks = (((a + a.T) ** 2) * np.outer(size, size)).reshape(3, count, 3, count).sum((1, 3))
    units = size[::count] * count
    product = (a + a.T) * np.sqrt(np.outer(size, size)) @ helpers.normal(1, 3 * count)
    scales = balanced(np.linalg.norm(product.reshape(3, count), axis=1))
    assert scales[0] == 1 and (np.diff(scales) > 0).all() and (np.log2(scales) % 1 == 0).all()
    coupling = (blocks - np.diag(np.diag(blocks))) / units[:, None] ** 2
    _, (best, _) = scipy.linalg.matrix_balance(coupling, permute=False, separate=True)
    plain, ours, best = (np.sum(coupling * (s / s[:, None]) ** 2) for s in (np.ones(3), scales, np.sqrt(best)))
    assert best <= 1.1 * ours and ours < 1.3 * best and best < 0.1 * plain


@pytest.mark.parametrize(
    ("norms", "expected"),
    [((4, 1, 0), (1, 4, 1)), ((0, 0, 0), (1, 1, 1)), ((np.nan, 1, 1), (1, 1, 1)), ((1e30, 1, 1), (1, 1024, 1024))],
)
def test_layers_without_a_product_and_products_that_are_not_finite(norms, expected):
    np.testing.assert_array_equal(balanced(np.array(norms, float)), expected)


# ---- in a net ----


@pytest.fixture(scope="module")
def steep():
    """tanh(tanh(...)) whose inputs are large: H of the first layer is thousands of times that of the last but one."""
    params = helpers.dense_layers([8, 10, 10, 3])
    batch = {"x": 20 * helpers.normal(1, 12, 8), "label": helpers.labels(2, 3, 12)}
    params["fc1"] = jax.tree.map(lambda x: x / 20, params["fc1"])
    return helpers.Problem(jh.Objective(helpers.mlp, jh.cross_entropy), params, batch)


def test_a_flat_layer_is_no_longer_lost_among_steep_ones_and_errors_cover_the_truth(steep):
    exact = {name: np.trace(helpers.dense(steep, "hessian", name)) for name in steep.params}
    exact |= {"total": sum(exact.values())}

    def estimates(method, keys):
        options = {"num_probes": 16, "method": method}
        found = [jh.layer_traces(*at(steep), key=jax.random.key(key), **options) for key in range(keys)]
        return {name: np.array([one[name][:2] for one in found], np.float64).T for name in exact}

    split, plain = estimates("split", 60), estimates("hutchinson", 10)
    for name, (means, errors) in split.items():
        z = (means - exact[name]) / np.maximum(errors, 1e-5 * abs(exact[name]))
        assert np.sqrt(np.mean(z**2)) < 1.6 and abs(z.mean()) < 5 / 60**0.5, (name, z)
    assert split["fc2"][1].mean() < 0.2 * plain["fc2"][1].mean()
    assert split["total"][1].mean() < 2 * plain["total"][1].mean()


@pytest.mark.parametrize("groups", [None, {"first": ["fc1", "fc2"], "last": ["fc2", "fc3"]}], ids=["layers", "overlap"])
def test_a_tolerance_holds_with_scaled_probes(steep, groups):
    each = {name: np.trace(helpers.dense(steep, "hessian", name)) for name in steep.params}
    exact = {name: sum(map(each.get, group)) for name, group in groups.items()} if groups else dict(each)
    exact |= {"total": sum(each.values())}
    z = []
    for key in range(12):
        found = jh.layer_traces(*at(steep), key=jax.random.key(key), rtol=0.1, max_probes=512, layers=groups)
        for name, truth in exact.items():
            assert found[name].std_error <= 0.1 * abs(found[name].mean) or found[name].num_probes == 512
            z.append((found[name].mean - truth) / max(found[name].std_error, 1e-5 * abs(truth)))
    assert np.sqrt(np.mean(np.square(z))) < 1.6 and np.abs(z).max() < 5


@pytest.mark.parametrize("options", [{}, {"rtol": 0.1}], ids=["probes", "tolerance"])
def test_groups_without_h_that_do_not_cover_the_net_leave_h_in_the_total(steep, options):
    found = jh.layer_traces(*at(steep), key=jax.random.key(0), num_probes=64, layers=["fc3"], **options)
    exact = {name: np.trace(helpers.dense(steep, "hessian", name)) for name in steep.params}
    assert found["fc3"].method == "exact"
    np.testing.assert_allclose(found["fc3"].mean, exact["fc3"], rtol=1e-4)
    total = found["total"]
    assert total.method == "split" and total.num_probes >= 32
    assert abs(total.mean - sum(exact.values())) < 3 * total.std_error


def test_a_layer_of_one_parameter_does_not_spoil_the_others():
    """The part of one product in it is near zero by chance: a scale of 500 would make the others useless."""
    params = helpers.dense_layers([4, 8, 8, 1])
    batch = {"x": helpers.normal(1, 12, 4), "label": helpers.normal(2, 12, 1)}
    objective = jh.Objective(helpers.mlp, jh.squared_error)
    at_loss = (lambda params, batch: objective(params, batch), params, batch)
    errors = {method: [] for method in ("auto", "hutchinson")}
    for method, found in errors.items():
        for key in range(30):
            one = jh.layer_traces(*at_loss, key=jax.random.key(key), num_probes=16, layers="arrays", method=method)
            found.append(one["fc2/w"].std_error)
    assert max(errors["auto"]) < 6 * np.median(errors["hutchinson"])


def test_keys_may_be_traced(steep):
    keys = jax.random.split(jax.random.key(0), 3)
    estimate = jax.jit(jax.vmap(lambda key: jh.layer_traces(*at(steep), key=key, num_probes=8)["fc1"].mean))
    loss = (lambda params, batch: steep.objective(params, batch), steep.params, steep.batch)
    plain = jax.vmap(lambda key: jh.layer_traces(*loss, key=key, num_probes=8)["fc1"].mean)
    np.testing.assert_allclose(estimate(keys), plain(keys), rtol=1e-4)


def test_central_differences_have_no_scales(steep):
    """The step would be spent on layers that hardly move the loss."""
    options = {"key": jax.random.key(0), "num_probes": 8, "differentiation": "finite"}
    loss = (lambda params, batch: steep.objective(params, batch), steep.params, steep.batch)
    found = [jh.layer_traces(*loss, method=method, **options)["fc2"] for method in ("auto", "hutchinson")]
    assert found[0] == found[1]


def test_a_plain_loss_has_scaled_probes_by_default(steep):
    at_loss = (lambda params, batch: steep.objective(params, batch), steep.params, steep.batch)
    found = [jh.layer_traces(*at_loss, key=jax.random.key(0), num_probes=16, method=m) for m in ("auto", "hutchinson")]
    scaled, plain = ({name: float(one[name].std_error) for name in steep.params} for one in found)
    assert scaled["fc2"] < 0.3 * plain["fc2"]


def at(problem):
    return problem.objective, problem.params, problem.batch


def test_the_search_for_layers_without_h_ends_where_the_net_is_bent():
    """relu, relu, tanh, linear: only the last layer is without H; the search sees it and as many others as it must."""

    def net(params, batch):
        x = batch["x"]
        for name in ("fc1", "fc2", "fc3"):
            x = jax.nn.relu(helpers.affine(params[name], x))
        x = jnp.tanh(helpers.affine(params["fc4"], x))
        return helpers.affine(params["fc5"], x)

    params = helpers.dense_layers([4, 9, 9, 9, 9, 3])
    batch = {"x": helpers.normal(1, 6, 4), "label": helpers.labels(2, 3, 6)}
    problem = pose("hessian", jh.Objective(net, jh.cross_entropy), params, batch, False, None, "exact")
    functional, products = h_product(problem), []
    counted = jax.tree_util.Partial(Counted(functional.func, products), *functional.args)
    for patience, number in ((None, 5), (2, 3)):
        products.clear()
        assert layers_without_h(counted, problem, problem.layers, jax.random.key(0), patience) == {"fc5"}
        assert len(products) == number


def test_layers_that_were_not_looked_at_have_unbiased_traces():
    params = helpers.dense_layers([4, 6, 6, 6, 6, 6, 3])
    batch = {"x": helpers.normal(1, 6, 4), "label": helpers.labels(2, 3, 6)}
    deep = helpers.Problem(jh.Objective(helpers.mlp, jh.cross_entropy), params, batch)
    exact = {name: np.trace(helpers.dense(deep, "hessian", name)) for name in params}
    found = jh.layer_traces(*at(deep), key=jax.random.key(0), num_probes=256, method="split")
    assert found["fc6"].method == "exact"  # the search ends at fc3
    for name, truth in exact.items():
        assert abs(found[name].mean - truth) < 5 * found[name].std_error + 1e-4 * abs(truth), name


@pytest.mark.parametrize("slices", [False, True], ids=["layers", "slices"])
def test_many_batches_and_slices_of_arrays(steep, slices):
    halves = jh.Batches([jax.tree.map(lambda x, s=s: x[s], steep.batch) for s in (slice(0, 6), slice(6, 12))])
    parts = {"first": jh.part("fc2/w", np.s_[:, :4]), "rest": jh.part("fc2/w", np.s_[:, 4:])} if slices else None
    diagonal = np.diag(helpers.dense(steep, "hessian", "fc2"))[-100:].reshape(10, 10)  # of the kernel, behind the bias
    exact = {name: np.trace(helpers.dense(steep, "hessian", name)) for name in steep.params}
    whole = sum(exact.values())
    exact = {"first": diagonal[:, :4].sum(), "rest": diagonal[:, 4:].sum()} if slices else exact
    z = []
    for key in range(10):
        found = jh.layer_traces(*at(steep)[:2], halves, key=jax.random.key(key), num_probes=16, layers=parts)
        for name, truth in (exact | {"total": whole}).items():
            z.append((found[name].mean - truth) / max(found[name].std_error, 1e-5 * abs(truth)))
    assert np.sqrt(np.mean(np.square(z))) < 1.6 and np.abs(z).max() < 5


class Counted:
    """A product that notes its calls."""

    def __init__(self, product, calls):
        self.product, self.calls = product, calls

    def __call__(self, *args):
        self.calls.append(1)
        return self.product(*args)
