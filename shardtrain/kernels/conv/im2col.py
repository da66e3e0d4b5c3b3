"""Convolution as one matrix product, for which every window of the input is copied to a row."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float


def im2col(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution without padding: all windows side by side, by strided slices, times all filters.

    Args:
        x: input.
        kernel: filters.
        strides: of the window.
        dilation: of the filters.
        groups: feature groups.
        precision: of the products.
        out_type: of the sums and the result, the input's by default.

    Example:
        >>> from shardtrain.kernels.conv.im2col import im2col
        >>> x, kernel = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 6))
        >>> im2col(x, kernel, strides=(1, 2), dilation=(1, 1)).shape
        (1, 6, 4, 6)

    References:
        Chellapilla, Puri and Simard, High Performance Convolutional Neural Networks for Document
        Processing, 2006.
    """
    window, per_group = kernel.shape[:-2], kernel.shape[-2]
    extents = extents_out(x.shape[1:-1], window, strides, dilation)
    patches = x if groups == 1 else x.reshape(*x.shape[:-1], groups, per_group)
    for dim in reversed(range(len(window))):  # columns before rows: neighbours in memory are copied together
        last = (extents[dim] - 1) * strides[dim] + 1
        starts = [i * dilation[dim] for i in range(window[dim])]
        parts = [lax.slice_in_dim(patches, i, i + last, strides[dim], dim + 1) for i in starts]
        patches = jnp.concatenate(parts, axis=-1)
    # (batch, *spatial_out, taps * channels), or with groups before the last dimension
    if groups == 1:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        return jnp.tensordot(patches, matrix, 1, precision=precision, preferred_element_type=out_type)
    matrix = kernel.reshape(-1, groups, kernel.shape[-1] // groups)
    contract = (((patches.ndim - 1,), (0,)), ((patches.ndim - 2,), (1,)))
    y = lax.dot_general(patches, matrix, contract, precision=precision, preferred_element_type=out_type)
    y = jnp.moveaxis(y, 0, -2)
    return y.reshape(*y.shape[:-2], -1)


def extents_out(
    extents: Sequence[int], window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Output pixels of every dimension, without padding."""
    return [
        (n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(extents, window, strides, dilation, strict=True)
    ]


def workspace(
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    itemsize: int,
) -> int:
    """Bytes of the copied windows, for a padded input of `shape`: nearly `prod(window)` times the input."""
    pixels = math.prod(extents_out(shape[1:-1], window, strides, dilation))
    return shape[0] * pixels * math.prod(window) * shape[-1] * itemsize
