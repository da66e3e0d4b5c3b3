"""What the algorithms have in common: rows of windows, filters turned round, tiles cut out and joined."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def window_sizes(window: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Rows that a dilated window spans in each dimension."""
    return tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))


def transposed(kernel: Array, groups: int) -> Array:
    """A convolution's kernel as the one of its transpose: mirrored, inputs and outputs exchanged."""
    *window, inputs, outputs = kernel.shape
    kernel = jnp.flip(kernel, range(len(window)))
    kernel = kernel.reshape(*window, inputs, groups, outputs // groups)
    return jnp.moveaxis(kernel, -1, -3).swapaxes(-1, -2).reshape(*window, outputs // groups, groups * inputs)


def whole(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that `n` fits into."""
    return -(-n // unit) * unit


def filled(x: Array, shape: Sequence[int]) -> Array:
    """`x` with zeros at the end of its dimensions, or cropped there, to `shape`."""
    config = [(0, wanted - have, 0) for have, wanted in zip(x.shape, shape, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def extended(x: Array, axis: int, rows: int) -> Array:
    """`filled` along one dimension."""
    return filled(x, (*x.shape[:axis], rows, *x.shape[axis + 1 :]))


def joined(y: Array, extents: Sequence[int]) -> Array:
    """`(*rows of a tile, batch, *tiles, channels)` as the image `(batch, *extents, channels)`."""
    rank = len(extents)
    rows, tiles = y.shape[:rank], y.shape[rank + 1 : -1]
    order = [rank, *(axis for d in range(rank) for axis in (rank + 1 + d, d)), 2 * rank + 1]
    image = [t * r for t, r in zip(tiles, rows, strict=True)]
    y = y.transpose(order).reshape(y.shape[rank], *image, y.shape[-1])
    return lax.slice(y, (0,) * y.ndim, (y.shape[0], *extents, y.shape[-1]))
