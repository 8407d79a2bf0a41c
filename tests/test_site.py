"""The site: it builds, needs nothing from elsewhere, and shows every public name and every figure of the notebooks."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import sys
import urllib.parse

import pytest

import jaxhess as jh

mkdocs_build = pytest.importorskip("mkdocs.commands.build", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings")
from mkdocs.config import load_config  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
try:
    importlib.metadata.version("django-static-mathjax")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("the extra docs is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{address: text} of the built pages, and their folder."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        mkdocs_build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}, folder


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["hooks"] = module
    spec.loader.exec_module(module)
    return module


def test_nothing_is_fetched_from_elsewhere(site):
    pages, folder = site
    for address, page in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*?src=\"([^\"]*)\"|<link[^>]*?href=\"([^\"]*)\"", page)
        for target in filter(None, (a or b for a, b in fetched)):
            assert not target.startswith(("http", "//")), (address, target)
    assert (folder / "javascripts/mathjax/es5/tex-chtml.js").stat().st_size > 1_000_000
    fonts = folder / "javascripts/mathjax/es5/output/chtml/fonts/woff-v2"
    assert len(list(fonts.glob("*.woff"))) > 20
    assert "Apache License" in (folder / "javascripts/mathjax/LICENSE").read_text()


def test_formulas_reach_mathjax(site):
    page = site[0]["mathematics/index.html"]
    assert "mathjax/es5/tex-chtml.js" in page
    assert len(re.findall(r'<div class="arithmatex">', page)) >= 10
    assert len(re.findall(r'<span class="arithmatex">', page)) > 50
    outside = re.sub(r'<(div|span) class="arithmatex">.*?</\1>', "", page, flags=re.DOTALL)
    assert "$" not in re.sub(r"<script.*?</script>|<[^>]*>", "", outside, flags=re.DOTALL)


def test_every_public_name_is_in_the_reference(site, hooks):
    face = [name for name in hooks.public_names() if hasattr(jh, name)]
    assert len(face) > 30
    reference = "".join(page for address, page in site[0].items() if address.startswith("api/"))
    for name in face:
        assert f'id="jaxhess.{name}"' in reference, name
    for name in ("plot.densities", "monitor.Monitor", "monitor.jsonl"):
        assert f'id="jaxhess.{name}"' in reference, name


def test_a_name_that_the_reference_lacks_stops_the_build(hooks, monkeypatch):
    real = hooks.public_names()
    monkeypatch.setattr(hooks, "public_names", lambda: [*real, "new"])
    with pytest.raises(hooks.PluginError, match="each public name of jaxhess once.*'new'"):
        hooks.reference()


def test_signatures_wrap(site):
    page = site[0]["api/regulariser/index.html"]
    (signature,) = re.findall(r'id="jaxhess.add_hessian_trace".*?<pre>(.*?)</pre>', page, re.DOTALL)
    lines = re.sub(r"<[^>]*>", "", signature).splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 80


def test_notebooks_show_every_figure(site):
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = site[0][f"notebooks/{path.stem}/index.html"]
        named = {
            cell["metadata"]["figure"] for cell in json.loads(path.read_text())["cells"] if "figure" in cell["metadata"]
        }
        assert named
        for name in named:
            assert f"figures/{name}.png" in page
    assert len(re.findall(r"<img [^>]*results/", site[0]["notebooks/paper/index.html"])) > 10


def test_all_kept_figures_are_in_the_gallery(site):
    page = urllib.parse.unquote(site[0]["gallery/index.html"])
    drawn_in_one = ("table1", "table2", "table3")  # one figure stands for the three tables
    kept = [path.parent.name for path in ROOT.glob("results/*/figure.png")]
    for name in kept:
        assert f"results/{name}/figure.png" in page or name.startswith(drawn_in_one) or name.startswith("demo"), name


def test_the_docstring_of_the_package_lists_every_public_name(hooks):
    listed = re.findall(r"`(\w+)`", jh.__doc__)
    assert sorted(set(listed)) == sorted(name for name in hooks.public_names() if hasattr(jh, name))
