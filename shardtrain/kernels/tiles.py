"""Helpers that several kernels share: extents of windows, transposed filters, padding, tiles."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def window_sizes(window: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Rows that a dilated window spans in each dimension."""
    return tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))


def transposed(kernel: Array, groups: int) -> Array:
    """The kernel of the transposed convolution: mirrored, with input and output channels exchanged."""
    *window, inputs, outputs = kernel.shape
    kernel = jnp.flip(kernel, range(len(window)))
    kernel = kernel.reshape(*window, inputs, groups, outputs // groups)
    return jnp.moveaxis(kernel, -1, -3).swapaxes(-1, -2).reshape(*window, outputs // groups, groups * inputs)


def next_multiple(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not less than `n`."""
    return -(-n // unit) * unit


def pad_or_crop(x: Array, shape: Sequence[int]) -> Array:
    """`x` padded with zeros, or cropped, at the end of every dimension to `shape`."""
    config = [(0, wanted - have, 0) for have, wanted in zip(x.shape, shape, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def pad_axis(x: Array, axis: int, rows: int) -> Array:
    """`x` padded with zeros, or cropped, at the end of one dimension to `rows`."""
    return pad_or_crop(x, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))


def join_tiles(y: Array, extents: Sequence[int]) -> Array:
    """The image `(batch, *extents, channels)` of tiles `(*rows of a tile, batch, *tiles, channels)`."""
    rank = len(extents)
    rows, tiles = y.shape[:rank], y.shape[rank + 1 : -1]
    order = [rank, *(axis for d in range(rank) for axis in (rank + 1 + d, d)), 2 * rank + 1]
    image = [t * r for t, r in zip(tiles, rows, strict=True)]
    y = y.transpose(order).reshape(y.shape[rank], *image, y.shape[-1])
    return lax.slice(y, (0,) * y.ndim, (y.shape[0], *extents, y.shape[-1]))
