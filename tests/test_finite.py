"""Products by central differences: against exact ones, with their error, and for nets that have no others."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_groups
from jax.flatten_util import ravel_pytree
from test_errors import ATTENTION, TRUE

import jaxhess as jh
from jaxhess._finite import finite_step
from jaxhess.problem import pose

KEY = jax.random.key(0)
AT = (ATTENTION.objective, ATTENTION.params, ATTENTION.batch)
EXACT = (TRUE.objective, TRUE.params, TRUE.batch)
FINITE = {"hessian": jh.hessian, "ggn": jh.ggn, "functional": jh.functional_hessian}


def problem(name):
    return test_groups.problem("plain") if name == "gpt" else helpers.problem(name)


@pytest.mark.parametrize("name", ["lenet", "mlp", "gpt", "batch norm"])
def test_the_largest_eigenvalue_and_its_printed_error(name):
    """LeNet has kinks: a step that crosses none is too short for float32, so gradients are taken in float64."""
    one = problem(name)
    at = one.objective, one.params, one.batch
    exact, _, _ = jh.top_eigenpairs(jh.hessian(*at), like=one.params, key=KEY, k=2, num_steps=30)
    operator = jh.hessian(*at, differentiation="finite")
    found, _, residuals = jh.top_eigenpairs(operator, like=one.params, key=KEY, k=2, num_steps=30)
    assert np.abs(found - exact).max() <= 1e-5 * exact[0]
    assert (np.abs(found - exact) <= residuals + 1e-6 * exact[0]).all()


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_in_float32_the_error_is_larger_and_says_so(name):
    """As under jit, and for functions that insist on float32."""
    one = problem(name)

    def predict(params, batch):
        return one.objective.predict(jax.tree.map(narrow, params), batch)

    narrowed = jh.Objective(predict, one.objective.criterion), one.params, one.batch
    step = finite_step("hessian", pose("hessian", *narrowed, differentiation="finite"), wide=True)
    assert not step.wide and 1e-6 < step.error < 1e-3
    operator = jh.hessian(*narrowed, differentiation="finite")
    found, _, residuals = jh.top_eigenpairs(operator, like=one.params, key=KEY, k=1, num_steps=30)
    true = np.linalg.eigvalsh(helpers.matrices(one)["hessian"])[-1]
    assert abs(found[0] - true) <= residuals[0] and residuals[0] < 0.02 * true
    assert abs(found[0] - true) < 1e-3 * true


@jax.custom_jvp
def narrow(x):
    if x.dtype != jnp.float32:
        raise TypeError("a kernel for float32 only")
    return x


narrow.defjvp(lambda primals, tangents: (narrow(*primals), tangents[0]))


@pytest.mark.parametrize("which", FINITE)
@pytest.mark.parametrize("layer", [None, "k", ["q", "out"]])
def test_products_of_a_net_without_forward_mode(which, layer):
    operator = FINITE[which](*AT, layer=layer, differentiation="finite")
    like = ATTENTION.params if layer is None else jh.subtree(ATTENTION.params, layer)
    true = FINITE[which](*EXACT, layer=layer)
    v = jax.tree.map(lambda x: x + 0.3, like)
    found, expected = (np.asarray(ravel_pytree(f(v))[0]) for f in (operator, true))
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()
    inside = jax.jit(lambda p, v: FINITE[which](AT[0], p, AT[2], layer=layer, differentiation="finite")(v))
    assert np.abs(ravel_pytree(inside(AT[1], v))[0] - expected).max() < 1e-3 * np.abs(expected).max()


def test_over_batches_and_scaled_vectors():
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], ATTENTION.batch) for i in range(3)]
    operator = jh.hessian(*AT[:2], jh.Batches(parts), differentiation="finite")
    for scale in (1e-12, 1.0, 1e12):
        v = jax.tree.map(lambda x, s=scale: s * (x + 0.3), ATTENTION.params)
        found, expected = (np.asarray(ravel_pytree(f(v))[0]) for f in (operator, jh.hessian(*EXACT)))
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    exact, negative = (
        jh.hessian(*EXACT),
        lambda v: jax.tree.map(jnp.negative, jh.hessian(*AT, differentiation="finite")(v)),
    )
    lowest = jh.top_eigenpairs(negative, like=AT[1], key=KEY, k=1, num_steps=64)[0][0]
    assert np.isclose(-lowest, np.linalg.eigvalsh(helpers.dense(TRUE, "hessian"))[0], rtol=1e-3)
    scale = jax.tree.map(lambda x: 1 + x**2, AT[1])
    pairs = [jh.top_eigenpairs(jh.precondition(h, scale), like=AT[1], key=KEY, k=1)[0] for h in (operator, exact)]
    assert np.isclose(*pairs, rtol=1e-4)
    zero = operator(jax.tree.map(jnp.zeros_like, ATTENTION.params))
    assert not any(x.any() for x in jax.tree.leaves(zero))


def test_traces_spectra_interactions_and_a_summary_of_a_net_without_forward_mode():
    options = dict(key=KEY, differentiation="finite")
    whole = helpers.dense(TRUE, "hessian")
    traces = jh.layer_traces(*AT, num_probes=200, method="hutchinson", **options)
    spectra = jh.layer_spectra(*AT, num_steps=64, **options)
    table = jh.summarize(*AT, **options)
    for layer in ("q", "k", "v", "out", "total"):
        true = whole if layer == "total" else helpers.dense(TRUE, "hessian", layer)
        assert abs(traces[layer].mean - np.trace(true)) < 4 * traces[layer].std_error + 1e-3 * np.trace(whole)
        values = np.linalg.eigvalsh(true)
        assert abs(spectra[layer].lambda_max - values[-1]) <= spectra[layer].residuals[-1] + 1e-6
        assert np.isclose(spectra[layer].lambda_max, values[-1], rtol=1e-3)
        assert np.isclose(table[layer].lambda_max, values[-1], rtol=1e-3)
        assert table[layer].trace.mean == pytest.approx(np.trace(true), abs=4 * table[layer].trace.std_error + 1e-3)
    found = jh.layer_interactions(*AT, curvature="hessian", num_probes=200, **options)
    assert abs(found.norms.sum() - np.sum(whole**2)) < 0.1 * np.sum(whole**2)


def test_a_step_of_ones_own():
    """Truncation falls with its square, and the residual follows."""
    one = helpers.problem("mlp")
    true = np.linalg.eigvalsh(helpers.matrices(one)["hessian"])[-1]
    errors = []
    for step in (0.2, 0.02):
        operator = jh.hessian(one.objective, one.params, one.batch, differentiation=step)
        found, _, residuals = jh.top_eigenpairs(operator, like=one.params, key=KEY, k=1)
        errors.append(abs(found[0] - true))
        assert errors[-1] <= residuals[0]
    assert 50 < errors[0] / errors[1] < 200


def test_layers_that_are_zero():
    """Their step is that of the other layers: there is no size of their own."""
    one = helpers.problem("mlp")
    params = one.params | {"fc2": jax.tree.map(jnp.zeros_like, one.params["fc2"])}
    for some in (params, jax.tree.map(jnp.zeros_like, params)):
        for layer in ("fc2", None):
            like = some if layer is None else some[layer]
            v = jax.tree.map(lambda x: x + 0.3, like)
            products = [
                ravel_pytree(jh.hessian(one.objective, some, one.batch, layer=layer, differentiation=how)(v))[0]
                for how in ("exact", "finite")
            ]
            assert np.abs(products[0] - products[1]).max() <= 1e-4 * np.abs(products[0]).max()


@pytest.mark.parametrize("where", ["a weight", "the outputs", "all"])
def test_casts_to_float32_inside_of_the_net_are_noticed(where):
    """In float64 the short step would be lost in the cast."""
    one = helpers.problem("mlp")

    def predict(params, batch):
        if where == "a weight":
            params = params | {"fc1": params["fc1"] | {"w": params["fc1"]["w"].astype(jnp.float32)}}
        if where == "all":
            params = helpers.cast(params, jnp.float32)
        outputs = one.objective.predict(params, batch)
        return outputs.astype(jnp.float32) if where == "the outputs" else outputs

    at = jh.Objective(predict, one.objective.criterion), one.params, one.batch
    operator = jh.hessian(*at, differentiation="finite")
    found, _, residuals = jh.top_eigenpairs(operator, like=one.params, key=KEY, k=1)
    true = np.linalg.eigvalsh(helpers.matrices(one)["hessian"])[-1]
    assert abs(found[0] - true) <= residuals[0] and abs(found[0] - true) < 1e-3 * true
    v = jax.tree.map(lambda x: x + 0.3, one.params)
    product, expected = (ravel_pytree(f(v))[0] for f in (operator, jh.hessian(*at)))
    assert np.abs(product - expected).max() < 2e-3 * np.abs(expected).max()


def test_what_is_refused():
    for step in (0.0, -1e-3, np.nan, np.inf, True):
        with pytest.raises(ValueError, match="step of central differences must be positive and finite"):
            jh.hessian(*AT, differentiation=step)
    with pytest.raises(ValueError, match="unknown differentiation 'central'.*'finite'"):
        jh.hessian(*AT, differentiation="central")
    operator = jh.hessian(*AT, differentiation="finite")
    with pytest.raises(TypeError, match="cannot run under jit"):
        jax.jit(operator)(AT[1])
    assert jh.linearize(operator, like=AT[1]) is operator
