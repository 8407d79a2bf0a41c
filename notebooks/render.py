"""Runs the notebooks and keeps the figures of those cells whose metadata name one ("figure": NAME).

    python -m notebooks.render                 all, some minutes on two CPU cores
    python -m notebooks.render tour paper      some

The figures go to docs/figures; the notebooks themselves stay without outputs.
"""

from __future__ import annotations

import base64
import pathlib
import sys
from collections.abc import Mapping, Sequence

import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).parent
FIGURES = HERE.parent / "docs" / "figures"


def names() -> list[str]:
    """The names of the notebooks."""
    return sorted(path.stem for path in HERE.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    """A notebook as it is in the repository; ValueError that lists them if there is none of this name."""
    if name not in names():
        raise ValueError(f"unknown notebook {name!r}; choose from {names()}")
    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def execute(name: str, timeout: float = 600, changes: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """A notebook with its outputs, from top to bottom in a fresh kernel; an error in a cell is raised.

    ``changes`` are words of its cells and what to put in their place, such as fewer epochs.
    """
    notebook = read(name)
    for old, new in (changes or {}).items():
        changed = [cell for cell in notebook.cells if old in cell.source]
        if not changed:
            raise ValueError(f"the notebook {name!r} has no cell with {old!r}")
        for cell in changed:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook


def images(cell: nbformat.NotebookNode) -> list[bytes]:
    """The PNG images that a cell shows."""
    found = (output.get("data", {}).get("image/png") for output in cell.get("outputs", []))
    return [base64.b64decode(image) for image in found if image]


def main(chosen: Sequence[str]) -> None:
    """Renders notebooks, by default all."""
    for name in chosen or names():
        for cell in execute(name).cells:
            if figure := cell.metadata.get("figure"):
                (image,) = images(cell)
                (FIGURES / f"{figure}.png").write_bytes(image)
                print(f"docs/figures/{figure}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
