"""Curvature beside someone else's training: what is measured, when, and within which time."""

import json

import jax
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh
from experiments import monitor

P = problem("mlp")
KEY = jax.random.key(4)


class Clock:
    """A clock that a step of training moves by one second and a measurement by ``cost``."""

    def __init__(self, cost):
        self.now, self.cost = 0.0, cost

    def __call__(self):
        return self.now


def times(cost, share, steps, every=1):
    """The steps on which a measurement of so many seconds is taken."""
    clock, taken = Clock(cost), []

    def measured(*args):
        clock.now += cost
        return {}

    watch = monitor.Monitor(P.objective, key=KEY, sinks=[], every=every, share=share, clock=clock)
    watch._measure = measured
    for step in range(steps):
        if watch(step, P.params, P.batch) is not None:
            taken.append(step)
        clock.now += 1
    return taken, clock.now, watch


def test_it_measures_when_it_is_due_and_what_it_is_told(tmp_path):
    path = tmp_path / "deep" / "curvature.jsonl"
    watch = monitor.Monitor(
        P.objective,
        key=KEY,
        sinks=[monitor.jsonl(path)],
        every=3,
        measures=monitor.MEASURES,
        num_probes=4,
        num_steps=5,
        clock=Clock(0.0),
    )
    found = [watch(step, P.params, P.batch) for step in range(4)]
    assert [record is not None for record in found] == [True, False, False, True]
    key = jax.random.fold_in(KEY, 3)
    traces = jh.layer_traces(P.objective, P.params, P.batch, key=key, num_probes=4)
    for layer, estimate in traces.items():
        assert found[3][f"trace/{layer}"] == pytest.approx(float(estimate.mean))
    assert found[3]["trace/fc1"] != found[0]["trace/fc1"]  # probes of its own
    assert {"ggn_trace/total", "lambda_max/total"} < set(found[3])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0} | found[0], {"step": 3} | found[3]]


@pytest.mark.parametrize(("cost", "share"), [(0.5, 0.1), (2.0, 0.05), (0.01, 0.05)])
def test_it_keeps_within_its_share(cost, share):
    taken, total, watch = times(cost, share, 400)
    # The first is let through; what follows must have been earned by then.
    assert taken[0] == 0
    assert cost * len(taken) <= share * total + cost
    assert len(taken) >= min(400, 0.8 * share * 400 / cost)
    assert watch.left_out == 400 - len(taken)


def test_a_budget_that_allows_all_leaves_nothing_out():
    taken, _, watch = times(0.001, 0.5, 20, every=5)
    assert taken == [0, 5, 10, 15] and watch.left_out == 0


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "a": 1.0}\n{"step": 1, "a"')
    monitor.jsonl(path)(2, {"a": 3.0})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["step"] == 0 and json.loads(lines[2]) == {"step": 2, "a": 3.0}


def test_tensorboard(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flush")

    class Module:
        SummaryWriter = Writer

    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", Module)
    monitor.tensorboard(tmp_path)(7, {"trace/total": 1.5})
    assert written == [("trace/total", 1.5, 7), "flush"]
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        monitor.tensorboard(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["hess"]}, r"unknown measures \['hess'\]; choose from \['trace'"),
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        monitor.Monitor(P.objective, key=KEY, sinks=[], **options)


def test_training_is_not_changed():
    params = jax.tree.map(np.copy, P.params)
    monitor.Monitor(P.objective, key=KEY, sinks=[], measures=["trace"], num_probes=1)(0, params, P.batch)
    jax.tree.map(np.testing.assert_array_equal, params, P.params)
