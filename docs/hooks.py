"""Pages of the site that are made from what is elsewhere: the README, the notebooks, the public names.

A hook of MkDocs, and an extension of griffe that reads this project's docstrings.
"""

from __future__ import annotations

import ast
import json
import pathlib
import re

import griffe
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
_ABOVE = r"\]\(\.\./(results/[^)]+)\)"


def public_names() -> dict[str, list[str]]:
    """{module: its names on the library's face}, as ``jaxhess/__init__.py`` imports them."""
    found: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "jaxhess" / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module.removeprefix("jaxhess."), []).extend(alias.name for alias in node.names)
    return found


def on_files(files, config):
    """Adds the made pages, and the files outside docs/ that they show."""
    home, others = readme()
    others += [path for page in (ROOT / "docs").glob("*.md") for path in re.findall(_ABOVE, page.read_text())]
    pages = {"index.md": home} | {f"notebooks/{path.stem}.md": notebook(path) for path in notebooks()}
    pages |= {f"api/{module}.md": api(module, names) for module, names in public_names().items()}
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    for path in (*others, *(f"notebooks/{path.name}" for path in notebooks())):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the pages in docs/ to what lies beside docs/, as the site has it."""
    return re.sub(_ABOVE, r"](\1)", markdown)


def readme() -> tuple[str, list[str]]:
    """The README with links as from within docs/, and what it shows from outside."""
    outside = []

    def moved(match):
        target = match[1]
        if target.startswith("notebooks/"):
            target = target.replace(".ipynb", ".md")
        elif not target.startswith(("http", "docs/", "#")):
            outside.append(target)
        return f"]({target.removeprefix('docs/')})"

    text = re.sub(r"\]\(([^)]+)\)", moved, (ROOT / "README.md").read_text())
    return text, outside


def notebooks() -> list[pathlib.Path]:
    """The notebooks."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook(path: pathlib.Path) -> str:
    """A notebook as a page: text, code, and the figures that ``notebooks/render.py`` keeps."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", source))
            if len(parts) == 1:
                parts.append(f"[The notebook]({path.name}), to run it.")
            continue
        parts.append(f"```python\n{source}\n```")
        if "figure" in cell["metadata"]:
            parts.append(f"![](../figures/{cell['metadata']['figure']}.png)")
    return "\n\n".join(parts)


def api(module: str, names: list[str]) -> str:
    """The reference of a module's public names."""
    members = "".join(f"\n        - {name}" for name in names)
    return f"# {module}\n\n::: jaxhess.{module}\n    options:\n      members:{members}\n"


class Docstrings(griffe.Extension):
    """Reads "Example:" as the code that it is, and names of the face as links."""

    def __init__(self) -> None:
        paths = {name: f"jaxhess.{module}.{name}" for module, names in public_names().items() for name in names}
        self._paths, self._names = paths, re.compile(rf"(?<!`)`({'|'.join(paths)})`(?!`)")

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrites the docstring of a function, class or module."""
        if obj.docstring:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = self._names.sub(lambda match: f"[`{match[1]}`][{self._paths[match[1]]}]", text)
