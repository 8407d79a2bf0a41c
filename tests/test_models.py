"""The nets of the paper, and the forms of their operations."""

import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxhess as jh
from experiments import models
from experiments.models import ops

# Programs that run once: compiled several times as fast, and slower.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
NETS = sorted(set(models.MODELS) - {"lenet", "mlp", "gpt", "gpt_10m", "vit"})


def shapes(name, image=(32, 32, 3), num_classes=10, **options):
    """A net with the shapes of its variables and of its logits on two images; nothing is computed."""
    model = models.build(name, num_classes, **options)
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    return model, variables, logits.shape


def layers(name, **options):
    """The names of the layers of a net, in network order."""
    model, variables, _ = shapes(name, **options)
    batch = {"image": jnp.zeros((2, 32, 32, 3)), "label": jnp.zeros(2, int)}
    batch["batch_stats"] = variables.get("batch_stats", {})
    params, batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (variables["params"], batch))
    return jh.layer_names(params, models.objective(model), batch)


# ---- sizes ----


def size(*channels, window=9, bias=0):
    """Parameters of convolutions one after another."""
    return sum((window * a + bias) * b for a, b in itertools.pairwise(channels))


VGG11 = (3, 64, 128, 256, 256, 512, 512, 512, 512)
VGG13 = (3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512)
VGG16 = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
RESNET18_PROJECTIONS = size(64, 128, 256, 512, window=1, bias=2)  # scale and offset of batch norm
COUNTS = {
    "vgg11": size(*VGG11, bias=1) + 512 * 10 + 10,
    "vgg13": size(*VGG13, bias=1) + 512 * 10 + 10,
    "vgg16": size(*VGG16, bias=1) + 512 * 10 + 10,
    "vgg11_bn": 9_231_114,
    "vgg13_bn": 9_416_010,
    "vgg16_bn": 14_728_266,
    "resnet18": 11_173_962,
    "resnet18_noskip": 11_173_962 - RESNET18_PROJECTIONS,
    "densenet": 1_019_722,
}


@pytest.mark.parametrize("name", NETS)
def test_numbers_of_parameters_are_the_published_ones(name):
    _, variables, _ = shapes(name)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == COUNTS[name]


def test_published_numbers_added_up():
    for name, channels in (("vgg11", VGG11), ("vgg13", VGG13), ("vgg16", VGG16)):
        assert COUNTS[f"{name}_bn"] == COUNTS[name] + 2 * sum(channels[1:])
    stages = [
        size(first, *[width] * 4) + 2 * 4 * width for first, width in ((64, 64), (64, 128), (128, 256), (256, 512))
    ]
    stem, dense = size(3, 64) + 2 * 64, 512 * 10 + 10
    assert stem + sum(stages) + RESNET18_PROJECTIONS + dense == COUNTS["resnet18"]

    channels = list(range(16, 16 + 36 * 12 + 1, 12))
    grown = sum(2 * c + 9 * c * 12 for c in channels[:-1])
    transitions = sum(2 * c + c * c for c in (channels[12], channels[24]))
    last = 2 * channels[-1] + channels[-1] * 10 + 10
    assert size(3, 16) + grown + transitions + last == COUNTS["densenet"]


def test_the_released_classifier_has_batch_norm():
    _, variables, _ = shapes("vgg11", classifier="released")
    hidden = 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 2 * 2 * 4096
    expected = size(*VGG11, bias=1) + hidden + 4096 * 10 + 10
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected
    assert set(variables["batch_stats"]) == {"fc1_bn", "fc2_bn"}


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn", "resnet18", "densenet"])
@pytest.mark.parametrize(("image", "num_classes"), [((28, 28, 1), 10), ((32, 32, 3), 100)])
def test_logits(name, image, num_classes):
    assert shapes(name, image, num_classes, width=0.125)[2] == (2, num_classes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg11", {"conv1": (32, 32, 64), "conv2": (16, 16, 128), "conv4": (8, 8, 256), "conv8": (2, 2, 512)}),
        ("resnet18", {"block2": (32, 32, 64), "block3": (16, 16, 128), "block6": (8, 8, 256), "block8": (4, 4, 512)}),
        ("densenet", {"block1": (32, 32, 160), "transition1": (16, 16, 160), "block3": (8, 8, 448)}),
    ],
)
def test_sizes_of_feature_maps(name, expected):
    model, variables, _ = shapes(name)

    def features(variables, images):
        return model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])[1]

    found = jax.eval_shape(features, variables, jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.float32))["intermediates"]
    assert {layer: found[layer]["__call__"][0].shape[1:] for layer in expected} == expected


# ---- names and options ----


@pytest.mark.parametrize(
    ("name", "options", "first", "last"),
    [
        ("vgg11", {}, ["conv1", "conv2", "conv3"], ["conv7", "conv8", "fc"]),
        ("vgg11_bn", {}, ["conv1", "bn1", "conv2", "bn2"], ["conv8", "bn8", "fc"]),
        ("vgg11", {"classifier": "released"}, ["conv1", "conv2"], ["conv8", "fc1", "fc1_bn", "fc2", "fc2_bn", "fc3"]),
        (
            "resnet18",
            {},
            ["conv1", "bn1", "block1/conv1", "block1/bn1", "block1/conv2", "block1/bn2", "block2/conv1"],
            ["block8/conv2", "block8/bn2", "fc"],
        ),
        (
            "densenet",
            {"depth": 10},
            ["conv1", "block1/bn1", "block1/conv1", "block1/bn2", "block1/conv2", "transition1/bn", "transition1/conv"],
            ["block3/bn2", "block3/conv2", "bn", "fc"],
        ),
    ],
)
def test_names_in_network_order(name, options, first, last):
    names = layers(name, width=0.125, **options)
    assert names[: len(first)] == first and names[-len(last) :] == last


def test_without_skip_connections_there_are_no_projections():
    names, plain = layers("resnet18", width=0.125), layers("resnet18_noskip", width=0.125)
    projections = [f"block{i}/shortcut_{kind}" for i in (3, 5, 7) for kind in ("conv", "bn")]
    assert [name for name in names if name not in plain] == projections
    assert plain == [name for name in names if name not in projections]


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_nets_with_equal_fields_are_equal(name):
    one, two = models.build(name, 10), models.build(name, 10)
    assert one == two and hash(one) == hash(two) and one != models.build(name, 11)


def test_options():
    assert models.build("vgg11", 10, width=0.5) != models.build("vgg11", 10)
    assert models.build("vgg11_bn", 10) != models.build("vgg11", 10)
    with pytest.raises(ValueError, match=r"'vgg11_bn' has no option \['depth'\]; it has \['classifier', 'convolution'"):
        models.build("vgg11_bn", 10, depth=13)
    with pytest.raises(ValueError, match=r"no option \['skip'\]; it has \['convolution', 'width'\]"):
        models.build("resnet18_noskip", 10, skip=True)
    with pytest.raises(ValueError, match=r"classifier 'small'; choose from \['plain', 'released'\]"):
        shapes("vgg11", classifier="small")
    with pytest.raises(ValueError, match=r"depth 12; choose from \[11, 13, 16\]"):
        jax.eval_shape(models.VGG(10, depth=12).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"3 n \+ 4 .* got 12"):
        shapes("densenet", depth=12)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "densenet"])
def test_images_of_other_sizes_are_refused(name):
    with pytest.raises(ValueError, match=r"28, 28.*32, 32.*\(2, 30, 30, 1\)"):
        shapes(name, (30, 30, 1), width=0.125)


# ---- batch norm ----


@pytest.mark.parametrize(("name", "options"), [("vgg11_bn", {}), ("resnet18", {}), ("densenet", {"depth": 7})])
def test_training_updates_statistics_and_evaluation_uses_them(name, options):
    model = models.build(name, 10, width=0.125, **options)
    images = jax.random.normal(jax.random.key(0), (3, 28, 28, 1))
    variables = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(1), images)

    @partial(jax.jit, compiler_options=QUICK)
    def both(variables, images):
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updated["batch_stats"], model.apply(variables, images)

    training, stats, evaluation = both(variables, images)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], stats)
    assert all(jax.tree.leaves(moved))
    others = images.at[1:].multiply(3.0)
    training_with_others, _, evaluation_with_others = both(variables, others)
    np.testing.assert_allclose(evaluation[0], evaluation_with_others[0], rtol=1e-4, atol=1e-5)
    assert jnp.abs(training[0] - training_with_others[0]).max() > 1e-3
    changed = both(variables | {"batch_stats": stats}, images)[2]
    assert jnp.abs(evaluation - changed).max() > 1e-3


# ---- operations ----

CONVOLUTIONS = [ops.patch_convolution, ops.convolution]
NUMBERS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("image", "window", "options"),
    [
        ((2, 2, 3), (3, 3), {"padding": "SAME"}),
        ((4, 5, 2), (3, 2), {"padding": "VALID"}),
        ((6, 6, 2), (3, 3), {"padding": [(1, 1), (0, 2)]}),
        ((4, 4, 3), (1, 1), {"padding": [(0, 0), (0, 0)]}),
        ((4, 4, 2), (3, 3), {"padding": [(1, 1), (1, 1)], "window_strides": (2, 2)}),
        ((4, 4, 2), (2, 2), {"padding": "SAME", "rhs_dilation": (2, 2)}),
        ((4, 4, 2), (2, 2), {"padding": [(1, 1), (1, 1)], "lhs_dilation": (2, 2)}),
        ((4, 4, 4), (3, 3), {"padding": "SAME", "feature_group_count": 2}),
    ],
)
def test_convolutions_equal_xlas(convolution, image, window, options):
    options = {"window_strides": (1, 1), "dimension_numbers": NUMBERS} | options
    strides, padding = options.pop("window_strides"), options.pop("padding")
    inputs = jax.random.normal(jax.random.key(0), (3, *image))
    channels = image[2] // options.get("feature_group_count", 1)
    kernel = jax.random.normal(jax.random.key(1), (*window, channels, 4))

    def results(convolution):
        def loss(inputs, kernel):
            outputs = convolution(inputs, kernel, strides, padding, **options)
            return jnp.sum(jnp.sin(outputs)), outputs

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(inputs, kernel)

    ours, theirs = results(convolution), results(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolutions_under_vmap_and_second_derivatives(convolution):
    inputs = jax.random.normal(jax.random.key(0), (2, 2, 2, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
    vectors = jax.random.normal(jax.random.key(2), (3, *kernel.shape))

    def products(convolution):
        def loss(k):
            return jnp.sum(jnp.tanh(convolution(inputs, k, (1, 1), "SAME", dimension_numbers=NUMBERS)))

        return jax.jit(jax.vmap(lambda v: jax.jvp(jax.grad(loss), (kernel,), (v,))[1]))(vectors)

    np.testing.assert_allclose(products(convolution), products(lax.conv_general_dilated), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pixels", "channels", "features", "patches"),
    [(2, 512, 512, True), (4, 512, 512, True), (8, 256, 256, False), (32, 64, 64, False)],
)
def test_the_choice_of_convolution(monkeypatch, pixels, channels, features, patches):
    def uses_patches():
        inputs, kernel = jnp.zeros((1, pixels, pixels, channels)), jnp.zeros((3, 3, channels, features))
        jaxpr = jax.make_jaxpr(lambda x, k: ops.convolution(x, k, (1, 1), "SAME", dimension_numbers=NUMBERS))
        return "conv_general_dilated" not in str(jaxpr(inputs, kernel))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert uses_patches() == patches
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not uses_patches()


@pytest.mark.parametrize("shape", [(3, 3, 5, 12), (1, 1, 40, 8)])
def test_kernels_are_drawn_as_flax_draws_them(shape):
    key = jax.random.key(0)
    np.testing.assert_allclose(ops.he_normal(key, shape), nn.initializers.he_normal()(key, shape), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 1)])
def test_mean_pool_equals_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(ops.mean_pool(x), nn.avg_pool(x, (2, 2), (2, 2)), rtol=1e-5, atol=1e-6)
