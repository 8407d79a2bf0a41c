"""Curvature beside someone else's training: what is measured, when, and within which time."""

import doctest
import inspect
import json
import math
import subprocess
import sys
import warnings

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import problem
from jax.flatten_util import ravel_pytree

import jaxhess as jh
from jaxhess import monitor

P = problem("mlp")
KEY = jax.random.key(4)


class Recorder:
    """A sink that keeps what it is given, as a run of Weights & Biases takes it."""

    def __init__(self):
        self.seen = []

    def log(self, data, step=None):
        self.seen.append((step, data))


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
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(steps):
            if watch(P.params, P.batch, step) is not None:
                taken.append(step)
            clock.now += 1
    assert len(told) == min(watch.left_out, 1)
    return taken, clock.now, watch


def test_it_measures_when_it_is_due_and_what_it_is_told(tmp_path):
    path, recorder = tmp_path / "deep" / "curvature.jsonl", Recorder()
    watch = monitor.Monitor(
        P.objective,
        key=KEY,
        sinks=[monitor.jsonl(path), recorder],
        every=3,
        measures=["trace", "ggn_trace", "lambda_max"],
        num_probes=4,
        num_steps=5,
        clock=Clock(0.0),
    )
    found = [watch(P.params, P.batch, step) for step in range(4)]
    assert [record is not None for record in found] == [True, False, False, True]
    key = jax.random.fold_in(KEY, 3)
    for name, curvature in (("trace", "hessian"), ("ggn_trace", "ggn")):
        traces = jh.layer_traces(P.objective, P.params, P.batch, key=key, num_probes=4, curvature=curvature)
        assert "fc1" in traces and "total" in traces
        for layer, estimate in traces.items():
            assert found[3][f"{name}/{layer}"] == pytest.approx(float(estimate.mean))
            assert found[3][f"{name}_std_error/{layer}"] == pytest.approx(float(estimate.std_error))
    assert found[3]["trace/fc1"] != found[0]["trace/fc1"]  # probes of its own
    assert [name for name in found[3] if name.startswith("lambda_max")] == ["lambda_max/total"]
    assert all(type(value) is float for value in found[3].values())
    assert monitor.read(path) == [{"step": 0} | found[0], {"step": 3} | found[3]]
    assert recorder.seen == [(0, found[0]), (3, found[3])]


def test_the_largest_eigenvalue_of_every_layer():
    watch = monitor.Monitor(P.objective, key=KEY, sinks=[], measures=["layer_lambda_max"], num_steps=30)
    record = watch(P.params, P.batch, 0)
    layers = jh.layer_names(P.params)
    assert sorted(record) == sorted(f"lambda_max/{layer}" for layer in [*layers, "total"])
    for layer in layers:
        block = jh.hessian(P.objective, P.params, P.batch, layer=layer)
        like = jh.subtree(P.params, layer)
        exact = jh.top_eigenpairs(block, like=like, key=KEY, k=1)[0][0]
        assert record[f"lambda_max/{layer}"] == pytest.approx(float(exact), rel=1e-3)


def test_a_run_that_goes_on_measures_what_it_would_have_measured():
    def watched():
        options = dict(every=5, measures=["trace"], num_probes=2, clock=Clock(0.0))
        return monitor.Monitor(P.objective, key=KEY, sinks=[], **options)

    first = watched()
    whole = [first(P.params, P.batch, step) for step in (0, 5)]
    assert watched()(P.params, P.batch, 5) == whole[1] and whole[1] != whole[0]


@pytest.mark.parametrize(("cost", "share"), [(0.5, 0.1), (2.0, 0.05), (0.01, 0.05)])
def test_it_keeps_within_its_share(cost, share):
    taken, total, watch = times(cost, share, 400)
    # The first is always taken; what follows must have been earned by then.
    assert taken[0] == 0
    assert cost * len(taken) <= share * total + cost
    assert len(taken) >= min(400, 0.8 * share * 400 / cost)
    assert watch.left_out == 400 - len(taken)


def test_the_first_one_left_out_is_told_with_the_reason():
    clock = Clock(0.0)
    watch = monitor.Monitor(P.objective, key=KEY, sinks=[], every=1, share=0.1, clock=clock)

    def measured(*args):
        clock.now += 3.0
        return {}

    watch._measure = measured
    for step in range(2):
        assert watch(P.params, P.batch, step) == {}
    clock.now += 5.0
    message = r"at step 2 is left out: measuring has taken 6 s .* of the 11 s .* the share is 0.1.*raise share"
    with pytest.warns(UserWarning, match=message) as told:
        assert watch(P.params, P.batch, 2) is None
    assert told[0].filename == __file__
    assert watch(P.params, P.batch, 3) is None and watch.left_out == 2  # a warning would be an error here


def test_the_time_of_the_first_measurement_is_not_counted():
    """It compiled: the second is taken as soon as it is due, and counts twice."""
    clock, taken = Clock(0.0), []
    watch = monitor.Monitor(P.objective, key=KEY, sinks=[], every=1, share=0.1, clock=clock)
    costs = iter([10.0, 1.0, 1.0])

    def measured(*args):
        clock.now += next(costs)
        return {}

    watch._measure = measured
    with pytest.warns(UserWarning, match="left out"):
        while len(taken) < 3:
            before = clock.now
            if watch(P.params, P.batch, 0) is not None:
                taken.append(before)
            clock.now += 1
    assert taken == [0.0, 11.0, 30.0]  # spent 2 + 1 of 30


def test_a_budget_that_allows_all_leaves_nothing_out():
    taken, _, watch = times(0.001, 0.5, 20, every=5)
    assert taken == [0, 5, 10, 15] and watch.left_out == 0


def test_whole_data_sets_and_losses_with_aux():
    halves = [jax.tree.map(lambda x: x[: len(x) // 2], P.batch), jax.tree.map(lambda x: x[len(x) // 2 :], P.batch)]
    options = dict(key=KEY, sinks=[], num_probes=32)
    whole = monitor.Monitor(P.objective, **options)(P.params, P.batch, 0)
    found = monitor.Monitor(P.objective, **options)(P.params, jh.Batches(halves), 0)
    assert list(found) == list(whole) and "trace/fc1" in found
    assert found["lambda_max/total"] == pytest.approx(whole["lambda_max/total"], rel=1e-3)
    for name in [name for name in found if name.startswith("trace/")]:  # probes differ, so that their errors count
        layer = name.partition("/")[2]
        error = math.hypot(found[f"trace_std_error/{layer}"], whole[f"trace_std_error/{layer}"])
        assert abs(found[name] - whole[name]) < 4 * error + 1e-4
    with_aux = monitor.Monitor(lambda w, b: (P.objective(w, b), "aux"), has_aux=True, **options)
    without = monitor.Monitor(lambda w, b: P.objective(w, b), **options)
    assert with_aux(P.params, P.batch, 0) == pytest.approx(without(P.params, P.batch, 0), rel=1e-4, abs=1e-5)


# ---- sinks ----


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "a": 1.0}\n{"step": 1, "a"')
    monitor.jsonl(path).log({"a": 3.0}, 2)
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["step"] == 0 and json.loads(lines[2]) == {"step": 2, "a": 3.0}
    assert monitor.read(path) == [{"step": 0, "a": 1.0}, {"step": 2, "a": 3.0}]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_it_is_read(tmp_path):
    sink = monitor.jsonl(tmp_path / "log.jsonl")
    sink.log({"a": math.nan, "b": math.inf}, 1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "a": null, "b": null}\n'
    (record,) = monitor.read(tmp_path / "log.jsonl")
    assert math.isnan(record["a"]) and math.isnan(record["b"])


def test_of_two_records_of_a_step_the_last_counts(tmp_path):
    sink = monitor.jsonl(tmp_path / "log.jsonl")
    for step, value in ((0, 1.0), (10, 2.0), (20, 3.0), (10, 4.0)):  # it went on from a checkpoint before step 10
        sink.log({"a": value}, step)
    assert monitor.read(tmp_path / "log.jsonl") == [
        {"step": 0, "a": 1.0},
        {"step": 10, "a": 4.0},
        {"step": 20, "a": 3.0},
    ]


class Writer:
    """A summary writer."""

    def __init__(self, folder=None):
        self.folder, self.written = folder, []

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))


def test_tensorboard_takes_a_writer_of_ones_own():
    writer = Writer()
    monitor.tensorboard(writer).log({"trace/total": 1.5, "trace/fc": 0.5}, 7)
    assert writer.written == [("trace/total", 1.5, 7), ("trace/fc", 0.5, 7)]


@pytest.mark.parametrize("package", ["tensorboardX", "torch.utils.tensorboard"])
def test_tensorboard_makes_a_writer_of_what_is_installed(tmp_path, monkeypatch, package):
    made = []

    class Flushed(Writer):
        def __init__(self, folder):
            super().__init__(folder)
            made.append(self)

        def flush(self):
            self.written.append("flush")

    class Module:
        SummaryWriter = Flushed

    for name in ("tensorboardX", "torch", "torch.utils", "torch.utils.tensorboard"):
        there = package.startswith(name)
        monkeypatch.setitem(sys.modules, name, Module if there else None)
    monitor.tensorboard(tmp_path).log({"trace/total": 1.5}, 7)
    assert made[0].folder == str(tmp_path) and made[0].written == [("trace/total", 1.5, 7), "flush"]


def test_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    for name in ("tensorboardX", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        monitor.tensorboard(tmp_path)


# ---- the rest ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measures": ["hess"]}, ValueError, r"unknown measures \['hess'\]; choose one or more of \['trace'"),
        ({"measures": []}, ValueError, "choose one or more"),
        ({"share": 0.0}, ValueError, r"share must lie in \(0, 1\], got 0.0"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"sinks": [print]}, TypeError, r"a sink has a method log\(record, step\), got <built-in"),
    ],
)
def test_bad_settings_are_named(options, error, message):
    with pytest.raises(error, match=message):
        monitor.Monitor(P.objective, **{"key": KEY, "sinks": [], **options})


def test_training_is_not_changed():
    params = jax.tree.map(np.copy, P.params)
    monitor.Monitor(P.objective, key=KEY, sinks=[], measures=["trace"], num_probes=1)(params, P.batch, 0)
    jax.tree.map(np.testing.assert_array_equal, params, P.params)


def test_what_is_not_due_does_not_touch_the_device():
    deleted = jnp.ones(2)
    deleted.delete()
    assert monitor.Monitor(P.objective, key=KEY, sinks=[])(deleted, deleted, 7) is None


def test_importing_it_imports_no_library_of_a_sink():
    code = "import sys, jaxhess.monitor; print([m for m in ('torch', 'tensorboardX', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_its_documentation_is_whole_and_runs():
    assert doctest.testmod(monitor).failed == 0
    for function in (monitor.jsonl, monitor.read, monitor.tensorboard):
        text = inspect.getdoc(function)
        places = [text.find(section) for section in ("Args:", "Returns:", "Example:", "Reference:")]
        assert -1 not in places and places == sorted(places), function
    for argument in inspect.signature(monitor.Monitor.__init__).parameters:
        assert argument == "self" or f"{argument}: " in monitor.Monitor.__init__.__doc__


# ---- what is followed from one measurement to the next ----


def test_the_sharpness_of_a_training_is_followed():
    """Plain and in the geometry of Adam, against dense eigenvalues; from the second on by eight products each."""
    tx = optax.adam(1e-2)
    params, state = P.params, tx.init(P.params)
    measures = ["lambda_max", "preconditioned_lambda_max", "gradient_share", "critical_sharpness"]
    watch = monitor.Monitor(P.objective, key=KEY, sinks=[], every=10, measures=measures, share=1.0, clock=Clock(0.0))
    flat, unravel = ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda w: P.objective(unravel(w), P.batch)))
    slope = jax.jit(jax.grad(P.objective))
    for step in range(31):
        grads = slope(params, P.batch)
        update, state = tx.update(grads, state, params)
        record = watch(params, P.batch, step, opt_state=state, update=update)
        if record is not None:
            matrix = np.asarray(dense(ravel_pytree(params)[0]), np.float64)
            values, vectors = np.linalg.eigh(matrix)
            root = np.asarray(ravel_pytree(jh.preconditioner(state))[0], np.float64) ** -0.5
            assert record["lambda_max/total"] == pytest.approx(values[-1], rel=0.01)
            preconditioned = np.linalg.eigvalsh(root[:, None] * matrix * root)[-1]
            assert record["preconditioned_lambda_max/total"] == pytest.approx(preconditioned, rel=0.01)
            g = np.asarray(ravel_pytree(grads)[0], np.float64)
            share = np.sum((vectors[:, -3:].T @ g) ** 2) / (g @ g)
            assert record["gradient_share/total"] == pytest.approx(share, abs=0.1)
            critical = jh.critical_sharpness(P.objective, params, P.batch, update)
            assert record["critical_sharpness/total"] == pytest.approx(critical)
        params = optax.apply_updates(params, update)


def test_groups_are_measured():
    groups = {"kernels": lambda path: path.endswith("w"), "last": "fc2"}
    options = dict(measures=["trace", "layer_lambda_max"], layers=groups, num_steps=40)
    record = monitor.Monitor(P.objective, key=KEY, sinks=[], **options)(P.params, P.batch, 0)
    names = ["kernels", "last", "total"]
    assert sorted(record) == sorted(f"{x}/{n}" for x in ("trace", "trace_std_error", "lambda_max") for n in names)
    last = np.linalg.eigvalsh(helpers.dense(P, "hessian", "fc2"))[-1]
    assert record["lambda_max/last"] == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("measure", "name"), [("preconditioned_lambda_max", "opt_state"), ("critical_sharpness", "update")]
)
def test_a_measure_without_its_argument_is_named(measure, name):
    watch = monitor.Monitor(P.objective, key=KEY, sinks=[], measures=[measure])
    with pytest.raises(ValueError, match=f"'{measure}' needs {name}="):
        watch(P.params, P.batch, 0)
