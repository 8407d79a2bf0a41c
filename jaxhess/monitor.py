"""Curvature of a net while it trains, within a share of the training's time, written to where you look at it."""

from __future__ import annotations

import json
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

import jaxhess as jh

PyTree = Any
MEASURES = (
    "trace",
    "ggn_trace",
    "lambda_max",
    "layer_lambda_max",
    "preconditioned_lambda_max",
    "gradient_share",
    "critical_sharpness",
)
_PAIRS = 3  # eigenpairs that are followed: with one alone, another that overtakes it would be seen late


class Sink(Protocol):
    """What takes the records; a run of Weights & Biases is one."""

    def log(self, record: dict[str, float], step: int, /) -> object:
        """Takes what was measured at a step."""


class Monitor:
    """Measures a net every so many steps, as long as that stays within a share of the training's time.

    The first measurement is always taken. Its time is not counted, because it compiles; the second one counts twice.
    A later measurement is left out if it would exceed the share, assuming that it takes as long as the last one. The
    first time that a measurement is left out, a warning says so. A call on any other step costs nothing: only a
    measurement waits for the device. The probes depend only on the key and the step, so a training that is resumed
    draws the same probes. Eigenvalues start from the vectors of the last measurement, and then take a few products.

    Attributes:
      left_out: the number of measurements that were due and left out.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxhess.monitor import Monitor
      >>> loss = lambda w, batch: jnp.sum(w**2) * batch
      >>> monitor = Monitor(loss, key=jax.random.key(0), sinks=[], every=10, measures=["trace"])
      >>> monitor(jnp.ones(2), 0.5, step=0)["trace/total"]
      2.0
      >>> monitor(jnp.ones(2), 0.5, step=1)  # not due

    Reference: as `jaxhess.layer_traces` and `jaxhess.spectrum`.
    """

    def __init__(
        self,
        objective: Callable,
        *,
        key: jax.Array,
        sinks: Sequence[Sink],
        every: int = 100,
        share: float = 0.05,
        measures: Sequence[str] = ("trace", "lambda_max"),
        num_probes: int = 8,
        num_steps: int = 20,
        layers: Any = None,
        learning_rate: float = 1.0,
        has_aux: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Sets what is measured, how often, and where it goes.

        Args:
          objective: a loss, or a `jaxhess.Objective` (which "ggn_trace" needs).
          key: a JAX random key.
          sinks: objects with ``log(record, step)``: `jsonl`, `tensorboard`, a run of Weights & Biases.
          every: steps from one measurement to the next.
          share: the share of the time since the monitor was made that measuring may take, in (0, 1].
          measures: of "trace" and "ggn_trace" (each layer and the whole net); "lambda_max" (the whole net);
            "layer_lambda_max" (each layer and the whole net); "preconditioned_lambda_max" of the optimizer in
            ``opt_state=``, as for `jaxhess.preconditioner`; "gradient_share", the share of the squared gradient in the
            space of the three leading eigenvectors; "critical_sharpness" along ``update=``.
          num_probes: probes of the traces.
          num_steps: products for the largest eigenvalues of the first measurement, at least 8.
          layers: which layers or groups, as for `jaxhess.layer_spectra`; all layers by default.
          learning_rate: of ``update``, as for `jaxhess.critical_sharpness`.
          has_aux: as for `jaxhess.hessian`.
          clock: returns seconds, for tests.

        Raises:
          ValueError: for an unknown measure or none, a share outside (0, 1], or ``every`` below 1.
          TypeError: for a sink without ``log``.
        """
        unknown = sorted(set(measures) - set(MEASURES))
        if unknown or not measures:
            raise ValueError(f"unknown measures {unknown}; choose one or more of {list(MEASURES)}")
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        for sink in sinks:
            if not callable(getattr(sink, "log", None)):
                raise TypeError(f"a sink has a method log(record, step), got {sink!r}; jsonl(path) makes one")
        self._objective, self._key, self._sinks = objective, key, list(sinks)
        self._every, self._share, self._measures = every, share, frozenset(measures)
        self._num_probes, self._num_steps, self._has_aux = num_probes, num_steps, has_aux
        self._layers, self._learning_rate = layers, learning_rate
        self._clock, self._start, self._spent, self._last, self._measured = clock, clock(), 0.0, 0.0, 0
        self._vectors: dict[str, PyTree] = {}  # the leading eigenvectors of the last measurement
        self.left_out = 0

    def __call__(
        self, params: PyTree, batch: PyTree, step: int, *, opt_state: PyTree = None, update: PyTree = None
    ) -> dict[str, float] | None:
        """Measures if a measurement is due and there is time for it.

        Args:
          params: the parameters, which are neither changed nor kept.
          batch: one batch, or `jaxhess.Batches`.
          step: the number of the training step, a Python integer: reading one from the device would wait for it.
          opt_state: the state of the optimizer, for "preconditioned_lambda_max".
          update: what the optimizer adds to these parameters, for "critical_sharpness".

        Returns:
          {"trace/LAYER": float, "trace_std_error/LAYER": float, ..., "lambda_max/total": float}, which the sinks have
          been given too; None if nothing was measured.

        Raises:
          ValueError: for a measure whose argument is missing.

        Warns:
          UserWarning: the first time that a measurement is left out.
        """
        if step % self._every:
            return None
        elapsed = self._clock() - self._start
        if self._measured and self._spent + self._last > self._share * elapsed:
            self._leave_out(step, elapsed)
            return None
        jax.block_until_ready(params)  # the training's own work does not count
        start = self._clock()
        record = self._measure(jax.random.fold_in(self._key, step), params, batch, opt_state, update)
        time_taken = self._clock() - start
        if self._measured:  # the first one compiled
            self._spent += time_taken * (2 if self._measured == 1 else 1)
            self._last = time_taken
        self._measured += 1
        for sink in self._sinks:
            sink.log(record, step)
        return record

    def _leave_out(self, step, elapsed):
        self.left_out += 1
        if self.left_out == 1:
            warnings.warn(
                f"the measurement at step {step} is left out: measuring has taken {self._spent:.2g} s (without the "
                f"compilation) of the {elapsed:.2g} s since the monitor was made, and the share is {self._share:g}. "
                f"Later ones may be left out too, without a warning; `left_out` counts them; raise share for more",
                stacklevel=3,
            )

    def _measure(self, key, params, batch, opt_state, update):
        """{name: float} of all measures, which share one key."""
        for measure, value in (("preconditioned_lambda_max", opt_state), ("critical_sharpness", update)):
            if measure in self._measures and value is None:
                name = "opt_state" if measure.startswith("pre") else "update"
                raise ValueError(f"{measure!r} needs {name}=: monitor(params, batch, step, {name}={name})")
        problem, record = (self._objective, params, batch), {}
        shared = dict(key=key, layers=self._layers, has_aux=self._has_aux)
        for name, curvature in (("trace", "hessian"), ("ggn_trace", "ggn")):
            if name in self._measures:
                found = jh.layer_traces(*problem, num_probes=self._num_probes, curvature=curvature, **shared)
                for layer, estimate in found.items():
                    record[f"{name}/{layer}"] = float(estimate.mean)
                    record[f"{name}_std_error/{layer}"] = float(estimate.std_error)
        if "layer_lambda_max" in self._measures:
            spectra = jh.layer_spectra(*problem, num_steps=self._num_steps, **shared)
            record |= {f"lambda_max/{layer}": float(spectrum.lambda_max) for layer, spectrum in spectra.items()}
        if self._measures & {"lambda_max", "preconditioned_lambda_max", "gradient_share"}:
            record |= self._followed(key, problem, opt_state)
        if "critical_sharpness" in self._measures:
            options = dict(learning_rate=self._learning_rate, has_aux=self._has_aux)
            record["critical_sharpness/total"] = jh.critical_sharpness(*problem, update, **options)
        return record

    def _followed(self, key, problem, opt_state):
        """What comes from eigenpairs that are followed from one measurement to the next."""
        record, (_, params, batch) = {}, problem
        operator = jh.hessian(*problem, has_aux=self._has_aux)
        if self._measures & {"lambda_max", "gradient_share"}:
            value, vectors = self._top("lambda_max", operator, params, key)
            if "lambda_max" in self._measures and "layer_lambda_max" not in self._measures:
                record["lambda_max/total"] = value
            if "gradient_share" in self._measures:
                slope = _slope(self._objective, self._has_aux, params, batch)
                record["gradient_share/total"] = jh.subspace_overlap(jax.tree.map(lambda x: x[None], slope), vectors)
        if "preconditioned_lambda_max" in self._measures:
            operator = jh.precondition(operator, jh.preconditioner(opt_state, params=params))
            record["preconditioned_lambda_max/total"], _ = self._top("preconditioned", operator, params, key)
        return record

    def _top(self, name, operator, params, key):
        """The largest eigenvalue with the leading vectors, from those of the last time."""
        start = self._vectors.get(name)
        if start is not None and jax.tree.map(lambda x: x.shape[1:], start) != jax.tree.map(jnp.shape, params):
            start = None  # another net than at the last measurement
        size = sum(x.size for x in jax.tree.leaves(params))
        steps = min(size, max(8, self._num_steps)) if start is None else None
        options = dict(k=min(_PAIRS, size), key=key, start=start, num_steps=steps)
        values, self._vectors[name], _ = jh.top_eigenpairs(operator, like=params, **options)
        return float(values[0]), self._vectors[name]


@partial(jax.jit, static_argnums=(0, 1))
def _slope(loss, has_aux, params, batch):
    slope = jax.grad(loss, has_aux=has_aux)(params, batch)
    return slope[0] if has_aux else slope


class _Jsonl:
    def __init__(self, path):
        self._path = pathlib.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, record, step):
        # JSON has no NaN and no infinity: null stands for them.
        plain = {name: value if math.isfinite(value) else None for name, value in record.items()}
        line = json.dumps({"step": int(step), **plain}, allow_nan=False) + "\n"
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())


class _TensorBoard:
    def __init__(self, writer):
        self._writer = writer

    def log(self, record, step):
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)
        if hasattr(self._writer, "flush"):
            self._writer.flush()


def jsonl(path: pathlib.Path | str) -> Sink:
    """A sink that appends one line of JSON for each measurement to a file.

    If an earlier run was killed while it wrote, its unfinished line is closed first, so that it spoils no other.

    Args:
      path: the file; its folder is made.

    Returns:
      The sink.

    Example:
      >>> import os, tempfile
      >>> from jaxhess import monitor
      >>> path = os.path.join(tempfile.mkdtemp(), "curvature.jsonl")
      >>> monitor.jsonl(path).log({"trace/total": 2.5}, 100)
      >>> monitor.read(path)
      [{'step': 100, 'trace/total': 2.5}]

    Reference: the format is that of jsonlines.org.
    """
    return _Jsonl(path)


def read(path: pathlib.Path | str) -> list[dict[str, float]]:
    r"""The records of a file that `jsonl` wrote, for `jaxhess.plot.evolution`.

    Lines that were cut off are left out. Of several records of one step, as of a training that went on from an earlier
    checkpoint, the last one counts.

    Args:
      path: the file.

    Returns:
      [{"step": int, NAME: float, ...}, ...] by step; what was not finite is NaN.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxhess import monitor
      >>> path = pathlib.Path(tempfile.mkdtemp(), "log.jsonl")
      >>> _ = path.write_text('{"step": 2, "a": 1.0}\n{"step": 0, "a": null}\n{"step": 4, ')
      >>> monitor.read(path)
      [{'step': 0, 'a': nan}, {'step': 2, 'a': 1.0}]

    Reference: as `jsonl`.
    """
    found: dict[int, dict[str, float]] = {}
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            continue
        found[step] = {name: math.nan if value is None else value for name, value in record.items()}
    return [found[step] for step in sorted(found)]


def tensorboard(writer: Any) -> Sink:
    """A sink that writes scalars for TensorBoard.

    Args:
      writer: a summary writer, that is an object with ``add_scalar(name, value, step)``; or a folder, for which one is
        made with tensorboardX, or with PyTorch where that is not installed.

    Returns:
      The sink.

    Raises:
      ValueError: for a folder, if neither package is installed.

    Example:
      >>> from jaxhess import monitor
      >>> class Writer:
      ...     def add_scalar(self, name, value, step):
      ...         print(step, name, value)
      >>> monitor.tensorboard(Writer()).log({"trace/total": 2.5}, 100)
      100 trace/total 2.5

    Reference: the interface is that of tensorboardX and of torch.utils.tensorboard.
    """
    return _TensorBoard(writer if hasattr(writer, "add_scalar") else _summary_writer(str(writer)))


def _summary_writer(folder):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "writing for TensorBoard needs a summary writer: pass one, or `pip install tensorboardX`"
            ) from error
    return SummaryWriter(folder)
