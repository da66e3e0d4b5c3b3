"""Winograd's convolution in plain JAX, for one to three dimensions."""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.kernels.tiles import join_tiles, pad_axis
from shardtrain.kernels.winograd.cook_toom import Algorithm, Matrix, algorithm

AT_ONCE = 96
"""Channels that one product sums in float32. XLA adds them one after the other on CPUs, and with 256 channels
this would cause half of all rounding errors."""


def winograd(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    outputs: Sequence[int],
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution without padding and with stride 1, by F(m, r) in every dimension.

    Inputs are divided into overlapping tiles of `m + r - 1` pixels. Tiles and filters are transformed, and
    multiplied by one matrix product for every pixel of a tile, whose results are transformed back to `m`
    outputs. Transforms are in at least float32.

    Args:
        x: input.
        kernel: filters.
        outputs: `m` of every dimension; the tile is `m + r - 1`, 12 at most.
        groups: feature groups.
        precision: of the products.
        out_type: of the result, the input's by default.

    Example:
        >>> from shardtrain.kernels.winograd.xla import winograd
        >>> winograd(jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 6)), outputs=(4, 4)).shape
        (1, 6, 7, 6)

    References:
        Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
    """
    found = algorithms(kernel.shape[:-2], outputs)
    return from_filters(
        x, transform_filters(kernel, found), found, groups=groups, precision=precision, out_type=out_type
    )


def algorithms(window: Sequence[int], outputs: Sequence[int]) -> tuple[Algorithm, ...]:
    """F(m, r) of every dimension, F(1, 1) for dimensions with a single tap."""
    return tuple(algorithm(1 if r == 1 else m, r) for m, r in zip(outputs, window, strict=True))


def transform_filters(
    kernel: Float[Array, "*window channels_per_group channels_out"], found: Sequence[Algorithm]
) -> Float[Array, "*tile channels_per_group channels_out"]:
    """Transforms filters for `from_filters`; once is enough where they do not change."""
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    for dim, f in enumerate(found):
        wide = apply(f.filter, wide, dim)
    return wide.astype(kernel.dtype)


def from_filters(
    x: Float[Array, "batch *spatial channels_in"],
    filters: Float[Array, "*tile channels_per_group channels_out"],
    found: Sequence[Algorithm],
    *,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """`winograd` with filters that `transform_filters` has transformed."""
    extents = [n - f.taps + 1 for n, f in zip(x.shape[1:-1], found, strict=True)]
    tiles = [-(-n // f.outputs) for n, f in zip(extents, found, strict=True)]
    points = math.prod(f.tile for f in found)
    v = transform_input(x, found, tiles)  # (*tile, batch, *tiles, channels)
    v = v.reshape(points, -1, groups, x.shape[-1] // groups)
    u = filters.reshape(points, filters.shape[-2], groups, -1)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    contract = (((3,), (1,)), ((0, 2), (0, 2)))
    width = AT_ONCE if x.dtype == jnp.float32 else v.shape[-1]
    count = max(1, -(-v.shape[-1] // max(1, width)))
    products = [
        lax.dot_general(a, b, contract, precision=precision, preferred_element_type=accumulate)
        for a, b in zip(jnp.array_split(v, count, 3), jnp.array_split(u, count, 1), strict=True)
    ]
    product = functools.reduce(jnp.add, products)
    # (points, groups, rows, channels_out / groups)
    y = jnp.moveaxis(product, 1, 2).reshape(*(f.tile for f in found), x.shape[0], *tiles, -1)
    for dim, f in enumerate(found):
        y = apply(f.output, y, dim)
    return join_tiles(y, extents).astype(out_type or x.dtype)


def transform_input(
    x: Float[Array, "batch *spatial channels"], found: Sequence[Algorithm], tiles: Sequence[int]
) -> Float[Array, "*tiles channels"]:
    """Overlapping tiles, each transformed."""
    rank = len(found)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for dim, (f, t) in enumerate(zip(found, tiles, strict=True)):
        axis = dim + dim + 1  # after the dimensions that tiles have added
        rows = t * f.outputs + f.taps - 1
        wide = pad_axis(wide, axis, rows)
        last = (t - 1) * f.outputs + 1
        parts = [lax.slice_in_dim(wide, i, i + last, f.outputs, axis) for i in range(f.tile)]
        wide = _combine(f.input, parts, dim)
    assert wide.ndim == x.ndim + rank
    return wide.astype(x.dtype)


def apply(rows: Matrix, x: Array, axis: int) -> Array:
    """A matrix of fractions times dimension `axis`."""
    return _combine(rows, [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])], axis)


def _combine(rows: Matrix, parts: Sequence[Array], axis: int) -> Array:
    """Sums of `parts`, weighted by each of `rows`, along a new dimension. Weights of 0 and 1 cost nothing."""
    sums = []
    for row in rows:
        terms = [
            part if weight == 1 else -part if weight == -1 else part * np.asarray(float(weight), part.dtype)
            for weight, part in zip(row, parts, strict=True)
            if weight
        ]
        sums.append(functools.reduce(jnp.add, terms))
    return jnp.stack(sums, axis)


def multiplications(window: Sequence[int], outputs: Sequence[int]) -> float:
    """Products for one output value and input channel; direct convolution has `prod(window)`."""
    found = algorithms(window, outputs)
    return math.prod(f.tile for f in found) / math.prod(f.outputs for f in found)
