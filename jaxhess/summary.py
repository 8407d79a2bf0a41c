"""The table of a net: one row a layer and one for the whole."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from jaxhess._checks import check_key
from jaxhess.distances import count_outliers, wasserstein
from jaxhess.lanczos import dimension, tree_norm
from jaxhess.layers import subtree
from jaxhess.objective import NoFactorError, Objective
from jaxhess.operators import prepare
from jaxhess.spectrum import Spectrum, layer_spectra
from jaxhess.trace import Estimate, layer_traces

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Record:
    """What `summarize` finds of one layer, or of the whole net.

    Attributes:
      parameters: number of parameters.
      trace: Tr(Hess_l) with its standard error.
      ggn_trace: Tr(G_l) likewise; None for a plain loss, or a criterion that is not convex.
      lambda_max, lambda_min: extreme eigenvalues of Hess_l: Ritz values, or exact ones.
      lambda_max_residual, lambda_min_residual: an eigenvalue lies within this of them.
      trace_norm2: Tr(Hess_l) * ||w_l||^2, which does not change when a scale-invariant layer is scaled.
      outliers: `count_outliers` of the spectrum.
      wasserstein: distance of the spectrum to the whole net's, in units of eigenvalues.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> table = jh.summarize(lambda w, batch: jnp.sum(w**2), jnp.ones(3), None, key=jax.random.key(0))
      >>> table["total"].parameters, round(float(table["total"].trace.mean), 4)
      (3, 6.0)

    Reference: as `summarize`.
    """

    parameters: int
    trace: Estimate
    ggn_trace: Estimate | None
    lambda_max: float
    lambda_max_residual: float
    lambda_min: float
    lambda_min_residual: float
    trace_norm2: float
    outliers: int
    wasserstein: float


class Summary(Mapping):
    """{layer: Record, ..., "total": Record} in network order; prints as a table.

    Attributes:
      spectra: {layer: Spectrum, ..., "total": Spectrum} of the Hessian, from which the records were made.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> table = jh.summarize(lambda w, batch: jnp.sum(w**2), jnp.ones(3), None, key=jax.random.key(0))
      >>> table.to_dict()["total"]["lambda_max"], table.spectra["total"].dim
      (2.0, 3)

    Reference: as `summarize`.
    """

    def __init__(self, records: dict[str, Record], spectra: dict[str, Spectrum]):
        self._records, self.spectra = records, spectra

    def __getitem__(self, name: str) -> Record:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain numbers, for JSON: {layer: {column: number or [mean, standard error] or None}}."""

        def plain(value):
            if isinstance(value, Estimate):
                return [float(value.mean), float(value.std_error)]
            return value if value is None or isinstance(value, int) else float(value)

        return {
            name: {field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
            for name, record in self.items()
        }

    def __str__(self) -> str:
        heads = (
            "layer",
            "params",
            "Tr Hess",
            "Tr G",
            "lambda_max",
            "lambda_min",
            "Tr*|w|^2",
            "outliers",
            "W1 to total",
        )
        rows = [heads]
        for name, r in self.items():
            rows.append(
                (
                    name,
                    f"{r.parameters:,}",
                    str(r.trace),
                    "-" if r.ggn_trace is None else str(r.ggn_trace),
                    f"{r.lambda_max:.4g} ({r.lambda_max_residual:.0e})",
                    f"{r.lambda_min:.4g} ({r.lambda_min_residual:.0e})",
                    f"{r.trace_norm2:.4g}",
                    str(r.outliers),
                    "-" if name == "total" else f"{r.wasserstein:.3g}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(len(lines) - 1, lines[1])
        return "\n".join(lines)

    __repr__ = __str__


def summarize(
    objective: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_probes: int = 64,
    num_steps: int = 64,
    method: str = "lanczos",
    layers: str | Sequence[str] | None = None,
    chunk_size: int = 8,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> Summary:
    """The curvature of every layer and of the whole net, as a table.

    Args:
      objective: an `Objective`; a plain loss gives a table without Tr G.
      params, batch, has_aux: as for `hessian`.
      key: a JAX random key; the spectra are those of `layer_spectra` with the same key.
      num_probes: probes of each trace.
      num_steps: Lanczos steps of each spectrum. The residuals beside lambda_max and lambda_min say whether they
        were enough.
      method: of the spectra: "lanczos" or "auto", as for `layer_spectra`.
      layers: "all", "middle" (`middle_layers`), or names; all by default.
      chunk_size: probes at a time, as for `layer_traces`; fewer need less memory.
      max_bytes, progress: as for `layer_spectra`.

    Returns:
      `Summary`: a mapping of `Record` that prints as a table, "total" last.

    Raises:
      TypeError, ValueError: as `hessian`; TypeError under ``jit``, where `layer_traces` runs in its place.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, batch: batch["x"] @ p["fc"]["w"], jh.squared_error)
      >>> batch = {"x": jnp.eye(2), "label": jnp.ones((2, 1))}
      >>> table = jh.summarize(objective, {"fc": {"w": jnp.zeros((2, 1))}}, batch, key=jax.random.key(0))
      >>> list(table), table["fc"].parameters, round(table["fc"].lambda_max, 4)
      (['fc', 'total'], 2, 1.0)

    Reference: the paper's sections on layerwise spectra, lambda_max and traces.
    """
    check_key(key)
    loss, params = prepare("hessian", objective, params, batch, has_aux)
    spectra = layer_spectra(
        loss,
        params,
        batch,
        key=key,
        num_steps=num_steps,
        method=method,
        layers=layers,
        max_bytes=max_bytes,
        progress=progress,
    )
    trace_key, ggn_key = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    estimate = partial(layer_traces, loss, params, batch, num_probes=num_probes, chunk_size=chunk_size)
    traces = estimate(key=trace_key)
    ggn_traces: dict[str, Estimate] = {}
    if isinstance(loss, Objective):
        with contextlib.suppress(NoFactorError):  # a criterion that is not convex: no column Tr G
            ggn_traces = estimate(key=ggn_key, curvature="ggn")
    records = {}
    for name, spec in spectra.items():
        weights = params if name == "total" else subtree(params, name)
        records[name] = Record(
            parameters=dimension(weights),
            trace=traces[name],
            ggn_trace=ggn_traces.get(name),
            lambda_max=spec.lambda_max,
            lambda_max_residual=float(spec.residuals[-1]),
            lambda_min=spec.lambda_min,
            lambda_min_residual=float(spec.residuals[0]),
            trace_norm2=float(traces[name].mean) * float(tree_norm(weights)) ** 2,
            outliers=count_outliers(spec),
            wasserstein=wasserstein(spec, spectra["total"]),
        )
    return Summary(records, spectra)
