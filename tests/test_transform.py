"""The transformation: when it acts, what it adds, what it keeps, and how it lives with the rest of optax."""

import functools
from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import problem

import jaxhess as jh

KEY = jax.random.key(3)
P = problem("mlp")


def zeros():
    return jax.tree.map(jnp.zeros_like, P.params)


def run(tx, steps, params=None, batch=None):
    """Updates of so many steps at fixed parameters and zero gradients, and the last state."""
    params = P.params if params is None else params
    step = jax.jit(lambda state: tx.update(zeros(), state, params, batch=P.batch if batch is None else batch))
    state, updates = tx.init(params), []
    for _ in range(steps):
        update, state = step(state)
        updates.append(helpers.ravel(update))
    return updates, state


def expected(count, **options):
    key = jax.random.fold_in(KEY, count)
    return jh.hessian_trace_penalty(P.objective, P.params, P.batch, key=key, **options)


@pytest.mark.parametrize(("every", "start", "acts"), [(1, 0, range(8)), (3, 0, [0, 3, 6]), (3, 2, [2, 5]), (5, 6, [6])])
def test_acts_on_the_steps_that_it_says(every, start, acts):
    updates, state = run(jh.add_hessian_trace(P.objective, 1e-2, every=every, start=start, key=KEY), 8)
    assert [i for i, update in enumerate(updates) if np.any(update)] == list(acts)
    assert (state.count, state.skipped) == (8, 0)


@pytest.mark.parametrize(
    "options", [{}, {"layers": ["fc1"], "curvature": "ggn", "num_probes": 2}, {"layers": "middle"}]
)
def test_adds_gamma_times_the_gradient_with_the_probes_of_the_step(options):
    updates, state = run(jh.add_hessian_trace(P.objective, 0.5, key=KEY, **options), 3)
    for count, update in enumerate(updates):
        penalty, gradient = expected(count, **options)
        np.testing.assert_allclose(update, 0.5 * helpers.ravel(gradient), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.penalty, penalty, rtol=1e-5)
    assert not np.allclose(updates[0], updates[1])


def test_gamma_may_be_a_schedule():
    updates, _ = run(jh.add_hessian_trace(P.objective, lambda count: 0.1 * count, key=KEY), 3)
    for count, update in enumerate(updates):
        np.testing.assert_allclose(update, 0.1 * count * helpers.ravel(expected(count)[1]), rtol=1e-4, atol=1e-6)


def test_ten_steps_are_one_compilation():
    loss = helpers.Counter(P.objective)
    tx = optax.chain(jh.add_hessian_trace(loss, 1e-2, every=3, key=KEY), optax.sgd(0.1, momentum=0.9))
    step = helpers.Counter(lambda params, state, batch: tx.update(zeros(), state, params, batch=batch))
    jitted = jax.jit(step)
    params, state = P.params, tx.init(P.params)
    for _ in range(10):
        updates, state = jitted(params, state, P.batch)
        traces = loss.calls
        params = optax.apply_updates(params, updates)
    assert step.calls == 1
    assert loss.calls == traces


def test_between_the_steps_there_is_no_work():
    """The penalty stands in one branch of a conditional, and nothing of it outside."""
    loss = helpers.Counter(lambda p, b: jnp.sum(jnp.sin(p["w"])))
    tx = jh.add_hessian_trace(loss, 1e-2, every=3, key=KEY)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(lambda s: tx.update(params, s, params, batch=None))(state).jaxpr
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert names.count("cond") == 1
    assert not {"sin", "cos", "random_bits"} & set(names)


# ---- with the rest of optax and jax ----


def test_in_a_chain_sgd_turns_it_into_a_step_down():
    tx = optax.chain(jh.add_hessian_trace(P.objective, 0.5, key=KEY), optax.sgd(0.1))
    updates, _ = run(tx, 1)
    np.testing.assert_allclose(updates[0], -0.05 * helpers.ravel(expected(0)[1]), rtol=1e-4, atol=1e-7)


def test_inject_hyperparams():
    static = ("loss", "key", "every", "start", "layers", "num_probes", "curvature", "probe", "has_aux")
    make = optax.inject_hyperparams(jh.add_hessian_trace, static_args=static)
    tx = make(loss=P.objective, gamma=0.5, key=KEY, every=2)
    state = tx.init(P.params)
    for gamma in (0.5, 0.25):
        state.hyperparams["gamma"] = jnp.asarray(gamma)
        updates, _ = jax.jit(lambda s: tx.update(zeros(), s, P.params, batch=P.batch))(state)
        np.testing.assert_allclose(helpers.ravel(updates), gamma * helpers.ravel(expected(0)[1]), rtol=1e-4, atol=1e-6)


def test_multi_steps():
    tx = optax.MultiSteps(jh.add_hessian_trace(P.objective, 0.5, key=KEY), every_k_schedule=2)
    updates, state = run(tx, 4)
    assert [bool(np.any(u)) for u in updates] == [False, True, False, True]
    np.testing.assert_allclose(updates[1], 0.5 * helpers.ravel(expected(0)[1]), rtol=1e-4, atol=1e-6)
    assert state.inner_opt_state.count == 2


def test_a_donated_state_leaves_the_key_alone():
    key = jax.random.key(3)
    tx = jh.add_hessian_trace(P.objective, 0.5, key=key)
    step = jax.jit(lambda s: tx.update(zeros(), s, P.params, batch=P.batch), donate_argnums=0)
    for _ in range(2):
        step(tx.init(P.params))
    assert jax.random.key_data(key).tolist() == [0, 3]


def test_state_is_plain_arrays_and_brings_the_probes_back():
    tx = jh.add_hessian_trace(P.objective, 0.5, key=KEY)
    _, state = run(tx, 2)
    kept = jax.tree.map(np.asarray, state)  # through a checkpoint
    assert all(leaf.dtype.kind in "iuf" for leaf in jax.tree.leaves(kept))
    other = jh.add_hessian_trace(P.objective, 0.5, key=jax.random.key(99))
    (a, _), (b, _) = (t.update(zeros(), s, P.params, batch=P.batch) for t, s in ((tx, state), (other, kept)))
    np.testing.assert_array_equal(helpers.ravel(a), helpers.ravel(b))


def test_raw_keys():
    raw, _ = run(jh.add_hessian_trace(P.objective, 0.5, key=jax.random.PRNGKey(3)), 1)
    typed, _ = run(jh.add_hessian_trace(P.objective, 0.5, key=jax.random.key(3)), 1)
    np.testing.assert_array_equal(raw[0], typed[0])


def test_bfloat16_training():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), P.params)
    tx = jh.add_hessian_trace(P.objective, 0.5, key=KEY)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(lambda s: tx.update(grads, s, params, batch=P.batch))(tx.init(params))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.penalty.dtype == jnp.float32


def test_aux_is_taken_off():
    tx = jh.add_hessian_trace(lambda p, b: (P.objective(p, b), {"aux": 1}), 0.5, key=KEY, has_aux=True)
    np.testing.assert_allclose(run(tx, 1)[0][0], 0.5 * helpers.ravel(expected(0)[1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", ["batch norm", "batch statistics and dropout"])
def test_batch_norm_and_dropout_are_the_loss_as_given(net):
    p = problem(net)
    tx = jh.add_hessian_trace(p.objective, 1.0, key=KEY)
    grads = jax.tree.map(jnp.zeros_like, p.params)
    updates, state = jax.jit(lambda s, b: tx.update(grads, s, p.params, batch=b))(tx.init(p.params), p.batch)
    penalty, gradient = jh.hessian_trace_penalty(p.objective, p.params, p.batch, key=jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(state.penalty, penalty, rtol=1e-5)
    np.testing.assert_allclose(helpers.ravel(updates), helpers.ravel(gradient), rtol=1e-4, atol=3e-6)


def test_it_lowers_the_trace_in_training():
    def train(gamma):
        tx = optax.chain(jh.add_hessian_trace(P.objective, gamma, curvature="ggn", key=KEY), optax.sgd(0.1))

        @jax.jit
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(P.objective)(params, P.batch), state, params, batch=P.batch)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (P.params, tx.init(P.params)), length=200)
        traces = jh.layer_traces(P.objective, params, P.batch, key=KEY, curvature="ggn", num_probes=256)
        return float(traces["total"].mean)

    assert train(0.3) < 0.5 * train(0.0)


# ---- a penalty that is not finite ----


@functools.partial(jax.jit, static_argnums=0)
def _step(tx, state, params, batch):
    return tx.update(jax.tree.map(jnp.ones_like, params), state, params, batch=batch)


def test_a_penalty_that_is_not_finite_is_left_out_and_counted():
    tx = jh.add_hessian_trace(lambda p, scale: scale * jnp.sum(p["w"] ** 4), 1.0, key=KEY)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    assert state.penalty == 0
    for count, (scale, skipped) in enumerate([(1.0, 0), (np.inf, 1), (np.nan, 2), (1.0, 2)], 1):
        updates, state = _step(tx, state, params, jnp.asarray(scale))
        assert (state.count, state.skipped) == (count, skipped)
        assert np.isfinite(state.penalty) == np.isfinite(scale)
        np.testing.assert_allclose(updates["w"], 25.0 if np.isfinite(scale) else 1.0)


@pytest.mark.parametrize("gamma", [np.nan, np.inf, -1.0, 1e38])
def test_what_gamma_makes_of_a_penalty_is_looked_at_too(gamma):
    tx = jh.add_hessian_trace(lambda p, scale: scale * jnp.sum(p["w"] ** 4), lambda count: gamma, key=KEY)
    params = {"w": jnp.ones(2)}
    updates, state = _step(tx, tx.init(params), params, jnp.asarray(1.0))
    assert state.skipped == 1 and np.isfinite(state.penalty)
    np.testing.assert_array_equal(updates["w"], 1.0)


@pytest.mark.parametrize("gamma", [1e-8, 1e-4])
def test_half_precision_is_scaled_in_float32(gamma):
    """gamma is zero in float16, or the gradient infinite; their product is neither."""
    tx = jh.add_hessian_trace(lambda p, scale: scale * jnp.sum(p["w"].astype(jnp.float32) ** 3), gamma, key=KEY)
    params = {"w": jnp.ones(2, jnp.float16)}
    updates, state = _step(tx, tx.init(params), params, jnp.float32(10 / gamma))
    assert state.skipped == 0 and updates["w"].dtype == jnp.float16
    np.testing.assert_allclose(updates["w"], 61.0, rtol=1e-3)


# ---- outside jit, and in optax's tools ----


def test_without_jit_too_only_the_first_step_compiles():
    tx = jh.add_hessian_trace(P.objective, 1e-2, every=3, key=KEY)
    state, acted = tx.init(P.params), []
    for i in range(4):
        with helpers.counted_compilations() as compiled:
            updates, state = tx.update(zeros(), state, P.params, batch=P.batch)
        acted.append(bool(np.any(helpers.ravel(updates))))
        assert not i or not compiled
    assert acted == [True, False, False, True] and state.count == 4


def test_the_state_is_found_by_optax():
    tx = optax.chain(jh.add_hessian_trace(P.objective, 1e-2, key=KEY), optax.adam(1e-3))
    state = optax.tree_map_params(tx, lambda x: x + 1, tx.init(P.params))
    np.testing.assert_array_equal(helpers.ravel(state[1][0].mu), 1.0)
    assert state[0].count == 0


def test_nothing_is_nan_before_the_first_penalty():
    tx = jh.add_hessian_trace(P.objective, 1e-2, start=2, key=KEY)
    with jax.debug_nans(True):
        updates, _ = run(tx, 3)
    assert [bool(np.any(update)) for update in updates] == [False, False, True]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": -1.0}, ValueError, "gamma.*not negative.*-1"),
        ({"gamma": float("nan")}, ValueError, "gamma.*finite.*nan"),
        ({"gamma": None}, ValueError, "gamma.*a finite number.*None"),
        ({"gamma": 1j}, ValueError, "gamma.*a finite number"),
        ({"every": 0}, ValueError, "every.*at least 1.*0"),
        ({"every": 2.5}, ValueError, "every.*whole.*2.5"),
        ({"start": -1}, ValueError, "start.*-1"),
        ({"layers": []}, ValueError, "selects no layer"),
        ({"layers": 0}, ValueError, "depth of layers is at least 1, got 0"),
        ({"curvature": "fisher"}, ValueError, "fisher"),
        ({"probe": "uniform"}, ValueError, "uniform.*rademacher"),
        ({"key": None}, TypeError, "one JAX random key.*None"),
        ({"key": jax.random.split(KEY, 2)}, TypeError, "one JAX random key"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        jh.add_hessian_trace(P.objective, **{"gamma": 1e-3, "key": KEY} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx, s: tx.update(zeros(), s, P.params), "needs the batch.*batch=batch"),
        (lambda tx, s: tx.update(zeros(), s, batch=P.batch), "needs the parameters"),
        (lambda tx, s: tx.update(zeros() | {"fc1": None}, s, P.params, batch=P.batch), "like the parameters.*layers="),
        (lambda tx, s: tx.update(zeros(), s, P.params, batch={"x": P.batch["x"]}), "no labels in the batch"),
        (lambda tx, s: tx.update(zeros(), s, P.params, batch=P.batch | {"label": jnp.arange(3)}), "labels of shape"),
    ],
)
def test_bad_updates(call, message):
    tx = jh.add_hessian_trace(P.objective, 1e-3, key=KEY)
    with pytest.raises(ValueError, match=message):
        call(tx, tx.init(P.params))


def test_unknown_layers_are_named_at_the_first_update():
    tx = jh.add_hessian_trace(P.objective, 1e-3, key=KEY, layers=["fc9"])
    with pytest.raises(ValueError, match=r"fc9.*\['fc1', 'fc2'\]"):
        tx.update(zeros(), tx.init(P.params), P.params, batch=P.batch)


def test_masked_parameters_are_refused_with_the_remedy():
    tx = optax.masked(jh.add_hessian_trace(P.objective, 1e-3, key=KEY), {"fc1": True, "fc2": False})
    with pytest.raises(ValueError, match="layers="):
        tx.update(zeros(), tx.init(P.params), P.params, batch=P.batch)


def test_the_host_may_say_on_which_steps_it_acts():
    """As a static argument of the step: the same updates as by the schedule, and no branch in the program."""
    p = helpers.problem("mlp")
    tx = jh.add_hessian_trace(p.objective, 0.1, every=3, start=1, key=KEY)
    grads = jax.grad(p.objective)(p.params, p.batch)

    @partial(jax.jit, static_argnames="penalize")
    def step(state, penalize=None):
        return tx.update(grads, state, p.params, batch=p.batch, penalize=penalize)

    by_schedule = by_host = tx.init(p.params)
    for number in range(5):
        updates, by_schedule = step(by_schedule)
        chosen, by_host = step(by_host, penalize=number >= 1 and (number - 1) % 3 == 0)
        chex.assert_trees_all_close(updates, chosen, rtol=1e-6)
        chex.assert_trees_all_close(by_schedule._replace(key=0), by_host._replace(key=0), rtol=1e-6)
    for penalize in (True, False):
        assert "cond[" not in str(jax.make_jaxpr(partial(step, penalize=penalize))(by_host))
    with pytest.raises(TypeError, match="static_argnames"):
        jax.jit(lambda state, due: tx.update(grads, state, p.params, batch=p.batch, penalize=due))(by_host, True)
