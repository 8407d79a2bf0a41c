"""The README: its examples run as they stand, print what it shows, and it stays short."""

import contextlib
import io
import pathlib
import re

import jax
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def ran():
    """The names that the examples leave, and what they print."""
    names, printed = {}, io.StringIO()
    # The tests' ban on rank promotion is no rule for the reader.
    with contextlib.redirect_stdout(printed), jax.numpy_rank_promotion("allow"):
        for language, code in BLOCKS:
            if language == "python":
                exec(compile(code, str(README), "exec"), names)
    return names, printed.getvalue()


def words_and_numbers(table):
    """A table's words without its numbers, and its numbers as they stand, without the residuals in parentheses.

    Residuals are of the size of rounding, and differ between machines.
    """
    table = re.sub(r"\([^)]*\)|-{5,}", "", table)
    number = r"(?<![\w*|^-])-?\d[\d,]*(?:\.\d+)?(?![\w^])"
    return re.sub(number, "", table).split(), re.findall(number, table)


def agree(printed, shown):
    """Whether numbers agree to half a percent, or to one unit of the last digit that is shown after a point."""
    value, expected = (float(text.replace(",", "")) for text in (printed, shown))
    unit = 10.0 ** -len(shown.partition(".")[2]) if "." in shown else 0.0
    return abs(value - expected) <= 0.005 * abs(expected) + 1.001 * unit


def test_the_quick_start_prints_what_the_readme_shows(ran):
    (shown,) = (code for language, code in BLOCKS if not language and code.startswith("layer"))
    words, numbers = words_and_numbers(shown)
    assert "fc1" in words and "exact" in words and "+-" in words and len(numbers) > 20
    printed_words, printed_numbers = words_and_numbers(ran[1])
    assert printed_words == words
    stale = [pair for pair in zip(printed_numbers, numbers, strict=True) if not agree(*pair)]
    assert not stale, f"(printed, shown in the README): {stale}; paste what the quick start prints now"


@pytest.mark.parametrize(
    ("printed", "shown", "expected"),
    [("10.27", "9.183", False), ("0.0208", "0.0199", False), ("0.004", "0.003", True), ("0.007", "0.003", False)]
    + [("332", "330", False), ("331", "330", True), ("0", "1", False), ("2,080", "2,080", True)],
)
def test_a_stale_number_is_seen(printed, shown, expected):
    assert agree(printed, shown) == expected


def test_the_penalty_was_added(ran):
    names, _ = ran
    assert names["opt_state"][0].count == 1 and float(names["opt_state"][0].penalty) > 0
    assert names["penalty"] is not None


def test_links_and_figures_are_there():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith("http") or (README.parent / target).exists(), target


def test_it_is_short():
    assert len(TEXT.split()) <= 900
    assert 90 <= len(TEXT.splitlines()) <= 130
    assert len(re.findall(r"^!\[", TEXT, re.MULTILINE)) == 1


def test_its_sections_come_in_the_order_that_a_reader_needs():
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == [
        "Install",
        "Quick start",
        "Regularise the trace",
        "Hess, G or H?",
        "Recipes and documentation",
        "Reproduce the paper",
        "Speed",
        "Development",
    ]
