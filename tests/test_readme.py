"""The README's examples run as they stand, one after the other."""

import contextlib
import io
import pathlib
import re

import jax

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    names, printed = {}, io.StringIO()
    # The tests' ban on rank promotion is no rule for the reader.
    with contextlib.redirect_stdout(printed), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    assert "dense1" in printed.getvalue() and "+-" in printed.getvalue()


def test_links_and_figures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (README.parent / target).exists(), target
