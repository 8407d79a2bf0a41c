"""The same work in PyTorch, by PyHessian, curvlinops and plain double backward: its process, and how it is asked."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path
from typing import Any

GRADIENT = "torch: gradient"
PRODUCT = "PyHessian: product, one of many"
LANCZOS = "PyHessian: {} Lanczos steps"
HVP, GGN = "curvlinops: Hessian product", "curvlinops: GGN product"
TRACES = "torch: layer traces in a loop, 1 probe"
PENALTY = "torch: HTR gradient by double backward, 1 probe"


class Peers:
    """The other process: the ``names`` of its rows, and what is asked of it by a line to it and a line back."""

    def __init__(self, python: str, module: str, *words: str):
        """Starts a module with the interpreter of its environment; ValueError where it does not start."""
        words = [python, "-m", module, *words]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent
        )
        self.names: list[str] = self._read()

    def ask(self, what: str, name: str) -> Any:
        """The answer to "WHAT NAME", such as the "time" of a row in seconds, or its "memory" as [MiB, seconds]."""
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
