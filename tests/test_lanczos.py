"""The Lanczos recurrence and the top eigenpairs, on matrices with prescribed spectra."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import as_operator, rotated

import jaxhess as jh
from jaxhess._lanczos import ritz
from jaxhess._recurrence import norm_in_numpy
from jaxhess._trees import tree_norm

DIM = 20
VALUES = np.sort(np.random.default_rng(0).standard_normal(DIM))
SPECTRA = {
    "simple": VALUES,
    "zero": np.zeros(DIM),
    "identity": np.ones(DIM),
    "rank 3": np.append(np.zeros(DIM - 3), [1.0, 2.0, 5.0]),
    "indefinite, rank 2": np.append(np.zeros(DIM - 2), [-1.0, 1.0]),
    "repeated": np.repeat([-1.0, 0.5, 2.0, 3.0], 5),
    "clustered": 1 + 1e-9 * VALUES,
}
START = np.random.default_rng(1).standard_normal(DIM)


def tridiagonal(found):
    alphas, betas = (np.asarray(x, np.float64) for x in (found.alphas, found.betas))
    return np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)


def in_jit(operator, start, num_steps, **options):
    return jax.jit(lambda operator, start: jh.lanczos(operator, start, num_steps, **options))(operator, start)


FORMS = {"host": jh.lanczos, "jit": in_jit}


@pytest.fixture(params=FORMS)
def lanczos(request):
    return FORMS[request.param]


# ---- the recurrence ----


def test_full_order_reconstructs_the_matrix(lanczos, x64):
    matrix = rotated(VALUES)
    found = lanczos(as_operator(matrix), START, DIM)
    basis = np.asarray(found.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(DIM), atol=1e-13)
    np.testing.assert_allclose(basis.T @ tridiagonal(found) @ basis, matrix, atol=1e-13)
    np.testing.assert_allclose(ritz(found.alphas, found.betas)[0], VALUES, atol=1e-13)
    assert found.num_steps == DIM


def test_partial_order_leaves_one_remainder(lanczos, x64):
    """A Q' = Q' T + r e_k', with r orthogonal to Q and of norm beta_k."""
    matrix = rotated(VALUES)
    found = lanczos(as_operator(matrix), START, 8)
    basis = np.asarray(found.basis)
    rest = matrix @ basis.T - basis.T @ tridiagonal(found)
    np.testing.assert_allclose(rest[:, :-1], 0, atol=1e-13)
    np.testing.assert_allclose(basis @ rest[:, -1], 0, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(rest[:, -1]), found.betas[-1], rtol=1e-12)
    np.testing.assert_allclose(basis[0], START / np.linalg.norm(START), atol=1e-15)


def test_the_basis_is_a_tree_of_stacked_leaves(x64):
    matrix = jnp.asarray(rotated(VALUES))
    start = {"a": START[:12].reshape(4, 3), "b": [START[12:]]}

    def operator(v):
        out = matrix @ jnp.concatenate([v["a"].ravel(), v["b"][0]])
        return {"a": out[:12].reshape(4, 3), "b": [out[12:]]}

    found = jh.lanczos(operator, start, 6)
    assert jax.tree.map(jnp.shape, found.basis) == {"a": (6, 4, 3), "b": [(6, 8)]}
    flat = jh.lanczos(as_operator(matrix), START, 6)
    np.testing.assert_allclose(found.alphas, flat.alphas, atol=1e-13)
    np.testing.assert_allclose(found.basis["b"][0], flat.basis[:, 12:], atol=1e-13)


def test_quadrature_is_exact_for_moments(x64):
    """m nodes integrate polynomials of degree 2 m - 1 as the start vector sees them."""
    matrix, unit = rotated(VALUES), START / np.linalg.norm(START)
    for steps in (1, 3, 5):
        found = jh.lanczos(as_operator(matrix), START, steps)
        nodes, vectors, _ = ritz(found.alphas, found.betas)
        for degree in range(2 * steps):
            exact = unit @ np.linalg.matrix_power(matrix, degree) @ unit
            np.testing.assert_allclose(vectors[0] ** 2 @ nodes**degree, exact, rtol=1e-10, atol=1e-12)


def test_residuals_bound_the_distance_to_an_eigenvalue(x64):
    matrix = rotated(VALUES)
    found = jh.lanczos(as_operator(matrix), START, 7)
    values, vectors, residuals = ritz(found.alphas, found.betas)
    for value, vector, residual in zip(values, vectors.T @ np.asarray(found.basis), residuals, strict=True):
        np.testing.assert_allclose(np.linalg.norm(matrix @ vector - value * vector), residual, atol=1e-13)
        assert abs(VALUES - value).min() <= residual + 1e-13


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_host_loop_and_jit_agree(reorthogonalize):
    matrix = as_operator(rotated(VALUES))
    host, jit = (form(matrix, jnp.asarray(START), 8, reorthogonalize=reorthogonalize) for form in FORMS.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), host, jit)


@pytest.mark.parametrize("reorthogonalize", [True, False, "host"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_scales_with_the_operator(scale, reorthogonalize):
    """In float32, whose squares end at 1e-38 and 1e38."""
    one, other = (jh.lanczos(as_operator(s * VALUES), START, 8, reorthogonalize=reorthogonalize) for s in (1, scale))
    np.testing.assert_allclose(other.alphas / np.float32(scale), one.alphas, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(other.betas / np.float32(scale), one.betas, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_with_the_start_vector(scale):
    one, other = (jh.lanczos(as_operator(VALUES), jnp.asarray(s * START, jnp.float32), 8) for s in (1, scale))
    np.testing.assert_allclose(other.alphas, one.alphas, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_eigenpairs_and_their_residuals_scale_with_the_operator(scale):
    options = dict(like=jnp.zeros(DIM), key=jax.random.key(0), k=2, num_steps=6)
    (values, _, residuals), (scaled, _, rests) = (
        jh.top_eigenpairs(as_operator(s * VALUES), **options) for s in (1, scale)
    )
    np.testing.assert_allclose(scaled / scale, values, rtol=1e-3)
    np.testing.assert_allclose(rests / scale, residuals, rtol=1e-2)
    assert residuals.min() > 1e-4


def test_norms_without_squares():
    for tree in ({"a": np.zeros(3), "b": np.zeros(0)}, {"a": 3e-30 * np.ones(1), "b": np.array([[4e-30]])}):
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        np.testing.assert_allclose(tree_norm(tree), 5e-30 * bool(tree["a"].any()), rtol=1e-6)
    assert not np.isfinite(tree_norm([jnp.ones(2), jnp.array([np.inf])])) and np.isnan(tree_norm([jnp.array([np.nan])]))
    assert tree_norm([jnp.ones(4, jnp.bfloat16)]).dtype == jnp.bfloat16


# ---- breakdown ----


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize(("name", "count"), [("zero", 1), ("identity", 1), ("rank 3", 4), ("repeated", 4)])
def test_breakdown_ends_with_an_invariant_subspace(name, count, reorthogonalize, lanczos, x64):
    """Diagonal matrices: as many steps as there are different eigenvalues. Steps beyond the dimension too."""
    values = SPECTRA[name]
    found = lanczos(as_operator(values), jnp.ones(DIM), 10, reorthogonalize=reorthogonalize)
    steps = int(found.num_steps)
    assert steps == count
    leaves = [np.asarray(x) for x in jax.tree.leaves(found)]
    assert all(np.isfinite(x).all() for x in leaves)
    assert not found.betas[steps - 1 :].any() and not found.alphas[steps:].any()
    nodes = ritz(found.alphas[:steps], found.betas[:steps])[0]
    np.testing.assert_allclose(nodes, np.unique(values), atol=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_restarts_find_all_eigenvalues(name, dtype, lanczos):
    """Repeated ones too, in more steps than there are dimensions."""
    with jax.enable_x64(dtype is np.float64):
        matrix = jnp.asarray(rotated(SPECTRA[name]), dtype)
        found = lanczos(as_operator(matrix), jnp.asarray(START, dtype), DIM + 5, restart_key=jax.random.key(0))
    tolerance = 1e-5 if dtype is np.float32 else 1e-12
    values, _, residuals = ritz(found.alphas, found.betas)
    np.testing.assert_allclose(values, np.sort(SPECTRA[name]), atol=tolerance)
    assert int(found.num_steps) == len(found.alphas) == DIM
    basis = np.asarray(found.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(DIM), atol=tolerance)


def test_one_dimension(lanczos):
    for value in (3.0, 0.0, -2.0):
        found = lanczos(as_operator(np.array([value], np.float32)), jnp.ones(1), 5)
        assert (found.alphas.tolist(), found.betas.tolist(), int(found.num_steps)) == ([value], [0.0], 1)


# ---- ghosts ----


OUTLIERS = np.array([10.0, 20.0, 40.0, 80.0, 100.0])


def test_no_ghosts_after_200_steps():
    """Well separated large eigenvalues converge at once and come back where the basis is not kept orthogonal."""
    values = np.append(np.linspace(-0.1, 1, 395), OUTLIERS).astype(np.float32)
    operator, start = as_operator(values), helpers.normal(2, 400)
    copies = {}
    for reorthogonalize in (True, False):
        found = jh.lanczos(operator, start, 200, reorthogonalize=reorthogonalize)
        nodes = ritz(found.alphas, found.betas)[0]
        copies[reorthogonalize] = [int((abs(nodes - value) < 1e-2).sum()) for value in OUTLIERS]
        assert nodes.min() > -0.11 and nodes.max() < 100.01
        if reorthogonalize:
            basis = np.asarray(found.basis)
            np.testing.assert_allclose(basis @ basis.T, np.eye(200), atol=1e-5)
    assert copies[True] == [1] * 5
    assert max(copies[False]) > 1  # so that this test can fail


def test_three_vectors_give_the_same_density():
    values = np.append(np.linspace(-0.1, 1, 395), OUTLIERS).astype(np.float32)
    options = dict(like=jnp.zeros(400), key=jax.random.key(0), num_steps=100, weights="plain")
    full, lean = (jh.spectrum(as_operator(values), reorthogonalize=r, **options) for r in (True, False))
    grid, phi = full.density()
    assert scipy.integrate.trapezoid(abs(lean.density(grid=grid)[1] - phi), grid) < 0.05
    np.testing.assert_allclose(lean.mean, full.mean, rtol=1e-3)


# ---- progress, and what is refused ----


def test_progress():
    calls = []
    jh.lanczos(as_operator(VALUES), START, 5, progress=lambda *args: calls.append(args))
    assert calls == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("values", "start", "steps", "options", "message"),
    [
        (VALUES, START, 0, {}, "num_steps.*at least 1, got 0"),
        (VALUES, START, 2.5, {}, "num_steps.*2.5"),
        (VALUES, 0 * START, 5, {}, "start vector.*not zero"),
        (VALUES, np.nan * START, 5, {}, "start vector.*finite"),
        (np.inf * VALUES, START, 5, {}, "not finite at Lanczos step 1"),
        (VALUES, START, 5, {"restart_key": jax.random.key(0), "reorthogonalize": False}, "reorthogonalize=True"),
    ],
)
def test_invalid_arguments(values, start, steps, options, message):
    with pytest.raises(ValueError, match=message):
        jh.lanczos(as_operator(values), start, steps, **options)


# ---- the top eigenpairs ----


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 4, DIM])
def test_top_eigenpairs_equal_numpy(name, k):
    """Of low rank with k beyond the rank, with repeated values, and all of them."""
    matrix = rotated(SPECTRA[name]).astype(np.float32)
    values, vectors, residuals = jh.top_eigenpairs(as_operator(matrix), like=jnp.zeros(DIM), key=jax.random.key(0), k=k)
    np.testing.assert_allclose(values, np.sort(SPECTRA[name])[::-1][:k], atol=1e-5)
    vectors = np.asarray(vectors, np.float64)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-5)
    exact = np.linalg.norm(matrix @ vectors.T - vectors.T * values, axis=0)
    np.testing.assert_allclose(residuals, exact, atol=1e-5)
    assert max(residuals) < 1e-5


def test_top_eigenpairs_of_a_net():
    p = helpers.problem("mlp")
    dense = helpers.dense(p, "hessian")
    values, vectors, _ = jh.top_eigenpairs(p.operator("hessian"), like=p.params, key=jax.random.key(0), k=3)
    exact = np.linalg.eigh(dense)
    np.testing.assert_allclose(values, exact[0][::-1][:3], rtol=1e-4)
    for i in range(3):
        vector = helpers.ravel(jax.tree.map(lambda x, i=i: x[i], vectors))
        np.testing.assert_allclose(abs(vector @ exact[1][:, -1 - i]), 1, atol=1e-3)


def test_the_key_makes_the_start_vector():
    def found(seed):
        options = dict(like=jnp.zeros(DIM), key=jax.random.key(seed), k=2, num_steps=5)
        return jh.top_eigenpairs(as_operator(VALUES), **options)[0]

    np.testing.assert_array_equal(found(1), found(1))
    assert not np.array_equal(found(1), found(2))


def test_residuals_of_too_few_steps_are_honest():
    values = np.linspace(0, 1, 400).astype(np.float32)
    found, _, residuals = jh.top_eigenpairs(
        as_operator(values), like=jnp.zeros(400), key=jax.random.key(0), num_steps=10
    )
    assert residuals.min() > 1e-3
    for value, residual in zip(found, residuals, strict=True):
        assert abs(values - value).min() <= residual


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be.*at least 1, got 0"),
        ({"k": DIM + 1}, f"k = {DIM + 1}.*dimension {DIM}.*at most {DIM}"),
        ({"k": 5, "num_steps": 4}, "num_steps = 4.*k = 5.*more steps"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_top_eigenpairs_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        jh.top_eigenpairs(as_operator(VALUES), like=jnp.zeros(DIM), key=jax.random.key(0), **options)


@pytest.mark.parametrize("function", [jh.spectrum, jh.top_eigenpairs, jh.trace])
@pytest.mark.parametrize("like", [{}, {"w": np.zeros((0, 3))}])
def test_a_tree_without_numbers_is_refused(function, like):
    with pytest.raises(ValueError, match="like holds no numbers.*give a tree"):
        function(lambda v: v, like=like, key=jax.random.key(0))
    with pytest.raises(ValueError, match="start holds no numbers"):
        jh.lanczos(lambda v: v, like, 2)


@pytest.mark.parametrize("function", [jh.spectrum, jh.top_eigenpairs, jh.trace])
def test_half_precision_parameters(function):
    """``like=params`` of bfloat16 parameters: the operator answers in float32, and so must what is built on it."""
    p = helpers.problem("softmax regression")
    coarse = helpers.cast(p.params, jnp.bfloat16)
    fine = helpers.cast(coarse, jnp.float32)
    operator = jh.hessian(p.objective, coarse, p.batch)
    found = function(operator, like=coarse, key=jax.random.key(0))
    exact = np.linalg.eigvalsh(helpers.matrix(operator, fine))
    if function is jh.spectrum:
        np.testing.assert_allclose(found.nodes, exact, atol=1e-5)
    elif function is jh.top_eigenpairs:
        np.testing.assert_allclose(found[0], exact[::-1][:10], atol=1e-5)
    else:
        assert abs(found.mean - exact.sum()) < 4 * found.std_error


# ---- steps in numpy, on a CPU ----


def test_vectors_and_the_basis_stay_on_the_device_of_the_start():
    device, seen = jax.devices()[3], []
    start = jax.device_put({"a": jnp.arange(1.0, 4), "b": jnp.ones(2)}, device)

    def operator(v):
        seen.extend(jax.tree.leaves(v))
        return jax.tree.map(lambda x: jnp.arange(1.0, len(x) + 1) * x, v)

    found = jh.lanczos(operator, start, 3)
    spectrum = jh.spectrum(operator, like=start, key=jax.random.key(0), num_steps=2)
    assert spectrum.num_steps == 2
    assert len(seen) > 12 and all(isinstance(x, jax.Array) for x in seen)
    assert all(x.devices() == {device} for x in [*seen[:6], *jax.tree.leaves(found.basis)])


def test_rows_are_not_spread_along_the_axes_of_a_mesh_of_one_device():
    """The rows of the basis have one axis more than the vectors, which the mesh does not know."""
    places = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec("data"))
    start = jax.device_put(jnp.ones((4, 3)), places)
    found = jh.lanczos(lambda v: jnp.arange(1.0, 13).reshape(4, 3) * v, start, 3)
    assert found.basis.shape == (3, 4, 3)
    assert not isinstance(found.basis.sharding, jax.sharding.NamedSharding)


def test_parameters_bound_to_a_device_compile_no_more_programs():
    """Layers end one by one, and then send zeros instead of vectors."""
    p, counts = helpers.problem("mlp"), {}
    for where in (None, jax.devices()[0]):
        params = jax.device_put(p.params, where)
        jax.clear_caches()
        with helpers.counted_compilations() as compiled:
            jh.layer_spectra(p.objective, params, p.batch, key=jax.random.key(0), num_steps=20)
        counts[where] = len(compiled)
    assert counts[None] >= counts[jax.devices()[0]] > 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_steps_in_numpy_are_those_of_the_compiled_ones(scale):
    """Of trees with an array of no axis and an empty one, with numbers whose squares are out of range."""
    like = {"a": jnp.ones((3, 4)), "b": jnp.asarray(2.0), "c": jnp.zeros((0, 2)), "d": jnp.linspace(1, 2, 7)}
    values = jax.tree.map(lambda x: scale * (1 + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)), like)

    def run(start):
        return jh.lanczos(lambda v: jax.tree.map(jnp.multiply, values, v), start, 5)

    found, compiled = run(like), jax.jit(run)(like)
    for name in ("alphas", "betas"):
        ours, theirs = (np.asarray(getattr(x, name)) for x in (found, compiled))
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)
    for rows, others in zip(jax.tree.leaves(found.basis), jax.tree.leaves(compiled.basis), strict=True):
        assert rows.dtype == others.dtype
        np.testing.assert_allclose(rows, others, atol=1e-4)


def test_a_restart_in_two_precisions_under_strict_promotion(x64):
    like = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    with jax.numpy_dtype_promotion("strict"):
        found = jh.spectrum(lambda v: v, like=like, key=jax.random.key(0))
    np.testing.assert_allclose(found.nodes, 1, atol=1e-6)


def test_the_norm_of_many_equal_entries_is_that_of_all():
    assert np.isclose(norm_in_numpy({"a": np.full(10**7, 0.1, np.float32), "b": np.zeros(3)}), 0.1 * 10**3.5, rtol=1e-5)


# ---- a basis on the host ----


def test_a_basis_on_the_host_gives_the_same():
    p = helpers.problem("mlp")
    operator, start = jh.hessian(p.objective, p.params, p.batch), p.params
    device = jh.lanczos(operator, start, 8)
    host = jh.lanczos(operator, start, 8, reorthogonalize="host")
    np.testing.assert_allclose(host.alphas, device.alphas, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(host.betas, device.betas, rtol=1e-4, atol=1e-5)
    for rows, expected in zip(jax.tree.leaves(host.basis), jax.tree.leaves(device.basis), strict=True):
        assert isinstance(rows, np.ndarray) and rows.shape == expected.shape
        np.testing.assert_allclose(rows, expected, atol=1e-3)


def test_a_basis_on_the_host_with_restarts_finds_repeated_eigenvalues():
    values = np.array([3.0, 3.0, 3.0, 1.0, 1.0, -2.0])
    operator, key = helpers.as_operator(helpers.rotated(values)), jax.random.key(1)
    found, vectors, residuals = jh.top_eigenpairs(
        operator, like=jnp.zeros(6), key=key, k=4, num_steps=6, reorthogonalize="host"
    )
    np.testing.assert_allclose(found, [3, 3, 3, 1], atol=1e-4)
    assert isinstance(vectors, np.ndarray) and residuals.max() < 1e-4
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-4)
    spectrum = jh.spectrum(operator, like=jnp.zeros(6), key=key, reorthogonalize="host")
    np.testing.assert_allclose(spectrum.nodes, np.sort(values), atol=1e-4)


def test_a_basis_on_the_host_is_refused_under_jit_and_other_words_everywhere():
    with pytest.raises(TypeError, match="a basis on the host needs a loop on the host"):
        jax.jit(lambda v: jh.lanczos(lambda x: x, v, 2, reorthogonalize="host").alphas)(jnp.ones(3))
    with pytest.raises(ValueError, match="True, False or 'host', got 'disk'"):
        jh.lanczos(lambda x: x, jnp.ones(3), 2, reorthogonalize="disk")
