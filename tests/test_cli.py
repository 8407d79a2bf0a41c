"""The command line: what it shows, what it completes, and that every key is described."""

import dataclasses
import json
import pathlib
import re
import subprocess

import pytest

from experiments import data, folders, models, run

ROOT = pathlib.Path(run.__file__).parent.parent


def helped(capsys, name):
    capsys.readouterr()
    assert run.main([name, "--help"]) == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("name", sorted(run.experiments()))
def test_help_describes_every_key(name, capsys):
    """Each key has words of its own before its default, and the description is that of the experiment."""
    text = helped(capsys, name)
    module = run.load(name)
    assert module.__doc__.splitlines()[0] in text
    fields = {field.name for kind in (module.Config, run.Options) for field in dataclasses.fields(kind)} - {"penalty"}
    assert fields == set(run._keys((module.Config, run.Options)))
    for field in fields:
        entry = re.search(rf" --{field}[ ,].*?\(default: ", text).group()
        words = entry.split("]" if "]" in entry else "}" if "}" in entry else field, 1)[1]
        assert len(re.sub(r"INT|FLOAT|STR|\(default:|--\w+|,", "", words).split()) >= 2, f"--{field} says nothing"
    assert "--penalty " not in text


def test_help_shows_the_nets_and_the_data_sets(capsys):
    text = helped(capsys, "fig1").replace(", ", ",")
    assert all(name in re.search(r"--model \{(.*?)\}", text).group(1) for name in models.MODELS)
    assert "--dataset {digits,mnist,fashion_mnist,cifar10,cifar100,svhn_cropped,shakespeare,...}" in text
    assert "--method {lanczos,auto}" in text and "--redraw, --no_redraw" in text.replace(",", ", ")


def test_a_net_that_is_added_is_a_choice():
    assert set(models.MODELS) == set(models.Name.__args__)


def test_both_spellings_are_one_configuration():
    config = run.load("fig3").Config
    equals = run.parse(["model=vgg11_bn,lenet", "dataset=cifar10", "epochs=3", "norm_layers=true", "label="], config)
    dashes = ["--model", "vgg11_bn", "lenet", "--dataset", "cifar10", "--epochs", "3", "--norm-layers", "--label", ""]
    assert run.parse(dashes, config) == equals
    expected = dict(model=("vgg11_bn", "lenet"), dataset=("cifar10",), epochs=3, norm_layers=True, label="")
    assert equals == (config(**expected),)


def test_an_empty_list_and_negative_numbers():
    assert run.parse(["milestones="], run.load("demo").Config)[0].milestones == ()
    assert run.parse(["gammas=-1,-1e-3"], run.load("fig14").Config)[0].gammas == (-1.0, -1e-3)


def test_no_names_at_all_is_an_error(capsys):
    assert run.main(["fig3", "dataset="]) == 2
    assert capsys.readouterr().err == "error: dataset names nothing; give one name or more, as in dataset=a,b\n"


def test_bash_completes_experiments_keys_and_choices(capsys):
    assert run.main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    script += """
    complete() { while [ "$1" != -F ]; do shift; done; function=$2; }
    """ + script[script.rindex("\ncomplete ") :]
    script += """
    for words in "fi" "fig1 --mod" "fig1 --model vgg11" "table4 --pres"; do
        COMP_WORDS=(experiments $words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); $function
        echo "${COMPREPLY[@]}"
    done
    """
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)  # too long for -c
    first, *others = done.stdout.splitlines()
    assert {"fig1", "fig14", "fig2"} <= set(first.split()) and others == ["--model", "vgg11 vgg11_bn", "--preset"]
    assert run.main(["--completion", "fish"]) == 2


# ---- results that are kept ----


@pytest.mark.parametrize("folder", sorted(ROOT.glob("results/*")), ids=lambda folder: folder.name)
def test_kept_results_name_no_path_of_a_machine_and_fit_their_configuration(folder):
    text = (folder / "config.json").read_text()
    assert not re.search(r'"(/|~|[A-Z]:\\)', text)
    found = json.loads(text)
    config = folders.configured(folder, run.load(found["experiment"]).Config)
    for name, value in folders.plain(config).items():
        assert name not in found or found[name] == value


@pytest.mark.parametrize(
    "name", ["table4-lenet-mnist", "bench-lenet", "fig4-vgg11*-cifar10", "gamma-mlp*", "outliers*"]
)
def test_kept_results_are_drawn_again(name, tmp_path, capsys):
    (folder,) = ROOT.glob(f"results/{name}")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run.redraw(json.loads((folder / "config.json").read_text())["experiment"], tmp_path)
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_what_is_of_this_machine_is_not_kept():
    bench = run.load("bench")
    kept = folders.plain(bench.Config(peers_python="somewhere"))
    assert kept == folders.plain(bench.Config()) and "model" in kept


def test_data_sets_are_checked_by_name(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        data.check("mnits", str(tmp_path))
