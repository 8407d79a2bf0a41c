"""Spectra: quadrature nodes and weights from Lanczos, and the density that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import scipy.special

from jaxhess._checks import check_count, check_key, check_known, check_like
from jaxhess._diagnosis import NotFiniteError, why_not_finite
from jaxhess._noise import Run, noise
from jaxhess.batches import Batches
from jaxhess.lanczos import dimension, lanczos, ritz, ritz_run, tree_norm
from jaxhess.layers import Layer, chosen_layers, find_layers, layer_names
from jaxhess.operators import _operator, as_partial, block, linearize, prepare
from jaxhess.structure import NoGramError, gram_eigenvalues, gram_rows
from jaxhess.trace import random_like

PyTree = Any
_GRAM_ROWS = 2000
_CHECK = 2**31 - 2  # folded into the key for the vectors that tell where H_l vanishes


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """A spectral measure: sum_i weights_i * delta(t - nodes_i), of total mass 1.

    From Lanczos the nodes are Ritz values and the weights the squared first entries of the eigenvectors of T
    (averaged over draws); an exact spectrum has the eigenvalues with weights 1/dim. Anyone may make one:
    ``Spectrum(nodes, weights, dim)``, or `Spectrum.from_eigenvalues`.

    Attributes:
      nodes: (m,) float64, sorted ascending.
      weights: (m,) float64, not negative, sum 1.
      dim: the number of eigenvalues, so that dim * mean is the trace.
      num_steps: the Lanczos steps of a draw, which set the width of the density; 128 for an exact spectrum.
      residuals: (m,): within each of its node lies an eigenvalue. What Lanczos left undone, and the noise of the
        products: what they do not repeat, and the rounding inside the operator. Zeros unless given.
      num_draws: the random start vectors that the weights are averaged over; 0 where the weights are exact.

    Raises:
      ValueError: for nodes and weights of different lengths, no nodes, values that are not finite, negative weights
        or a sum other than 1, or ``dim`` below 1.

    Example:
      >>> import jaxhess as jh
      >>> spec = jh.Spectrum([0.0, 2.0], [0.75, 0.25], dim=4)
      >>> spec.mean, spec.lambda_max, spec.trace
      (0.5, 2.0, 2.0)

    Reference: Golub and Welsch 1969, Calculation of Gauss quadrature rules (nodes and weights from T).
    """

    nodes: np.ndarray
    weights: np.ndarray
    dim: int
    num_steps: int = 128
    residuals: np.ndarray = None  # type: ignore[assignment]
    num_draws: int = 0

    def __post_init__(self):
        check_known("a Spectrum is made", "make it outside", self.nodes, self.weights, self.residuals)
        nodes, weights = np.asarray(self.nodes, np.float64), np.asarray(self.weights, np.float64)
        residuals = np.zeros_like(nodes) if self.residuals is None else np.asarray(self.residuals, np.float64)
        if not (nodes.ndim == 1 and nodes.size and nodes.shape == weights.shape == residuals.shape):
            raise ValueError(
                f"a spectrum takes nodes, weights and residuals of one shape (m,), m >= 1, got {nodes.shape}, "
                f"{weights.shape}, {residuals.shape}"
            )
        if not all(np.isfinite(x).all() for x in (nodes, weights, residuals)):
            raise ValueError("the nodes, weights or residuals of the spectrum are not finite")
        if weights.min() < 0 or abs(weights.sum() - 1) > 1e-3:
            raise ValueError(f"weights must be >= 0 with sum 1, got minimum {weights.min()} and sum {weights.sum()}")
        check_count("dim", self.dim)
        check_count("num_steps", self.num_steps)
        order = np.argsort(nodes, kind="stable")
        for name, value in (("nodes", nodes), ("weights", weights / weights.sum()), ("residuals", residuals)):
            object.__setattr__(self, name, value[order])

    @classmethod
    def from_eigenvalues(cls, values: np.ndarray, dim: int | None = None) -> Spectrum:
        """The exact spectrum of given eigenvalues; those up to ``dim`` that are not given are zero."""
        check_known("a Spectrum is made", "make it outside", values)
        values = np.asarray(values, np.float64).ravel()
        dim = len(values) if dim is None else dim
        if dim == 0:
            raise ValueError("no eigenvalues were given, and no dimension; a spectrum holds at least one")
        if len(values) > dim:
            raise ValueError(f"{len(values)} eigenvalues were given for dimension {dim}")
        zeros = dim - len(values)
        nodes = np.append(values, 0.0) if zeros else values
        return cls(nodes, np.append(np.full(len(values), 1 / dim), zeros / dim)[: len(nodes)], dim)

    @property
    def lambda_max(self) -> float:
        """The largest node."""
        return float(self.nodes[-1])

    @property
    def lambda_min(self) -> float:
        """The smallest node."""
        return float(self.nodes[0])

    @property
    def mean(self) -> float:
        """The mean eigenvalue."""
        return float(self.weights @ self.nodes)

    @property
    def trace(self) -> float:
        """dim * mean; for Lanczos an estimate from as many probes as draws."""
        return self.dim * self.mean

    def density(
        self, num_points: int = 1024, kappa: float = 1.25, *, margin: float = 0.05, grid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The Gaussian-broadened density: phi(t) = sum_i w_i N(t; lambda_i, sigma^2).

        sigma = R / ((M - 1) sqrt(8 ln kappa)) with M steps and R the range of the Ritz values widened by their
        residuals and by ``margin`` on either side: a bump in the middle between two nodes of an even spacing R / (M -
        1) falls by the factor kappa. The width is never below 3/4 of the grid's spacing, which keeps the integral
        right, and nothing in it is absolute: scaling the operator scales the picture. (A spectrum that is a single
        point has no scale; its width is taken from |lambda|, or from 1 at zero.)

        Args:
          num_points: points of the grid.
          kappa: how far a bump may fall between two nodes, > 1.
          margin: what the range gets on either side, as a share of it.
          grid: (n,) points of one's own; by default evenly spaced over the range and five sigma beyond.

        Returns:
          grid (n,) and phi (n,); phi integrates to 1 over the default grid.

        Raises:
          ValueError: for fewer than two points, kappa <= 1 or a negative margin.

        Reference: Lin, Saad and Yang 2016, section 3.2.3; Papyan 2018, appendix; Algorithm 2 of the paper.
        """
        grid, log_phi = self.log_density(num_points, kappa, margin=margin, grid=grid)
        return grid, np.exp(log_phi)

    def log_density(
        self, num_points: int = 1024, kappa: float = 1.25, *, margin: float = 0.05, grid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The natural logarithm of `density`, finite where the density underflows; arguments as there."""
        low, high, sigma = broadening([self], num_points, kappa, margin)
        if grid is None:
            grid = np.linspace(low, high, num_points)
        return grid, self._log_density_on(np.asarray(grid, np.float64), sigma)

    def _log_density_on(self, grid, sigma):
        some = self.weights > 0
        exponents = -0.5 * ((grid[:, None] - self.nodes[some]) / sigma) ** 2
        norm = np.log(sigma) + 0.5 * np.log(2 * np.pi)
        return scipy.special.logsumexp(exponents, axis=1, b=self.weights[some]) - norm


def broadening(
    spectra: list[Spectrum], num_points: int, kappa: float, margin: float = 0.05
) -> tuple[float, float, float]:
    """A grid's ends and a Gaussian's width for one spectrum, or for several on a common grid."""
    if num_points < 2:
        raise ValueError(f"a density needs num_points >= 2, got {num_points}")
    if not kappa > 1:
        raise ValueError(f"kappa must be above 1, got {kappa}")
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    low = min(float((s.nodes - s.residuals).min()) for s in spectra)
    high = max(float((s.nodes + s.residuals).max()) for s in spectra)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size == 0 or is_point(spectra):
        width = 1e-2 * (size or 1.0)
        low, high = low - width, high + width
    low, high = low - margin * (high - low), high + margin * (high - low)
    steps = max(max(s.num_steps for s in spectra) - 1, 1)
    sigma = (high - low) / (steps * np.sqrt(8 * np.log(kappa)))
    # The grid reaches five sigma beyond; solved for the spacing that goes with it.
    floor = 0.75 * (high - low) / max(num_points - 1 - 7.5, 0.5)
    sigma = max(sigma, floor)
    return low - 5 * sigma, high + 5 * sigma, sigma


def is_point(spectra: list[Spectrum]) -> bool:
    """Whether all nodes are one number but for rounding, as the residuals have it."""
    nodes = np.concatenate([s.nodes for s in spectra])
    rounding = max(float(s.residuals.max()) for s in spectra)
    return rounding <= 1e-5 * np.abs(nodes).max() and np.ptp(nodes) <= 2 * rounding


def spectrum(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    num_steps: int = 128,
    num_draws: int = 1,
    reorthogonalize: bool | str = True,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """The spectrum of an operator by stochastic Lanczos quadrature.

    Each draw is a Gaussian start vector; its Ritz values and the squared first entries of the eigenvectors of T are
    the nodes and weights of a Gauss quadrature for the spectral measure, exact for polynomials of degree 2 m - 1 as
    that vector sees them. Draws are averaged.

    Args:
      operator: a symmetric v -> A v, as from `hessian`; `linearize` it first for speed.
      like: a pytree of arrays like v.
      key: a JAX random key.
      num_steps: Lanczos steps of a draw, fewer where the Krylov space is exhausted. From the dimension on the result
        is exact: all eigenvalues, repeated ones too, with weights 1/dim.
      num_draws: start vectors.
      reorthogonalize: False holds three vectors instead of all: right for the density, but the extreme nodes then
        come with ghost copies. "host" keeps all in the host's memory.
      progress: ``progress(done, total)`` in steps over all draws.

    Returns:
      `Spectrum`, on the host in float64.

    Raises:
      ValueError: for fewer than one step or draw, an empty ``like``, a product that is not finite, or an operator that
        does not repeat itself or is not symmetric.
      TypeError: under ``jit``, where `lanczos` runs in its place, or for a key that is none.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> spec = jh.spectrum(lambda v: jnp.arange(4.0) * v, like=jnp.zeros(4), key=jax.random.key(0))
      >>> bool(abs(spec.nodes - [0, 1, 2, 3]).max() < 1e-5)
      True

    Reference: Ubaru, Chen and Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature; Lin, Saad
    and Yang 2016; Algorithm 2 of the paper.
    """
    check_key(key)
    check_count("num_steps", num_steps)
    check_count("num_draws", num_draws)
    check_like("like", like)
    found, run = _quadrature(operator, like, key, num_steps, num_draws, reorthogonalize, progress)
    return _with_noise(as_partial(operator), lambda product, _: product, {"": (found, run)}, like, key)[""]


def _quadrature(operator, like, key, num_steps, num_draws, reorthogonalize, progress):
    """The spectrum as the recurrence has it, and what its noise is measured at: the `Run` of the first draw."""
    dim = dimension(like)
    if num_steps >= dim and reorthogonalize:
        start = random_like(key, like)
        restart_key = jax.random.fold_in(key, 1)
        found = lanczos(
            operator, start, dim, reorthogonalize=reorthogonalize, restart_key=restart_key, progress=progress
        )
        values, _, residuals = ritz(found.alphas, found.betas)
        return Spectrum(values, np.full(dim, 1 / dim), dim, num_steps, residuals), ritz_run(found)
    steps, draws, run = min(num_steps, dim), [], None
    for draw in range(num_draws):
        start = random_like(jax.random.fold_in(key, draw), like)
        report = None if progress is None else partial(_report, progress, draw * steps, num_draws * steps)
        found = lanczos(operator, start, num_steps, reorthogonalize=reorthogonalize, progress=report)
        values, vectors, residuals = ritz(found.alphas, found.betas)
        draws.append((values, vectors[0] ** 2 / num_draws, residuals))
        if run is None:
            run = ritz_run(found) if reorthogonalize else _blind_run(like, key, values)
    nodes, weights, residuals = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    return Spectrum(nodes, weights, dim, num_steps, residuals, num_draws), run


def _blind_run(like, key, values):
    """Without a basis there are no Ritz vectors: a random vector, beside the extreme Ritz values."""
    vector = random_like(jax.random.fold_in(key, _CHECK), like)
    size = tree_norm(vector)
    return Run(values[[0, -1]], jax.tree.map(lambda x: x[None] / size.astype(x.dtype), vector), None)


def _with_noise(product, wrap, found, like, key):
    """{name: Spectrum} with what the products are worth in the residuals of all nodes."""
    key = jax.random.fold_in(key, _CHECK)
    added = noise(product, wrap, {name: run for name, (_, run) in found.items()}, like, key)
    return {
        name: dataclasses.replace(spec, residuals=spec.residuals + added[name]) for name, (spec, _) in found.items()
    }


def _count_steps(dim, num_steps, num_draws, reorthogonalize):
    """The steps that `spectrum` takes: all of a small operator once, or those of each draw."""
    return dim if num_steps >= dim and reorthogonalize else min(dim, num_steps) * num_draws


def _report(progress, before, total, done, _):
    progress(before + done, total)


def layer_spectra(
    objective: Callable,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_steps: int = 128,
    num_draws: int = 1,
    curvature: str = "hessian",
    method: str = "lanczos",
    layers: str | Sequence[str] | None = None,
    reorthogonalize: bool | str = True,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    has_aux: bool = False,
) -> dict[str, Spectrum]:
    """The spectrum of every layer's block, and of the whole net.

    One compiled product of the whole net serves every layer (zeros in, the layer's part out): a product for each
    layer would be a compilation for each layer, which costs more than it saves.

    Args:
      objective: a loss, or an `Objective` (which "ggn" and "functional" need).
      params, batch, has_aux: as for `hessian`.
      key: a JAX random key.
      num_steps, num_draws, reorthogonalize: as for `spectrum`.
      curvature: "hessian", "ggn" or "functional".
      method: "lanczos"; for the GGN "gram": exact, from the Gram matrix (see `ggn_eigenvalues`); or "auto": the Gram
        matrix wherever it gives the spectrum and has at most 2,000 rows (examples times outputs), else Lanczos. Of the
        Hessian it gives that of every layer in which H_l is zero, as in piecewise linear nets, so that Hess_l = G_l:
        the product of H_l with a random vector, which must be zero in all digits, tells. The residuals of its nodes
        are its rounding, and ``num_draws`` plays no part in them.
      layers: "all", "middle" (`middle_layers`), or names; all by default. A layer has the same spectrum either way.
      max_bytes: for "gram" and "auto", as for `ggn_eigenvalues`.
      progress: ``progress(done, total)`` in Lanczos steps over all layers; before them, with a total of its own, as of
        `ggn_eigenvalues` where there is a Gram matrix.

    Returns:
      {layer: Spectrum} in network order, and "total" for the whole net.

    Raises:
      TypeError, ValueError: as `hessian` and `spectrum`; ValueError for "gram" with another curvature, or a name that
        is not in `layer_names`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> objective = jh.Objective(lambda p, batch: batch["x"] @ p["fc"]["w"], jh.squared_error)
      >>> batch = {"x": jnp.eye(2), "label": jnp.ones((2, 1))}
      >>> params = {"fc": {"w": jnp.zeros((2, 1))}}
      >>> spectra = jh.layer_spectra(objective, params, batch, key=jax.random.key(0))
      >>> {name: round(spec.lambda_max, 4) for name, spec in spectra.items()}
      {'fc': 1.0, 'total': 1.0}

    Reference: Figures 1, 9 and 10 of the paper.
    """
    loss, params = prepare(curvature, objective, params, batch, has_aux)
    return spectra_of_layers(
        loss,
        params,
        batch,
        key=key,
        num_steps=num_steps,
        num_draws=num_draws,
        curvature=curvature,
        method=method,
        layers=layers,
        reorthogonalize=reorthogonalize,
        max_bytes=max_bytes,
        progress=progress,
    )[0]


def spectra_of_layers(
    loss: Any,
    params: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    num_steps: int,
    method: str,
    layers: Sequence[str] | None,
    max_bytes: int,
    progress: Callable[[int, int], None] | None,
    num_draws: int = 1,
    curvature: str = "hessian",
    reorthogonalize: bool | str = True,
) -> tuple[dict[str, Spectrum], set[str]]:
    """As `layer_spectra`, of what `prepare` returns; and the names of those that are spectra of the Gram matrix."""
    check_key(key)
    check_count("num_steps", num_steps)
    check_count("num_draws", num_draws)
    if method not in ("lanczos", "gram", "auto"):
        raise ValueError(f"unknown method {method!r}; choose from ['auto', 'gram', 'lanczos']")
    if method == "gram" and curvature != "ggn":
        raise ValueError(
            f"the Gram matrix gives the spectrum of the GGN only, not of {curvature!r}; use 'lanczos', or 'auto' for "
            f"layers in which both agree"
        )
    every = find_layers(params, layer_names(params, loss, batch))
    known = [layer.name for layer in every]
    chosen = chosen_layers(known, layers)
    if missing := [layer.name for layer in find_layers(params, chosen) if layer.name not in known]:
        raise ValueError(f"{missing[0]!r} is no layer of its own; choose from {known}")
    parts: dict[str, tuple[int, Layer | None]] = {}
    parts |= {layer.name: (i, layer) for i, layer in enumerate(every) if layer.name in chosen}
    parts["total"] = (len(every), None)
    dims = {name: dimension(params if layer is None else layer.arrays(params)) for name, (_, layer) in parts.items()}
    exact = set(parts) if method == "gram" else set()
    if method == "auto" and 0 < gram_rows(loss, params, batch) <= _GRAM_ROWS:
        exact = _equal_to_ggn(curvature, loss, params, batch, parts, key)
    spectra: dict[str, Spectrum] = {}
    if exact:
        # For "total" the sum over all layers is needed.
        summed = [layer for layer in every if "total" in exact or layer.name in exact]
        try:
            values = gram_eigenvalues(loss, params, batch, summed, exact, max_bytes=max_bytes, progress=progress)
        except NoGramError:
            if method == "gram":
                raise
            values, exact = {}, set()
        for name in values:
            eigenvalues, rounding = values[name]
            spec = Spectrum.from_eigenvalues(eigenvalues, dims[name])
            error = np.full(len(spec.nodes), rounding * spec.lambda_max)
            spectra[name] = dataclasses.replace(spec, num_steps=num_steps, residuals=error)
    if exact == set(parts):
        return {name: spectra[name] for name in parts}, exact

    product = _operator(curvature, loss, params, batch, None, False)
    if not isinstance(batch, Batches):
        product = linearize(product, like=params)
    left = {name: part for name, part in parts.items() if name not in exact}
    counts = {name: _count_steps(dims[name], num_steps, num_draws, reorthogonalize) for name in left}
    total, before = sum(counts.values()), 0

    def part_of(product, name):
        layer = left[name][1]
        return product if layer is None else block(product, layer, params)

    found = {}
    for name, (i, layer) in left.items():
        try:
            found[name] = _quadrature(
                part_of(product, name),
                params if layer is None else layer.take(params),
                jax.random.fold_in(key, i),
                num_steps,
                num_draws,
                reorthogonalize,
                None if progress is None else partial(_report, progress, before, total),
            )
        except NotFiniteError:
            why = why_not_finite(curvature, loss, params, batch)
            raise NotFiniteError(f"products of the curvature of {name!r} are not finite: {why}") from None
        before += counts[name]
    spectra |= _with_noise(product, part_of, found, params, key)
    return {name: spectra[name] for name in parts}, exact


def _equal_to_ggn(curvature, loss, params, batch, parts, key):
    """The names of those parts whose curvature is that of the GGN."""
    if curvature != "hessian":
        return set(parts) if curvature == "ggn" else set()
    functional = linearize(_operator("functional", loss, params, batch, None, False), like=params)
    found = set()
    for name, (i, layer) in parts.items():
        if layer is not None:
            v = random_like(jax.random.fold_in(jax.random.fold_in(key, _CHECK), i), layer.take(params))
            if float(tree_norm(block(functional, layer, params)(v))) == 0:
                found.add(name)
    return found
