"""The folder of a run: where it is, which run has it, and how its result was made.

Runs compute in ``runs/``, which git ignores. Of a result the small files are copied to ``results/``, which the
repository holds, by ``keep=true`` alone. While a run computes, ``running.json`` holds its settings and is locked; the
system lets go of the lock however the process ends, and the file stays for the run that goes on. ``config.json`` comes
last: the settings of the result, and how it was made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

import jax

from experiments import interrupts, store

RUNS, RESULTS, ROOT = pathlib.Path("runs"), pathlib.Path("results"), pathlib.Path(__file__).parent.parent
CONFIG, RUNNING, FIGURE = "config.json", "running.json", "figure.png"
NUMBERS = ("numbers.json", "numbers.npz", "spectra.npz")
PACKAGES = ("jaxhess", "jax", "jaxlib", "numpy", "scipy", "optax", "flax")

Settings = Mapping[str, Any]
Config = TypeVar("Config")


def place(out: str, title: str, keep: bool = False) -> pathlib.Path:
    """The folder to compute in: ``out``, or one in ``runs/`` that is named after the run.

    Raises:
      ValueError: if ``out`` lies in ``results/``, without ``keep``; with it that name in ``runs/`` is taken.
    """
    folder = pathlib.Path(out) if out else RUNS / title
    resolved = folder.resolve()
    if RESULTS.resolve() not in (resolved, *resolved.parents):
        return folder
    if not keep:
        raise ValueError(
            f"{folder} is in {RESULTS}/, which holds what the repository keeps; add keep=true, and the run computes in "
            f"{RUNS / resolved.name} and copies its result to {kept(folder)} at the end"
        )
    return RUNS / resolved.name


def kept(folder: pathlib.Path) -> pathlib.Path:
    """The folder in ``results/`` for the result of a folder."""
    return RESULTS / folder.resolve().name


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[IO[str]]:
    """Makes a folder this process's own; yields its ``running.json``, open. What is left empty is removed at the end.

    Raises:
      ValueError: if another process has the folder, or it cannot be written.
    """
    path = folder / RUNNING
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker = path.open("a+")
    except OSError as error:
        raise store.unwritable(folder, error) from error
    with marker:
        if not _lock(marker, path):
            raise ValueError(f"another run has the folder {folder}; wait for its end, or take another with out=FOLDER")
        store.remove_temporaries(folder)  # of processes that were killed
        try:
            yield marker
        finally:
            if not path.stat().st_size:
                path.unlink()
                with contextlib.suppress(OSError):  # of a folder that is not empty
                    folder.rmdir()


def _lock(marker, path):
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return path.exists() and os.path.samestat(os.fstat(marker.fileno()), path.stat())  # or the other has just ended


def compute(
    call: Callable[[], Mapping[str, Any] | None],
    folder: pathlib.Path,
    marker: IO[str],
    settings: Settings,
    defaults: Settings,
    overwrite: bool = False,
) -> None:
    """Fills a folder with a result, unless it holds just this one.

    Args:
      call: computes, and writes the numbers; what it returns, if anything, is kept with the settings.
      folder: where they go.
      marker: its ``running.json``, from `locked`.
      settings: plain values that say what is computed.
      defaults: likewise; they stand for settings that a result does not name, being older than they are.
      overwrite: whether to replace a result that is there, also one of the same settings.

    Raises:
      ValueError: if the folder holds the result of other settings, or what an interrupted run of others left,
        without ``overwrite``; as ``call``.
    """
    left, before = _read(folder / RUNNING), _files(folder)
    words = _differences(left, settings, defaults) if left and before else ""
    if not overwrite:
        check(folder, settings, defaults)
        if _is_whole(folder):
            print(f"{folder} holds this result{_origin(folder)}; overwrite=true makes it anew")
            return
        if words:
            raise _other(folder, "an interrupted run", words)
    resumed = bool(left and before and not words)
    if not resumed:
        _rewrite(marker, json.dumps(settings, indent=1) + "\n")
    interrupts.say = lambda: _interrupted(folder, {} if resumed else before)
    start, made = time.monotonic(), made_with()
    try:
        found = call() or {}
    except ValueError:
        if not resumed and _files(folder) == before:  # nothing computed: the corrected command may take the folder
            _rewrite(marker, "")
        raise
    now = _files(folder)
    written = [name for name in NUMBERS if now.get(name) != before.get(name)]
    for name in {*NUMBERS, FIGURE}.difference(written):  # of what is replaced
        (folder / name).unlink(missing_ok=True)
    # The wall time of a run that went on is that of its last part.
    made |= {"wall_seconds": round(time.monotonic() - start, 1), "resumed": resumed, "files": written, "seed": 0}
    store.save_json(folder / CONFIG, {"experiment": settings["experiment"]} | made | dict(settings) | found)
    _rewrite(marker, "")


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON gives it back, without fields whose metadata say that they are not kept."""
    fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("kept", True)]
    values = dataclasses.asdict(config)
    return json.loads(json.dumps({name: values[name] for name in fields}))


def configured(folder: pathlib.Path, kind: type[Config]) -> Config:
    """The configuration of the result in a folder; fields that it does not name, being older, have their defaults."""
    found, names = store.load_json(folder / CONFIG), {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in found.items() if name in names}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check(folder: pathlib.Path, settings: Settings, defaults: Settings) -> None:
    """ValueError that says which settings differ if a folder holds the result of others; arguments as of `compute`."""
    if (folder / CONFIG).exists():
        if words := _differences(store.load_json(folder / CONFIG), settings, defaults):
            raise _other(folder, "a result", words)


@contextlib.contextmanager
def borrowed(folder: pathlib.Path) -> Iterator[None]:
    """Puts the result of the same name in ``results/`` into a folder that has none; of it the figure stays there."""
    none = not any((folder / name).exists() for name in (CONFIG, *NUMBERS)) and (kept(folder) / CONFIG).exists()
    if none:
        print(f"from {kept(folder)}, for {folder} has no result of its own")
        _copy(kept(folder), folder)
    try:
        yield
    finally:
        for name in (CONFIG, *NUMBERS) if none else ():
            (folder / name).unlink(missing_ok=True)


def keep(folder: pathlib.Path, defaults: Settings, overwrite: bool = False) -> None:
    """Copies a result to ``results/``; ValueError if one of other settings is there, without ``overwrite``."""
    if not overwrite:
        config = store.load_json(folder / CONFIG)
        check(kept(folder), {key: config.get(key, value) for key, value in defaults.items()}, defaults)
    _copy(folder, kept(folder))


def _copy(source, target):
    for name in (*NUMBERS, FIGURE, CONFIG):
        if (source / name).exists():
            with store.replacing(target / name) as temporary:
                shutil.copyfile(source / name, temporary)
        else:
            (target / name).unlink(missing_ok=True)


def made_with() -> dict[str, Any]:
    """How a result is made now: the date, the code and its versions, the machine."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "experiments/folders.py") else None
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": commit and bool(_git("status", "--porcelain", "--", "jaxhess", "experiments")),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
    }


def _git(*words):
    """What git says of the checkout; None where there is no git, or no repository."""
    command = ["git", "--no-optional-locks", "-C", ROOT, *words]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _origin(folder):
    config, now = _read(folder / CONFIG), made_with()
    if not config.get("commit"):
        return ""
    same = not (now["dirty"] or config["dirty"]) and now["commit"] == config["commit"]
    return f", made on {config['date'][:10]} by {'this code' if same else 'the code of commit ' + config['commit'][:8]}"


def _is_whole(folder):
    return all((folder / name).exists() for name in (CONFIG, *_read(folder / CONFIG).get("files", NUMBERS[:1])))


def _rewrite(marker, text):
    """In place, since the lock is on the file; if a kill cuts it off it counts as empty."""
    try:
        marker.truncate(0)
        marker.write(text)
        marker.flush()
    except OSError as error:
        raise store.unwritable(pathlib.Path(marker.name), error) from error


def _read(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _files(folder):
    """{path: what changes when it is written} of the files and checkpoints in a folder, without running.json."""
    found = {}
    for pattern in ("*", "*.checkpoints/*"):
        with contextlib.suppress(OSError):  # of what goes in the meantime
            for path in folder.glob(pattern):
                if path.is_file() and path.name != RUNNING or path.name.isdigit():
                    found[str(path.relative_to(folder))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def _interrupted(folder, before):
    if _files(folder).items() <= before.items():
        return f"interrupted; nothing was kept in {folder}"
    return f"interrupted; the same command goes on from what was kept in {folder}"


def _differences(there, settings, defaults):
    """The settings that differ, in words: "epochs is 10 there, 5 here"; empty if none does."""
    pairs = ((key, there.get(key, defaults.get(key)), value) for key, value in settings.items())
    return "; ".join(f"{key} is {_word(old)} there, {_word(new)} here" for key, old, new in pairs if old != new)


def _word(value):
    """As it is typed."""
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return value if isinstance(value, str) else json.dumps(value)


def _other(folder, what, words):
    return ValueError(
        f"{folder} holds {what} of other settings: {words}; go on with overwrite=true, or take another folder with "
        f"out=FOLDER"
    )
