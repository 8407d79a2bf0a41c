"""Curvature beside a training that was written without it, within a share of its time."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jaxhess as jh

PyTree = Any
Sink = Callable[[int, Mapping[str, float]], None]
MEASURES = ("trace", "ggn_trace", "lambda_max")


class Monitor:
    """Measures a net every so many steps, as long as that stays within a share of the training's time.

    The first measurement, which compiles, is let through and counts; after it one is left out where it would
    probably (as long as the last one took) go beyond the share. Between measurements a call costs nothing: it waits for
    the device only to measure.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda w, batch: jnp.sum(w**2) * batch
      >>> monitor = Monitor(loss, key=jax.random.key(0), sinks=[], every=10, measures=["trace"])
      >>> monitor(0, jnp.ones(2), 0.5)["trace/total"]
      2.0
      >>> monitor(1, jnp.ones(2), 0.5)  # not due
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
        has_aux: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Says what is measured, how often, and where it goes.

        Args:
          objective: a loss, or an `jaxhess.Objective` (which "ggn_trace" needs).
          key: a JAX random key; each measurement has probes of its own.
          sinks: what takes ``(step, {name: value})``, such as `jsonl` and `tensorboard`.
          every: steps from one measurement to the next.
          share: of the time since the monitor was made, what measuring may take, in (0, 1].
          measures: of "trace" and "ggn_trace", of every layer and the net; "lambda_max", of the net.
          num_probes: probes of the traces.
          num_steps: Lanczos steps for lambda_max.
          has_aux: as for `jaxhess.hessian`.
          clock: seconds, for tests.

        Raises:
          ValueError: for an unknown measure, a share outside (0, 1], or ``every`` < 1.
        """
        unknown = sorted(set(measures) - set(MEASURES))
        if unknown or not measures:
            raise ValueError(f"unknown measures {unknown}; choose from {list(MEASURES)}")
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self._objective, self._key, self._sinks = objective, key, list(sinks)
        self._every, self._share, self._measures = every, share, tuple(measures)
        self._num_probes, self._num_steps, self._has_aux = num_probes, num_steps, has_aux
        self._clock, self._start, self._spent, self._last = clock, clock(), 0.0, 0.0
        self.left_out = 0

    def __call__(self, step: int, params: PyTree, batch: PyTree) -> dict[str, float] | None:
        """Measures if it is due and there is time; returns what was measured.

        Args:
          step: the number of the training step.
          params: the parameters, which are not changed or kept.
          batch: one batch.

        Returns:
          {"trace/LAYER": float, ..., "lambda_max/total": float}, or None.
        """
        if step % self._every:
            return None
        if self._spent and self._spent + self._last > self._share * (self._clock() - self._start):
            self.left_out += 1
            return None
        jax.block_until_ready(params)  # the training's own work is not counted
        start = self._clock()
        found = self._measure(jax.random.fold_in(self._key, step), params, batch)
        self._last = self._clock() - start
        self._spent += self._last
        for sink in self._sinks:
            sink(step, found)
        return found

    def _measure(self, key, params, batch):
        options, found = {"num_probes": self._num_probes, "has_aux": self._has_aux}, {}
        for name, curvature in (("trace", "hessian"), ("ggn_trace", "ggn")):
            if name in self._measures:
                traces = jh.layer_traces(self._objective, params, batch, key=key, curvature=curvature, **options)
                found |= {f"{name}/{layer}": float(estimate.mean) for layer, estimate in traces.items()}
        if "lambda_max" in self._measures:
            operator = jh.hessian(self._objective, params, batch, has_aux=self._has_aux)
            spectrum = jh.spectrum(operator, like=params, key=key, num_steps=self._num_steps)
            found["lambda_max/total"] = spectrum.lambda_max
        return found


def jsonl(path: pathlib.Path | str) -> Sink:
    """A sink that appends one JSON object a measurement, whole lines only, to a file.

    A line that an earlier run left unfinished is closed off first, so that it spoils no other.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(step, record):
        line = json.dumps({"step": int(step), **record}) + "\n"
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())

    return write


def tensorboard(folder: pathlib.Path | str) -> Sink:
    """A sink that writes scalars for TensorBoard; ValueError that says what to install where tensorboardX is not."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("writing for TensorBoard needs `pip install tensorboardX`; jsonl needs nothing") from error
    writer = SummaryWriter(str(folder))

    def write(step, record):
        for name, value in record.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write
