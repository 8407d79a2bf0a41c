"""Spectra: measures and their densities, from eigenvalues and from Lanczos; every layer's."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import KINDS, as_operator, problem

import jaxhess as jh
import jaxhess.quadrature

NORMAL = np.random.default_rng(0).standard_normal(100)


def lanczos_spectrum(values, **options):
    options = dict(key=jax.random.key(0), num_steps=30) | options
    return jh.spectrum(as_operator(values.astype(np.float32)), like=jnp.zeros(len(values)), **options)


@functools.cache
def made(name):
    """Spectra of all shapes."""
    outliers = np.append(np.random.default_rng(0).uniform(0, 1, 300), [20.0, 50.0, 1000.0])
    match name:
        case "bulk with outliers":
            return jh.Spectrum.from_eigenvalues(outliers)
        case "one far outlier":
            return jh.Spectrum.from_eigenvalues(np.append(np.zeros(2000), 1e6))
        case "low rank":
            return jh.Spectrum.from_eigenvalues([3.0, 1.0], dim=1000)
        case "indefinite":
            return jh.Spectrum.from_eigenvalues(NORMAL)
        case "single point":
            return jh.Spectrum([5.0], [1.0], 7)
        case "single negative point":
            return jh.Spectrum([-5.0, -5.0], [0.5, 0.5], 7)
        case "zero":
            return jh.Spectrum.from_eigenvalues(np.zeros(4))
        case "far from zero":
            return jh.Spectrum.from_eigenvalues(1e6 + NORMAL)
        case "one step":
            return jh.Spectrum([-1.0, 0.0, 7.0], [0.2, 0.7, 0.1], 100, num_steps=1)
        case "many steps":
            return jh.Spectrum(outliers, np.full(303, 1 / 303), 303, num_steps=5000)
        case "large residuals":
            return jh.Spectrum([0.0, 1.0], [0.9, 0.1], 50, num_steps=2, residuals=[0.5, 3.0])
        case "Lanczos":
            return lanczos_spectrum(outliers)
        case "Lanczos, two steps":
            return lanczos_spectrum(outliers, num_steps=2)
        case "Lanczos, three draws":
            return lanczos_spectrum(outliers, num_draws=3)
        case "Lanczos without basis":
            return lanczos_spectrum(outliers, num_steps=60, reorthogonalize=False)
    raise KeyError(name)


MADE = [
    "bulk with outliers",
    "one far outlier",
    "low rank",
    "indefinite",
    "single point",
    "single negative point",
    "zero",
    "far from zero",
    "one step",
    "many steps",
    "large residuals",
    "Lanczos",
    "Lanczos, two steps",
    "Lanczos, three draws",
    "Lanczos without basis",
]


def scaled(spec, factor):
    return jh.Spectrum(spec.nodes * factor, spec.weights, spec.dim, spec.num_steps, spec.residuals * abs(factor))


# ---- densities ----


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("num_points", [32, 1024])
@pytest.mark.parametrize("kappa", [1.05, 1.25, 3.0])
def test_a_density_integrates_to_one_and_holds_every_node(name, num_points, kappa):
    spec = made(name)
    grid, phi = spec.density(num_points, kappa)
    assert len(grid) == len(phi) == num_points
    assert grid[0] < spec.nodes.min() and spec.nodes.max() < grid[-1]
    assert (phi >= 0).all()
    np.testing.assert_allclose(scipy.integrate.trapezoid(phi, grid), 1, atol=0.01)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e20])
def test_scaling_the_operator_scales_the_picture(name, factor):
    grid, phi = made(name).density()
    far_grid, far_phi = scaled(made(name), factor).density()
    if name == "zero":  # which has no scale
        factor = 1
    np.testing.assert_allclose(far_grid, grid * factor, rtol=1e-6, atol=1e-9 * factor * abs(grid).max())
    np.testing.assert_allclose(far_phi, phi / factor, rtol=1e-4, atol=1e-9 * phi.max() / factor)


@pytest.mark.parametrize("name", MADE)
def test_a_mirrored_operator_mirrors_the_picture(name):
    grid, phi = made(name).density()
    mirrored_grid, mirrored_phi = scaled(made(name), -1).density()
    np.testing.assert_allclose(mirrored_grid, -grid[::-1], rtol=1e-9, atol=1e-9 * abs(grid).max())
    np.testing.assert_allclose(mirrored_phi, phi[::-1], rtol=1e-4, atol=1e-9 * phi.max())


@pytest.mark.parametrize("name", MADE)
def test_the_logarithm_is_finite_everywhere(name):
    spec = made(name)
    grid, log_phi = spec.log_density()
    assert np.isfinite(log_phi).all()
    np.testing.assert_allclose(np.exp(log_phi), spec.density()[1])
    far = np.array([-1e3, 1e3]) * (1 + abs(spec.nodes).max())
    assert np.isfinite(spec.log_density(grid=far)[1]).all()


def test_the_width_is_the_formula():
    """sigma = R / ((M - 1) sqrt(8 ln kappa)) with R the range of the nodes, widened by the margin on either side."""
    spec = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 10, num_steps=11)
    sigma = 1.1 / (10 * np.sqrt(8 * np.log(1.25)))
    grid = np.linspace(-1, 2, 7)
    expected = sum(0.5 * np.exp(-(((grid - node) / sigma) ** 2) / 2) for node in (0, 1)) / (sigma * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(spec.density(grid=grid)[1], expected, rtol=1e-12)
    own, _ = spec.density()
    np.testing.assert_allclose(own[[0, -1]], [-0.05 - 5 * sigma, 1.05 + 5 * sigma])
    wide, _ = spec.density(margin=0.5)
    assert wide[0] < own[0] and wide[-1] > own[-1]


def test_residuals_widen_the_range():
    exact, rough = (jh.Spectrum([0.0, 1.0], [0.5, 0.5], 10, residuals=r) for r in (None, [0.0, 4.0]))
    assert rough.density()[0][-1] > 5 > exact.density()[0][-1]


def test_the_density_of_a_semicircle():
    """Enough steps and eigenvalues, and the picture is the law."""
    values = helpers.bulk("semicircle", 500)
    grid, phi = lanczos_spectrum(values, num_steps=60, num_draws=4).density()
    law = 2 / np.pi * np.sqrt(np.maximum(0, 1 - grid**2))
    assert scipy.integrate.trapezoid(abs(phi - law), grid) < 0.12


# ---- the measure ----


def test_properties():
    spec = jh.Spectrum([3.0, -1.0], [0.25, 0.75], dim=8, residuals=[0.3, 0.1])
    np.testing.assert_array_equal(spec.nodes, [-1, 3])
    np.testing.assert_array_equal(spec.weights, [0.75, 0.25])
    np.testing.assert_array_equal(spec.residuals, [0.1, 0.3])
    assert (spec.lambda_min, spec.lambda_max, spec.mean, spec.trace) == (-1, 3, 0, 0)
    assert {x.dtype for x in (spec.nodes, spec.weights, spec.residuals)} == {np.dtype(np.float64)}


def test_from_eigenvalues():
    spec = jh.Spectrum.from_eigenvalues([3.0, 1.0], dim=8)
    np.testing.assert_array_equal(spec.nodes, [0, 1, 3])
    np.testing.assert_array_equal(spec.weights, [6 / 8, 1 / 8, 1 / 8])
    assert spec.trace == 4
    full = jh.Spectrum.from_eigenvalues(np.arange(4.0))
    assert full.dim == 4 and full.trace == 6


def test_weights_that_rounding_left_off_one_are_mended():
    spec = jh.Spectrum([0.0, 1.0], [0.5, 0.5 + 1e-6], 2)
    np.testing.assert_allclose(spec.weights.sum(), 1, rtol=1e-15)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([], [], 1), r"m >= 1.*\(0,\)"),
        (([1.0, 2.0], [1.0], 1), r"one shape.*\(2,\), \(1,\)"),
        (([[1.0]], [[1.0]], 1), "one shape"),
        (([np.nan], [1.0], 1), "not finite"),
        (([1.0], [np.inf], 1), "not finite"),
        (([1.0, 2.0], [1.5, -0.5], 1), "minimum -0.5"),
        (([1.0, 2.0], [0.5, 0.4], 1), "sum 0.9"),
        (([1.0], [1.0], 0), "dim"),
        (([1.0], [1.0], 1.5), "dim"),
        (([1.0], [1.0], 1, 0), "num_steps"),
        (([1.0], [1.0], 1, 5, [0.1, 0.2]), r"\(1,\), \(1,\), \(2,\)"),
        (([1.0], [1.0], 1, 5, [np.nan]), "not finite"),
    ],
)
def test_what_is_no_spectrum(args, message):
    with pytest.raises(ValueError, match=message):
        jh.Spectrum(*args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda spec: spec.density(1), "num_points >= 2, got 1"),
        (lambda spec: spec.density(kappa=1.0), "kappa must be above 1, got 1.0"),
        (lambda spec: spec.density(margin=-0.1), "margin must not be negative"),
        (lambda spec: spec.log_density(0), "num_points"),
        (lambda spec: jh.Spectrum.from_eigenvalues([1.0, 2.0, 3.0], dim=2), "3 eigenvalues.*dimension 2"),
        (lambda spec: jh.Spectrum.from_eigenvalues([]), "eigenvalues|m >= 1"),
        (lambda spec: lanczos_spectrum(np.ones(3), num_steps=0), "num_steps"),
        (lambda spec: lanczos_spectrum(np.ones(3), num_draws=0), "num_draws"),
        (lambda spec: lanczos_spectrum(np.full(3, np.nan)), "not finite"),
    ],
)
def test_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(jh.Spectrum([0.0], [1.0], 1))


# ---- from Lanczos ----


@pytest.mark.parametrize("num_steps", [40, 128])
@pytest.mark.parametrize("values", [NORMAL[:40], np.zeros(40), np.ones(40), np.repeat([0.0, 1.0], 20)])
def test_at_full_order_the_spectrum_is_exact(values, num_steps):
    spec = lanczos_spectrum(values, num_steps=num_steps)
    np.testing.assert_allclose(spec.nodes, np.sort(values), atol=1e-5)
    np.testing.assert_allclose(spec.weights, 1 / 40)
    assert spec.dim == 40


def test_moments_from_many_draws():
    values = np.append(np.random.default_rng(0).uniform(0, 1, 300), [20.0, 30.0])
    one = lanczos_spectrum(values, num_draws=1, weights="plain")
    spec = lanczos_spectrum(values, num_draws=200, num_steps=8, weights="plain")
    assert len(one.nodes) == 30 and len(spec.nodes) == 200 * 8
    np.testing.assert_allclose(spec.weights.sum(), 1)
    # v'Av / v'v of a Gaussian v has the variance 2/(n(n+2)) (|A|^2 - tr(A)^2/n).
    error = np.sqrt(2 / (302 * 304) * (np.sum(values**2) - values.sum() ** 2 / 302) / 200)
    assert abs(spec.mean - values.mean()) < 4 * error
    assert abs(spec.trace - values.sum()) < 4 * 302 * error


def test_the_same_key_gives_the_same_spectrum():
    one, same, other = (lanczos_spectrum(NORMAL, key=jax.random.key(i), num_draws=2) for i in (1, 1, 2))
    np.testing.assert_array_equal(one.nodes, same.nodes)
    assert not np.array_equal(one.nodes, other.nodes)


@pytest.mark.parametrize(("num_draws", "num_steps"), [(1, 5), (3, 5), (1, 100), (2, 100)])
def test_progress_ends_at_its_total(num_draws, num_steps):
    calls = []
    lanczos_spectrum(
        np.arange(50.0), num_draws=num_draws, num_steps=num_steps, progress=lambda *args: calls.append(args)
    )
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1]


# ---- every layer ----


@functools.cache
def spectra_of_mlp(curvature, method="lanczos"):
    p = problem("mlp")
    return jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(0), curvature=curvature, method=method)


@pytest.mark.parametrize("layer", ["fc1", "fc2", "total"])
@pytest.mark.parametrize("curvature", KINDS)
def test_layer_spectra_equal_dense_eigenvalues(curvature, layer):
    p = problem("mlp")
    spectra = spectra_of_mlp(curvature)
    assert list(spectra) == ["fc1", "fc2", "total"]
    exact = helpers.dense(p, curvature, None if layer == "total" else layer)
    np.testing.assert_allclose(spectra[layer].nodes, np.linalg.eigvalsh(exact), atol=2e-6)
    assert spectra[layer].dim == len(exact)


@pytest.mark.parametrize("layer", ["fc1", "fc2", "total"])
def test_the_gram_matrix_gives_the_exact_spectrum(layer):
    p = problem("mlp")
    spec = spectra_of_mlp("ggn", "gram")[layer]
    exact = np.linalg.eigvalsh(helpers.dense(p, "ggn", None if layer == "total" else layer))
    zeros = round(spec.weights[spec.nodes == 0].sum() * spec.dim)
    all_nodes = np.sort(np.append(np.zeros(zeros), spec.nodes[spec.nodes != 0]))
    np.testing.assert_allclose(all_nodes, exact, atol=1e-6)


@functools.cache
def partly_linear():
    """fc1 and fc2 of a ReLU net, in each of which H_l is zero, and a scale that is an exponential, where it is not."""

    def net(params, batch):
        hidden = jax.nn.relu(helpers.affine(params["fc1"], batch["x"]))
        return jnp.exp(params["scale"]["s"])[None] * helpers.affine(params["fc2"], hidden)

    params = helpers.dense_layers((4, 5, 3)) | {"scale": {"s": helpers.normal(1, 3)}}
    batch = {"x": helpers.normal(2, 6, 4), "label": helpers.labels(3, 3, 6)}
    return helpers.Problem(jh.Objective(net, jh.cross_entropy), params, batch)


@pytest.mark.parametrize("layer", ["fc1", "fc2", "scale", "total"])
def test_the_hessian_of_layers_without_functional_part_comes_from_the_gram_matrix(layer):
    p = partly_linear()
    auto = jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(0), method="auto")
    exact = np.linalg.eigvalsh(helpers.dense(p, "hessian", None if layer == "total" else layer))
    spec = auto[layer]
    assert list(auto) == ["fc1", "fc2", "scale", "total"]
    assert (layer in ("fc1", "fc2")) == (0 in spec.nodes)  # by Lanczos no node is exactly zero
    assert (abs(spec.lambda_max - exact[-1]) <= spec.residuals[-1]) and spec.residuals[-1] < 1e-4 * exact[-1]
    zeros = round(spec.weights[spec.nodes == 0].sum() * spec.dim)
    nodes = np.sort(np.append(np.zeros(zeros), spec.nodes[spec.nodes != 0]))
    np.testing.assert_allclose(nodes, exact, atol=2e-6)


@pytest.mark.parametrize("curvature", KINDS)
def test_auto_is_lanczos_where_nothing_vanishes_and_gram_for_the_ggn(curvature):
    """In the last layer, fc2, of the Hessian too: the outputs are linear in it."""
    spectra = spectra_of_mlp(curvature, "auto")
    for layer in ("fc1", "fc2", "total"):
        by_gram = curvature == "ggn" or (curvature == "hessian" and layer == "fc2")
        same = spectra_of_mlp("ggn", "gram") if by_gram else spectra_of_mlp(curvature)
        np.testing.assert_allclose(spectra[layer].nodes, same[layer].nodes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "batches", "concave", "large"])
def test_auto_is_lanczos_without_a_small_gram_matrix(name, monkeypatch):
    p = partly_linear()
    objective, batch = p.objective, p.batch
    if name == "plain":
        objective = jax.jit(p.objective)
    elif name == "batches":
        batch = jh.Batches([batch, batch])
    elif name == "concave":
        objective = jh.Objective(p.objective.predict, lambda outputs, batch: -jnp.mean(outputs**2))
    else:
        monkeypatch.setattr(jaxhess.quadrature, "_GRAM_ROWS", 17)
    options = dict(key=jax.random.key(0), num_steps=4)
    auto, lanczos = (jh.layer_spectra(objective, p.params, batch, method=m, **options) for m in ("auto", "lanczos"))
    for layer, spec in lanczos.items():
        np.testing.assert_array_equal(auto[layer].nodes, spec.nodes)


def test_a_small_functional_part_is_not_left_out():
    """In a gate at zero it is the whole Hessian, and far smaller than G in the rest of the layer."""

    def net(params, batch):
        outputs = batch["x"][:, None] * params["fc"]["w"][None]
        return outputs.at[:, 0].add(jnp.sum(params["fc"]["gate"] ** 2))

    params = {"fc": {"w": jnp.zeros(40), "gate": jnp.zeros(1)}}
    batch = {"x": jnp.ones(2), "label": jnp.zeros((2, 40)).at[:, 0].set(3e-5)}
    objective = jh.Objective(net, jh.squared_error)
    spec = jh.layer_spectra(objective, params, batch, key=jax.random.key(0), method="auto")["fc"]
    assert spec.lambda_min == pytest.approx(-1.2e-4, rel=0.05)


def test_scanned_layers_as_one_and_a_slice_of_any_array():
    params = {"blocks": {"w": jnp.ones((2, 3, 3))}, "out": {"w": jnp.ones((3, 2))}}

    def net(params, batch):
        hidden = jax.lax.scan(lambda x, p: (jax.nn.relu(x @ p["w"]), None), batch["x"], params["blocks"])[0]
        return hidden @ params["out"]["w"]

    at = (jh.Objective(net, jh.squared_error), params, {"x": jnp.ones((4, 3)), "label": jnp.ones((4, 2))})
    found = jh.layer_spectra(*at, key=jax.random.key(0), layers=["out", "blocks", "out[0]"])
    assert {name: spectrum.dim for name, spectrum in found.items()} == {
        "out": 6,
        "blocks": 18,
        "out[0]": 2,
        "total": 24,
    }


def test_jacobians_that_are_not_finite_are_named():
    params = {"fc": {"w": jnp.ones((3, 2))}, "norm": {"w": jnp.zeros(3)}}
    net = lambda p, batch: batch["x"] @ p["fc"]["w"] + jnp.linalg.norm(p["norm"]["w"])[None, None]
    batch = {"x": jnp.ones((4, 3)), "label": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="not finite in layer 'norm'"):
        jh.layer_spectra(
            jh.Objective(net, jh.squared_error), params, batch, key=jax.random.key(0), curvature="ggn", method="auto"
        )


def test_interlacing():
    for curvature in KINDS:
        spectra = spectra_of_mlp(curvature)
        for spec in spectra.values():
            assert spec.lambda_max <= spectra["total"].lambda_max + 1e-6
            assert spec.lambda_min >= spectra["total"].lambda_min - 1e-6


def test_layer_spectra_with_few_steps_and_options():
    """Three vectors, several draws, a criterion of one's own, an aux: the trace of many draws is right."""
    p = problem("mlp, own criterion")
    objective = jh.Objective(lambda q, b: (helpers.mlp(q, b), None), helpers.softplus_sum)
    spectra = jh.layer_spectra(
        objective,
        p.params,
        p.batch,
        key=jax.random.key(0),
        num_steps=6,
        num_draws=40,
        curvature="ggn",
        reorthogonalize=False,
        has_aux=True,
    )
    for layer in ("fc1", "fc2"):
        exact = np.linalg.eigvalsh(helpers.dense(p, "ggn", layer))
        dim = len(exact)
        error = dim * np.sqrt(2 / (dim * (dim + 2)) * (np.sum(exact**2) - exact.sum() ** 2 / dim) / 40)
        assert abs(spectra[layer].trace - exact.sum()) < 4 * error


def test_scanned_layers_have_spectra_of_their_own():
    params = {"blocks": {"w": helpers.normal(1, 2, 3, 3), "b": helpers.normal(2, 2, 3)}}

    def net(params, batch):
        return jax.lax.scan(lambda x, p: (jnp.tanh(helpers.affine(p, x)), None), batch["x"], params["blocks"])[0]

    batch = {"x": helpers.normal(3, 5, 3), "label": helpers.labels(4, 3, 5)}
    p = helpers.Problem(jh.Objective(net, jh.cross_entropy), params, batch)
    hess = helpers.dense(p, "hessian")
    numbers = helpers.unravel(np.arange(len(hess)), params)
    lanczos, gram = (
        jh.layer_spectra(p.objective, params, batch, key=jax.random.key(0), curvature=c, method=m)
        for c, m in (("hessian", "lanczos"), ("ggn", "gram"))
    )
    for i in range(2):
        where = helpers.ravel(jax.tree.map(lambda x, i=i: x[i], numbers["blocks"]))
        exact = np.linalg.eigvalsh(hess[np.ix_(where, where)])
        np.testing.assert_allclose(lanczos[f"blocks[{i}]"].nodes, exact, atol=1e-5)
        exact = helpers.dense(p, "ggn")[np.ix_(where, where)]
        np.testing.assert_allclose(gram[f"blocks[{i}]"].trace, np.trace(exact), rtol=1e-4)


@pytest.mark.parametrize("num_steps", [4, 64])
def test_progress_over_all_layers(num_steps):
    """Up to its total and no further, where the recurrence stops at the dimension too."""
    p = problem("mlp")
    calls = []
    options = dict(num_steps=num_steps, num_draws=2, progress=lambda *args: calls.append(args))
    jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(0), **options)
    total = calls[0][1]
    assert calls == [(i, total) for i in range(1, total + 1)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "power"}, ValueError, "'power'.*auto.*gram.*lanczos"),
        ({"method": "gram"}, ValueError, "GGN only.*'hessian'.*lanczos"),
        ({"curvature": "fisher"}, ValueError, "'fisher'"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_draws": 0}, ValueError, "num_draws"),
    ],
)
def test_layer_spectra_refuse(options, error, message):
    p = problem("mlp")
    with pytest.raises(error, match=message):
        jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(0), **options)


@pytest.mark.parametrize("options", [{"num_steps": 5}, {"curvature": "ggn", "method": "gram"}])
def test_chosen_layers_are_those_of_all(options):
    p = problem("batch norm")
    every = jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(3), **options)
    some = jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(3), layers=["fc2", "fc1"], **options)
    assert list(some) == ["fc1", "fc2", "total"] and len(every) == 4
    for layer, spectrum in some.items():
        # Another program, with another rounding.
        np.testing.assert_allclose(spectrum.nodes, every[layer].nodes, rtol=0, atol=1e-6 * spectrum.lambda_max)
    with pytest.raises(ValueError, match="fc9"):
        jh.layer_spectra(p.objective, p.params, p.batch, key=jax.random.key(3), layers=["fc9"], **options)
