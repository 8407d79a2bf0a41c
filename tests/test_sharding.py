"""Arrays spread over eight devices: the numbers of one device, by the same calls."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from helpers import distance, labels, normal, problem, ravel
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxhess as jh
from jaxhess._trees import random_like

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


@pytest.fixture(scope="module")
def places(mesh):
    """The same parameters and batch on one device and spread over all."""
    return {"one": (P.params, BATCH), "all": (spread_params(mesh, P.params), spread_batch(mesh, BATCH))}


def results(params, batch):
    """Everything that can be asked of a net, as named arrays."""
    found = {}
    for kind, make in (("hessian", jh.hessian), ("ggn", jh.ggn), ("functional", jh.functional_hessian)):
        operator = make(P.objective, params, batch)
        v = jax.tree.map(lambda x: 0.1 + x, params)
        found[f"{kind} product"] = ravel(operator(v))
        found[f"{kind} block"] = ravel(make(P.objective, params, batch, layer="fc1")(v["fc1"]))
    found["linearized"] = ravel(jh.linearize(operator, like=params)(v))
    found["trace"] = jh.trace(operator, like=params, key=KEY, num_probes=4).mean
    for curvature in ("hessian", "ggn"):
        traces = jh.layer_traces(P.objective, params, batch, key=KEY, num_probes=4, curvature=curvature)
        found[f"{curvature} traces"] = np.array([estimate.mean for estimate in traces.values()])
    spectra = jh.layer_spectra(P.objective, params, batch, key=KEY, num_steps=6)
    found["nodes"] = np.concatenate([spectrum.nodes for spectrum in spectra.values()])
    found["weights"] = np.concatenate([spectrum.weights for spectrum in spectra.values()])
    values, vectors, _ = jh.top_eigenpairs(operator, like=params, key=KEY, k=2)
    found["eigenvalues"], found["eigenvectors"] = values, np.abs(ravel(vectors))
    found["warm start"] = jh.top_eigenpairs(operator, like=params, key=KEY, k=2, start=vectors)[0]
    scale = jax.tree.map(lambda x: 1 + x**2, params)
    found["preconditioned"] = ravel(jh.precondition(operator, scale)(v))
    found["finite"] = ravel(jh.hessian(P.objective, params, batch, differentiation="finite")(v))
    groups = {"half": jh.part("fc1/w", np.s_[:, :2]), "second": "fc2/*"}
    traces = jh.layer_traces(P.objective, params, batch, key=KEY, num_probes=4, layers=groups)
    found["groups"] = np.array([estimate.mean for estimate in traces.values()])
    found["group"] = ravel(jh.hessian(P.objective, params, batch, layer=groups["half"])(jh.subtree(v, groups["half"])))
    found["gram"] = jh.ggn_eigenvalues(P.objective, params, batch)
    found["classes"] = jh.class_structure(P.objective, params, batch, 3).weights
    return found


def test_every_result_is_that_of_one_device(places):
    expected, found = results(*places["one"]), results(*places["all"])
    for name, value in expected.items():
        assert distance(np.ravel(found[name]), np.ravel(value)) < 3e-4, name


def test_a_mesh_with_explicit_axes(places):
    """As ``jax.make_mesh`` makes it."""
    mesh = jax.make_mesh((8,), ("data",))
    params = jax.device_put(P.params, NamedSharding(mesh, PartitionSpec()))
    found, expected = [], []
    for place, into in ((places["one"], expected), ((params, spread_batch(mesh, BATCH)), found)):
        into.append(ravel(jh.functional_hessian(P.objective, *place)(place[0])))
        into.append(jh.layer_traces(P.objective, *place, key=KEY, num_probes=4, curvature="ggn")["total"].mean)
        spectra = jh.layer_spectra(P.objective, *place, key=KEY, num_steps=6, method="auto")
        into += [spectrum.nodes for spectrum in spectra.values()]
        into.append(jh.class_structure(P.objective, *place, 3).weights)
    for a, b in zip(found, expected, strict=True):
        assert distance(np.ravel(a), np.ravel(b)) < 3e-4


def test_a_mean_over_batches_that_are_spread(places, mesh):
    halves = [jax.tree.map(lambda x, part=part: x[part], BATCH) for part in (slice(0, 4), slice(4, 8))]
    expected = jh.hessian(P.objective, P.params, BATCH)(P.params)
    params = places["all"][0]
    found = jh.hessian(P.objective, params, jh.Batches([spread_batch(mesh, half) for half in halves]))(params)
    assert distance(ravel(found), ravel(expected)) < 1e-5


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_lanczos_vectors_are_spread_as_the_parameters(places, reorthogonalize):
    params, batch = places["all"]
    start = random_like(KEY, params)
    for x, like in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)
    np.testing.assert_array_equal(ravel(start), ravel(random_like(KEY, P.params)))
    found = jh.lanczos(jh.hessian(P.objective, params, batch), start, 4, reorthogonalize=reorthogonalize)
    one = jh.lanczos(jh.hessian(P.objective, *places["one"]), random_like(KEY, P.params), 4)
    np.testing.assert_allclose(found.alphas, one.alphas, rtol=1e-4)
    if reorthogonalize:
        for rows, like in zip(jax.tree.leaves(found.basis), jax.tree.leaves(params), strict=True):
            # The compiler may spread them further, but never less.
            assert rows.addressable_shards[0].data.size <= 4 * like.addressable_shards[0].data.size


def htr_steps(params, batch):
    """The parameters and the penalty after three steps with the transformation, as named arrays."""
    found = {}
    for curvature in ("hessian", "ggn"):
        tx = optax.chain(
            jh.add_hessian_trace(P.objective, 1e-3, every=2, key=KEY, curvature=curvature), optax.sgd(1e-3)
        )
        state, changed = tx.init(params), params
        for _ in range(3):
            changed, state = _step(tx, changed, state, batch)
        found[f"{curvature} steps"], found[f"{curvature} penalty"] = ravel(changed), np.asarray(state[0].penalty)
    return found


@partial(jax.jit, static_argnums=0)
def _step(tx, params, state, batch):
    grads = jax.grad(P.objective)(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def test_the_transformation_gives_the_steps_of_one_device(places):
    expected, found = htr_steps(*places["one"]), htr_steps(*places["all"])
    for name, value in expected.items():
        assert distance(np.ravel(found[name]), np.ravel(value)) < 1e-4, name


def test_a_run_that_lost_devices_goes_on_on_fewer(tmp_path, mesh):
    """Four steps: two on eight devices, and after the checkpoint two on the four that are left."""
    tx = optax.chain(jh.add_hessian_trace(P.objective, 1e-3, key=KEY), optax.sgd(1e-2, momentum=0.9))

    def steps(count, params, state, batch):
        for _ in range(count):
            params, state = _step(tx, params, state, batch)
        return params, state

    one, _ = steps(4, P.params, tx.init(P.params), BATCH)

    pytest.importorskip("orbax.checkpoint")
    from experiments.store import Checkpoints

    params = spread_params(mesh, P.params)
    kept = Checkpoints(tmp_path, {"run": "one"})
    kept.save(2, steps(2, params, tx.init(params), spread_batch(mesh, BATCH)), {})
    kept.close()

    fewer = Mesh(mesh.devices[:2], mesh.axis_names)
    params = spread_params(fewer, P.params)
    kept = Checkpoints(tmp_path, {"run": "one"})
    done, restored, _ = kept.latest((params, tx.init(params)))
    kept.close()
    assert done == 2
    for x, like in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(params), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim) and len(x.sharding.device_set) == 4
    found, _ = steps(2, *restored, spread_batch(fewer, BATCH))
    assert distance(ravel(found), ravel(one)) < 1e-4
