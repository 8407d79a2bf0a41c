"""Errors that help: each names the thing, says what it is, and ends in what to write instead."""

import collections
import dataclasses
import importlib
import inspect

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers import distance, labels, normal, problem

import jaxhess as jh

KEY = jax.random.key(0)


# ---- functions with a backward pass of their own ----


def plain(q, k, v):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5) @ v


def backward(kept, g):
    q, k, v = kept
    p = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / q.shape[-1] ** 0.5
    return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g


def fused(forward):
    """Attention as a fused kernel has it: a backward pass of its own, and this forward pass before it."""

    @jax.custom_vjp
    def attend(q, k, v):
        return forward(q, k, v)

    attend.defvjp(lambda q, k, v: (forward(q, k, v), (q, k, v)), backward)
    return attend


attend = fused(plain)
attend.defvjp(lambda q, k, v: (attend(q, k, v), (q, k, v)), backward)  # a forward rule that calls the function itself


def kernel(q, k, v):
    """What JAX cannot look into, as a call of other code."""
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.pure_callback(lambda *x: np.asarray(plain(*x)), shape, q, k, v, vmap_method="sequential")


def attention(function, criterion=jh.cross_entropy):
    def predict(params, batch):
        q, k, v = (batch["x"] @ params[name]["w"] for name in "qkv")
        return function(q, k, v) @ params["out"]["w"]

    params = {name: {"w": normal([0, i], 4, 4, scale=0.5)} for i, name in enumerate(["q", "k", "v", "out"])}
    batch = {"x": normal(1, 3, 5, 4), "label": labels(2, 4, 3, 5)}
    return helpers.Problem(jh.Objective(predict, criterion), params, batch)


ATTENTION = attention(attend)
TRUE = attention(plain)
AT = (ATTENTION.objective, ATTENTION.params, ATTENTION.batch)
FORWARD = {
    "hessian": lambda: jh.hessian(*AT),
    "a block": lambda: jh.hessian(*AT, layer="k"),
    "ggn": lambda: jh.ggn(*AT),
    "functional_hessian": lambda: jh.functional_hessian(*AT),
    "over Batches": lambda: jh.hessian(*AT[:2], jh.Batches([AT[2]])),
    "layer_traces": lambda: jh.layer_traces(*AT, key=KEY, num_probes=2),
    "layer_spectra": lambda: jh.layer_spectra(*AT, key=KEY, num_steps=2),
    "layer_spectra, auto": lambda: jh.layer_spectra(*AT, key=KEY, num_steps=2, method="auto"),
    "summarize": lambda: jh.summarize(*AT, key=KEY, num_steps=2, num_probes=2),
    "penalty": lambda: jh.hessian_trace_penalty(*AT, key=KEY),
    "penalty, ggn": lambda: jh.hessian_trace_penalty(*AT, key=KEY, curvature="ggn"),
    "transformation": lambda: jax.jit(step)(AT[1]),
}


def step(params):
    tx = jh.add_hessian_trace(AT[0], 0.1, key=KEY)
    return tx.update(params, tx.init(params), params, batch=AT[2])


@pytest.mark.parametrize("name", FORWARD)
def test_a_function_without_forward_mode_is_named_with_what_works(name):
    penalty = name in ("penalty", "penalty, ggn", "transformation")
    instead = "add_noise_stability" if penalty else "differentiation='finite'.*'ggn'.*'gram'"
    with pytest.raises(TypeError, match=rf"attend at .*test_errors.py:\d+, .*custom_vjp.*{instead}.*custom_jvp"):
        FORWARD[name]()


def test_the_trace_of_the_ggn_needs_reverse_mode_only():
    found = jh.layer_traces(*AT, key=KEY, num_probes=400, chunk_size=400, curvature="ggn")
    for layer, estimate in found.items():
        exact = np.trace(helpers.dense(TRUE, "ggn", None if layer == "total" else layer))
        assert abs(estimate.mean - exact) < 4 * estimate.std_error < 0.5 * exact


def test_the_gram_matrix_needs_reverse_mode_only():
    steps = []
    spectra = jh.layer_spectra(*AT, key=KEY, curvature="ggn", method="gram", progress=lambda *x: steps.append(x))
    for layer, spec in spectra.items():
        exact = np.linalg.eigvalsh(helpers.dense(TRUE, "ggn", None if layer == "total" else layer))
        np.testing.assert_allclose(spec.nodes[-4:], exact[-4:], rtol=1e-4)
    assert steps[-1] == (3, 3)  # example by example: that they are independent is found without forward mode
    assert jh.class_structure(*AT, 4).traces["total"] == pytest.approx(np.trace(helpers.dense(TRUE, "ggn")), rel=1e-5)


def test_an_auto_of_the_ggn_takes_the_gram_matrix():
    auto, gram = (jh.layer_spectra(*AT, key=KEY, curvature="ggn", method=m)["total"].nodes for m in ("auto", "gram"))
    np.testing.assert_array_equal(auto, gram)


@pytest.mark.parametrize("layer", [None, "k"])
def test_rules_that_have_forward_mode_give_the_hessian(layer):
    """Forward over reverse: the Hessian never differentiates the function itself."""
    p = attention(fused(plain))
    operator = p.operator("hessian", layer)
    like = p.params if layer is None else p.params[layer]
    assert distance(helpers.matrix(operator, like, 64), helpers.dense(TRUE, "hessian", layer)) < 1e-4
    assert (
        distance(helpers.matrix(jh.linearize(operator, like=like), like, 64), helpers.dense(TRUE, "hessian", layer))
        < 1e-4
    )
    jh.hessian_trace_penalty(p.objective, p.params, p.batch, key=KEY)
    with pytest.raises(TypeError, match="attend at"):
        p.operator("ggn", layer)


def test_a_layer_that_the_function_does_not_see_has_products():
    for kind in ("hessian", "ggn"):
        found = helpers.matrix(ATTENTION.operator(kind, "out"), AT[1]["out"], 16)
        assert distance(found, helpers.dense(TRUE, kind, "out")) < 1e-4


def test_what_jax_says_of_a_kernel_is_handed_on():
    p = attention(fused(kernel))
    with pytest.raises(TypeError, match=r"attend at .*custom_vjp.*JVP.*custom_jvp"):
        p.operator("hessian")
    found = jh.layer_traces(p.objective, p.params, p.batch, key=KEY, num_probes=2, curvature="ggn")
    expected = jh.layer_traces(TRUE.objective, p.params, p.batch, key=KEY, num_probes=2, curvature="ggn")
    assert found["total"].mean == pytest.approx(expected["total"].mean, rel=1e-4)


def test_what_sees_no_parameters_may_have_any_rule():
    def loss(params, batch):
        return ((attend(batch, batch, batch) @ params["w"]) ** 2).mean()

    w = {"w": normal(3, 4)}
    assert np.isfinite(jh.trace(jh.hessian(loss, w, AT[2]["x"]), like=w, key=KEY, num_probes=2).mean)


def test_a_criterion_with_a_rule_of_its_own_is_named():
    @jax.custom_vjp
    def squares(outputs, batch):
        return jnp.sum(outputs**2) / 2

    squares.defvjp(lambda o, b: (squares(o, b), o), lambda o, g: (g * o, None))
    p = attention(plain, squares)
    for call in (jh.ggn_eigenvalues, lambda *at: jh.layer_traces(*at, key=KEY, curvature="ggn")):
        with pytest.raises(TypeError, match="squares at .*custom_vjp.*criterion.*cross_entropy"):
            call(p.objective, p.params, p.batch)


# ---- strict promotion of types ----

P = problem("mlp")


def everything(objective, params, batch):
    """A call of every public function with a net, by its name; with several ways where they differ inside."""
    at, hv = (objective, params, batch), jh.hessian(objective, params, batch)
    few = {"key": KEY, "num_probes": 2}
    ones = jax.tree.map(jnp.ones_like, params)

    def update(every):
        tx = jh.add_hessian_trace(objective, optax.linear_schedule(0.0, 0.1, 4), key=KEY, every=every)
        return tx.update(ones, tx.init(params), params, batch=batch)

    return {
        "hessian": lambda: hv(ones),
        "ggn": lambda: jh.ggn(*at)(ones),
        "functional_hessian": lambda: jh.functional_hessian(*at)(ones),
        "hessian, Batches": lambda: jh.hessian(*at[:2], jh.Batches([batch, batch]))(ones),
        "linearize": lambda: jh.linearize(hv, like=params)(ones),
        "aslinearoperator": lambda: jh.aslinearoperator(hv, like=params) @ np.ones(helpers.ravel(params).size),
        "trace": lambda: jh.trace(hv, like=params, **few),
        "diagonal": lambda: jh.diagonal(hv, like=params, **few),
        "layer_traces, split": lambda: jh.layer_traces(*at, **few, method="split"),
        "layer_traces, exact": lambda: jh.layer_traces(*at, **few, curvature="ggn", method="exact"),
        "example_traces": lambda: jh.example_traces(*at),
        "ggn_diagonal": lambda: jh.ggn_diagonal(*at),
        "ggn_eigenpairs": lambda: jh.ggn_eigenpairs(*at, k=2),
        "layer_interactions": lambda: jh.layer_interactions(*at),
        "layer_interactions, probes": lambda: jh.layer_interactions(*at, curvature="hessian", **few),
        "layer_traces": lambda: jh.layer_traces(*at, **few),
        "layer_traces, ggn": lambda: jh.layer_traces(*at, **few, curvature="ggn", probe="gaussian"),
        "layer_traces, jit": lambda: jax.jit(lambda p: jh.layer_traces(objective, p, batch, **few)["total"].mean)(
            params
        ),
        "lanczos": lambda: jh.lanczos(hv, params, 2, restart_key=KEY),
        "lanczos, host": lambda: jh.lanczos(hv, params, 2, reorthogonalize="host"),
        "lanczos, jit": lambda: jax.jit(lambda p: jh.lanczos(hv, p, 2, reorthogonalize=False).alphas)(params),
        "top_eigenpairs": lambda: jh.top_eigenpairs(hv, like=params, key=KEY, k=1, num_steps=2),
        "top_eigenpairs, start": lambda: jh.top_eigenpairs(
            hv, like=params, key=KEY, k=1, num_steps=3, max_vectors=3, start=jax.tree.map(lambda x: x[None], ones)
        ),
        "subspace_overlap": lambda: jh.subspace_overlap(*[jax.tree.map(lambda x: x[None], ones)] * 2),
        "critical_sharpness": lambda: jh.critical_sharpness(*at, jax.tree.map(lambda x: -x, params)),
        "precondition": lambda: jh.precondition(hv, jax.tree.map(lambda x: x + 1, ones))(ones),
        "preconditioner": lambda: jh.preconditioner(optax.adam(1.0).init(params)),
        "hessian, finite": lambda: jh.hessian(*at, differentiation="finite")(ones),
        "hessian, finite, jit": lambda: jax.jit(lambda p: jh.hessian(objective, p, batch, differentiation="finite")(p))(
            params
        ),
        "layer_traces, groups": lambda: jh.layer_traces(
            *at, **few, layers={"first": "fc1/*", "row": jh.part("fc1/w", 0)}
        ),
        "part": lambda: jh.subtree(params, jh.part("fc1/w", [0])),
        "spectrum": lambda: jh.spectrum(hv, like=params, key=KEY, num_steps=2).density(),
        "layer_spectra": lambda: jh.layer_spectra(*at, key=KEY, num_steps=2),
        "layer_spectra, auto": lambda: jh.layer_spectra(*at, key=KEY, num_steps=2, method="auto"),
        "ggn_eigenvalues": lambda: jh.ggn_eigenvalues(*at),
        "class_structure": lambda: objective is not P.objective or jh.class_structure(*at, 3),
        "layer_class_structures": lambda: objective is not P.objective or jh.layer_class_structures(*at, 3),
        "hessian_trace_penalty": lambda: jh.hessian_trace_penalty(*at, key=KEY, num_probes=2, layers={"fc1": 0.5}),
        "hessian_trace_penalty, ggn": lambda: jh.hessian_trace_penalty(*at, key=KEY, curvature="ggn"),
        "add_hessian_trace": lambda: update(1),
        "add_hessian_trace, jit": lambda: jax.jit(lambda: update(2))(),
        "add_noise_stability": lambda: stabilise(objective, params, batch),
        "summarize": lambda: str(jh.summarize(*at, num_steps=2, **few)),
        "layer_names": lambda: jh.layer_names(params, objective, batch),
        "subtree": lambda: jh.subtree(params, "fc1"),
        "middle_layers": lambda: jh.middle_layers(["fc1", "fc2"]),
        "wasserstein": lambda: jh.wasserstein(*SPECTRA, normalize=True),
        "jensen_shannon": lambda: jh.jensen_shannon(*SPECTRA),
        "kl_divergence": lambda: jh.kl_divergence(*SPECTRA),
        "count_outliers": lambda: jh.count_outliers(jnp.arange(20.0)),
    }


def stabilise(objective, params, batch):
    tx = jh.add_noise_stability(objective, key=KEY)
    return tx.update(params, tx.init(params), params, batch=batch)


SPECTRA = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2), jh.Spectrum([0.0, 2.0], [0.5, 0.5], 2)
BATCH = P.batch | {"label": np.arange(7, dtype=np.int32) % 3}
HALF = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), P.params)
NETS = {
    "cross-entropy": (P.objective, P.params, BATCH),
    "own criterion": (problem("mlp, own criterion").objective, P.params, BATCH),
    "bfloat16": (P.objective, HALF, BATCH),
}


DIFFER = {  # by the criterion, or by the precision of the parameters
    "ggn",
    "linearize",
    "layer_traces, ggn",
    "lanczos",
    "layer_spectra, auto",
    "ggn_eigenvalues",
    "hessian_trace_penalty, ggn",
    "add_hessian_trace",
}


def test_every_public_function_is_tried():
    public = {name for name, value in vars(jh).items() if inspect.isfunction(value)}
    assert public == {name.split(",")[0] for name in everything(*NETS["cross-entropy"])}


@pytest.mark.parametrize("net", NETS)
def test_strict_promotion_of_types(net):
    with jax.numpy_dtype_promotion("strict"):
        for name, call in everything(*NETS[net]).items():
            if net == "cross-entropy" or name in DIFFER:
                call()


def test_strict_promotion_of_parameters_in_two_precisions(x64):
    params = {"fc1": helpers.cast(P.params["fc1"], jnp.float64), "fc2": helpers.cast(P.params["fc2"], jnp.float32)}

    def predict(params, batch):
        h = jnp.tanh(helpers.affine(params["fc1"], jnp.asarray(batch["x"], jnp.float64)))
        return helpers.affine(params["fc2"], h.astype(jnp.float32))

    objective = jh.Objective(predict, jh.cross_entropy)
    expected = jh.layer_traces(objective, params, BATCH, key=KEY, num_probes=2)
    with jax.numpy_dtype_promotion("strict"):
        assert jh.layer_traces(objective, params, BATCH, key=KEY, num_probes=2) == expected
        calls = everything(objective, params, BATCH)
        for name in ("trace", "layer_traces, ggn", "lanczos, host", "lanczos, jit", "layer_spectra", "ggn_eigenvalues"):
            calls[name]()


# ---- keys ----

OTHER_KEYS = ["rbg", "unsafe_rbg"]
MANY = jh.Batches([jax.tree.map(lambda x: x[:4], P.batch), jax.tree.map(lambda x: x[4:], P.batch)])


def probed(key):
    """What draws probes in chunks, as functions of the size of a chunk."""
    hv, at = P.operator("hessian"), (P.objective, P.params)
    few = {"key": key, "num_probes": 18}
    return {
        "trace": lambda size: jh.trace(hv, like=P.params, chunk_size=size, **few),
        "gaussian": lambda size: jh.trace(hv, like=P.params, chunk_size=size, probe="gaussian", **few),
        "layer_traces": lambda size: jh.layer_traces(*at, P.batch, chunk_size=size, method="hutchinson", **few)[
            "total"
        ],
        "ggn": lambda size: jh.layer_traces(*at, P.batch, chunk_size=size, curvature="ggn", method="hutchinson", **few)[
            "total"
        ],
        "Batches": lambda size: jh.layer_traces(
            *at, MANY, chunk_size=size, curvature="ggn", method="hutchinson", **few
        )["total"],
    }


@pytest.mark.parametrize(
    ("name", "impl"),
    [*((name, "rbg") for name in probed(KEY)), ("trace", "unsafe_rbg"), ("Batches", "unsafe_rbg")],
)
def test_the_same_probes_in_chunks_of_any_size(name, impl):
    call = probed(jax.random.key(3, impl=impl))[name]
    whole = call(18)  # vmapped; up to 16 stand one after another
    for size in (1, 5):
        np.testing.assert_allclose(call(size)[:2], whole[:2], rtol=1e-4)
    if name != "Batches":
        np.testing.assert_allclose(jax.jit(lambda: call(5)[:2])(), whole[:2], rtol=1e-4)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("impl", OTHER_KEYS)
def test_the_penalty_has_the_probes_of_its_keys(impl, curvature):
    def penalty(key, num_probes):
        options = {"num_probes": num_probes, "curvature": curvature, "probe": "gaussian"}
        return jh.hessian_trace_penalty(P.objective, P.params, P.batch, key=key, **options)[0]

    key = jax.random.key(3, impl=impl)
    each = [penalty(k, 1) for k in jax.random.split(key, 18)]
    assert penalty(key, 18) == pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        (jax.random.split(KEY, 3), r"an array key<fry>\[3\]; of an array of keys give one, keys\[0\]"),
        (jax.random.split(jax.random.PRNGKey(0), 3), r"an array uint32\[3,2\]; of an array of keys give one"),
        (
            jax.random.PRNGKey(0, impl="rbg"),
            r"an array uint32\[4\]; 'threefry2x32', the default, has no such raw key.*wrap_key_data",
        ),
        (P.batch, r"a dict of \['x', 'label'\]$"),
        (P.batch["x"], r"an array float32\[7,3\]$"),
    ],
)
def test_a_key_that_is_not_one_says_what_it_is(key, hint):
    for call in (
        lambda: jh.layer_traces(*NETS["cross-entropy"], key=key),
        lambda: jh.add_hessian_trace(loss_of, 1.0, key=key),
    ):
        with pytest.raises(
            TypeError, match=r"key must be one JAX random key, as from jax.random.key\(0\), got " + hint
        ):
            call()


def loss_of(params, batch):
    return jnp.sum(params**4)


def test_a_state_with_a_key_of_another_implementation():
    mine, other = (jh.add_hessian_trace(loss_of, 1.0, key=jax.random.key(0, impl=i)) for i in ("threefry2x32", "rbg"))
    ones = jnp.ones(3)
    assert np.isfinite(other.update(ones, other.init(ones), ones, batch=None)[0]).all()
    with pytest.raises(ValueError, match=r"shape \(4,\).*\(2,\), of another implementation"):
        mine.update(ones, other.init(ones), ones, batch=None)


def test_long_things_are_named_in_short():
    with pytest.raises(TypeError) as error:
        jh.trace(P.operator("hessian"), like=P.params, key={"x": np.zeros(10_000), "y": "z" * 1000})
    assert len(str(error.value)) < 200


# ---- batches that are none ----


@dataclasses.dataclass
class Example:
    x: np.ndarray
    label: np.ndarray


class Loader:
    """As of other libraries: reads batches, and is no array."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Foreign:
    """An array of another library."""

    shape = (7,)

    def __array__(self, dtype=None, copy=None):
        return np.zeros(7, dtype or np.float32)


X, LABEL = BATCH["x"], BATCH["label"]
BAD_BATCHES = {
    "string": (BATCH | {"name": "train"}, r"at \['name'\] the string 'train'.*take strings out"),
    "bytes": (BATCH | {"name": b"train"}, "string.*take strings out"),
    "strings": (BATCH | {"name": np.array(["a", "b"])}, r"\['name'\].*type <U1.*take it out"),
    "objects": (BATCH | {"x": np.array([X, None], object)}, r"\['x'\].*type object.*padded"),
    "dataclass": (Example(X, LABEL), r"the batch is a Example, .*register_dataclass\(Example\)"),
    "dataclass inside": ({"data": Example(X, LABEL)}, r"\['data'\].*a Example.*register_dataclass"),
    "UserDict": (collections.UserDict(BATCH), r"the batch is a UserDict, .*dict\(\.\.\.\)"),
    "UserDict inside": ({"data": [collections.UserDict(BATCH)]}, r"\['data'\]\[0\].*a UserDict, .*dict\(\.\.\.\)"),
    "generator": ((b for b in [BATCH]), r"the batch is a generator, .*only once.*Batches\(list"),
    "iterator": (iter([BATCH]), r"the batch is a list_iterator.*only once"),
    "loader": (Loader(BATCH), r"the batch is a Loader, .*Batches\(\.\.\.\)"),
    "loader inside": ((Loader(BATCH), 1.0), r"\[0\].*a Loader.*take it out"),
    "foreign array": (BATCH | {"x": Foreign()}, r"\['x'\].*a Foreign.*np.asarray"),
}
TAKES_A_BATCH = {
    "hessian": lambda *at: jh.hessian(*at),
    "ggn_eigenvalues": lambda *at: jh.ggn_eigenvalues(*at),
    "layer_traces": lambda *at: jh.layer_traces(*at, key=KEY),
    "summarize": lambda *at: jh.summarize(*at, key=KEY),
    "layer_names": lambda loss, params, batch: jh.layer_names(params, loss, batch),
    "hessian_trace_penalty": lambda *at: jh.hessian_trace_penalty(*at, key=KEY),
}


# A loss that sees nothing of what is in the batch.
BLIND = jh.Objective(lambda params, _: helpers.mlp(params, BATCH), lambda outputs, _: jh.cross_entropy(outputs, BATCH))


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_what_is_no_array_in_a_batch_is_named_with_what_to_do(case):
    batch, message = BAD_BATCHES[case]
    for call in TAKES_A_BATCH.values():
        with pytest.raises(TypeError, match=message):
            call(BLIND, P.params, batch)


@pytest.mark.parametrize("name", TAKES_A_BATCH)
def test_every_function_looks_at_the_batch(name):
    with pytest.raises(TypeError, match="take strings out"):
        TAKES_A_BATCH[name](P.objective, P.params, BATCH | {"name": "train"})


def test_a_string_in_a_later_one_of_many_batches():
    many = jh.Batches([BATCH, BATCH | {"name": "train"}])
    with pytest.raises(TypeError, match=r"\['name'\].*take strings out"):
        jh.hessian(BLIND, P.params, many)(P.params)


def test_what_jax_takes_is_taken():
    """Keys, numbers, NumPy's and JAX's own types of arrays, nothing at all, registered classes."""
    batch = BATCH | {"key": KEY, "rate": 0.5, "mask": np.ones(7, bool), "none": None, "half": HALF, "n": np.float64(2)}
    for taken in (batch, None, (), [BATCH]):
        assert jh.layer_names(P.params, BLIND, taken) == ["fc1", "fc2"]
        jh.hessian(BLIND, P.params, taken)


# ---- parameters that are none ----


class Normed(nnx.Module):
    def __init__(self, **options):
        self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)

    def __call__(self, x):
        return self.norm(self.fc(x))


class Dropping(nnx.Module):
    def __init__(self):
        self.fc, self.drop = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.drop(self.fc(x))


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=True)(linen.Dense(3)(x))


def train_state():
    model = linen.Dense(3)
    variables = model.init(KEY, X)
    return TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1))


VARIABLES = Dense().init(KEY, X)
SPLIT = r"nnx.split\(model, nnx.Param, \.\.\.\)"
BAD_PARAMETERS = {
    "Linen's variables": (VARIABLES, ValueError, r"'batch_stats'.*variables\['params'\].*batch\['batch_stats'\]"),
    "a collection inside": (
        VARIABLES["params"] | {"batch_stats": VARIABLES["batch_stats"]},
        ValueError,
        "'batch_stats'.*not to be differentiated",
    ),
    "another collection": ({"params": P.params, "cache": P.params}, ValueError, "'cache'.*not to be differentiated"),
    "a Linen module": (Dense(), TypeError, r"a Dense, no array; .*variables\['params'\]"),
    "a TrainState": (train_state(), TypeError, "a whole TrainState; give its parameters, state.params"),
    "an NNX module": (Normed(), (ValueError, TypeError), SPLIT),  # of older Flax no pytree
    "an NNX state": (nnx.state(Normed()), ValueError, rf"BatchStat at .*norm.*{SPLIT}"),
    "random streams": (nnx.state(Dropping()), ValueError, rf"RngCount at .*{SPLIT}.*rest in the batch"),
    "an Equinox module": (eqx.nn.MLP(3, 3, 4, 1, key=KEY), TypeError, r"eqx.partition\(model, eqx.is_inexact_array\)"),
    "a UserDict": (collections.UserDict(P.params), TypeError, r"a UserDict, no array; make a dict"),
    "another library's array": ({"w": Foreign()}, TypeError, r"\['w'\].*a Foreign, no array; .*np.asarray"),
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_what_is_not_to_be_differentiated_is_named_with_what_to_give(case):
    params, error, message = BAD_PARAMETERS[case]
    for name in ("hessian", "layer_traces", "summarize", "hessian_trace_penalty"):
        with pytest.raises(error, match=message):
            TAKES_A_BATCH[name](BLIND, params, BATCH)


def test_an_nnx_module_of_parameters_alone_is_a_tree_like_others():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    if jax.tree_util.all_leaves([model]):
        pytest.skip("modules are no pytrees before Flax 0.11")
    objective = jh.Objective(lambda model, batch: model(batch["x"]), jh.cross_entropy)
    _, params = nnx.split(model)
    graph = nnx.graphdef(model)
    split = jh.Objective(lambda params, batch: nnx.merge(graph, params)(batch["x"]), jh.cross_entropy)
    found, expected = jh.ggn_eigenvalues(objective, model, BATCH), jh.ggn_eigenvalues(split, params, BATCH)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# ---- arguments in each other's place ----


def objective_of(criterion=jh.cross_entropy, predict=helpers.mlp):
    return jh.Objective(predict, criterion)


PAIRS = jh.Objective(lambda params, batch: helpers.mlp(params, {"x": batch[0]}), jh.cross_entropy)
SLIPS = {
    "a list of batches": (P.objective, [BATCH, BATCH], TypeError, r"a list of 2 trees of one kind.*Batches\(batch\)"),
    "a tuple of batches": (P.objective, (BATCH, BATCH), TypeError, r"a tuple of 2 trees of one kind.*Batches\(batch\)"),
    "a ragged list": (P.objective, [BATCH, jax.tree.map(lambda x: x[:3], BATCH)], TypeError, r"list of 2.*Batches"),
    "a list of pairs": (PAIRS, [(X, LABEL)] * 3, TypeError, r"a list of 3 trees of one kind.*Batches\(batch\)"),
    "a list of arrays": (P.objective, [X, X], TypeError, r"a list of 2 trees of one kind.*Batches\(batch\)"),
    "a batch in a list": (P.objective, [BATCH], TypeError, r"a list of 1 trees.*or one of them"),
    "a key": (P.objective, KEY, TypeError, "random key; the batch comes third, and a key by name"),
    "a pair": (PAIRS, (X, LABEL), ValueError, r"CrossEntropy\(labels=lambda batch: batch\[1\]\)"),
    "a pair in another order": (
        jh.Objective(lambda params, batch: helpers.mlp(params, {"x": batch[1]}), jh.cross_entropy),
        (LABEL, X),
        ValueError,
        r"CrossEntropy\(labels=lambda batch: batch\[0\]\)",
    ),
    "labels of another name": (
        P.objective,
        {"x": X, "y": LABEL},
        ValueError,
        r"a dict of \['x', 'y'\].*CrossEntropy\(labels=lambda batch: batch\['y'\]\)",
    ),
    "targets of another name": (
        objective_of(jh.squared_error),
        {"x": X, "target": X},
        ValueError,
        r"SquaredError\(labels=lambda batch: batch\['target'\]\)",
    ),
    "integers of another name": (
        P.objective,
        {"x": X, "digit": LABEL},
        ValueError,
        r"CrossEntropy\(labels=lambda batch: batch\['digit'\]\)",
    ),
    "padding": (
        P.objective,
        {"x": X, "label": np.where(LABEL == 1, -100, LABEL)},
        ValueError,
        r"labels run from -100 to 2, outside 0..2 for 3 outputs; .*CrossEntropy\(weights=lambda batch: "
        r'batch\["label"\] >= 0\)',
    ),
    "classes from 1": (P.objective, {"x": X, "label": LABEL + 1}, ValueError, "from 1 to 3, .*the first class is 0"),
}


@pytest.mark.parametrize("case", SLIPS)
@pytest.mark.parametrize("name", ["hessian", "ggn_eigenvalues", "summarize", "layer_names", "hessian_trace_penalty"])
def test_a_slip_in_the_batch_is_recognised(case, name):
    objective, batch, error, message = SLIPS[case]
    if name == "layer_names" and error is ValueError:
        return  # which names the layers of any net
    with pytest.raises(error, match=message):
        TAKES_A_BATCH[name](objective, P.params, batch)


def test_the_line_for_padding_works():
    padded = {"x": X, "label": np.where(LABEL == 1, -100, LABEL)}
    kept = {"x": X[LABEL != 1], "label": LABEL[LABEL != 1]}
    criterion = jh.CrossEntropy(weights=lambda batch: batch["label"] >= 0)
    found = jh.ggn_eigenvalues(objective_of(criterion), P.params, padded)
    np.testing.assert_allclose(found, jh.ggn_eigenvalues(P.objective, P.params, kept), rtol=1e-4)


def test_lists_that_the_loss_takes_are_one_batch():
    def loss(params, batch):
        return (P.objective(params, batch[0]) + P.objective(params, batch[1])) / 2

    found = jh.hessian(loss, P.params, [BATCH, BATCH])(P.params)
    assert distance(helpers.ravel(found), helpers.ravel(jh.hessian(P.objective, P.params, BATCH)(P.params))) < 1e-5


def test_an_error_of_the_loss_itself_is_left_as_it_is():
    def loss(params, batch):
        raise KeyError("mine")

    for batch in (BATCH, (X, LABEL), (X, X)):
        with pytest.raises(KeyError, match="mine"):
            jh.hessian(loss, P.params, batch)


def test_the_batch_is_given_to_the_transformation_by_name():
    tx = jh.add_hessian_trace(loss_of, 1.0, key=KEY)
    ones = jnp.ones(3)
    with pytest.raises(TypeError, match=r"tx.update\(grads, state, params, batch=batch\)"):
        tx.update(ones, tx.init(ones), ones, BATCH)


def test_optax_flatten_around_the_transformation():
    penalty = jh.add_hessian_trace(P.objective, 0.1, key=KEY)
    around = optax.flatten(optax.chain(penalty, optax.sgd(0.1)))
    with pytest.raises(TypeError, match=r"one flat vector.*optax.chain\(add_hessian_trace\(\.\.\.\), optax.flatten"):
        around.update(P.params, around.init(P.params), P.params, batch=BATCH)
    before = optax.chain(penalty, optax.flatten(optax.sgd(0.1)))
    alone = optax.chain(penalty, optax.sgd(0.1))
    found, expected = (tx.update(P.params, tx.init(P.params), P.params, batch=BATCH)[0] for tx in (before, alone))
    assert distance(helpers.ravel(found), helpers.ravel(expected)) < 1e-6


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("all", ["fc1", "fc2", "fc3", "fc4"]),
        (None, ["fc1", "fc2", "fc3", "fc4"]),
        ("middle", ["fc2", "fc3"]),
        (["fc4", "fc1"], ["fc1", "fc4"]),
        (("fc2",), ["fc2"]),
    ],
)
def test_the_layers_of_a_table(layers, names):
    at, options = (P.objective, helpers.dense_layers([3, 2, 2, 2, 3]), BATCH), {"key": KEY, "layers": layers}
    assert list(jh.summarize(*at, **options, num_probes=2, num_steps=2)) == [*names, "total"]
    assert list(jh.layer_spectra(*at, **options, num_steps=2)) == [*names, "total"]


def test_a_word_that_is_no_selection_of_layers():
    for call in (jh.summarize, jh.layer_spectra):
        with pytest.raises(ValueError, match=r"unknown layer 'last'; the layers are \['fc1', 'fc2'\]"):
            call(P.objective, P.params, BATCH, key=KEY, layers="last")


# ---- probabilities in place of logits ----


def probabilities(name):
    """Nets that end in a softmax, however it is written."""

    def predict(params, batch):
        logits = helpers.mlp(params, batch)
        if name == "by hand":
            e = jnp.exp(logits - logits.max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True)
        if name == "half precision":
            return jax.nn.softmax(logits.astype(jnp.bfloat16)).astype(jnp.float32)
        return jax.nn.softmax(logits)

    return {"jit": jax.jit, "checkpoint": jax.checkpoint}.get(name, lambda f: f)(predict)


@pytest.mark.parametrize("name", ["softmax", "by hand", "half precision", "jit", "checkpoint"])
def test_a_net_that_ends_in_a_softmax_is_no_net_of_logits(name):
    objective = objective_of(predict=probabilities(name))
    for call in ("hessian", "layer_traces", "ggn_eigenvalues", "summarize", "hessian_trace_penalty"):
        with pytest.raises(
            ValueError, match=r"ends in a softmax.*takes logits.*jnp.log.*lambda outputs, batch: cross_ent"
        ):
            TAKES_A_BATCH[call](objective, P.params, BATCH)


def test_what_the_message_about_a_softmax_offers():
    predict, expected = probabilities("softmax"), jh.ggn_eigenvalues(P.objective, P.params, BATCH)
    logs = objective_of(predict=lambda params, batch: jnp.log(predict(params, batch)))
    np.testing.assert_allclose(jh.ggn_eigenvalues(logs, P.params, BATCH), expected, rtol=1e-3)
    twice = objective_of(lambda outputs, batch: jh.cross_entropy(outputs, batch), predict)
    assert jh.trace(jh.ggn(twice, P.params, BATCH), like=P.params, key=KEY, num_probes=64).mean < 0.9 * expected.sum()


def softmax_over_examples(params, batch):
    return jax.nn.softmax(helpers.mlp(params, batch), axis=0)


def attention_then_sum(params, batch):
    weights = jax.nn.softmax(helpers.mlp(params, batch))
    return weights + helpers.mlp(params, batch)


def log_probabilities(params, batch):
    return jax.nn.log_softmax(helpers.mlp(params, batch))


@pytest.mark.parametrize("predict", [softmax_over_examples, attention_then_sum, log_probabilities])
def test_what_only_looks_like_a_softmax_at_the_end_is_taken(predict):
    jh.hessian(objective_of(predict=predict), P.params, BATCH)
    jh.hessian(objective_of(jh.squared_error, probabilities("softmax")), P.params, {"x": X, "label": X})


# ---- values that are not finite ----


def power(exponent):
    """Of "a" the power of its absolute value, at zero: below 1 the slope is infinite there, below 2 the second one."""

    def predict(params, batch):
        a = (jnp.abs(params["a"]["w"]) ** exponent).sum()
        return (a + (params["z"]["w"] ** 2).sum()) * batch["x"][:, None]

    return jh.Objective(predict, lambda outputs, batch: outputs.mean())


FINITE = {"x": jnp.ones(4)}
AT_ZERO = {"a": {"w": jnp.zeros(2)}, "z": {"w": jnp.ones(2)}}
LATE = jh.Batches([FINITE, {"x": FINITE["x"].at[2].set(jnp.nan)}])
CAUSES = {
    "second derivative": (
        power(1.5),
        FINITE,
        r"loss, 2, .*slope are finite, and its second derivative.* layers \['a'\]",
    ),
    "slope": (power(0.5), FINITE, r"loss is finite, 2, and its slope is not in layers \['a'\]$"),
    "outputs": (
        power(2.0),
        LATE.batches[1],
        r"outputs of predict.* in 1 of 4 rows \(the batch is not finite at \['x'\]",
    ),
    "loss": (jh.Objective(power(2).predict, lambda o, b: jnp.sqrt(-1 - o**2).mean()), FINITE, "loss itself is nan$"),
    "one of many": (power(2.0), LATE, r"outputs of predict .* in 1 of 4 rows .*in batch 1$"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_not_finite_is_named(cause):
    objective, batch, message = CAUSES[cause]
    hv = jh.hessian(objective, AT_ZERO, batch)
    at, like = (objective, AT_ZERO, batch), {"like": AT_ZERO, "key": KEY}
    for name, call in {
        "layer_traces": lambda: jh.layer_traces(*at, key=KEY, num_probes=2),
        "layer_spectra": lambda: jh.layer_spectra(*at, key=KEY, num_steps=2),
        "summarize": lambda: jh.summarize(*at, key=KEY, num_steps=2, num_probes=2),
        "trace": lambda: jh.trace(hv, num_probes=2, **like),
        "spectrum": lambda: jh.spectrum(hv, num_steps=2, **like),
        "linearized": lambda: jh.spectrum(jh.linearize(hv, like=AT_ZERO), num_steps=2, **like),
        "top_eigenpairs": lambda: jh.top_eigenpairs(hv, k=1, **like),
        "lanczos": lambda: jh.lanczos(hv, jax.tree.map(jnp.ones_like, AT_ZERO), 2),
    }.items():
        with pytest.raises(ValueError, match=rf"not finite.*{message}"):
            call()
            pytest.fail(name)


@pytest.mark.parametrize("bad", ["slope", "outputs"])
def test_what_is_not_finite_in_the_gram_matrix(bad):
    objective = jh.Objective(power(0.5).predict, jh.squared_error)
    batch = FINITE | {"label": jnp.ones((4, 1))}
    if bad == "outputs":
        batch["x"] = LATE.batches[1]["x"]
    message = {"slope": r"in layer 'a': .*slope is not in layers \['a'\]", "outputs": r"in 1 of 4 rows \(the batch"}[
        bad
    ]
    for call in (
        lambda: jh.ggn_eigenvalues(objective, AT_ZERO, batch),
        lambda: jh.layer_spectra(objective, AT_ZERO, batch, key=KEY, curvature="ggn", method="gram"),
    ):
        with pytest.raises(ValueError, match=f"not finite {message}"):
            call()
    with pytest.raises(ValueError, match=r"not finite for \['a', 'total'\].*" if bad == "slope" else "in 1 of 4 rows"):
        jh.layer_traces(objective, AT_ZERO, batch, key=KEY, num_probes=2, curvature="ggn")


def test_the_criterion_of_a_trace_of_the_ggn():
    def sharp(outputs, batch):
        return (jnp.abs(outputs - 2) ** 1.5).mean()  # its second derivative is infinite where the outputs are 2

    objective = jh.Objective(power(2.0).predict, sharp)
    with pytest.raises(ValueError, match="not finite"):
        jh.layer_traces(objective, AT_ZERO, FINITE, key=KEY, num_probes=2, curvature="ggn")
    with pytest.raises(ValueError, match="criterion's second derivative is not in layers"):
        jh.trace(jh.ggn(objective, AT_ZERO, FINITE), like=AT_ZERO, key=KEY, num_probes=2)


def test_operators_of_ones_own_that_are_not_finite():
    like = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"not finite at Lanczos step 1: .*NaN in the operator, at \['b'\]$"):
        jh.spectrum(lambda v: v | {"b": v["b"] * jnp.nan}, like=like, key=KEY, num_steps=2)
    with pytest.raises(ValueError, match=r"not finite for \['the operator'\]: .*at \['b'\]$"):
        jh.trace(lambda v: v | {"b": v["b"] * jnp.nan}, like=like, key=KEY, num_probes=2)
    with pytest.raises(ValueError, match="squares overflow; scale the operator down"):
        jh.trace(lambda v: 3e38 * v, like=jnp.ones(3), key=KEY, num_probes=2)


def test_a_net_so_steep_that_its_curvature_overflows():
    objective = jh.Objective(lambda params, batch: 1e25 * params["w"][None] * batch["x"][:, None], jh.squared_error)
    batch = {"x": jnp.arange(1.0, 3.0), "label": jnp.zeros((2, 1))}
    with pytest.raises(
        ValueError, match=r"not finite for \['w', 'total'\]: .*overflow where they are multiplied; scale"
    ):
        jh.layer_traces(objective, {"w": jnp.zeros(1)}, batch, key=KEY, num_probes=2, curvature="ggn")


# ---- nets that are mapped over a mesh ----


SHARD_MAP = getattr(jax, "shard_map", None) or importlib.import_module("jax.experimental.shard_map").shard_map


@pytest.fixture(scope="module")
def mapped():
    """A net under shard_map on a mesh with explicit axes, and the same parameters and batch on one device."""
    if jax.__version_info__ < (0, 7):
        pytest.skip("arrays on explicit axes cannot be indexed before JAX 0.7")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    whole, parts = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def predict(params, batch):
        one = SHARD_MAP(lambda p, x: helpers.mlp(p, {"x": x}), mesh=mesh, in_specs=(whole, parts), out_specs=parts)
        return one(params, batch["x"])

    batch = {"x": normal(1, 8, 3), "y": normal(2, 8, 3)}
    spread = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in {"p": whole, "b": parts}.items()}
    criterion = jh.SquaredError(labels=lambda batch: batch["y"])
    there = (
        jh.Objective(predict, criterion),
        jax.device_put(P.params, spread["p"]),
        jax.device_put(batch, spread["b"]),
    )
    return there, (jh.Objective(helpers.mlp, criterion), P.params, batch)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_auto_is_lanczos_where_a_mapped_net_has_no_gram_matrix(mapped, curvature):
    (found, expected) = (
        jh.layer_spectra(*at, key=KEY, num_steps=4, curvature=curvature, method=method)
        for at, method in zip(mapped, ("auto", "lanczos"), strict=True)
    )
    for name, spec in expected.items():
        np.testing.assert_allclose(found[name].nodes, spec.nodes, atol=1e-4 * abs(spec.nodes).max())


def test_the_table_of_a_mapped_net(mapped):
    found, expected = (
        jh.summarize(*at, key=KEY, num_steps=4, num_probes=64, method=method)
        for at, method in zip(mapped, ("auto", "lanczos"), strict=True)
    )
    for name, record in expected.items():
        assert found[name].lambda_max == pytest.approx(record.lambda_max, rel=1e-3)
        trace = found[name].ggn_trace  # by probes, since rows cannot be cut from arrays on the mesh
        assert abs(trace.mean - record.ggn_trace.mean) < 4 * np.hypot(trace.std_error, record.ggn_trace.std_error)


def test_the_gram_matrix_of_a_mapped_net_says_what_works(mapped):
    message = r"shard_map.*explicit.*method='lanczos', or 'auto'.*AxisType.Auto"
    for call in (
        lambda: jh.ggn_eigenvalues(*mapped[0]),
        lambda: jh.layer_spectra(*mapped[0], key=KEY, curvature="ggn", method="gram"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
