"""How probes are shared out under a tolerance, with samples that are made up."""

import jax
import numpy as np
import pytest

from jaxhess._allocation import share_out
from jaxhess.estimates import Estimate, Plan

KEY = jax.random.key(0)
NOTHING = Estimate(0.0, 0.0, 0)


def shared(joint, alone, known=(NOTHING, NOTHING), **plan):
    """Of one layer and the sum; ``joint`` and ``alone`` give the i-th sample of either kind."""
    drawn = {-1: 0, 0: 0}

    def draw(keys, only):
        start = drawn[only]
        drawn[only] += len(keys)
        values = [(joint if only < 0 else alone)(i) for i in range(start, drawn[only])]
        return np.stack([values, np.full(len(keys), 5.0)], axis=1)

    return share_out(draw, KEY, Plan(**plan), list(known)), drawn


def test_a_layer_that_shared_probes_hardly_see_gets_its_own():
    (layer, total), drawn = shared(lambda i: 1 + 10 * (-1) ** i, lambda i: 1.0, rtol=0.1)
    assert (layer.mean, layer.std_error, layer.num_probes) == (1, 0, 8)
    assert (total.mean, total.num_probes) == (5, 16) and drawn == {-1: 16, 0: 8}


def test_a_mean_that_is_zero_by_chance_does_not_end_the_search():
    """The first samples have mean zero, so that the error of what is known is above every tolerance of it."""
    known = (Estimate(0.0, 0.1, 4), NOTHING)
    (layer, _), _ = shared(lambda i: (-1.0) ** i, lambda i: (-1.0) ** i if i < 8 else 20.0, known, rtol=0.2)
    assert layer.num_probes > 8 and layer.std_error <= 0.2 * layer.mean


@pytest.mark.parametrize("most", [4, 10, 100])
def test_no_more_probes_than_are_allowed(most):
    (layer, total), _ = shared(lambda i: (-1.0) ** i, lambda i: (-1.0) ** i, rtol=1e-3, max_probes=most)
    assert layer.num_probes == most and total.num_probes <= most
    assert layer.std_error > 1e-3 * abs(layer.mean)  # and the error says that it was not enough


def test_what_is_known_and_what_is_drawn_add_up_with_their_errors():
    known = (Estimate(3.0, 0.3, 9, "split"), NOTHING)
    (layer, _), _ = shared(lambda i: 1 + 0.4 * (-1) ** i, lambda i: 1.0, known, atol=1.0)
    error = np.std([1.4, 0.6] * 8, ddof=1) / 4
    np.testing.assert_allclose([layer.mean, layer.std_error], [4, np.hypot(0.3, error)])
    assert layer.method == "split"
