"""Logits over many classes: the numbers of formed ones, in the memory of a block."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxhess as jh
from jaxhess import logits
from jaxhess._programs import equations

CLASSES = 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three rows of seven classes in a block, so that the last one of ten is not full."""
    monkeypatch.setattr(logits, "_BLOCK", 3 * CLASSES)


def features(params, batch):
    return jnp.tanh(batch["x"] @ params["fc"]["w"])


def whole(params, batch):
    return features(params, batch) @ params["head"]["w"] + params["head"]["b"][None, None]


def parts(params, batch):
    return jh.Logits(features(params, batch), params["head"]["w"], params["head"]["b"])


def setting(dtype=np.float64):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "fc": {"w": jax.random.normal(keys[0], (4, 3), dtype)},
        "head": {
            "w": jax.random.normal(keys[1], (3, CLASSES), dtype),
            "b": jax.random.normal(keys[2], (CLASSES,), dtype),
        },
    }
    batch = {
        "x": jax.random.normal(keys[3], (2, 5, 4), dtype),
        "label": jax.random.randint(keys[4], (2, 5), 0, CLASSES),
        "weight": jax.random.uniform(keys[5], (2, 5), dtype).at[0, 1].set(0),
    }
    return params, batch


CRITERIA = {
    "plain": jh.cross_entropy,
    "weighted": jh.CrossEntropy(weights=lambda batch: batch["weight"]),
    "all": jh.CrossEntropy(
        weights=lambda batch: batch["weight"],
        smoothing=0.1,
        class_weights=tuple(range(1, CLASSES + 1)),
        temperature=1.5,
        z_loss=0.05,
    ),
}
PRODUCTS = {"hessian": jh.hessian, "ggn": jh.ggn, "functional": jh.functional_hessian}


def alike(found, wanted, rtol=1e-9):
    scale = max(1e-3, *(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), found, wanted)


@pytest.mark.parametrize("name", CRITERIA)
def test_loss_gradient_and_products_are_those_of_formed_logits(name, x64):
    params, batch = setting()
    formed, blocks = (jh.Objective(predict, CRITERIA[name]) for predict in (whole, parts))
    alike(jax.value_and_grad(blocks)(params, batch), jax.value_and_grad(formed)(params, batch))
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    for kind, product in PRODUCTS.items():
        wanted = product(formed, params, batch)(v)
        alike(product(blocks, params, batch)(v), wanted)
        alike(jh.linearize(product(blocks, params, batch), like=params)(v), wanted)
        part = jh.subtree(v, "head")
        alike(product(blocks, params, batch, layer="head")(part), product(formed, params, batch, layer="head")(part))
        if kind != "functional":  # H_head is zero, of which differences leave rounding
            assert float(jnp.abs(jax.tree.leaves(wanted)[0]).max()) > 1e-3
    # JAX 0.6 and 0.7 cannot transpose the loop twice; the products of jaxhess go forward over reverse.
    modes = ["fwd", "rev"] if jax.__version_info__ >= (0, 10) else ["fwd"]
    check_grads(lambda p: blocks(p, batch), (params,), order=2, modes=modes, rtol=1e-5)


def test_products_are_those_of_the_dense_matrices(x64):
    params, batch = setting()
    objective = jh.Objective(parts, CRITERIA["all"])
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    dense = jax.hessian(lambda x: jh.Objective(whole, CRITERIA["all"])(unravel(x), batch))(flat)
    outer = jax.hessian(lambda z: CRITERIA["all"](z, batch))(whole(params, batch)).reshape(2 * 5 * CLASSES, -1)
    jacobian = jax.jacobian(lambda x: whole(unravel(x), batch).ravel())(flat)
    for kind, matrix in {"hessian": dense, "ggn": jacobian.T @ outer @ jacobian}.items():
        product = PRODUCTS[kind](objective, params, batch)
        found = jax.vmap(lambda e, product=product: jax.flatten_util.ravel_pytree(product(unravel(e)))[0])(
            jnp.eye(len(flat), dtype=flat.dtype)
        )
        np.testing.assert_allclose(found, matrix, rtol=1e-8, atol=1e-10)


def test_a_tied_embedding(x64):
    batch = setting()[1]
    params = {"embed": {"w": jax.random.normal(jax.random.key(3), (CLASSES, 4), jnp.float64)}}

    def tied(p, b):
        return jh.Logits(jnp.tanh(p["embed"]["w"][b["label"]]), p["embed"]["w"].T)

    def tied_whole(p, b):
        return tied(p, b).features @ p["embed"]["w"].T

    blocks, formed = (jh.Objective(predict, jh.cross_entropy) for predict in (tied, tied_whole))
    for product in PRODUCTS.values():
        v = jax.tree.map(jnp.cos, params)
        alike(product(blocks, params, batch)(v), product(formed, params, batch)(v))


def test_traces_and_spectra_by_products():
    params, batch = setting(np.float32)
    formed, blocks = (jh.Objective(predict, jh.cross_entropy) for predict in (whole, parts))
    assert jh.layer_names(params, blocks, batch) == ["fc", "head"]
    for kind in PRODUCTS:
        dense = {
            name: _dense(PRODUCTS[kind](formed, params, batch, layer=name), jh.subtree(params, name))
            for name in ("fc", "head")
        }
        found = jh.layer_traces(blocks, params, batch, key=jax.random.key(1), curvature=kind, num_probes=16)
        spectra = jh.layer_spectra(blocks, params, batch, key=jax.random.key(1), curvature=kind, num_steps=30)
        for name, matrix in dense.items():
            assert abs(found[name].mean - np.trace(matrix)) < 4 * found[name].std_error + 1e-4
            np.testing.assert_allclose(np.sort(spectra[name].nodes), np.linalg.eigvalsh(matrix), atol=2e-5)


def _dense(product, like):
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    columns = [jax.flatten_util.ravel_pytree(product(unravel(e)))[0] for e in jnp.eye(len(flat))]
    return np.asarray(columns, float)


def test_the_penalty_and_many_batches():
    params, batch = setting(np.float32)
    formed, blocks = (jh.Objective(predict, jh.cross_entropy) for predict in (whole, parts))
    for curvature in ("hessian", "ggn"):
        options = {"key": jax.random.key(0), "curvature": curvature, "layers": "all"}
        value, slope = jh.hessian_trace_penalty(blocks, params, batch, **options)
        if curvature == "hessian":
            alike((value, slope), jh.hessian_trace_penalty(formed, params, batch, **options), 2e-5)
        assert np.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(slope))
    v = jax.tree.map(jnp.ones_like, params)
    halves = jh.Batches([jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(2)])
    for product in PRODUCTS.values():
        alike(product(blocks, params, halves)(v), product(formed, params, batch)(v), 1e-5)


def test_no_array_of_rows_times_classes(monkeypatch):
    """At 2,048 rows of 50,000 classes: neither in a product, nor in what is kept for many of them."""
    monkeypatch.undo()
    rows, classes = 2048, 50_000
    shapes = {"fc": {"w": (8, 8)}, "head": {"w": (8, classes), "b": (classes,)}}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    batch = {"x": jax.ShapeDtypeStruct((rows, 8), jnp.float32), "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    objective = jh.Objective(parts, jh.cross_entropy)

    def product(p, b, v):
        return jax.jvp(lambda q: jax.grad(objective)(q, b), (p,), (v,))[1]

    def gauss_newton(p, b, v):
        outputs, tangent = jax.jvp(lambda q: parts(q, b), (p,), (v,))
        return jax.vjp(lambda q: parts(q, b), p)[1](jh.cross_entropy.hessian_product(outputs, b, tangent))[0]

    def kept(p, b, v):
        return jax.linearize(lambda w: product(p, b, w), v)[1](v)

    for function in (product, gauss_newton, kept):
        traced = jax.make_jaxpr(function)(params, batch, params)
        sizes = [math.prod(x.aval.shape) for eqn, _ in equations(traced.jaxpr) for x in eqn.outvars]
        assert max(sizes) < rows * classes / 10
        found = jax.jit(function).lower(params, batch, params).compile().memory_analysis()
        if found is not None:
            assert found.temp_size_in_bytes < 4 * rows * classes / 2


def test_rows_of_a_block_and_their_order(x64):
    for rows, each in ((1, 1), (3, 3), (10, 3), (4, 2)):
        x = jnp.arange(rows * 2.0).reshape(rows, 2)
        (cut,) = logits._blocks(jh.Logits(x, jnp.ones((2, CLASSES))), [x])
        assert cut.shape[1] == each and cut.shape[0] == -(-rows // each)
        np.testing.assert_array_equal(cut.reshape(-1, 2)[:rows], x)


def test_a_label_out_of_range_is_an_error_and_nan_under_jit():
    params, batch = setting(np.float32)
    objective = jh.Objective(parts, jh.cross_entropy)
    bad = batch | {"label": batch["label"].at[1, 4].set(CLASSES)}
    with pytest.raises(ValueError, match="outside 0..6"):
        jh.hessian(objective, params, bad)
    assert np.isnan(jax.jit(objective)(params, bad))


def refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_what_needs_formed_logits_says_so():
    params, batch = setting(np.float32)
    objective, key = jh.Objective(parts, jh.cross_entropy), jax.random.key(0)
    words = "Logits, which are never formed"
    refused(lambda: jh.example_traces(objective, params, batch), ValueError, words)
    refused(lambda: jh.ggn_eigenvalues(objective, params, batch), ValueError, words)
    refused(lambda: jh.ggn_diagonal(objective, params, batch), ValueError, words)
    refused(lambda: jh.class_structure(objective, params, batch, CLASSES), ValueError, words)
    refused(
        lambda: jh.layer_traces(objective, params, batch, key=key, curvature="ggn", method="exact"), ValueError, words
    )
    refused(
        lambda: jh.layer_spectra(objective, params, batch, key=key, curvature="ggn", method="gram"), ValueError, words
    )
    soft = batch | {"label": jnp.ones((2, 5, CLASSES)) / CLASSES}
    refused(lambda: jh.hessian(objective, params, soft), TypeError, "soft labels")
    squares = jh.Objective(parts, jh.squared_error)
    refused(lambda: jh.hessian(squares, params, batch), TypeError, "CrossEntropy alone")
    turned = jh.Objective(lambda p, b: jh.Logits(features(p, b), p["head"]["w"].T), jh.cross_entropy)
    refused(lambda: jh.hessian(turned, params, batch), ValueError, r"got the shapes \(2, 5, 3\), \(7, 3\) and None")


def test_the_shape_is_that_of_the_logits():
    params, batch = setting(np.float32)
    found = parts(params, batch)
    assert found.shape == (2, 5, CLASSES) and found.ndim == 3 and found.size == 70 and len(found) == 2
    assert found.dtype == np.float32 and len(jax.tree.leaves(jh.Logits(found.features, found.kernel))) == 2
