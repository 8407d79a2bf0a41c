"""The house: imports point one way, the library stands alone, and its documentation runs."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import jaxhess as jh

ROOT = pathlib.Path(jh.__file__).parent
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(ROOT)]))
ALLOWED = {"jax", "numpy", "scipy", "optax"}

# Each floor may import those above it only: DESIGN.md, "The house".
FLOORS = [
    {"_checks", "_programs", "_softmax", "_versions"},
    {"batches", "objective"},
    {"layers"},
    {"operators"},
    {"_diagnosis", "_noise"},
    {"trace"},
    {"lanczos", "structure", "regularizer"},
    {"spectrum", "transform"},
    {"distances"},
    {"summary"},
]
# By what they are, for three functions have the names of their modules.
PUBLIC = sorted(name for name, value in vars(jh).items() if not (name.startswith("_") or inspect.ismodule(value)))


def imports(path):
    """The full names of the modules that a file imports, at its top or deeper."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found.add(node.module)
            found |= {f"jaxhess.{alias.name}" for alias in node.names if node.module == "jaxhess"}
    return found


def floor(name):
    (level,) = [i for i, names in enumerate(FLOORS) if name in names]
    return level


def test_every_module_has_its_floor():
    assert set(MODULES) <= set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    siblings = {name.split(".")[1] for name in imports(ROOT / f"{module}.py") if name.startswith("jaxhess.")}
    assert "jaxhess" not in imports(ROOT / f"{module}.py")
    for sibling in siblings:
        assert floor(sibling) < floor(module), f"{module} imports {sibling}"


def test_lanczos_and_distances_know_nothing_of_networks():
    for module in ("lanczos", "distances"):
        assert not imports(ROOT / f"{module}.py") & {"jaxhess.objective", "jaxhess.layers", "jaxhess.batches"}


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_only_the_four_libraries_are_imported(module):
    roots = {name.split(".")[0] for name in imports(ROOT / f"{module}.py")}
    assert roots - set(sys.stdlib_module_names) <= ALLOWED | {"jaxhess"}


def test_the_library_alone_loads_nothing_of_the_experiments():
    forbidden = ["flax", "matplotlib", "tensorflow", "tensorflow_datasets", "sklearn", "experiments", "orbax", "tqdm"]
    code = f"import sys, jaxhess; print([name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- documentation ----


def test_public_names_are_those_that_the_library_exports():
    source = ast.parse((ROOT / "__init__.py").read_text())
    exported = [alias.asname for node in source.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(exported) == PUBLIC and {"trace", "spectrum", "lanczos"} < set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_whole(name):
    """Args and Returns, or Attributes of what is only returned; an example that runs, and a reference."""
    value = getattr(jh, name)
    documentation = inspect.getdoc(value)
    assert documentation and documentation.strip()
    if inspect.isfunction(value):
        wanted = ["Args:", "Returns:"]
        assert "    raise " not in inspect.getsource(value) or "Raises:" in documentation
    else:
        wanted = ["Args:" if "Args:" in documentation else "Attributes:"]
    places = [documentation.find(section) for section in (*wanted, "Example:", "Reference:")]
    assert -1 not in places and places == sorted(places), f"{name}: {places}"
    examples = doctest.DocTestParser().get_examples(documentation[documentation.find("Example:") :])
    assert examples and any(example.want for example in examples)
    assert documentation.split("Reference:")[1].strip()


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    found = doctest.testmod(importlib.import_module(f"jaxhess.{module}"))
    assert found.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_documented(name):
    value = getattr(jh, name)
    if not inspect.isfunction(value):
        return
    documentation = inspect.getdoc(value)
    for argument in inspect.signature(value).parameters:
        assert argument in documentation, f"{name} says nothing of {argument}"
