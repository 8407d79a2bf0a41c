"""The vision transformer: its patches, its size, and what it does not see."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))


def small(**options):
    model = models.build("vit", 5, **({"width": 0.125, "layers": 1, "heads": 2} | options))
    params = model.init(jax.random.key(1), IMAGES)["params"]
    return model, params


def test_size():
    """Of each block 12 F^2 for the matrices, 9 F for their biases and 4 F for the norms."""
    _, params = small(layers=3, width=0.25)
    features, patches, pixels = 16, 6, 4 * 4 * 3
    block = 12 * features**2 + 13 * features
    expected = pixels * features + features + patches * features + 3 * block + 2 * features + features * 5 + 5
    assert sum(x.size for x in jax.tree.leaves(params)) == expected


def test_patches_are_those_of_a_convolution():
    """Of one that moves by a whole patch, with the same weights."""
    model, params = small()
    inputs = {}

    def look(next_fun, args, kwargs, context):
        if context.module.name == "patches":
            inputs["patches"] = args[0]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(look):
        model.apply({"params": params}, IMAGES)
    kernel = params["patches"]["kernel"]
    found = inputs["patches"] @ kernel
    window = kernel.reshape(4, 4, 3, -1)
    expected = jax.lax.conv_general_dilated(IMAGES, window, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5)


def test_every_patch_sees_every_other_and_only_positions_tell_their_order():
    model, params = small()
    order = IMAGES.reshape(2, 2, 4, 3, 4, 3)[:, ::-1, :, ::-1].reshape(IMAGES.shape)  # patches, and not their pixels
    logits, other = (model.apply({"params": params}, x) for x in (IMAGES, order))
    assert np.abs(logits - other).max() > 1e-3
    blind = params | {"position": jax.tree.map(jnp.zeros_like, params["position"])}
    logits, other = (model.apply({"params": blind}, x) for x in (IMAGES, order))
    np.testing.assert_allclose(logits, other, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch": 5}, "patch=5 does not divide the sides"), ({"heads": 3}, "heads=3 does not divide the 8 features")],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
