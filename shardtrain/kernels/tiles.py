"""What the algorithms have in common: the rows of windows, and tiles cut out and put together again."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def window_sizes(window: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Rows that a dilated window spans in each dimension."""
    return tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))


def extended(x: Array, axis: int, rows: int) -> Array:
    """`x` with zeros at the end of dimension `axis`, or cropped there, to `rows`."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (0, rows - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def joined(y: Array, extents: Sequence[int]) -> Array:
    """`(*rows of a tile, batch, *tiles, channels)` as the image `(batch, *extents, channels)`."""
    rank = len(extents)
    rows, tiles = y.shape[:rank], y.shape[rank + 1 : -1]
    order = [rank, *(axis for d in range(rank) for axis in (rank + 1 + d, d)), 2 * rank + 1]
    image = [t * r for t, r in zip(tiles, rows, strict=True)]
    y = y.transpose(order).reshape(y.shape[rank], *image, y.shape[-1])
    return lax.slice(y, (0,) * y.ndim, (y.shape[0], *extents, y.shape[-1]))
