"""Cross-entropy with all its options against formulas in numpy, and criteria of one's own without C x C blocks."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import problem

import jaxhess as jh
from jaxhess.objective import Factored, NoFactorError, factored

SHAPE = (6, 4)
OUTPUTS = helpers.normal(1, *SHAPE, scale=2)
LABELS = helpers.labels(2, 4, 6)
SOFT = helpers.softmax(helpers.normal(3, *SHAPE))
BATCH = {"label": LABELS, "soft": SOFT, "weight": np.array([0.5, 0, 1, 2, 1, 3])}
OPTIONS = {
    "plain": {},
    "smoothing": dict(smoothing=0.1),
    "temperature": dict(temperature=2.5),
    "z-loss": dict(z_loss=0.3),
    "class weights": dict(class_weights=[1, 0.5, 2, 0.1]),
    "soft labels": dict(labels=lambda batch: batch["soft"]),
    "all": dict(
        smoothing=0.2,
        temperature=0.7,
        z_loss=0.01,
        class_weights=(1, 0.5, 2, 0.1),
        weights=lambda batch: batch["weight"],
    ),
    "all, soft": dict(
        labels=lambda batch: batch["soft"],
        smoothing=0.2,
        temperature=0.7,
        z_loss=0.01,
        weights=lambda batch: batch["weight"],
    ),
}


def by_hand(outputs, batch, labels=None, smoothing=0.0, temperature=1.0, z_loss=0.0, class_weights=None, weights=None):
    """The loss by its textbook formula; autodiff of it is right where nothing saturates."""
    logits = outputs / temperature
    target = jax.nn.one_hot(batch["label"], 4) if labels is None else labels(batch)
    counts = jnp.ones(6) if labels is not None or class_weights is None else jnp.asarray(class_weights)[batch["label"]]
    target = target * (1 - smoothing) + smoothing / 4
    if class_weights is not None:
        target = target * jnp.asarray(class_weights)[None]
    lse = jax.nn.logsumexp(logits, -1)
    rows = -(target * (logits - lse[:, None])).sum(-1) + z_loss * lse**2
    w = jnp.ones(6) if weights is None else weights(batch)
    return (w * rows).sum() / (w * counts).sum()


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_slope_hessian_factor_and_third_derivative_equal_the_textbook(name, x64):
    criterion, options = jh.CrossEntropy(**OPTIONS[name]), OPTIONS[name]
    outputs, batch = helpers.cast((OUTPUTS, BATCH), jnp.float64)
    eye = jnp.eye(outputs.size).reshape(-1, *SHAPE)

    @jax.jit
    def ours(outputs, batch):
        products = [
            jax.vmap(lambda v, f=f: f(outputs, batch, v).ravel())(eye).T
            for f in (criterion.hessian_product, criterion.factor_product)
        ]
        hess = jax.hessian(criterion)(outputs, batch)
        third = jax.jacfwd(lambda o: criterion.hessian_product(o, batch, eye[5]))(outputs)
        return criterion(outputs, batch), jax.grad(criterion)(outputs, batch), hess, *products, third

    @jax.jit
    def theirs(outputs, batch):
        loss = functools.partial(by_hand, batch=batch, **options)
        third = jax.jacfwd(jax.hessian(loss))(outputs)[1, 1]  # eye[5] is entry (1, 1)
        return loss(outputs), jax.grad(loss)(outputs), jax.hessian(loss)(outputs), third

    loss, slope, hess, product, factor, third = ours(outputs, batch)
    expected = theirs(outputs, batch)
    for found, wanted in zip((loss, slope, hess, third), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-13)
    dense = np.asarray(expected[2]).reshape(24, 24)
    np.testing.assert_allclose(product, dense, atol=1e-13)
    np.testing.assert_allclose(factor @ factor.T, dense, atol=1e-13)


def test_smoothing_is_that_of_optax():
    smoothed = optax.smooth_labels(jax.nn.one_hot(LABELS, 4), 0.1)
    expected = optax.softmax_cross_entropy(OUTPUTS, smoothed).mean()
    np.testing.assert_allclose(jh.CrossEntropy(smoothing=0.1)(OUTPUTS, BATCH), expected, rtol=1e-6)


def test_labels_can_be_differentiated():
    criterion = jh.CrossEntropy(labels=lambda batch: batch["soft"])
    found = jax.grad(lambda soft: criterion(OUTPUTS, {"soft": soft}))(SOFT)
    np.testing.assert_allclose(found, -jax.nn.log_softmax(OUTPUTS) / 6, atol=1e-6)


def test_classes_ruled_out_by_minus_infinity_make_no_nan():
    outputs = jnp.asarray(OUTPUTS).at[:, 3].set(-jnp.inf)
    batch = {"label": LABELS % 3}
    for derive in (jax.grad(jh.cross_entropy), jax.hessian(jh.cross_entropy)):
        found, wanted = derive(outputs, batch), derive(OUTPUTS[:, :3], batch)
        cut = found[:, :3] if found.ndim == 2 else found[:, :3, :, :3]
        np.testing.assert_allclose(cut, wanted, atol=1e-6)
        assert np.isfinite(found).all()


def test_logits_in_bfloat16_are_taken_in_float32():
    low = jnp.asarray(OUTPUTS, jnp.bfloat16)
    full = low.astype(jnp.float32)
    assert jh.cross_entropy(low, BATCH).dtype == jnp.float32
    np.testing.assert_array_equal(jh.cross_entropy(low, BATCH), jh.cross_entropy(full, BATCH))
    np.testing.assert_allclose(
        jh.cross_entropy.hessian_product(low, BATCH, low).astype(jnp.float32),
        jh.cross_entropy.hessian_product(full, BATCH, full),
        rtol=2**-8,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(smoothing=1.0), "smoothing.*1.0"),
        (dict(smoothing=-0.1), "smoothing.*-0.1"),
        (dict(temperature=0), "temperature.*0"),
        (dict(z_loss=-1), "z_loss.*-1"),
        (dict(class_weights=[1, -1]), "class_weights.*-1"),
        (dict(class_weights=[0, 0]), "class_weights.*zero"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        jh.CrossEntropy(**options)


@pytest.mark.parametrize(
    ("options", "batch", "error", "message"),
    [
        (dict(class_weights=[1, 1]), BATCH, ValueError, "2 class_weights.*4 classes"),
        (dict(labels=lambda batch: batch["soft"]), {"soft": -SOFT}, ValueError, "soft labels.*not negative"),
        ({}, {"label": np.eye(4, dtype=int)[LABELS]}, ValueError, "one-hot labels as floats"),
    ],
)
def test_labels_and_weights_that_do_not_fit(options, batch, error, message):
    criterion = jh.CrossEntropy(**options)
    with pytest.raises(error, match=message):
        criterion.check(jax.ShapeDtypeStruct(SHAPE, jnp.float32), batch)


def test_many_batches_ask_for_the_sums_of_class_weights():
    p = problem("softmax regression")
    objective = jh.Objective(helpers.mlp, jh.CrossEntropy(class_weights=[1, 2, 3, 4]))
    with pytest.raises(ValueError, match="size="):
        jh.hessian(objective, p.params, jh.Batches([p.batch, p.batch]))
    weights = np.array([1.0, 2, 3, 4])
    parts = [jax.tree.map(lambda x, s=s: x[s], p.batch) for s in (slice(0, 4), slice(4, 7))]
    many = jh.Batches(parts, size=lambda batch: weights[batch["label"]].sum())
    one, several = (helpers.matrix(jh.hessian(objective, p.params, b), p.params) for b in (p.batch, many))
    np.testing.assert_allclose(several, one, atol=1e-6)


# ---- criteria that the library does not know ----


def smoothed(outputs, batch):
    target = optax.smooth_labels(jax.nn.one_hot(batch["label"], outputs.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(outputs, target).mean()


def weighted(outputs, batch):
    rows = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
    return (rows * jnp.arange(1.0, len(rows) + 1)).sum() / len(rows)


def huber(outputs, batch):
    return jnp.sqrt(1 + (outputs - jax.nn.one_hot(batch["label"], outputs.shape[-1])) ** 2).mean()


def binary(outputs, batch):
    target = jax.nn.one_hot(batch["label"], outputs.shape[-1])
    return optax.sigmoid_binary_cross_entropy(outputs, target).sum(-1).mean()


def with_z(outputs, batch):
    return smoothed(outputs, batch) + 0.01 * (jax.nn.logsumexp(outputs, -1) ** 2).mean()


def coupled_positions(outputs, batch):
    """Couples the positions of one example, not the examples."""
    return (outputs.sum(1) ** 2).mean()


FORMS = [
    (smoothed, "softmax"),
    (weighted, "softmax"),
    (huber, "diagonal"),
    (binary, "diagonal"),
    (with_z, "blocks"),
    (helpers.softplus_sum, "blocks"),
]


@pytest.mark.parametrize(("criterion", "form"), FORMS)
@pytest.mark.parametrize("scale", [1, 40])
def test_the_form_of_a_criterion_is_found_and_its_factor_is_right(criterion, form, scale, x64):
    """At a scale of 40 the softmax is saturated: a judge that looked there alone would find nothing but rounding."""
    outputs, batch = helpers.cast((OUTPUTS * scale, BATCH), jnp.float64)
    found = factored(criterion, outputs, batch)
    assert found == Factored(criterion, form)
    eye = jnp.eye(outputs.size).reshape(-1, *SHAPE)
    factor = jax.jit(jax.vmap(lambda v: found.factor_product(outputs, batch, v).ravel()))(eye).T
    dense = np.asarray(jax.jit(jax.hessian(criterion))(outputs, batch)).reshape(24, 24)
    np.testing.assert_allclose(factor @ factor.T, dense, atol=1e-12)


def test_a_criterion_of_many_classes_makes_no_blocks():
    outputs = helpers.normal(1, 3, 100)
    batch = {"label": helpers.labels(2, 100, 3)}
    assert factored(smoothed, outputs, batch) == Factored(smoothed, "softmax")
    assert factored(with_z, outputs, batch) is None
    assert factored(with_z, outputs, batch, max_classes=100) == Factored(with_z, "blocks")


def test_positions_of_a_sequence_are_rows_that_may_not_be_coupled():
    with pytest.raises(NoFactorError, match="couples"):
        factored(coupled_positions, helpers.normal(1, 3, 5, 70), {})


@pytest.mark.parametrize("criterion", [smoothed, binary, with_z])
def test_traces_of_many_classes_equal_the_dense_ones(criterion):
    """70 classes: with a factor in closed form, and by products where there is none."""
    params = helpers.dense_layers([3, 2, 70])
    batch = {"x": helpers.normal(1, 5, 3), "label": helpers.labels(2, 70, 5)}
    p = helpers.Problem(jh.Objective(helpers.mlp, criterion), params, batch)
    found = jh.layer_traces(p.objective, p.params, p.batch, key=jax.random.key(0), num_probes=256, curvature="ggn")
    for layer in ("fc1", "fc2", "total"):
        exact = np.trace(helpers.dense(p, "ggn", None if layer == "total" else layer))
        assert abs(found[layer].mean - exact) < 4 * found[layer].std_error < exact
