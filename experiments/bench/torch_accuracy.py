"""The estimates of PyHessian and curvlinops for `experiments.bench.accuracy`, in a process of their own.

    python -m experiments.bench.torch_accuracy FOLDER

runs in an environment with the packages of experiments/bench/peers.txt, which has no JAX. FOLDER holds matrices.npz,
eigenvalues.npz and trials.json; the results go to peers.npz beside them, and the versions to peers.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch
from curvlinops import hutchpp_trace, xtrace
from pyhessian import hessian
from torch import nn

from experiments.bench import trials
from experiments.bench.torch_work import eig

PACKAGES = ("PyHessian", "curvlinops-for-pytorch", "torch")


class Quadratic(nn.Module):
    """x' A x / 2 as a net whose parameters are x, so that its Hessian is A."""

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.matrix, self.x = matrix, nn.Parameter(torch.zeros(len(matrix)))

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """The value, whatever the input."""
        return 0.5 * self.x @ (self.matrix @ self.x)


def traces(matrix: torch.Tensor, stored: hessian) -> dict[str, Callable]:
    """{name: (products, key) -> (trace, NaN), for none of them has an error bar}."""

    def seeded(estimate):
        def call(count, key):
            torch.manual_seed(key)
            return float(estimate(count)), np.nan

        return call

    return {
        # With this tolerance it takes all products, and does not stop where the running mean stalls.
        "PyHessian: Hutchinson": seeded(lambda count: np.mean(stored.trace(count, tol=-np.inf))),
        "curvlinops: XTrace": seeded(lambda count: xtrace(matrix, count)),
        "curvlinops: Hutch++": seeded(lambda count: hutchpp_trace(matrix, count - count % 3)),
    }


def lanczos(stored: hessian) -> Callable:
    """(products, key) -> nodes and weights of PyHessian's density, before it is broadened."""

    def quadrature(count, key):
        torch.manual_seed(key)
        nodes, weights = stored.density(iter=count, n_v=1)
        return np.array(nodes[0], np.float64), np.array(weights[0], np.float64)

    return quadrature


def main(folder: str) -> None:
    """Reads the matrices and writes the results."""
    torch.eig = eig
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    here, found = pathlib.Path(folder), {}
    wanted = json.loads((here / "trials.json").read_text())
    matrices, eigenvalues = (np.load(here / name, allow_pickle=False) for name in ("matrices.npz", "eigenvalues.npz"))
    for name in matrices:
        matrix = torch.from_numpy(matrices[name])
        data = (torch.zeros(1), torch.zeros(1))
        stored = hessian(Quadratic(matrix), lambda outputs, _: outputs, data=data, cuda=False)
        for row, estimate in traces(matrix, stored).items():
            found[f"{name}/trace/{row}"] = trials.traces(estimate, **wanted)
        found[f"{name}/spectrum/PyHessian: density"] = trials.distances(lanczos(stored), eigenvalues[name], **wanted)
    np.savez(here / "peers.npz", **found)
    (here / "peers.json").write_text(json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}))


if __name__ == "__main__":
    main(sys.argv[1])
