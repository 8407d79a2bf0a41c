"""What packages, sites and machines read: metadata, addresses, changelog, workflow, the contributing guide."""

import configparser
import datetime
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
METADATA = CONFIG["metadata"]
PYTHONS = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", METADATA["classifiers"], re.MULTILINE)


def text(path):
    return (ROOT / path).read_text()


def test_the_metadata_are_complete():
    for field in ("name", "version", "description", "author", "url", "project_urls", "license_expression", "keywords"):
        assert METADATA[field].strip(), field
    for words in ("Development Status", "Intended Audience", "Operating System", "Programming Language", "Typing"):
        assert words in METADATA["classifiers"], words
    # Setuptools refuses a licence classifier next to the expression.
    assert "License ::" not in METADATA["classifiers"] and "license" not in METADATA
    assert PYTHONS[0] == CONFIG["options"]["python_requires"].removeprefix(">=")


def test_every_address_of_the_repository_is_that_of_setup_cfg():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    found = {}
    for path in filter(None, listed.split("\0")):
        if path.endswith((".md", ".cfg", ".toml", ".yml", ".py", ".ipynb")) and (ROOT / path).exists():
            for address in re.findall(r"https://[\w.]+/[\w-]+/jaxhess(?![\w-])", text(path)):
                found.setdefault(path, set()).add(address)
    assert {"README.md", "CONTRIBUTING.md", "mkdocs.yml", "notebooks/tour.ipynb"} < set(found)
    assert set().union(*found.values()) == {METADATA["url"]}, found


def test_the_changelog_has_the_version_under_an_empty_or_filled_unreleased():
    headings = re.findall(r"^## \[(.*?)\](?: - (\S+))?$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "") and headings[1][0] == METADATA["version"]
    days = [datetime.date.fromisoformat(day) for _, day in headings[1:]]
    assert days == sorted(days, reverse=True)
    for version, _ in headings:
        assert f"\n[{version}]: {METADATA['url']}/" in text("CHANGELOG.md")


def test_the_workflow_calls_make_on_every_python():
    workflow = text(".github/workflows/checks.yml")
    (versions,) = re.findall(r"^ +python-version: \[(.*)\]$", workflow, re.MULTILINE)
    assert re.findall(r"[\d.]+", versions) == PYTHONS
    commands = re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE)
    assert commands == ["make lint", "make docs", "make test"]
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}:", text("Makefile"), re.MULTILINE), command


def test_the_files_that_the_contributing_guide_names_are_there():
    named = re.findall(r"`((?:jaxhess|experiments|docs|tests)/[\w/.]+)`", text("CONTRIBUTING.md"))
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists() or ("NAME" in path and (ROOT / path).parent.is_dir()), path


def test_the_make_targets_that_the_documents_name_are_there():
    for path in ("README.md", "CONTRIBUTING.md", "docs/experiments.md"):
        named = re.findall(r"(?:`|^)make ([a-z-]+)", text(path), re.MULTILINE)
        assert named
        for target in named:
            assert re.search(rf"^{target}:", text("Makefile"), re.MULTILINE), (path, target)


def test_the_command_line_takes_the_commands_of_the_documents():
    for package in ("tyro", "orbax.checkpoint", "tensorflow_datasets"):
        pytest.importorskip(package, reason="the extra experiments is not installed")
    from experiments import run

    page = text("docs/experiments.md")
    commands = re.findall(r"^python -m experiments\.run (\w.*)$", text("README.md") + page, re.MULTILINE)
    commands += re.findall(r"^experiments (.*)$", page, re.MULTILINE) + re.findall(
        r"^\| `(.*?)` \|", page, re.MULTILINE
    )
    assert len(commands) > 12
    for command in commands:
        name, *words = command.split("  #")[0].split()
        run.parse([word for word in words if word != "--help"], run.load(name).Config, run.Options)
    also = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| `.*` \| (.*) \|$", page, re.MULTILINE)))
    assert {"demo", *also, *(command.split()[0] for command in commands)} >= set(run.experiments()) - {"table3"}
