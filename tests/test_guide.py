"""The user guide's examples run after those of the README, and what is measured shows in what they print."""

import contextlib
import io
import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def ran():
    """The names that the examples leave, and what those of the guide print."""
    names, printed = {}, io.StringIO()
    with jax.numpy_rank_promotion("allow"):  # the tests' ban is no rule for the reader
        with contextlib.redirect_stdout(io.StringIO()):
            for code in blocks("README.md"):
                exec(compile(code, "README.md", "exec"), names)
        with contextlib.redirect_stdout(printed):
            for code in blocks("docs/guide.md"):
                exec(compile(code, "docs/guide.md", "exec"), names)
    return names, printed.getvalue()


def test_eigenpairs_satisfy_their_equation(ran):
    names, _ = ran
    params = names["params"]
    assert names["values"].shape == (3,) and set(names["vectors"]) == set(params["fc1"])
    with jax.numpy_rank_promotion("allow"):
        # The guide's operator was made before its training step.
        images = jax.vmap(names["hv"])(names["vectors"])
    for part, image in images.items():
        scaled = names["values"].reshape(-1, *[1] * (image.ndim - 1)) * names["vectors"][part]
        np.testing.assert_allclose(image, scaled, atol=1e-4)


def test_labels_from_a_tuple_and_many_batches_give_the_traces_of_one(ran):
    _, printed = ran
    traces = [tuple(map(float, found)) for found in re.findall(r"^(\S+) \+- (\S+)$", printed, re.MULTILINE)]
    assert len(traces) == 2
    (ggn, ggn_error), (hessian, hessian_error) = traces
    # The README's table says 34.61 and 21.11.
    assert abs(ggn - 34.61) < 4 * ggn_error + 1 and abs(hessian - 21.11) < 4 * hessian_error + 1


def test_the_penalty_was_added(ran):
    names, _ = ran
    state = names["opt_state"][0]
    assert int(state.count) == 1 and float(state.penalty) > 0 and int(state.skipped) == 0
