"""Spectra as measures: densities, distances between them, and the number of outliers; numpy alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from jaxhess._checks import check_choice, check_count, check_known


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """A spectral measure: sum_i weights_i * delta(t - nodes_i), of total mass 1.

    From Lanczos the nodes are Ritz values and the weights the squared first entries of the eigenvectors of T
    (averaged over draws); an exact spectrum has the eigenvalues with weights 1/dim. To make one yourself, write
    ``Spectrum(nodes, weights, dim)`` or use `Spectrum.from_eigenvalues`.

    Attributes:
      nodes: (m,) float64, sorted ascending.
      weights: (m,) float64, not negative, sum 1.
      dim: the number of eigenvalues, so that dim * mean is the trace.
      num_steps: the Lanczos steps of a draw, which set the width of the density; 128 for an exact spectrum.
      residuals: (m,); an eigenvalue lies within this distance of each node. It covers the Lanczos steps that were not
        taken, the differences between repeated products, and the rounding inside the operator. Zeros unless given.
      num_draws: the random start vectors that the weights are averaged over, with that of a run in the complement of
        the vectors that were found; 0 where all weights are exact.
      fixed: (m,) of bool; the nodes of a known weight, 1/dim, because they are single eigenvalues. None by default.

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
    fixed: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self):
        check_known("a Spectrum is made", "make it outside", self.nodes, self.weights, self.residuals)
        nodes, weights = np.asarray(self.nodes, np.float64), np.asarray(self.weights, np.float64)
        residuals = np.zeros_like(nodes) if self.residuals is None else np.asarray(self.residuals, np.float64)
        fixed = np.zeros(nodes.shape, bool) if self.fixed is None else np.asarray(self.fixed, bool)
        if not (nodes.ndim == 1 and nodes.size and nodes.shape == weights.shape == residuals.shape == fixed.shape):
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
        values = {"nodes": nodes, "weights": weights / weights.sum(), "residuals": residuals, "fixed": fixed}
        for name, value in values.items():
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
        """dim * mean, the sum of all eigenvalues."""
        return self.dim * self.mean

    def std_error(self, quantity: str | Callable[[np.ndarray], np.ndarray]) -> float:
        """The standard error that the random start vectors leave in a mean over eigenvalues.

        A start vector sees the eigenvalues whose weights are not known, n' of them, with the weights of a random unit
        vector in n' dimensions. A mean of f over them has the variance 2 Var(f) / (n' + 2), with the variance of f over
        these eigenvalues; n' / dim of it, and the root of the number of draws, remain.

        Args:
          quantity: "mean", "trace", or f: a function of an array of eigenvalues, for the mean of f over all of them.

        Returns:
          The standard error, with the residuals of nodes that are eigenvalues; 0 for an exact spectrum.

        Reference: Chen, Trogdon and Ubaru 2021, Analysis of stochastic Lanczos quadrature, section 4.
        """
        functions = {"mean": lambda x: x, "trace": lambda x: self.dim * x}
        if isinstance(quantity, str):
            check_choice("quantity", quantity, functions)
            quantity = functions[quantity]
        found = self.fixed | (self.residuals < 1e-2 * np.abs(self.nodes)) | (self.num_draws == 0)
        known = np.where(found, self.weights, 0.0)
        values = np.asarray(quantity(self.nodes))
        moved = [np.abs(quantity(self.nodes + side * self.residuals) - values) for side in (-1, 1)]
        return float(np.hypot(self._errors(values), known @ np.maximum(*moved)))

    def _errors(self, values):
        """Standard errors of means over eigenvalues of values (..., m) at the nodes."""
        rest = np.where(self.fixed, 0.0, self.weights)
        mass = rest.sum()
        if not self.num_draws or mass <= 0:
            return np.zeros(values.shape[:-1])
        count = max(self.dim * mass, 1.0)
        mean = values @ rest / mass
        variance = ((values - mean[..., None]) ** 2) @ rest / mass
        return mass * np.sqrt(2 * variance / ((count + 2) * self.num_draws))

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
          margin: how far the range is extended on either side, as a share of it.
          grid: (n,) points; by default evenly spaced over the range and five sigma beyond.

        Returns:
          grid (n,) and phi (n,); phi integrates to 1 over the default grid.

        Raises:
          ValueError: for fewer than two points, kappa <= 1 or a negative margin.

        Reference: Lin, Saad and Yang 2016, section 3.2.3; Papyan 2018, appendix; Algorithm 2 of the paper.
        """
        grid, log_phi = self.log_density(num_points, kappa, margin=margin, grid=grid)
        return grid, np.exp(log_phi)

    def density_band(
        self, num_points: int = 1024, kappa: float = 1.25, *, margin: float = 0.05, width: float = 2.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The density with its standard errors, as a band around it.

        Args:
          num_points, kappa, margin: as for `density`.
          width: half the width of the band, in standard errors.

        Returns:
          grid (n,), and the lower and upper ends of the band, (n,) each, not below 0.
        """
        low, high, sigma = _broadening([self], num_points, kappa, margin)
        grid = np.linspace(low, high, num_points)
        density = np.exp(_log_density(self, grid, sigma))
        bumps = np.exp(-0.5 * ((grid[:, None] - self.nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        error = width * self._errors(bumps)
        return grid, np.maximum(density - error, 0.0), density + error

    def log_density(
        self, num_points: int = 1024, kappa: float = 1.25, *, margin: float = 0.05, grid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The natural logarithm of `density`, finite where the density underflows; arguments as there."""
        low, high, sigma = _broadening([self], num_points, kappa, margin)
        if grid is None:
            grid = np.linspace(low, high, num_points)
        return grid, _log_density(self, np.asarray(grid, np.float64), sigma)


def _log_density(spec, grid, sigma):
    some = spec.weights > 0
    exponents = -0.5 * ((grid[:, None] - spec.nodes[some]) / sigma) ** 2
    norm = np.log(sigma) + 0.5 * np.log(2 * np.pi)
    return scipy.special.logsumexp(exponents, axis=1, b=spec.weights[some]) - norm


def _broadening(spectra, num_points, kappa, margin=0.05):
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
    if high - low <= 1e-9 * size or size == 0 or _is_point(spectra):
        width = 1e-2 * (size or 1.0)
        low, high = low - width, high + width
    low, high = low - margin * (high - low), high + margin * (high - low)
    steps = max(max(s.num_steps for s in spectra) - 1, 1)
    sigma = (high - low) / (steps * np.sqrt(8 * np.log(kappa)))
    # The grid reaches five sigma beyond; solved for the spacing that goes with it.
    floor = 0.75 * (high - low) / max(num_points - 1 - 7.5, 0.5)
    sigma = max(sigma, floor)
    return low - 5 * sigma, high + 5 * sigma, sigma


def _is_point(spectra):
    """Whether all nodes are one number but for rounding, as the residuals have it."""
    nodes = np.concatenate([s.nodes for s in spectra])
    rounding = max(float(s.residuals.max()) for s in spectra)
    return rounding <= 1e-5 * np.abs(nodes).max() and np.ptp(nodes) <= 2 * rounding


def wasserstein(a: Spectrum, b: Spectrum, *, normalize: bool = False, with_error: bool = False) -> Any:
    """Wasserstein-1 distance of two spectra, the area between their cumulative distributions.

    W1 = integral |F_a(t) - F_b(t)| dt, on the nodes and weights themselves: no grid, no broadening.

    The weights of a Lanczos spectrum depend on its random start vectors. The standard error goes by the function of the
    eigenvalues whose mean the distance is, where F_a and F_b clearly differ; where they do not, the errors of all t are
    taken to add up, which bounds them. It is 0 for exact spectra.

    Args:
      a, b: `Spectrum`.
      normalize: divide by the width of the interval that holds both, so that 0 means equal and 1 means two points at
        its ends. The result has no unit and can be compared between nets.
      with_error: return the standard error too.

    Returns:
      The distance, in units of the eigenvalues unless normalised; with ``with_error``, (distance, standard error).

    Raises:
      TypeError: for anything that is not a `Spectrum`.

    Example:
      >>> import jaxhess as jh
      >>> jh.wasserstein(jh.Spectrum([0.0], [1.0], 1), jh.Spectrum([2.0], [1.0], 1))
      2.0

    Reference: Villani 2008; Figure 3 of the paper; Chen, Trogdon and Ubaru 2021, Analysis of stochastic Lanczos
    quadrature for spectrum approximation, section 4 (the variance).
    """
    _check(a, b)
    distance = float(scipy.stats.wasserstein_distance(a.nodes, b.nodes, a.weights, b.weights))
    if not with_error and not normalize:
        return distance
    error = _distance_error(a, b) if with_error else 0.0
    if normalize:
        width = max(a.lambda_max, b.lambda_max) - min(a.lambda_min, b.lambda_min)
        unit = 0.0 if width == 0 or _is_point([a, b]) else 1 / width
        distance, error = distance * unit, error * unit
    return (distance, error) if with_error else distance


def _distance_error(a, b):
    """The standard error of W1 that comes from the start vectors of both."""
    t = np.unique(np.concatenate([a.nodes, b.nodes]))
    steps = np.diff(t)
    below = [(t[:-1, None] >= spec.nodes).astype(float) for spec in (a, b)]
    difference = below[0] @ a.weights - below[1] @ b.weights
    sigma = np.sqrt(sum(_cumulative_variance(spec, x) for spec, x in zip((a, b), below, strict=True)))
    clear = np.abs(difference) > 2 * sigma
    signed = np.where(clear, np.sign(difference) * steps, 0.0)
    # Where the sign is clear W1 is the difference of two means of one function, the integral of the sign.
    errors = [float(spec._errors(signed @ x)) for spec, x in zip((a, b), below, strict=True)]
    return float(np.hypot(*errors) + sigma[~clear] @ steps[~clear])


def _cumulative_variance(spec, below):
    """The variance of F(t), (t,); an eigenvalue that a start vector hardly sees is there all the same."""
    if not spec.num_draws:
        return np.zeros(len(below))
    rest = np.where(spec.fixed, 0.0, np.maximum(spec.weights, 1 / (spec.dim * spec.num_draws)))
    mass = rest.sum()
    share = below @ rest
    return 2 * np.maximum(share * (mass - share), 0.0) / ((max(spec.dim * mass, 1.0) + 2) * spec.num_draws)


def jensen_shannon(
    a: Spectrum, b: Spectrum, *, normalize: bool = False, num_points: int = 1024, kappa: float = 1.25
) -> float:
    """Jensen-Shannon divergence of the broadened densities: the mean of KL(a || m) and KL(b || m), m = (a + b) / 2.

    Both spectra are broadened by one width on one grid over the range of both.

    Args:
      a, b: `Spectrum`.
      normalize: divide by ln 2, the largest value, so that the result lies in [0, 1].
      num_points, kappa: as for `Spectrum.density`.

    Returns:
      The divergence, in nats unless normalised.

    Raises:
      TypeError, ValueError: as `wasserstein` and `Spectrum.density`.

    Example:
      >>> import jaxhess as jh
      >>> far = jh.Spectrum([0.0], [1.0], 1), jh.Spectrum([9.0], [1.0], 1)
      >>> round(jh.jensen_shannon(*far, normalize=True), 6)
      1.0

    Reference: Lin 1991, Divergence measures based on the Shannon entropy; Figure 12 of the paper.
    """
    log_a, log_b = _common_densities(a, b, num_points, kappa)
    log_m = np.logaddexp(log_a, log_b) - np.log(2)
    divergence = 0.5 * (_divergence(log_a, log_m) + _divergence(log_b, log_m))
    divergence = min(divergence, float(np.log(2)))  # but for rounding it is
    return divergence / float(np.log(2)) if normalize else divergence


def kl_divergence(
    a: Spectrum, b: Spectrum, *, normalize: bool = False, num_points: int = 1024, kappa: float = 1.25
) -> float:
    """Kullback-Leibler divergence KL(a || b) of the broadened densities, integral phi_a ln(phi_a / phi_b).

    On a common grid as in `jensen_shannon`, with logarithms of densities throughout: where phi_b underflows the
    value is large, never infinite. It depends on the broadening more than the other two distances.

    Args:
      a, b: `Spectrum`; the divergence is not symmetric.
      normalize: return 1 - exp(-KL), which lies in [0, 1).
      num_points, kappa: as for `Spectrum.density`.

    Returns:
      The divergence, in nats unless normalised.

    Raises:
      TypeError, ValueError: as `jensen_shannon`.

    Example:
      >>> import jaxhess as jh
      >>> spec = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2)
      >>> jh.kl_divergence(spec, spec)
      0.0

    Reference: the paper, "KL-divergence (results in Supplementary section)".
    """
    divergence = _divergence(*_common_densities(a, b, num_points, kappa))
    return -float(np.expm1(-divergence)) if normalize else divergence


def count_outliers(spec_or_values: Spectrum | np.ndarray, *, method: str = "gap") -> int:
    """The number of large eigenvalues that stand apart from the bulk, found from the eigenvalues alone.

    Candidates are the positive eigenvalues l_1 >= l_2 >= ... above the mean of all absolute values; of a Lanczos
    spectrum only the leading Ritz values that have converged (residual below 5% of the value), since the others
    stand for many eigenvalues each.

    "gap": the k of the largest ratio l_k / l_{k+1}, provided it is at least 1.5; else 0.
    "profile": the k that makes a split of the logarithms into two normal groups of one variance most likely, provided
    that l_k / l_{k+1} is at least 1.5; else the upper group is split again, since a bulk is split in its middle where
    the outliers are few.

    If most eigenvalues are zero, as in G of a large net, the mean is no useful bound, and the steep fall of the
    smallest positive eigenvalues is not the border of a bulk. Then at most half of the positive eigenvalues are
    candidates, or ten, if that is more. If no ratio among these is large enough and all positive eigenvalues are above
    the mean, all of them stand apart from the zeros.

    "gap" uses one ratio, so it finds only some of the outliers if they lie as far from each other as from the bulk;
    "profile" finds all of them. It needs outliers that are closer together than their distance to the bulk. Both find
    too few, or none, if the outliers are spread over an order of magnitude.

    Args:
      spec_or_values: `Spectrum`, or an array of all eigenvalues. Of a Lanczos spectrum take one draw: with several,
        each eigenvalue comes once in each draw.
      method: "gap" or "profile".

    Returns:
      The number of outliers at the upper end.

    Raises:
      ValueError: for an unknown method, no eigenvalues, or ones that are not finite.

    Example:
      >>> import numpy as np, jaxhess as jh
      >>> jh.count_outliers(np.append(np.linspace(0, 1, 500), [5.0, 6.0, 9.0]))
      3

    Reference: Ahn and Horenstein 2013, Eigenvalue ratio test for the number of factors (the ratio, and the bound by
    the mean); Zhu and Ghodsi 2006, Automatic dimensionality selection from the scree plot ("profile").
    """
    check_choice("method", method, ("gap", "profile"))
    spec = spec_or_values
    if not isinstance(spec, Spectrum):
        spec = Spectrum.from_eigenvalues(spec)
    return _count(spec, float(spec.weights @ np.abs(spec.nodes)), method)


def outlier_range(spec: Spectrum) -> tuple[int, int]:
    """The smallest and the largest of `count_outliers` within two standard errors of the mean that bounds them."""
    mean, error = float(spec.weights @ np.abs(spec.nodes)), spec.std_error(np.abs)
    bounds = (max(mean - 2 * error, 0.0), mean, mean + 2 * error)
    counts = [_count(spec, bound, "gap") for bound in bounds]
    return min(counts), max(counts)


def _count(spec, bound, method):
    """The number of outliers among the values above a bound."""
    values, residuals = spec.nodes[::-1], spec.residuals[::-1]
    apart = (values > bound) & (residuals < 0.05 * values)
    count = len(values) if apart.all() else int(np.argmin(apart))
    if count == 0 or len(values) < 2:
        return 0
    positive = int(np.rint(spec.dim * spec.weights[spec.nodes > 0].sum()))
    few = count if positive > spec.dim / 2 else min(count, max(10, positive // 2))
    found = _split(values[: few + 1], method)
    return count if not found and few < count == positive else found


def _split(values, method):
    """How many of the descending values, of which the last is no candidate, stand apart; 0 if none do."""
    top = np.maximum(values, 1e-30 * values[0])
    ratios, logs = top[:-1] / top[1:], np.log(top)
    best = int(np.argmax(ratios)) if method == "gap" else _profile_split(logs) - 1
    while ratios[best] < 1.5:
        if method == "gap" or best == 0:
            return 0
        best = _profile_split(logs[: best + 1]) - 1
    return best + 1


def _profile_split(x):
    """The size of the first of two groups of normal x with one variance, most likely of all splits."""
    n = len(x)
    return int(np.argmin([k * np.var(x[:k]) + (n - k) * np.var(x[k:]) for k in range(1, n)])) + 1


def _check(*spectra):
    for spec in spectra:
        if not isinstance(spec, Spectrum):
            raise TypeError(f"distances take a Spectrum, got {type(spec).__name__}; make one with Spectrum(...)")


def _common_densities(a, b, num_points, kappa):
    """Logarithms of both densities as probabilities of the cells of a common grid."""
    _check(a, b)
    low, high, sigma = _broadening([a, b], num_points, kappa)
    grid = np.linspace(low, high, num_points)
    logs = [_log_density(spec, grid, sigma) for spec in (a, b)]
    return [log - np.logaddexp.reduce(log) for log in logs]


def _divergence(log_p, log_q):
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))
