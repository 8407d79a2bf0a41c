"""Distances between spectra, and the number of outliers of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats

from jaxhess.spectrum import Spectrum, broadening, is_point


def wasserstein(a: Spectrum, b: Spectrum, *, normalize: bool = False, with_error: bool = False) -> Any:
    """Wasserstein-1 distance of two spectra, the area between their cumulative distributions.

    W1 = integral |F_a(t) - F_b(t)| dt, on the nodes and weights themselves: no grid, no broadening.

    The weights of a Lanczos spectrum are what its random start vectors see: with one of them F(t) has the variance
    2 F (1 - F) / (dim + 2). The standard error is the integral of its root, summed over both spectra: a bound, since
    the errors at all t, and of both, are taken to add up. It is 0 for exact spectra.

    Args:
      a, b: `Spectrum`.
      normalize: divide by the width of the interval that holds both, so that 0 is equal and 1 is two points at its
        ends: free of units, comparable between nets.
      with_error: return the standard error too.

    Returns:
      The distance, in units of the eigenvalues unless normalised; ``with_error`` the pair (distance, standard error).

    Raises:
      TypeError: for something that is no `Spectrum`.

    Example:
      >>> import jaxhess as jh
      >>> jh.wasserstein(jh.Spectrum([0.0], [1.0], 1), jh.Spectrum([2.0], [1.0], 1))
      2.0

    Reference: Villani 2008; Figure 3 of the paper; Chen, Trogdon and Ubaru 2021, Analysis of stochastic Lanczos
    quadrature for spectrum approximation, section 4 (the variance).
    """
    _check(a, b)
    distance = float(scipy.stats.wasserstein_distance(a.nodes, b.nodes, a.weights, b.weights))
    error = _weight_error(a) + _weight_error(b)
    if normalize:
        width = max(a.lambda_max, b.lambda_max) - min(a.lambda_min, b.lambda_min)
        unit = 0.0 if width == 0 or is_point([a, b]) else 1 / width
        distance, error = distance * unit, error * unit
    return (distance, error) if with_error else distance


def _weight_error(spec):
    """The standard error of the area under F(t) that comes from the start vectors."""
    if not spec.num_draws:
        return 0.0
    # An eigenvalue that a start vector hardly sees is there all the same.
    weights = np.maximum(spec.weights, 1 / (spec.dim * spec.num_draws))
    below = np.cumsum(weights)[:-1]
    variance = 2 * below * (weights.sum() - below) / ((spec.dim + 2) * spec.num_draws)
    return float(np.sqrt(variance) @ np.diff(spec.nodes))


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

    Where zeros are in the majority, as in G of a large net, the mean bounds nothing, and the small eigenvalues at the
    end, which fall off steeply, are no border of a bulk: then at most half of the positive eigenvalues are candidates,
    or ten, if that is more; and where no ratio among those is large enough, all positive ones stand apart from the
    zeros, if all are above the mean.

    "gap" looks at one ratio, so that outliers that lie as far from each other as from the bulk are cut short;
    "profile" takes them whole. It needs outliers closer together than their distance to the bulk, and finds too few, or
    none, where they are spread over an order of magnitude; so does "gap".

    Args:
      spec_or_values: `Spectrum`, or an array of all eigenvalues. Of a Lanczos spectrum take one draw: with several,
        each eigenvalue comes once a draw.
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
    if method not in ("gap", "profile"):
        raise ValueError(f"unknown method {method!r}; choose from ['gap', 'profile']")
    spec = spec_or_values
    if not isinstance(spec, Spectrum):
        spec = Spectrum.from_eigenvalues(spec)
    return _count(spec, float(spec.weights @ np.abs(spec.nodes)), method)


def outlier_range(spec: Spectrum) -> tuple[int, int]:
    """The smallest and the largest of `count_outliers` within two standard errors of the mean that bounds them."""
    mean = float(spec.weights @ np.abs(spec.nodes))
    error = 0.0
    if spec.num_draws:
        error = float(np.sqrt(2 * spec.weights @ spec.nodes**2 / (spec.dim * spec.num_draws)))
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
    low, high, sigma = broadening([a, b], num_points, kappa)
    grid = np.linspace(low, high, num_points)
    logs = [spec._log_density_on(grid, sigma) for spec in (a, b)]
    return [log - np.logaddexp.reduce(log) for log in logs]


def _divergence(log_p, log_q):
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))
