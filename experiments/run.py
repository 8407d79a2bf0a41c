"""Runs an experiment by name; ``key=value`` or ``--key value`` changes its configuration.

    python -m experiments.run                                  lists the experiments
    python -m experiments.run fig1 --help                      describes one, with its keys
    python -m experiments.run fig1 model=lenet epochs=5        runs it
    python -m experiments.run fig1 model=lenet redraw=true     draws it again from the saved numbers
    python -m experiments.run fig1 model=lenet keep=true       copies the result to results/, for the repository
    eval "$(python -m experiments.run --completion bash)"      defines a command "experiments" that completes

Further keys, for every experiment: ``data_dir`` (where data sets are), ``out`` (where results go, by default
runs/EXPERIMENT-MODEL-DATASET), ``dry_run`` (says what would be trained, and for about how long), ``redraw``, ``keep``,
``overwrite`` (replaces a result that is there), and ``debug`` (shows where an error came from).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import itertools
import pathlib
import pkgutil
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

from experiments import aliases, interrupts, names, studies

NEEDED_JAX = (0, 10)  # as setup.cfg has it
BENCHES = {"bench": "study", "accuracy": "accuracy", "blocks": "blocks"}  # {experiment: module}
PROGRAM = "python -m experiments.run"
SPELLING = "Keys are typed as key=value or as --key value; several values as key=a,b or as --key a b."


@dataclasses.dataclass(frozen=True)
class Options:
    """Where results go and what is done with them.

    Attributes:
      out: folder of the results; by default in runs/, named after the experiment.
      data_dir: folder of the data sets; by default the environment variable JAXHESS_DATA_DIR, then that of TensorFlow
        Datasets.
      dry_run: print what would be trained, what is there already, and about how long the rest takes; compute nothing.
      redraw: draw from the saved numbers, of results/ where there are no others; compute nothing.
      keep: copy the result to results/ at the end: settings, numbers and figure, for the repository.
      overwrite: replace a result in the folder; nets that were trained in the same way are taken again.
      debug: let errors through with their traceback.
    """

    out: str = ""
    data_dir: str = ""
    dry_run: bool = False
    redraw: bool = False
    keep: bool = False
    overwrite: bool = False
    debug: bool = False


def experiments() -> dict[str, str]:
    """The experiments, {name: one line about it}."""
    return {name: inspect.getdoc(load(name)).splitlines()[0] for name in _modules()}


def _modules():
    """{experiment: its module, for an alias that of the experiment which it stands for}."""
    found = {module.name: f"{studies.__name__}.{module.name}" for module in pkgutil.iter_modules(studies.__path__)}
    found |= {name: f"experiments.bench.{module}" for name, module in BENCHES.items()}
    found |= {name: found[alias.experiment] for name, alias in aliases.ALIASES.items()}
    return dict(sorted(found.items()))


@lru_cache
def load(name: str) -> ModuleType:
    """The module of an experiment; ValueError that lists them if there is none of this name."""
    modules = _modules()
    names.check("experiment", name, modules)
    module = importlib.import_module(modules[name])
    return aliases.module(name, module) if name in aliases.ALIASES else module


# ---- words ----


def parse(words: Sequence[str], *kinds: type, program: str = PROGRAM) -> tuple[Any, ...]:
    """Configurations from the words of a command line.

    Args:
      words: such as "epochs=5", "redraw=true", "dataset=mnist,fashion_mnist", or "--epochs", "5", "--redraw".
      *kinds: dataclasses; their fields of types int, float, bool, str, Literal or a tuple of these are the keys.
      program: how the command is named.

    Returns:
      An instance of each of ``kinds``; its defaults where no word says otherwise.

    Raises:
      ValueError: for a word that belongs to no key, an unknown key, one that is given twice, a value of another type
        or an unknown name; it says what was probably meant.
    """
    said, words = io.StringIO(), list(_spelled(words, _keys(kinds)))
    try:
        with contextlib.redirect_stderr(said):
            found = _tyro(words, kinds, program)
    except SystemExit:
        raise ValueError(_one_line(said.getvalue())) from None
    return tuple(getattr(found, field.name) for field in dataclasses.fields(found))


def _tyro(words, kinds, program):
    import tyro  # here, not above: an interrupt while libraries are imported ends in one line too

    fields = [
        (title, tyro.conf.OmitArgPrefixes[kind], dataclasses.field(default_factory=kind))
        for title, kind in zip(("experiment", "run"), kinds, strict=False)
    ]
    command = dataclasses.make_dataclass("Command", fields)
    return tyro.cli(command, args=words, prog=program, description="", use_underscores=True)


def _keys(kinds):
    """{key: (the type of one value, whether it has several)} of the fields that a word can give."""
    found = {}
    for kind in kinds:
        for name, hint in typing.get_type_hints(kind).items():
            several = typing.get_origin(hint) is tuple
            item = typing.get_args(hint)[0] if several else hint
            if item in (int, float, bool, str) or typing.get_origin(item) is typing.Literal:
                found[name] = item, several
    return found


def _spelled(words: Sequence[str], keys: Mapping[str, tuple[Any, bool]]) -> Iterator[str]:
    """``key=value`` as ``--key value``, once the key and names are known to be there; other words as they are."""
    given = set()
    for before, word in itertools.pairwise(["", *words]):
        key, equals, text = word.partition("=")
        if word.startswith("-") or not equals or (before.startswith("--") and key not in keys):
            yield word
            continue
        names.check("key", key, keys)
        if key in given:
            raise ValueError(f"key {key!r} is given twice")
        given.add(key)
        item, several = keys[key]
        values = [value for value in text.split(",") if value] if several else [text]
        choices = ("true", "false") if item is bool else typing.get_args(item)
        for value in values if choices else ():
            names.check(f"value of {key}" if item is bool else key, value, choices)
        if item is bool:
            yield f"--{key}" if text == "true" else f"--no_{key}"
        else:
            yield from [f"--{key}", *values] if several else [f"--{key}={text}"]


def _one_line(said):
    """The message in the box that tyro draws, and the keys that it thinks were meant."""
    title, *lines = (line.strip("│ ") for line in said.strip().splitlines())
    if not lines[0].strip("-"):
        lines = lines[1:]  # a box without corners, where the output cannot show them
    message = " ".join(itertools.takewhile(lambda line: line.strip("─-"), lines))
    meant = re.findall(r"^(--\w+)", "\n".join(lines), re.MULTILINE) if "Unrecognized" in title else []
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    return re.sub(r"^Error parsing (?:experiment: )?", "", message) + hint


# ---- commands ----


def main(words: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 2 for what the user can mend, 130 after Ctrl-C."""
    interrupts.say = interrupts.nothing_yet
    if not words or words[0] in ("-h", "--help"):
        return _guarded(lambda: print(inspect.getdoc(sys.modules[__name__]) if words else "\n".join(_listing())))
    if words[0] == "--completion":
        return _guarded(_complete, *words[1:2])
    if {"-h", "--help"} & set(words[1:]):
        return _guarded(_describe, words[0])
    debug = bool({"debug=true", "--debug"} & set(words))
    return _guarded(_run, words[0], words[1:], debug=debug)


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


def _listing():
    yield f"Experiments, run with {PROGRAM} NAME [key=value ...]:\n"
    found = experiments()
    width = max(map(len, found))
    yield from (f"  {name:{width}}  {line}" for name, line in found.items())


def _describe(name):
    module = load(name)
    width = min(100, shutil.get_terminal_size().columns)
    for paragraph in [*inspect.getdoc(module).replace("``", "").split("\n\n"), SPELLING]:
        print(paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width), end="\n\n", flush=True)
    with contextlib.suppress(SystemExit):
        _tyro(["--help"], (module.Config, Options), f"{PROGRAM} {name}")


def _complete(shell=""):
    """Prints what makes bash define a command that runs an experiment and completes names, keys and choices."""
    import tyro

    names.check("shell", shell, ("bash",))
    commands = {
        name: dataclasses.make_dataclass(name, [], bases=(load(name).Config, Options), frozen=True)
        for name in _modules()
    }
    print('experiments() { python -m experiments.run "$@"; }')
    with contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="experiments", args=["--tyro-print-completion", shell], use_underscores=True
        )


def redraw(name: str, folder: pathlib.Path) -> None:
    """Draws the result in a folder again, and prints what it says; ValueError if its numbers are not there.

    Args:
      name: of the experiment.
      folder: with config.json and the numbers; the figure is written to it.
    """
    from experiments import folders

    module = load(name)
    module.draw(folders.configured(folder, module.Config), folder)


def _run(name, words):
    module = load(name)
    from experiments import folders, store

    config, options = parse(words, module.Config, Options, program=f"{PROGRAM} {name}")
    _check_names(config, options.data_dir or None)
    folder = folders.place(options.out, _title(name, config), options.keep)
    if options.dry_run:
        _plan(module, name)(config, folder, options.data_dir or None).show()
        return
    settings, defaults = ({"experiment": name} | folders.plain(values) for values in (config, module.Config()))
    if options.keep and not options.redraw and not options.overwrite:
        folders.check(folders.kept(folder), settings, defaults)
    store.check_writable(folder)
    with folders.locked(folder) as marker:
        if not options.redraw:
            call = partial(module.run, config, folder, options.data_dir or None)
            folders.compute(call, folder, marker, settings, defaults, options.overwrite)
        with folders.borrowed(folder):
            redraw(name, folder)
            if options.keep:
                folders.keep(folder, defaults, options.overwrite)
    print(f"results in {folders.kept(folder) if options.keep else folder}")


def _plan(module, name):
    """What makes the plan of an experiment: its own, or that of the figures."""
    from experiments import figures

    if hasattr(module, "plan"):
        return module.plan
    if not issubclass(module.Config, figures.Config):
        raise ValueError(f"{name} trains nothing whose time a dry run could tell")
    return figures.plan


def _check_names(config, data_dir):
    """Refuses unknown data sets, and none, before anything is loaded or trained."""
    from experiments import data

    for field in ("model", "dataset"):
        if getattr(config, field, None) == ():
            raise ValueError(f"{field} names nothing; give one name or more, as in {field}=a,b")
    found = getattr(config, "dataset", ())
    for name in [found] if isinstance(found, str) else found:
        data.check(name, data_dir)


def _title(name, config):
    parts = (getattr(config, field, ()) for field in ("model", "dataset"))
    words = ("+".join([part] if isinstance(part, str) else part).replace("/", "-").replace(":", "-") for part in parts)
    return "-".join([name, *filter(None, words)])


if __name__ == "__main__":
    interrupts.install()
    sys.exit(main(sys.argv[1:]))
