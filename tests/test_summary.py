"""The table of a net: what its records say, and how it prints."""

import dataclasses
import functools
import json
import re

import helpers
import jax
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh

LAYERS = ["fc1", "fc2", "total"]


@functools.cache
def table(plain=False):
    p = problem("mlp")
    loss = (lambda params, batch: p.objective(params, batch)) if plain else p.objective
    return jh.summarize(loss, p.params, p.batch, key=jax.random.key(0), num_probes=64)


@pytest.mark.parametrize("layer", LAYERS)
def test_records_equal_dense_matrices(layer):
    p, record = problem("mlp"), table()[layer]
    name = None if layer == "total" else layer
    hess, ggn = (helpers.dense(p, kind, name) for kind in ("hessian", "ggn"))
    values = np.linalg.eigvalsh(hess)
    weights = helpers.ravel(p.params if name is None else p.params[name])
    assert record.parameters == len(values) == len(weights)
    assert abs(record.trace.mean - values.sum()) < 4 * record.trace.std_error
    assert abs(record.ggn_trace.mean - np.trace(ggn)) < 4 * record.ggn_trace.std_error
    np.testing.assert_allclose([record.lambda_max, record.lambda_min], values[[-1, 0]], atol=1e-5)
    assert 0 <= max(record.lambda_max_residual, record.lambda_min_residual) < 1e-5
    np.testing.assert_allclose(record.trace_norm2, record.trace.mean * weights @ weights, rtol=1e-5)
    assert record.outliers == jh.count_outliers(table().spectra[layer])
    total = jh.Spectrum.from_eigenvalues(np.linalg.eigvalsh(helpers.dense(p, "hessian")))
    expected = jh.wasserstein(jh.Spectrum.from_eigenvalues(values), total)
    np.testing.assert_allclose(record.wasserstein, expected, atol=1e-5)


def test_a_mapping():
    assert list(table()) == list(table().keys()) == LAYERS
    assert len(table()) == 3 and "fc1" in table() and table()["fc1"] is dict(table())["fc1"]
    assert list(table().spectra) == LAYERS
    with pytest.raises(KeyError, match=r"no layer 'fc3' in the table; choose from \['fc1', 'fc2', 'total'\]"):
        table()["fc3"]
    assert table().get("fc3") is None and "fc3" not in table()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_record_prints_the_columns_of_its_row(layer):
    head, row = (
        re.split(r"  +", line.strip()) for line in str(table()).splitlines() if line.split()[0] in ("layer", layer)
    )
    lines = [re.split(r"  +", line) for line in str(table()[layer]).splitlines()]
    assert [name for name, _ in lines] == head[1:]
    columns = len(lines) - (layer == "total")  # its distance to itself is a dash in the table
    assert [text for _, text in lines][:columns] == row[1:][:columns]
    assert len({line.index(text) for (_, text), line in zip(lines, str(table()[layer]).splitlines(), strict=True)}) == 1


def test_prints_one_row_a_layer_and_one_for_the_whole():
    lines = str(table()).splitlines()
    rows = [line.split()[0] for line in lines if not set(line) <= {"-", " "}]
    assert rows == ["layer", *LAYERS]
    assert len({len(line) for line in lines}) == 1  # columns stand under each other
    for layer, record in table().items():
        (row,) = [line for line in lines if line.startswith(f"{layer} ")]
        for text in (f"{record.parameters:,}", str(record.trace), str(record.ggn_trace), f"{record.lambda_max:.4g}"):
            assert text in row
    assert repr(table()) == str(table())


def test_a_plain_loss_has_no_gauss_newton_trace():
    plain = table(plain=True)
    assert all(record.ggn_trace is None for record in plain.values())
    for layer in LAYERS:
        np.testing.assert_allclose(plain[layer].trace.mean, table()[layer].trace.mean, rtol=1e-5)
    assert [line.split()[0] for line in str(plain).splitlines() if line[0] != "-"] == ["layer", *LAYERS]


@pytest.mark.parametrize("plain", [False, True])
def test_to_dict_is_json(plain):
    numbers = json.loads(json.dumps(table(plain).to_dict(), allow_nan=False))
    assert list(numbers) == LAYERS
    for layer, record in table(plain).items():
        assert list(numbers[layer]) == [field.name for field in dataclasses.fields(record)]
        assert numbers[layer]["trace"] == pytest.approx([record.trace.mean, record.trace.std_error])
        assert numbers[layer]["lambda_max"] == record.lambda_max
        assert (numbers[layer]["ggn_trace"] is None) == plain


def test_options_and_batches():
    """Few steps, many batches, a progress callback, an aux."""
    p = problem("softmax regression")
    objective = jh.Objective(lambda params, batch: (helpers.mlp(params, batch), None), jh.cross_entropy)
    halves = jh.Batches([jax.tree.map(lambda x: x[:4], p.batch), jax.tree.map(lambda x: x[4:], p.batch)])
    calls = []
    options = dict(num_probes=4, num_steps=3, has_aux=True, progress=lambda *args: calls.append(args))
    found = jh.summarize(objective, p.params, halves, key=jax.random.key(0), **options)
    assert found["fc1"].trace.method == found["fc1"].ggn_trace.method == "exact"  # H_l is zero
    assert len(found.spectra["total"].nodes) == 4  # one is of the run in the complement
    assert found["fc1"].lambda_max_residual > 0  # three steps were not enough, and it says so
    assert calls == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_probes": 0}, ValueError, "num_probes"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"params": {}}, ValueError, "no arrays"),
        ({"batch": {"x": np.zeros((2, 3), np.float32)}}, ValueError, "no labels.*CrossEntropy"),
        ({"objective": 3}, TypeError, "loss"),
    ],
)
def test_what_is_refused(options, error, message):
    p = problem("mlp")
    arguments = dict(objective=p.objective, params=p.params, batch=p.batch, key=jax.random.key(0)) | options
    with pytest.raises(error, match=message):
        jh.summarize(**arguments)
