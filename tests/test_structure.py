"""Exact eigenvalues of G from its Gram matrix, against dense matrices."""

import helpers
import jax
import jax.flatten_util
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
    "conv, batch norm",
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


@pytest.mark.parametrize("image, label, stats", [("image", "label", "batch_stats"), (0, 1, 2)])
def test_statistics_may_be_as_long_as_the_batch(image, label, stats, x64):
    """They are not taken for one entry an example: each example is then differentiated alone, in 6 passes, not 24."""
    draw = np.random.default_rng(0).standard_normal
    batch = {image: draw((6, 3)), label: np.arange(6) % 4, stats: {"mean": draw(6), "scale": draw(6)}}
    batch = batch if image else tuple(batch.values())

    def predict(params, batch):
        mean, scale = (batch[stats][name][None] for name in ("mean", "scale"))
        return jnp.tanh((batch[image] @ params["a"] - mean) * scale) @ params["b"]

    objective = jh.Objective(predict, jh.CrossEntropy(labels=lambda batch: batch[label]))
    params, calls = {"a": draw((3, 6)), "b": draw((6, 4))}, []
    found = jh.ggn_eigenvalues(objective, params, batch, progress=lambda *args: calls.append(args))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    ggn = jh.ggn(objective, params, batch)
    dense = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(ggn(unravel(v)))[0])(np.eye(len(flat)))
    np.testing.assert_allclose(found, nonzero_eigenvalues(dense), rtol=1e-8, atol=1e-14)
    assert calls[-1] == (6, 6)


def test_lenet_in_float32():
    """20 rows, of which softmax leaves 18; rounding is not counted as rank."""
    p = problem("lenet")
    found = jh.ggn_eigenvalues(p.objective, p.params, p.batch, layer="conv1")
    exact = nonzero_eigenvalues(helpers.block_ggn(p, "conv1"), 1e-6)
    np.testing.assert_allclose(found[: len(exact)], exact, rtol=1e-3, atol=1e-6 * exact[0])
    assert len(exact) <= len(found) <= 18


@pytest.mark.parametrize(("name", "layer"), [("lenet", "conv2"), ("conv, batch statistics", "conv")])
def test_lanczos_finds_the_same_in_float32(name, layer):
    p = problem(name)
    for block in (None, layer):
        like = p.params if block is None else jh.subtree(p.params, block)
        ggn = jh.ggn(p.objective, p.params, p.batch, layer=block)
        values, _, _ = jh.top_eigenpairs(ggn, like=like, key=jax.random.key(0), k=5)
        found = jh.ggn_eigenvalues(p.objective, p.params, p.batch, layer=block)
        np.testing.assert_allclose(found[:5], values, rtol=1e-4)


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


# ---- classes ----


def example_vectors(p, layer):
    """All d_i,c' = J_i' (e_c' - p_i), (rows, C, dim), of a row of the outputs each, with p (rows, C) and labels."""
    flat, unravel = jax.flatten_util.ravel_pytree(p.params)
    outputs = p.objective.predict(p.params, p.batch)
    classes = outputs.shape[-1]
    slopes = jax.jacrev(lambda w: p.objective.predict(unravel(w), p.batch).reshape(-1, classes))(flat)
    slopes = np.asarray(slopes)[:, :, helpers.positions(p.params, layer)]
    probabilities = helpers.softmax(np.asarray(outputs).reshape(-1, classes))
    centred = np.eye(classes) - probabilities[:, None]  # e_c' - p_i
    return np.einsum("ikc,icd->ikd", centred, slopes), probabilities, np.ravel(p.batch["label"])


def parts_by_hand(vectors, weights, labels):
    """The definitions, example by example: weights, delta_c,c', delta_c, and the parts as dense matrices."""
    classes, dim = vectors.shape[1:]
    w, pairs, means = np.zeros((classes, classes)), np.zeros((classes, classes, dim)), np.zeros((classes, dim))
    parts = {name: np.zeros((dim, dim)) for name in ("class", "cross_class", "within_class", "same_class")}
    for c in range(classes):
        mine = np.flatnonzero(labels == c)
        for k in range(classes):
            w[c, k] = weights[mine, k].sum()
            pairs[c, k] = sum(weights[i, k] * vectors[i, k] for i in mine) / w[c, k]
        others = [k for k in range(classes) if k != c]
        total = w[c, others].sum()
        means[c] = sum(w[c, k] * pairs[c, k] for k in others) / total
        parts["class"] += total * np.outer(means[c], means[c])
        for k in others:
            parts["cross_class"] += w[c, k] * np.outer(pairs[c, k] - means[c], pairs[c, k] - means[c])
            for i in mine:
                rest = vectors[i, k] - pairs[c, k]
                parts["within_class"] += weights[i, k] * np.outer(rest, rest)
        for i in mine:
            parts["same_class"] += weights[i, c] * np.outer(vectors[i, c], vectors[i, c])
    return w, pairs, means, parts


def labelled(name):
    """A problem with every class among its labels."""
    p = problem(name)
    classes = jax.eval_shape(p.objective.predict, p.params, p.batch).shape[-1]
    label = np.arange(p.batch["label"].size, dtype=np.int32).reshape(p.batch["label"].shape)
    return helpers.Problem(p.objective, p.params, p.batch | {"label": label % classes})


@pytest.mark.parametrize("weighting", ["p", "legacy_sqrt_p"])
@pytest.mark.parametrize(
    ("name", "layer"),
    [("softmax regression", None), ("mlp", None), ("mlp", "fc1"), ("sequence", None), ("batch norm", "norm")],
)
def test_classes_by_their_definitions(name, layer, weighting, x64):
    p = labelled(name).cast(jnp.float64)
    vectors, probabilities, labels = example_vectors(p, layer)
    weights = probabilities / len(labels)
    if weighting == "legacy_sqrt_p":
        vectors, weights = vectors * np.sqrt(probabilities)[..., None], np.full_like(weights, 1 / len(labels))
    w, pairs, means, parts = parts_by_hand(vectors, weights, labels)
    classes = vectors.shape[1]
    found = jh.class_structure(p.objective, p.params, p.batch, classes, layer, weighting=weighting)

    np.testing.assert_allclose(found.weights, w, rtol=1e-10)
    together = np.concatenate([pairs.reshape(classes**2, -1), means])
    coordinates = np.concatenate([found.pairs.reshape(classes**2, -1), found.classes])
    scale = np.abs(together @ together.T).max()
    np.testing.assert_allclose(coordinates @ coordinates.T, together @ together.T, atol=1e-9 * scale)
    ggn = helpers.dense(p, "ggn", layer)
    np.testing.assert_allclose(sum(parts.values()), ggn, atol=1e-12 * np.abs(ggn).max())
    for part, matrix in (parts | {"total": ggn}).items():
        assert found.traces[part] == pytest.approx(np.trace(matrix), rel=1e-9, abs=1e-12)
        exact = np.linalg.eigvalsh(matrix)[::-1]
        values = found.eigenvalues[part]
        np.testing.assert_allclose(values, exact[: len(values)], atol=1e-10 * np.abs(ggn).max())
        np.testing.assert_allclose(exact[len(values) :], 0, atol=1e-10 * np.abs(ggn).max())


def test_over_all_outputs_the_weighted_mean_is_zero_and_over_the_others_it_is_not(x64):
    p = labelled("mlp").cast(jnp.float64)
    found = jh.class_structure(p.objective, p.params, p.batch, 3)
    everything = np.einsum("ck,ckr->cr", found.weights, found.pairs)
    np.testing.assert_allclose(everything, 0, atol=1e-6 * np.abs(found.pairs).max())
    assert (np.linalg.norm(found.classes, axis=1) > 0.1).all()


def test_all_layers_from_one_pass():
    p = labelled("mlp")
    found = jh.layer_class_structures(p.objective, p.params, p.batch, 3)
    assert list(found) == ["fc1", "fc2", "total"]
    for layer in ("fc1", "fc2", None):
        one = jh.class_structure(p.objective, p.params, p.batch, 3, layer)
        many = found[layer or "total"]
        for part, trace in one.traces.items():
            assert many.traces[part] == pytest.approx(trace, rel=1e-4)
    parts = ("class", "cross_class", "within_class", "same_class")
    for structure in found.values():
        assert sum(structure.traces[part] for part in parts) == pytest.approx(structure.traces["total"], rel=1e-5)
    for part in (*parts, "total"):
        assert found["fc1"].traces[part] + found["fc2"].traces[part] == pytest.approx(found["total"].traces[part])


def test_probabilities_that_underflow_leave_zeros_not_nan():
    p = labelled("mlp")
    params = jax.tree.map(lambda x: 100 * x, p.params)
    found = jh.class_structure(p.objective, params, p.batch, 3)
    assert found.weights.min() == 0
    for values in (found.pairs, found.classes, *found.traces.values(), *found.eigenvalues.values()):
        assert np.isfinite(values).all()


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
        (lambda p: jh.class_structure(p.objective, p.params, p.batch, 4), ValueError, "num_classes = 4.*have 3"),
        (
            lambda p: jh.class_structure(p.objective, p.params, p.batch | {"label": np.zeros(7, np.int32)}, 3),
            ValueError,
            r"classes \[1, 2\] have no example",
        ),
        (
            lambda p: jh.class_structure(p.objective, p.params, p.batch, 3, weighting="q"),
            ValueError,
            "unknown weighting 'q'",
        ),
        (
            lambda p: jh.class_structure(jh.Objective(helpers.mlp, helpers.softplus_sum), p.params, p.batch, 3),
            TypeError,
            "classes are those of cross-entropy",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(problem("mlp"))
