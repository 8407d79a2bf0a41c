"""Properties that hold for every input: operators, layers, distances, spectra and the transformation's state.

Values and structure are drawn; shapes that XLA sees are few, so that it compiles seldom.
"""

import collections
import functools
import io
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import KINDS, problem, ravel, unravel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxhess as jh
from jaxhess._trees import random_like
from jaxhess.selections import find_layers

few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
many = settings(max_examples=100, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31 - 1)


def numbers(size, bound=3.0):
    """Vectors in float64; zeros and repeated entries come often, numbers whose squares underflow do not."""
    return hnp.arrays(np.float64, size, elements=st.integers(-1000, 1000).map(lambda i: bound * i / 1000))


# ---- operators: at random points and vectors of two nets, in float64 ----

with jax.enable_x64(True):
    NETS = {name: problem(name).cast(np.float64) for name in ("mlp", "mlp, squared error", "mlp, own criterion")}
P = NETS["mlp"]
DIM = ravel(P.params).size
LAYERS = [None, "fc1", "fc2"]


def size_of(layer):
    return len(helpers.positions(P.params, layer))


def at(flat, name="mlp"):
    """A net at these parameters, of which only the layer's are given where a layer is."""
    net = NETS[name]
    return helpers.Problem(net.objective, unravel(flat, net.params), net.batch)


def apply(net, kind, flat, layer=None):
    """A v of raveled vectors."""
    like = net.params if layer is None else jh.subtree(net.params, layer)
    return ravel(net.operator(kind, layer)(unravel(flat, like)))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@few
@given(point=numbers(DIM), data=st.data(), factors=numbers(2))
def test_operators_are_symmetric_and_linear(kind, layer, point, data, factors):
    net = at(point)
    u, v = (data.draw(numbers(size_of(layer))) for _ in range(2))
    with jax.enable_x64(True):
        au, av, mixed = (apply(net, kind, w, layer) for w in (u, v, factors[0] * u + factors[1] * v))
    assert au.dtype == np.float64
    scale = 1e-11 * (1 + np.abs(au).max() + np.abs(av).max())
    np.testing.assert_allclose(u @ av, v @ au, rtol=0, atol=scale * DIM * 9)
    np.testing.assert_allclose(mixed, factors[0] * au + factors[1] * av, rtol=0, atol=scale * 9)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(point=numbers(DIM), v=numbers(DIM))
def test_a_layers_block_is_the_restriction_of_the_whole(kind, point, v):
    net = at(point)
    for layer in LAYERS[1:]:
        where = helpers.positions(net.params, layer)
        inside = np.zeros(DIM)
        inside[where] = v[where]
        with jax.enable_x64(True):
            block, whole = apply(net, kind, v[where], layer), apply(net, kind, inside)
        np.testing.assert_allclose(block, whole[where], rtol=0, atol=1e-11 * (1 + np.abs(whole).max()))


@pytest.mark.parametrize("name", NETS)
@few
@given(point=numbers(DIM), v=numbers(DIM))
def test_g_is_positive_semi_definite_and_the_parts_add_up(name, point, v):
    with jax.enable_x64(True):
        hess, g, h = (apply(at(point, name), kind, v) for kind in KINDS)
    scale = 1e-11 * (1 + max(np.abs(x).max() for x in (hess, g, h)))
    np.testing.assert_allclose(g + h, hess, rtol=0, atol=scale)
    assert v @ g >= -scale * DIM * 3


@pytest.mark.parametrize("kind", KINDS)
@few
@given(point=numbers(DIM), seed=SEEDS)
def test_layer_traces_add_up_to_the_whole_nets(kind, point, seed):
    """With shared probes, to rounding; for v' A v the whole net's own estimate is the same number."""
    net, key, options = at(point), jax.random.key(seed), {"num_probes": 3}
    with jax.enable_x64(True):
        at_net = (net.objective, net.params, net.batch)
        traces = jh.layer_traces(*at_net, key=key, curvature=kind, method="hutchinson", **options)
        whole = jh.trace(net.operator(kind), like=net.params, key=key, **options)
    total = traces.pop("total")
    assert list(traces) == LAYERS[1:]
    tolerance = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(sum(estimate.mean for estimate in traces.values()), total.mean, **tolerance)
    if kind != "ggn":  # whose probes are drawn over the outputs
        np.testing.assert_allclose([total.mean, total.std_error], [whole.mean, whole.std_error], **tolerance)


# ---- layers: any tree of arrays ----


class Pair(collections.namedtuple("Pair", ["weight", "value"])):
    """A node whose keys are attributes, one of them named as NNX names its arrays."""


KEYS = st.text("ab01_²[]", min_size=1, max_size=3)
LEAVES = st.integers(1, 3).map(lambda n: np.arange(n, dtype=np.float32))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.tuples(inner, st.none()),
    ),
    max_leaves=8,
)


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@many
@given(tree=TREES)
def test_layers_take_every_array_apart_once_and_put_it_back(tree):
    names = jh.layer_names(tree)
    assert len(set(names)) == len(names) and "total" not in names
    layers = find_layers(tree, names)
    assert sorted(piece.leaf for layer in layers for piece in layer.pieces) == list(range(len(jax.tree.leaves(tree))))
    rebuilt = jax.tree.map(lambda x: np.full_like(x, -1), tree)
    for layer in layers:
        part = jh.subtree(tree, layer.name)
        assert len(jax.tree.leaves(part)) == len(layer.pieces) > 0
        assert_same(layer.take(layer.put(tree, part)), part)
        rebuilt = layer.put(rebuilt, part)
    assert_same(rebuilt, tree)


@many
@given(tree=TREES, name=KEYS)
def test_unknown_layers_are_answered_with_the_known_ones(tree, name):
    names = jh.layer_names(tree)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    known = any(path == name or path.startswith(f"{name}/") for path in [*names, *paths])
    if known or set(name) & set("*?["):  # a module, an array, or a glob
        return
    with pytest.raises(ValueError) as error:
        jh.subtree(tree, name)
    assert repr(name) in str(error.value) and str(names) in str(error.value)


@many
@given(names=st.lists(KEYS, min_size=1, max_size=40, unique=True))
def test_middle_layers_lie_between_a_quarter_and_three_quarters(names):
    count = len(names)
    middle = jh.middle_layers(names)
    assert middle == [names[i] for i in range(math.floor(count / 4), math.ceil(3 * count / 4) - 1 + 1)]
    assert len(middle) >= count / 2


# ---- distances and spectra ----


@st.composite
def spectra(draw, max_size=6):
    size, scale = draw(st.integers(1, max_size)), 10.0 ** draw(st.integers(-30, 30))
    weights = draw(hnp.arrays(np.float64, size, elements=st.integers(1, 100).map(float)))
    return jh.Spectrum(scale * draw(numbers(size)), weights / weights.sum(), draw(st.integers(size, 1000)))


@many
@given(a=spectra(), b=spectra(), c=spectra())
def test_wasserstein_is_a_metric(a, b, c):
    ab, bc, ac = jh.wasserstein(a, b), jh.wasserstein(b, c), jh.wasserstein(a, c)
    assert jh.wasserstein(a, a) == 0
    assert ab >= 0 and ab == pytest.approx(jh.wasserstein(b, a), rel=1e-12)
    size = max(np.abs(s.nodes).max() for s in (a, b, c))
    assert ac <= ab + bc + 1e-12 * size
    assert abs(a.mean - b.mean) <= ab + 1e-12 * size  # Kantorovich and Rubinstein, for f(t) = t


@few
@given(a=spectra(), b=spectra())
def test_divergences_are_not_negative_bounded_and_zero_for_equal_spectra(a, b):
    js, kl = jh.jensen_shannon(a, b), jh.kl_divergence(a, b)
    assert 0 <= js <= np.log(2) + 1e-12 and 0 <= kl < np.inf
    assert js == pytest.approx(jh.jensen_shannon(b, a), abs=1e-12)
    assert jh.jensen_shannon(a, a) <= 1e-12 and jh.kl_divergence(a, a) <= 1e-12
    for distance in (jh.wasserstein, jh.jensen_shannon, jh.kl_divergence):
        assert 0 <= distance(a, b, normalize=True) <= 1 + 1e-12


@few
@given(spec=spectra(), seed=SEEDS)
def test_distances_see_the_measure_and_not_how_it_is_written(spec, seed):
    """In another order, with every node in two halves, it is the same spectrum."""
    order = np.random.default_rng(seed).permutation(2 * len(spec.nodes))
    halves = (np.repeat(spec.nodes, 2)[order], np.repeat(spec.weights / 2, 2)[order])
    again = jh.Spectrum(*halves, spec.dim)
    size = np.abs(spec.nodes).max()
    assert jh.wasserstein(spec, again) <= 1e-12 * size
    assert jh.jensen_shannon(spec, again) <= 1e-12 and jh.kl_divergence(spec, again) <= 1e-12


@many
@given(spec=spectra())
def test_spectra_are_measures_of_mass_one(spec):
    assert (np.diff(spec.nodes) >= 0).all() and spec.weights.sum() == pytest.approx(1, abs=1e-12)
    size = np.abs(spec.nodes).max()
    assert spec.lambda_min - 1e-12 * size <= spec.mean <= spec.lambda_max + 1e-12 * size
    assert spec.trace == spec.dim * spec.mean
    grid, phi = spec.density()
    assert (phi >= 0).all() and scipy.integrate.trapezoid(phi, grid) == pytest.approx(1, abs=1e-3)
    assert scipy.integrate.trapezoid(phi * grid, grid) == pytest.approx(spec.mean, abs=1e-3 * (grid[-1] - grid[0]))


@many
@given(values=numbers(7), zeros=st.integers(0, 50))
def test_exact_spectra_keep_every_moment(values, zeros):
    spec = jh.Spectrum.from_eigenvalues(values, len(values) + zeros)
    for degree in range(6):
        exact = np.append(values, np.zeros(zeros)) ** degree
        np.testing.assert_allclose(spec.weights @ spec.nodes**degree, exact.mean(), rtol=1e-12, atol=1e-12)


@few
@given(values=numbers(8), seed=SEEDS, steps=st.integers(1, 3))
def test_lanczos_is_a_quadrature_of_the_start_vectors_measure(values, seed, steps):
    """m steps see the moments up to 2 m - 1, whatever the eigenvalues: repeated, zero, of either sign."""
    key, like = jax.random.key(seed), np.zeros(8)
    with jax.enable_x64(True):
        spec = jh.spectrum(helpers.as_operator(values), like=like, key=key, num_steps=steps, weights="plain")
        start = np.asarray(random_like(jax.random.fold_in(key, 0), like))
    share = (start / np.linalg.norm(start)) ** 2
    assert len(spec.nodes) <= steps and spec.weights.sum() == pytest.approx(1, abs=1e-12)
    for degree in range(2 * steps):
        np.testing.assert_allclose(
            spec.weights @ spec.nodes**degree, share @ values**degree, rtol=1e-9, atol=1e-9 * 3**degree
        )


@few
@given(values=numbers(8), seed=SEEDS)
def test_as_many_steps_as_dimensions_find_all_eigenvalues(values, seed):
    with jax.enable_x64(True):
        operator = helpers.as_operator(helpers.rotated(values, seed))
        spec = jh.spectrum(operator, like=np.zeros(8), key=jax.random.key(seed))
    np.testing.assert_allclose(spec.nodes, np.sort(values), atol=1e-11)
    np.testing.assert_array_equal(spec.weights, 1 / 8)
    assert (spec.residuals >= 0).all() and spec.residuals.max() <= 1e-12


# ---- the transformation: a model of its state in Python ----

KEY = jax.random.key(11)
PARAMS = {"fc": {"w": np.array([0.5, -1.0, 2.0])}, "out": {"w": np.array([1.0])}}


def quartic(params, batch):
    """Its Hessian is not diagonal, so that each probe sees another penalty."""
    return batch * (jnp.sum(params["fc"]["w"] ** 2) + params["out"]["w"][0] ** 2) ** 2


@functools.cache
def step(every, start, seed):
    def update(state, gamma, batch):
        tx = jh.add_hessian_trace(quartic, gamma, every=every, start=start, key=jax.random.key(seed))
        return tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS, batch=batch)

    return jax.jit(update)


@functools.cache
def expected(count):
    penalty, gradient = jh.hessian_trace_penalty(quartic, PARAMS, 1.0, key=jax.random.fold_in(KEY, count))
    return float(penalty), ravel(gradient)


def through_a_file(state):
    """The state after saving and loading, as numpy arrays."""
    file = io.BytesIO()
    np.savez(file, **state._asdict())
    file.seek(0)
    return jh.HessianTraceState(**np.load(file, allow_pickle=False))


@few
@given(
    every=st.integers(1, 3),
    start=st.integers(0, 2),
    gamma=st.integers(0, 100).map(lambda i: i / 10),
    batches=st.lists(st.sampled_from([1.0, 1.0, 1.0, np.nan, np.inf]), min_size=1, max_size=9),
    data=st.data(),
)
def test_the_transforms_state_follows_its_definition(every, start, gamma, batches, data):
    restored = data.draw(st.integers(0, len(batches) - 1), label="restored before step")
    with jax.enable_x64(True):
        state = jh.add_hessian_trace(quartic, gamma, every=every, start=start, key=KEY).init(PARAMS)
        last, skipped, seed = 0.0, 0, 11
        for count, batch in enumerate(batches):
            if count == restored:  # into a transformation of another key: the probes are those of the saved one
                state, seed = through_a_file(state), 99
            update, state = step(every, start, seed)(state, gamma, batch)
            due, finite = count >= start and (count - start) % every == 0, np.isfinite(batch)
            skipped += due and not finite
            penalty, gradient = expected(count)
            if due:
                last = penalty if finite else np.nan
            np.testing.assert_allclose(ravel(update), gamma * gradient * (due and finite), rtol=1e-12, atol=0)
            assert (state.count, state.skipped) == (count + 1, skipped)
            if np.isfinite(last):
                np.testing.assert_allclose(state.penalty, last, rtol=1e-12)
            else:
                assert not np.isfinite(state.penalty)
