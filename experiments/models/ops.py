"""Convolution and max pooling in the forms that XLA's CPU backend runs fastest; same numbers as Flax's own.

And what else the nets share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def row_convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    **options,
) -> jax.Array:
    """A two-dimensional convolution as a one-dimensional one along rows; for ``nn.Conv(conv_general_dilated=...)``.

    The kh rows under the kernel become channels, so that a (1, kw) convolution of kh * C channels is left. On a CPU
    this is what remains fast in every product that curvature needs: the weights' gradient of a large kernel on few
    channels is slow in XLA's convolution, and full patches times matrix is slow under ``vmap`` over several vectors.

    On other devices, or with strides, dilations or groups, it is ``lax.conv_general_dilated``.

    Args:
      inputs: (N, H, W, C).
      kernel: (kh, kw, C, F).
      strides: of both axes.
      padding: "SAME", "VALID", or (low, high) of both axes.
      **options: as for ``lax.conv_general_dilated``.

    Returns:
      (N, H', W', F).
    """
    if jax.default_backend() != "cpu" or not _plain(strides, options):
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    kh, kw, channels, features = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], (kh, kw), (1, 1), padding)
    inputs = jnp.pad(inputs, ((0, 0), padding[0], (0, 0), (0, 0)))
    height = inputs.shape[1] - kh + 1
    rows = jnp.concatenate([inputs[:, i : i + height] for i in range(kh)], axis=-1)
    kernel = kernel.transpose(1, 0, 2, 3).reshape(1, kw, kh * channels, features)
    return lax.conv_general_dilated(
        rows,
        kernel,
        (1, 1),
        [(0, 0), padding[1]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=options.get("precision"),
    )


def patch_convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    **options,
) -> jax.Array:
    """A two-dimensional convolution as one product of patches and a matrix; takes what `row_convolution` takes.

    The patches are kh * kw times as large as the inputs. On other devices, or with strides, dilations or groups, it
    is ``lax.conv_general_dilated``.
    """
    if jax.default_backend() != "cpu" or not _plain(strides, options):
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    kh, kw, _, features = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:3], (kh, kw), (1, 1), padding)
    inputs = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    height, width = inputs.shape[1] - kh + 1, inputs.shape[2] - kw + 1
    corners = [(i, j) for i in range(kh) for j in range(kw)]
    patches = jnp.concatenate([inputs[:, i : i + height, j : j + width] for i, j in corners], axis=-1)
    return jnp.matmul(patches, kernel.reshape(-1, features), precision=options.get("precision"))


def convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    **options,
) -> jax.Array:
    """`patch_convolution` for the smallest images, else ``lax.conv_general_dilated``; same arguments.

    With XLA's everywhere VGG11's gradient takes 7 times as long on a CPU (batch 32, one core: 2.47 s instead of 0.35).
    """
    height, width = inputs.shape[1:3]
    chosen = patch_convolution if height * width <= 16 else lax.conv_general_dilated
    return chosen(inputs, kernel, strides, padding, **options)


def _plain(strides, options):
    """Whether a convolution has no strides, groups or dilations."""
    dilations = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    return (
        tuple(strides) == (1, 1)
        and options.get("feature_group_count", 1) == 1
        and all(dilation is None or set(dilation) == {1} for dilation in dilations)
    )


def max_pool(inputs: jax.Array) -> jax.Array:
    """Maxima of 2x2 windows, (N, H, W, C) -> (N, H/2, W/2, C), a last odd row or column left out as in Flax.

    As reshape and maximum, since ``reduce_window`` and its derivatives are slow on a CPU. Between equal maxima the
    gradient is shared, where ``nn.max_pool`` gives all of it to the first.
    """
    return _windows(inputs).max(axis=(2, 4))


def mean_pool(inputs: jax.Array) -> jax.Array:
    """Means of 2x2 windows, (N, H, W, C) -> (N, H/2, W/2, C), a last odd row or column left out as in Flax."""
    return _windows(inputs).mean(axis=(2, 4))


def conv(convolution: Callable, use_bias: bool = False) -> Callable[..., nn.Module]:
    """The class of 3x3 convolutions that keep the size of the image; ``conv(features, ...)`` makes one."""
    return partial(
        nn.Conv,
        kernel_size=(3, 3),
        padding=1,
        use_bias=use_bias,
        kernel_init=he_normal,
        conv_general_dilated=convolution,
    )


def he_normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """``nn.initializers.he_normal()`` of a kernel (..., C, F), the same numbers from one flat draw.

    XLA's CPU backend takes 10 s to compile a draw whose last axis is 12, DenseNet's 39 kernels three minutes.
    """
    std = math.sqrt(2 / math.prod(shape[:-1])) / 0.87962566103423978  # of a normal cut at two deviations
    return nn.initializers.truncated_normal(std)(key, (math.prod(shape),), dtype).reshape(shape)


def batch_norm(train: bool) -> Callable[..., nn.Module]:
    """The class of batch norms: of the batch's statistics in training, of the running ones otherwise."""
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)


def scaled(features: int, width: float) -> int:
    """A number of channels times a factor, at least 1."""
    return max(1, round(features * width))


def pad_to_32(images: jax.Array) -> jax.Array:
    """Images (N, 28, 28, C) or (N, 32, 32, C) as (N, 32, 32, C); ValueError for others."""
    if images.ndim != 4 or images.shape[1:3] not in ((28, 28), (32, 32)):
        raise ValueError(f"images must be (N, 28, 28, C) or (N, 32, 32, C), got {images.shape}")
    margin = (32 - images.shape[1]) // 2
    # The border is continued: a zero would be a frame of mean brightness around normalised images.
    return jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="edge")


def _windows(inputs):
    """(N, H/2, 2, W/2, 2, C): windows of 2x2."""
    n, h, w, c = inputs.shape
    return inputs[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
