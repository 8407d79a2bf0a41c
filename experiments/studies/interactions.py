"""How strongly layers are coupled in G, and which examples make the curvature; not in the paper.

    python -m experiments.run interactions model=lenet dataset=mnist

The paper looks at the diagonal blocks of the layers. The map shows the norms of all blocks G_lk, and so how much of G
lies outside the diagonal ones. Its sum over all pairs is the squared norm of G, which is found in a second way too.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
import optax
import scipy.stats

import jaxhess as jh
from experiments import figures, measure, models, plot, report, store

ROWS = 2000  # of the Gram matrix, up to which the map is exact by default
SHARES = (0.01, 0.05, 0.1)  # of the examples, of which the share in the trace is printed
POINTS = 101  # of the curves


@dataclasses.dataclass(frozen=True)
class Config(figures.Config):
    """What to train and what to measure.

    Attributes:
      method: how the map is found: "exact", by probes ("hutchinson"), or "auto": exactly if the Gram matrix has at most
        2,000 rows, which is the number of examples times that of their outputs.
      num_probes: probes for each layer, where the map is not exact.
      ranked: training images, or sequences, that are ranked by what they add to the trace.
    """

    method: Literal["auto", "exact", "hutchinson"] = "auto"
    num_probes: int = 64
    ranked: int = 500


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Trains (or finds) the net, measures, and saves the numbers."""
    dataset = figures.load(config, config.dataset, data_dir)
    model, trained = figures.net(config, config.model, dataset, out_dir)
    loss, params = models.objective(model), trained.params
    batch = measure.measure_batch(dataset, config.images_per_class, trained.batch_stats)
    total = len(dataset.train["label"])
    if not 1 <= config.ranked <= total:
        raise ValueError(f"ranked={config.ranked} must lie between 1 and the {total} training examples")
    chosen = np.random.default_rng(config.seed).choice(total, config.ranked, replace=False)
    ranked = dataset.batch({name: values[chosen] for name, values in dataset.train.items()})
    ranked |= {name: batch[name] for name in ("batch_stats",) if name in batch}
    numbers = {
        "unit": "sequences" if dataset.is_text else "images",
        "test": {name: float(trained.history[name][-1]) for name in ("test_loss", "test_error")},
        "map": _map(config, loss, params, batch),
        "examples": _examples(loss, params, ranked, figures.shown(config, model, params, batch)),
    }
    store.save_json(out_dir / "numbers.json", numbers)


def _map(config, loss, params, batch):
    """The map, and ||G||_F^2 in another way: from the eigenvalues of G, or as the trace of its square by probes."""
    keys = jax.random.split(jax.random.key(config.seed))
    rows = loss.predict(params, batch).size
    exact = config.method == "exact" or (config.method == "auto" and rows <= ROWS)
    with measure.progress_bar("layer interactions") as progress:
        found = jh.layer_interactions(
            loss,
            params,
            batch,
            method="exact" if exact else "hutchinson",
            key=keys[0],
            num_probes=config.num_probes,
            max_bytes=measure.GRAM_BYTES,
            progress=progress,
        )
    if exact:
        values = jh.ggn_eigenvalues(loss, params, batch, max_bytes=measure.GRAM_BYTES)
        squared, error = float(np.sum(values**2)), 0.0
    else:
        ggn = jh.linearize(jh.ggn(loss, params, batch), like=params)
        estimate = jh.trace(lambda v: ggn(ggn(v)), like=params, key=keys[1], num_probes=config.num_probes)
        squared, error = float(estimate.mean), float(estimate.std_error)
    table = {"norms": found.norms.tolist(), "std_error": found.std_error.tolist(), "names": list(found.names)}
    return table | {"examples": len(batch["label"]), "exact": exact, "squared_norm": [squared, error]}


def _examples(loss, params, batch, layers):
    """The shares of the trace that the hardest examples make, and how far the trace goes with the loss."""
    found = jh.example_traces(loss, params, batch)
    logits = loss.predict(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    losses = np.asarray(losses).reshape(len(losses), -1).mean(1)
    rank = scipy.stats.spearmanr(found["total"], losses).statistic
    curves = {name: cumulative(found[name]).tolist() for name in [*layers, "total"]}
    return {"count": len(losses), "rank_correlation_with_loss": float(rank), "cumulative": curves}


def cumulative(values: np.ndarray) -> np.ndarray:
    """Shares of the sum that the largest values make, at `POINTS` shares of their number from 0 to 1."""
    sums = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])])
    return np.interp(np.linspace(0, len(values), POINTS), np.arange(len(sums)), sums / sums[-1])


def pairs(names: list[str], norms: np.ndarray, count: int = 6) -> list[tuple[str, str, float, float]]:
    """The strongest pairs of layers, (one, other, share of ||G||_F^2, cosine).

    The cosine of the layers' Gram matrices, <K_l, K_k> / (||K_l|| ||K_k||), is 1 where both layers see the examples
    alike.
    """
    scale = np.sqrt(np.outer(np.diag(norms), np.diag(norms)))
    cosines = np.divide(norms, scale, out=np.zeros_like(norms), where=scale > 0)
    above = sorted(zip(*np.triu_indices(len(names), 1), strict=True), key=lambda pair: -norms[pair])
    return [(names[i], names[k], 2 * norms[i, k] / norms.sum(), cosines[i, k]) for i, k in above[:count]]


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the shares and the pairs from the saved numbers, and draws the map."""
    numbers = store.load_json(out_dir / "numbers.json")
    table, examples, unit = numbers["map"], numbers["examples"], numbers["unit"]
    found = jh.Interactions(table["names"], np.array(table["norms"]), np.array(table["std_error"]))
    about = figures.about(config, config.model, config.dataset)
    print(f"{about}, test loss {numbers['test']['test_loss']:.3f}, test error {numbers['test']['test_error']:.1%}")
    _print_map(found, table, unit)
    _print_examples(examples, unit)
    how = "exact" if table["exact"] else f"{config.num_probes} probes a layer"
    title = f"{about}\nmap at {table['examples']} {unit} ({how}), shares of {examples['count']:,} {unit}"
    plot.save(plot.interactions(found, examples["cumulative"], unit, title), out_dir / "figure.png")


def _print_map(found, table, unit):
    squared, error = table["squared_norm"]
    how = "from its eigenvalues" if table["exact"] else "as the trace of G^2, by probes"
    print(f"\nG at {table['examples']} training {unit}, the map {'exact' if table['exact'] else 'by probes'}")
    print(f"share of ||G||_F^2 off the diagonal blocks: {found.off_diagonal_share:.1%}")
    apart = "" if table["exact"] else f" +- {error:.2g}"
    print(f"||G||_F^2: {found.norms.sum():.6g} as the sum over all pairs, {squared:.6g}{apart} {how}")
    rows = [
        [f"{one} - {other}", f"{share:.1%}", f"{cosine:.2f}"]
        for one, other, share, cosine in pairs(found.names, found.norms)
    ]
    report.print_columns([["strongest pairs", "share of ||G||_F^2", "cosine"], *rows])


def _print_examples(examples: Mapping, unit: str) -> None:
    print(f"\nshare of Tr G_l that the hardest of {examples['count']:,} training {unit} make:")
    rows = [
        [name, *(f"{values[round(share * (POINTS - 1))]:.0%}" for share in SHARES)]
        for name, values in examples["cumulative"].items()
    ]
    report.print_columns([["", *(f"hardest {share:.0%}" for share in SHARES)], *rows])
    rank = examples["rank_correlation_with_loss"]
    print(f"rank correlation of an example's trace with its loss: {rank:.2f}")
