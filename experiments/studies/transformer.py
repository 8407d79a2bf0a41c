"""Curvature of the parts of a transformer, and how unlike they are, next to those of a convolutional net.

    python -m experiments.run transformer model=gpt dataset=shakespeare beside=lenet beside_dataset=mnist
    python -m experiments.run transformer model=gpt_10m dataset=shakespeare/64 by=kinds beside=none

About 10 minutes on one CPU core for the first. Not in the paper. Zhang et al. 2024 (arXiv 2402.16788) find that the
Hessian's spectra of a transformer's blocks differ dramatically, and those of a convolutional net do not. Here the
blocks are the parts of each transformer block (query, key, value, the attention's output, the two dense layers, the
norms), the embeddings and the head; those of the other net are its layers. A large net is measured by fewer blocks:
each part over the whole net (``by=kinds``), or the transformer blocks as they are (``by=blocks``). How unlike the
spectra are is the mean over all pairs of their Jensen-Shannon divergence, in shares of its largest value ln 2: as they
are, and divided by their largest eigenvalue. Since nearly all eigenvalues are close to zero, which makes all spectra
alike, it is also shown how far apart the sizes of those eigenvalues are that make the curvature (`between`). The nets
are measured before training and after it.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
import scipy.stats

import jaxhess as jh
from experiments import data, figures, measure, models, nulls, plot, report, statistics, store, train
from experiments.bench.memory import timed_peak
from experiments.plan import Plan, Training, duration

PyTree = Any
Other = Literal[*models.MODELS, "none"]
PARTS = {  # of a transformer block: the words, and where the parameters are
    "query": "attn/query",
    "key": "attn/key",
    "value": "attn/value",
    "attention out": "attn/out",
    "MLP in": "fc",
    "MLP out": "proj",
    "norms": "norm*",
}
BEFORE = {"token": "embedding", "patches": "patches", "position": "positions"}
AFTER = {"norm": "last norm", "head": "head"}
WHEN = {"start": "before training", "end": "after training"}
MEASURES = {
    "as it is": "JS of the spectra as they are",
    "/lmax": "JS of the spectra divided by their largest eigenvalue",
    "between": "decades between the eigenvalues that make the curvature",
    "decades": "decades of trace per parameter (standard deviation over blocks)",
}


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure; ``method`` and ``norm_layers`` play no part.

    Attributes:
      model: the transformer.
      dataset: the text that it reads, or the images.
      by: what is measured: "parts" of each transformer block, "kinds" of parts over all blocks, or whole "blocks".
      beside: the net that it is compared with, or "none".
      beside_dataset: the images of that net.
      beside_examples: how many of them, the same for each class; 0 for all.
      beside_epochs: passes over them.
      beside_learning_rate: learning rate of that net.
      trials: trainings of each net, with the seeds seed, seed + 1, ...
      images_per_class: sequences at which the transformer is measured.
      beside_images_per_class: images of each class at which the other net is measured.
      num_steps: Lanczos steps of each spectrum.
      num_probes: probes of each trace.
    """

    model: models.Name = "gpt"
    dataset: data.Name = "shakespeare"
    by: Literal["parts", "kinds", "blocks"] = "parts"
    beside: Other = "lenet"
    beside_dataset: data.Name = "mnist"
    beside_examples: int = 10_000
    beside_epochs: int = 6
    beside_learning_rate: float = 0.02
    trials: int = 3
    epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 0.1
    images_per_class: int = 16
    beside_images_per_class: int = 10
    num_steps: int = 32
    num_probes: int = 64


def plan(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> Plan:
    """The trainings of both nets, by net and trial."""
    other = dataclasses.replace(
        config,
        model=config.beside,
        dataset=config.beside_dataset,
        examples=config.beside_examples,
        epochs=config.beside_epochs,
        learning_rate=config.beside_learning_rate,
        images_per_class=config.beside_images_per_class,
        width=1.0,
    )
    trainings = {}
    for one in (config, other) if config.beside != "none" else (config,):
        dataset = figures.load(one, one.dataset, data_dir)
        for trial in range(config.trials):
            seeded = dataclasses.replace(one, seed=config.seed + trial)
            words = f"{figures.about(one, one.model, one.dataset)}, seed {seeded.seed}"
            trainings[one.model, trial] = Training(words, one.model, dataset, seeded, figures.net_options(one))
    return Plan(trainings, out_dir)


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the nets, measures them before and after, and saves the numbers and the spectra."""
    if config.beside == config.model:
        raise ValueError(f"beside={config.beside} is the net itself; name another one")
    todo, arrays = plan(config, out_dir, data_dir), {}
    numbers: dict[str, dict[str, Any]] = {}
    for (name, trial), training in todo.trainings.items():
        model, trained = todo.net((name, trial))
        record = numbers.setdefault(name, {"words": training.words.rpartition(", ")[0], "examples": 0, "trials": []})
        batch = measure.measure_batch(training.dataset, training.config.images_per_class, trained.batch_stats)
        record |= {"examples": len(batch["label"]), "unit": "sequences" if training.dataset.is_text else "images"}
        found: dict[str, Any] = {name: float(trained.history[name][-1]) for name in ("train_loss", "test_error")}
        for when, params in (("start", initial(model, training)), ("end", trained.params)):
            results: list[Any] = []
            take = partial(measured, config, model, params, batch, training.config.seed)
            peak, seconds = timed_peak(lambda take=take, into=results: report.seconds(lambda: into.append(take())))
            found[when], spectra = results[-1]
            found |= {f"{when}_seconds": seconds, f"{when}_mebibytes": peak}
            arrays |= measure.pack(spectra, f"{name}/{trial}/{when}")
        record["trials"].append(found)
    store.save_arrays(out_dir / "numbers.npz", arrays)
    store.save_json(out_dir / "numbers.json", numbers)


def initial(model: nn.Module, training: Training) -> PyTree:
    """The parameters from which a training starts."""
    return train.init_state(model, optax.identity(), training.config, training.dataset).params


def measured(
    config: Config, model: nn.Module, params: PyTree, batch: PyTree, seed: int
) -> tuple[dict[str, Any], dict[str, jh.Spectrum]]:
    """{block: {"parameters", "trace", "std_error", "lambda_max", "lambda_min"}} and the spectra, "total" last."""
    loss, keys = models.objective(model), jax.random.split(jax.random.key(seed))
    layers = groups(jh.layer_names(params, loss, batch), config.by)
    with measure.progress_bar("spectra") as progress:
        spectra = jh.layer_spectra(
            loss, params, batch, key=keys[0], num_steps=config.num_steps, layers=layers, progress=progress
        )
    traces = jh.layer_traces(loss, params, batch, key=keys[1], num_probes=config.num_probes, layers=layers)
    table = {
        name: {
            "parameters": spectrum.dim,
            "trace": float(traces[name].mean),
            "std_error": float(traces[name].std_error),
            "lambda_max": spectrum.lambda_max,
            "lambda_min": spectrum.lambda_min,
        }
        for name, spectrum in spectra.items()
    }
    return table, spectra


def groups(names: Sequence[str], by: str = "parts") -> dict[str, str]:
    """The blocks of a net as named selections: parts of transformer blocks, or the layers of another net as they are.

    Args:
      names: of all layers, in network order.
      by: as in `Config`.

    Returns:
      {words: selection}, in network order; of a GPT such as {"embedding": "token", "block1 query": "block1/attn/query",
      "block1 norms": "block1/norm*"}; by kinds {"query": "block*/attn/query"}.
    """
    blocks = sorted({name.split("/")[0] for name in names if "/attn/" in name}, key=lambda name: int(name[5:]))
    if not blocks:
        return {name: name for name in names}
    inside = {
        "parts": {f"{block} {words}": f"{block}/{path}" for block in blocks for words, path in PARTS.items()},
        "kinds": {words: f"block*/{path}" for words, path in PARTS.items()},
        "blocks": {block: block for block in blocks},
    }
    before, after = ({words: name for name, words in ends.items() if name in names} for ends in (BEFORE, AFTER))
    return before | inside[by] | after


# ---- how unlike the blocks are ----


def heterogeneity(spectra: Mapping[str, jh.Spectrum], *, scaled: bool = False) -> tuple[float, np.ndarray]:
    """The mean Jensen-Shannon divergence of all pairs of spectra, in shares of ln 2, and the matrix of all pairs.

    Args:
      spectra: {block: spectrum}; "total" is left out.
      scaled: whether each is divided by its largest eigenvalue first.

    Returns:
      (the mean over pairs, (blocks, blocks) with zeros on the diagonal): 0 where all are equal, 1 where no two overlap.
    """
    parts = [nulls.scaled(spec, "lmax") if scaled else spec for name, spec in spectra.items() if name != "total"]
    table = np.zeros((len(parts), len(parts)))
    for i, j in itertools.combinations(range(len(parts)), 2):
        table[i, j] = table[j, i] = jh.jensen_shannon(parts[i], parts[j], normalize=True)
    return float(table[np.triu_indices(len(parts), 1)].mean()), table


def between(spectra: Mapping[str, jh.Spectrum]) -> tuple[float, np.ndarray]:
    """How far apart the sizes of those eigenvalues are that make the curvature, in decades: mean over pairs, all pairs.

    The Wasserstein distance of log10 |lambda|, in which an eigenvalue counts by its size, so that zeros do not count.
    A spectrum that is ten times as large is one decade away.

    Args:
      spectra: as for `heterogeneity`.

    Returns:
      (the mean over pairs, (blocks, blocks)).
    """
    parts = [(np.abs(s.nodes), s.weights) for name, s in spectra.items() if name != "total"]
    sizes = [(np.log10(size[size > 0]), (size * weights)[size > 0]) for size, weights in parts]
    table = np.zeros((len(parts), len(parts)))
    for i, j in itertools.combinations(range(len(parts)), 2):
        (one, its), (other, theirs) = sizes[i], sizes[j]
        table[i, j] = table[j, i] = scipy.stats.wasserstein_distance(one, other, its, theirs)
    return float(table[np.triu_indices(len(parts), 1)].mean()), table


def decades(table: Mapping[str, Mapping[str, float]]) -> float:
    """The standard deviation over blocks of log10 of the trace per parameter; of its absolute value."""
    rates = [abs(row["trace"]) / row["parameters"] for name, row in table.items() if name != "total"]
    return float(np.std(np.log10(rates), ddof=1))


def unlike(table: Mapping[str, Mapping[str, float]], spectra: Mapping[str, jh.Spectrum]) -> dict[str, float]:
    """Each of the `MEASURES` of a net."""
    return {
        "as it is": heterogeneity(spectra)[0],
        "/lmax": heterogeneity(spectra, scaled=True)[0],
        "between": between(spectra)[0],
        "decades": decades(table),
    }


def verdict(ours: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> str:
    """Whether the blocks of one net are less alike than those of another, from trainings of both.

    Args:
      ours: {measure: one value for each training}.
      others: likewise, of the net that should be less heterogeneous.

    Returns:
      "holds" if Welch's test, with p multiplied by the number of measures, says so of all; "does not hold" if it says
      the opposite of all; "holds in part" if it says so of some; else "not decided".
    """
    sure = [one for name in ours if (one := _difference(ours[name], others[name])).p_value() * len(ours) <= 0.05]
    larger = [one for one in sure if one.mean > 0]
    if larger:
        return "holds" if len(larger) == len(ours) else "holds in part"
    return "does not hold" if len(sure) == len(ours) else "not decided"


def _difference(one, two):
    moments = [(float(np.mean(values)), float(np.std(values, ddof=1))) for values in (one, two)]
    return statistics.unpaired(*moments, len(one))


# ---- words and figure ----


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the tables from the saved numbers, and draws the blocks and the distances of all pairs."""
    numbers, arrays = store.load_json(out_dir / "numbers.json"), store.load_arrays(out_dir / "numbers.npz")
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    maps, bare = {}, {}
    for name, record in numbers.items():
        losses = [trial["train_loss"] for trial in record["trials"]]
        errors = [trial["test_error"] for trial in record["trials"]]
        print(
            f"{record['words']}, {len(losses)} trainings: training loss {report.spread(losses, '.3f')}, test error "
            f"{report.percent(errors, '.1f')} %, measured at {record['examples']} training {record['unit']}"
        )
        for when, words in WHEN.items():
            print(cost(record["trials"], when))
            tables = [trial[when] for trial in record["trials"]]
            spectra = [measure.unpack(arrays, f"{name}/{i}/{when}") for i in range(len(tables))]
            every = [unlike(*pair) for pair in zip(tables, spectra, strict=True)]
            found[name, when] = {key: [one[key] for one in every] for key in MEASURES}
            bare[name, when] = [
                unlike(table, _without_norms(spec)) for table, spec in zip(tables, spectra, strict=True)
            ]
            maps[name, when] = np.mean([between(one)[1] for one in spectra], 0)
            print(f"\n{plot.label(name)}, {words}")
            report.print_columns(rows(tables))
        print()
    for when, words in WHEN.items():
        every = [found[name, when] for name in numbers]
        lines = [[f"how unlike the blocks are, {words}", *map(plot.label, numbers)]]
        lines += [[words, *(report.spread(one[key], ".3f") for one in every)] for key, words in MEASURES.items()]
        for key in ("as it is", "/lmax", "between"):
            cells = [report.spread([one[key] for one in bare[name, when]], ".4f") for name in numbers]
            lines.append([f"{MEASURES[key]}, without norms", *cells])
        report.print_columns(lines)
        if len(every) == 1:
            continue
        claim = f"the blocks of {plot.label(config.model)} are less alike than those of {plot.label(config.beside)}"
        print(f"{claim}, {words}: {verdict(*every) if config.trials > 1 else 'not decided'}\n")
    blocks = {
        record["words"]: {
            name: [trial["end"][name] for trial in record["trials"]]
            for name in record["trials"][0]["end"]
            if name != "total"
        }
        for record in numbers.values()
    }
    pairs = {record["words"]: maps[name, "end"] for name, record in numbers.items()}
    trials = f"means (dots) of {config.trials} trainings (ticks)" if config.trials > 1 else "one training"
    title = f"Hessian of the blocks after training: {trials}"
    plot.save(plot.blocks(blocks, pairs, title), out_dir / "figure.png")


def cost(trials: Sequence[Mapping[str, Any]], when: str) -> str:
    """How long measuring took, and how much memory it held beyond the net itself, in words; the most of the trials."""
    seconds = [trial.get(f"{when}_seconds") for trial in trials]
    if None in seconds:
        return ""  # of results that were kept before it was noted
    peaks = [trial[f"{when}_mebibytes"] for trial in trials]
    memory = "" if None in peaks else f" and at most {max(peaks):,.0f} MiB"
    return f"\nmeasuring took {duration(max(seconds))}{memory}"


def _without_norms(spectra):
    """The spectra of a net without those of normalisation layers, of few parameters each."""
    return {name: spectrum for name, spectrum in spectra.items() if "norm" not in name}


def rows(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """A line a block: parameters, trace with the standard error of its probes, both ends, trace per parameter.

    Means over trainings with the standard deviation over them.
    """
    lines = [["block", "params", "trace", "its error", "lambda_max", "lambda_min", "trace / param"]]
    for name in tables[0]:
        found = [table[name] for table in tables]
        error = float(np.sqrt(np.mean([row["std_error"] ** 2 for row in found])))
        lines.append(
            [
                name,
                f"{found[0]['parameters']:,}",
                report.spread([row["trace"] for row in found], ".3g"),
                f"{error:.2g}",
                report.spread([row["lambda_max"] for row in found], ".3g"),
                report.spread([row["lambda_min"] for row in found], ".2g"),
                report.spread([row["trace"] / row["parameters"] for row in found], ".2g"),
            ]
        )
    return lines
