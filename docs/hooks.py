"""What the site takes from outside docs/: README, contributing guide, changelog, notebooks, reference, MathJax.

A hook of MkDocs, and an extension of griffe that reads this project's docstrings.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import pathlib
import re

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent

# The reference: {page: (title, names on the library's face)}. Each public name is on exactly one page.
REFERENCE = {
    "summary": ("Summary", ["summarize", "Summary", "Record"]),
    "operators": (
        "Curvature operators",
        ["hessian", "ggn", "functional_hessian", "linearize", "precondition", "preconditioner", "aslinearoperator"],
    ),
    "traces": ("Traces", ["trace", "layer_traces", "Estimate", "diagonal"]),
    "spectra": ("Spectra", ["spectrum", "layer_spectra", "Spectrum"]),
    "eigenpairs": (
        "Eigenpairs",
        ["top_eigenpairs", "subspace_overlap", "critical_sharpness", "lanczos", "Tridiagonal"],
    ),
    "distances": (
        "Distances and outliers",
        ["wasserstein", "jensen_shannon", "kl_divergence", "count_outliers"],
    ),
    "ggn": (
        "Gauss-Newton matrix and classes",
        [
            "ggn_eigenvalues",
            "ggn_eigenpairs",
            "ggn_diagonal",
            "example_traces",
            "class_structure",
            "layer_class_structures",
            "ClassStructure",
        ],
    ),
    "interactions": ("Layer interactions", ["layer_interactions", "Interactions"]),
    "regulariser": (
        "Regulariser",
        [
            "add_hessian_trace",
            "add_noise_stability",
            "hessian_trace_penalty",
            "HessianTraceState",
            "NoiseStabilityState",
        ],
    ),
    "objectives": (
        "Objectives",
        ["Objective", "cross_entropy", "CrossEntropy", "Logits", "squared_error", "SquaredError", "Criterion"],
    ),
    "batches": ("Batches", ["Batches"]),
    "layers": ("Layers and groups", ["layer_names", "middle_layers", "part", "subtree"]),
}
# Public modules, {page: (title, module)}; their own public names are their reference.
MODULES = {"plot": ("Plot", "jaxhess.plot"), "monitor": ("Monitor", "jaxhess.monitor")}
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
MATHJAX = "mathjax/static/mathjax/"  # inside the package django-static-mathjax, of which Django needs nothing here
_LINK = re.compile(r"\]\(([^)#]*)(#[^)]*)?\)")


def public_names() -> list[str]:
    """The names on the library's face, as ``jaxhess/__init__.py`` imports them."""
    found: list[str] = []
    for node in ast.parse((ROOT / "jaxhess" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxhess."):
            found += [alias.asname or alias.name for alias in node.names]
    return found


def on_config(config):
    """Appends the reference to the navigation."""
    titles = {**REFERENCE, **MODULES}
    config.nav.append({"Reference": [{title: f"api/{page}.md"} for page, (title, _) in titles.items()]})
    return config


def on_files(files, config):
    """Adds the pages that are made, and the files outside docs/ that pages show."""
    pages = {page: moved((ROOT / source).read_text()) for page, source in PAGES.items()}
    pages |= {f"notebooks/{path.stem}.md": notebook(path) for path in notebooks()}
    pages |= {f"api/{page}.md": content for page, content in reference().items()}
    others = {f"notebooks/{path.name}" for path in notebooks()}
    for text in (*pages.values(), *((ROOT / "docs" / path).read_text() for path in _sources())):
        others |= set(re.findall(r"\]\((?:\.\./)*(results/[^)]+)\)", text))
    others |= {"LICENSE"}
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    for path in others:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in mathjax():
        address = f"javascripts/mathjax/{path.relative_to(_mathjax_folder()).as_posix()}"
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the pages in docs/ to what lies next to docs/, as the site has it."""
    if "/" in page.file.src_uri:
        return markdown
    markdown = re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)
    return re.sub(r"\]\(\.\./(results/[^)]+)\)", r"](\1)", markdown.replace("](../README.md)", "](index.md)"))


def _sources() -> list[pathlib.Path]:
    return [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]


def moved(text: str) -> str:
    """A page of the repository's root with its links as from within docs/."""

    def link(match):
        target, anchor = match[1], match[2] or ""
        target = {source: page for page, source in PAGES.items()}.get(target, target)
        if target.startswith("notebooks/"):
            target = target.replace(".ipynb", ".md")
        return f"]({target.removeprefix('docs/')}{anchor})"

    return _LINK.sub(link, text)


def notebooks() -> list[pathlib.Path]:
    """The notebooks."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook(path: pathlib.Path) -> str:
    """A notebook as a page: text, code, and its figures.

    A cell's metadata name what it draws: "figure", a picture in docs/figures that ``notebooks/render.py`` keeps, or
    "results", experiments whose kept figures it draws again.
    """
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", source))
            if len(parts) == 1:
                parts.append(f"[Download the notebook]({path.name}).")
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [f"![{alt}](../{picture})" for alt, picture in figures(cell["metadata"])]
    return "\n\n".join(parts) + "\n"


def figures(metadata: dict) -> list[tuple[str, str]]:
    """(Words, path of a picture from the site's root) of what a cell draws."""
    found = [("", f"figures/{metadata['figure']}.png")] if "figure" in metadata else []
    for name in metadata.get("results", []):
        kept = sorted(ROOT.glob(f"results/{name}-*/figure.png"))
        found += [(path.parent.name, path.relative_to(ROOT).as_posix()) for path in kept]
    return found


def reference() -> dict[str, str]:
    """{page: its content} of the reference; an error if it lacks a public name, or has one that is not there."""
    listed = [name for _, names in REFERENCE.values() for name in names]
    if sorted(listed) != sorted(public_names()):
        wrong = sorted(set(listed) ^ set(public_names()))
        raise PluginError(f"docs/hooks.py: REFERENCE must list each public name of jaxhess once; see {wrong}")
    pages = {
        page: "\n".join((f"# {title}\n", *(_entry(name) for name in names)))
        for page, (title, names) in REFERENCE.items()
    }
    return pages | {page: f"# {title}\n\n::: {module}\n" for page, (title, module) in MODULES.items()}


def _entry(name: str) -> str:
    return f"::: jaxhess.{name}\n    options:\n      heading: {name}\n"


def mathjax() -> list[pathlib.Path]:
    """The files of MathJax that the site serves: the program, its fonts, its licence."""
    folder = _mathjax_folder()
    return [
        folder / "LICENSE",
        folder / "es5" / "tex-chtml.js",
        *sorted((folder / "es5" / "output" / "chtml" / "fonts" / "woff-v2").glob("*.woff")),
    ]


def _mathjax_folder() -> pathlib.Path:
    return pathlib.Path(str(importlib.metadata.distribution("django-static-mathjax").locate_file(MATHJAX)))


class Docstrings(griffe.Extension):
    """Reads "Example:" as the code that it is, and names of the face as links."""

    def __init__(self) -> None:
        self._names = re.compile(rf"(?<!`)`({'|'.join(public_names())})`(?!`)")

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrites the docstring of a function, class or module."""
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = self._names.sub(r"[`\1`][jaxhess.\1]", text)
