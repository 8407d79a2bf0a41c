"""Distances against closed forms and scipy; outliers planted on bulks of several shapes."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxhess as jh

RNG = np.random.default_rng(0)
SAMPLES = {
    "normal": RNG.standard_normal(50),
    "shifted": RNG.standard_normal(80) + 1,
    "wide": RNG.standard_normal(30) * 4,
    "uniform": RNG.uniform(0, 1, 60),
    "heavy": RNG.standard_exponential(70) ** 3,
    "zero": np.zeros(5),
}
SPECTRA = {name: jh.Spectrum.from_eigenvalues(values) for name, values in SAMPLES.items()}
DISTANCES = [jh.wasserstein, jh.jensen_shannon, jh.kl_divergence]
pairs = pytest.mark.parametrize(("a", "b"), [(a, b) for a in SPECTRA for b in SPECTRA])


def point(value):
    return jh.Spectrum([value], [1.0], 1)


# ---- Wasserstein ----


@pairs
def test_wasserstein_equals_scipy_on_samples(a, b):
    expected = scipy.stats.wasserstein_distance(SAMPLES[a], SAMPLES[b])
    np.testing.assert_allclose(jh.wasserstein(SPECTRA[a], SPECTRA[b]), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (point(-1.0), point(4.0), 5.0),
        (jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2), point(0.0), 0.5),
        (jh.Spectrum([0.0, 1.0], [0.9, 0.1], 9), jh.Spectrum([0.0, 1.0], [0.2, 0.8], 5), 0.7),
        (jh.Spectrum([0.0, 3.0], [0.5, 0.5], 2), jh.Spectrum([1.0, 2.0], [0.5, 0.5], 2), 1.0),
    ],
)
def test_wasserstein_closed_forms(a, b, expected):
    np.testing.assert_allclose(jh.wasserstein(a, b), expected)


def test_wasserstein_sees_shifts_and_scales():
    spec = SPECTRA["normal"]
    moved = jh.Spectrum(spec.nodes + 2, spec.weights, spec.dim)
    np.testing.assert_allclose(jh.wasserstein(spec, moved), 2)
    for factor in (1e-12, 1e12):
        one, other = (jh.Spectrum(s.nodes * factor, s.weights, s.dim) for s in (spec, SPECTRA["wide"]))
        np.testing.assert_allclose(jh.wasserstein(one, other), factor * jh.wasserstein(spec, SPECTRA["wide"]))
        normalised = [jh.wasserstein(*both, normalize=True) for both in ((one, other), (spec, SPECTRA["wide"]))]
        np.testing.assert_allclose(*normalised)


@pytest.mark.parametrize("c", SPECTRA)
@pairs
def test_wasserstein_is_a_metric(a, b, c):
    a, b, c = SPECTRA[a], SPECTRA[b], SPECTRA[c]
    assert jh.wasserstein(a, b) == jh.wasserstein(b, a) >= 0
    assert jh.wasserstein(a, c) <= jh.wasserstein(a, b) + jh.wasserstein(b, c) + 1e-12
    assert (jh.wasserstein(a, b) > 0) == (a is not b)


# ---- divergences ----


@pairs
def test_jensen_shannon_is_symmetric_and_bounded(a, b):
    found = jh.jensen_shannon(SPECTRA[a], SPECTRA[b])
    np.testing.assert_allclose(found, jh.jensen_shannon(SPECTRA[b], SPECTRA[a]), atol=1e-12)
    assert 0 <= found <= np.log(2) + 1e-12
    if a == b:
        assert found < 1e-12
    np.testing.assert_allclose(jh.jensen_shannon(SPECTRA[a], SPECTRA[b], normalize=True), found / np.log(2))


@pairs
def test_kl_is_not_negative_and_finite(a, b):
    found = jh.kl_divergence(SPECTRA[a], SPECTRA[b])
    assert 0 <= found < np.inf
    assert (found < 1e-12) == (a == b)
    np.testing.assert_allclose(jh.kl_divergence(SPECTRA[a], SPECTRA[b], normalize=True), 1 - np.exp(-found))


def test_kl_is_that_of_the_first_to_the_second():
    """Two Gaussians of one width sigma, a distance d apart: KL = d^2 / (2 sigma^2); and a mixture is not symmetric."""
    a, b = point(0.0), point(1.0)
    sigma = 1.1 / (127 * np.sqrt(8 * np.log(1.25)))
    np.testing.assert_allclose(jh.kl_divergence(a, b, num_points=20_000), 1 / (2 * sigma**2), rtol=1e-3)
    mixture = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2)
    np.testing.assert_allclose(jh.kl_divergence(a, mixture), np.log(2), rtol=1e-3)
    assert jh.kl_divergence(mixture, a) > 100


def test_far_spectra_have_the_largest_divergence():
    np.testing.assert_allclose(jh.jensen_shannon(point(0.0), point(1.0)), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        jh.jensen_shannon(jh.Spectrum([0, 1], [0.5, 0.5], 2), point(0.0)), js_of_half(), rtol=1e-3
    )


def js_of_half():
    """Jensen-Shannon of (1/2, 1/2) and (1, 0)."""
    return 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)) + 0.5 * np.log(1 / 0.75)


@pytest.mark.parametrize("distance", DISTANCES)
@pairs
def test_normalised_distances_lie_in_the_unit_interval(distance, a, b):
    found = distance(SPECTRA[a], SPECTRA[b], normalize=True)
    assert 0 <= found <= 1 + 1e-12
    if a == b:
        assert found < 1e-12


@pytest.mark.parametrize("distance", DISTANCES)
def test_numbers_are_plain_floats(distance):
    for normalize in (False, True):
        assert type(distance(SPECTRA["normal"], SPECTRA["wide"], normalize=normalize)) is float


@pytest.mark.parametrize("distance", DISTANCES)
def test_normalised_distances_have_no_units(distance):
    def found(factor):
        pair = (jh.Spectrum(SPECTRA[n].nodes * factor, SPECTRA[n].weights, SPECTRA[n].dim) for n in ("normal", "wide"))
        return distance(*pair, normalize=True)

    for factor in (1e-20, 1e20):
        np.testing.assert_allclose(found(factor), found(1), rtol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_take_spectra(distance):
    for pair in ((SPECTRA["normal"], SAMPLES["wide"]), (SAMPLES["wide"], SPECTRA["normal"])):
        with pytest.raises(TypeError, match=r"Spectrum, got ndarray.*Spectrum\("):
            distance(*pair)


@pytest.mark.parametrize("divergence", [jh.jensen_shannon, jh.kl_divergence])
def test_divergences_check_their_broadening(divergence):
    with pytest.raises(ValueError, match="num_points"):
        divergence(point(0.0), point(1.0), num_points=1)
    with pytest.raises(ValueError, match="kappa"):
        divergence(point(0.0), point(1.0), kappa=0.9)


# ---- outliers ----


BULKS = ["Marchenko-Pastur", "semicircle", "exponential decay"]
RANGES = {"near": (2, 4), "far": (3, 10)}  # in bulk edges: the gap to the bulk is the largest


@functools.cache
def planted(bulk, count, where, seed=0):
    """440 eigenvalues, so many of them beyond the bulk's edge, no two of them further apart than from the bulk."""
    values = helpers.bulk(bulk, 440 - count, seed)
    return np.append(values, values.max() * np.geomspace(*RANGES[where], count)) if count else values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("count", [0, 1, 3, 9, 10, 40])
@pytest.mark.parametrize("bulk", BULKS)
def test_outliers_of_exact_spectra(bulk, count, where, seed):
    values = planted(bulk, count, where, seed)
    assert jh.count_outliers(values) == count
    assert jh.count_outliers(np.random.default_rng(seed).permutation(values) * 1e-9) == count
    assert jh.count_outliers(jh.Spectrum.from_eigenvalues(values)) == count


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("count", [0, 1, 3, 9, 10, 40])
@pytest.mark.parametrize("bulk", BULKS)
def test_outliers_through_lanczos(bulk, count, where):
    values = planted(bulk, count, where)
    for seed in range(3):
        spec = jh.spectrum(helpers.as_operator(values), like=jnp.zeros(len(values)), key=jax.random.key(seed))
        assert jh.count_outliers(spec) == count


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("bulk", BULKS)
def test_ritz_values_that_have_not_converged_are_no_outliers(bulk, count):
    """After 16 steps the Ritz values of a bulk stand far apart."""
    values = planted(bulk, count, "far")
    for seed in range(3):
        spec = jh.spectrum(
            helpers.as_operator(values), like=jnp.zeros(len(values)), key=jax.random.key(seed), num_steps=16
        )
        assert jh.count_outliers(spec) == count


@pytest.mark.parametrize("where", RANGES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 40])
@pytest.mark.parametrize("bulk", BULKS)
def test_outliers_by_the_profile(bulk, count, where):
    """Few outliers too, over which it once split the bulk; and none."""
    for seed in range(3):
        assert jh.count_outliers(planted(bulk, count, where, seed), method="profile") == count


@pytest.mark.parametrize("count", [0, 2, 3, 10])
@pytest.mark.parametrize("bulk", BULKS)
def test_outliers_by_the_profile_through_lanczos(bulk, count):
    values = planted(bulk, count, "far")
    spec = jh.spectrum(helpers.as_operator(values), like=jnp.zeros(len(values)), key=jax.random.key(0))
    assert jh.count_outliers(spec, method="profile") == count


def test_what_the_methods_make_of_outliers_as_far_from_each_other_as_from_the_bulk():
    values = np.append(
        helpers.bulk("Marchenko-Pastur", 440), helpers.bulk("Marchenko-Pastur", 440).max() * np.array([2, 4.1])
    )
    assert jh.count_outliers(values) == 1 and jh.count_outliers(values, method="profile") == 2


@pytest.mark.parametrize("method", ["gap", "profile"])
@pytest.mark.parametrize("values", [[0.0], [3.0], np.zeros(9), np.ones(9), -np.arange(9.0), [-5.0, 1e-9]])
def test_no_outliers_where_there_is_nothing_apart(method, values):
    assert jh.count_outliers(np.array(values), method=method) == 0


def test_outliers_above_a_bulk_of_zeros():
    """Low rank: all that is not zero stands apart."""
    assert jh.count_outliers(np.append(np.zeros(100), [1.0, 1.1, 1.2])) == 3
    assert jh.count_outliers(jh.Spectrum.from_eigenvalues([1.0, 1.1, 1.2], dim=1000)) == 3
    assert jh.count_outliers(jh.Spectrum.from_eigenvalues(np.linspace(1, 2, 40), dim=1000)) == 40


@pytest.mark.parametrize("method", ["gap", "profile"])
@pytest.mark.parametrize("count", [1, 3, 10, 40])
@pytest.mark.parametrize("bulk", BULKS)
def test_the_steep_end_of_a_low_rank_spectrum_is_no_border(bulk, count, method):
    values = planted(bulk, count, "far")
    values = np.sort(values[values > 0])
    values[:20] *= 1e-3 ** np.arange(20, 0, -1)
    spec = jh.Spectrum.from_eigenvalues(values, dim=10_000_000)
    assert jh.count_outliers(spec, method=method) == count


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.ones(3), {"method": "elbow"}, "'elbow'.*gap.*profile"),
        (np.zeros(0), {}, "eigenvalues"),
        (np.array([1.0, np.nan]), {}, "not finite"),
    ],
)
def test_count_outliers_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        jh.count_outliers(values, **options)


def test_one_point_is_no_distance_from_itself():
    """Lanczos finds 2 up to rounding; normalised by the width of that rounding it would be as far as can be."""
    spectra = [
        jh.spectrum(lambda v: 2 * v, like=jnp.zeros(dim), key=jax.random.key(dim), num_steps=8) for dim in (50, 51, 400)
    ]
    for other in spectra[1:]:
        assert jh.wasserstein(spectra[0], other, normalize=True) == 0
        assert jh.jensen_shannon(spectra[0], other, normalize=True) < 1e-3
        assert jh.kl_divergence(spectra[0], other) < 1e-3
    far = jh.Spectrum([2.0], [1.0], 1), jh.Spectrum([2.0000002], [1.0], 1)
    assert jh.jensen_shannon(*far, normalize=True) <= 1
    one_step = jh.Spectrum([2.0], [1.0], 9, num_steps=1, residuals=[0.5])
    assert jh.wasserstein(one_step, one_step, normalize=True) == 0
