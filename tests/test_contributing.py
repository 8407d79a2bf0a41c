"""The contributing guide's own estimator, criterion and curvature: run, and compared with dense matrices."""

import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess as jh

GUIDE = pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def guide():
    """What the code of the guide defines."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(compile(block, str(GUIDE), "exec"), names)
    return names


def test_the_estimator(guide):
    assert guide["norm"].mean == pytest.approx(14.0)
    matrix = np.asarray(helpers.normal(0, 6, 6))
    matrix = matrix + matrix.T
    found = guide["squared_frobenius"](lambda v: matrix @ v, like=jnp.zeros(6), key=jax.random.key(1), num_probes=512)
    assert abs(found.mean - (matrix**2).sum()) < 4 * found.std_error


def test_the_criterion(guide):
    criterion, outputs = guide["Poisson"](), jnp.asarray(helpers.normal(1, 5, 3))
    batch = {"label": jnp.asarray(helpers.labels(2, 4, 15)).reshape(5, 3)}
    dense = jax.hessian(criterion)(outputs, batch).reshape(15, 15)
    eye = jnp.eye(15).reshape(15, 5, 3)
    for product, expected in [(criterion.hessian_product, dense), (criterion.factor_product, jnp.sqrt(dense))]:
        found = jax.vmap(lambda t, product=product: product(outputs, batch, t).ravel())(eye)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(guide["eigenvalues"], np.full(8, 0.25), rtol=1e-5)


def test_the_curvature(guide):
    objective, batch = guide["objective"], guide["batch"]
    w = jnp.asarray(helpers.normal(3, 4, 2))
    slopes = [jax.grad(objective)(w, jax.tree.map(lambda x, i=i: x[i : i + 1], batch)).ravel() for i in range(4)]
    product = guide["empirical_fisher"](objective, w, batch)
    found = jax.vmap(lambda v: product(v.reshape(4, 2)).ravel())(jnp.eye(8))
    np.testing.assert_allclose(found, sum(jnp.outer(g, g) for g in slopes) / 4, atol=1e-6)
    assert guide["fisher"].dim == 8


def test_weights_of_a_criterion_of_ones_own_are_seen():
    class Weighted(jh.Criterion):
        weighted = True

        def __call__(self, outputs, batch):
            return (batch["weight"] * outputs[:, 0] ** 2).sum() / batch["weight"].sum()

    objective = jh.Objective(lambda w, batch: batch["x"] @ w, Weighted())
    batches = [{"x": jnp.eye(3), "weight": jnp.full(3, weight)} for weight in (1.0, 2.0)]
    with pytest.raises(ValueError, match="size=lambda batch"):
        jh.hessian(objective, jnp.ones((3, 1)), jh.Batches(batches))
    many = jh.Batches(batches, size=lambda batch: batch["weight"].sum())
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
    v = jnp.arange(3.0)[:, None]
    found, expected = (jh.ggn(objective, jnp.ones((3, 1)), data)(v) for data in (many, joined))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
