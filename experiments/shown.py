"""Whether the tables that the documentation shows are what the kept results print.

    python -m experiments.shown

Every line with a number in the fenced tables of ``docs/results.md`` must be one that an experiment prints from the
numbers in ``results/``, digit for digit. So must, rounded, every interval in the text of "What replicates". The numbers
of the tables on speed must be those of the benchmarks. `UNPRINTED` lists what cannot be printed again, and why. Nothing
is computed or drawn.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from experiments import folders, plot, run, store

PAGE, README = "docs/results.md", "README.md"
# {how a line of a fenced table begins: why the kept numbers do not print it}; what need not be named is an error.
UNPRINTED = {
    "table1, p multiplied by": "the page names the table, whose own line does not",
    "table2, p multiplied by": "likewise",
    "table3, p multiplied by": "likewise",
}


def printed(folder: pathlib.Path) -> list[str]:
    """The lines that ``redraw=true`` prints of a kept result, each with single spaces; no figure is drawn."""
    text = io.StringIO()
    with _no_figures(), contextlib.redirect_stdout(text):
        run.redraw(store.load_json(folder / folders.CONFIG)["experiment"], folder)
    numbers = store.load_json(folder / "numbers.json")
    lines = _before_tables_were_kept(numbers) if "summary" in numbers and "table" not in numbers else []
    return [_single(line) for line in [*lines, *text.getvalue().splitlines()]]


def _before_tables_were_kept(numbers):
    """The table of fig1 from its numbers, as it was printed when results held these alone."""
    yield f"curvature at {numbers['images']} training images, measured in {numbers['seconds_measuring']:.0f} s:"
    for name, row in numbers["summary"].items():
        traces = "  ".join("{:.4g} +- {:.2g}".format(*row[key]) for key in ("trace", "ggn_trace"))
        ends = "  ".join(f"{row[key]:.4g} ({row[f'{key}_residual']:.0e})" for key in ("lambda_max", "lambda_min"))
        distance = "-" if name == "total" else f"{row['wasserstein']:.3g}"
        yield (
            f"{name}  {row['parameters']:,}  {traces}  {ends}  {row['trace_norm2']:.4g}  {row['outliers']}  {distance}"
        )


@contextlib.contextmanager
def _no_figures() -> Iterator[None]:
    """Replaces what draws, for the time of a block."""
    drawing = {
        name: value
        for name, value in vars(plot).items()
        if inspect.isfunction(value) and value.__module__ == plot.__name__ and name != "label" and name[0] != "_"
    }
    for name in drawing:
        setattr(plot, name, lambda *args, **options: None)
    try:
        yield
    finally:
        for name, value in drawing.items():
            setattr(plot, name, value)


def tables(text: str) -> list[list[str]]:
    """The fenced tables of a page that name no language, as lines with single spaces; without rules and empty lines."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = [[_single(line) for line in block.splitlines()] for language, block in blocks if not language]
    return [[line for line in lines if line.strip(" -")] for lines in found]


def stale(text: str, outputs: Mapping[str, list[str]]) -> list[str]:
    """What is wrong with a page's fenced tables, in words; empty if nothing is.

    Args:
      text: of the page.
      outputs: {name of a kept result: the lines that it prints}.

    Returns:
      A line for each line of a table that no kept result prints, and for each entry of `UNPRINTED` that is not needed.
    """
    known = {line for lines in outputs.values() for line in lines}
    missing = [line for lines in tables(text) for line in lines if line not in known and re.search(r"\d", line)]
    needed = {start for start in UNPRINTED if any(line.startswith(start) for line in missing)}
    wrong = [line for line in missing if not line.startswith(tuple(UNPRINTED))]
    return [f"no kept result prints: {line}" for line in wrong] + [
        f"UNPRINTED need not name: {start}" for start in UNPRINTED if start not in needed
    ]


NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def stale_intervals(page: str, outputs: Mapping[str, list[str]]) -> list[str]:
    """What is wrong with the intervals in the text of "What replicates"; arguments and result as of `stale`.

    They are "95% interval A to B" and "(A to B)", with as many decimals as are shown; those in % are not looked at.
    """
    section = re.search(r"^## What replicates\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    if not section:
        return ["the section on what replicates is not where it was"]
    lines = " ".join(line for found in outputs.values() for line in found)
    known = np.array(re.findall(rf"({NUMBER}) to ({NUMBER})", lines), float)
    shown = re.findall(rf"(?:\(|95% interval )({NUMBER}) to ({NUMBER})(?=[);,])", _single(section[1]))
    return [
        f"no kept result prints the interval {' to '.join(pair)}"
        for pair in shown
        if not np.any(np.all([np.round(known[:, i], _decimals(end)) == float(end) for i, end in enumerate(pair)], 0))
    ]


def _decimals(number):
    return len(number.partition(".")[2])


def stale_speeds(page: str, readme: str) -> list[str]:
    """The numbers of the table on speed, and of the README's section, that are in no benchmark's "ours / theirs"."""
    known = {m for lines in tables(page) for line in lines for m in re.findall(r"([\d.]+) (?:ours|\w+)$", line)}
    section = re.search(r"^\| work \|.*?\n\n", page, re.DOTALL | re.MULTILINE)
    rows = [line.split("|")[3:] for line in section[0].splitlines()[2:]] if section else []
    shown = [cell.strip() for row in rows for cell in row if cell.strip()]
    sentence = re.search(r"^## Speed\n(.*?)^## ", readme, re.DOTALL | re.MULTILINE)
    shown += re.findall(r"\d+\.\d+", sentence[1]) if sentence else []
    if not rows or not sentence:
        return ["the table on speed, or the README's section, is not where it was"]
    return [f"no benchmark prints the ratio {number}" for number in shown if number not in known]


def check(root: pathlib.Path = folders.ROOT) -> list[str]:
    """All that is stale in a checkout, in words."""
    kept = sorted(path.parent for path in (root / folders.RESULTS).glob(f"*/{folders.CONFIG}"))
    outputs = {folder.name: printed(folder) for folder in kept}
    page = (root / PAGE).read_text()
    return [
        *stale(page, outputs),
        *stale_intervals(page, outputs),
        *stale_speeds(page, (root / README).read_text()),
    ]


def _single(line):
    return " ".join(line.split())


if __name__ == "__main__":
    print(*(found := check()), sep="\n")
    sys.exit(bool(found))
