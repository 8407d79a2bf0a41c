"""The same work in PyTorch, by PyHessian, curvlinops and plain double backward, timed on request.

    python -m experiments.peers lenet 64 100

runs in an environment with the packages of experiments/peers.txt, and is started by the benchmark. It prints the names
of its rows as a JSON list, and then answers each line "time NAME" by seconds and "memory NAME" by [MiB, seconds].
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.memory import timed_peak

GRADIENT = "torch: gradient"
PRODUCT = "PyHessian: product, one of many"
LANCZOS = "PyHessian: {} Lanczos steps"
HVP, GGN = "curvlinops: Hessian product", "curvlinops: GGN product"
TRACES = "torch: layer traces in a loop, 1 probe"
PENALTY = "torch: HTR gradient by double backward, 1 probe"


class Peers:
    """The other process: ``names``, and the time and the memory of each by a line to it and a line back."""

    def __init__(self, python: str, model: str, batch_size: int, num_steps: int):
        """Starts it with the interpreter of its environment; ValueError where it does not start."""
        words = [python, "-m", "experiments.peers", model, str(batch_size), str(num_steps)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        self.names: list[str] = self._read()

    def ask(self, what: str, name: str) -> Any:
        """The "time" of a row in seconds, or its "memory" as [MiB, seconds]."""
        print(what, name, file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> int:
        """Ends the process; returns its status."""
        with self._process as process:
            process.stdin.close()
        return process.returncode

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the peers' process ended with status {self.close()}; what it said is above")
        return json.loads(line)


def environment(folder: Path) -> str:
    """The interpreter of an environment with the peers, which is made in ``folder`` if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        packages = Path(__file__).with_name("peers.txt")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", packages], check=True)
        (folder / "complete").touch()
    return str(python)


def make_net(name: str):
    """A net as `experiments.models` has it, in PyTorch, in evaluation mode."""
    import torch
    from torch import nn

    def conv(inputs, outputs, size=3, stride=1, bias=False):
        return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)

    class Residual(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            norm = nn.BatchNorm2d
            first, second = conv(inputs, outputs, stride=stride), conv(outputs, outputs)
            self.inner = nn.Sequential(first, norm(outputs), nn.ReLU(), second, norm(outputs))
            same = inputs == outputs and stride == 1
            self.outer = nn.Sequential(*([] if same else [conv(inputs, outputs, 1, stride), norm(outputs)]))

        def forward(self, x):
            return torch.relu(self.inner(x) + self.outer(x))

    class Dense(nn.Module):
        def __init__(self, inputs, growth):
            super().__init__()
            self.inner = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, growth))

        def forward(self, x):
            return torch.cat([x, self.inner(x)], 1)

    def lenet():
        for inputs, outputs, padding in ((1, 6, 2), (6, 16, 0)):
            yield from (nn.Conv2d(inputs, outputs, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2))
        yield from (nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))

    def vgg11(batch_norm=False):
        channels = 3
        for outputs, pool in zip((64, 128, 256, 256, 512, 512, 512, 512), (1, 1, 0, 1, 0, 1, 0, 1), strict=True):
            yield conv(channels, outputs, bias=True)
            yield from ([nn.BatchNorm2d(outputs)] if batch_norm else [])
            yield from ([nn.ReLU(), nn.MaxPool2d(2)] if pool else [nn.ReLU()])
            channels = outputs
        yield from (nn.Flatten(), nn.Linear(512, 10))

    def resnet18():
        yield from (conv(3, 64), nn.BatchNorm2d(64), nn.ReLU())
        channels = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            yield from (Residual(channels, outputs, stride), Residual(outputs, outputs, 1))
            channels = outputs
        yield from (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))

    def densenet():
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

    nets = {
        "lenet": lenet,
        "vgg11": vgg11,
        "vgg11_bn": lambda: vgg11(batch_norm=True),
        "resnet18": resnet18,
        "densenet": densenet,
    }
    if name not in nets:
        raise ValueError(f"no net {name!r} in PyTorch; choose from {sorted(nets)}")
    return nn.Sequential(*nets[name]()).eval()


def make_rows(name: str, batch_size: int, num_steps: int) -> dict[str, Callable[[], object]]:
    """{name: the call}."""
    import curvlinops
    import torch
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    def eig(matrix, eigenvectors=False):
        """What PyHessian calls of PyTorch, and PyTorch has no more."""
        values, vectors = torch.linalg.eig(matrix)
        return torch.stack([values.real, values.imag], 1), vectors.real

    torch.eig = eig
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    net, criterion = make_net(name), torch.nn.CrossEntropyLoss()
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
    operators = {
        HVP: curvlinops.HessianLinearOperator,
        GGN: curvlinops.GGNLinearOperator,
    }
    operators = {
        row: kind(net, criterion, params, [(images, labels)], check_deterministic=False)
        for row, kind in operators.items()
    }
    vector = torch.randn(sum(p.numel() for p in params))
    rows = {
        GRADIENT: gradient,
        PRODUCT: lambda: hessian_vector_product(stored.gradsH, stored.params, signs(params)),
        HVP: lambda: operators[HVP] @ vector,
        GGN: lambda: operators[GGN] @ vector,
        TRACES: layer_traces,
        PENALTY: penalty,
    }
    if num_steps:
        rows[LANCZOS.format(num_steps)] = lambda: stored.density(iter=num_steps, n_v=1)
    return rows


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(name: str, batch_size: str, num_steps: str) -> None:
    """Answers lines of standard input until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peers print is no answer
    rows = make_rows(name, int(batch_size), int(num_steps))
    print(json.dumps(list(rows)), file=answers, flush=True)
    for line in sys.stdin:
        what, _, row = line.strip().partition(" ")
        timer = partial(_seconds, rows[row])
        answer = timer() if what == "time" else timed_peak(timer)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):  # it ends with the benchmark, and leaves the words to that
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGPIPE:
            signal.signal(number, signal.SIG_DFL)
    main(*sys.argv[1:])
