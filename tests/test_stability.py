"""The noise stability transformation: against closed forms, the trace penalty, and what optax asks."""

import helpers
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import problem

import jaxhess as jh

P = problem("mlp")
KEY = jax.random.key(0)


def correction(loss, params, batch=None, **options):
    """What the transformation adds to zero updates."""
    tx = jh.add_noise_stability(loss, key=KEY, **options)
    return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)


def corrections(steps, loss, params, batch=None, **options):
    """(steps, parameters): what it adds on each of the first steps."""
    tx = jh.add_noise_stability(loss, key=KEY, **options)
    zeros, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)

    @jax.jit
    @jax.vmap
    def of_step(step):
        added, _ = tx.update(zeros, state._replace(count=step), params, batch=batch)
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(added)])

    return np.asarray(of_step(jnp.arange(steps, dtype=jnp.int32)))


def test_it_adds_nothing_on_a_quadratic():
    a = jnp.asarray(helpers.rotated(np.linspace(-1, 3, 20)), jnp.float32)
    added, state = correction(lambda w, batch: w @ a @ w, jnp.ones(20), sigma=0.3)
    np.testing.assert_allclose(added, 0, atol=1e-5)
    assert int(state.count) == 1 and int(state.skipped) == 0


def test_it_is_the_mean_gradient_at_moved_parameters():
    """Of w^4 at w: the mean of 4 (w + u)^3 and 4 (w - u)^3 is 4 w^3 + 12 w u^2."""
    w, sigma = jnp.array([1.0, -2.0, 0.5]), 0.1
    found = corrections(400, lambda w, batch: jnp.sum(w**4), w, sigma=sigma)
    error = np.std(found, axis=0) / 20
    assert np.all(np.abs(np.mean(found, axis=0) - 12 * w * sigma**2) < 4 * error)
    assert np.linalg.norm(found[0] - found[1]) > 0  # each step has its own noise


@pytest.mark.parametrize("layers", ["all", ["fc1"], {"fc1": 0.5, "fc2": 2.0}])
def test_to_second_order_it_is_the_trace_penalty(x64, layers):
    p, sigma = P.cast(np.float64), 1e-2
    flat = corrections(2000, p.objective, p.params, p.batch, sigma=sigma, layers=layers)
    weights = {"all": {"fc1": 1, "fc2": 1}}.get(layers if isinstance(layers, str) else "", None)
    weights = weights or (layers if isinstance(layers, dict) else dict.fromkeys(layers, 1))

    def trace(params, name):
        flat, unravel = jax.flatten_util.ravel_pytree(params[name])
        return jnp.trace(jax.hessian(lambda x: p.objective(params | {name: unravel(x)}, p.batch))(flat))

    def penalty(params):
        return 0.5 * sigma**2 * sum(weight * trace(params, name) for name, weight in weights.items())

    truth = helpers.ravel(jax.jit(jax.grad(penalty))(p.params))
    error = flat.std(0) / len(flat) ** 0.5
    z = (flat.mean(0) - truth) / np.maximum(error, 1e-3 * np.abs(truth).max())
    assert np.sqrt(np.mean(z**2)) < 1.4 and np.corrcoef(flat.mean(0), truth)[0, 1] > 0.9


def test_it_trains_under_jit_in_a_chain_and_keeps_dtypes():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), P.params)
    tx = optax.chain(jh.add_noise_stability(P.objective, sigma=0.05, key=KEY), optax.adam(1e-2))

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(P.objective)(params, P.batch)
        updates, state = tx.update(gradient, state, params, batch=P.batch)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0] and {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert int(state[0].count) == 30


def test_layers_that_are_not_chosen_do_not_move():
    """A net that is linear in each of two layers: moved alone, neither has a third derivative of its own."""

    def loss(p, batch):
        return jnp.sum(p["a"]["w"] ** 4) + jnp.sum(p["b"]["w"] ** 4)

    params = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.ones(2)}}
    added, _ = correction(loss, params, sigma=0.1, layers=["b"])
    np.testing.assert_allclose(added["a"]["w"], 0, atol=1e-6)
    assert np.all(np.asarray(added["b"]["w"]) > 0)


def test_what_is_not_finite_is_left_out_and_counted():
    added, state = correction(lambda w, batch: jnp.sum(jnp.sqrt(w)), jnp.full(4, 1e-3), sigma=1.0)
    np.testing.assert_array_equal(added, 0)
    assert int(state.skipped) == 1


@pytest.mark.parametrize("sigma", [0, -1.0, float("nan"), float("inf"), True, np.ones(2)])
def test_a_sigma_that_makes_no_noise_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma must be a positive, finite number"):
        jh.add_noise_stability(P.objective, sigma=sigma, key=KEY)


def test_what_is_missing_or_unknown_is_named():
    tx = jh.add_noise_stability(P.objective, key=KEY)
    state = tx.init(P.params)
    with pytest.raises(ValueError, match="add_noise_stability needs the parameters"):
        tx.update(P.params, state, batch=P.batch)
    with pytest.raises(ValueError, match="add_noise_stability needs the batch"):
        tx.update(P.params, state, P.params)
    with pytest.raises(ValueError, match="selects no layer"):
        jh.add_noise_stability(P.objective, key=KEY, layers=[])
    with pytest.raises(TypeError, match="key"):
        jh.add_noise_stability(P.objective, key=0)
    with pytest.raises(ValueError, match="fc9"):
        correction(P.objective, P.params, P.batch, layers=["fc9"])
