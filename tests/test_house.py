"""The house: imports point one way, the library stands alone, and its documentation runs."""

import ast
import collections
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys
import tokenize

import helpers
import jax
import pytest

import jaxhess as jh
from jaxhess import _order, _slips, layers, problem

ROOT = pathlib.Path(jh.__file__).parent
MODULES = sorted(module.name for module in pkgutil.iter_modules([str(ROOT)]))
ALLOWED = {"jax", "numpy", "scipy", "optax"}

# Each floor may import those above it only.
FLOORS = [
    {"_checks", "_cover", "_indices", "_order", "_programs", "_slips", "_softmax", "_versions", "_weights"},
    {"_curves", "_factor", "_trees", "batches", "logits", "spectra"},
    {"_linear", "_recurrence", "_subspace", "_xtrace", "estimates", "layers", "objective"},
    {"_examples", "_lanczos", "criteria", "preconditioning", "selections"},
    {"_allocation", "_noise", "_products", "diagonals"},
    {"_samples", "eigenpairs", "problem"},
    {"_diagnosis", "_finite", "_sweep", "regularizer", "sharpness"},
    {"_rows", "operators", "transform"},
    {"_blocks", "_columns", "_functional", "_probing", "_scales", "gram", "stability"},
    {"classes", "interactions", "traces"},
    {"quadrature"},
    {"summary"},
    {"monitor", "plot"},
]
# What each knows of networks, beside arrays and trees: nothing.
PURE = {
    "_lanczos": {"_checks", "_linear", "_programs", "_recurrence", "_trees"},
    "spectra": {"_checks"},
    "eigenpairs": {"_checks", "_lanczos", "_linear", "_noise", "_programs", "_recurrence", "_subspace", "_trees"},
    "preconditioning": {"_checks", "_linear", "_programs", "_trees"},
}
# Imported when called, where they are.
OPTIONAL = {"monitor": {"tensorboardX", "torch"}, "plot": {"matplotlib"}}
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


def siblings(module):
    return {name.split(".")[1] for name in imports(ROOT / f"{module}.py") if name.startswith("jaxhess.")} & set(MODULES)


def all_below(module):
    """What is loaded with a module, directly or through others."""
    found, todo = set(), [module]
    while todo:
        new = siblings(todo.pop()) - found
        found |= new
        todo += new
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    for sibling in siblings(module):
        assert floor(sibling) < floor(module), f"{module} imports {sibling}"


@pytest.mark.parametrize("module", PURE)
def test_what_knows_nothing_of_networks_loads_nothing_of_them(module):
    assert all_below(module) == PURE[module]


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_a_module(module):
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jaxhess."):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            assert not node.attr.startswith("_")


def test_no_public_name_is_that_of_a_module():
    assert not set(PUBLIC) & set(MODULES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"monitor", "plot"}))
def test_modules_and_functions_stay_small(module):
    """Lines of code: no docstrings, comments, blanks."""
    path = ROOT / f"{module}.py"
    tree, lines = ast.parse(path.read_text()), code_lines(path)
    assert len(lines) <= 220
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            count = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            assert count <= 40, f"{node.name} has {count} lines"


def code_lines(path):
    with tokenize.open(path) as file:
        tokens = [t for t in tokenize.generate_tokens(file.readline) if t.type not in SILENT]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_only_the_four_libraries_are_imported(module):
    roots = {name.split(".")[0] for name in imports(ROOT / f"{module}.py")}
    assert roots - set(sys.stdlib_module_names) <= ALLOWED | OPTIONAL.get(module, set()) | {"jaxhess"}


def test_summarize_checks_once_and_walks_the_program_once(monkeypatch):
    calls = collections.Counter()

    def counted(module, name):
        function = getattr(module, name)

        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        for other in [importlib.import_module(f"jaxhess.{other}") for other in MODULES]:
            if getattr(other, name, None) is function:
                monkeypatch.setattr(other, name, call)

    once = {"pose": problem, "modules_of": layers, "first_uses": _order, "check_parameters": _slips}
    for name, module in once.items():
        counted(module, name)
    p = helpers.problem("mlp")
    jh.summarize(p.objective, p.params, p.batch, key=jax.random.key(0), num_steps=2, num_probes=2)
    assert calls == dict.fromkeys(once, 1)


def test_the_library_alone_loads_nothing_of_the_experiments():
    forbidden = ["flax", "matplotlib", "tensorflow", "tensorflow_datasets", "sklearn", "experiments", "orbax", "tqdm"]
    code = f"import sys, jaxhess; print([name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- documentation ----


def test_public_names_are_those_that_the_library_exports():
    source = ast.parse((ROOT / "__init__.py").read_text())
    exported = [alias.asname for node in source.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    exported = [name for name in exported if name is not None]
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
