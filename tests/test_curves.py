"""Second derivatives along directions in single layers: of many operations, as samples of traces, and as products."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import problem

import jaxhess as jh
from jaxhess import quadrature
from jaxhess._blocks import Blocks, blocks_of
from jaxhess._curves import Curve, tape_of
from jaxhess._programs import equations
from jaxhess._sweep import room_for, sweep_of
from jaxhess._trees import draw_keys, sampler
from jaxhess.problem import pose

X, IMAGES = helpers.normal(0, 4, 6), helpers.normal(1, 2, 8, 8, 3)
W, V, SQUARE, KERNEL = (helpers.normal(*at) for at in ((2, 6, 5), (3, 5, 3), (4, 6, 6), (5, 3, 3, 3, 4)))


def conv(w, images=IMAGES):
    return jax.lax.conv_general_dilated(images, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


VALUES = helpers.normal(6, 2, 3, 1, 5)


def attention(q, k):
    return jax.nn.dot_product_attention(
        q.reshape(2, 3, 1, 5), k.reshape(2, 3, 1, 5), jnp.ones((2, 3, 1, 5)) * X[:2, :3, None, None]
    )


def rearranged(w):
    part = jax.lax.dynamic_slice(w.T.reshape(5, 3, 2), (jnp.argmax(X[0]) % 3, 0, 0), (2, 3, 2))
    return jnp.sum(jnp.broadcast_to(jnp.flip(jnp.cumsum(-part, 0), 1)[:, 1:, :, None], (2, 2, 2, 4)), 2)


# function, arguments, and which of them bend it
OPERATIONS = {
    "square": (lambda w: w * w, [W], {0}),
    "relu": (lambda w, v: jax.nn.relu(X @ w) @ v, [W, V], set()),
    "tanh": (lambda w, v: jnp.tanh(X @ w) @ v, [W, V], {0}),
    "tied": (lambda w: jnp.tanh(X @ w) @ w.T, [W], {0}),
    "gelu and layer norm": (lambda w: nn.standardize(jax.nn.gelu(X @ w)), [W], {0}),
    "log softmax": (lambda w: jax.nn.log_softmax(X @ w), [W], {0}),
    "attention": (attention, [W, W + 1], {0, 1}),
    "conv of what the kernel makes": (lambda w: conv(w, IMAGES * w.sum()), [KERNEL], {0}),
    "rearranged": (rearranged, [W], set()),
    "rearranged and squared": (lambda w: rearranged(w) ** 2, [W], {0}),
    "out of bounds": (lambda w: jnp.asarray(w).at[jnp.array([1, 9])].get(mode="fill", fill_value=2.0) ** 3, [W], {0}),
    "max pool": (lambda w: nn.max_pool(jnp.tanh(conv(w)), (2, 2), (2, 2)), [KERNEL], {0}),
    "average pool": (lambda w: nn.avg_pool(jax.nn.relu(conv(w)), (2, 2), (2, 2)), [KERNEL], set()),
    "scan": (lambda w: jax.lax.scan(lambda c, x: (jnp.tanh(c @ w), c), X, jnp.arange(3)), [SQUARE], {0}),
    "loop": (lambda w: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w), X), [SQUARE], {0}),
    "cond": (lambda w: jax.lax.cond(X[0, 0] > 9, lambda w: X @ w, lambda w: jnp.tanh(X @ w), w), [W], {0}),
    "checkpoint": (jax.checkpoint(lambda w: jnp.tanh(X @ w) ** 2), [W], {0}),
    "jit": (jax.jit(lambda w, v: (X @ w) @ (2 * v)), [W, V], set()),
    "gather and scatter": (lambda w: jnp.zeros((9, 5)).at[jnp.array([0, 0, 1])].add(w[1:4]) ** 3, [W], {0}),
    "sort": (lambda w: jnp.sort(jnp.tanh(w), -1), [W], {0}),
    "solve": (lambda w: jnp.linalg.solve(w @ w.T + jnp.eye(6), X[0]), [W], {0}),
    "complex": (lambda w: jnp.abs(jnp.exp(1j * (X @ w)) + 2.0), [W], {0}),
    "whole numbers": (lambda w: w[jnp.argmax(X, axis=1)] * jnp.round(3 * w[:1]), [W], {0}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_those_of_each_direction_by_itself(name):
    function, args, bending = OPERATIONS[name]
    curves = [Curve((i,), (helpers.normal(7 + i, 1, 2, *x.shape),)) for i, x in enumerate(args)]
    outs = [x for x in jax.tree.leaves(function(*args)) if jnp.issubdtype(x.dtype, jnp.floating)]
    slopes = [helpers.normal(9 + i, *x.shape) for i, x in enumerate(outs)]
    tape = tape_of(lambda args: jax.tree.leaves(function(*args)), args, range(len(args)))
    found, bent = tape.seconds(curves, tape.slopes(slopes), len(args))
    assert bent == bending
    for i, curve in enumerate(curves):
        for probe, v in enumerate(curve.firsts[0][0]):

            def along(t, i=i, v=v):
                moved = jax.tree.leaves(function(*(x + t * v if i == j else x for j, x in enumerate(args))))
                return sum(jnp.sum(x * slope) for x, slope in zip(moved, slopes, strict=True))

            expected = jax.jacfwd(jax.jacfwd(along))(0.0)
            np.testing.assert_allclose(found[i, probe], expected, rtol=1e-4, atol=1e-4)
            assert i in bent or not expected


@pytest.mark.parametrize("name", OPERATIONS)
def test_first_derivatives(name):
    function, args, _ = OPERATIONS[name]
    tape = tape_of(lambda args: function(*args), args, range(len(args)))
    curves = [Curve((i,), (helpers.normal(7 + i, 1, 2, *x.shape),)) for i, x in enumerate(args)]
    for i, curve in enumerate(curves):
        directions = [curve.firsts[0][0, 1] if i == j else jnp.zeros_like(x) for j, x in enumerate(args)]
        expected = jax.tree.leaves(jax.jvp(function, tuple(args), tuple(directions))[1])
        for found, slope in zip(tape.firsts(curves), expected, strict=True):
            got = found.firsts[0][found.layers.index(i), 1]
            np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-4)


# ---- samples of traces ----


@pytest.fixture(scope="module")
def made():
    params = helpers.dense_layers([5, 4, 4, 3])
    batch = {"x": helpers.normal(1, 6, 5), "label": helpers.labels(2, 3, 6)}
    return helpers.Problem(jh.Objective(helpers.mlp, jh.cross_entropy), params, batch)


def posed(made, layers=None, batch=None):
    return pose("functional", made.objective, made.params, made.batch if batch is None else batch, False, layers)


def samples_of(problem, probe="rademacher", count=4096, **changes):
    sweep = sweep_of(problem, sampler(probe))
    for name, value in ({"side_by_side": count} | changes).items():
        object.__setattr__(sweep.samples, name, value)
    samples, bends = sweep.draw(draw_keys(jax.random.key(0), 0, count))
    return np.asarray(samples, np.float64), bends


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("alone", [True, False], ids=["by example", "whole batch"])
def test_samples_have_the_mean_and_the_variance_of_the_formula(made, probe, alone):
    """Each example alone: 2 sum_n ||H_n||^2, without the diagonals for signs; else 2 ||sum_n H_n||^2."""
    changes = {} if alone else {"of_examples": None}
    samples, bends = samples_of(posed(made), probe, **changes)
    expected = []
    batches = [jax.tree.map(lambda x, i=i: x[i : i + 1], made.batch) for i in range(6)]
    examples = [helpers.Problem(made.objective, made.params, batch) for batch in batches]
    for layer in made.params:
        each = [helpers.dense(one, "functional", layer) for one in examples]
        parts = [x / 6 for x in each] if alone else [sum(each) / 6]
        squares = sum(np.sum(x**2) - (probe == "rademacher") * np.sum(np.diag(x) ** 2) for x in parts)
        expected.append((sum(map(np.trace, each)) / 6, 2 * squares))
    means, variances = np.transpose(expected)
    error = samples.std(0) / len(samples) ** 0.5
    assert (np.abs(samples.mean(0) - [*means, means.sum()]) <= 5 * error + 1e-7).all()
    np.testing.assert_allclose(samples[:, :3].var(0), variances, rtol=0.15, atol=1e-9)
    np.testing.assert_allclose(samples[:, 3].var(), variances.sum(), rtol=0.15)  # layers draw by themselves
    assert list(bends) == [True, True, False, True]  # the last layer is linear


def test_groups_of_examples_may_be_taken_one_after_another(made):
    side_by_side, _ = samples_of(posed(made), count=8)
    one_by_one, _ = samples_of(posed(made), count=8, share=0.0)
    np.testing.assert_allclose(one_by_one, side_by_side, rtol=1e-4, atol=1e-6)


GROUPS = {
    "one layer": ["fc2"],
    "overlap": {"first": ["fc1", "fc2"], "last": ["fc2", "fc3"]},
    "slices": {"left": jh.part("fc2/w", np.s_[:, :2]), "ends": [jh.part("fc2/w", [0]), jh.part("fc2/w", [3])]},
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_do_not_cover_the_net_have_their_own_traces_and_its_total(made, name):
    problem = posed(made, GROUPS[name])
    samples, _ = samples_of(problem)
    whole = helpers.dense(made, "functional")
    places = helpers.unravel(np.arange(len(whole)), made.params)
    held = [np.concatenate([np.ravel(x) for x in layer.arrays(places)]).astype(int) for layer in problem.layers]
    exact = [np.diag(whole)[some].sum() for some in held]
    error = samples.std(0) / len(samples) ** 0.5
    assert (np.abs(samples.mean(0) - [*exact, np.trace(whole)]) < 5 * error).all()


def test_batches_are_drawn_afresh_and_add_up(made):
    halves = [jax.tree.map(lambda x, s=s: x[s], made.batch) for s in (slice(0, 3), slice(3, 6))]
    samples, _ = samples_of(posed(made, batch=jh.Batches(halves)))
    whole, _ = samples_of(posed(made))
    np.testing.assert_allclose(samples.std(0), whole.std(0), rtol=0.15)
    assert (np.abs(samples.mean(0) - whole.mean(0)) <= 5 * whole.std(0) * (2 / 4096) ** 0.5 + 1e-9).all()
    twice, _ = samples_of(posed(made, batch=jh.Batches([halves[0], halves[0]])))
    once, _ = samples_of(posed(made, batch=halves[0]))
    np.testing.assert_allclose(twice.var(0), once.var(0) / 2, rtol=0.15, atol=1e-9)  # each has probes of its own


def test_a_net_of_many_layers_takes_fewer_sweeps_and_is_more_precise_all_the_same():
    params = helpers.dense_layers([12] * 20 + [3], names=[f"fc{i:02}" for i in range(20)])
    batch = {"x": helpers.normal(1, 16, 12), "label": helpers.labels(2, 3, 16)}
    deep = (jh.Objective(helpers.mlp, jh.cross_entropy), params, batch)
    swept = jh.layer_traces(*deep, key=jax.random.key(0), num_probes=64, curvature="functional", layers="arrays")
    plain = jh.layer_traces(
        *deep, key=jax.random.key(0), num_probes=64, curvature="functional", layers="arrays", method="hutchinson"
    )
    kernels = [f"fc{i:02}/w" for i in range(19)]
    assert {swept[name].num_probes for name in kernels} == {48}  # which take the time of 64 products
    assert np.median([swept[name].std_error / plain[name].std_error for name in kernels]) < 0.8


@pytest.mark.parametrize("name", ["custom", "ragged", "finite"])
def test_where_there_is_no_sweep_products_serve(made, name):
    """A custom_vjp whose rules have forward mode; an operation without rows; central differences."""

    @jax.custom_vjp
    def bend(x):
        return jnp.tanh(x)

    bend.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))

    def predict(params, batch):
        hidden = helpers.affine(params["fc1"], batch["x"])
        if name == "ragged":
            sizes = jnp.array([len(hidden)], jnp.int32)
            hidden = jax.lax.ragged_dot(hidden, jnp.tanh(params["fc2"]["w"])[None], sizes)
        return helpers.affine(params["fc3"], bend(hidden) if name == "custom" else jnp.tanh(hidden))

    objective = jh.Objective(predict, jh.cross_entropy)
    options = {"differentiation": "finite"} if name == "finite" else {}
    problem = pose("functional", objective, made.params, made.batch, False, None, *options.values())
    assert sweep_of(problem, sampler("rademacher")) is None
    if name == "ragged":
        return
    found = jh.layer_traces(objective, made.params, made.batch, key=jax.random.key(0), num_probes=64, **options)
    with jax.enable_x64(True):
        smooth = jh.Objective(lambda p, b: predict(p, b), jh.cross_entropy)
        exact = np.trace(helpers.dense(helpers.Problem(smooth, made.params, made.batch), "hessian", "fc1"))
    assert abs(found["fc1"].mean - exact) < 5 * found["fc1"].std_error + 1e-3


def test_every_probe_of_a_layer_is_another(made):
    samples, _ = samples_of(posed(made), count=64)
    assert len(np.unique(samples[:, 0])) > 60


# ---- products of all blocks ----


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "functional"])
@pytest.mark.parametrize("name", ["mlp", "conv, batch norm", "batch norm", "sequence"])
def test_products_of_all_blocks_are_those_of_the_dense_ones(name, curvature):
    p = problem(name)
    posed = pose(curvature, p.objective, p.params, p.batch, False, None)
    for at_a_time in (1, 8):
        blocks = Blocks(curvature, p.objective, posed.layers, at_a_time)
        operator = jax.tree_util.Partial(blocks, p.params, p.batch)
        drawn = jax.tree.map(lambda x: helpers.normal(3, *x.shape), p.params)
        vectors = tuple(layer.take(drawn) for layer in posed.layers)
        products = jh.linearize(operator, like=vectors)(vectors)
        for layer, v, product in zip(posed.layers, vectors, products, strict=True):
            dense = helpers.dense(p, curvature, layer.name)
            expected = dense @ helpers.ravel(v)
            np.testing.assert_allclose(helpers.ravel(product), expected, atol=2e-4 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("options", [{}, {"num_draws": 2}, {"reorthogonalize": "host"}, {"reorthogonalize": False}])
def test_spectra_of_layers_that_advance_together_are_those_of_each_alone(options, monkeypatch):
    p = problem("mlp")
    seen = []

    def spectra():
        seen.clear()
        report = lambda done, total: seen.append((done, total))
        return jh.layer_spectra(
            p.objective, p.params, p.batch, key=jax.random.key(0), num_steps=6, progress=report, **options
        )

    together, steps = spectra(), list(seen)
    monkeypatch.setattr(quadrature, "blocks_of", lambda *args: None)
    alone = spectra()
    assert list(together) == list(alone) and steps == seen and steps[-1][0] <= steps[-1][1]
    for name, spec in alone.items():
        np.testing.assert_allclose(together[name].nodes, spec.nodes, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(together[name].weights, spec.weights, rtol=1e-2, atol=1e-4)
        assert together[name].residuals.max() < 10 * spec.residuals.max() + 1e-5


def test_a_product_that_is_not_finite_names_its_layer():
    params = {"a": {"w": jnp.ones(6)}, "b": {"w": jnp.ones(6)}}

    def loss(p, batch):
        return jnp.sum(p["a"]["w"] ** 2) + jnp.sum(jnp.sqrt(p["b"]["w"] - 1)) + 0 * batch.sum()

    with pytest.raises(ValueError, match="not finite"):
        jh.layer_spectra(loss, params, jnp.ones(1), key=jax.random.key(0), num_steps=3)


# ---- what a reader of the first version broke ----


def tangled(kind):
    """tanh(x A) B with an array of three axes, or with an array without entries on the way or among the parameters."""

    def predict(params, batch):
        hidden = jnp.tanh(jnp.einsum("nd,hdk->nhk", batch["x"], params["fc1"]["w"]).reshape(len(batch["x"]), -1))
        if kind == "empty":
            hidden = jnp.concatenate([hidden, jnp.sin(hidden[:, :0])], axis=1)
        return hidden @ params["fc2"]["w"]

    params = {"fc1": {"w": helpers.normal(1, 3, 5, 4)}, "fc2": {"w": helpers.normal(2, 12, 3)}}
    params |= {"none": {"w": jnp.zeros((0, 2))}} if kind == "none" else {}
    batch = {"x": helpers.normal(3, 6, 5), "label": helpers.labels(4, 3, 6)}
    return jh.Objective(predict, jh.cross_entropy), params, batch


@pytest.mark.parametrize("method", ["auto", "split", "exact"])
@pytest.mark.parametrize("kind", ["parts", "empty", "none"])
def test_slices_by_lists_and_empty_arrays(kind, method):
    layers = {"some": jh.part("fc1/w", np.s_[0, :, [1, 2]]), "rest": jh.part("fc1/w", np.s_[1:])}
    layers = layers if kind == "parts" else ["fc1", "fc2"]
    objective, params, batch = tangled(kind)
    options = {"key": jax.random.key(0), "layers": layers}
    found = jh.layer_traces(objective, params, batch, num_probes=64, method=method, **options)
    dense = np.diag(helpers.dense(helpers.Problem(objective, params, batch), "hessian"))[:60].reshape(3, 5, 4)
    first = {"some": dense[0][:, [1, 2]].sum(), "rest": dense[1:].sum()} if kind == "parts" else {"fc1": dense.sum()}
    for name, exact in first.items():
        assert abs(found[name].mean - exact) < 5 * found[name].std_error + 1e-4 * abs(exact)
    jh.layer_spectra(objective, params, batch, num_steps=4, **options)


def test_spectra_of_g_need_no_second_derivatives():
    """An activation whose slope is a callback, which cannot be differentiated again."""

    def outside(function, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: function(np.asarray(x)), shape, x, vmap_method="expand_dims")

    @jax.custom_jvp
    def bend(x):
        return outside(np.tanh, x)

    bend.defjvp(lambda x, t: (bend(*x), outside(lambda x: 1 - np.tanh(x) ** 2, *x) * t[0]))
    nets = [
        jh.Objective(lambda p, b, f=f: helpers.affine(p["fc2"], f(helpers.affine(p["fc1"], b["x"]))), jh.cross_entropy)
        for f in (bend, jnp.tanh)
    ]
    p = problem("mlp")
    options = {"key": jax.random.key(0), "num_steps": 4, "curvature": "ggn"}
    found, expected = (jh.layer_spectra(net, p.params, p.batch, **options) for net in nets)
    np.testing.assert_allclose(found["fc1"].nodes, expected["fc1"].nodes, rtol=1e-3, atol=1e-6)
    posed = pose("ggn", nets[0], p.params, p.batch, False, None)
    assert blocks_of(posed, "ggn", posed.layers, 4) is not None
    traces = jh.layer_traces(nets[0], p.params, p.batch, key=jax.random.key(0), curvature="ggn")
    assert traces["fc1"].mean > 0


def test_the_rounding_of_columns_is_seen_where_many_are_zero():
    """Images with a black border; the labels nearly fit, so that what is left is rounding."""
    images = np.zeros((8, 14, 14), np.float32)
    images[:, 2:12, 2:12] = np.random.default_rng(0).random((8, 10, 10))
    batch = {"x": jnp.asarray(images.reshape(8, -1))}
    params = {"fc1": {"w": helpers.normal(1, 196, 4, scale=0.1)}, "fc2": {"w": helpers.normal(2, 4, 1)}}

    def predict(params, batch):
        return jnp.tanh(batch["x"] @ params["fc1"]["w"]) @ params["fc2"]["w"]

    batch["label"] = predict(params, batch) + 1e-6 * helpers.normal(3, 8, 1)
    made = helpers.Problem(jh.Objective(predict, jh.squared_error), params, batch)
    options = {"key": jax.random.key(0), "curvature": "functional", "method": "exact"}
    found = jh.layer_traces(made.objective, params, batch, **options)["fc1"]
    with jax.enable_x64(True):
        double = made.cast(jnp.float64)
        exact = jh.layer_traces(double.objective, double.params, double.batch, **options)["fc1"].mean
    assert abs(found.mean - exact) < found.std_error


def test_a_tolerance_is_met_where_g_is_not_exact():
    params = helpers.dense_layers([5, 20, 20, 40])  # the middle layer has too many columns to be exact
    batch = {"x": helpers.normal(1, 16, 5), "label": helpers.labels(2, 40, 16)}
    made = helpers.Problem(jh.Objective(helpers.mlp, jh.cross_entropy), params, batch)
    found = jh.layer_traces(
        made.objective, params, batch, key=jax.random.key(0), num_probes=8, rtol=0.05, layers={"middle": "fc2"}
    )
    assert 0 < found["middle"].num_probes < 512
    for e in found.values():
        assert e.std_error <= 0.05 * abs(e.mean)
    exact = np.trace(helpers.dense(made, "hessian", "fc2"))
    assert abs(found["middle"].mean - exact) < 5 * found["middle"].std_error


def test_a_sweep_counts_the_parameters_too_and_never_more_columns_than_there_are():
    tall = {"a": {"w": np.zeros((4000, 500), np.float32)}, "b": {"w": np.zeros((500, 2), np.float32)}}
    batch = {"x": np.zeros((1, 4000), np.float32), "label": np.zeros(1, int)}
    net = jh.Objective(lambda p, b: jnp.tanh(b["x"] @ p["a"]["w"]) @ p["b"]["w"], jh.cross_entropy)
    posed = pose("hessian", net, tall, batch, False, None)
    assert room_for(posed, net, posed.layers)[0] <= 2
    row = jh.layer_traces(net, tall, batch, key=jax.random.key(0), layers={"row": jh.part("a/w", np.s_[0, :4])})
    assert row["row"].mean == 0


def test_small_slopes_do_not_vanish_in_float16():
    """As those of a mean over many examples: a loss divided by 2^24 has that part of the traces."""
    params = helpers.dense_layers([6, 8, 8, 4])
    batch = {"x": helpers.normal(1, 16, 6), "label": helpers.labels(2, 4, 16)}

    def predict(params, batch):
        half = helpers.cast(params, jnp.float16)
        return helpers.mlp(half, {"x": batch["x"].astype(jnp.float16)}).astype(jnp.float32)

    def trace(scale):
        objective = jh.Objective(predict, lambda outputs, batch: scale * jh.cross_entropy(outputs, batch))
        options = {"key": jax.random.key(0), "num_probes": 32, "curvature": "functional"}
        return jh.layer_traces(objective, params, batch, **options)["fc2"]

    whole, small = trace(1.0), trace(2.0**-24)
    assert whole.num_probes == 32 and abs(2**24 * small.mean - whole.mean) < 1e-3 * abs(whole.mean)


def test_infinite_second_derivatives_that_are_masked_do_not_count():
    def act(x):
        above = jnp.maximum(x, 0.0)
        return jnp.where(above > 0, above**1.5, 0.0)

    def predict(params, batch):
        return helpers.affine(params["fc2"], act(helpers.affine(params["fc1"], batch["x"])))

    params = helpers.dense_layers([5, 4, 3])
    batch = {"x": helpers.normal(1, 6, 5), "label": helpers.normal(2, 6, 3)}
    objective = jh.Objective(predict, jh.squared_error)
    found = jh.layer_traces(objective, params, batch, key=jax.random.key(0), num_probes=16, curvature="functional")
    slope = jax.grad(objective.criterion)(predict(params, batch), batch)
    hidden = helpers.affine(params["fc1"], batch["x"])
    bends = jnp.where(hidden > 0, 0.75 * jnp.abs(hidden) ** -0.5, 0.0) * (slope @ params["fc2"]["w"].T)
    exact = float(jnp.sum(bends * (jnp.sum(batch["x"] ** 2, axis=1, keepdims=True) + 1)))
    assert abs(found["fc1"].mean - exact) < 5 * found["fc1"].std_error + 1e-4 * abs(exact)


@pytest.mark.parametrize("size", [50_000, 50])
def test_the_price_of_a_sweep_counts_what_a_product_takes_too(size):
    """An embedding has far more parameters than operations."""
    params = {"e": {"w": helpers.normal(0, size, 16)}, "c": {"w": helpers.normal(1, 16, 5)}}
    batch = {"x": jnp.arange(32), "label": helpers.normal(2, 32, 5)}
    net = jh.Objective(lambda p, b: jnp.tanh(p["e"]["w"][b["x"]]) @ p["c"]["w"], jh.squared_error)
    sweep = sweep_of(pose("functional", net, params, batch, False, None), sampler("rademacher"))
    assert 1 <= sweep.price <= 2.5 and sweep.count(5) == 5 and sweep.count(64) >= 24


def test_products_of_all_blocks_are_in_full_precision(made):
    posed = pose("hessian", made.objective, made.params, made.batch, False, None)
    parts = tuple(layer.take(made.params) for layer in posed.layers)
    jaxpr = jax.make_jaxpr(Blocks("hessian", made.objective, posed.layers, 8))(made.params, made.batch, parts)
    dots = [eqn.params["precision"] for eqn, _ in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert dots and all("HIGHEST" in str(precision) for precision in dots)


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_strict_promotion_with_wide_types(made, method):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = jh.layer_traces(made.objective, made.params, made.batch, key=jax.random.key(0), method=method)
    exact = np.trace(helpers.dense(made, "hessian", "fc1"))
    assert abs(found["fc1"].mean - exact) < 5 * found["fc1"].std_error + 1e-4
