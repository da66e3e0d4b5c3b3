"""Convolution by Fourier transforms of tiles (overlap-save)."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Complex, Float

from shardtrain.kernels.conv.tiles import extended, joined, window_sizes

LARGEST = {1: 1024, 2: 64, 3: 32}
"""Rows of a tile, by the number of spatial dimensions: larger ones save little and leave the caches."""


def fft(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    dilation: Sequence[int],
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution without padding and with stride 1, as products of real Fourier transforms.

    Images larger than a tile are cut in tiles that overlap by a window less a row. Computed in at least
    float32; `out_type` is the result's, the input's by default.

    Example:
        >>> fft(jnp.ones((1, 40, 41, 4)), jnp.ones((9, 9, 4, 6)), dilation=(1, 1)).shape
        (1, 32, 33, 6)

    References:
        Mathieu, Henaff and LeCun, Fast Training of Convolutional Networks through FFTs, ICLR 2014;
        Vasilache et al., Fast Convolutional Nets With fbfft, ICLR 2015.
    """
    spans = window_sizes(kernel.shape[:-2], dilation)
    extents = [n - s + 1 for n, s in zip(x.shape[1:-1], spans, strict=True)]
    sizes = tile_sizes(extents, spans)
    return from_filters(
        x,
        transform_filters(kernel, sizes, dilation),
        sizes,
        spans,
        groups=groups,
        precision=precision,
        out_type=out_type,
    )


def tile_sizes(extents: Sequence[int], spans: Sequence[int]) -> list[int]:
    """Rows of a tile for `extents` outputs of windows of `spans` rows: at most the whole image."""
    largest = LARGEST[len(extents)]
    sizes = []
    for n, span in zip(extents, spans, strict=True):
        useful = max(largest, 1 << (2 * span - 1).bit_length())
        sizes.append(min(useful, fast_size(n + span - 1)))
    return sizes


def fast_size(rows: int) -> int:
    """The next number of rows that is a product of 2, 3 and 5 and even, for which transforms are fast."""
    found = rows + rows % 2
    while True:
        rest = found
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return found
        found += 2


def transform_filters(
    kernel: Float[Array, "*window channels_per_group channels_out"],
    sizes: Sequence[int],
    dilation: Sequence[int],
) -> Complex[Array, "*frequencies channels_per_group channels_out"]:
    """Filters as `from_filters` takes them: once, where they do not change."""
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    config = [(0, 0, d - 1) for d in dilation] + [(0, 0, 0)] * 2
    wide = lax.pad(wide, jnp.zeros((), wide.dtype), config)
    return jnp.conj(jnp.fft.rfftn(wide, sizes, axes=tuple(range(len(sizes)))))  # conj: it is a correlation


def from_filters(
    x: Float[Array, "batch *spatial channels_in"],
    filters: Complex[Array, "*frequencies channels_per_group channels_out"],
    sizes: Sequence[int],
    spans: Sequence[int],
    *,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """`fft` with filters that `transform_filters` gave."""
    rank = len(sizes)
    extents = [n - s + 1 for n, s in zip(x.shape[1:-1], spans, strict=True)]
    steps = [t - s + 1 for t, s in zip(sizes, spans, strict=True)]
    tiles = [-(-n // s) for n, s in zip(extents, steps, strict=True)]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for dim, (t, size, step) in enumerate(zip(tiles, sizes, steps, strict=True)):
        axis = 2 * dim + 1
        wide = extended(wide, axis, (t - 1) * step + size)
        rows = np.arange(t)[:, None] * step + np.arange(size)
        if t == 1:
            wide = jnp.expand_dims(wide, axis)
        else:
            wide = jnp.take(wide, rows.reshape(-1), axis=axis)
            wide = wide.reshape(*wide.shape[:axis], t, size, *wide.shape[axis + 1 :])
    # (batch, tiles, size, tiles, size, ..., channels): frequencies first
    inside, outside = [2 * d + 2 for d in range(rank)], [2 * d + 1 for d in range(rank)]
    wide = wide.transpose([*inside, 0, *outside, wide.ndim - 1])
    spectrum = jnp.fft.rfftn(wide, axes=tuple(range(rank)))
    found = spectrum.shape[:rank]
    count = math.prod(found)
    a = spectrum.reshape(count, -1, groups, x.shape[-1] // groups)
    b = filters.reshape(count, filters.shape[-2], groups, -1)
    product = _complex_product(a, b, precision)  # (count, groups, rows, channels_out / groups)
    product = jnp.moveaxis(product, 1, 2).reshape(*found, x.shape[0], *tiles, -1)
    y = jnp.fft.irfftn(product, sizes, axes=tuple(range(rank)))
    y = lax.slice(y, (0,) * y.ndim, (*steps, *y.shape[rank:]))
    return joined(y, extents).astype(out_type or x.dtype)


def _complex_product(a: Array, b: Array, precision: lax.PrecisionLike) -> Array:
    """Batched matrix products by Gauss's three real ones."""
    contract = (((3,), (1,)), ((0, 2), (0, 2)))

    def product(a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, contract, precision=precision)

    one = product(a.real + a.imag, b.real)
    two = product(a.real, b.imag - b.real)
    three = product(a.imag, b.real + b.imag)
    return lax.complex(one - three, one + two)
