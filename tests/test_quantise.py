"""The study of rounding: its quadratic forms against dense matrices, its words on made numbers, and its command."""

import helpers
import jax
import numpy as np
import pytest

from experiments import run, store
from experiments.studies import quantise
from experiments.studies.quantise import greedy

NAMES = ("fc1/w", "fc2/w")


@pytest.fixture(scope="module")
def mlp():
    return helpers.problem("mlp")


@pytest.fixture(scope="module")
def changes(mlp):
    return [quantise.change(mlp.params, name, 3) for name in NAMES]


def test_one_array_is_rounded_and_nothing_else(mlp, changes):
    for name, moved in zip(NAMES, changes, strict=True):
        layer = name.split("/")[0]
        (other,) = {"fc1", "fc2"} - {layer}
        assert not any(np.any(x) for x in [*moved[other].values(), moved[layer]["b"]])
        kernel = mlp.params[layer]["w"]
        unit = np.abs(kernel).max() / 3  # three bits: -3, ..., 3
        steps = (kernel + np.asarray(moved[layer]["w"])) / unit
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
        assert np.abs(steps).max() == pytest.approx(3, abs=1e-5)
        assert np.abs(moved[layer]["w"]).max() <= unit / 2 * (1 + 1e-5)


def test_forms_are_those_of_the_dense_matrices(mlp, changes):
    forms = quantise.quadratic_forms(mlp.objective, mlp.params, mlp.batch, changes)
    flat = np.stack([helpers.ravel(moved) for moved in changes]).astype(np.float64)
    for kind in ("ggn", "hessian"):
        np.testing.assert_allclose(forms[kind], flat @ helpers.dense(mlp, kind) @ flat.T, rtol=1e-4, atol=1e-7)
    slope = helpers.ravel(jax.grad(mlp.objective)(mlp.params, mlp.batch))
    np.testing.assert_allclose(forms["slopes"], flat @ slope, rtol=1e-4, atol=1e-7)

    # All layers at once: the form of the sum, and without interactions the sum of the forms.
    both = flat.sum(0) @ helpers.dense(mlp, "ggn") @ flat.sum(0) / 2 + flat.sum(0) @ slope
    assert quantise.predicted(forms, [0, 1], "joint") == pytest.approx(both, rel=1e-3)
    alone = sum(quantise.predicted(forms, [i], "joint") for i in range(2))
    assert quantise.predicted(forms, [0, 1], "sum") == pytest.approx(alone) != pytest.approx(both, rel=1e-3)

    scores = quantise.single_scores([2.0, 3.0], changes, forms)
    sizes = np.array([12, 12])  # 3 x 4 and 4 x 3
    np.testing.assert_allclose(scores["trace_norm"], [2, 3] * (flat**2).sum(1) / (2 * sizes), rtol=1e-5)
    np.testing.assert_allclose(scores["ggn_slope"], np.diag(forms["ggn"]) / 2 + forms["slopes"])


def test_the_greedy_order_looks_at_what_is_chosen():
    # Alone 0 is cheapest, then 1, then 2; but 1 next to 0 is dear.
    costs = {(0,): 1, (1,): 2, (2,): 3, (0, 1): 9, (0, 2): 4, (0, 1, 2): 10}
    assert greedy(3, lambda chosen: costs[tuple(sorted(chosen))]) == [0, 2, 1]


def record(noise):
    """Made numbers: four layers, of which every score but the trace is right up to a factor."""
    true = [1.0, 2.0, 3.0, 4.0]
    scores = {name: [2 * x for x in true] for name in quantise.SINGLE}
    scores |= {"trace": [4.0, 3.0, 2.0, 1.0 + noise], "trace_norm": [x * (3 + noise) for x in true]}
    order = {"layers": [0, 1, 2, 3], "true": [1.0, 4.0, 9.0, 16.0], "held_out": [2.0, 5.0, 10.0, 17.0]}
    order["predicted"] = {"sum": [1.0, 2.0 + noise, 3.0, 4.0], "joint": [1.0, 4.4, 9.9, 17.6 + noise]}
    return {
        "true": true,
        "held_out": true[::-1],
        "scores": scores,
        "forms": {"ggn": [[2.0, 0.5], [0.5, 3.0]]},
        "sets": dict.fromkeys((*quantise.ORDERS, "true"), order),
    }


def test_agreement_and_errors_of_made_numbers():
    made = record(0.0)
    found = quantise.agreement(made)
    assert found["ggn"] == pytest.approx((1, 1)) and found["trace"][0] == pytest.approx(-1)
    assert np.isnan(found["trace"][1]) and found["trace_norm"][1] == pytest.approx(2)
    assert quantise.agreement(made, "held_out")["ggn"][0] == pytest.approx(-1)
    assert quantise.set_errors(made, "joint") == pytest.approx(0.1)
    assert quantise.set_errors(made, "sum") == pytest.approx(np.median([0.5, 2 / 3, 0.75]))
    assert quantise.interactions(made) == pytest.approx(1 / 5)
    assert quantise.half(made, "trace") == 4 and quantise.half(made, "trace", "held_out") == 5


def test_verdicts_of_made_numbers():
    config = quantise.Config(bits=(3,))
    lines = quantise.claims(config, [{"3": record(noise)} for noise in (0.0, 0.01, 0.02)])
    holds = {line.split(": ")[1]: line.split(": ")[2].split(" (")[0] for line in lines}
    assert holds["dW' G dW + g' dW has a smaller error than trace/param x |dW|^2"] == "holds"
    # The same rank correlation in all trainings: no test can tell.
    assert holds["dW' G dW orders the layers better than trace/param x |dW|^2"] == "not decided"
    # The error is the larger one, once the two are exchanged.
    swapped = [record(noise) for noise in (0.0, 0.01, 0.02)]
    for one in swapped:
        one["scores"]["ggn_slope"], one["scores"]["trace_norm"] = (
            one["scores"]["trace_norm"],
            one["scores"]["ggn_slope"],
        )
    (line,) = [x for x in quantise.claims(config, [{"3": one} for one in swapped]) if "smaller error than trace" in x]
    assert "does not hold" in line


def test_too_few_bits(tmp_path):
    with pytest.raises(ValueError, match="bits=4,1 must be 2 or more"):
        quantise.run(quantise.Config(bits=(4, 1)), tmp_path)


@pytest.mark.slow
def test_from_end_to_end(tmp_path, capsys):
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: that is the question.\n" * 100)
    out = tmp_path / "out"
    words = ["epochs=2", "examples=64", "batch_size=16", "width=0.125", "images_per_class=4", "held_out=4"]
    words += ["num_probes=2", "trials=2", "bits=3", f"data_dir={tmp_path}", f"out={out}"]
    assert run.main(["quantise", *words]) == 0
    printed = capsys.readouterr().out
    assert "15 layers rounded one by one" in printed and "3 bits: for sets, interactions lower the error: " in printed
    numbers = store.load_json(out / "numbers.json")["trials"]
    assert len(numbers) == 2 and numbers[0]["3"]["true"] != numbers[1]["3"]["true"]
    one = numbers[0]["3"]
    assert one["layers"][0] == "token/embedding" and len(one["forms"]["ggn"]) == 15
    # All layers rounded: the same loss, whatever the order was.
    ends = {name: order["true"][-1] for name, order in one["sets"].items()}
    np.testing.assert_allclose(list(ends.values()), ends["true"], atol=1e-5)
    assert one["sets"]["true"]["true"][0] == min(one["true"])
    first = (out / "figure.png").read_bytes()
    assert run.main(["quantise", f"out={out}", "redraw=true"]) == 0
    assert (out / "figure.png").read_bytes() == first and len(first) < 200_000
