"""Runs an experiment by name; ``key=value`` changes its configuration.

    python -m experiments.run                                  lists the experiments
    python -m experiments.run fig1 --help                      describes one, with its keys
    python -m experiments.run fig1 model=lenet epochs=5        runs it
    python -m experiments.run fig1 model=lenet redraw=true     draws it again from the saved numbers
    python -m experiments.run fig1 model=lenet keep=true       copies the result to results/, for the repository

Further keys, for every experiment: ``data_dir`` (where data sets are), ``out`` (where results go, by default
runs/EXPERIMENT-MODEL-DATASET), ``redraw``, ``keep``, ``overwrite`` (replaces a result that is there), and ``debug``
(shows where an error came from).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import pkgutil
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

from experiments import configs, interrupts, names

NEEDED_JAX = (0, 10)  # as setup.cfg has it


@dataclasses.dataclass(frozen=True)
class Options:
    """What is no part of an experiment's configuration, and not kept with its results.

    Attributes:
      out: folder of the results; by default in runs/, named after the experiment.
      data_dir: folder of the data sets; by default that of `experiments.data.load`.
      redraw: draw from the saved numbers, of results/ where there are no others; compute nothing.
      keep: copy the result to results/ at the end: settings, numbers and figure, for the repository.
      overwrite: replace a result in the folder; nets that were trained in the same way are taken again.
      debug: let errors through with their traceback.
    """

    out: str = ""
    data_dir: str = ""
    redraw: bool = False
    keep: bool = False
    overwrite: bool = False
    debug: bool = False


def experiments() -> dict[str, str]:
    """The experiments, {name: one line about it}."""
    return {name: inspect.getdoc(load(name)).splitlines()[0] for name in _names()}


def _names():
    return sorted(module.name for module in pkgutil.iter_modules(configs.__path__))


def load(name: str) -> ModuleType:
    """The module of an experiment; ValueError that lists them if there is none of this name."""
    names.check("experiment", name, _names())
    return importlib.import_module(f"{configs.__name__}.{name}")


def parse(words: Sequence[str], *kinds: type) -> tuple[Any, ...]:
    """Configurations from ``key=value`` words.

    Args:
      words: such as "epochs=5", "redraw=true", "dataset=mnist,fashion_mnist".
      *kinds: dataclasses; their fields of types int, float, bool, str or tuple[one of these, ...] are the keys.

    Returns:
      An instance of each of ``kinds``; its defaults where no word says otherwise.

    Raises:
      ValueError: for a word without "=", an unknown or repeated key (listing the keys), or a value of another type.
    """
    types = [_keys(kind) for kind in kinds]
    values = [{} for _ in kinds]
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {word!r}")
        owners = [i for i, fields in enumerate(types) if key in fields]
        if not owners:
            names.check("key", key, set().union(*types))
        if key in values[owners[0]]:
            raise ValueError(f"key {key!r} is given twice")
        values[owners[0]][key] = _value(key, text, types[owners[0]][key])
    return tuple(kind(**chosen) for kind, chosen in zip(kinds, values, strict=True))


def _keys(kind):
    """{key: type} of the fields that a word can give."""

    def plain(hint):
        return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint

    hints = typing.get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if plain(hint) in (int, float, bool, str)}


def _value(key, text, kind):
    if typing.get_origin(kind) is tuple:
        return tuple(_value(key, part, typing.get_args(kind)[0]) for part in text.split(",") if part)
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        words = "true or false" if kind is bool else kind.__name__
        raise ValueError(f"{key}={text!r} is no {words}") from None


def main(words: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    interrupts.say = interrupts.nothing_yet
    if not words or words[0] in ("-h", "--help"):
        return _guarded(lambda: print(inspect.getdoc(sys.modules[__name__]) if words else "\n".join(_listing())))
    if {"-h", "--help"} & set(words[1:]):
        return _guarded(_describe, words[0])
    return _guarded(_run, words[0], words[1:], debug="debug=true" in words)


def _guarded(function, *args, debug=False):
    try:
        _check_jax(importlib.metadata.version("jax"))
        function(*args)
    except ValueError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # where another program calls `main`
        print(interrupts.say(), file=sys.stderr)
        return 130
    return 0


def _check_jax(version):
    """ValueError for a JAX that is too old for the experiments; the library takes older ones."""
    if tuple(map(int, version.split(".")[:2])) < NEEDED_JAX:
        needed = ".".join(map(str, NEEDED_JAX))
        raise ValueError(
            f"the experiments need JAX {needed} or later, and this is {version}; pip install -U -e '.[experiments]'"
        )


def _run(name, words):
    module = load(name)  # here, not above: an interrupt while JAX is imported ends in one line too
    from experiments import folders, results

    config, options = parse(words, module.Config, Options)
    _check_names(config, options.data_dir or None)
    folder = folders.place(options.out, _title(name, config), options.keep)
    settings, defaults = ({"experiment": name} | _plain(values) for values in (config, module.Config()))
    if options.keep and not options.redraw and not options.overwrite:
        folders.check(folders.kept(folder), settings, defaults)
    results.check_writable(folder)
    with folders.locked(folder) as marker:
        if not options.redraw:
            call = partial(module.run, config, folder, options.data_dir or None)
            folders.compute(call, folder, marker, settings, defaults, options.overwrite)
        with folders.borrowed(folder):
            module.draw(folder)
            if options.keep:
                folders.keep(folder, defaults, options.overwrite)
    print(f"results in {folders.kept(folder) if options.keep else folder}")


def _plain(config):
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _check_names(config, data_dir):
    """Refuses unknown nets, data sets and ways of measuring, before anything is loaded or trained."""
    from experiments import data, models

    choices = {
        "model": models.MODELS,
        "method": ("lanczos", "auto"),
        "curvature": ("hessian", "ggn"),
        "curvatures": ("hessian", "ggn", "functional"),
        "weighting": ("p", "legacy_sqrt_p"),
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for word in value if isinstance(value, tuple) else (value,):
            if field.name == "dataset":
                data.check(word, data_dir)
            elif field.name in choices:
                names.check(field.name, word, choices[field.name])


def _title(name, config):
    parts = (getattr(config, field, ()) for field in ("model", "dataset"))
    words = ("+".join([part] if isinstance(part, str) else part).replace("/", "-").replace(":", "-") for part in parts)
    return "-".join([name, *filter(None, words)])


def _listing():
    yield "Experiments, run with python -m experiments.run NAME [key=value ...]:\n"
    found = experiments()
    width = max(map(len, found))
    yield from (f"  {name:{width}}  {line}" for name, line in found.items())


def _describe(name):
    module = load(name)
    print(inspect.getdoc(module))
    print("\nKeys, with their defaults:\n")
    for kind in (module.Config, Options):
        keys, words = _keys(kind), _attributes(kind)
        for field in dataclasses.fields(kind):
            if field.name in keys:
                print(f"  {field.name}={_written(field.default)}")
                print(textwrap.fill(words[field.name], 100, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _written(default):
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else default


def _attributes(kind):
    """{field: what the docstrings of a dataclass and of its bases say about it}."""
    found = {}
    for base in reversed(kind.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for field, text in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE):
            found[field] = " ".join(text.split())
    return found


if __name__ == "__main__":
    interrupts.install()
    sys.exit(main(sys.argv[1:]))
