"""The table of a net: one row for each layer and one for the whole net."""

from __future__ import annotations

import contextlib
import dataclasses
import html
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax

from jaxhess._checks import check_key
from jaxhess._trees import tree_norm
from jaxhess.estimates import Estimate, Plan
from jaxhess.objective import NoFactorError, Objective
from jaxhess.problem import pose
from jaxhess.quadrature import Runs, spectra_of
from jaxhess.selections import Selections
from jaxhess.spectra import Spectrum, count_outliers, outlier_range, wasserstein
from jaxhess.traces import traces_of

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Record:
    """What `summarize` finds for one layer, or for the whole net.

    Attributes:
      parameters: number of parameters.
      trace: Tr(Hess_l) with its standard error; exact where the spectrum is.
      ggn_trace: Tr(G_l) likewise; None for a plain loss, or a criterion that is not convex.
      lambda_max, lambda_min: extreme eigenvalues of Hess_l: Ritz values, or exact ones.
      lambda_max_residual, lambda_min_residual: an eigenvalue lies within this distance of them.
      trace_norm2: Tr(Hess_l) * ||w_l||^2, which does not change when a scale-invariant layer is scaled.
      trace_norm2_error: its standard error.
      outliers: `count_outliers` of the spectrum.
      outliers_range: the smallest and largest count within two standard errors of the mean that the rule uses.
      wasserstein: distance of the spectrum to the whole net's, in units of eigenvalues.
      wasserstein_error: an upper bound of its standard error, as for `jaxhess.wasserstein`.

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
    trace_norm2_error: float
    outliers: int
    outliers_range: tuple[int, int]
    wasserstein: float
    wasserstein_error: float

    def __str__(self) -> str:
        cells = self._cells()
        width = max(map(len, cells))
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in cells.items())

    def _cells(self):
        """{column: text}, as in the table."""
        return {
            "params": f"{self.parameters:,}",
            "Tr Hess": str(self.trace),
            "Tr G": "-" if self.ggn_trace is None else str(self.ggn_trace),
            "lambda_max": f"{self.lambda_max:.4g} ({self.lambda_max_residual:.0e})",
            "lambda_min": f"{self.lambda_min:.4g} ({self.lambda_min_residual:.0e})",
            "Tr*|w|^2": str(self.trace._replace(mean=self.trace_norm2, std_error=self.trace_norm2_error)),
            "outliers": "-".join(map(str, sorted(set(self.outliers_range)))),
            "W1 to total": f"{self.wasserstein:.3g} +- {self.wasserstein_error:.1g}",
        }


class Summary(Mapping):
    """{layer: Record, ..., "total": Record} in network order; prints as a table.

    Attributes:
      spectra: {layer: Spectrum, ..., "total": Spectrum} of the Hessian, from which the records were made.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> table = jh.summarize(lambda w, batch: jnp.sum(w**2), jnp.ones(3), None, key=jax.random.key(0))
      >>> round(table.to_dict()["total"]["lambda_max"], 4), table.spectra["total"].dim
      (2.0, 3)

    Reference: as `summarize`.
    """

    def __init__(self, records: dict[str, Record], spectra: dict[str, Spectrum]):
        self._records, self.spectra = records, spectra

    def __getitem__(self, name: str) -> Record:
        if name not in self._records:
            raise KeyError(f"there is no layer {name!r} in the table; choose from {list(self._records)}")
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
            if isinstance(value, tuple):
                return list(value)
            return value if value is None or isinstance(value, int) else float(value)

        return {
            name: {field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
            for name, record in self.items()
        }

    def _cells(self):
        """The table as words: its head and its rows."""
        rows = {name: record._cells() for name, record in self.items()}
        rows["total"]["W1 to total"] = "-"
        yield ("layer", *rows["total"])
        for name, cells in rows.items():
            yield (name, *cells.values())

    def __str__(self) -> str:
        rows = list(self._cells())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(len(lines) - 1, lines[1])
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rows = [[html.escape(cell) for cell in row] for row in self._cells()]
        body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
        return f"<table><thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead><tbody>{body}</tbody></table>"


def summarize(
    objective: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_probes: int = 64,
    num_steps: int = 64,
    method: str = "auto",
    layers: Selections = None,
    chunk_size: int = 8,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> Summary:
    """The curvature of every layer and of the whole net, as a table.

    If the spectrum of a layer is exact (from its Gram matrix if H_l = 0, or with as many Lanczos steps as parameters),
    its traces are those of the spectrum, and no probes are drawn for them. Traces add up, so those of the whole net are
    exact if those of all layers are.

    Args:
      objective: an `Objective`; a plain loss gives a table without Tr G.
      params, batch, differentiation, has_aux: as for `hessian`.
      key: a JAX random key; the spectra are those of `layer_spectra` with the same key.
      num_probes: probes of each trace that is not exact.
      num_steps: Lanczos steps of each spectrum. The residuals next to lambda_max and lambda_min say whether they
        were enough.
      method: how spectra are computed: "auto", exact where possible, or "lanczos"; as for `layer_spectra`.
      layers: which layers or groups; all layers by default, else as for `layer_spectra`.
      chunk_size: probes at a time, as for `layer_traces`; fewer need less memory.
      max_bytes, progress: as for `layer_spectra`.

    Returns:
      `Summary`: a mapping of `Record` that prints as a table, "total" last.

    Raises:
      TypeError, ValueError: as `hessian`; TypeError under ``jit`` (use `layer_traces` there).

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
    plan, runs = Plan(num_probes, chunk_size=chunk_size), Runs(num_steps)
    problem = pose("hessian", objective, params, batch, has_aux, layers, differentiation)
    spectra, equal_to_ggn = spectra_of(problem, "hessian", key, runs, method, max_bytes, progress)
    exact = {name: spec for name, spec in spectra.items() if not spec.num_draws}
    trace_key, ggn_key = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    traces = _traces(problem, "hessian", exact, spectra, trace_key, plan)
    ggn_traces: dict[str, Estimate] = {}
    if isinstance(problem.loss, Objective):
        with contextlib.suppress(NoFactorError):  # a criterion that is not convex: no column Tr G
            equal = {name: exact[name] for name in equal_to_ggn}
            ggn_traces = _traces(problem, "ggn", equal, spectra, ggn_key, plan)
    parts = (*problem.layers, problem.whole)
    norms = dict(zip(spectra, _norms(parts, problem.params), strict=True))
    records = {
        name: _record(spec, spectra["total"], float(norms[name]) ** 2, traces[name], ggn_traces.get(name))
        for name, spec in spectra.items()
    }
    return Summary(records, spectra)


@partial(jax.jit, static_argnums=0)
def _norms(layers, params):
    return [tree_norm(layer.arrays(params)) for layer in layers]


def _record(spec, total, norm2, trace, ggn_trace):
    distance, error = wasserstein(spec, total, with_error=True)
    return Record(
        parameters=spec.dim,
        trace=trace,
        ggn_trace=ggn_trace,
        lambda_max=spec.lambda_max,
        lambda_max_residual=float(spec.residuals[-1]),
        lambda_min=spec.lambda_min,
        lambda_min_residual=float(spec.residuals[0]),
        trace_norm2=float(trace.mean) * norm2,
        trace_norm2_error=float(trace.std_error) * norm2,
        outliers=count_outliers(spec),
        outliers_range=outlier_range(spec),
        wasserstein=distance,
        wasserstein_error=error,
    )


def _traces(problem, curvature, exact, wanted, key, plan):
    """The traces of exact spectra, with their rounding for an error; by probes those that are wanted beside them.

    That of the net is exact too if those of all its layers are.
    """

    def error(spec):
        return float(spec.residuals.max()) * len(spec.nodes) ** 0.5

    found = {name: Estimate(spec.trace, error(spec), 0, "exact") for name, spec in exact.items()}
    names = [layer.name for layer in problem.layers]
    if "total" not in found and problem.covered and set(names) <= set(found):
        parts = [found[name] for name in names]
        found["total"] = Estimate(sum(p.mean for p in parts), sum(p.std_error**2 for p in parts) ** 0.5, 0, "exact")
    return found if set(wanted) <= set(found) else traces_of(problem, curvature, key, plan) | found
