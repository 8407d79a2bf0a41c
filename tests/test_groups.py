"""Groups of parameters: every way to select some, against the dense float64 block of their entries."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import jaxhess as jh

WIDE, HEADS, WORDS, HIDDEN = 4, 2, 5, 3
KEY = jax.random.key(0)


def block_params(seed, *front):
    """One block of the transformer; or several, stacked."""

    def w(i, *shape):
        return helpers.normal([seed, i], *front, *shape, scale=0.6)

    return {
        "attn": {"qkv": {"kernel": w(0, WIDE, 3 * WIDE)}, "out": {"kernel": w(1, WIDE, WIDE)}},
        "mlp": {
            "fc": {"bias": w(2, HIDDEN), "kernel": w(3, WIDE, HIDDEN)},
            "out": {"kernel": w(4, HIDDEN, WIDE)},
        },
        "norm": {"scale": 1 + w(5, WIDE)},
    }


def block(params, x):
    y = x / jnp.sqrt(1 + (x**2).mean(-1, keepdims=True)) * params["norm"]["scale"][None, None]
    qkv = (y @ params["attn"]["qkv"]["kernel"]).reshape(*y.shape[:2], 3, HEADS, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    score = jnp.einsum("nshd,nthd->nhst", q, k)
    causal = jnp.tril(jnp.ones(score.shape[-2:], bool))[None, None]
    mixed = jnp.einsum("nhst,nthd->nshd", jax.nn.softmax(jnp.where(causal, score, -1e9)), v)
    x = x + mixed.reshape(x.shape) @ params["attn"]["out"]["kernel"]
    hidden = jnp.tanh(x @ params["mlp"]["fc"]["kernel"] + params["mlp"]["fc"]["bias"][None, None])
    return x + hidden @ params["mlp"]["out"]["kernel"]


def gpt(params, batch):
    x = params["embed"]["table"][batch["x"]]
    if "blocks" in params:
        x, _ = lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])
    else:
        for name in ("block0", "block1"):
            x = block(params[name], x)
    return x @ params["head"]["kernel"]


@functools.cache
def problem(kind):
    table, head = helpers.normal(1, WORDS, WIDE), helpers.normal(2, WIDE, WORDS)
    params = {"embed": {"table": table}, "head": {"kernel": head}}
    if kind == "scanned":
        params["blocks"] = block_params(3, 2)
    else:
        params |= {"block0": block_params(3), "block1": block_params(4)}
    batch = {"x": helpers.labels(5, WORDS, 3, 4), "label": helpers.labels(6, WORDS, 3, 4)}
    return helpers.Problem(jh.Objective(gpt, jh.cross_entropy), params, batch)


def numbers(kind):
    """The parameters' places in the flat vector, in a tree like them."""
    flat, unravel = ravel_pytree(problem(kind).params)
    return jax.tree.map(lambda x: np.asarray(x).astype(int), unravel(np.arange(flat.size, dtype=np.float32)))


def of(*trees):
    return np.concatenate([ravel_pytree(tree)[0] for tree in trees]).astype(int)


def kernels(path):
    return path.endswith("kernel")


# {what is asked for: its entries, written out by hand}
PLAIN = {
    "module": ("block0/mlp/fc", lambda n: of(n["block0"]["mlp"]["fc"])),
    "with submodules": ("block0", lambda n: of(n["block0"])),
    "deeper": ("block1/attn", lambda n: of(n["block1"]["attn"])),
    "array": ("block0/mlp/fc/kernel", lambda n: of(n["block0"]["mlp"]["fc"]["kernel"])),
    "glob": ("block*/attn/*", lambda n: of(n["block0"]["attn"], n["block1"]["attn"])),
    "glob of modules": (
        "*/out",
        lambda n: of(*(n[b][m]["out"] for b in ("block0", "block1") for m in ("attn", "mlp"))),
    ),
    "list": (["embed", "block1/norm"], lambda n: of(n["embed"], n["block1"]["norm"])),
    "list of globs": (["*/norm", "head"], lambda n: of(n["block0"]["norm"], n["block1"]["norm"], n["head"])),
    "predicate": (
        kernels,
        lambda n: of(
            *(n[b][m] for b in ("block0", "block1") for m in ("attn",)),
            n["head"],
            *(n[b]["mlp"][m]["kernel"] for b in ("block0", "block1") for m in ("fc", "out")),
        ),
    ),
    "query": (
        jh.part("block0/attn/qkv/kernel", np.s_[:, :WIDE]),
        lambda n: of(n["block0"]["attn"]["qkv"]["kernel"][:, :4]),
    ),
    "keys": (
        jh.part("*/qkv/kernel", np.s_[:, WIDE : 2 * WIDE]),
        lambda n: of(*(n[b]["attn"]["qkv"]["kernel"][:, 4:8] for b in ("block0", "block1"))),
    ),
    "rows": (jh.part("embed/table", [0, 3]), lambda n: of(n["embed"]["table"][[0, 3]])),
    "mask": (jh.part("embed/table", np.array([1, 0, 0, 1, 0], bool)), lambda n: of(n["embed"]["table"][[0, 3]])),
    "column": (jh.part("head/kernel", np.s_[..., -1]), lambda n: of(n["head"]["kernel"][:, -1])),
    "every second": (jh.part("head/kernel", np.s_[::2]), lambda n: of(n["head"]["kernel"][::2])),
    "backwards": (jh.part("head/kernel", np.s_[::-1, 1]), lambda n: of(n["head"]["kernel"][:, 1])),
    "parts and modules": (
        ["block0/norm", jh.part("head/kernel", np.s_[0]), jh.part("head/kernel", np.s_[2:])],
        lambda n: of(n["block0"]["norm"], n["head"]["kernel"][[0, 2, 3]]),
    ),
}
SCANNED = {
    "slice": ("blocks[1]/attn/qkv", lambda n: of(n["blocks"]["attn"]["qkv"]["kernel"][1])),
    "slice with submodules": ("blocks[0]", lambda n: of(jax.tree.map(lambda x: x[0], n["blocks"]))),
    "slice of an array": ("blocks[1]/mlp/fc/bias", lambda n: of(n["blocks"]["mlp"]["fc"]["bias"][1])),
    "all slices": ("blocks/attn", lambda n: of(n["blocks"]["attn"])),
    "glob": ("*/attn/*", lambda n: of(n["blocks"]["attn"])),
    "glob in a slice": (
        "blocks[1]/*/out",
        lambda n: of(*(n["blocks"][m]["out"]["kernel"][1] for m in ("attn", "mlp"))),
    ),
    "part of a slice": (
        jh.part("blocks[1]/attn/qkv/kernel", np.s_[:, 8:]),
        lambda n: of(n["blocks"]["attn"]["qkv"]["kernel"][1, :, 8:]),
    ),
    "some slices": (jh.part("blocks/mlp", np.s_[1:]), lambda n: of(jax.tree.map(lambda x: x[1:], n["blocks"]["mlp"]))),
}
CASES = [("plain", name) for name in PLAIN] + [("scanned", name) for name in SCANNED]


def case(kind, name):
    """(problem, selection, its entries sorted)."""
    selection, entries = (PLAIN if kind == "plain" else SCANNED)[name]
    return problem(kind), selection, np.sort(entries(numbers(kind)))


def dense(kind, which, entries):
    matrix = helpers.matrices(problem(kind))[which]
    return matrix[np.ix_(entries, entries)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_selection_takes_and_puts_these_entries(kind, name):
    problem, selection, entries = case(kind, name)
    part = jh.subtree(jax.tree.map(jnp.asarray, numbers(kind)), selection)
    assert np.array_equal(np.sort(ravel_pytree(part)[0]), entries)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("which", ["hessian", "ggn"])
def test_products_are_those_of_the_dense_block(kind, name, which):
    problem, selection, entries = case(kind, name)
    operator = problem.operator(which, selection)
    like = jh.subtree(problem.params, selection)
    order = ravel_pytree(jh.subtree(jax.tree.map(jnp.asarray, numbers(kind)), selection))[0].astype(int)
    _, unravel = ravel_pytree(like)
    v = helpers.normal(8, len(entries))
    found = ravel_pytree(operator(unravel(jnp.asarray(v))))[0]
    true = dense(kind, which, np.asarray(order)) @ v
    assert np.allclose(found, true, rtol=1e-3, atol=2e-5 * np.abs(true).max())


@pytest.mark.parametrize("kind", ["plain", "scanned"])
@pytest.mark.parametrize("method", ["exact", "auto", "hutchinson"])
@pytest.mark.parametrize("which", ["hessian", "ggn"])
def test_traces_of_groups(kind, method, which):
    """All groups at once: they overlap, and hold less than the net, whose trace stands in total all the same."""
    one = problem(kind)
    cases = PLAIN if kind == "plain" else SCANNED
    groups = {name: selection for name, (selection, _) in cases.items()}
    probes = 200 if method == "hutchinson" else 16
    found = jh.layer_traces(
        one.objective, one.params, one.batch, key=KEY, curvature=which, layers=groups, method=method, num_probes=probes
    )
    assert list(found) == [*groups, "total"]
    matrix = helpers.matrices(one)[which]
    for name, estimate in found.items():
        entries = cases[name][1](numbers(kind)) if name != "total" else np.arange(len(matrix))
        true = np.trace(matrix[np.ix_(entries, entries)])
        assert abs(estimate.mean - true) <= 5 * estimate.std_error + 1e-4 * abs(true), name


@pytest.mark.parametrize(("kind", "names"), [("plain", list(PLAIN)[1:12:3]), ("scanned", list(SCANNED)[::3])])
@pytest.mark.parametrize(("which", "method"), [("hessian", "lanczos"), ("ggn", "gram")])
def test_spectra_of_groups(kind, names, which, method):
    one = problem(kind)
    groups = {name: case(kind, name)[1] for name in names}
    found = jh.layer_spectra(
        one.objective, one.params, one.batch, key=KEY, curvature=which, method=method, layers=groups, num_steps=300
    )
    assert list(found) == [*names, "total"]
    for name, spectrum in found.items():
        whole = np.arange(spectrum.dim)
        entries = case(kind, name)[2] if name != "total" else whole
        values = np.linalg.eigvalsh(dense(kind, which, entries))
        assert spectrum.dim == len(values)
        assert np.isclose(spectrum.lambda_max, values[-1], rtol=1e-4)
        assert np.isclose(spectrum.lambda_min, values[0], atol=1e-4 * values[-1])
        assert np.isclose(spectrum.trace, values.sum(), rtol=1e-3, atol=1e-3 * values[-1])


def test_the_choice_does_not_change_a_groups_spectrum():
    one = problem("plain")

    def spectra(layers):
        return jh.layer_spectra(one.objective, one.params, one.batch, key=KEY, num_steps=8, layers=layers)

    alone = spectra({"attention": "block*/attn/*"})
    beside = spectra({"head": "head", "attention": "block*/attn/*"})
    np.testing.assert_allclose(alone["attention"].nodes, beside["attention"].nodes, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(beside["head"].nodes, spectra(None)["head"].nodes, rtol=1e-4, atol=1e-5)


SHORTHANDS = {
    ("plain", 1): ["embed", "block0", "block1", "head"],
    ("scanned", 1): ["embed", "blocks[0]", "blocks[1]", "head"],
    ("scanned", 2): [
        "embed",
        "blocks[0]/norm",
        "blocks[0]/attn",
        "blocks[0]/mlp",
        "blocks[1]/norm",
        "blocks[1]/attn",
        "blocks[1]/mlp",
        "head",
    ],
    ("plain", "middle"): [
        "block0/attn/out",
        "block0/mlp/fc",
        "block0/mlp/out",
        "block1/norm",
        "block1/attn/qkv",
        "block1/attn/out",
    ],
    ("plain", "block1"): ["block1"],
    ("plain", ("head", "block1")): ["head", "block1"],
}


@pytest.mark.parametrize(("kind", "layers"), SHORTHANDS)
def test_shorthands(kind, layers):
    one = problem(kind)
    found = jh.layer_traces(one.objective, one.params, one.batch, key=KEY, curvature="ggn", layers=layers)
    assert list(found) == [*SHORTHANDS[kind, layers], "total"]
    matrix = helpers.matrices(one)["ggn"]
    assert np.isclose(found["total"].mean, np.trace(matrix), rtol=1e-4)
    if isinstance(layers, int):
        assert np.isclose(sum(found[name].mean for name in found if name != "total"), np.trace(matrix), rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "scanned"])
def test_every_array_by_itself(kind):
    """They partition the parameters, in network order."""
    one = problem(kind)
    found = jh.layer_traces(one.objective, one.params, one.batch, key=KEY, curvature="ggn", layers="arrays")
    names = [name for name in found if name != "total"]
    assert sum(np.size(jh.subtree(one.params, name)) for name in names) == ravel_pytree(one.params)[0].size
    layers = jh.layer_names(one.params, one.objective, one.batch)
    assert [name.rpartition("/")[0] for name in names] == [
        x for x in layers for _ in jax.tree.leaves(jh.subtree(one.params, x))
    ]
    assert np.isclose(sum(found[name].mean for name in names), found["total"].mean, rtol=1e-5)


def test_summary_interactions_examples_and_classes_take_groups():
    one = problem("plain")
    arguments = one.objective, one.params, one.batch
    groups = {"attention": "block*/attn/*", "rest": lambda path: "attn" not in path}
    entries = {"attention": PLAIN["glob"][1](numbers("plain"))}
    whole = helpers.matrices(one)["ggn"]
    entries["rest"] = np.setdiff1d(np.arange(len(whole)), entries["attention"])
    table = jh.summarize(*arguments, key=KEY, layers=groups)
    assert list(table) == ["attention", "rest", "total"]
    assert [table[name].parameters for name in groups] == [len(entries[name]) for name in groups]
    map_of = jh.layer_interactions(*arguments, layers=groups)
    true = [[np.sum(whole[np.ix_(entries[a], entries[b])] ** 2) for b in groups] for a in groups]
    assert map_of.names == list(groups) and np.allclose(map_of.norms, true, rtol=1e-4)
    for layers, total in ((groups, "attention+rest"), ({"attention": "block*/attn/*"}, "whole")):
        traces = jh.example_traces(*arguments, layers=layers)
        assert np.isclose(traces["attention"].sum(), np.trace(whole[np.ix_(*[entries["attention"]] * 2)]), rtol=1e-4)
        assert np.isclose(traces["total"].sum(), np.trace(whole), rtol=1e-4), total
    for layers in (groups, {"attention": "block*/attn/*"}, ["block0/norm"]):
        found = jh.layer_class_structures(*arguments, WORDS, layers=layers)
        assert np.isclose(found["total"].traces["total"], np.trace(whole), rtol=1e-4)
        assert list(found) == [*layers, "total"]


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("plain", "block*/attn/*"),
        ("plain", {"block1": 0.5, "head": 2.0}),
        ("plain", {"query": jh.part("*/qkv/kernel", np.s_[:, :WIDE]), "embed": 3.0}),
        ("plain", [jh.part("head/kernel", np.s_[0]), jh.part("head/kernel", np.s_[2:])]),
        ("plain", kernels),
        ("plain", 1),
        ("scanned", {"blocks[1]": 0.5, "embed": 1.0}),
        ("scanned", {"blocks[0]/attn": 0.5, "blocks[1]/attn": 2.0}),
    ],
)
def test_the_penalty_of_groups_and_its_gradient(kind, layers):
    """The mean over all signs is the dense one: here that of many probes, to their standard errors."""
    one = problem(kind)
    weights = np.zeros(ravel_pytree(one.params)[0].size)
    ids = jax.tree.map(jnp.asarray, numbers(kind))
    if isinstance(layers, dict):
        for name, value in layers.items():
            number = isinstance(value, float)
            weights[of(jh.subtree(ids, name if number else value))] = value if number else 1.0
    elif layers == 1:
        weights[:] = 1
    else:
        weights[of(jh.subtree(ids, list(layers) if isinstance(layers, tuple) else layers))] = 1

    def true(flat, unravel):
        hessian = jax.hessian(lambda w: one.objective(unravel(w), one.batch))(flat)
        return jnp.vdot(weights, jnp.diag(hessian))

    flat, unravel = ravel_pytree(one.params)
    with jax.enable_x64(True):
        flat64, unravel64 = ravel_pytree(helpers.cast(one.params, jnp.float64))
        value = float(true(flat64, unravel64))
        ahead = helpers.normal(9, flat.size).astype(np.float64)
        slope = float(jax.jvp(lambda w: true(w, unravel64), (flat64,), (jnp.asarray(ahead),))[1])
    penalty = jax.jit(
        lambda key: jh.hessian_trace_penalty(one.objective, one.params, one.batch, key=key, layers=layers)
    )
    drawn = [penalty(key) for key in jax.random.split(KEY, 300)]
    values = np.array([float(x) for x, _ in drawn])
    slopes = np.array([np.vdot(ravel_pytree(g)[0], ahead) for _, g in drawn])
    for found, expected in ((values, value), (slopes, slope)):
        assert abs(found.mean() - expected) < 4.5 * found.std() / len(found) ** 0.5
        assert found.std() / len(found) ** 0.5 < 0.5 * np.abs(found).mean()


def test_the_optimizers_penalty_takes_groups():
    one = problem("scanned")
    tx = optax.chain(jh.add_hessian_trace(one.objective, 0.1, key=KEY, layers="blocks/attn"), optax.sgd(1.0))
    grads = jax.tree.map(jnp.zeros_like, one.params)
    updates, _ = tx.update(grads, tx.init(one.params), one.params, batch=one.batch)
    noise = jh.add_noise_stability(one.objective, 0.1, key=KEY, layers=jh.part("embed/table", [0]))
    moved, _ = noise.update(grads, noise.init(one.params), one.params, batch=one.batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, moved)))
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(updates))


def test_elements_of_lists_and_all_slices():
    params = {"layers": [{"w": jnp.ones(2)}, {"w": jnp.zeros((3, 2))}], "blocks": {"w": jnp.ones((2, 3))}}
    assert jh.subtree(params, "layers[1]")["w"].shape == (3, 2) == jh.subtree(params, "layers/1")["w"].shape
    assert jh.subtree(params, "blocks[*]")["w"].shape == (2, 3)


def test_two_predicates_of_one_name_are_no_two_groups():
    first, second = (lambda path: path == "a/w"), (lambda path: path == "b/w")
    with pytest.raises(ValueError, match="two selections are called '<lambda>'"):
        jh.layer_traces(lambda p, _: jnp.sum(p["a"]["w"]) ** 2, A, None, key=KEY, layers=[first, second])
    found = jh.layer_traces(lambda p, _: jnp.sum(p["a"]["w"]) ** 2, A, None, key=KEY, layers=np.int64(1))
    assert list(found) == ["a", "b", "total"]


A = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("c*", ValueError, r"'c\*' selects nothing; the layers are \['a', 'b'\]"),
        ([], ValueError, "selects nothing"),
        (lambda path: False, ValueError, "selects nothing"),
        (["a", jh.part("a/w", 0)], ValueError, "entries of 'a/w' twice"),
        ([jh.part("a/w", np.s_[:, :2]), jh.part("a/w", np.s_[:, 1:])], ValueError, "entries of 'a/w' twice"),
        (jh.part("a/w", 2), ValueError, r"a/w\[2\].*shape \(2, 3\): 2 is out of range for an axis of 2"),
        (jh.part("a/w", np.s_[:, :4]), ValueError, ":4 is out of range for an axis of 3"),
        (jh.part("a/w", np.s_[:, 2:2]), ValueError, "selects nothing"),
        (jh.part("a/w", [0, 0]), ValueError, "a row twice"),
        (jh.part("a/w", [0, 5]), ValueError, "does not fit an axis of 2"),
        (jh.part("a/w", [True, False, True]), ValueError, "does not fit an axis of 2"),
        (jh.part("b/w", np.s_[:, 0]), ValueError, r"too many entries .*np.s_\[..., i\]"),
        (jh.part("a/w", ([0, 1], [0, 1])), ValueError, "at most one axis"),
        ({"a": "a"}, TypeError, "a layer is given by"),
        ("empty", ValueError, "'empty' selects nothing, its arrays are empty"),
        (3, TypeError, "a layer is given by"),
    ],
)
def test_what_a_selection_is_refused_for(selection, error, message):
    with pytest.raises(error, match=message):
        jh.subtree(A | {"empty": jnp.zeros((0, 2))}, selection)


@pytest.mark.parametrize("index", ["x", 1.5, [0.5], None, np.ones((2, 2), int)])
def test_what_an_index_is_refused_for(index):
    with pytest.raises(TypeError, match="an index holds integers"):
        jh.part("a/w", index)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (0, ValueError, "depth.*at least 1"),
        (True, TypeError, "layers must be"),
        ({}, ValueError, "selects no layer"),
        ([], ValueError, "selects no layer"),
        (["total"], ValueError, "'total'"),
        ({"total": "a"}, ValueError, "'total'"),
        ({"x": "c*"}, ValueError, "selects nothing"),
        (1.5, TypeError, "layers must be"),
    ],
)
def test_what_layers_are_refused_for(layers, error, message):
    with pytest.raises(error, match=message):
        jh.layer_traces(lambda p, _: jnp.sum(p["a"]["w"]) ** 2 + jnp.sum(p["b"]["w"]), A, None, key=KEY, layers=layers)


@pytest.mark.parametrize("layers", [["a", "a/w"], {"x": "a", "y": jh.part("a/w", 0)}, {"a*": 1.0, "a/w": 2.0}])
def test_overlapping_groups_are_refused_where_they_are_summed(layers):
    with pytest.raises(ValueError, match="overlap at"):
        jh.hessian_trace_penalty(lambda p, _: jnp.sum(p["a"]["w"] ** 3), A, None, key=KEY, layers=layers)
