"""The tables of the documentation are what the kept results print, and a stale one is seen."""

import re

import pytest

from experiments import arms, folders, plot, shown, statistics
from experiments.studies import table4

PAGE = (folders.ROOT / shown.PAGE).read_text()
README = (folders.ROOT / shown.README).read_text()


@pytest.fixture(scope="module")
def outputs():
    """{name of a kept result: the lines that it prints}."""
    return {path.parent.name: shown.printed(path.parent) for path in sorted(folders.ROOT.glob("results/*/config.json"))}


def test_every_table_is_what_the_kept_results_print(outputs):
    assert len(shown.tables(PAGE)) > 15
    wrong = shown.stale(PAGE, outputs)
    assert not wrong, "\n".join(["paste what redraw=true prints:", *wrong])


@pytest.mark.parametrize(
    ("line", "digits"),
    [
        ("fc2", "33.79"),
        ("CE + HTR ", "1.89"),
        ("gamma = 0.1: test error", "17.30"),
        ("conv1", "0.0856"),
        ("fc3", "0.117"),
    ],
)
def test_a_changed_digit_is_seen(outputs, line, digits):
    (found,) = re.findall(rf"^ *{re.escape(line)}.*{re.escape(digits)}.*$", PAGE, re.MULTILINE)
    other = digits[:-1] + str((int(digits[-1]) + 1) % 10)
    (wrong,) = shown.stale(PAGE.replace(found, found.replace(digits, other)), outputs)
    assert wrong.startswith("no kept result prints: ") and other in wrong


def test_what_need_not_be_left_out_is_said(outputs, monkeypatch):
    monkeypatch.setattr(shown, "UNPRINTED", shown.UNPRINTED | {"conv1 156": "it can be printed"})
    assert shown.stale(PAGE, outputs) == ["UNPRINTED need not name: conv1 156"]


def test_intervals_in_the_text_are_what_the_kept_results_print(outputs):
    assert shown.stale_intervals(PAGE, outputs) == []
    text = "## What replicates\n\nless (95% interval 0.12 to 0.35), by 1 to 2, 3 (0.5 to 0.6),\nor (-1 to\n3)\n\n"
    text += "## Next\n(7 to 8)\n"
    printed = {"one": ["x 0.118 to 0.351 and 0.5 to 0.7"], "two": ["y -1.2 to 2.9"]}
    assert shown.stale_intervals(text, printed) == ["no kept result prints the interval 0.5 to 0.6"]
    assert len(shown.stale_intervals(text, {"one": ["0.2 to 0.3"]})) == 3
    assert "not where it was" in shown.stale_intervals("text", printed)[0]


def test_every_claim_has_one_verdict_and_a_paragraph():
    section = PAGE.split("\n## What replicates\n")[1].split("\n## ")[0]
    table, evidence = section.split("### The evidence, claim by claim")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20 and all(len(row) == 3 and row[-1] in statistics.VERDICTS for row in rows)
    places = {place for row in rows for place in re.findall(r"\((?:Figures?|Table) [\d, and]+\)", row[0])}
    assert {place for place in places if place not in evidence} == set()
    assert {"(Figure 4)", "(Figures 3, 12)", "(Table 1)", "(Table 4)"} <= places


def test_a_changed_interval_is_seen(outputs):
    assert PAGE.count("(95% interval -0.062 to 0.042)") == 1
    changed = PAGE.replace("(95% interval -0.062 to 0.042)", "(95% interval -0.062 to 0.043)")
    assert shown.stale_intervals(changed, outputs) == ["no kept result prints the interval -0.062 to 0.043"]


def test_speeds_are_those_of_the_benchmarks():
    assert shown.stale_speeds(PAGE, README) == []
    assert "| 0.22 |" in PAGE and "1.25, 0.97" in README
    assert shown.stale_speeds(PAGE.replace("| 0.22 |", "| 0.23 |"), README) == ["no benchmark prints the ratio 0.23"]
    assert shown.stale_speeds(PAGE, README.replace("1.25, 0.97", "9.25, 0.97")) == [
        "no benchmark prints the ratio 9.25"
    ]
    assert "not where it was" in shown.stale_speeds(PAGE.replace("| work |", "| job |"), README)[0]


def test_nothing_is_drawn_and_drawing_comes_back(outputs, tmp_path):
    before = plot.save
    folder = folders.ROOT / "results" / "fig2-lenet-mnist"
    picture = (folder / folders.FIGURE).stat()
    assert shown.printed(folder) == outputs[folder.name]
    assert (folder / folders.FIGURE).stat().st_mtime_ns == picture.st_mtime_ns and plot.save is before


def test_tables_are_the_blocks_without_a_language():
    text = "```\na  1\n-----\n\n b   2\n```\ntext\n```python\nx = 3\n```\n"
    assert shown.tables(text) == [["a 1", "b 2"]]
    assert shown.stale(text, {"one": ["a 1"], "two": ["b 3"]})[0] == "no kept result prints: b 2"


def test_the_page_on_coverage_names_every_kept_result_and_no_other():
    page = (folders.ROOT / "docs" / "coverage.md").read_text()
    named = {name for name in re.findall(r"`([^`]+)`", page) if re.match(r"(fig|table)\d+-|bench-", name)}
    kept = {path.parent.name for path in folders.ROOT.glob("results/*/config.json")}
    assert named <= kept, named - kept
    assert {name for name in kept if re.match(r"(fig|table)\d", name)} <= named
    rows = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 15)]


def test_the_page_on_coverage_has_every_row_of_the_tables():
    page = (folders.ROOT / "docs" / "coverage.md").read_text()
    first, last = (page.split(f"## Table{end}")[1] for end in ("s 1 to 3", " 4"))
    labels = {"vgg11_bn": "VGG11-BN", "svhn_cropped": "SVHN"}
    for part, rows in ((first, arms.ROWS), (last, table4.PAPER)):
        for row in rows:
            if rows is arms.ROWS and not arms.ROWS[row].paper:
                continue
            words = ", ".join(labels.get(name, plot.label(name)) for name in row)
            assert f"| {words} |" in part, words
