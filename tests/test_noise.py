"""Error bars of eigenvalues where products are noisy: they cover the truth, or the call refuses and says why."""

import dataclasses
import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Problem, problem

import jaxhess as jh

KEYS = 20  # of each operator; the slow test takes a hundred


def low_precision(dtype):
    """A small net whose layers compute in a type of half precision, with parameters in float32."""

    def predict(params, batch):
        x = batch["x"].astype(dtype)
        hidden = jnp.tanh(x @ params["fc1"]["w"].astype(dtype))
        return (hidden @ params["fc2"]["w"].astype(dtype)).astype(jnp.float32)

    return predict


def quartic(dtype):
    """A loss of six parameters with their rounding in its point and in its value."""
    return lambda w, x: ((x.astype(dtype) @ w.astype(dtype)) ** 4).mean().astype(jnp.float32)


NETS = {dtype.__name__: jh.Objective(low_precision(dtype), jh.cross_entropy) for dtype in (jnp.bfloat16, jnp.float16)}
QUARTICS = {dtype.__name__: quartic(dtype) for dtype in (jnp.bfloat16, jnp.float16)}


@functools.cache
def net(seed):
    """Parameters, a batch, and the eigenvalues of the Hessian of the net in float64."""
    params = {"fc1": {"w": helpers.normal([seed, 1], 5, 8, scale=0.5)}, "fc2": {"w": helpers.normal([seed, 2], 8, 3)}}
    batch = {"x": helpers.normal([seed, 3], 20, 5), "label": helpers.labels([seed, 4], 3, 20)}
    return params, batch, np.linalg.eigvalsh(helpers.dense(Problem(EXACT_NET, params, batch), "hessian"))


EXACT_NET = jh.Objective(low_precision(jnp.float64), jh.cross_entropy)


@functools.cache
def six(seed):
    w, x = helpers.normal([seed, 5], 6), helpers.normal([seed, 6], 20, 6)
    z = (x.astype(np.float64) @ w)[:, None] * x
    return w, x, np.linalg.eigvalsh(12 * z.T @ z / len(x))


def misses(make, keys, num_steps=64):
    """The share of keys in which an extreme eigenvalue, or one of the two largest, lies outside its error.

    After a few steps a Ritz value is near some eigenvalue, not yet near the extreme one.
    """
    missed = 0
    for seed in range(keys):
        loss, (params, batch, truth) = make(seed)
        operator, key = jh.hessian(loss, params, batch), jax.random.key(seed)
        found = jh.spectrum(operator, like=params, key=key, num_steps=num_steps)
        values, _, residuals = jh.top_eigenpairs(operator, like=params, key=key, k=2)
        ends = np.abs(found.nodes[[0, -1], None] - truth)  # (2, dim)
        distances = ends.min(1) if num_steps < len(truth) else ends[[0, 1], [0, -1]]
        inside = distances <= found.residuals[[0, -1]]
        missed += not (inside.all() and np.all(np.abs(values - truth[[-1, -2]]) <= residuals))
        if num_steps >= len(truth):
            assert found.residuals[-1] < 0.3 * truth[-1]  # an error bar that says nothing would cover everything
    return missed / keys


MAKES = {
    "net": lambda name: lambda seed: (NETS[name], net(seed)),
    "quartic": lambda name: lambda seed: (QUARTICS[name], six(seed)),
}


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("name", NETS)
def test_eigenvalues_of_nets_in_half_precision_lie_within_their_residuals(name, kind):
    assert misses(MAKES[kind](name), KEYS // 4) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("name", NETS)
def test_residuals_cover_in_95_of_100_keys(name, kind):
    assert misses(MAKES[kind](name), 100) <= 0.05
    assert misses(MAKES[kind](name), 100, num_steps=4) <= 0.05


def test_the_table_of_a_net_in_bfloat16_covers_the_truth():
    """By the Gram matrix and by Lanczos, over many batches and without a basis."""
    params, batch, truth = net(0)
    table = jh.summarize(NETS["bfloat16"], params, batch, key=jax.random.key(0), num_probes=4)
    assert abs(table["total"].lambda_max - truth[-1]) <= table["total"].lambda_max_residual
    last = np.linalg.eigvalsh(helpers.dense(Problem(EXACT_NET, params, batch), "hessian", "fc2"))
    assert abs(table["fc2"].lambda_max - last[-1]) <= table["fc2"].lambda_max_residual < 0.3 * last[-1]
    halves = jh.Batches([jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 10), slice(10, 20))])
    for data, options in ((halves, {}), (batch, dict(reorthogonalize=False))):
        operator = jh.hessian(NETS["bfloat16"], params, data)
        found = jh.spectrum(operator, like=params, key=jax.random.key(1), num_steps=20, **options)
        assert abs(found.lambda_max - truth[-1]) <= found.residuals[-1] < 0.3 * truth[-1]


def test_in_full_precision_the_noise_is_rounding():
    p = problem("mlp")
    found = jh.spectrum(p.operator("hessian"), like=p.params, key=jax.random.key(0))
    assert found.residuals.max() < 1e-4 * found.lambda_max


def test_parameters_in_bfloat16_are_taken_in_float32_and_their_noise_is_that():
    p = problem("mlp")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), p.params)
    same = dataclasses.replace(p, params=jax.tree.map(lambda x: np.asarray(x, np.float32), half))
    truth = np.linalg.eigvalsh(helpers.dense(same, "hessian"))
    found = jh.spectrum(jh.hessian(p.objective, half, p.batch), like=half, key=jax.random.key(0))
    assert abs(found.lambda_max - truth[-1]) <= found.residuals[-1] < 1e-4 * truth[-1]


# ---- operators that are none ----


def changing(scale):
    """A product with another random part at each call, like that of a net whose dropout key is drawn afresh."""
    calls, matrix = itertools.count(), helpers.rotated(np.linspace(0, 1, 30))

    def product(v):
        noise = np.random.default_rng(next(calls)).standard_normal((30, 30))
        return jnp.asarray(matrix @ v + scale * (noise + noise.T) @ v, jnp.float32)

    return product


def skewed(scale):
    matrix = helpers.rotated(np.linspace(0, 1, 30)) + scale * np.triu(
        np.random.default_rng(0).standard_normal((30, 30))
    )
    return lambda v: jnp.asarray(matrix @ v, jnp.float32)


CALLS = {
    "spectrum": lambda product, key: jh.spectrum(product, like=np.zeros(30, np.float32), key=key, num_steps=20),
    "all steps": lambda product, key: jh.spectrum(product, like=np.zeros(30, np.float32), key=key),
    "no basis": lambda product, key: jh.spectrum(
        product, like=np.zeros(30, np.float32), key=key, num_steps=20, reorthogonalize=False
    ),
    "pairs": lambda product, key: jh.top_eigenpairs(product, like=np.zeros(30, np.float32), key=key, k=2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("make", "message"), [(changing, "another product for the same vector"), (skewed, "symmetric")]
)
def test_what_changes_or_is_not_symmetric_is_refused(call, make, message):
    for seed in range(5):
        with pytest.raises(ValueError, match=message):
            CALLS[call](make(0.1), jax.random.key(seed))


@pytest.mark.parametrize("make", [changing, skewed])
def test_a_little_of_it_is_carried_into_the_residuals(make):
    covered = 0
    for seed in range(KEYS):
        found = CALLS["spectrum"](make(1e-4), jax.random.key(seed))
        covered += abs(found.lambda_max - 1) <= found.residuals[-1] < 0.05
    assert covered >= 0.95 * KEYS


# ---- loaders that do not repeat themselves, and losses that are no means ----

X = helpers.normal(1, 20, 6)


def squares(w, x):
    return ((x @ w) ** 2).mean()


TRUTH = np.linalg.eigvalsh(2 * X.astype(np.float64).T @ X / 20)


class Loader:
    """Batches of eight of X, shuffled anew in each pass, perhaps without the last ones, perhaps with noise."""

    def __init__(self, drop_last=False, noise=0.0, size=8, has_length=True):
        self.drop_last, self.noise, self.size, self.random = drop_last, noise, size, np.random.default_rng(0)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        order = self.random.permutation(len(X))
        stop = len(X) // self.size * self.size if self.drop_last else len(X)
        for i in range(0, stop, self.size):
            x = X[order[i : min(i + self.size, stop)]]
            yield x + self.noise * self.random.standard_normal(x.shape).astype(np.float32)


def test_an_order_that_is_drawn_anew_changes_nothing():
    for seed in range(5):
        operator = jh.hessian(squares, jnp.ones(6), jh.Batches(Loader()))
        values, _, residuals = jh.top_eigenpairs(operator, like=jnp.ones(6), key=jax.random.key(seed), k=1)
        assert abs(values[0] - TRUTH[-1]) <= residuals[0] < 1e-3


@pytest.mark.parametrize("loader", [dict(drop_last=True), dict(noise=0.1), dict(noise=1e-3)])
def test_passes_that_differ_are_refused(loader):
    with pytest.raises(ValueError, match=r"two passes.*drop_last.*Batches\(list\(loader\)\)"):
        operator = jh.hessian(squares, jnp.ones(6), jh.Batches(Loader(**loader)))
        jh.spectrum(operator, like=jnp.ones(6), key=jax.random.key(0))


def test_flipped_images_have_the_same_sums_and_are_noticed():
    class Flipped:
        flip = False

        def __iter__(self):
            Flipped.flip = not Flipped.flip
            images = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
            return iter([images[:, :, ::-1] if Flipped.flip else images])

    many = jh.Batches(Flipped())
    list(many.weighted())
    with pytest.raises(ValueError, match="two passes"):
        list(many.weighted())


def test_read_once_a_loader_is_taken_as_it_is():
    batches = list(Loader(drop_last=True))
    operator = jh.hessian(squares, jnp.ones(6), jh.Batches(batches))
    x = np.concatenate(batches)
    np.testing.assert_allclose(helpers.matrix(operator, jnp.ones(6)), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_without_checks_the_noise_of_a_loader_is_still_seen():
    operator = jh.hessian(squares, jnp.ones(6), jh.Batches(Loader(drop_last=True), check=False))
    with pytest.raises(ValueError, match="another product for the same vector"):
        jh.spectrum(operator, like=jnp.ones(6), key=jax.random.key(0))


class Endless:
    def __iter__(self):
        return itertools.repeat(X)


class EndlessWithLength(Endless):
    def __len__(self):
        raise TypeError("the data set is infinite")


@pytest.mark.parametrize("loader", [Endless, EndlessWithLength])
def test_a_loader_without_an_end_ends_in_an_error(loader):
    with pytest.raises(ValueError, match="still went on.*take"):
        jh.hessian(squares, jnp.ones(6), jh.Batches(loader()))


def test_a_data_set_that_is_read_by_number_is_taken():
    class Indexed:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return (X[:8], X[8:])[i]  # a third one would be an IndexError of the tuple

    operator = jh.hessian(squares, jnp.ones(6), jh.Batches(Indexed()))
    np.testing.assert_allclose(helpers.matrix(operator, jnp.ones(6)), 2 * X.T @ X / 20, rtol=1e-4, atol=1e-5)


def contrastive(params, batch):
    """InfoNCE: every example against all others of its batch."""
    z = helpers.mlp(params, batch)
    return jh.cross_entropy(z @ z.T, {"label": jnp.arange(len(z))})


def total(params, batch):
    return jnp.sum(helpers.mlp(params, batch) ** 2)


BATCH = {"x": helpers.normal(2, 12, 3), "label": helpers.labels(3, 3, 12)}
HALVES = [jax.tree.map(lambda x, s=s: x[s], BATCH) for s in (slice(0, 6), slice(6, 12))]


@pytest.mark.parametrize("loss", [contrastive, total, problem("batch norm").objective])
def test_over_many_batches_a_loss_must_be_a_mean_of_independent_examples(loss):
    params = problem("batch norm" if isinstance(loss, jh.Objective) else "mlp").params
    with pytest.raises(ValueError, match=r"mean over independent examples.*Divide a sum.*check=False"):
        jh.hessian(loss, params, jh.Batches(HALVES))
    jh.hessian(loss, params, jh.Batches(HALVES, check=False))
    jh.hessian(loss, params, jh.Batches([BATCH]))  # of one batch any loss is right


def test_weights_of_a_criterion_of_ones_own_need_their_sums():
    def weighted(outputs, batch):
        rows = -jax.nn.log_softmax(outputs)[jnp.arange(len(outputs)), batch["label"]]
        return (rows * batch["weight"]).sum() / batch["weight"].sum()

    more = {"weight": np.linspace(0, 3, 12, dtype=np.float32)}
    p = Problem(jh.Objective(helpers.mlp, weighted), problem("mlp").params, BATCH | more)
    parts = [jax.tree.map(lambda x, s=s: x[s], p.batch) for s in (slice(0, 6), slice(6, 12))]
    with pytest.raises(ValueError, match="size= must be the sum of the weights"):
        jh.hessian(p.objective, p.params, jh.Batches(parts))
    many = dataclasses.replace(p, batch=jh.Batches(parts, size=lambda batch: batch["weight"].sum()))
    np.testing.assert_allclose(
        helpers.matrix(many.operator("hessian"), p.params), helpers.dense(p, "hessian"), atol=1e-5
    )


def test_a_mean_and_a_decay_a_dropout_key_and_fixed_statistics_pass_the_check():
    p = problem("batch statistics and dropout")
    parts = [p.batch | {k: p.batch[k][s] for k in ("x", "label")} for s in (slice(0, 4), slice(4, 7))]
    size = dict(size=lambda batch: len(batch["label"]))
    jh.hessian(p.objective, p.params, jh.Batches(parts, **size))
    without = [{k: v for k, v in part.items() if k != "key"} for part in parts]
    jh.hessian(p.objective, p.params, jh.Batches(without, **size))

    def decayed(params, batch):
        return p.objective(params, batch) + 0.1 * jnp.sum(params["fc1"]["w"] ** 2)

    jh.hessian(decayed, p.params, jh.Batches(without, **size))
