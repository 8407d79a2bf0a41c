"""Criteria: closed forms against autodiff and formulas, factors, and what is refused."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh
from jaxhess.objective import as_criterion, factored

SHAPES = [(5, 3), (2, 3, 4), (3,), (4, 1)]


def cross_entropy_data(shape):
    return helpers.normal(1, *shape, scale=2), {"label": helpers.labels(2, shape[-1], *shape[:-1])}


def squared_error_data(shape):
    return helpers.normal(1, *shape), {"label": helpers.normal(2, *shape)}


def weighted_data(shape):
    """The first row is padding, with a label that is none, where there are others."""
    outputs, batch = cross_entropy_data(shape)
    weights = np.random.default_rng(3).uniform(0.1, 2, shape[:-1])
    if len(weights.ravel()) > 1:
        weights.flat[0], batch["label"].flat[0] = 0, -100
    return outputs, batch | {"weight": weights}


KNOWN = {
    "cross-entropy": (jh.cross_entropy, cross_entropy_data),
    "weighted cross-entropy": (jh.CrossEntropy(weights=lambda batch: batch["weight"]), weighted_data),
    "squared error": (jh.squared_error, squared_error_data),
}


def plain(criterion):
    """The same function without its closed forms."""
    return lambda outputs, batch: criterion(outputs, batch)


@functools.partial(jax.jit, static_argnums=0)
def curvature(criterion, outputs, batch):
    """S by jax.hessian, S and B by the library's products: matrices over all entries of the outputs."""
    eye = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
    products = [
        jax.vmap(lambda t, f=f: f(outputs, batch, t))(eye).reshape(outputs.size, outputs.size).T
        for f in (as_criterion(criterion).hessian_product, as_criterion(criterion).factor_product)
    ]
    return jax.hessian(criterion)(outputs, batch).reshape(outputs.size, outputs.size), *products


@pytest.fixture(params=KNOWN)
def known(request, x64):
    """A criterion with closed forms, and its data of a shape in float64."""
    criterion, data = KNOWN[request.param]
    return criterion, lambda shape: helpers.cast(data(shape), jnp.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [lambda criterion: criterion, plain])
def test_closed_forms_and_autodiff_equal_the_dense_hessian(known, shape, form):
    criterion, data = known
    dense, hessian, factor = curvature(form(criterion), *data(shape))
    np.testing.assert_allclose(hessian, dense, atol=1e-14)
    np.testing.assert_allclose(factor @ factor.T, dense, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_formulas(shape):
    outputs, batch = cross_entropy_data(shape)
    picked = np.take_along_axis(helpers.softmax(outputs), batch["label"][..., None], -1)
    np.testing.assert_allclose(jax.jit(jh.cross_entropy)(outputs, batch), -np.log(picked).mean(), rtol=1e-5)
    outputs, batch = squared_error_data(shape)
    squares = (outputs - batch["label"]) ** 2
    expected = (squares.sum(-1) if squares.ndim > 1 else squares).mean()  # one axis: rows of one output
    np.testing.assert_allclose(jax.jit(jh.squared_error)(outputs, batch), expected, rtol=1e-5)


def test_cross_entropy_hessian_is_the_formula(x64):
    outputs, batch = helpers.cast(cross_entropy_data((4, 3)), jnp.float64)
    found = np.asarray(curvature(jh.cross_entropy, outputs, batch)[1]).reshape(4, 3, 4, 3)
    for n, block in enumerate(helpers.cross_entropy_hessians(np.asarray(outputs))):
        np.testing.assert_allclose(found[n, :, n], block / 4, atol=1e-15)
        assert not np.delete(found[n], n, axis=1).any()


def test_labels_may_be_anywhere():
    outputs, batch = cross_entropy_data((5, 3))
    moved = jh.CrossEntropy(labels=lambda batch: batch[1])
    assert moved(outputs, (None, batch["label"])) == jh.cross_entropy(outputs, batch)
    one_hot = jh.SquaredError(labels=lambda batch: jax.nn.one_hot(batch["label"], 3))
    expected = ((outputs - np.eye(3)[batch["label"]]) ** 2).sum(-1).mean()
    np.testing.assert_allclose(one_hot(outputs, batch), expected, rtol=1e-5)


def test_a_mask_is_the_mean_over_what_it_leaves():
    outputs, batch = cross_entropy_data((2, 5, 3))
    mask = np.array([[True] * 5, [True, False, False, True, False]])
    masked = jh.CrossEntropy(weights=lambda batch: batch["label"] >= 0)
    padded = {"label": np.where(mask, batch["label"], -100)}
    left, labels = outputs[mask], {"label": batch["label"][mask]}
    np.testing.assert_allclose(masked(outputs, padded), jh.cross_entropy(left, labels), rtol=1e-6)
    masked.check(outputs, padded)
    gradient = jax.jit(jax.grad(masked))(outputs, padded)
    np.testing.assert_allclose(gradient[mask], jax.grad(jh.cross_entropy)(left, labels), atol=1e-7)
    assert not gradient[~mask].any()


def test_weights_that_are_known_inside_a_tracing():
    p = problem("mlp")
    batch = p.batch | {"weight": np.ones(p.batch["label"].shape, np.float32)}
    weighted = jh.Objective(p.objective.predict, jh.CrossEntropy(weights=lambda batch: batch["weight"]))
    found = jax.jit(lambda params: jh.hessian(weighted, params, batch)(params))(p.params)
    expected = jh.hessian(p.objective, p.params, p.batch)(p.params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
    batch["weight"][0] = -1
    with pytest.raises(ValueError, match="negative"):
        jax.jit(lambda params: jh.hessian(weighted, params, batch)(params))(p.params)


@pytest.mark.parametrize(
    ("weights", "label", "message"),
    [
        ([1.0, 1.0, 1.0], 0, r"weights of shape \(3,\).*\(2, 3\).*\(2,\)"),
        ([1.0, -1.0], 0, "negative"),
        ([0.0, 0.0], 0, "all zero"),
        ([1.0, np.nan], 0, "not finite"),
        ([1.0, 0.5], 3, r"labels run from 0 to 3, outside 0\.\.2"),
    ],
)
def test_weights_that_make_no_mean(weights, label, message):
    criterion = jh.CrossEntropy(weights=lambda batch: batch["weight"])
    with pytest.raises(ValueError, match=message):
        criterion.check(jnp.zeros((2, 3)), {"label": np.array([0, label]), "weight": np.array(weights)})


def test_underflowing_probabilities_have_a_finite_factor_and_derivative():
    """sqrt(softmax) has an infinite derivative there, which once made the penalty's gradient NaN."""
    outputs, batch = jnp.array([[0.0, -300.0, -800.0], [1000.0, 0.0, 0.0]]), {"label": np.array([0, 0])}

    def squared(outputs):
        return jnp.sum(jh.cross_entropy.factor_product(outputs, batch, jnp.ones_like(outputs)) ** 2)

    assert helpers.softmax(np.asarray(outputs)).min() == 0
    for value in jax.jit(jax.value_and_grad(squared))(outputs):
        assert np.isfinite(value).all()


# ---- criteria that the library does not know ----


def smooth_huber(outputs, batch):
    """sqrt(1 + r^2) - 1: convex, with another curvature in each row."""
    return (jnp.sqrt(1 + (outputs - batch["label"]) ** 2) - 1).sum(-1).mean()


def first_output_only(outputs, batch):
    """Singular blocks."""
    return ((outputs[..., 0] - batch["label"][..., 0]) ** 2).mean()


def cosine(outputs, batch):
    """Not convex."""
    return jnp.cos(outputs).sum(-1).mean()


def squared_mean(outputs, batch):
    """Couples the rows."""
    return jnp.sum(outputs.mean(0) ** 2)


@pytest.mark.parametrize(("criterion", "shape"), [(smooth_huber, (2, 3, 4)), (first_output_only, (5, 3))])
def test_any_convex_criterion_has_its_hessian_and_factor(criterion, shape, x64):
    outputs, batch = helpers.cast(squared_error_data(shape), jnp.float64)
    factored(criterion, outputs, batch)
    dense, hessian, factor = curvature(criterion, outputs, batch)
    np.testing.assert_allclose(hessian, dense, atol=1e-15)
    np.testing.assert_allclose(factor @ factor.T, dense, atol=1e-15)


@pytest.mark.parametrize(
    ("criterion", "message", "classes"),
    [(cosine, "not convex", 3), (squared_mean, "couples", 2), (squared_mean, "couples", 3)],
)
def test_a_factor_is_refused_where_there_is_none(criterion, message, classes):
    outputs = helpers.normal(1, 5, classes)
    with pytest.raises(ValueError, match=f"{criterion.__name__}.*{message}.*curvature='hessian'"):
        factored(criterion, outputs, None)
    product = jax.jit(lambda outputs: as_criterion(criterion).factor_product(outputs, None, outputs))(outputs)
    assert np.isnan(product).all()  # where the outputs are not known


def scaled(criterion):
    """In units in which it is a million times smaller."""
    return lambda outputs, batch: 1e-6 * criterion(outputs, batch)


@pytest.mark.parametrize(("criterion", "message"), [(cosine, "not convex"), (squared_mean, "couples")])
def test_a_factor_is_refused_in_any_units(criterion, message):
    with pytest.raises(ValueError, match=message):
        factored(scaled(criterion), helpers.normal(1, 5, 3), None)


def test_a_factor_is_taken_in_any_units_and_where_the_curvature_vanishes():
    """Log-sum-exp of logits so far apart that its Hessian is rounding."""

    def by_hand(outputs, batch):
        return (jax.nn.logsumexp(outputs, -1) - outputs[..., 0]).mean()

    for factor in (1, 30, 1000):
        outputs = factor * helpers.normal(1, 50, 10)
        for criterion in (by_hand, scaled(by_hand)):
            factored(criterion, outputs, None)


@pytest.mark.parametrize("criterion", [cosine, squared_mean])
def test_only_what_needs_the_factor_refuses(criterion):
    p = problem("softmax regression")
    objective, key = jh.Objective(helpers.mlp, criterion), jax.random.key(0)
    for refused in (
        lambda: jh.layer_traces(objective, p.params, p.batch, key=key, curvature="ggn"),
        lambda: jh.ggn_eigenvalues(objective, p.params, p.batch),
        lambda: jh.layer_spectra(objective, p.params, p.batch, key=key, curvature="ggn", method="gram"),
    ):
        with pytest.raises(ValueError, match=criterion.__name__):
            refused()
    own = helpers.Problem(objective, p.params, p.batch)
    found = helpers.matrix(own.operator("ggn"), p.params)
    assert helpers.distance(found, helpers.dense(own, "ggn")) < 1e-4


# ---- what is refused ----


@pytest.mark.parametrize(
    ("criterion", "outputs", "batch", "error", "message"),
    [
        (jh.cross_entropy, (4, 3), {"label": np.zeros(4)}, TypeError, "integer labels, got float"),
        (jh.cross_entropy, (4, 3), {"label": np.zeros((4, 1), int)}, ValueError, r"\(4, 1\).*\(4, 3\).*\(4,\)"),
        (jh.cross_entropy, (4, 3), {"y": np.zeros(4, int)}, ValueError, r"no labels.*'y'.*CrossEntropy\(labels="),
        (jh.cross_entropy, (4, 3), (np.zeros(4),), ValueError, r"no labels.*tuple.*labels="),
        (jh.squared_error, (4, 1), {"label": np.zeros(4)}, ValueError, r"\(4, 1\), got \(4,\).*one_hot"),
        (jh.squared_error, (4,), {"label": np.zeros((4, 1))}, ValueError, r"\(4,\), got \(4, 1\)"),
        (jh.squared_error, (4, 3), {"target": np.zeros((4, 3))}, ValueError, r"no labels.*SquaredError\(labels="),
    ],
)
def test_labels_that_do_not_fit(criterion, outputs, batch, error, message):
    with pytest.raises(error, match=message):
        criterion(jnp.zeros(outputs), batch)


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_labels_out_of_range(label):
    outputs, batch = jnp.zeros((2, 3)), {"label": jnp.array([0, label])}
    with pytest.raises(ValueError, match=r"labels run from .*outside 0\.\.2 for 3 outputs"):
        jh.cross_entropy.check(outputs, batch)
    assert np.isnan(jax.jit(jh.cross_entropy)(outputs, batch))


# ---- Objective ----


def test_an_objective_is_its_two_functions():
    p = problem("mlp")
    assert p.objective(p.params, p.batch) == jh.cross_entropy(helpers.mlp(p.params, p.batch), p.batch)
    same = jh.Objective(helpers.mlp, jh.CrossEntropy())
    assert same == p.objective and hash(same) == hash(p.objective)
    assert same != jh.Objective(helpers.mlp, jh.squared_error)


def test_a_criterion_of_ones_own_in_half_precision():
    def predict(params, batch):
        return (batch["x"] @ params["w"]).astype(jnp.bfloat16)

    objective = jh.Objective(predict, lambda outputs, batch: jnp.mean(jnp.sum(outputs.astype(jnp.float32) ** 2, -1)))
    params, batch = {"w": jnp.ones((2, 3))}, {"x": jnp.eye(2)}
    traces = jh.layer_traces(objective, params, batch, key=jax.random.key(0), num_probes=16, curvature="ggn")
    assert traces["total"].mean == pytest.approx(6.0, rel=0.05)


@dataclasses.dataclass(frozen=True)
class ClassWeights:
    """A criterion of one's own whose weights are not those of examples."""

    weights: tuple[float, ...] = (1.0, 2.0, 3.0)

    def __call__(self, outputs, batch):
        return jnp.mean(outputs**2 * jnp.array(self.weights)[None])


def test_batches_of_weighted_examples_need_their_sums():
    objective = jh.Objective(lambda p, b: b["x"] @ p, jh.CrossEntropy(weights=lambda b: b["weight"]))
    rows = {"x": np.eye(4, dtype=np.float32), "label": np.array([0, 1, 2, 0]), "weight": np.ones(4, np.float32)}
    padded = rows | {"weight": np.array([1, 0, 0, 0], np.float32)}
    params = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="the sum of the weights"):
        jh.hessian(objective, params, jh.Batches([rows, padded]))
    found = jh.hessian(objective, params, jh.Batches([rows, padded], size=lambda b: b["weight"].sum()))
    joined = {name: np.concatenate([rows[name], padded[name]]) for name in rows}
    jh.hessian(jh.Objective(objective.predict, ClassWeights()), params, jh.Batches([rows, padded]))  # of another kind
    v = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_allclose(found(v), jh.hessian(objective, params, joined)(v), rtol=1e-5, atol=1e-6)
