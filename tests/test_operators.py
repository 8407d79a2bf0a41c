"""Hess, G and H against dense float64 matrices; batches; what compiles; what is refused."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def in_precisions(arguments, cases, also_in_float32):
    """All cases under x64, some of them in float32 too."""
    cases = [("x64", case) for case in cases] + [("float32", case) for case in also_in_float32]
    cases = [(precision, *([case] if isinstance(case, str) else case)) for precision, case in cases]
    return pytest.mark.parametrize(("precision", *arguments), cases, indirect=["precision"])


some_layers = pytest.mark.parametrize(("kind", "layer"), [*((kind, None) for kind in KINDS), ("hessian", "fc2")])


def assert_trees_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# ---- against dense matrices ----


@pytest.mark.parametrize("kind", KINDS)
@in_precisions(["name"], helpers.SMALL, ["mlp"])
def test_whole_net_equals_dense_matrix(name, kind, precision):
    dtype, tolerance = precision
    p = problem(name)
    scale = helpers.dense(p, "hessian")  # and not H, which may be zero
    found = helpers.matrix(p.cast(dtype).operator(kind), p.cast(dtype).params)
    assert helpers.distance(found, helpers.dense(p, kind), scale) < tolerance
    assert helpers.distance(found, found.T, scale) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@in_precisions(
    ["name", "layer"],
    [("mlp", "fc1"), ("mlp", "fc2"), ("batch norm", "norm"), ("sequence", "fc1")],
    [("mlp", "fc1")],
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
    for kind in ("hessian", "ggn"):
        assert helpers.distance(helpers.matrix(p.operator(kind), p.params), exact) < tolerance
    assert not helpers.matrix(p.operator("functional"), p.params).any()  # no difference of two that round


@pytest.mark.parametrize("layer", ["conv1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv2", "fc3"))])
def test_lenet_blocks_equal_dense_blocks(layer, precision):
    dtype, tolerance = precision
    p, ggn, hess = problem("lenet"), *(f(problem("lenet"), layer) for f in (helpers.block_ggn, helpers.block_hessian))
    assert helpers.distance(ggn, hess) < 1e-12  # two oracles: f is affine in one layer
    p = p.cast(dtype)
    chunk = 52 if layer == "conv1" else 302
    for kind, exact in {"hessian": hess, "ggn": ggn}.items():
        assert helpers.distance(helpers.matrix(p.operator(kind, layer), p.params[layer], chunk), exact) < tolerance
    assert not helpers.matrix(p.operator("functional", layer), p.params[layer], chunk).any()


def test_on_lenet_the_parts_of_every_layer_agree_and_those_of_the_whole_do_not(x64):
    """ReLU and max-pooling are piecewise linear: Hess_l = G_l for every layer, but Hess != G."""
    p = problem("lenet").cast(jnp.float64)
    hv, gv = p.operator("hessian"), p.operator("ggn")
    vector = jax.tree.map(lambda x: helpers.normal(x.size, *x.shape), p.params)
    zeros = jax.tree.map(np.zeros_like, vector)
    for layer in p.params:
        only = zeros | {layer: vector[layer]}
        assert helpers.distance(helpers.ravel(gv(only)[layer]), helpers.ravel(hv(only)[layer])) < 1e-12, layer
    assert helpers.distance(helpers.ravel(gv(vector)), helpers.ravel(hv(vector))) > 0.1


# ---- what an operator is ----


@pytest.mark.parametrize("kind", KINDS)
def test_linear_in_v(kind, x64):
    p = problem("mlp").cast(jnp.float64)
    operator = p.operator(kind)
    a, b = (helpers.cast(helpers.dense_layers([3, 4, 3], seed=s), np.float64) for s in (1, 2))
    combined = jax.tree.map(lambda x, y: 2 * np.asarray(x) - 3 * np.asarray(y), a, b)
    products = (helpers.ravel(operator(v)) for v in (a, b, combined))
    one, two, both = products
    np.testing.assert_allclose(both, 2 * one - 3 * two, atol=1e-12)


def test_the_two_parts_add_up_to_the_hessian():
    p = problem("mlp")
    hess, ggn, rest = (helpers.ravel(p.operator(kind)(p.params)) for kind in KINDS)
    np.testing.assert_allclose(ggn + rest, hess, atol=1e-6)
    assert np.linalg.norm(rest) > 0.1 * np.linalg.norm(hess)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_has_the_structure_and_types_of_the_parameters(kind):
    p = problem("mlp")
    product = p.operator(kind)(p.params)
    assert jax.tree.structure(product) == jax.tree.structure(p.params)
    for x, y in zip(jax.tree.leaves(product), jax.tree.leaves(p.params), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@some_layers
def test_linearize_equals_the_operator(kind, layer):
    p = problem("mlp")
    like = p.params if layer is None else p.params[layer]
    operator = p.operator(kind, layer)
    assert_trees_close(jh.linearize(operator, like=like)(like), operator(like))


def test_linearize_takes_any_linear_function():
    twice = jh.linearize(lambda v: {"a": 2 * v["a"]}, like={"a": jnp.zeros(3)})
    np.testing.assert_array_equal(twice({"a": jnp.arange(3.0)})["a"], [0, 2, 4])


def test_passes_through_jit_and_grad_as_an_argument():
    p = problem("mlp")
    quadratic = jax.jit(lambda operator, v: optax.tree.vdot(v, operator(v)))
    flat = helpers.ravel(p.params)
    operator = p.operator("hessian")
    np.testing.assert_allclose(quadratic(operator, p.params), flat @ helpers.dense(p, "hessian") @ flat, rtol=1e-5)
    slope = helpers.ravel(jax.grad(quadratic, argnums=1)(operator, p.params))
    np.testing.assert_allclose(slope, 2 * helpers.dense(p, "hessian") @ flat, atol=1e-5)


def test_unused_parameters_get_zeros():
    p = problem("mlp")
    params = p.params | {"frozen": {"w": np.ones((2, 2), np.float32)}}
    objective = jh.Objective(lambda q, b: helpers.mlp({k: q[k] for k in p.params}, b), jh.cross_entropy)
    for operator in OPERATORS.values():
        product = operator(objective, params, p.batch)(params)
        assert not product.pop("frozen")["w"].any()
        assert_trees_close(product, operator(p.objective, p.params, p.batch)(p.params))
        assert not operator(objective, params, p.batch, layer="frozen")(params["frozen"])["w"].any()


@pytest.mark.parametrize(("half", "kind"), [*((jnp.bfloat16, kind) for kind in KINDS), (jnp.float16, "hessian")])
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


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_scan_in_the_loss_equals_the_unrolled_net(kind):
    params = {"blocks": {"w": helpers.normal(1, 3, 4, 4, scale=0.5), "b": helpers.normal(2, 3, 4)}}
    batch = {"x": helpers.normal(3, 5, 4), "label": helpers.labels(4, 4, 5)}

    def block(x, layer):
        return jnp.tanh(helpers.affine(layer, x)), None

    def scanned(params, batch):
        return lax.scan(block, batch["x"], params["blocks"])[0]

    def unrolled(params, batch):
        return lax.scan(block, batch["x"], params["blocks"], unroll=True)[0]

    one, two = (OPERATORS[kind](jh.Objective(f, jh.cross_entropy), params, batch) for f in (scanned, unrolled))
    assert_trees_close(one(params), two(params))
    # The block of one slice: a vector that is zero elsewhere, and that slice of its product.
    part = jax.tree.map(lambda x: x[1], params["blocks"])
    only = jax.tree.map(lambda x: np.where(np.arange(3).reshape(-1, *[1] * (x.ndim - 1)) == 1, x, 0), params)
    block_product = OPERATORS[kind](jh.Objective(scanned, jh.cross_entropy), params, batch, layer="blocks[1]")(part)
    assert_trees_close(block_product, jax.tree.map(lambda x: x[1], two(only)["blocks"]))


# ---- many batches ----


def split(batch, *sizes):
    """A batch in pieces of these sizes."""
    ends = np.cumsum(sizes)
    return [jax.tree.map(lambda x, e=end, s=size: x[e - s : e], batch) for end, size in zip(ends, sizes, strict=True)]


@some_layers
def test_ragged_batches_equal_the_one_batch(kind, layer):
    p = problem("mlp")
    like = p.params if layer is None else p.params[layer]
    many = OPERATORS[kind](p.objective, p.params, jh.Batches(split(p.batch, 3, 3, 1)), layer=layer)
    assert_trees_close(many(like), p.operator(kind, layer)(like))
    assert_trees_close(jh.linearize(many, like=like)(like), many(like))


@functools.cache
def regression_and_batches():
    """A problem whose products compile quickly, and its batch in a whole and a ragged piece."""
    p = problem("softmax regression")
    return p, jh.Batches(split(p.batch, 4, 3))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_batches_in_layer_traces(curvature):
    p, batches = regression_and_batches()
    exact = np.trace(helpers.dense(p, curvature))
    options = dict(key=jax.random.key(0), num_probes=128, curvature=curvature)
    traces = jh.layer_traces(p.objective, p.params, batches, **options)
    assert list(traces) == ["fc1", "total"]
    for estimate in traces.values():
        assert abs(estimate.mean - exact) < 4 * estimate.std_error


def test_batches_in_layer_spectra():
    p, batches = regression_and_batches()
    exact = np.linalg.eigvalsh(helpers.dense(p, "hessian"))
    spectra = jh.layer_spectra(p.objective, p.params, batches, key=jax.random.key(0))
    assert list(spectra) == ["fc1", "total"]
    for spec in spectra.values():
        np.testing.assert_allclose(spec.nodes, exact, atol=1e-5)


def test_batches_in_estimators_equal_the_one_batch():
    p, batches = regression_and_batches()
    many, one = (jh.hessian(p.objective, p.params, b) for b in (batches, p.batch))
    for estimate in (
        lambda hv: jh.trace(hv, like=p.params, key=jax.random.key(1), num_probes=9)[:2],
        lambda hv: jh.lanczos(hv, p.params, 4).alphas,
        lambda hv: jh.top_eigenpairs(hv, like=p.params, key=jax.random.key(1), k=3)[0],
    ):
        np.testing.assert_allclose(estimate(many), estimate(one), rtol=1e-4)


def test_batches_are_read_afresh_and_may_be_any_iterable():
    p, batches = regression_and_batches()

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
    p = problem("batch statistics and dropout")
    shared = {"stats": p.batch["stats"]}
    whole = {k: v for k, v in p.batch.items() if k not in ("stats", "key")}  # dropout masks depend on the size
    pieces = [piece | shared for piece in split(whole, 5, 2)]
    with pytest.raises(ValueError, match=r"leading axis.*stats.*size="):
        jh.hessian(p.objective, p.params, jh.Batches(pieces))
    batches = jh.Batches(pieces, size=lambda batch: len(batch["x"]))
    product = jh.hessian(p.objective, p.params, batches)(p.params)
    assert_trees_close(product, jh.hessian(p.objective, p.params, whole | shared)(p.params))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_an_operator_over_batches_says_that_it_cannot_be_traced(transform):
    p, batches = regression_and_batches()
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
    p = problem("softmax regression")
    predict = helpers.Counter(helpers.mlp)

    def everything(objective, params, batch, key):
        for kind, operator in OPERATORS.items():
            operator(objective, params, batch)(params)
            jh.layer_traces(objective, params, batch, key=key, num_probes=2, curvature=kind)
        operator(objective, params, batch, layer="fc1")(params["fc1"])
        hv = jh.linearize(jh.hessian(objective, params, batch), like=params)
        jh.trace(hv, like=params, key=key, num_probes=2)
        jh.top_eigenpairs(hv, like=params, key=key, k=2, num_steps=3)
        jh.layer_spectra(objective, params, batch, key=key, num_steps=3)
        jh.ggn_eigenvalues(objective, params, batch)

    everything(jh.Objective(predict, jh.CrossEntropy()), p.params, p.batch, jax.random.key(0))
    traces = predict.calls
    batch = p.batch | {"x": p.batch["x"] + 1}
    with helpers.counted_compilations() as compilations:
        everything(jh.Objective(predict, jh.CrossEntropy()), unit_steps(p.params), batch, jax.random.key(1))
    assert predict.calls == traces
    assert not compilations


def unit_steps(params):
    return jax.tree.map(lambda x: x + np.float32(1), params)


# ---- what is refused ----


def loss(params, batch):
    return problem("mlp").objective(params, batch)


BAD_POINTS = {
    "unknown layer": (lambda p: (loss, p.params, p.batch, "fc9"), ValueError, r"fc9.*\['fc1', 'fc2'\]"),
    "layer is no name": (lambda p: (loss, p.params, p.batch, 2), TypeError, "name.*2"),
    "integer parameters": (
        lambda p: (loss, p.params | {"fc1": {"w": np.ones((3, 4), int), "b": np.ones(4)}}, p.batch, None),
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
    "loss of each example": (
        lambda p: (lambda q, b: helpers.mlp(q, b)[:, 0], p.params, p.batch, None),
        TypeError,
        "scalar.*mean",
    ),
    "loss with aux": (lambda p: (lambda q, b: (loss(q, b), 1), p.params, p.batch, None), TypeError, "has_aux=True"),
    "integer loss": (
        lambda p: (lambda q, b: jnp.array(1), p.params, p.batch, None),
        TypeError,
        "floating-point scalar",
    ),
    "no function": (lambda p: (3, p.params, p.batch, None), TypeError, r"loss\(params, batch\).*3"),
    "empty batch": (
        lambda p: (loss, p.params, {"x": np.zeros((0, 3)), "label": np.zeros(0, int)}, None),
        ValueError,
        r"empty at .*label.*\(0,\)",
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
        (lambda params: jax.tree.map(lambda x: x[:2], params), r"v does not match.*\['fc1'\]\['b'\].*\(2,\).*\(4,\)"),
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
    assert np.isnan(helpers.ravel(product)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_may_be_concrete_where_the_batch_is_traced(kind):
    p = problem("softmax regression")
    product = jax.jit(lambda batch: OPERATORS[kind](p.objective, p.params, batch)(p.params))(p.batch)
    assert_trees_close(product, p.operator(kind)(p.params))


@pytest.mark.parametrize("place", ["jit", "second batch"])
def test_labels_out_of_range_never_give_a_finite_hessian(place):
    """Where their values are unknown (under jit), or only seen later (in a further batch), the result says so."""
    p = problem("mlp")
    bad = p.batch | {"label": p.batch["label"] + 1}
    if place == "jit":
        make = jax.jit(lambda params, batch: jh.hessian(p.objective, params, batch)(params))
        assert np.isnan(helpers.ravel(make(p.params, bad))).all()
    else:
        with pytest.raises(ValueError, match="labels run from"):
            jh.hessian(p.objective, p.params, jh.Batches([p.batch, bad]))(p.params)


def test_one_batch_is_read_ahead_and_no_more():
    log = []

    class Result:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            log.append(f"wait {self.number}")

    class Reader:
        def __iter__(self):
            for number in range(4):
                log.append(f"read {number}")
                yield np.zeros(1)

    jh.Batches(Reader()).fold(lambda mean, batch, share, number: Result(number))
    assert log == ["read 0", "read 1", "wait 0", "read 2", "wait 1", "read 3", "wait 2"]


# ---- half and mixed precision, negated products over batches, many errors ----


def test_linearized_products_of_half_precision():
    p = problem("mlp")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), p.params)
    hv = jh.hessian(p.objective, half, p.batch)
    v = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    plain, linear = hv(v), jh.linearize(hv, like=half)(v)
    np.testing.assert_allclose(helpers.ravel(linear), helpers.ravel(plain), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="does not match the parameters"):
        jh.linearize(hv, like=half)({"fc1": v["fc1"]})


def test_negated_products_over_batches():
    p = problem("mlp")
    hv = jh.hessian(p.objective, p.params, jh.Batches([p.batch, p.batch]))

    def negative(v):
        return jax.tree.map(jnp.negative, hv(v))

    key = jax.random.key(0)
    values, _, residuals = jh.top_eigenpairs(negative, like=p.params, key=key, k=2, num_steps=30)
    whole = jh.hessian(p.objective, p.params, p.batch)
    spectrum = jh.spectrum(whole, like=p.params, key=key, num_steps=30)
    assert values[0] == pytest.approx(-spectrum.lambda_min, rel=1e-3) and residuals.max() < 1e-2
    one, two = (jh.trace(f, like=p.params, key=key, num_probes=4).mean for f in (negative, whole))
    assert one == pytest.approx(-two, rel=1e-4)


def test_weights_as_sizes_of_batches():
    batches = [{"x": jnp.ones(2), "w": jnp.array([0.2, 0.3])}, {"x": 3 * jnp.ones(1), "w": jnp.array([0.25])}]

    def loss(p, batch):
        return jnp.sum(batch["w"] * batch["x"] * p**2) / jnp.sum(batch["w"])

    hv = jh.hessian(loss, jnp.float32(1.0), jh.Batches(batches, size=lambda batch: batch["w"].sum()))
    np.testing.assert_allclose(hv(jnp.float32(1.0)), 2 * (0.5 * 1 + 0.25 * 3) / 0.75, rtol=1e-6)


def test_loaders_that_start_only_once_are_refused():
    class Once:
        def __init__(self):
            self.running = iter([jnp.ones(2)])

        def __iter__(self):
            return self.running

    with pytest.raises(TypeError, match="only once"):
        jh.Batches(Once())


def test_complex_vectors_and_losses_without_hash_are_refused():
    p = problem("mlp")
    hv = jh.hessian(p.objective, p.params, p.batch)
    with pytest.raises(TypeError, match="v is complex at"):
        hv(jax.tree.map(lambda x: 1j * x, p.params))

    class Loss:
        __hash__ = None

        def __call__(self, params, batch):
            return jnp.sum(params**2)

    with pytest.raises(TypeError, match="the loss, a Loss, has no hash"):
        jh.hessian(Loss(), jnp.ones(2), None)
