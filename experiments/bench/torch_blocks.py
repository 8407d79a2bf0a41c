"""The blocks of a GPT by PyHessian and curvlinops for `experiments.bench.blocks`, in a process of their own.

    python -m experiments.bench.torch_blocks FOLDER

runs in an environment with the packages of experiments/bench/peers.txt, which has no JAX. FOLDER holds weights.npz and
batch.npz. It prints the names of its rows as a JSON list, and then answers each line:

    about                       {"loss", "gradient": {block: norm}, "versions", "threads"}
    trace ROW/BUDGET/KEY        {"seconds", "found": {block: value}}
    spectrum ROW/BUDGET/KEY     {"seconds", "found": {block: [nodes, weights]}}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from curvlinops import HessianLinearOperator, hutchinson_trace, hutchpp_trace, xtrace
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from pyhessian import hessian
from torch import nn

from experiments.bench.torch_accuracy import PACKAGES
from experiments.bench.torch_work import eig
from experiments.report import seconds

HEADS = 4
Blocks = dict[str, list[nn.Parameter]]


class Attention(nn.Module):
    """Causal self-attention, written out, since the fused kernel has no second derivative."""

    def __init__(self, features: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(features, features) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, F) -> (N, T, F)."""
        count, length, features = x.shape
        shape = count, length, HEADS, features // HEADS
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) / shape[-1] ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, features: int):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(features), Attention(features), nn.LayerNorm(features)
        self.fc, self.proj = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, F) -> (N, T, F)."""
        x = x + self.attn(self.norm1(x))
        return x + self.proj(self.gelu(self.fc(self.norm2(x))))


class GPT(nn.Module):
    """The net of `experiments.models.gpt`, with its names; the logits of all positions in one axis."""

    def __init__(self, characters: int, context: int, features: int, layers: int):
        super().__init__()
        self.token, self.position = nn.Embedding(characters, features), nn.Embedding(context, features)
        for i in range(1, layers + 1):
            self.add_module(f"block{i}", Block(features))
        self.blocks = range(1, layers + 1)
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, T) -> (N T, characters)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for i in self.blocks:
            x = getattr(self, f"block{i}")(x)
        return self.head(self.norm(x)).flatten(0, 1)


def load(weights: dict[str, np.ndarray]) -> GPT:
    """The net with the weights of flax: {"block1/attn/query/kernel": array, ...}."""
    layers = len({name.split("/")[0] for name in weights if name.startswith("block")})
    net = GPT(*weights["token/embedding"].shape[:1], *weights["position/embedding"].shape, layers)
    state = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition("/")
        words = path.replace("/", ".") + (".bias" if kind == "bias" else ".weight")
        state[words] = torch.from_numpy(array.T.copy() if kind == "kernel" else array)
    net.load_state_dict(state)
    return net.eval()


def blocks_of(net: nn.Module) -> Blocks:
    """{"block1/attn/query": [weight, bias], ...}."""
    found: Blocks = {}
    for path, parameter in net.named_parameters():
        found.setdefault(path.rpartition(".")[0].replace(".", "/"), []).append(parameter)
    return found


# ---- PyHessian ----


def with_pyhessian(net: nn.Module, data: tuple, measured: Callable) -> Callable:
    """(budget, key) -> {block: ``measured(stored, width, budget)``}, of its class restricted to each block."""
    blocks = blocks_of(net)

    def call(budget, key):
        torch.manual_seed(key)
        net.zero_grad()
        stored = hessian(net, nn.CrossEntropyLoss(), data=data, cuda=False)
        gradients = {id(p): g for p, g in zip(stored.params, stored.gradsH, strict=True)}
        found = {}
        for name, params in blocks.items():
            stored.params, stored.gradsH = params, [gradients[id(p)] for p in params]
            found[name] = measured(stored, sum(p.numel() for p in params), budget)
        return found

    return call


def hutchinson(stored: hessian, width: int, count: int) -> float:
    """All products are taken: with this tolerance it does not stop where the running mean stalls."""
    return float(np.mean(stored.trace(count, tol=-np.inf)))


def density(steps: int) -> Callable:
    """Nodes and weights by one start vector and as many steps as the budget, or, with ``steps``, by several."""

    def measured(stored, width, budget):
        each = min(steps or budget, budget, width)
        nodes, weights = stored.density(iter=each, n_v=max(1, budget // steps) if steps else 1)
        weights = np.array(weights, np.float64)
        return [np.array(nodes, np.float64).ravel().tolist(), (weights / len(weights)).ravel().tolist()]

    return measured


# ---- curvlinops ----


def with_curvlinops(net: nn.Module, data: tuple, measured: Callable) -> Callable:
    """(budget, key) -> {block: ``measured(operator, budget)``}, of its operator on each block."""
    blocks = blocks_of(net)

    def call(budget, key):
        torch.manual_seed(key)
        np.random.seed(key)
        found = {}
        for name, params in blocks.items():
            loss = nn.CrossEntropyLoss()
            operator = HessianLinearOperator(net, loss, params, [data], check_deterministic=False)
            found[name] = measured(operator, budget)
        return found

    return call


def by_products(estimate: Callable) -> Callable:
    """A trace with so many products; of a block with no more parameters than that, exactly."""

    def measured(operator, budget):
        width = operator.shape[0]
        if budget >= width:
            return float((operator @ torch.eye(width)).trace())
        return float(estimate(operator, budget))

    return measured


def lanczos(operator: HessianLinearOperator, steps: int) -> list[list[float]]:
    """The nodes and weights of its Lanczos approximation of the spectrum, before they are broadened."""
    nodes, vectors = fast_lanczos(operator, min(steps, operator.shape[0] - 1))
    return [np.asarray(nodes, np.float64).tolist(), (np.asarray(vectors, np.float64)[0] ** 2).tolist()]


# ---- answers ----


def make_rows(net: nn.Module, data: tuple) -> dict[str, Callable]:
    """{"KIND ROW": (budget, key) -> {block: found}}."""
    rows = {
        "trace PyHessian: trace": with_pyhessian(net, data, hutchinson),
        "spectrum PyHessian: density": with_pyhessian(net, data, density(0)),
        "spectrum PyHessian: density, 16 steps a start": with_pyhessian(net, data, density(16)),
        "spectrum curvlinops: Lanczos": with_curvlinops(net, data, lanczos),
    }
    kinds = {"Hutchinson": hutchinson_trace, "XTrace": xtrace, "Hutch++": hutchpp_trace}
    for name, estimate in kinds.items():
        rows[f"trace curvlinops: {name}"] = with_curvlinops(net, data, by_products(estimate))
    return rows


def about(net: nn.Module, data: tuple) -> dict:
    """The loss, the norms of the gradient by block, and the versions."""
    loss = nn.CrossEntropyLoss()(net(data[0]), data[1])
    blocks = blocks_of(net)
    norms = {
        name: float(sum((g**2).sum() for g in torch.autograd.grad(loss, params, retain_graph=True))) ** 0.5
        for name, params in blocks.items()
    }
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"loss": loss.item(), "gradient": norms, "versions": versions}


def take_threads(net: nn.Module, data: tuple) -> int:
    """One thread or one for each core, whichever makes products faster: on a small net several wait for each other."""
    params, times = list(net.parameters()), {}

    def product():
        slopes = torch.autograd.grad(nn.CrossEntropyLoss()(net(data[0]), data[1]), params, create_graph=True)
        torch.autograd.grad(slopes, params, [torch.ones_like(p) for p in params])

    for count in (1, os.cpu_count()):
        torch.set_num_threads(count)
        times[count] = min(seconds(product) for _ in range(5))
    best = min(times, key=times.get)
    torch.set_num_threads(best)
    return best


def main(folder: str) -> None:
    """Answers lines of standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peers print is no answer
    torch.eig = eig
    warnings.filterwarnings("ignore", message=".*create_graph=True.*")
    weights, batch = (
        dict(np.load(pathlib.Path(folder) / name, allow_pickle=False)) for name in ("weights.npz", "batch.npz")
    )
    net = load(weights)
    data = tuple(torch.from_numpy(batch[name].astype(np.int64)) for name in ("image", "label"))
    data = data[0], data[1].flatten()
    threads = take_threads(net, data)
    rows = make_rows(net, data)
    print(json.dumps(list(rows)), file=answers, flush=True)
    for line in sys.stdin:
        if line.startswith("about"):
            answer = about(net, data) | {"threads": threads}
        else:
            row, budget, key = line.strip().rsplit("/", 2)
            start = time.perf_counter()
            found = rows[row](int(budget), int(key))
            answer = {"found": found, "seconds": time.perf_counter() - start}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
