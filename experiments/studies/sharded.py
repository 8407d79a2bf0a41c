"""The same measurements with a net on one device and spread over several: numbers and memory; not in the paper.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m experiments.run sharded devices=8

Parameters and batch are both spread over all devices, as in fully sharded data parallel training (FSDP): each array of
parameters along its longest axis that divides, and the batch by examples. The vectors of Lanczos lie where the
parameters lie. The flag makes so many devices of a CPU. The net is as initialised: what is tested does not depend on
training.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxhess as jh
from experiments import data, figures, measure, models, report, store
from experiments.studies import transformer

PyTree = Any
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config(figures.Scale, figures.Subject):
    """What is measured, and on how many devices.

    Attributes:
      devices: how many.
      images_per_class: sequences of text, or images of each class, in the batch.
      num_steps: Lanczos steps of each spectrum.
      num_probes: probes of each trace.
      seed: of initialisation and probes.
    """

    model: models.Name = "gpt_10m"
    dataset: data.Name = "shakespeare/64"
    devices: int = 8
    images_per_class: int = 8
    num_steps: int = 12
    num_probes: int = 4
    seed: int = 0


def run(config: Config, out_dir: pathlib.Path, data_dir: str | None = None) -> None:
    """Measures on one device and on all, and saves numbers and memory."""
    devices = found_devices(config.devices)
    dataset = figures.load(config, config.dataset, data_dir)
    model = models.build(config.model, dataset.num_classes, **figures.net_options(config))
    batch = measure.measure_batch(dataset, config.images_per_class, {})
    params = jax.jit(model.init)(jax.random.key(config.seed), batch["image"][:1])["params"]
    if len(batch["label"]) % len(devices):
        raise ValueError(
            f"{len(batch['label'])} examples cannot be spread evenly over devices={config.devices}; change "
            f"images_per_class={config.images_per_class}"
        )
    numbers = {}
    for place in (devices[:1], devices):
        mesh = Mesh(np.array(place), ("data",))
        args = spread(mesh, params), jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        record: dict[str, Any] = {"values": values(config, model, *args)}
        numbers[str(len(place))] = record | {"mebibytes": memory(config, model, *args)}
        store.save_json(out_dir / "numbers.json", numbers)


def found_devices(count: int) -> list[jax.Device]:
    """So many devices; ValueError with the remedy where JAX has fewer."""
    if len(jax.devices()) < count:
        raise ValueError(
            f"devices={count}, but JAX has {len(jax.devices())}; take fewer, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} to make them of the CPU"
        )
    return jax.devices()[:count]


def spread(mesh: Mesh, params: PyTree) -> PyTree:
    """Each array along its longest axis that divides by the number of devices; what has none, on all devices."""

    def put(x):
        axes = [axis for axis in range(x.ndim) if x.shape[axis] % mesh.size == 0]
        spec: list[str | None] = [None] * x.ndim
        if axes:
            spec[max(axes, key=lambda axis: x.shape[axis])] = "data"
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(put, params)


def values(config: Config, model: Any, params: PyTree, batch: PyTree) -> dict[str, float]:
    """{quantity: value}: loss, traces of Hess and G by kinds of parts, and the ends of the spectra."""
    loss, keys = models.objective(model), jax.random.split(jax.random.key(config.seed), 3)
    layers = transformer.groups(jh.layer_names(params, loss, batch), "kinds")
    found = {"loss": float(jax.jit(loss)(params, batch))}
    for curvature, key, words in (("hessian", keys[0], "Tr Hess"), ("ggn", keys[1], "Tr G")):
        traces = jh.layer_traces(
            loss,
            params,
            batch,
            key=key,
            num_probes=config.num_probes,
            curvature=curvature,
            layers=layers,
            method="hutchinson",
            chunk_size=1,  # a small program: spread over many devices, it takes long to compile
        )
        found |= {f"{words} {name}": float(estimate.mean) for name, estimate in traces.items()}
    few = dict(list(layers.items())[-1:])  # one of them; the whole net comes with it
    with measure.progress_bar("spectra") as progress:
        spectra = jh.layer_spectra(
            loss, params, batch, key=keys[2], num_steps=config.num_steps, layers=few, progress=progress
        )
    for name, spectrum in spectra.items():
        found |= {f"lambda_max {name}": spectrum.lambda_max, f"lambda_min {name}": spectrum.lambda_min}
    return found


def memory(config: Config, model: Any, params: PyTree, batch: PyTree) -> dict[str, float]:
    """{what: MiB on the device that holds the most}: parameters, Lanczos vectors, and what a product needs beside."""
    loss = models.objective(model)
    operator = jh.hessian(loss, params, batch)
    start = jax.tree.map(lambda x: x + 1, params)
    basis = jh.lanczos(operator, start, config.num_steps).basis
    analysis: Any = jax.jit(lambda operator, v: operator(v)).lower(operator, start).compile().memory_analysis()
    return {
        "parameters": _held(params),
        f"{config.num_steps} Lanczos vectors": _held(basis),
        "workspace of a product": analysis.temp_size_in_bytes / MIB,
    }


def _held(tree):
    """MiB of a tree on the device that holds the most of it."""
    held: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values()) / MIB


def draw(config: Config, out_dir: pathlib.Path) -> None:
    """Prints the numbers side by side, and the largest difference."""
    one, every = store.load_json(out_dir / "numbers.json").values()
    print(f"{figures.about(config, config.model, config.dataset)}, on one device and spread over {config.devices}")
    lines = [["", "1 device", f"{config.devices} devices", "difference"]]
    for name, value in one["values"].items():
        there = every["values"][name]
        lines.append([name, f"{value:.6g}", f"{there:.6g}", f"{apart(value, there):.1e}"])
    lines.append(["MiB on a device", "", "", "share"])
    for name, value in one["mebibytes"].items():
        there = every["mebibytes"][name]
        lines.append([name, f"{value:,.1f}", f"{there:,.1f}", f"{there / value:.3f}"])
    report.print_columns(lines)
    worst = max(apart(value, every["values"][name]) for name, value in one["values"].items())
    print(f"largest relative difference: {worst:.1e}")


def apart(one: float, other: float) -> float:
    """The difference of two numbers as a share of the larger."""
    return abs(one - other) / max(abs(one), abs(other), np.finfo(float).tiny)
