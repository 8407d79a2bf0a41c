"""Traps that users walk into: each of these once gave a wrong number, or an error that helped nobody."""

import inspect

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


# ---- a key that is none, and what cannot run under jit ----


def keyed(key):
    """Every public function with a key, called with this one."""
    hv, at = P.operator("hessian"), (P.objective, P.params, P.batch)
    return {
        "trace": lambda: jh.trace(hv, like=P.params, key=key, num_probes=2),
        "diagonal": lambda: jh.diagonal(hv, like=P.params, key=key, num_probes=2),
        "layer_interactions": lambda: jh.layer_interactions(*at, key=key, method="hutchinson", num_probes=2),
        "layer_traces": lambda: jh.layer_traces(*at, key=key, num_probes=2),
        "spectrum": lambda: jh.spectrum(hv, like=P.params, key=key, num_steps=2),
        "layer_spectra": lambda: jh.layer_spectra(*at, key=key, num_steps=2),
        "top_eigenpairs": lambda: jh.top_eigenpairs(hv, like=P.params, key=key, k=1, num_steps=2),
        "lanczos": lambda: jh.lanczos(hv, P.params, 2, restart_key=key),
        "summarize": lambda: jh.summarize(*at, key=key, num_steps=2, num_probes=2),
        "hessian_trace_penalty": lambda: jh.hessian_trace_penalty(*at, key=key),
        "add_hessian_trace": lambda: jh.add_hessian_trace(P.objective, 1.0, key=key),
        "add_noise_stability": lambda: jh.add_noise_stability(P.objective, 1.0, key=key),
    }


def test_every_function_with_a_key_is_tried():
    public = {name: value for name, value in vars(jh).items() if inspect.isfunction(value)}
    assert set(keyed(KEY)) == {
        n for n, f in public.items() if {"key", "restart_key"} & set(inspect.signature(f).parameters)
    }


@pytest.mark.parametrize("key", [0, 3.0, "seed", np.int32(7), jnp.zeros(2), jax.random.split(KEY), np.uint32(3)])
@pytest.mark.parametrize("name", keyed(KEY))
def test_what_is_no_key_is_refused_with_the_remedy(name, key):
    with pytest.raises(TypeError, match=r"key must be one JAX random key, as from jax.random.key\(0\), got"):
        keyed(key)[name]()


def test_no_key_where_one_is_needed():
    with pytest.raises(TypeError, match="got None"):
        jh.trace(P.operator("hessian"), like=P.params, key=None)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))])
def test_raw_keys_are_keys(key):
    found, typed = (keyed(k)["trace"]() for k in (key, jax.random.key(3)))
    assert found == typed


ON_THE_HOST = {
    "spectrum": (lambda p, b: keyed(KEY)["spectrum"](), "lanczos and layer_traces run inside"),
    "layer_spectra": (lambda p, b: jh.layer_spectra(P.objective, p, b, key=KEY, num_steps=2), "lanczos"),
    "gram": (
        lambda p, b: jh.layer_spectra(P.objective, p, b, key=KEY, curvature="ggn", method="gram"),
        "ggn and layer_traces",
    ),
    "top_eigenpairs": (lambda p, b: keyed(KEY)["top_eigenpairs"](), "lanczos"),
    "summarize": (lambda p, b: jh.summarize(P.objective, p, b, key=KEY, num_steps=2, num_probes=2), "layer_traces"),
    "ggn_eigenvalues": (lambda p, b: jh.ggn_eigenvalues(P.objective, p, b), "ggn and layer_traces"),
    "class_structure": (lambda p, b: jh.class_structure(P.objective, p, b, 4), "ggn and layer_traces"),
    "layer_class_structures": (lambda p, b: jh.layer_class_structures(P.objective, p, b, 4), "ggn and layer_traces"),
    "Spectrum": (lambda p, b: jh.Spectrum(b["x"][0], b["x"][0], 3), "make it outside"),
    "from_eigenvalues": (lambda p, b: jh.Spectrum.from_eigenvalues(b["x"]), "make it outside"),
    "count_outliers": (lambda p, b: jh.count_outliers(b["x"].ravel()), "make it outside"),
}


@pytest.mark.parametrize("name", ON_THE_HOST)
def test_what_works_on_the_host_says_so_under_jit(name):
    function, instead = ON_THE_HOST[name]
    with pytest.raises(TypeError, match=f"on the host and cannot run under jit, vmap or grad; .*{instead}"):
        jax.jit(function)(P.params, P.batch)
