"""The search for the strength of a method: its grid, how it is extended, what is chosen, and what is said of it."""

import json

import numpy as np
import pytest
from helpers import made_dataset

from experiments import arms, data, models, plot, report, run, train
from experiments.studies import gamma

TINY = ["images_per_class=1", "num_probes=2", "num_steps=3"]
GRIDS = ["gammas=1e-3,1e-1", "weight_decays=1e-3,1e-1", "radii=0.05", "sigmas=0.01,0.03"]


class Small(models.MLP):
    hidden: tuple[int, ...] = (8, 8, 8)


@pytest.fixture
def small(monkeypatch):
    """A small MLP in place of LeNet, and 512 made images in place of every data set."""
    monkeypatch.setitem(models.MODELS, "lenet", Small)
    monkeypatch.setattr(data, "load", lambda name, *args, **options: made_dataset(512, 20, (28, 28, 1), 10, name))


def grid(errors, strengths=(1.0, 3.0, 9.0), extensions=2):
    """(strengths that were tried, the strength that is the best) where the mean error is a function of the strength."""
    tried = []

    def point(strength):
        tried.append(strength)
        return {"strength": strength, "trials": [{"held_out_error": errors(strength)}] * 2}

    points = gamma.search(point, strengths, extensions)
    found = [p["strength"] for p in points]
    assert found == sorted(tried) and len(set(tried)) == len(tried)
    return found, gamma.best_of(points)["strength"]


@pytest.mark.parametrize(
    ("best", "found"),
    [
        (3.0, [1, 3, 9]),
        (9.0, [1, 3, 9, 27]),
        (27.0, [1, 3, 9, 27, 81]),
        (1e6, [1, 3, 9, 27, 81]),  # two more, and no third
        (1.0, [0.33, 1, 3, 9]),
        (0.3, [0.11, 0.33, 1, 3, 9]),
        (1e-6, [0.11, 0.33, 1, 3, 9]),
    ],
)
def test_a_grid_is_extended_until_the_best_is_inside(best, found):
    strengths, chosen = grid(lambda strength: abs(np.log(strength / best)))
    assert strengths == pytest.approx(found)
    assert chosen == min(found, key=lambda s: abs(np.log(s / best)))


def test_an_end_at_which_training_diverges_is_closed():
    strengths, chosen = grid(lambda strength: 1 / strength if strength < 20 else np.nan)
    assert strengths == [1, 3, 9, 27] and chosen == 9
    strengths, chosen = grid(lambda strength: 1 / strength if strength < 5 else np.nan)
    assert strengths == [1, 3, 9] and chosen == 3


def test_grids_of_one_strength_are_extended_by_three_and_none_is_not():
    assert grid(lambda strength: -strength, (2.0,))[0] == [2, 6, 18]
    assert grid(lambda strength: -strength, (2.0,), extensions=0)[0] == [2]
    assert grid(lambda strength: 1.0, (0.0,))[0] == [0]
    assert grid(lambda strength: -strength, (1.0, 1.01))[0] == [1.0, 1.01, 2.0, 4.0]  # at least twice as much


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sigmas=0,1"], "sigmas must be one positive number or more, got (0.0, 1.0)"),
        (["radii="], "radii must be one positive number or more, got ()"),
        (["gammas=1,-1"], "gammas must be one positive number or more, got (1.0, -1.0)"),
        (["weight_decays=nan"], "weight_decays must be one positive number or more, got (nan,)"),
        (["extensions=-1"], "extensions must not be negative, got -1"),
    ],
)
def test_grids_that_make_no_sense_are_named(capsys, words, said):
    assert run.main(["gamma", *words]) == 2
    assert said in capsys.readouterr().err


def test_held_out_images_are_those_that_examples_leaves_out(small):
    config = gamma.Config(examples=50, held_out=100)
    found, whole = gamma._held_out(config, None), arms.load(gamma.Config(), None)
    assert np.bincount(found.train["label"]).tolist() == [5] * 10 and len(found.test["label"]) == 100
    trained, held, tested, all_of_them = (
        {image.tobytes() for image in part["image"]} for part in (found.train, found.test, whole.test, whole.train)
    )
    assert trained | held <= all_of_them and not trained & held and not held & tested
    assert len(gamma._held_out(gamma.Config(held_out=100), None).train["label"]) == 412
    with pytest.raises(ValueError, match="count=50 is more than these classes have"):
        gamma._held_out(gamma.Config(examples=500, held_out=100), None)


@pytest.mark.slow
def test_the_search_from_end_to_end(small, tmp_path, capsys, monkeypatch):
    words = ["gamma", f"out={tmp_path}", "epochs=2", "trials=2", "held_out=100", "extensions=1", *TINY, *GRIDS]
    assert run.main(words) == 0
    printed = capsys.readouterr().out
    for name in ("HTR", "weight decay", "SAM", "noise stability"):
        assert f"{name}, as chosen, lowers the test error: " in printed
    assert "after epoch 2: a gain of " in printed and "HTR, in times the trace of none: " in printed
    assert "on the held-out images, the same nets:\n  HTR - none: " in printed
    assert "p multiplied by the 4 tests" in printed and "80% power to find" in printed
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    added = numbers.pop("extended")
    for record in numbers["none"][0]["trials"]:
        assert len(record["held_out_error_by_epoch"]) == 2
        assert record["held_out_error_by_epoch"][-1] == pytest.approx(record["held_out_error"])
    assert set(added) == set(numbers) and sum(map(len, added.values())) >= 1 and not added["none"]
    given = {"none": [0], "htr": [1e-3, 1e-1], "l2": [1e-3, 1e-1], "sam": [0.05], "noise": [0.01, 0.03]}
    for method, points in numbers.items():
        strengths = [point["strength"] for point in points]
        assert strengths == sorted(given[method] + added[method]) and len(added[method]) <= 1
        errors = [np.mean([record["held_out_error"] for record in point["trials"]]) for point in points]
        # The test images are looked at for the chosen strength alone, with nets that the choice has not seen.
        assert not any("test_error" in record for point in points for record in point["trials"])
        tested = [len([r for r in point["tested"] if 0 <= r["test_error"] <= 1]) for point in points]
        assert sum(tested) == 2 and tested[int(np.argmin(errors))] == 2
        chosen = points[int(np.argmin(errors))]
        assert chosen["tested"][0]["trace"] != chosen["trials"][0]["trace"]
    assert (tmp_path / "figure.png").stat().st_size < 200_000
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["trained"]["noise 0.03"]["noise_stability"] == 0.03 and config["trained"]["sam 0.05"]["sam"] == 0.05
    assert {f"{m} {s:g}" for m, points in numbers.items() for s in [p["strength"] for p in points]} == set(
        config["trained"]
    )
    # What was made before grids were extended, and without noise, is drawn too.
    (tmp_path / "numbers.json").write_text(json.dumps({m: p for m, p in numbers.items() if m != "noise"}))
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained"))
    assert run.main([*words, "redraw=true"]) == 0
    printed = capsys.readouterr().out
    assert "p multiplied by the 3 tests" in printed and "noise stability" not in printed


def point(strength, error, trace=1.0):
    return {"strength": strength, "trials": [{"held_out_error": error, "trace": trace}] * 2}


def test_what_became_of_the_grid_is_said():
    points = [point(1.0, 0.2), point(3.0, 0.1), point(9.0, float("nan"))]
    assert gamma._ends(points, points[1], []) == "3 is the best of 3 strengths; training diverged at 9"
    assert gamma._ends(points[:2], points[1], [3.0]) == (
        "3 is the best of 2 strengths, of which 3 extended the grid; it is an end of the grid, beyond which the best "
        "may be"
    )


def test_strengths_that_lower_the_trace_are_counted_with_their_errors():
    points = [point(1.0, 0.1, 0.95), point(2.0, 0.1, 0.5), point(3.0, 0.3, 0.1), point(4.0, float("nan"), float("nan"))]
    said = gamma._with_trace(points, point(0.0, 0.2, 1.0))
    assert said == "the trace is lower by 10% or more at 2 of 4 strengths, and at 1 of them so is the held-out error"


def test_the_figure_of_strengths_shows_what_is_off_its_scale_and_survives_what_diverged():
    points = [point(1.0, 0.20, 3.0), point(3.0, 0.9, 0.1), point(9.0, float("nan"), float("nan"))]
    far = [point(1.0, 0.7, 0.1), point(2.0, 0.8, 0.1)]
    words = {"one": ("One", "a"), "two": ("Two", "b")}
    methods, chosen = {"one": points, "two": far}, {"one": points[0], "two": far[0]}
    effects = {"one": (-0.5, -0.9, -0.1), "two": (np.nan, np.nan, np.nan)}
    figure = plot.strengths(methods, point(0.0, 0.21, 2.0), chosen, effects, 0.1, words, "title " * 40)
    one, two, traces, _, below = figure.axes
    assert [text.get_text() for text in one.texts] == ["90", "diverged"] and [t.get_text() for t in two.texts] == [
        "70",
        "80",
    ]
    assert one.get_title() == "One" and [text.get_text() for text in traces.texts] == ["diverged"]
    assert [label.get_text() for label in below.get_yticklabels()] == ["One", "Two"]
    assert figure.get_suptitle().count("\n") >= 1


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ([0.10, 0.11, 0.121, 0.112], "helps"),
        ([0.30, 0.31, 0.321, 0.312], "hurts"),
        ([0.2001, 0.2099, 0.2202, 0.2098], "makes no difference as large as 0.1 points"),
        ([0.19, 0.22, 0.20, 0.23], "is not decided"),
        ([0.1999, 0.20991, 0.2199, 0.20991], "helps by less than 0.1 points"),
        ([0.20019, 0.2102, 0.2202, 0.2102], "hurts by less than 0.1 points"),
    ],
)
def test_outcomes_in_a_few_words(method, said):
    values = {"none": [0.20, 0.21, 0.22, 0.21], "m": method}
    assert report.outcome(report.Claim("m", "none", "m helps"), values, 4) == said
