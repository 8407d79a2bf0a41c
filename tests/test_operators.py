"""Hess, G and H against dense float64 matrices; batches; what compiles; what is refused."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, OPERATORS, problem
from jax import lax

import jaxhess as jh

PRECISIONS = {"x64": (jnp.float64, 1e-9), "float32": (jnp.float32, 1e-4)}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """(dtype, relative tolerance), with x64 switched on where it belongs."""
    with jax.enable_x64(request.param == "x64"):
        yield PRECISIONS[request.param]


def assert_trees_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# ---- against dense matrices ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", helpers.SMALL)
def test_whole_net_equals_dense_matrix(name, kind, precision):
    dtype, tolerance = precision
    p = problem(name)
    found = helpers.matrix(p.cast(dtype).operator(kind), p.cast(dtype).params)
    exact = helpers.dense(p, kind)
    # H is zero for linear models, so that errors are measured against Hess.
    assert helpers.distance(found, exact, scale=helpers.dense(p, "hessian")) < tolerance
    assert helpers.distance(found, found.T, scale=helpers.dense(p, "hessian")) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "layer"), [("mlp", "fc1"), ("mlp", "fc2"), ("mlp", "fc3"), ("batch norm", "norm"), ("sequence", "fc1")]
)
def test_layer_block_equals_dense_block(name, layer, kind, precision):
    dtype, tolerance = precision
    p = problem(name)
    found = helpers.matrix(p.cast(dtype).operator(kind, layer), p.cast(dtype).params[layer])
    scale = helpers.dense(p, "hessian", layer)
    assert helpers.distance(found, helpers.dense(p, kind, layer), scale) < tolerance


@pytest.mark.parametrize("name", ["softmax regression", "linear regression"])
def test_regression_equals_its_formula(name, precision):
    dtype, tolerance = precision
    p = problem(name)
    x, layer = (jax.tree.map(lambda a: np.asarray(a, np.float64), t) for t in (p.batch["x"], p.params["fc1"]))
    outputs = x @ layer["w"] + layer["b"]
    if name == "softmax regression":
        curvature = helpers.cross_entropy_hessians(outputs)
    else:
        curvature = np.broadcast_to(2 * np.eye(outputs.shape[-1]), (*outputs.shape, outputs.shape[-1]))
    exact = helpers.regression_hessian(x, curvature)
    p = p.cast(dtype)
    for kind, matrix in {"hessian": exact, "ggn": exact, "functional": 0 * exact}.items():
        assert helpers.distance(helpers.matrix(p.operator(kind), p.params), matrix, exact) < tolerance


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc3"])
def test_lenet_blocks_equal_dense_blocks(layer, precision):
    dtype, tolerance = precision
    p, ggn, hess = problem("lenet"), *(f(problem("lenet"), layer) for f in (helpers.block_ggn, helpers.block_hessian))
    assert helpers.distance(ggn, hess) < 1e-12  # two oracles: f is affine in one layer
    p = p.cast(dtype)
    for kind, exact in {"hessian": hess, "ggn": ggn, "functional": 0 * hess}.items():
        assert helpers.distance(helpers.matrix(p.operator(kind, layer), p.params[layer]), exact, hess) < tolerance


def test_lenet_has_no_functional_part_in_any_layer_but_in_the_whole(x64):
    """ReLU and max-pooling are piecewise linear: H_l = 0 for every layer, H != 0."""
    p = problem("lenet").cast(jnp.float64)

    def norms(layer):
        like = p.params if layer is None else p.params[layer]
        v = jax.tree.map(lambda x: helpers.normal(x.size, *x.shape).astype(np.float64), like)
        products = [jax.tree.leaves(p.operator(kind, layer)(v)) for kind in KINDS]
        hess, ggn, rest = (np.concatenate([np.ravel(x) for x in leaves]) for leaves in products)
        np.testing.assert_allclose(ggn + rest, hess, atol=1e-12 * np.linalg.norm(hess))
        return np.linalg.norm(rest) / np.linalg.norm(hess), helpers.distance(hess, ggn)

    for layer in jh.layer_names(p.params):
        assert max(norms(layer)) < 1e-12, layer
    assert min(norms(None)) > 0.1


# ---- what an operator is ----


@pytest.mark.parametrize("kind", KINDS)
def test_linear_in_v(kind, x64):
    p = problem("mlp").cast(jnp.float64)
    a, b = (helpers.cast(helpers.dense_layers([3, 5, 4, 3], seed=s), jnp.float64) for s in (1, 2))
    operator = p.operator(kind)
    combined = operator(jax.tree.map(lambda x, y: 2 * x - 3 * y, a, b))
    assert_trees_close(combined, jax.tree.map(lambda x, y: 2 * x - 3 * y, operator(a), operator(b)), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_and_keep_structure(kind):
    p = problem("mlp")
    product = p.operator(kind)(p.params)
    assert jax.tree.structure(product) == jax.tree.structure(p.params)
    assert [x.dtype for x in jax.tree.leaves(product)] == [np.float32] * 6
    total = jax.tree.map(jnp.add, p.operator("ggn")(p.params), p.operator("functional")(p.params))
    assert_trees_close(total, p.operator("hessian")(p.params))


@pytest.mark.parametrize("layer", [None, "fc2"])
def test_linearize_equals_the_operator(layer):
    p = problem("mlp")
    like = p.params if layer is None else p.params[layer]
    for kind in KINDS:
        operator = p.operator(kind, layer)
        assert_trees_close(jh.linearize(operator, like=like)(like), operator(like))
    assert_trees_close(jh.linearize(lambda v: jax.tree.map(lambda x: 2 * x, v), like=like)(like), [2 * x for x in [like]][0]
                       if False else jax.tree.map(lambda x: 2 * x, like))


def test_passes_through_jit_vmap_and_grad_as_an_argument():
    p = problem("mlp")
    operator = p.operator("hessian")
    quadratic = jax.jit(lambda operator, v: sum(map(jnp.vdot, jax.tree.leaves(v), jax.tree.leaves(operator(v)))))
    expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(p.params)])
    value = expected @ helpers.dense(p, "hessian") @ expected
    np.testing.assert_allclose(quadratic(operator, p.params), value, rtol=1e-5)
    slope = jax.grad(quadratic, argnums=1)(operator, p.params)
    assert_trees_close(slope, jax.tree.map(lambda x: 2 * x, operator(p.params)), 1e-4)


def test_unused_parameters_get_zeros():
    p = problem("mlp")
    params = p.params | {"frozen": {"w": np.ones((2, 2), np.float32)}}
    objective = jh.Objective(lambda q, b: helpers.mlp({k: q[k] for k in p.params}, b), jh.cross_entropy)
    for operator in OPERATORS.values():
        product = operator(objective, params, p.batch)(params)
        assert not product.pop("frozen")["w"].any()
        assert_trees_close(product, operator(p.objective, p.params, p.batch)(p.params))
        assert not operator(objective, params, p.batch, layer="frozen")(params["frozen"])["w"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_are_taken_in_float32(half, kind):
    p = problem("mlp")
    coarse = helpers.cast(p.params, half)
    product = OPERATORS[kind](p.objective, coarse, p.batch)(coarse)
    assert {x.dtype for x in jax.tree.leaves(product)} == {jnp.dtype(jnp.float32)}
    again = helpers.cast(coarse, jnp.float32)
    assert_trees_close(product, OPERATORS[kind](p.objective, again, p.batch)(again), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_has_aux(kind):
    p = problem("mlp")
    objective = jh.Objective(lambda q, b: (helpers.mlp(q, b), "aux"), jh.cross_entropy)
    product = OPERATORS[kind](objective, p.params, p.batch, has_aux=True)(p.params)
    assert_trees_close(product, p.operator(kind)(p.params))
    if kind == "hessian":
        plain = jh.hessian(lambda q, b: (p.objective(q, b), {"aux": 1}), p.params, p.batch, has_aux=True)
        assert_trees_close(plain(p.params), product)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_statistics_and_a_dropout_key_travel_in_the_batch(kind):
    """With both fixed the block of a layer before them is the dense one of the same fixed net."""
    p = problem("batch statistics and dropout")
    found = helpers.matrix(p.operator(kind), p.params)
    assert helpers.distance(found, helpers.dense(p, kind), helpers.dense(p, "hessian")) < 1e-4
    other = p.batch | {"key": jax.random.key(8)}
    assert helpers.distance(helpers.matrix(OPERATORS[kind](p.objective, p.params, other), p.params), found) > 1e-2


def test_a_scan_in_the_loss_equals_the_unrolled_net():
    blocks = {"w": helpers.normal(1, 3, 4, 4, scale=0.5), "b": helpers.normal(2, 3, 4)}
    batch = {"x": helpers.normal(3, 5, 4), "label": helpers.labels(4, 4, 5)}

    def scanned(params, batch):
        return lax.scan(lambda x, layer: (jnp.tanh(helpers.affine(layer, x)), None), batch["x"], params["blocks"])[0]

    def unrolled(params, batch):
        x = batch["x"]
        for i in range(3):
            x = jnp.tanh(helpers.affine(jax.tree.map(lambda a, i=i: a[i], params["blocks"]), x))
        return x

    params = {"blocks": blocks}
    for operator in OPERATORS.values():
        one, two = (operator(jh.Objective(f, jh.cross_entropy), params, batch) for f in (scanned, unrolled))
        assert_trees_close(one(params), two(params))
        # The block of one slice: a vector that is zero elsewhere, and that slice of its product.
        part = jh.subtree(params, "blocks[1]")
        only = jax.tree.map(lambda a, v: jnp.zeros_like(a).at[1].set(v), blocks, part)
        block = operator(jh.Objective(scanned, jh.cross_entropy), params, batch, layer="blocks[1]")(part)
        assert_trees_close(block, jax.tree.map(lambda a: a[1], two({"blocks": only})["blocks"]))


# ---- many batches ----


def split(batch, *sizes):
    """A batch in pieces of these sizes."""
    ends = np.cumsum(sizes)
    return [jax.tree.map(lambda x, e=end, s=size: x[e - s : e], batch) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("layer", [None, "fc2"])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_equal_the_one_batch(kind, layer):
    p = problem("mlp")
    like = p.params if layer is None else p.params[layer]
    many = OPERATORS[kind](p.objective, p.params, jh.Batches(split(p.batch, 3, 3, 1)), layer=layer)
    assert_trees_close(many(like), p.operator(kind, layer)(like))
    assert_trees_close(jh.linearize(many, like=like)(like), many(like))


@functools.cache
def mlp_and_batches():
    p = problem("mlp")
    return p, jh.Batches(split(p.batch, 3, 3, 1))


@pytest.mark.parametrize("curvature", KINDS)
def test_batches_in_traces_and_spectra(curvature):
    p, batches = mlp_and_batches()
    exact = {name: helpers.dense(p, curvature, name) for name in p.params} | {"total": helpers.dense(p, curvature)}
    traces = jh.layer_traces(p.objective, p.params, batches, key=jax.random.key(0), num_probes=128, curvature=curvature)
    spectra = jh.layer_spectra(p.objective, p.params, batches, key=jax.random.key(0), curvature=curvature)
    assert list(traces) == list(spectra) == list(exact)
    for name, matrix in exact.items():
        assert abs(traces[name].mean - np.trace(matrix)) < 5 * traces[name].std_error, name
        np.testing.assert_allclose(spectra[name].nodes, np.linalg.eigvalsh(matrix), atol=1e-5 * np.linalg.norm(matrix))
    operator = OPERATORS[curvature](p.objective, p.params, batches)
    one = OPERATORS[curvature](p.objective, p.params, p.batch)
    estimates = [jh.trace(o, like=p.params, key=jax.random.key(1), num_probes=9) for o in (operator, one)]
    np.testing.assert_allclose(estimates[0], estimates[1], rtol=1e-4)


def test_batches_are_read_afresh_and_may_be_any_iterable():
    p, batches = mlp_and_batches()

    class Loader:
        reads = 0

        def __iter__(self):
            Loader.reads += 1
            return iter(batches.batches)

    operator = jh.hessian(p.objective, p.params, jh.Batches(Loader()))
    before = Loader.reads
    for _ in range(2):
        assert_trees_close(operator(p.params), p.operator("hessian")(p.params))
    assert Loader.reads == before + 2


def test_size_is_said_where_the_arrays_share_no_axis():
    p, batches = mlp_and_batches()
    net = problem("batch statistics and dropout")
    odd = [{**b, "stats": net.batch["stats"], "key": net.batch["key"]} for b in batches]
    with pytest.raises(ValueError, match="size="):
        jh.hessian(net.objective, net.params, jh.Batches(odd))
    batches = jh.Batches(odd, size=lambda batch: len(batch["x"]))
    # Without the key, whose masks depend on the size of a batch, the mean over batches is that over examples.
    batches = jh.Batches([{k: v for k, v in b.items() if k != "key"} for b in batches], size=batches.size)
    whole = {k: v for k, v in net.batch.items() if k != "key"} | {"label": p.batch["label"]}
    product = jh.hessian(net.objective, net.params, batches)(net.params)
    assert_trees_close(product, jh.hessian(net.objective, net.params, whole)(net.params))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_an_operator_over_batches_says_that_it_cannot_be_traced(transform):
    p, batches = mlp_and_batches()
    operator = jh.hessian(p.objective, p.params, batches)
    stacked = jax.tree.map(lambda x: x[None], p.params)
    with pytest.raises(TypeError, match="Batches.*jit"):
        transform(operator)(stacked if transform is jax.vmap else p.params)
    with pytest.raises(TypeError, match="Batches.*jit"):
        jax.jit(lambda v: jh.lanczos(operator, v, 3).alphas)(p.params)
    with pytest.raises(TypeError, match="Batches.*jit"):
        jax.jit(lambda key: jh.trace(operator, like=p.params, key=key).mean)(jax.random.key(0))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda: (b for b in [1]), TypeError, "generator.*only once"),
        (lambda: iter([1]), TypeError, "only once"),
        (lambda: 3, TypeError, "iterable.*int"),
    ],
)
def test_batches_refuse_what_cannot_be_read_again(batches, error, message):
    with pytest.raises(error, match=message):
        jh.Batches(batches())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batches"),
        ([{"x": np.zeros((0, 3), np.float32), "label": np.zeros(0, int)}], "batch 0 has 0 examples"),
        ([{"x": np.zeros((2, 3), np.float32), "label": np.zeros(3, int)}], "leading axis"),
    ],
)
def test_batches_that_hold_nothing_or_do_not_fit(batches, message):
    p = problem("mlp")
    with pytest.raises(ValueError, match=message):
        jh.hessian(p.objective, p.params, jh.Batches(batches))


# ---- compilations ----


def test_new_values_and_new_objectives_of_the_same_functions_compile_nothing():
    p = problem("mlp")
    predict, criterion = helpers.Counter(helpers.mlp), jh.cross_entropy

    def everything(objective, params, batch, key):
        for kind, operator in OPERATORS.items():
            operator(objective, params, batch)(params)
            operator(objective, params, batch, layer="fc2")(params["fc2"])
            jh.layer_traces(objective, params, batch, key=key, num_probes=2, curvature=kind)
        hv = jh.hessian(objective, params, batch)
        jh.linearize(hv, like=params)(params)
        jh.trace(hv, like=params, key=key, num_probes=2)
        jh.lanczos(hv, params, 3)
        jh.top_eigenpairs(hv, like=params, key=key, k=2, num_steps=3)
        jh.layer_spectra(objective, params, batch, key=key, num_steps=3)

    everything(jh.Objective(predict, criterion), p.params, p.batch, jax.random.key(0))
    traces = predict.calls
    params = jax.tree.map(lambda x: x + 1, p.params)
    batch = p.batch | {"x": p.batch["x"] + 1}
    with helpers.counted_compilations() as compilations:
        everything(jh.Objective(predict, jh.CrossEntropy()), params, batch, jax.random.key(1))
    assert predict.calls == traces
    assert not compilations


# ---- what is refused ----


def loss(params, batch):
    return problem("mlp").objective(params, batch)


BAD_POINTS = {
    "unknown layer": (lambda p: (loss, p.params, p.batch, "fc9"), ValueError, r"fc9.*\['fc1', 'fc2', 'fc3'\]"),
    "layer is no name": (lambda p: (loss, p.params, p.batch, 2), TypeError, "name.*2"),
    "integer parameters": (
        lambda p: (loss, p.params | {"fc1": {"w": np.ones((3, 5), int), "b": np.ones(5)}}, p.batch, None),
        TypeError,
        r"\['fc1'\]\['w'\].*int64.*convert",
    ),
    "complex parameters": (lambda p: (loss, {"w": np.ones(2, complex)}, p.batch, None), TypeError, "complex128.*real"),
    "no array": (lambda p: (loss, p.params | {"act": "relu"}, p.batch, None), TypeError, r"\['act'\].*str"),
    "no parameters": (lambda p: (loss, {}, p.batch, None), ValueError, "no arrays"),
    "NaN": (
        lambda p: (loss, p.params | {"fc2": jax.tree.map(lambda x: x * np.nan, p.params["fc2"])}, p.batch, None),
        ValueError,
        r"not finite at .*\['fc2'\]\['b'\]",
    ),
    "loss per example": (lambda p: (lambda q, b: helpers.mlp(q, b)[:, 0], p.params, p.batch, None), TypeError, r"scalar.*mean"),
    "loss with aux": (lambda p: (lambda q, b: (loss(q, b), 1), p.params, p.batch, None), TypeError, "has_aux=True"),
    "integer loss": (lambda p: (lambda q, b: jnp.array(1), p.params, p.batch, None), TypeError, "floating-point scalar"),
    "no function": (lambda p: (3, p.params, p.batch, None), TypeError, r"loss\(params, batch\).*3"),
    "empty batch": (
        lambda p: (loss, p.params, {"x": np.zeros((0, 3)), "label": np.zeros(0, int)}, None),
        ValueError,
        r"empty at .*x.*\(0, 3\)",
    ),
    "inconsistent batch": (
        lambda p: (p.objective, p.params, p.batch | {"label": p.batch["label"][:-1]}, None),
        ValueError,
        r"labels of shape \(6,\).*\(7, 3\)",
    ),
    "labels out of range": (
        lambda p: (p.objective, p.params, p.batch | {"label": p.batch["label"] + 1}, None),
        ValueError,
        r"labels run from \d to 3, outside 0..2",
    ),
    "outputs are a tuple": (
        lambda p: (jh.Objective(lambda q, b: (helpers.mlp(q, b), 1), jh.cross_entropy), p.params, p.batch, None),
        TypeError,
        "predict must return one floating-point array",
    ),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_input_is_refused_when_the_operator_is_made(case):
    make, error, message = BAD_POINTS[case]
    function, params, batch, layer = make(problem("mlp"))
    with pytest.raises(error, match=message):
        jh.hessian(function, params, batch, layer=layer)


@pytest.mark.parametrize("operator", [jh.ggn, jh.functional_hessian])
def test_the_split_needs_an_objective(operator):
    p = problem("mlp")
    with pytest.raises(TypeError, match=r"loss.*Objective\(predict, criterion\)"):
        operator(loss, p.params, p.batch)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (lambda params: {"fc1": params["fc1"]}, "v does not match.*structure"),
        (lambda params: jax.tree.map(lambda x: x[:2], params), r"v does not match.*\['fc1'\]\['b'\].*\(2,\).*\(5,\)"),
    ],
)
def test_a_vector_that_does_not_match(vector, message):
    p = problem("mlp")
    with pytest.raises(ValueError, match=message):
        p.operator("hessian")(vector(p.params))


def test_a_nan_is_carried_through_jit():
    p = problem("mlp")
    bad = jax.tree.map(lambda x: x * np.nan, p.params)
    product = jax.jit(lambda params: jh.hessian(p.objective, params, p.batch)(p.params))(bad)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(product))


@pytest.mark.parametrize("place", ["jit", "second batch"])
def test_labels_out_of_range_never_give_a_finite_hessian(place):
    """Where their values are unknown (under jit), or only seen later (in a further batch), the result says so."""
    p = problem("mlp")
    bad = p.batch | {"label": p.batch["label"] + 1}
    if place == "jit":
        product = jax.jit(lambda batch: jh.hessian(p.objective, p.params, batch)(p.params))(bad)
        assert all(np.isnan(x).all() for x in jax.tree.leaves(product))
    else:
        with pytest.raises(ValueError, match="labels run from"):
            jh.hessian(p.objective, p.params, jh.Batches([p.batch, bad]))(p.params)
