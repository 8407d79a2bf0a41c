"""The arms of the paper's tables, and every experiment on the regularizer."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.stats
from chex import assert_trees_all_equal
from helpers import made_dataset

from experiments import arms, data, models, plan, recipe, report, run, tables, train

TINY = ["images_per_class=1", "num_probes=2", "num_steps=3"]
SHAPES = {"svhn_cropped": (32, 32, 3), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}


@pytest.fixture
def any_data(monkeypatch):
    """Made data in place of every data set."""

    def load(name, data_dir=None, **options):
        return made_dataset(512, 20, SHAPES.get(name, (28, 28, 1)), 100 if name == "cifar100" else 10, name)

    monkeypatch.setattr(data, "load", load)


class Small(models.MLP):
    hidden: tuple[int, ...] = (8, 8, 8)


@pytest.fixture
def small_net(monkeypatch):
    """A small MLP in place of LeNet, where the net does not matter; two probes for ten, and 64 images for 256."""
    monkeypatch.setitem(models.MODELS, "lenet", Small)
    for dataset in ("mnist", "fashion_mnist"):
        row = dataclasses.replace(arms.ROWS["lenet", dataset], num_probes=2, batch_size=64)
        monkeypatch.setitem(arms.ROWS, ("lenet", dataset), row)


@pytest.fixture
def quick_compilation():
    """Programs that are compiled several times as fast, and run slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Every arm on LeNet; on the other nets, which take long to compile, the one that has most to do. Not slow: every arm,
# every shape of images, and a net with batch norm.
QUICK = {("lenet", "svhn_cropped", "htr_l2"), ("vgg11_bn", "cifar100", "htr_middle")}
ROWS = [
    pytest.param(*names, arm, marks=[] if names[1] == "mnist" or (*names, arm) in QUICK else pytest.mark.slow)
    for names, row in arms.ROWS.items()
    for arm in arms.ARMS
    if row.paper and (names[0] == "lenet" or arm == "htr_middle")
]


@pytest.mark.parametrize(("model", "dataset", "arm"), ROWS)
def test_every_row_of_tables_1_to_3_runs_two_steps(any_data, quick_compilation, model, dataset, arm):
    made = data.load(dataset)
    made = dataclasses.replace(made, train={key: values[:8] for key, values in made.train.items()})
    settings = dataclasses.replace(arms.training(arms.Config(model, dataset, epochs=1), arm, 0), batch_size=4)
    if settings.penalty is not None:
        assert settings.penalty.num_probes >= 3 and settings.penalty.probe in ("gaussian", "rademacher")
        # One probe, from the first step: the number of probes and the start are seen to be passed on elsewhere.
        penalty = dataclasses.replace(settings.penalty, num_probes=1, start_epoch=0)
        settings = dataclasses.replace(settings, penalty=penalty)
    narrow = {} if model == "lenet" else {"width": 1 / 16}
    trained = train.train(models.build(model, made.num_classes, **narrow), made, settings, progress=False)
    assert trained.step_loss.shape == (2,) and np.isfinite(trained.step_loss).all()
    assert (settings.penalty is not None) == ("penalty" in trained.history)
    if settings.penalty is not None:
        assert np.isfinite(trained.history["penalty"]).all() and trained.history["skipped"][-1] == 0


def test_unknown_presets_and_arms_and_negative_settings():
    with pytest.raises(ValueError, match="unknown preset 'mine'"):
        arms.Config(preset="mine")
    with pytest.raises(ValueError, match="trials must be at least 1"):
        arms.Config(trials=0)
    for name in ("epochs", "learning_rate", "gamma"):
        with pytest.raises(ValueError, match=f"{name} must be .* 0 for the preset's, got -1"):
            arms.Config(**{name: -1})
    with pytest.raises(ValueError, match="unknown arm 'sam'"):
        arms.training(arms.Config(), "sam", 0)


@pytest.mark.parametrize("names", arms.ROWS)
def test_presets_are_as_printed(names):
    released, paper = (arms.Config(*names, preset=preset) for preset in ("released", "paper"))
    for arm in arms.ARMS:
        one, two = arms.training(released, arm, 3), arms.training(paper, arm, 3)
        assert one.milestone_epochs() == pytest.approx(list(arms.ROWS[names].milestones))
        assert (two.batch_size, two.learning_rate, two.augment, one.augment) == (64, 1e-2, False, True)
        assert one.epochs == two.epochs == arms.ROWS[names].epochs and one.seed == 3
        assert (one.weight_decay == 1e-3) == (arm in ("l2", "htr_l2"))
        if one.penalty is not None:
            assert one.penalty.probe == ("rademacher" if arm == "htr_l2" else "gaussian")
            assert one.penalty.every == 50 and one.penalty.layers == ("middle" if arm == "htr_middle" else "all")
    half = arms.training(dataclasses.replace(released, epochs=arms.ROWS[names].epochs // 2), "htr", 0)
    assert half.milestone_epochs() == pytest.approx([epoch / 2 for epoch in arms.ROWS[names].milestones])
    assert half.penalty.start_epoch * half.epochs == pytest.approx(arms.ROWS[names].start / 2)


def test_paired_trials_start_from_the_same_parameters_and_see_the_same_images(any_data):
    config = arms.Config(epochs=1)
    made, model = arms.load(config, None), models.build("mlp", 10)
    states = {}
    for arm in arms.ARMS:
        settings = arms.training(config, arm, 5)
        tx = recipe.optimizer(settings, 2, settings.penalty.transform(model, settings, 2) if settings.penalty else None)
        states[arm] = train.init_state(model, tx, settings, made)
    for state in states.values():
        assert_trees_all_equal(state.params, states["ce"].params)
        for key in ("key", "augment_key"):
            assert_trees_all_equal(*(jax.random.key_data(getattr(s, key)) for s in (state, states["ce"])))
    other = train.init_state(model, recipe.optimizer(settings, 2), arms.training(config, "ce", 6), made)
    assert (other.params["fc1"]["kernel"] != states["ce"].params["fc1"]["kernel"]).any()


def test_the_tables_from_end_to_end(any_data, small_net, tmp_path, capsys, monkeypatch):
    for table in ("table1", "table2", "table3"):
        words = [table, f"out={tmp_path / table}", "epochs=2", "trials=2", *TINY]
        assert run.main(words) == 0
        printed = capsys.readouterr().out
        assert "CE + HTR  " in printed and "1.25 +- 0.03" in printed and "paired t-test" in printed
    numbers = json.loads((tmp_path / "table3" / "numbers.json").read_text())
    assert list(numbers) == ["ce", "htr", "l2", "htr_l2"] and all(len(records) == 2 for records in numbers.values())
    record = numbers["htr"][0]
    assert record["gap"] == pytest.approx(record["test_error"] - 1 + record["train_accuracy"])
    assert record["lambda_max"] > 0 > record["lambda_min"] and record["trace_std_error"] > 0
    assert len(list(tmp_path.rglob("net-*.npz"))) == 10  # five arms, two trials: those of another table are taken
    # What is kept is neither trained nor measured again.
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(tables, "final", lambda *args, **options: pytest.fail("measured again"))
    again = [*words, "overwrite=true"]
    assert run.main(again) == 0 and capsys.readouterr().out.splitlines()[-1].startswith("results in")


@pytest.mark.parametrize(
    ("name", "options"), [("fig7", []), ("fig8", ["intervals=1,2"]), ("fig14", ["gammas=1e-3,1e-1"])]
)
def test_the_figures_from_end_to_end(any_data, small_net, tmp_path, capsys, name, options):
    words = [name, f"out={tmp_path / 'out'}", "epochs=2", "trials=2", *TINY, *options]
    assert run.main(words) == 0
    assert "paired t-test" in capsys.readouterr().out
    figure = tmp_path / "out" / "figure.png"
    first = figure.read_bytes()
    assert run.main([*words, "redraw=true"]) == 0 and figure.read_bytes() == first and len(first) < 200_000
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert np.shape(next(iter(numbers.values()))["test_error"]) == (2, 2)
    if name == "fig7":
        assert np.shape(numbers["CE"]["trace/total"]) == np.shape(numbers["CE"]["evaluated/train_accuracy"]) == (2, 3)
        for name in numbers:  # one that was made before the accuracy was evaluated
            del numbers[name]["evaluated/train_accuracy"]
        (tmp_path / "out" / "numbers.json").write_text(json.dumps(numbers))
        assert "during the epoch" not in capsys.readouterr().out
        assert run.main([*words, "redraw=true"]) == 0 and "during the epoch" in capsys.readouterr().out
    if name == "fig8":
        assert "f_r = 2 does as well as f_r = 1: " in capsys.readouterr().out


def test_a_training_that_diverges_does_not_stop_a_sweep(any_data, small_net, tmp_path, capsys):
    words = [f"out={tmp_path / 'fig14'}", "epochs=2", "trials=2", *TINY]
    assert run.main(["fig14", "gammas=1e30,1e-4", *words]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "fig14" / "numbers.json").read_text())
    assert np.isfinite(numbers["gamma = 0.0001"]["test_error"]).all()
    kept = numbers["gamma = 1e+30"]["test_error"]
    assert np.isnan(kept).all() if "NaN" in printed else "left out" in printed


@pytest.mark.parametrize(
    "words", [["table1", "curvature=fisher"], ["fig14", "gammas=-1"], ["gamma", "gammas=1,-1", "held_out=100"]]
)
def test_bad_settings_are_seen_before_anything_is_trained(any_data, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained"))
    assert run.main([*words, f"out={tmp_path}", *TINY]) == 2
    assert "fisher" in (err := capsys.readouterr().err) or "-1" in err


def test_table_4_from_end_to_end(any_data, small_net, tmp_path, capsys):
    words = ["table4", f"out={tmp_path}", "intervals=1,25", "num_probes=1", "steps=2", "repeats=2"]
    assert run.main(words) == 0
    printed = capsys.readouterr().out
    assert "hessian: HTR at f_r = 1 takes" in printed and "1.07" in printed


@pytest.mark.parametrize(
    ("lower", "higher", "verdict"),
    [
        ([0.10, 0.11, 0.12], [0.20, 0.22, 0.21], ": holds\n"),
        ([0.20, 0.22, 0.21], [0.10, 0.11, 0.12], ": does not hold (the opposite is seen)\n"),
        ([0.10, 0.11, 0.12], [0.11, 0.10, 0.12], ": not decided\n"),
        ([0.1000, 0.1001, 0.1002], [0.1001, 0.1001, 0.1001], ": does not hold\n"),  # within 0.1 points
        ([0.10], [0.20], ": not decided\n"),
        ([0.10, 0.11], [0.10, 0.11], ": not decided\n"),
        (
            [np.float32(x) for x in (0.1049, 0.106, 0.1102)],
            [np.float32(x) for x in (0.105, 0.1061, 0.1103)],
            ": not dec",
        ),
        ([float("nan"), 0.1, 0.2], [0.1, 0.11, 0.23], ": not decided"),
    ],
)
def test_claims_are_judged_in_words(lower, higher, verdict):
    line = report.judge(report.Claim("htr", "ce", "HTR lowers the test error"), {"htr": lower, "ce": higher})
    assert line.startswith("HTR lowers the test error") and verdict in line
    if "decided" not in verdict:
        assert "not decided" in report.judge(report.Claim("a", "b", "w"), {"a": lower, "b": higher}, tests=100)


def test_a_claim_is_judged_beside_what_the_paper_reports():
    claim = report.Claim("htr", "ce", "HTR lowers the test error")
    values = {"ce": [0.0190, 0.0191, 0.0192], "htr": [0.0180, 0.0183, 0.0183]}
    paper = report.Reported({"ce": (18.20, 0.45), "htr": (15.11, 0.22)}, 5)
    said = report.judge(claim, values, 1, paper)
    assert ": holds in part\n" in said  # 0.09 points, where the paper has 3.09
    expected = scipy.stats.ttest_ind_from_stats(15.11, 0.22, 5, 18.20, 0.45, 5, equal_var=False).pvalue
    assert f"the paper's: -3.09 points, -3.64 to -2.54, its own p = {expected:.2g}; ours - the paper's: 3.00" in said
    # Of a smaller net the size of the effect is not compared; the margin stays.
    smaller = report.judge(claim, values, 1, paper._replace(comparable=False))
    assert "its own p" in smaller and "ours" not in smaller
    assert "the paper's" not in report.judge(claim._replace(metric="trace"), values, 1, paper)


@pytest.mark.parametrize(
    ("one", "two", "verdict"),
    [
        ([0.1000, 0.1001, 0.1002], [0.1001, 0.1001, 0.1001], "holds"),
        ([0.10, 0.11, 0.12], [0.20, 0.22, 0.21], "does not hold"),
        ([0.10, 0.11, 0.12], [0.11, 0.10, 0.12], "not decided"),
        ([0.10], [0.10], "not decided"),
    ],
)
def test_that_arms_do_not_differ_is_judged_too(one, two, verdict):
    claim = report.Claim("htr", "ce", "HTR changes nothing")
    said = report.judge_no_difference(claim, {"htr": one, "ce": two})
    assert said.startswith(f"HTR changes nothing: {verdict}\n  test error htr - ce: ")


def test_any_net_and_data_set_has_settings(any_data, small_net, tmp_path, capsys):
    words = [f"out={tmp_path / 'out'}", "model=mlp", "dataset=digits", "epochs=2", "trials=2", "gamma=0.5", *TINY]
    assert run.main(["table1", *words, "examples=200", "learning_rate=0.03"]) == 0
    printed = capsys.readouterr().out
    assert "digits (200 images), 2 epochs, settings of the released scripts for VGG11" in printed
    assert "learning rate 0.03, gamma 0.5" in printed and "paper's:" not in printed
    trained = json.loads((tmp_path / "out" / "config.json").read_text())["trained"]
    assert trained["CE + HTR"]["penalty"]["gamma"] == 0.5 and trained["CE"]["learning_rate"] == 0.03
    assert trained["CE"]["images"] == 200 and trained["CE"]["batch_size"] == 64 and len(trained) == 2
    assert run.main(["table1", *words, "redraw=true"]) == 0
    assert "digits (200 images)" in capsys.readouterr().out


def test_a_narrower_net_is_another_net(any_data, tmp_path):
    made = arms.load(arms.Config(model="vgg11", dataset="cifar10"), None)
    narrow, full = (arms.Config(model="vgg11", dataset="cifar10", width=width) for width in (1 / 16, 1.0))
    assert arms.build(narrow, made) == models.build("vgg11", 10, width=1 / 16) and arms.build(full, made).width == 1
    training = arms.training(narrow, "ce", 0)
    paths = {tables.planned(config, made, "CE", training).path(tmp_path) for config in (narrow, full)}
    assert len(paths) == 2 and train.net_path("vgg11", made, training, tmp_path) in paths
    assert "VGG11 (width 0.0625) on CIFAR-10, 50 epochs" in tables.title(narrow)
    with pytest.raises(ValueError, match=r"'lenet' has no option \['width'\]"):
        arms.load(arms.Config(width=0.5), None)


def test_the_paper_has_rows_of_its_own_labels_and_sizes_alone():
    full = arms.reported(arms.Config(model="vgg11", dataset="cifar10"))
    assert full.errors["ce"] == (18.20, 0.45) and full.trials == 5 and full.comparable
    for changes in ({"width": 0.5}, {"examples": 100}):
        assert not arms.reported(arms.Config(model="vgg11", dataset="cifar10", **changes)).comparable
    coarse = {"model": "vgg11_bn", "dataset": "cifar100"}
    assert arms.reported(arms.Config(**coarse)).errors
    assert not arms.reported(arms.Config(**coarse, label="coarse_label")).errors
    assert not arms.reported(arms.Config(model="mlp")).errors


@pytest.mark.parametrize("name", ["table1", "fig7", "gamma"])
def test_a_dry_run_says_what_is_there_and_trains_nothing(any_data, small_net, tmp_path, capsys, monkeypatch, name):
    options = {
        "gamma": ["gammas=1e-3", "weight_decays=1e-3", "radii=0.05", "sigmas=0.01", "held_out=100", "extensions=0"]
    }.get(name, [])
    words = [name, f"out={tmp_path / 'out'}", "dataset=mnist", "epochs=2", "trials=1", *TINY, *options]
    plain = train.train
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained"))
    assert run.main([*words, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    count = {"table1": 2, "fig7": 2, "gamma": 10}[name]
    assert printed.count(": to train, 2 epochs of ") == count
    assert f"{count} of {count} trainings to do: about " in printed and "with the penalty" in printed
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(train, "train", plain)
    assert run.main(words) == 0
    assert f"1 of {count if name != 'gamma' else 5} trainings in " in capsys.readouterr().out
    assert run.main([*words, "dry_run=true"]) == 0
    assert printed != (again := capsys.readouterr().out) and again.count(": there, ") == count
    assert again.endswith("nothing to train\n")


def test_a_dry_run_of_an_interrupted_table_counts_from_its_checkpoint(any_data, small_net, tmp_path, capsys):
    config = arms.Config(epochs=3, trials=1)
    todo = tables.plan_table(config, ("ce", "htr"), tmp_path, None)
    kept = todo.trainings[0, "htr"].path(tmp_path).with_suffix(".checkpoints")
    (kept / "2").mkdir(parents=True)
    todo = tables.plan_table(config, ("ce", "htr"), tmp_path, None)
    todo.show()
    printed = capsys.readouterr().out
    assert "CE + HTR, trial 0: to train, from epoch 2 of 3 on" in printed and "CE, trial 0: to train, 3 ep" in printed


def test_experiments_without_trainings_say_so(tmp_path, capsys):
    assert run.main(["bench", f"out={tmp_path}", "dry_run=true"]) == 2
    assert "bench trains nothing whose time a dry run could tell" in capsys.readouterr().err


def test_figures_have_a_dry_run_too(any_data, small_net, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *args, **options: pytest.fail("trained"))
    words = [f"out={tmp_path / 'out'}", "dry_run=true", "examples=100", "batch_size=50", "epochs=1", *TINY]
    assert run.main(["fig13", "model=lenet,mlp", "dataset=digits", "trials=2", *words]) == 0
    printed = capsys.readouterr().out
    assert "MLP on digits (100 images), seed 1: to train, 1 epochs of 2 steps" in printed
    assert printed.count("to train, ") == 4 and "4 of 4 trainings to do: about " in printed
    assert run.main(["fig1", "model=lenet", "dataset=mnist", *words]) == 0
    assert "1 of 1 trainings to do" in capsys.readouterr().out


def test_every_figure_and_table_of_the_paper_has_a_name():
    assert {*(f"fig{i}" for i in range(1, 15)), *(f"table{i}" for i in range(1, 5))} <= set(run.experiments())
    for name, of, model, dataset in [
        ("fig9", "fig1", "resnet18", "cifar10"),
        ("fig10", "fig1", "densenet", "cifar10"),
        ("fig11", "fig2", "densenet", "cifar10"),
        ("fig12", "fig3", ("lenet",), ("mnist", "fashion_mnist")),
        ("fig13", "fig6", ("resnet18",), ("cifar10",)),
    ]:
        config, original = run.load(name).Config(), run.load(of)
        assert (config.model, config.dataset) == (model, dataset)
        assert isinstance(config, original.Config)
        assert all(getattr(run.load(name), part) is getattr(original, part) for part in ("run", "draw"))
        others = dataclasses.asdict(config).items() - dataclasses.asdict(original.Config()).items()
        assert {key for key, _ in others} <= {"model", "dataset"}
        assert f"python -m experiments.run {name}\n" in run.load(name).__doc__


def test_durations_are_in_words():
    assert [plan.duration(seconds) for seconds in (4.4, 99, 100, 5940, 7200)] == [
        "4 s",
        "99 s",
        "2 min",
        "99 min",
        "2.0 h",
    ]


def test_what_is_left_is_by_the_time_that_the_steps_took(any_data, small_net, tmp_path, capsys, monkeypatch):
    todo = tables.plan_table(arms.Config(epochs=2, trials=1), ("ce", "htr"), tmp_path, None)
    now, said = [100.0], []
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])

    def train_once(*args, left, **options):
        now[0] += 60  # half of the steps of one training
        said.append(left(todo.trainings[0, "ce"].steps_per_epoch))
        now[0] += 60
        return "net"

    monkeypatch.setattr(train, "train_once", train_once)
    assert todo.net((0, "ce")) == "net" and said == ["3 min left"]
    assert capsys.readouterr().out == "1 of 2 trainings in 2 min, about 2 min left\n"
    todo.net((0, "htr"))
    assert said[1] == "60 s left" and "2 of 2 trainings in 4 min, about 0 s left" in capsys.readouterr().out
