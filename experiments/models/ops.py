"""Convolution and max pooling in the forms that XLA's CPU backend runs fastest; same numbers as Flax's own."""

from __future__ import annotations

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
    dilations = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    plain = tuple(strides) == (1, 1) and options.get("feature_group_count", 1) == 1
    plain = plain and all(dilation is None or set(dilation) == {1} for dilation in dilations)
    if jax.default_backend() != "cpu" or not plain:
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


def max_pool(inputs: jax.Array) -> jax.Array:
    """Maxima of 2x2 windows, (N, H, W, C) -> (N, H/2, W/2, C), a last odd row or column left out as in Flax.

    As reshape and maximum, since ``reduce_window`` and its derivatives are slow on a CPU. Between equal maxima the
    gradient is shared, where ``nn.max_pool`` gives all of it to the first.
    """
    n, h, w, c = inputs.shape
    windows = inputs[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return windows.max(axis=(2, 4))
