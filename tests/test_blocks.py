"""The blocks of a GPT beside other libraries: the truth is dense, the times at equal error are interpolated."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess as jh
from experiments import figures, run
from experiments.bench import blocks

TEXT = "To be, or not to be: that is the question.\n" * 40
TINY = {"layers": 1, "heads": 1, "width": 0.0625, "context": 2}
WORDS = [
    "dataset=shakespeare/2",
    "epochs=1",
    "batch_size=32",
    "images_per_class=2",
    "probes=6",
    "more_probes=12",
    "steps=4",
    "repeats=2",
]
NAMES = ["token", "position", *(f"block1/{name}" for name in ("norm1", "norm2", "fc", "proj")), "norm", "head"]
NAMES += [f"block1/attn/{name}" for name in ("query", "key", "value", "out")]


def stand_in(path, loss):
    """An interpreter that answers as the peers do: zeros, in half a second, and the first time in two."""
    answer = {"loss": loss, "gradient": dict.fromkeys(NAMES, 0.0), "versions": {"theirs": "1.0"}, "threads": 1}
    found = {"trace": dict.fromkeys(NAMES, 0.0), "spectrum": dict.fromkeys(NAMES, [[0.0], [1.0]])}
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "import numpy as np\n"
        "assert sys.argv[1:3] == ['-m', 'experiments.bench.torch_blocks']\n"
        "folder = pathlib.Path(sys.argv[3])\n"
        "assert np.load(folder / 'weights.npz')['block1/fc/kernel'].shape == (4, 16)\n"
        "assert np.load(folder / 'batch.npz')['label'].shape == (2, 2)\n"
        f"answer, found = {answer!r}, {found!r}\n"
        "print(json.dumps(['trace theirs', 'spectrum theirs']), flush=True)\n"
        "for line in sys.stdin:\n"
        "    kind, _, rest = line.strip().partition(' ')\n"
        "    if kind != 'about':\n"
        "        row, budget, key = rest.split('/')\n"
        "        assert (row, budget) == ('theirs', {'trace': '6', 'spectrum': '4'}[kind])\n"
        "        answer = {'seconds': 0.5 if key == '1' else 2.0, 'found': found[kind]}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "net_options", lambda config: TINY)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.slow
def test_from_end_to_end_beside_peers(folder, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "agreement", lambda *args: {"loss": 1.0, "torch_loss": 1.0, "gradient": 0.0})
    python, out = stand_in(folder / "python", 1.0), folder / "out"
    assert run.main(["blocks", *WORDS, f"out={out}", f"data_dir={folder / 'tfds'}", f"peers_python={python}"]) == 0
    printed, numbers = capsys.readouterr().out, json.loads((out / "numbers.json").read_text())
    assert set(numbers["blocks"]) == set(NAMES) and numbers["versions"]["theirs"] == "1.0"
    records = {record["row"]: record for record in numbers["found"]}
    assert set(records) == {*blocks.OURS.values(), "theirs"}
    theirs = [record for record in numbers["found"] if record["row"] == "theirs"]
    for record, sign in zip(theirs, (-1, 1), strict=True):  # a trace of 0, and a spectrum of zeros
        for name, about in numbers["blocks"].items():
            share = about["trace"] / about["absolute"] if record["kind"] == "trace" else 1
            np.testing.assert_allclose(record["error"][name], [sign * share] * 2, rtol=1e-6)
        assert record["seconds"] == [2.0, 0.5]
    for record in map(records.get, blocks.OURS.values()):
        assert len(record["seconds"]) == 2 and all(len(values) == 2 for values in record["error"].values())
    (truth,) = out.glob("truth-2-net-*.npz")
    values = np.load(truth, allow_pickle=False)
    for name, about in numbers["blocks"].items():
        assert values[name].sum() == pytest.approx(about["trace"]) and len(values[name]) == about["parameters"]
    # Four parameters or eight take as many products, and nothing is left to chance.
    assert max(map(abs, records["jaxhess: layer_spectra"]["error"]["block1/norm1"])) < 1
    assert "theirs 1.0" in printed and "seconds to equal error" in printed and (out / "figure.png").exists()


def test_who_takes_how_many_products():
    config = blocks.Config(probes=(6, 12), more_probes=(24,), steps=(4,), more_steps=(16,))
    budgets = {
        (kind, row): blocks._budgets(config, kind, row)
        for kind, row in (*blocks.OURS.items(), ("trace", "PyHessian: trace"), ("spectrum", "PyHessian: density"))
    }
    assert list(budgets.values()) == [(6, 12, 24), (4,), (6, 12), (4, 16)]


def test_the_truth_is_dense():
    def predict(params, batch):
        return jnp.tanh(batch["x"] @ params["a"]["w"]) @ params["b"]["w"]

    loss = jh.Objective(predict, jh.squared_error)
    params = {"a": {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}, "b": {"w": jnp.linspace(0.5, 1, 6).reshape(3, 2)}}
    batch = {"x": jnp.linspace(-1, 1, 20).reshape(5, 4), "label": jnp.ones((5, 2))}
    found = blocks.eigenvalues(loss, params, batch, ["a", "b"])
    for name, values in found.items():
        flat, unravel = jax.flatten_util.ravel_pytree(params[name])
        dense = jax.hessian(lambda x, n=name, back=unravel: loss(params | {n: back(x)}, batch))(flat)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(np.asarray(dense, float)), rtol=1e-4, atol=1e-5)
        assert values.dtype == np.float64


def test_nets_that_differ_are_an_error():
    params = {"a": jnp.ones(2)}
    theirs = {"loss": 1.0, "gradient": {"a": 2**0.5}}

    def loss(p, _):
        return p["a"].sum() / 2 + p["a"].prod() * 0

    assert blocks.agreement(loss, params, None, ["a"], theirs | {"gradient": {"a": 0.5**0.5}})["gradient"] < 1e-6
    with pytest.raises(ValueError, match="the nets differ: losses .*gradients by up to 1"):
        blocks.agreement(loss, params, None, ["a"], theirs)
    with pytest.raises(ValueError, match="the nets differ"):
        blocks.agreement(loss, params, None, ["a"], {"loss": 1.001, "gradient": {"a": 0.5**0.5}})


def test_errors_are_shares():
    truth = {"one": np.array([-1.0, 3.0])}
    assert blocks.errors("trace", [{"one": 4.0, "total": 9.0}], truth) == {"error": {"one": [0.5]}}
    # Half of the mass is 1 too far to the right: 0.5, and the mean absolute eigenvalue is 2.
    found = blocks.errors("spectrum", [{"one": [[-1.0, 4.0], [0.5, 0.5]]}], truth)
    assert found["error"]["one"] == pytest.approx([0.25]) and found["lambda_max"]["one"] == pytest.approx([1 / 3])
    assert blocks.overall({"one": [3.0, -4.0], "two": [1.0, 1.0]}) == pytest.approx((12.5**0.5 + 1) / 2)


def test_time_to_an_error_is_interpolated_on_log_scales():
    seconds, errors = [1.0, 4.0, 16.0], [1.0, 0.5, 0.25]
    assert blocks.time_to(seconds, errors, 0.5).seconds == pytest.approx(4)
    assert blocks.time_to(seconds, errors, 0.5**0.5).seconds == pytest.approx(2)
    assert blocks.time_to(seconds, errors, 2.0) == (1.0, "<") and blocks.time_to(seconds, errors, 0.2) == (16.0, ">")
    # a budget that made it worse plays no part
    assert blocks.time_to(seconds, [1.0, 2.0, 0.25], 0.5).seconds == pytest.approx(4)


def test_the_fastest_reaches_the_error():
    lines = {
        "slow": blocks.Line([1, 2], [9.0, 9.0], [4.0, 8.0], [1.0, 0.1]),
        "fast": blocks.Line([1, 2], [1.0, 2.0], [1.0, 2.0], [1.0, 0.5]),
    }
    assert blocks.fastest(lines, 0.5) == ("fast", (2.0, ""))
    assert blocks.fastest(lines, 0.1)[0] == "slow" and blocks.fastest(lines, 0.1)[1].sign == ""
    assert blocks.fastest(lines, 0.01) == ("slow", (8.0, ">"))
    mine = blocks.Line([1], [6.0], [0.5], [0.2])
    own, slow, fast = blocks._equal(lines | {"mine": mine}, "mine")[1:]
    # 0.2 lies at 0.7 of the way from 1 to 0.1: 4 * 2^0.7 seconds, and 9 with the first call
    assert own == ["20", "0.5", "6.49", "13", "1.5", "slow"]
    assert slow == ["10", ">0.5", "8", "<16", "<1.5", "slow"] and fast == ["50", "<0.5", "2", ">4", ">0.333", "fast"]


@pytest.mark.parametrize("words, message", [("repeats=1", "repeats must be at least 2"), ("probes=8", "of 6.*got 8")])
def test_wrong_settings_are_named(words, message, capsys):
    assert run.main(["blocks", words]) == 2
    assert re.search(message, capsys.readouterr().err)
