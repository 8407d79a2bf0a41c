"""A trained transformer: large curvature in few directions, and blocks unlike each other, against dense matrices."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

import jaxhess as jh
from experiments import models

LAYERS = ["block1/norm1", "block2/norm2", "norm", "block1/attn/query"]


def replaced(params, path, value):
    """Nested dicts with another node at a path."""
    head, _, rest = path.partition("/")
    return params | {head: replaced(params[head], rest, value) if rest else value}


@functools.cache
def truth(layer):
    """(Hess_l, G_l) in float64: forward over reverse, and J' S J with S by its formula."""
    with jax.enable_x64(True):
        problem = helpers.trained_gpt(2).cast(jnp.float64)
        flat, unravel = ravel_pytree(helpers.node(problem.params, layer))

        @jax.jit
        def both(flat, params, batch):
            def predict(w):
                logits = problem.objective.predict(replaced(params, layer, unravel(w)), batch)
                return logits.reshape(-1, logits.shape[-1])

            def loss(w):
                return jh.cross_entropy(predict(w), {"label": batch["label"].reshape(-1)})

            slope = jax.grad(loss)
            hess = jax.lax.map(lambda v: jax.jvp(slope, (flat,), (v,))[1], jnp.eye(flat.size), batch_size=64)
            slopes = jax.lax.map(lambda v: jax.jvp(predict, (flat,), (v,))[1], jnp.eye(flat.size), batch_size=64)
            p = jax.nn.softmax(predict(flat))  # (rows, classes); the slopes are (parameters, rows, classes)
            half = jnp.sqrt(p)[None] * (slopes - jnp.einsum("rc,prc->pr", p, slopes)[..., None])
            half = half.reshape(flat.size, -1)
            return hess, half @ half.T / len(p)

        return tuple(map(np.asarray, both(flat, problem.params, problem.batch)))


@pytest.fixture(scope="module")
def gpt():
    return helpers.trained_gpt(2)


@pytest.fixture(scope="module")
def ggn_traces(gpt):
    return jh.layer_traces(gpt.objective, gpt.params, gpt.batch, key=jax.random.key(0), num_probes=16, curvature="ggn")


def test_the_kept_net_is_the_trained_one_of_the_experiments(gpt):
    whole = helpers.trained_gpt(16)
    model = models.build("gpt", 65, width=0.5)
    expected = jax.jit(model.apply)({"params": whole.params}, whole.batch["image"])
    np.testing.assert_allclose(whole.objective.predict(whole.params, whole.batch), expected, rtol=1e-3, atol=1e-4)
    with np.load(helpers.pathlib.Path(__file__).parent / "data" / "gpt.npz") as kept:
        train_loss, test_loss = float(kept["train_loss"]), float(kept["test_loss"])
    assert train_loss < 1.85 and test_loss < 2.05  # log 65 = 4.17 before training, and 3.31 without any context
    assert float(whole.objective(whole.params, whole.batch)) == pytest.approx(train_loss, abs=0.4)
    shapes = {name: x.shape for name, x in flatten_dict(whole.params, sep="/").items()}
    assert shapes["block2/fc/kernel"] == (32, 128) and len(shapes) == 38


def test_traces_of_both_curvatures_are_covered_by_their_errors(gpt, ggn_traces):
    hess = jh.layer_traces(gpt.objective, gpt.params, gpt.batch, key=jax.random.key(1), num_probes=16)
    for layer in LAYERS:
        for estimate, matrix in zip((hess[layer], ggn_traces[layer]), truth(layer), strict=True):
            exact, error = np.trace(matrix), float(estimate.std_error)
            assert abs(float(estimate.mean) - exact) < 5 * error + 1e-4 * abs(exact), (layer, estimate, exact)
            assert error < 0.5 * abs(exact) or matrix is truth(layer)[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_extreme_eigenvalues_of_a_block(gpt, layer):
    hess, ggn = truth(layer)
    operators = {"hessian": hess, "ggn": ggn}
    for kind, matrix in operators.items():
        operator = helpers.OPERATORS[kind](gpt.objective, gpt.params, gpt.batch, layer=layer)
        like = helpers.node(gpt.params, layer)
        values, _, residuals = jh.top_eigenpairs(operator, like=like, key=jax.random.key(2), k=2)
        true = np.linalg.eigvalsh(matrix)[::-1][:2]
        np.testing.assert_allclose(values, true, rtol=1e-3)
        assert (np.abs(values - true) <= residuals + 1e-4 * true[0]).all()


def test_a_trained_block_is_indefinite_and_its_h_is_not_zero():
    hess, ggn = truth("block1/attn/query")
    assert np.linalg.eigvalsh(hess)[0] < -1e-3 * np.linalg.eigvalsh(hess)[-1]
    assert helpers.distance(hess, ggn) > 0.05


def test_a_group_is_its_layers_together(gpt, ggn_traces):
    groups = {"norms": ["norm", "block?/norm?"], "attention": "*/attn/*", "MLP": ["*/fc", "*/proj"]}
    traces = jh.layer_traces(
        gpt.objective, gpt.params, gpt.batch, key=jax.random.key(3), num_probes=16, curvature="ggn", layers=groups
    )
    parts = {
        "norms": [name for name in ggn_traces if "norm" in name],
        "attention": [name for name in ggn_traces if "/attn/" in name],
        "MLP": [name for name in ggn_traces if name.endswith(("/fc", "/proj"))],
    }
    assert [len(names) for names in parts.values()] == [5, 8, 4]
    for group, names in parts.items():
        total = sum(float(ggn_traces[name].mean) for name in names)
        error = np.hypot(sum(float(ggn_traces[name].std_error) for name in names), float(traces[group].std_error))
        assert abs(float(traces[group].mean) - total) < 5 * error + 1e-4 * total, group
    everything = sum(float(estimate.mean) for name, estimate in ggn_traces.items() if name != "total")
    assert float(ggn_traces["total"].mean) == pytest.approx(everything, rel=1e-4)


def test_the_total_is_what_the_examples_add_and_the_squared_slopes_say(gpt, ggn_traces):
    """Tr G = 1/N sum_n sum_c p_nc ||d log p_nc||^2: the mean over labels drawn from the net's own predictions."""
    one = jax.tree.map(lambda x: x[:1, :8], gpt.batch)
    added = jh.example_traces(gpt.objective, gpt.params, one)["total"]

    @jax.jit
    def squared(params, batch):
        logits = gpt.objective.predict(params, batch)[0]
        flat, unravel = ravel_pytree(params)

        def of_position(t):
            def log_p(w):
                return jax.nn.log_softmax(gpt.objective.predict(unravel(w), batch)[0, t])

            return jnp.sum(jax.nn.softmax(logits[t])[:, None] * jax.jacrev(log_p)(flat) ** 2)

        return jax.lax.map(of_position, jnp.arange(len(logits))).mean()

    assert float(added.sum()) == pytest.approx(float(squared(gpt.params, one)), rel=1e-3)
    both = jh.example_traces(gpt.objective, gpt.params, gpt.batch)["total"]
    total = ggn_traces["total"]
    assert abs(float(total.mean) - float(both.sum())) < 5 * float(total.std_error) + 1e-4 * float(both.sum())


def test_interactions_are_shares(gpt):
    one = jax.tree.map(lambda x: x[:1, :8], gpt.batch)
    found = jh.layer_interactions(gpt.objective, gpt.params, one)
    assert 0 < found.off_diagonal_share < 1 and (found.norms >= 0).all()
    # Cauchy-Schwarz: ||G_lk||^2 <= ||G_l|| ||G_k||, and all of them make up that of the whole G.
    diagonal = np.diag(found.norms)
    assert (found.norms <= np.sqrt(np.outer(diagonal, diagonal)) * (1 + 1e-4)).all()
    values = jh.ggn_eigenvalues(gpt.objective, gpt.params, one)
    assert found.norms.sum() == pytest.approx(np.sum(values**2), rel=1e-4)
