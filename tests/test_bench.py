"""The benchmark: its rows run, its ratios are those of the seconds, and the peers answer from their own process."""

import json
import sys

import numpy as np
import pytest

from experiments import run
from experiments.bench import memory, peers
from experiments.bench import study as bench

THEIRS = [peers.GRADIENT, peers.PRODUCT, peers.PENALTY, peers.LANCZOS.format(2)]


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter that answers as the peers do: a quarter of a second, five MiB."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"print({json.dumps(json.dumps(THEIRS))}, flush=True)\n"
        "for line in sys.stdin:\n"
        "    print(0.25 if line.startswith('time ') else [5.0, 30.0 if 'Lanczos' in line else 0.5], flush=True)\n"
    )
    path.chmod(0o755)
    return str(path)


def test_from_end_to_end_beside_peers(tmp_path, stand_in, capsys):
    out = tmp_path / "out"
    words = ["model=mlp", "batch_size=2", "repeats=2", "num_steps=2", "num_probes=2", "one_program=false"]
    assert run.main(["bench", *words, "peers=true", f"peers_python={stand_in}", f"out={out}"]) == 0
    printed, numbers = capsys.readouterr().out, json.loads((out / "numbers.json").read_text())
    rows = numbers["rows"]
    assert "peers_python" not in json.loads((out / "config.json").read_text())  # a path of this machine
    assert set(THEIRS) < set(rows) and rows[peers.GRADIENT]["seconds"] == [0.25, 0.25]
    assert all(len(row["seconds"]) == 2 and row["seconds"][0] > 0 for row in rows.values())
    # What takes more than 20 s is timed with its memory only.
    assert rows[peers.LANCZOS.format(2)]["seconds"] == [30.0, None]
    for name, row in rows.items():
        assert any(line.startswith(name) for line in printed.splitlines())
        assert row["peak_mib"] is None or row["peak_mib"] >= 0
    seconds = np.array(rows["HVP, one of many at a point"]["seconds"])
    assert f"{np.median(seconds / 0.25):.2f}" in printed
    assert "f_r = 200" in printed and "PyHessian: 2 Lanczos steps, 4 times" in printed


def test_rows_without_lanczos():
    rows = bench.make_rows(bench.Config(model="mlp", batch_size=2, lanczos=False))
    assert len(rows) == 15 and not any("Lanczos" in row or row == bench.LAYERS for row in rows)


def test_ratios_are_within_rounds_and_by_probe():
    rows = {
        "one": {"seconds": [2.0, 40.0, None], "per": 1},
        "eight": {"seconds": [8.0, 80.0, 1.0], "per": 8},
    }
    assert bench.ratio(rows, "one", "eight") == pytest.approx(8 * np.median([2 / 8, 40 / 80]))
    assert bench.ratio(rows, "eight", "one") == pytest.approx(np.median([8 / 2, 80 / 40]) / 8)


def test_peers_that_do_not_start_are_named():
    with pytest.raises(ValueError, match="ended with status 1"):
        peers.Peers("/bin/false", "experiments.bench.torch_work", "lenet", "1", "1")


def test_peak_memory():
    found = memory.peak_memory(lambda: np.ones(4_000_000).sum())
    if found is None:
        pytest.skip("the system does not tell")
    assert 30 <= found <= 40  # 30.5 MiB


def test_an_error_of_what_is_measured_is_not_lost():
    if memory.peak_memory(lambda: None) is None:
        pytest.skip("the system does not tell")
    with pytest.raises(KeyError, match="of the call"):
        memory.peak_memory(lambda: {}["of the call"])
