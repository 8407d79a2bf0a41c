"""Errors that help: each names the thing, says what it is, and ends in what to write instead."""

import collections
import dataclasses
import inspect

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
    with pytest.raises(TypeError, match=r"attend at .*test_errors.py:\d+, .*custom_vjp.*'ggn'.*'gram'.*custom_jvp"):
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
        "trace": lambda: jh.trace(hv, like=params, **few),
        "layer_traces": lambda: jh.layer_traces(*at, **few),
        "layer_traces, ggn": lambda: jh.layer_traces(*at, **few, curvature="ggn", probe="gaussian"),
        "layer_traces, jit": lambda: jax.jit(lambda p: jh.layer_traces(objective, p, batch, **few)["total"].mean)(
            params
        ),
        "lanczos": lambda: jh.lanczos(hv, params, 2, restart_key=KEY),
        "lanczos, host": lambda: jh.lanczos(hv, params, 2, reorthogonalize="host"),
        "lanczos, jit": lambda: jax.jit(lambda p: jh.lanczos(hv, p, 2, reorthogonalize=False).alphas)(params),
        "top_eigenpairs": lambda: jh.top_eigenpairs(hv, like=params, key=KEY, k=1, num_steps=2),
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
        "summarize": lambda: str(jh.summarize(*at, num_steps=2, **few)),
        "layer_names": lambda: jh.layer_names(params, objective, batch),
        "subtree": lambda: jh.subtree(params, "fc1"),
        "middle_layers": lambda: jh.middle_layers(["fc1", "fc2"]),
        "wasserstein": lambda: jh.wasserstein(*SPECTRA, normalize=True),
        "jensen_shannon": lambda: jh.jensen_shannon(*SPECTRA),
        "kl_divergence": lambda: jh.kl_divergence(*SPECTRA),
        "count_outliers": lambda: jh.count_outliers(jnp.arange(20.0)),
    }


SPECTRA = jh.Spectrum([0.0, 1.0], [0.5, 0.5], 2), jh.Spectrum([0.0, 2.0], [0.5, 0.5], 2)
BATCH = P.batch | {"label": np.arange(7, dtype=np.int32) % 3}
HALF = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), P.params)
NETS = {
    "cross-entropy": (P.objective, P.params, BATCH),
    "own criterion": (problem("mlp, own criterion").objective, P.params, BATCH),
    "bfloat16": (P.objective, HALF, BATCH),
}


def test_every_public_function_is_tried():
    public = {name for name, value in vars(jh).items() if inspect.isfunction(value)}
    assert public == {name.split(",")[0] for name in everything(*NETS["cross-entropy"])}


@pytest.mark.parametrize("net", NETS)
def test_strict_promotion_of_types(net):
    with jax.numpy_dtype_promotion("strict"):
        for name, call in everything(*NETS[net]).items():
            if not (net == "bfloat16" and name == "layer_names"):  # the user's own loss, of parameters as they are
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
        "layer_traces": lambda size: jh.layer_traces(*at, P.batch, chunk_size=size, **few)["total"],
        "ggn": lambda size: jh.layer_traces(*at, P.batch, chunk_size=size, curvature="ggn", **few)["total"],
        "Batches": lambda size: jh.layer_traces(*at, MANY, chunk_size=size, curvature="ggn", **few)["total"],
    }


@pytest.mark.parametrize("impl", OTHER_KEYS)
@pytest.mark.parametrize("name", probed(KEY))
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
