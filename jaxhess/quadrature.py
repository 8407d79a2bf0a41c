"""Spectra by stochastic Lanczos quadrature, of one operator and of all layers."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._blocks import advance, blocks_of, products_of_rows
from jaxhess._checks import NotFiniteError, check_choice, check_count, check_key, check_like
from jaxhess._diagnosis import why_not_finite
from jaxhess._functional import h_product, layers_without_h
from jaxhess._lanczos import Steps, check_basis, drive, lanczos_beside, lanczos_steps, ritz
from jaxhess._linear import as_linear
from jaxhess._noise import Run, noise, ritz_run
from jaxhess._rows import NoGramError
from jaxhess._trees import combine, random_like, tree_norm, tree_size
from jaxhess._weights import Check, Nodes, check, converged, deflated, plain
from jaxhess.gram import gram_eigenvalues, gram_rows
from jaxhess.operators import block, linearize, product
from jaxhess.problem import Problem, pose
from jaxhess.selections import Selections
from jaxhess.spectra import Spectrum

PyTree = Any
_GRAM_ROWS = 2000
_SHARE = 4  # of the steps, one in so many more are taken in the complement of the vectors that were found
_CHECK = 2**31 - 2  # folded into the key for the vectors that tell where H_l vanishes


def spectrum(
    operator: Callable[[PyTree], PyTree],
    *,
    like: PyTree,
    key: jax.Array,
    num_steps: int = 128,
    num_draws: int = 1,
    weights: str = "deflated",
    reorthogonalize: bool | str = True,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """The spectrum of an operator by stochastic Lanczos quadrature.

    Each draw is a Gaussian start vector. Its m Ritz values and the squared first entries of the eigenvectors of T are
    the nodes and weights of a Gauss quadrature, which is exact for polynomials up to degree 2 m - 1 under the spectral
    measure of that vector. Draws are averaged.

    A start vector sees a single eigenvalue with a random weight, chi^2_1 / dim. With deflated weights, a Ritz value
    that has converged gets its true weight, 1 / dim, and the others share the rest in proportion. This makes the trace,
    the density and distances far more precise. A quarter as many further steps, in the complement of the vectors that
    were found, show which of these eigenvalues are repeated; they keep the weight that was seen. Where they resolve the
    rest, they are one more draw of it. Other repeated eigenvalues are recognised by their weight. With a single draw,
    one that is repeated only a few times can be missed.

    Args:
      operator: a symmetric v -> A v, as from `hessian`; `linearize` it first for speed.
      like: a pytree of arrays like v.
      key: a JAX random key.
      num_steps: Lanczos steps of a draw; fewer are taken if the Krylov space is exhausted. With as many steps as
        dimensions the result is exact: all eigenvalues, repeated ones too, with weights 1/dim. With deflated weights
        four fifths are enough, since as many products are taken.
      num_draws: start vectors. An eigenvalue that all of them have found is one node.
      weights: "deflated", or "plain" for what the start vectors saw.
      reorthogonalize: False keeps three vectors instead of all: enough for the density, but extreme nodes then come
        with ghost copies, and the weights are plain. "host" keeps all vectors in host memory.
      progress: ``progress(done, total)`` in steps over all draws.

    Returns:
      `Spectrum`, on the host in float64.

    Raises:
      ValueError: for fewer than one step or draw, an empty ``like``, a product that is not finite, or an operator that
        gives different results for the same v or is not symmetric.
      TypeError: under ``jit`` (use `lanczos` there), or if ``key`` is not a JAX random key.

    Example:
      >>> import jax, jax.numpy as jnp, jaxhess as jh
      >>> spec = jh.spectrum(lambda v: jnp.arange(4.0) * v, like=jnp.zeros(4), key=jax.random.key(0))
      >>> bool(abs(spec.nodes - [0, 1, 2, 3]).max() < 1e-5)
      True

    Reference: Ubaru, Chen and Saad 2017, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature; Lin, Saad
    and Yang 2016; Algorithm 2 of the paper; Bhattacharjee et al. 2025, Improved spectral density estimation via
    explicit and implicit deflation (deflated weights).
    """
    check_key(key)
    check_like("like", like)
    runs = Runs(num_steps, num_draws, reorthogonalize, weights)
    operator = as_linear(operator)
    found = {"": drive(runs.steps(like, key, progress), operator)}
    return _with_noise(operator, lambda product, _: product, found, like, key)[""]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of Lanczos for one spectrum; arguments as for `spectrum`."""

    num_steps: int
    num_draws: int = 1
    reorthogonalize: bool | str = True
    weights: str = "deflated"

    def __post_init__(self):
        check_choice("weights", self.weights, ("deflated", "plain"))
        check_count("num_steps", self.num_steps)
        check_count("num_draws", self.num_draws)
        check_basis(self.reorthogonalize)

    def count(self, dim: int) -> int:
        """The steps that are taken: all of a small operator once, or those of each draw."""
        return dim if self._takes_all(dim) else min(dim, self.num_steps) * self.num_draws

    def _takes_all(self, dim):
        """Whether all eigenvalues are found, for no more products than the run in the complement takes too."""
        share = 1 / _SHARE if self.weights == "deflated" else 0
        return (1 + share) * self.num_steps >= dim and self.reorthogonalize

    def steps(self, like: PyTree, key: jax.Array, progress: Any) -> Steps:
        """The spectrum as the recurrence has it, and what its noise is measured at: the `Run` of the first draw."""
        dim = tree_size(like)
        run = partial(lanczos_steps, reorthogonalize=self.reorthogonalize)
        if self._takes_all(dim):
            restart = jax.random.fold_in(key, 1)
            found = yield from run(random_like(key, like), dim, restart_key=restart, progress=progress)
            values, _, residuals = ritz(found.alphas, found.betas)
            return Spectrum(values, np.full(dim, 1 / dim), dim, self.num_steps, residuals), ritz_run(found)
        steps, draws, checked = min(self.num_steps, dim), [], Check()
        deflate = self.weights == "deflated" and self.reorthogonalize  # ghost copies would each be an eigenvalue
        for draw in range(self.num_draws):
            report = _shifted(progress, draw * steps, self.num_draws * steps)
            found = yield from run(random_like(jax.random.fold_in(key, draw), like), steps, progress=report)
            draws.append(_nodes(found.alphas, found.betas))
            if draw == 0:
                first = ritz_run(found) if self.reorthogonalize else _blind_run(like, key, draws[0].nodes)
                checked = (yield from self._check(found, draws[0], like, key)) if deflate else checked
        nodes, weights, residuals, fixed = deflated(draws, dim, checked) if deflate else plain(draws)
        count = len(draws) + (checked.draw is not None)
        return Spectrum(nodes, weights, dim, self.num_steps, residuals, count, fixed), first

    def _check(self, found, nodes, like, key):
        """What a quarter as many steps find in the complement of the converged Ritz vectors."""
        steps, values = max(1, self.num_steps // _SHARE), converged(nodes)
        if not 0 < len(values) < tree_size(like):
            return Check()
        _, coefficients, _ = ritz(found.alphas, found.betas)
        places = np.zeros((max(found.num_steps, len(values) + steps), found.num_steps))
        places[: len(values)] = coefficients[:, values].T
        start = random_like(jax.random.fold_in(key, _CHECK - 1), like)
        rows = combine(found.basis, places.T)
        again = yield from lanczos_beside(rows, len(values), np.abs(nodes.nodes).max(), start, steps)
        early = _nodes(found.alphas[:steps], found.betas[:steps])
        return check(nodes, early, _nodes(again.alphas, again.betas), tree_size(like))


def _nodes(alphas, betas):
    """The Ritz values of a run with the weights that its start vector saw."""
    values, vectors, residuals = ritz(alphas, betas)
    return Nodes(values, vectors[0] ** 2, residuals, np.zeros(len(values), bool))


def _blind_run(like, key, values):
    """Without a basis there are no Ritz vectors: a random vector, beside the extreme Ritz values."""
    vector = random_like(jax.random.fold_in(key, _CHECK), like)
    size = tree_norm(vector)
    return Run(values[[0, -1]], jax.tree.map(lambda x: x[None] / size.astype(x.dtype), vector), None)


def _with_noise(operator, part_of, found, like, key, apply=None):
    """{name: Spectrum}, in whose residuals is what the products are worth."""
    key, runs = jax.random.fold_in(key, _CHECK), {name: run for name, (_, run) in found.items()}
    added = noise(operator, part_of, runs, like, key, apply)
    return {
        name: dataclasses.replace(spec, residuals=spec.residuals + added[name]) for name, (spec, _) in found.items()
    }


def _shifted(progress, before, total):
    """Progress of a part of the whole."""
    return None if progress is None else lambda done, _: progress(before + done, total)


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
    layers: Selections = None,
    weights: str = "deflated",
    reorthogonalize: bool | str = True,
    max_bytes: int = 2**30,
    progress: Callable[[int, int], None] | None = None,
    differentiation: str | float = "exact",
    has_aux: bool = False,
) -> dict[str, Spectrum]:
    """The spectrum of every layer's block, and of the whole net.

    The recurrences of all layers advance together. One program has the products of all blocks, each of which begins and
    ends at the layer's own parameters. Where forward mode cannot differentiate the loss twice, over `Batches`, and
    where this would hold more than 1 GB, the layers come one after the other by products of the whole net.

    Args:
      objective: a loss, or an `Objective` (which "ggn" and "functional" need).
      params, batch, differentiation, has_aux: as for `hessian`.
      key: a JAX random key.
      num_steps, num_draws, weights, reorthogonalize: as for `spectrum`.
      curvature: "hessian", "ggn" or "functional".
      method: "lanczos", "gram" or "auto". "gram" is exact and for the GGN only: it uses the Gram matrix (see
        `ggn_eigenvalues`). "auto" uses the Gram matrix wherever it gives the spectrum and has at most 2,000 rows
        (examples times outputs), and Lanczos elsewhere. For the Hessian, it gives the spectrum of each layer whose H_l
        is zero, as in piecewise linear nets, because then Hess_l = G_l. A product of H_l with a random vector decides:
        it must be exactly zero. The residuals of such a spectrum are its rounding; ``num_draws`` does not affect it.
      layers: "all", "middle" (`middle_layers`) or "arrays" (every array by itself); a depth, where 1 joins all layers
        under one module at the root; a selection, as for `hessian`, for one group; a list of selections, for several;
        or {name: selection}. All layers by default. Groups may overlap. The choice does not change a layer's spectrum.
      max_bytes: for "gram" and "auto", as for `ggn_eigenvalues`.
      progress: ``progress(done, total)`` in Lanczos steps over all layers. If there is a Gram matrix, its progress
        comes first, with its own total, as for `ggn_eigenvalues`.

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
    check_key(key)
    problem = pose(curvature, objective, params, batch, has_aux, layers, differentiation)
    runs = Runs(num_steps, num_draws, reorthogonalize, weights)
    return spectra_of(problem, curvature, key, runs, method, max_bytes, progress)[0]


def spectra_of(
    problem: Problem,
    curvature: str,
    key: jax.Array,
    runs: Runs,
    method: str,
    max_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Spectrum], set[str]]:
    """As `layer_spectra`, of a `Problem`; and the names of those that are spectra of the Gram matrix."""
    check_choice("method", method, ("auto", "gram", "lanczos"))
    if method == "gram" and curvature != "ggn":
        raise ValueError(
            f"the Gram matrix gives the spectrum of the GGN only, not of {curvature!r}; use 'lanczos', or 'auto' for "
            f"layers in which both agree"
        )
    parts = {layer.name: (_number(problem, layer), layer) for layer in (*problem.layers, problem.whole)}
    exact = set(parts) if method == "gram" else set()
    if method == "auto" and 0 < gram_rows(problem) <= _GRAM_ROWS:
        exact = _equal_to_ggn(problem, curvature, parts, key)
    spectra: dict[str, Spectrum] = {}
    if exact:
        try:
            spectra = _gram_spectra(problem, exact, runs.num_steps, max_bytes, progress)
        except NoGramError:
            if method == "gram":
                raise
            exact = set()
    if left := {name: part for name, part in parts.items() if name not in spectra}:
        spectra |= _lanczos_spectra(problem, curvature, left, key, runs, progress)
    return {name: spectra[name] for name in parts}, exact


def _number(problem, layer):
    """What is folded into the key for a layer, whatever others are asked for."""
    if layer is problem.whole:
        return len(problem.names)
    if layer.name in problem.names:
        return problem.names.index(layer.name)
    return 2**30 + zlib.crc32(layer.name.encode()) % 2**29


def _gram_spectra(problem, names, num_steps, max_bytes, progress):
    spectra = {}
    for name, (values, rounding) in gram_eigenvalues(problem, names, max_bytes, progress).items():
        layer = next(layer for layer in (*problem.layers, problem.whole) if layer.name == name)
        spec = Spectrum.from_eigenvalues(values, tree_size(layer.arrays(problem.params)))
        error = np.full(len(spec.nodes), rounding * spec.lambda_max)
        spectra[name] = dataclasses.replace(spec, num_steps=num_steps, residuals=error)
    return spectra


def _lanczos_spectra(problem, curvature, parts, key, runs, progress):
    """By the products of all blocks at once where they can be had, else one layer after the other."""
    likes = {name: layer.take(problem.params) for name, (_, layer) in parts.items()}
    report = _counted(progress, sum(runs.count(tree_size(like)) for like in likes.values()))
    steps = {name: runs.steps(likes[name], jax.random.fold_in(key, i), report) for name, (i, _) in parts.items()}
    layers = {name: layer for name, (_, layer) in parts.items() if layer is not problem.whole}
    found = {}
    if (blocks := blocks_of(problem, curvature, list(layers.values()), runs.num_steps)) is not None:
        found = _together(blocks, {name: (likes[name], steps[name]) for name in layers}, key)
    left = {name: (layer, steps[name]) for name, (_, layer) in parts.items() if name not in found}
    return found | _one_by_one(problem, curvature, left, key)


def _together(operator, parts, key):
    likes = tuple(like for like, _ in parts.values())
    # Bound to no device, as the vectors are: the product would be compiled again once a layer has ended.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), likes)
    found = advance(operator, {name: steps for name, (_, steps) in parts.items()}, zeros)

    def part_of(operator, name):
        number = list(parts).index(name)
        return lambda v: operator((*zeros[:number], v, *zeros[number + 1 :]))[number]

    return _with_noise(operator, part_of, found, likes, key, products_of_rows)


def _one_by_one(problem, curvature, parts, key):
    operator, zeros = product(curvature, problem), optax.tree.zeros_like(problem.params)
    if not problem.many:
        operator = linearize(operator, like=problem.params)

    def part_of(operator, name):
        layer = parts[name][0]
        return operator if layer is problem.whole else block(operator, layer, zeros)

    found = {}
    for name, (_, steps) in parts.items():
        try:
            found[name] = drive(steps, part_of(operator, name))
        except NotFiniteError:
            why = why_not_finite(curvature, problem.loss, problem.params, problem.batch)
            raise NotFiniteError(f"products of the curvature of {name!r} are not finite: {why}") from None
    return _with_noise(operator, part_of, found, problem.params, key)


def _counted(progress, total):
    """Progress in steps of several recurrences, whichever takes one."""
    done = itertools.count(1)
    return None if progress is None else lambda *_: progress(min(next(done), total), total)


def _equal_to_ggn(problem, curvature, parts, key):
    """The names of those parts whose curvature is that of the GGN."""
    if curvature != "hessian":
        return set(parts) if curvature == "ggn" else set()
    layers = tuple(layer for _, layer in parts.values() if layer is not problem.whole)
    return layers_without_h(h_product(problem), problem, layers, jax.random.fold_in(key, _CHECK))
