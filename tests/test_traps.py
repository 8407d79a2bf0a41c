"""Traps that users walk into: each of these once gave a wrong number, or an error that helped nobody."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import OPERATORS, problem

import jaxhess as jh

KEY = jax.random.key(0)
P = problem("softmax regression")


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_label_out_of_range_is_nan_under_jit(kind):
    bad = P.batch | {"label": P.batch["label"] + 4}
    found = jax.jit(lambda batch: OPERATORS[kind](P.objective, P.params, batch)(P.params))(bad)
    assert np.isnan(helpers.ravel(found)).any()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_bad_label_in_a_later_batch_is_named(curvature):
    many = jh.Batches([P.batch, P.batch | {"label": P.batch["label"] + 4}])
    with pytest.raises(ValueError, match="labels run from"):
        jh.layer_traces(P.objective, P.params, many, key=KEY, curvature=curvature, num_probes=2)


def test_a_batch_closed_over_under_jit():
    batch = jax.tree.map(jnp.asarray, P.batch)
    found = jax.jit(lambda params: jh.hessian(P.objective, params, batch)(params))(P.params)
    np.testing.assert_allclose(helpers.ravel(found), helpers.ravel(P.operator("hessian")(P.params)), rtol=1e-5)


def test_labels_of_a_narrow_type():
    outputs = helpers.normal(0, 3, 256)
    narrow, wide = ({"label": np.array([0, 7, 255], dtype)} for dtype in (np.uint8, np.int32))
    assert jh.cross_entropy(outputs, narrow) == jh.cross_entropy(outputs, wide)


def test_outputs_of_one_axis_are_rows():
    assert jh.squared_error(jnp.ones(12), {"label": jnp.zeros(12)}) == 1


def test_the_output_hessian_keeps_its_digits_at_saturation(x64):
    outputs, tangent = 60 * helpers.normal(0, 4, 3), helpers.normal(1, 4, 3)
    batch = {"label": np.array([0, 1, 2, 0])}
    fine, coarse = (
        jh.cross_entropy.hessian_product(jnp.asarray(outputs, d), batch, jnp.asarray(tangent, d))
        for d in (jnp.float64, jnp.float32)
    )
    np.testing.assert_allclose(coarse, fine, rtol=1e-3, atol=1e-30)


def test_examples_that_meet_only_in_the_slopes(x64):
    """Batch norm whose scale starts at zero: the outputs do not tell that examples interact."""

    def predict(params, batch):
        h = batch["x"]
        normed = (h - h.mean(0)[None]) / jnp.sqrt(h.var(0) + 1e-5)[None]
        return h @ params["fc"]["w"] + (normed * params["bn"]["scale"][None]) @ jnp.eye(3, 4)

    params = {"fc": {"w": helpers.normal(2, 3, 4)}, "bn": {"scale": np.zeros(3, np.float32)}}
    p = helpers.Problem(jh.Objective(predict, jh.cross_entropy), params, P.batch)
    exact = np.linalg.eigvalsh(helpers.dense(p, "ggn", "bn"))[::-1]
    found = jh.ggn_eigenvalues(p.objective, p.params, p.batch, layer="bn")
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_a_convex_criterion_on_a_net_trained_to_the_end():
    def own(outputs, batch):
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), batch["label"][:, None], 1).mean()

    params = {"fc": {"w": 60 * jnp.eye(3)}}
    batch = {"x": jnp.eye(3), "label": jnp.arange(3)}
    objective = jh.Objective(lambda p, b: b["x"] @ p["fc"]["w"], own)
    found = jh.layer_traces(objective, params, batch, key=KEY, curvature="ggn", num_probes=2)
    assert abs(found["total"].mean) < 1e-5


def test_two_modules_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two modules have the same name 'a/b'"):
        jh.layer_names({"a/b": {"w": jnp.ones(2)}, "a": {"b": {"w": jnp.ones(3)}}})


def test_a_table_for_a_criterion_that_is_not_convex():
    objective = jh.Objective(helpers.mlp, lambda outputs, batch: jnp.cos(outputs).sum(-1).mean())
    table = jh.summarize(objective, P.params, P.batch, key=KEY, num_probes=4, num_steps=4)
    assert table["total"].ggn_trace is None and " - " in str(table)


def test_inside_jit_with_nothing_traced_among_the_arguments():
    hv = P.operator("hessian")
    outside = jh.trace(hv, like=P.params, key=KEY, num_probes=4)
    inside = jax.jit(lambda: jh.trace(hv, like=P.params, key=KEY, num_probes=4).mean)()
    np.testing.assert_allclose(inside, outside.mean, rtol=1e-5)
    alphas = jax.jit(lambda: jh.lanczos(hv, P.params, 3).alphas)()
    np.testing.assert_allclose(alphas, jh.lanczos(hv, P.params, 3).alphas, rtol=1e-4)


def test_a_tolerance_takes_enough_probes_to_be_believed():
    found = jh.trace(lambda v: v, like=jnp.zeros(4), key=KEY, num_probes=1, rtol=0.5)
    assert found.num_probes >= 8
    with pytest.raises(ValueError, match="tolerances"):
        jh.trace(lambda v: v, like=jnp.zeros(4), key=KEY, rtol=float("nan"))


def test_aux_that_is_not_there():
    with pytest.raises(TypeError, match="has_aux=True takes a function that returns"):
        jh.hessian(P.objective.predict, P.params, P.batch, has_aux=True)


def test_one_batch_in_place_of_many():
    with pytest.raises(TypeError, match=r"Batches\(\[batch\]\)"):
        jh.Batches(P.batch)
