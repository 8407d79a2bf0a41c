"""The nets and rows of `experiments.bench.peers` in PyTorch, in a process of their own, timed on request.

    python -m experiments.bench.torch_work lenet 64 100

runs in an environment with the packages of experiments/bench/peers.txt, which has no JAX. It prints the names of its
rows as a JSON list, and then answers each line "time NAME" by seconds and "memory NAME" by [MiB, seconds].
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

import curvlinops
import torch
from pyhessian import hessian
from pyhessian.utils import hessian_vector_product
from torch import nn

from experiments.bench import peers
from experiments.bench.memory import timed_peak
from experiments.report import seconds


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, bias: bool = False) -> nn.Module:
    """A convolution that keeps the size of the image, but for its stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)


class Residual(nn.Module):
    """A basic block of ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        norm = nn.BatchNorm2d
        first, second = conv(inputs, outputs, stride=stride), conv(outputs, outputs)
        self.inner = nn.Sequential(first, norm(outputs), nn.ReLU(), second, norm(outputs))
        same = inputs == outputs and stride == 1
        self.outer = nn.Sequential(*([] if same else [conv(inputs, outputs, 1, stride), norm(outputs)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.inner(x) + self.outer(x))


class Dense(nn.Module):
    """A layer of DenseNet."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, growth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, inputs + growth, H, W)."""
        return torch.cat([x, self.inner(x)], 1)


def lenet() -> Iterator[nn.Module]:
    """The modules of LeNet."""
    for inputs, outputs, padding in ((1, 6, 2), (6, 16, 0)):
        yield from (nn.Conv2d(inputs, outputs, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2))
    yield from (nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


def vgg11(batch_norm: bool = False) -> Iterator[nn.Module]:
    """The modules of VGG11."""
    channels = 3
    for outputs, pool in zip((64, 128, 256, 256, 512, 512, 512, 512), (1, 1, 0, 1, 0, 1, 0, 1), strict=True):
        yield conv(channels, outputs, bias=True)
        yield from ([nn.BatchNorm2d(outputs)] if batch_norm else [])
        yield from ([nn.ReLU(), nn.MaxPool2d(2)] if pool else [nn.ReLU()])
        channels = outputs
    yield from (nn.Flatten(), nn.Linear(512, 10))


def resnet18() -> Iterator[nn.Module]:
    """The modules of ResNet18."""
    yield from (conv(3, 64), nn.BatchNorm2d(64), nn.ReLU())
    channels = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        yield from (Residual(channels, outputs, stride), Residual(outputs, outputs, 1))
        channels = outputs
    yield from (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def densenet() -> Iterator[nn.Module]:
    """The modules of DenseNet-40-12."""
    yield conv(3, 16)
    channels = 16
    for block in range(3):
        for _ in range(12):
            yield Dense(channels, 12)
            channels += 12
        yield from (nn.BatchNorm2d(channels), nn.ReLU())
        if block < 2:
            yield from (conv(channels, channels, 1), nn.AvgPool2d(2))
    yield from (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


NETS = {
    "lenet": lenet,
    "vgg11": vgg11,
    "vgg11_bn": partial(vgg11, batch_norm=True),
    "resnet18": resnet18,
    "densenet": densenet,
}


def make_net(name: str) -> nn.Module:
    """A net as `experiments.models` has it, in evaluation mode; ValueError for one that is not here."""
    if name not in NETS:
        raise ValueError(f"no net {name!r} in PyTorch; choose from {sorted(NETS)}")
    return nn.Sequential(*NETS[name]()).eval()


def eig(matrix: torch.Tensor, eigenvectors: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What PyHessian calls of PyTorch, and PyTorch no longer has."""
    values, vectors = torch.linalg.eig(matrix)
    return torch.stack([values.real, values.imag], 1), vectors.real


def make_rows(name: str, batch_size: int, num_steps: int) -> dict[str, Callable[[], object]]:
    """{name: the call}."""
    torch.eig = eig
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    net, criterion = make_net(name), nn.CrossEntropyLoss()
    images = torch.randn(batch_size, *((1, 28, 28) if name == "lenet" else (3, 32, 32)))
    labels = torch.randint(0, 10, (batch_size,))
    params = list(net.parameters())

    def signs(tensors):
        return [torch.randint_like(p, high=2) * 2 - 1 for p in tensors]

    def gradient(**options):
        return torch.autograd.grad(criterion(net(images), labels), params, **options)

    def inner(left, right):
        return sum((a * b).sum() for a, b in zip(left, right, strict=True))

    def layer_traces():
        layers, found = {}, {}
        for (path, p), g in zip(net.named_parameters(), gradient(create_graph=True), strict=True):
            layers.setdefault(path.rpartition(".")[0], []).append((p, g))
        for path, pairs in layers.items():
            group, slopes = zip(*pairs, strict=True)
            v = signs(group)
            found[path] = inner(v, torch.autograd.grad(slopes, group, v, retain_graph=True)).item()
        return found

    def penalty():
        v = signs(params)
        product = torch.autograd.grad(gradient(create_graph=True), params, v, create_graph=True)
        return torch.autograd.grad(inner(v, product), params)

    stored = hessian(net, criterion, data=(images, labels), cuda=False)
    kinds = {peers.HVP: curvlinops.HessianLinearOperator, peers.GGN: curvlinops.GGNLinearOperator}
    vector = torch.randn(sum(p.numel() for p in params))
    rows = {
        peers.GRADIENT: gradient,
        peers.PRODUCT: lambda: hessian_vector_product(stored.gradsH, stored.params, signs(params)),
    }
    for row, kind in kinds.items():
        operator = kind(net, criterion, params, [(images, labels)], check_deterministic=False)
        rows[row] = partial(operator.__matmul__, vector)
    rows |= {peers.TRACES: layer_traces, peers.PENALTY: penalty}
    if num_steps:
        rows[peers.LANCZOS.format(num_steps)] = lambda: stored.density(iter=num_steps, n_v=1)
    return rows


def main(name: str, batch_size: str, num_steps: str) -> None:
    """Answers lines of standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peers print is no answer
    rows = make_rows(name, int(batch_size), int(num_steps))
    print(json.dumps(list(rows)), file=answers, flush=True)
    for line in sys.stdin:
        what, _, row = line.strip().partition(" ")
        timer = partial(seconds, rows[row])
        answer = timer() if what == "time" else timed_peak(timer)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):  # it ends with the benchmark, and leaves the words to that
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGPIPE:
            signal.signal(number, signal.SIG_DFL)
    main(*sys.argv[1:])
