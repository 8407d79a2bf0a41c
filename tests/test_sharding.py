"""Arrays spread over eight devices: the numbers of one device, by the same calls."""

import jax
import numpy as np
import optax
import pytest
from helpers import distance, labels, normal, problem, ravel
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxhess as jh

P = problem("mlp")
BATCH = {"x": normal(1, 8, 3), "label": labels(2, 3, 8)}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def spread_params(mesh, params):
    """Last axes over "model" where they divide, the rest copied."""

    def put(x):
        spec = PartitionSpec(*[None] * (x.ndim - 1), "model") if x.shape[-1] % 2 == 0 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, params)


def spread_batch(mesh, batch):
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_the_transformation_on_sharded_parameters(mesh, curvature):
    tx = optax.chain(jh.add_hessian_trace(P.objective, 1e-3, every=2, key=KEY, curvature=curvature), optax.sgd(1e-3))

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(P.objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    runs = []
    for params, batch in (
        (P.params, BATCH),
        (spread_params(mesh, P.params), spread_batch(mesh, BATCH)),
    ):
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state, batch)
        runs.append((params, state))
    (one, one_state), (many, many_state) = runs
    assert distance(ravel(many), ravel(one)) < 1e-5
    np.testing.assert_allclose(many_state[0].penalty, one_state[0].penalty, rtol=1e-4)
    assert not many["fc1"]["w"].sharding.is_fully_replicated
