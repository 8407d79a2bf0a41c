"""Accuracy beside other libraries: the matrices are those prescribed, the products are equal, the table says so."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess as jh
from experiments import run
from experiments.bench import accuracy, trials

SMALL = ["model=mlp", "dataset=digits", "epochs=1", "products=12,24", "repeats=2", "dim=50"]
LAYERS = ["ggn_layer=fc3", "hessian_layers=fc3"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy") / "out"
    assert run.main(["accuracy", *SMALL, *LAYERS, f"out={folder}"]) == 0
    return folder


def test_from_end_to_end(out, capsys):
    numbers = json.loads((out / "numbers.json").read_text())
    with np.load(out / "numbers.npz") as found:
        arrays = dict(found)
    assert list(numbers["matrices"])[-2:] == ["G, fc3", "Hess, fc3"]
    # The last layer enters linearly, so that its blocks of G and of the Hessian are one matrix.
    ggn, hessian = (numbers["matrices"][name] for name in ("G, fc3", "Hess, fc3"))
    assert ggn["dim"] == 330 and ggn["trace"] == pytest.approx(hessian["trace"], rel=1e-5)
    assert arrays["flat/trace/jaxhess: XTrace"].shape == (2, 2, 3)
    assert arrays["flat/spectrum/jaxhess: spectrum, plain"].shape == (2, 2, 2)
    assert all(np.isfinite(x).all() for path, x in arrays.items() if "jaxhess" in path)
    # More products are better where they find all that there is: 24 products reach the five values of "low rank".
    first, second = np.abs(arrays["low rank/trace/jaxhess: XTrace"][:, :, 0])
    assert first.max() < 0.05 and second.max() < 1e-5
    assert run.main(["accuracy", *SMALL, *LAYERS, f"out={out}", "redraw=true"]) == 0
    printed = capsys.readouterr().out
    errors = arrays["flat/trace/jaxhess: Hutchinson"][1, :, 0].astype(float)
    assert f"{100 * np.sqrt((errors**2).mean()):.3g}" in printed
    assert "trace, 24 products" in printed and "spectrum, 12 products" in printed


def test_matrices_have_their_eigenvalues():
    found = accuracy.made_matrices(100, 0)
    values = {name: np.linalg.eigvalsh(matrix) for name, matrix in found.items()}
    assert np.allclose(values["flat"], np.linspace(0.5, 1.5, 100))
    assert np.allclose(values["power law"][::-1], 1 / np.arange(1, 101))
    assert np.sum(values["low rank"] > 1e-9) == 10 and np.isclose(values["low rank"].sum(), 50.5)
    assert np.allclose(values["indefinite"][[0, -1]], [-2, 10])
    assert values["bulk and outliers"][0] > 0 and np.sum(values["bulk and outliers"] > 0.9) == 10
    assert all(np.ptp(np.diagonal(matrix)) > 0.01 for matrix in found.values())  # no eigenvectors along the axes


def test_a_dense_block_has_the_rows_and_columns_of_its_layers():
    params = {"b": jnp.arange(2.0), "a": jnp.ones(1), "c": jnp.full(2, 2.0)}

    def loss(p, _):
        return jnp.sum(p["b"] ** 3) * p["a"][0] + jnp.sum(p["c"] * p["b"]) + p["a"][0] ** 2

    found = accuracy.dense_block(jh.hessian(loss, params, None), params, ("a", "c"))
    assert np.allclose(found, np.diag([2.0, 0, 0]))
    # d2/da db_i = 3 b_i^2, d2/db_i^2 = 6 a b_i
    found = accuracy.dense_block(jh.hessian(loss, params, None), params, ("a", "b"))
    assert np.allclose(found, [[2, 0, 3], [0, 0, 0], [3, 0, 6]])


@pytest.mark.parametrize("weights", ["deflated", "plain"])
@pytest.mark.parametrize("products", [12, 32, 33])
def test_a_spectrum_takes_no_more_products_than_the_others(products, weights):
    count = 0

    def one_more():
        nonlocal count
        count += 1

    def operator(v):
        jax.debug.callback(one_more)
        return jnp.linspace(0, 1, 60) ** 8 * v

    steps = accuracy.num_steps(products, weights == "deflated")
    jh.spectrum(operator, like=jnp.zeros(60), key=jax.random.key(0), num_steps=steps, weights=weights)
    jax.effects_barrier()
    assert products - 1 <= count <= products


def test_trials_are_of_every_key():
    found = trials.traces(lambda count, key: (count * 10 + key, 0.5), [3, 4], 2)
    assert found.shape == (2, 2, 3) and found[..., :2].tolist() == [[[30, 0.5], [31, 0.5]], [[40, 0.5], [41, 0.5]]]
    assert (found[..., 2] >= 0).all()
    nodes = {0: np.array([1.0, 2.0]), 1: np.array([np.nan, 1.0])}
    found = trials.distances(lambda count, key: (nodes[key], np.array([2.0, 2.0])), np.array([1.0, 1.0]), [3], 2)
    # weights are normalised, and half of the mass lies 1 too far to the right
    assert found[0, 0, 0] == pytest.approx(0.5) and np.isnan(found[0, 1, 0])


def test_errors_are_shares_of_absolute_eigenvalues():
    values = np.array([-1.0, 3.0])
    traces = accuracy.scaled("trace", np.array([[4.0, 1.0, 9.0]]), 2.0, values)
    assert traces.tolist() == [[0.5, 0.25, 9.0]]
    assert accuracy.scaled("spectrum", np.array([[1.0, 9.0]]), 2.0, values).tolist() == [[0.5, 9.0]]


def test_calibration():
    assert accuracy.calibration(np.array([1.0, -1.0]), np.array([2.0, 0.5])) == pytest.approx(np.sqrt((0.25 + 4) / 2))
    assert np.isnan(accuracy.calibration(np.array([1.0, 1.0]), np.array([1.0, np.nan])))
    assert np.isnan(accuracy.calibration(np.array([1e-8, 1e-8]), np.array([0.0, 0.0])))
    assert np.isinf(accuracy.calibration(np.array([0.1, 0.1]), np.array([0.0, 1.0])))


def test_leaders_are_those_that_the_keys_do_not_tell_apart():
    def cells(*values, error=np.nan, count=20):
        return {name: accuracy.Cell(value, error, count) for name, value in zip("abcd", values, strict=False)}

    # The 97.5% quantile of F with 20 and 20 degrees of freedom is 2.46, the square of 1.57.
    assert accuracy.leaders(cells(1.0, 1.5, 1.6)) == {"a", "b"}
    assert accuracy.leaders(cells(1.0, 1.6, count=5)) == {"a", "b"}
    assert accuracy.leaders(cells(2e-9, 9e-7, 1e-5)) == {"a", "b"}
    assert accuracy.leaders(cells(1.0, np.nan, 1.4)) == {"a", "c"}
    assert accuracy.leaders(cells(np.nan)) == set()
    assert accuracy.leaders(cells(1.0, 1.2, 1.4, error=0.1)) == {"a", "b"}
    # a mean and a root mean square
    assert accuracy.mean(np.array([1.0, 3.0])) == accuracy.Cell(2.0, 1.0, 2)
    assert accuracy.rms(np.array([1.0, 7.0])).value == 5.0


@pytest.mark.parametrize(
    "words, message",
    [
        (["products=13"], "products must be even, at least 12 and fewer than dim=50.*got 13"),
        (["products=10"], "got 10"),
        (["products=50"], "got 50"),
        (["products=12", "hessian_layers=fc9"], "unknown layer 'fc9'"),
    ],
)
def test_wrong_settings_are_named(words, message, out, tmp_path):
    config, _ = run.parse([*SMALL[:3], "dim=50", "ggn_layer=fc1", *words], accuracy.Config, run.Options)
    with pytest.raises(ValueError, match=message):
        accuracy.run(config, tmp_path / "out")


def test_peers_answer_by_file(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "import numpy as np\n"
        "assert sys.argv[1:3] == ['-m', 'experiments.bench.torch_accuracy']\n"
        "folder = pathlib.Path(sys.argv[3])\n"
        "count = json.loads((folder / 'trials.json').read_text())['repeats']\n"
        "both = [np.load(folder / f'{name}.npz') for name in ('matrices', 'eigenvalues')]\n"
        "np.savez(folder / 'peers.npz', **{n: count * both[0][n] @ both[1][n] for n in both[0]})\n"
        "(folder / 'peers.json').write_text(json.dumps({'theirs': '1.0'}))\n"
    )
    stand_in.chmod(0o755)
    eye, values, wanted = {"one": np.eye(2, dtype=np.float32)}, {"one": np.ones(2)}, {"products": [2], "repeats": 3}
    found, versions = accuracy._ask(str(stand_in), eye, values, wanted)
    assert found["one"].tolist() == [3, 3] and versions == {"theirs": "1.0"}
    with pytest.raises(ValueError, match="ended with status 1"):
        accuracy._ask("/bin/false", eye, values, wanted)


def test_matfree_beside_ours():
    pytest.importorskip("matfree")
    matrix = accuracy.made_matrices(50, 0)["low rank"].astype(np.float32)
    traces, spectra = accuracy._estimators(jnp.asarray(matrix), np.linalg.eigvalsh(matrix), True)
    with jax.numpy_rank_promotion("allow"):  # in matfree itself
        for row in ("matfree: XTrace", "matfree: XNysTrace"):
            value, error = traces[row](24, 0)  # the range has five dimensions
            assert value == pytest.approx(25.25, rel=1e-4) and error < 1e-3
        nodes, weights = spectra["matfree: Lanczos"](4, 0)
    assert len(nodes) == 4 and weights.sum() == pytest.approx(1)
    assert nodes.max() <= 10 + 1e-4
