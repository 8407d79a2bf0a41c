"""The optimizer's geometry, and how a training is followed: preconditioned curvature, warm starts, subspaces."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxhess as jh

P = helpers.problem("mlp")
KEY = jax.random.key(0)
SLOPE = jax.jit(jax.grad(P.objective))
FLAT = ravel_pytree(P.params)[0]
DENSE = helpers.matrices(P)["hessian"]


def _flat(tree):
    return np.asarray(
        ravel_pytree(jax.tree.map(lambda x, p: jnp.broadcast_to(x, p.shape), tree, P.params))[0], np.float64
    )


def trained(tx, steps):
    """The state of an optimizer after so many steps at parameters that stay where they are, with growing slopes."""
    state = tx.init(P.params)
    for step in range(steps):
        grads = jax.tree.map(lambda g, s=step: (1 + s) * g, SLOPE(P.params, P.batch))
        _, state = tx.update(grads, state, P.params)
    return state


def slopes(steps):
    return [(1 + step) * _flat(SLOPE(P.params, P.batch)) for step in range(steps)]


def mean_of_squares(decay, steps, power=2):
    total = np.zeros(FLAT.size)
    for g in slopes(steps):
        total = decay * total + (1 - decay) * g**power
    return total


def adam(steps, b2=0.999, eps=1e-8):
    return np.sqrt(mean_of_squares(b2, steps) / (1 - b2 ** max(steps, 1))) + eps


OPTIMIZERS = {
    "adam": (optax.adam(1e-3), adam),
    "adamw in a chain": (optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1e-3)), adam),
    "adam, injected": (optax.inject_hyperparams(optax.adam)(1e-3, b2=0.9, eps=1e-3), lambda n: adam(n, 0.9, 1e-3)),
    "accumulated": (optax.MultiSteps(optax.adam(1e-3), 1), adam),
    "rmsprop": (optax.rmsprop(1e-3, eps=1e-8), lambda n: np.sqrt(mean_of_squares(0.9, n) + 1e-8)),
    "rmsprop, corrected": (
        optax.rmsprop(1e-3, bias_correction=True),
        lambda n: np.sqrt(mean_of_squares(0.9, n) / (1 - 0.9 ** max(n, 1)) + 1e-8),
    ),
    "rmsprop, centred": (
        optax.rmsprop(1e-3, centered=True),
        lambda n: np.sqrt(mean_of_squares(0.9, n) - mean_of_squares(0.9, n, 1) ** 2 + 1e-8),
    ),
    "adagrad": (optax.adagrad(1e-3), lambda n: np.sqrt(0.1 + sum(g**2 for g in slopes(n)) + 1e-7)),
    "amsgrad": (optax.amsgrad(1e-3), lambda n: adam(n)),
}


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preconditioners_of_optimizers(name, steps):
    """Against the definition, written out in numpy; and against how far the optimizer divides a slope."""
    tx, scale = OPTIMIZERS[name]
    found = jh.preconditioner(trained(tx, steps))
    assert jax.tree.structure(found) == jax.tree.structure(P.params)
    assert np.allclose(_flat(found), scale(steps), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad", "adam, injected"])
@pytest.mark.parametrize("steps", [0, 3])
def test_preconditioned_products_and_spectra_are_the_dense_ones(name, steps):
    tx, scale = OPTIMIZERS[name]
    operator = jh.precondition(P.operator("hessian"), jh.preconditioner(trained(tx, steps)))
    root = np.broadcast_to(scale(steps), FLAT.shape) ** -0.5
    true = root[:, None] * DENSE * root
    v, unravel = helpers.normal(3, FLAT.size), ravel_pytree(P.params)[1]
    for form in (operator, jh.linearize(operator, like=P.params)):
        assert np.allclose(
            _flat(form(unravel(jnp.asarray(v)))), true @ v, rtol=1e-3, atol=1e-5 * np.abs(true @ v).max()
        )
    values = np.linalg.eigvalsh(true)
    top, _, residuals = jh.top_eigenpairs(operator, like=P.params, key=KEY, k=2)
    assert np.allclose(top, values[::-1][:2], rtol=1e-4) and (residuals < 1e-2 * values[-1]).all()
    spectrum = jh.spectrum(operator, like=P.params, key=KEY, num_steps=FLAT.size)
    assert np.isclose(spectrum.trace, np.trace(true), rtol=1e-3, atol=1e-3 * values[-1])
    trace = jh.trace(operator, like=P.params, key=KEY, method="xtrace", num_probes=FLAT.size)
    assert np.isclose(trace.mean, np.trace(true), rtol=1e-3, atol=1e-3 * values[-1])


def test_of_one_layer_and_of_several_batches():
    scale = jax.tree.map(lambda x: 1 + x**2, P.params)
    block = jh.precondition(P.operator("hessian", "fc1"), jh.subtree(scale, "fc1"))
    like = jh.subtree(P.params, "fc1")
    ids = jh.subtree(ravel_pytree(P.params)[1](jnp.arange(FLAT.size, dtype=jnp.float32)), "fc1")
    places = np.asarray(ravel_pytree(ids)[0], int)
    root = _flat(scale) ** -0.5
    true = (root[:, None] * DENSE * root)[np.ix_(places, places)]
    top, _, _ = jh.top_eigenpairs(block, like=like, key=KEY, k=1)
    assert np.isclose(top[0], np.linalg.eigvalsh(true)[-1], rtol=1e-4)
    halves = [jax.tree.map(lambda x, s=part: x[s], P.batch) for part in (slice(0, 4), slice(4, 7))]
    many = jh.precondition(jh.hessian(P.objective, P.params, jh.Batches(halves)), scale)
    whole = root[:, None] * DENSE * root
    assert np.isclose(
        jh.top_eigenpairs(many, like=P.params, key=KEY, k=1)[0][0], np.linalg.eigvalsh(whole)[-1], rtol=1e-4
    )
    assert np.isclose(jh.trace(many, like=P.params, key=KEY).mean, np.trace(whole), rtol=0.5)


def test_parameters_of_another_optimizer_have_a_scale_of_one():
    tx = optax.multi_transform({"a": optax.adam(1e-3), "s": optax.sgd(1e-2)}, {"fc1": "a", "fc2": "s"})
    with pytest.raises(ValueError, match="give params="):
        jh.preconditioner(trained(tx, 2))
    found = jh.preconditioner(trained(tx, 2), params=P.params)
    assert jax.tree.structure(found) == jax.tree.structure(P.params)
    assert np.allclose(_flat(found)[: -_size("fc2")], adam(2)[: -_size("fc2")], rtol=1e-4)
    assert all((x == 1).all() for x in jax.tree.leaves(found["fc2"]))
    operator = jh.precondition(P.operator("hessian"), found)
    assert np.isfinite(_flat(operator(P.params))).all()


def _size(layer):
    return sum(x.size for x in jax.tree.leaves(P.params[layer]))


def test_two_rates_of_one_optimizer():
    tx = optax.multi_transform({"a": optax.adam(1e-3), "b": optax.adam(1e-1)}, {"fc1": "a", "fc2": "b"})
    assert np.allclose(_flat(jh.preconditioner(trained(tx, 2))), adam(2), rtol=2e-4)
    masked = optax.chain(optax.masked(optax.adam(1e-3), {"fc1": True, "fc2": False}), optax.identity())
    found = jh.preconditioner(trained(masked, 2), params=P.params)
    assert all((x == 1).all() for x in jax.tree.leaves(found["fc2"]))


def test_eps_root_of_adam():
    for tx in (optax.adam(1e-3, eps_root=0.5), optax.inject_hyperparams(optax.adam)(1e-3, eps_root=0.5)):
        found = jh.preconditioner(trained(tx, 2), eps_root=0.5)
        assert np.allclose(_flat(found) ** 2, adam(2) ** 2 + 0.5, rtol=1e-3)
    injected = jh.preconditioner(trained(optax.inject_hyperparams(optax.adam)(1e-3, eps_root=0.5), 2))
    assert np.allclose(_flat(injected), _flat(found))


# ---- following a training ----


def rotated(seed, values):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values),) * 2))
    return basis @ np.diag(values) @ basis.T, basis


@pytest.mark.parametrize(
    "options",
    [{"max_vectors": 12}, {"max_vectors": 9, "rtol": 1e-4}, {"rtol": 1e-3}, {"num_steps": 60, "max_vectors": 60}],
)
def test_thick_restarts_find_what_the_whole_basis_finds(options):
    values = np.concatenate([np.linspace(-1, 1, 195), [2.0, 3.0, 4.0, 6.0, 9.0]])
    matrix, basis = rotated(1, values)
    matrix = jnp.asarray(matrix, jnp.float32)
    found, vectors, residuals = jh.top_eigenpairs(
        lambda v: matrix @ v, like=jnp.zeros(200), key=KEY, k=3, **{"num_steps": 200, **options}
    )
    true = np.array([9.0, 6.0, 4.0])
    assert (np.abs(found - true) <= residuals + 1e-5).all() and np.allclose(found, true, rtol=1e-3)
    assert np.allclose(vectors @ vectors.T, np.eye(3), atol=1e-5)
    if options.get("rtol") is None:
        assert np.allclose(np.abs(np.sum(np.asarray(vectors) * basis.T[::-1][:3], 1)), 1, atol=1e-3)


def test_from_one_vector_it_is_lanczos():
    matrix = jnp.asarray(rotated(2, np.linspace(0, 1, 50) ** 4)[0], jnp.float32)
    start = helpers.normal(4, 50)
    for steps in (3, 8):
        ours, _, _ = jh.top_eigenpairs(
            lambda v: matrix @ v, like=jnp.zeros(50), key=KEY, k=1, start=start[None], num_steps=steps
        )
        run = jh.lanczos(lambda v: matrix @ v, jnp.asarray(start), steps)
        tridiagonal = np.diag(run.alphas) + np.diag(run.betas[:-1], 1) + np.diag(run.betas[:-1], -1)
        assert np.isclose(ours[0], np.linalg.eigvalsh(tridiagonal)[-1], rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_warm_start_follows_a_training_within_six_products(optimizer):
    """To 1% of the largest eigenvalue of the dense matrix, over 200 steps; plain, and in the geometry of Adam."""
    objective, params, batch = P.objective, P.params, P.batch
    tx = optax.sgd(0.3) if optimizer == "sgd" else optax.adam(1e-2)
    state, unravel = tx.init(params), ravel_pytree(params)[1]
    dense = jax.jit(jax.hessian(lambda flat: objective(unravel(flat), batch)))
    counted = Counter()
    vectors = None
    for step in range(201):
        grads = SLOPE(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        operator, root = jh.hessian(objective, params, batch), np.ones(FLAT.size)
        if optimizer == "adam":
            scale = jh.preconditioner(state)
            operator, root = jh.precondition(operator, scale), _flat(scale) ** -0.5
        counted.count, counted.operator = 0, operator
        options = dict(start=vectors, num_steps=None if vectors is None else 6)
        values, vectors, residuals = jh.top_eigenpairs(counted, like=params, key=KEY, k=1, **options)
        if step % 10 == 0:
            matrix = np.asarray(dense(ravel_pytree(params)[0]), np.float64)
            every = np.linalg.eigvalsh(root[:, None] * matrix * root)
            assert abs(values[0] - every[-1]) < 0.01 * every[-1], step
            # The dense matrix is of float32 too.
            assert np.abs(every - values[0]).min() <= residuals[0] + 1e-5 * every[-1], step
        assert step == 0 or counted.count <= 6


class Counter:
    """A function of the host, that counts how often it is called."""

    count, operator = 0, None

    def __call__(self, v):
        if not isinstance(jax.tree.leaves(v)[0], jax.core.Tracer):
            self.count += 1
        return self.operator(v)


def test_several_pairs_and_more_vectors_than_pairs():
    values = np.concatenate([np.linspace(0, 1, 90), np.linspace(3, 8, 10)])
    matrix, basis = rotated(5, values)
    moved = jnp.asarray(matrix + 0.02 * np.diag(np.random.default_rng(0).standard_normal(100)), jnp.float32)
    like = jnp.zeros(100)
    for rows in (2, 4, 7):
        start = jnp.asarray(basis.T[::-1][:rows], jnp.float32)
        found, vectors, residuals = jh.top_eigenpairs(lambda v: moved @ v, like=like, key=KEY, k=4, start=start)
        assert vectors.shape == (4, 100) and len(residuals) == 4
        true = np.linalg.eigvalsh(np.asarray(moved, np.float64))[::-1][:4]
        assert np.allclose(found[: min(rows, 4)], true[: min(rows, 4)], rtol=2e-3)


def test_a_start_that_lacks_the_largest_finds_it():
    """Eigenvectors of other eigenvalues: their residuals are zero."""
    for rows in (1, 2):
        start = jnp.eye(10)[7 : 7 + rows]
        found, _, _ = jh.top_eigenpairs(lambda v: jnp.arange(10.0) * v, like=jnp.zeros(10), key=KEY, k=1, start=start)
        assert found[0] > 8.5
    start = jnp.eye(37)[:1]
    values = jnp.concatenate([jnp.array([-200.0]), jnp.linspace(0, 90, 35), jnp.array([100.0])])
    found, _, _ = jh.top_eigenpairs(lambda v: values * v, like=jnp.zeros(37), key=KEY, k=1, start=start, num_steps=20)
    assert found[0] == pytest.approx(100, rel=0.02)


def test_dependent_start_vectors_count_once():
    start = jnp.tile(jnp.eye(6)[:1], (3, 1))
    found, _, _ = jh.top_eigenpairs(lambda v: jnp.arange(6.0) * v, like=jnp.zeros(6), key=KEY, k=2, start=start)
    assert np.allclose(found, [5, 4], atol=1e-4)


# ---- subspaces, shares, critical sharpness ----


def test_overlap_of_subspaces():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((3, 20)), rng.standard_normal((5, 20))
    qa, qb = np.linalg.qr(a.T)[0], np.linalg.qr(b.T)[0]

    def tree(rows):
        return {
            "x": jnp.asarray(rows[:, :12].reshape(-1, 3, 4), jnp.float32),
            "y": jnp.asarray(rows[:, 12:], jnp.float32),
        }

    true = np.sum((qa.T @ qb) ** 2) / 3
    assert np.isclose(jh.subspace_overlap(tree(a), tree(b)), true, rtol=1e-4)
    assert np.isclose(jh.subspace_overlap(tree(b), tree(a)), true, rtol=1e-4)
    assert jh.subspace_overlap(tree(a), tree(100 * rng.standard_normal((3, 3)) @ a)) == pytest.approx(1, abs=1e-4)
    near = np.stack([a[0], a[0] + 1e-3 * a[1]])
    assert jh.subspace_overlap(tree(near), tree(a[:2])) == pytest.approx(1, abs=1e-3)
    assert jh.subspace_overlap(tree(1e-20 * a), tree(1e15 * a)) == pytest.approx(1, abs=1e-4)
    mixed = 0.6 * qb[:, 0] + 0.8 * np.linalg.svd(qb.T)[2][-1]
    assert jh.subspace_overlap(tree(mixed[None]), tree(b)) == pytest.approx(0.36, abs=1e-4)


@pytest.mark.parametrize("rate", [0.03, 1.0, 40.0])
def test_critical_sharpness_of_a_quadratic(rate):
    matrix, _ = rotated(7, np.linspace(0.1, 3, 12))
    w = np.random.default_rng(8).standard_normal(12)
    g = matrix @ w
    found = jh.critical_sharpness(
        lambda p, a: jnp.vdot(p, a @ p) / 2,
        jnp.asarray(w, jnp.float32),
        jnp.asarray(matrix, jnp.float32),
        jnp.asarray(-rate * g, jnp.float32),
        learning_rate=rate,
    )
    assert found == pytest.approx(g @ matrix @ g / (g @ g), rel=0.02)


def test_critical_sharpness_of_a_net_is_where_the_loss_crosses():
    update = jax.tree.map(lambda g: -0.5 * g, SLOPE(P.params, P.batch))
    found = jh.critical_sharpness(P.objective, P.params, P.batch, update, learning_rate=0.5)
    loss = jax.jit(lambda c: P.objective(jax.tree.map(lambda p, u: p + c * u, P.params, update), P.batch))
    rates = np.linspace(0.02, 1.5, 75) * 2 / found
    crossing = next(rate for rate in rates if loss(rate / 0.5) > loss(0.0))
    assert 2 / found == pytest.approx(crossing, rel=0.06)


def test_critical_sharpness_where_a_step_always_or_never_raises_the_loss():
    up, down = jnp.ones(2), -jnp.ones(2)
    assert jh.critical_sharpness(lambda p, _: p.sum(), jnp.ones(2), None, up) == float("inf")
    assert jh.critical_sharpness(lambda p, _: p.sum(), jnp.ones(2), None, down) == 0.0


@pytest.mark.parametrize("size", [4.0, 8.0, 5.0, 1e6])
def test_critical_sharpness_where_long_steps_overflow_or_cross_exactly(size):
    loss = lambda w, _: jnp.sum(w**2) / 2 + jnp.where(jnp.abs(w[0]) < 1.5, 0.0, jnp.nan)
    found = jh.critical_sharpness(loss, jnp.ones(1), None, -size * jnp.ones(1), learning_rate=size)
    assert found == pytest.approx(1.0, rel=0.02)


# ---- what is refused ----

LIKE = {"a": jnp.ones(3), "b": jnp.ones(2)}


def top(**options):
    return jh.top_eigenpairs(lambda v: v, like=LIKE, key=KEY, k=1, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jh.preconditioner(trained(optax.sgd(0.1), 1)), ValueError, "no second moments.*SGD has no precond"),
        (lambda: jh.preconditioner(()), ValueError, "no second moments"),
        (
            lambda: jh.preconditioner(trained(optax.chain(optax.scale_by_adam(), optax.scale_by_rms()), 1)),
            ValueError,
            "two transformations",
        ),
        (lambda: jh.precondition(lambda v: v, {"a": jnp.array([1.0, 0.0])}), ValueError, r"positive.*\['a'\]"),
        (lambda: jh.precondition(lambda v: v, {"a": jnp.array(jnp.nan)}), ValueError, "positive and finite"),
        (lambda: jh.precondition(lambda v: v, {"a": 1.0})(LIKE), ValueError, "does not match the scale"),
        (lambda: top(start={"a": jnp.ones((1, 3))}), ValueError, "start must be a pytree like"),
        (lambda: top(start=LIKE), ValueError, "start must be a pytree like"),
        (lambda: top(start=jax.tree.map(lambda x: 0 * x[None], LIKE)), ValueError, "are zero"),
        (lambda: top(start=jax.tree.map(lambda x: jnp.nan * x[None], LIKE)), ValueError, "not finite"),
        (lambda: top(rtol=1.0), ValueError, r"rtol must lie in \[0, 1\)"),
        (lambda: top(max_vectors=2), ValueError, "max_vectors = 2 must be at least k . 2 = 3"),
        (lambda: top(max_vectors=4, reorthogonalize="host"), ValueError, "reorthogonalize=True"),
        (
            lambda: jh.top_eigenpairs(
                lambda v: jnp.triu(jnp.ones((4, 4))) @ v, like=jnp.zeros(4), key=KEY, k=1, start=jnp.eye(4)[:2]
            ),
            ValueError,
            "not symmetric",
        ),
        (lambda: jh.subspace_overlap(jnp.ones((1, 3)), jnp.ones((1, 4))), ValueError, "one structure with equal rows"),
        (lambda: jh.subspace_overlap(jnp.ones((2, 3)), jnp.eye(3)), ValueError, "linearly dependent"),
        (lambda: jh.precondition(lambda v: v, {"a": jnp.ones(4), "b": 1.0})(LIKE), ValueError, r"shape \(4,\) where v"),
        (lambda: jh.critical_sharpness(lambda p, _: p.sum() * jnp.nan, LIKE["a"], None, LIKE["a"]), ValueError, "nan"),
        (lambda: jh.critical_sharpness(lambda p, _: p.sum(), jnp.ones(2), None, jnp.zeros(2)), ValueError, "zero"),
        (
            lambda: jh.critical_sharpness(lambda p, _: p.sum(), jnp.ones(2), None, jnp.ones(2), learning_rate=0.0),
            ValueError,
            "learning_rate must be positive",
        ),
        (lambda: jh.critical_sharpness(lambda p, _: p.sum(), jnp.ones(2), None, jnp.ones(3)), ValueError, "v does not"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
