"""The versions that setup.cfg asks for are those that the code and the files beside it speak of."""

import configparser
import pathlib
import re

import pytest

from experiments import run

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")


def bounds(text):
    """{package: lower bound} of a list of requirements."""
    return dict(re.findall(r"^([\w-]+)(?:\[[\w]+\])?>=([\d.]+)", text.strip(), re.MULTILINE))


LIBRARY = bounds(CONFIG["options"]["install_requires"])
EXPERIMENTS = bounds(CONFIG["options.extras_require"]["experiments"])


def test_the_library_asks_for_four_packages():
    assert set(LIBRARY) == {"jax", "numpy", "optax", "scipy"}


def test_readme_names_the_oldest_jax():
    assert f"jax ({LIBRARY['jax']} or later)" in (ROOT / "README.md").read_text()


def test_experiments_say_at_once_which_jax_they_need():
    assert EXPERIMENTS["jax"] == ".".join(map(str, run.NEEDED_JAX))
    run._check_jax(EXPERIMENTS["jax"] + ".0")
    with pytest.raises(ValueError, match="the experiments need JAX 0.10 or later, and this is 0.7.2"):
        run._check_jax("0.7.2")


def test_the_environment_of_the_experiments_asks_for_no_less():
    found = bounds((ROOT / "requirements.txt").read_text())
    for package in ("jax", "flax", "optax", "numpy", "scipy"):
        wanted = EXPERIMENTS.get(package) or LIBRARY[package]
        assert tuple(map(int, found[package].split("."))) >= tuple(map(int, wanted.split(".")))
