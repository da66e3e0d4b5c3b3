"""Convolution by Fourier transforms of tiles (overlap-save).

Tiles are small, and the transform of a few dozen pixels is fastest as a product with its Fourier matrix. The
matrices put frequencies first, with real and imaginary parts apart, as the products of the spectra need them;
they leave out rows of filters that are zero and outputs that wrap around.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.kernels.tiles import join_tiles, pad_axis, window_sizes

MATRIX = 256
"""Rows of a tile beyond which its transform is an FFT instead of a matrix product."""

PER_BYTE = 10
"""Operations that take as long as moving a byte, for the choice of tiles."""

Spectra = tuple[Array, Array, Array]
"""The three combinations of real and imaginary parts that Gauss's complex product takes."""


def fft(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    dilation: Sequence[int],
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution without padding and with stride 1: spectra of tiles times spectra of filters.

    Images are divided into tiles that overlap by one row less than the window. All sums are in at least
    float32.

    Args:
        x: input.
        kernel: filters.
        dilation: of the filters.
        groups: feature groups.
        precision: of the products.
        out_type: of the result, the input's by default.

    Example:
        >>> from shardtrain.kernels.conv.fft import fft
        >>> fft(jnp.ones((1, 40, 41, 4)), jnp.ones((9, 9, 4, 6)), dilation=(1, 1)).shape
        (1, 32, 33, 6)

    References:
        Mathieu, Henaff and LeCun, Fast Training of Convolutional Networks through FFTs, ICLR 2014;
        Vasilache et al., Fast Convolutional Nets With fbfft, ICLR 2015.
    """
    spans = window_sizes(kernel.shape[:-2], dilation)
    extents = tuple(n - s + 1 for n, s in zip(x.shape[1:-1], spans, strict=True))
    sizes = tile_sizes(extents, spans, x.shape[0], *kernel.shape[-2:], groups)
    filters = transform_filters(kernel, sizes, dilation)
    return from_filters(x, filters, sizes, spans, groups=groups, precision=precision, out_type=out_type)


@functools.lru_cache(maxsize=1024)
def tile_sizes(
    extents: tuple[int, ...],
    spans: tuple[int, ...],
    batch: int = 1,
    per_group: int = 1,
    filters: int = 1,
    groups: int = 1,
) -> tuple[int, ...]:
    """Rows of the cheapest tiles, for `extents` outputs of windows of `spans` rows."""

    def cost(sizes: tuple[int, ...]) -> float:
        steps = [t - s + 1 for t, s in zip(sizes, spans, strict=True)]
        tiles = batch * math.prod(-(-n // s) for n, s in zip(extents, steps, strict=True))
        points = frequencies(sizes)
        pairs, channels = per_group * filters, per_group * groups
        count = tiles * (operations(sizes, sizes) * channels + operations(sizes, steps) * filters)
        count += operations(sizes, spans) * pairs + 6 * points * tiles * pairs
        moved = 4 * points * (3 * tiles * (channels + filters) + 5 * pairs)
        return count + PER_BYTE * moved

    found = itertools.product(*(_candidates(n + s - 1, s) for n, s in zip(extents, spans, strict=True)))
    return min(found, key=cost)


def _candidates(rows: int, span: int) -> list[int]:
    """Even sizes: that of the whole image, and of tiles with at least half as many outputs as overlap."""
    whole = rows + -rows % (2 if rows <= MATRIX else 64)
    sizes = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, *(1 << i for i in range(9, 24)))
    found = [n for n in sizes if 1.5 * span <= n < whole and n <= max(MATRIX, 4 * span)]
    return [*found[:9], whole]


def operations(sizes: Sequence[int], rows: Sequence[int]) -> float:
    """Operations of the transform of one tile, of which `rows` are not zero."""
    *others, last = sizes
    if max(sizes) > MATRIX:
        return 20.0 * math.prod(sizes) * math.log2(math.prod(sizes))  # 2.5, at an eighth of the speed
    found = 4.0 * (last // 2 + 1) * math.prod(rows)
    done, left = last // 2 + 1, math.prod(rows[:-1])
    for size, have in zip(reversed(others), reversed(rows[:-1]), strict=True):
        found += 8.0 * done * size * left
        done, left = done * size, left // max(1, have)
    return found


def frequencies(sizes: Sequence[int]) -> int:
    """Frequencies of a tile of real numbers: half of the last dimension's are conjugates of the others."""
    return math.prod(sizes[:-1]) * (sizes[-1] // 2 + 1)


def transform_filters(
    kernel: Float[Array, "*window channels_per_group channels_out"],
    sizes: Sequence[int],
    dilation: Sequence[int],
) -> Spectra:
    """Transforms filters for `from_filters`; once is enough where they do not change."""
    rank = len(sizes)
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    wide = wide.transpose([*reversed(range(rank)), rank, rank + 1])
    real, imag = _spectrum(wide, sizes, dilation)
    return real, imag + real, real - imag  # conjugated: it is a correlation


def from_filters(
    x: Float[Array, "batch *spatial channels_in"],
    filters: Spectra,
    sizes: Sequence[int],
    spans: Sequence[int],
    *,
    groups: int = 1,
    precision: lax.PrecisionLike = None,
    out_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """`fft` with filters that `transform_filters` has transformed."""
    rank = len(sizes)
    extents = [n - s + 1 for n, s in zip(x.shape[1:-1], spans, strict=True)]
    steps = [t - s + 1 for t, s in zip(sizes, spans, strict=True)]
    tiles = [-(-n // s) for n, s in zip(extents, steps, strict=True)]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for dim, (t, size, step) in enumerate(zip(tiles, sizes, steps, strict=True)):
        axis = 2 * dim + 1
        wide = pad_axis(wide, axis, (t - 1) * step + size)
        parts = [lax.slice_in_dim(wide, i * step, i * step + size, axis=axis) for i in range(t)]
        wide = jnp.stack(parts, axis)
    # (batch, tiles, size, tiles, size, ..., channels): rows first, those of the last dimension before all
    inside, outside = [2 * d + 2 for d in reversed(range(rank))], [2 * d + 1 for d in range(rank)]
    wide = wide.transpose([*inside, 0, *outside, wide.ndim - 1])
    real, imag = (
        part.reshape(part.shape[0], -1, x.shape[-1]) for part in _spectrum(wide, sizes, (1,) * rank)
    )
    y = _inverse(*_products(real, imag, filters, groups, precision), sizes, steps)
    y = y.reshape(*reversed(steps), x.shape[0], *tiles, -1)
    y = y.transpose([*reversed(range(rank)), *range(rank, y.ndim)])
    return join_tiles(y, extents).astype(out_type or x.dtype)


def _products(
    real: Array, imag: Array, filters: Spectra, groups: int, precision: lax.PrecisionLike
) -> tuple[Array, Array]:
    """Batched products of `(points, rows, channels)` with the filters: Gauss's three real ones."""

    def product(a: Array, b: Array) -> Array:
        if groups == 1:
            return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), precision=precision)
        a = a.reshape(*a.shape[:2], groups, -1)
        b = b.reshape(*b.shape[:2], groups, -1)
        y = lax.dot_general(a, b, (((3,), (1,)), ((0, 2), (0, 2))), precision=precision)
        return jnp.moveaxis(y, 1, 2).reshape(*a.shape[:2], -1)

    one, two, three = filters
    both = product(real + imag, one)
    return both - product(imag, three), both - product(real, two)


def _spectrum(x: Array, sizes: Sequence[int], steps: Sequence[int]) -> tuple[Array, Array]:
    """Transform of the leading dimensions, in reversed order: `(points, *rest)`, real and imaginary part.

    Row `i` is at pixel `i * step`, with zeros between the rows and after the last one.
    """
    rank = len(sizes)
    rows, rest = x.shape[:rank], x.shape[rank:]
    back = list(zip(reversed(sizes), reversed(steps), strict=True))
    if max(sizes) > MATRIX:
        config = [(0, n - (r - 1) * d - 1, d - 1) for r, (n, d) in zip(rows, back, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), config + [(0, 0, 0)] * len(rest))
        found = jnp.fft.rfftn(x, axes=tuple(reversed(range(rank)))).reshape(-1, *rest)
        return found.real, found.imag
    y = x.reshape(1, rows[0], -1)
    for i, (size, step) in enumerate(back):
        waves = _waves(size, rows[i], step, x.dtype.name, i == 0)
        if i + 1 == rank:
            real, imag = (_times(waves[:, part], y).reshape(-1, *rest) for part in (0, 1))
        else:
            y = _times(waves.reshape(-1, waves.shape[-1]), y)
            y = y.reshape(y.shape[0] * waves.shape[0], 2 * rows[i + 1], -1)
    return real, imag


def _inverse(real: Array, imag: Array, sizes: Sequence[int], steps: Sequence[int]) -> Array:
    """The first `steps` rows of every dimension, leading and in reversed order, of `(points, *rest)`."""
    rest = real.shape[1:]
    if max(sizes) > MATRIX:
        shape = [sizes[-1] // 2 + 1, *reversed(sizes[:-1]), *rest]
        y = lax.complex(real, imag).reshape(shape)
        y = jnp.fft.irfftn(y, sizes, axes=tuple(reversed(range(len(sizes)))))
        return lax.slice(y, (0,) * y.ndim, (*reversed(steps), *y.shape[len(sizes) :]))
    dtype = real.dtype.name
    back = [
        _back(size, step, dtype, dim + 1 == len(sizes))
        for dim, (size, step) in enumerate(zip(sizes, steps, strict=True))
    ]
    count = back[0].shape[1]
    real, imag = (part.reshape(part.shape[0] // count, count, -1) for part in (real, imag))
    y = _times(back[0][..., 0], real) + _times(back[0][..., 1], imag)
    for waves in back[1:]:
        y = y.reshape(y.shape[0] // waves.shape[1], 2 * waves.shape[1], -1)
        y = _times(waves.reshape(waves.shape[0], -1), y)
    return y.reshape(*reversed(steps), *rest)


def _times(matrix: np.ndarray, x: Array) -> Array:
    """A matrix times every entry of `(batch, rows, columns)`; TF32 would lose half of the digits."""
    exact = lax.Precision.HIGHEST
    if x.shape[0] == 1:
        return lax.dot(jnp.asarray(matrix), x[0], precision=exact)[None]
    whole = jnp.broadcast_to(jnp.asarray(matrix), (x.shape[0], *matrix.shape))
    return lax.dot_general(whole, x, (((2,), (1,)), ((0,), (0,))), precision=exact)


@functools.lru_cache(maxsize=256)
def _waves(size: int, rows: int, step: int, dtype: str, real: bool) -> np.ndarray:
    """The Fourier matrix: `(frequencies, 2, rows)` for real numbers, else `(frequencies, 2, 2 * rows)`."""
    count = size // 2 + 1 if real else size
    angle = 2 * np.pi / size * (np.arange(count)[:, None] * (step * np.arange(rows)) % size)
    c, s = np.cos(angle), np.sin(angle)
    found = np.stack([c, -s], 1) if real else np.stack([np.hstack([c, s]), np.hstack([-s, c])], 1)
    return found.astype(dtype)


@functools.lru_cache(maxsize=256)
def _back(size: int, rows: int, dtype: str, real: bool) -> np.ndarray:
    """The inverse: `(rows, frequencies, 2)` to real numbers, `(2 * rows, frequencies, 2)` to complex ones."""
    count = size // 2 + 1 if real else size
    angle = 2 * np.pi / size * (np.arange(rows)[:, None] * np.arange(count) % size)
    c, s = np.cos(angle) / size, np.sin(angle) / size
    if real:
        weight = np.where(np.isin(np.arange(count), (0, size // 2)), 1, 2)
        return (np.stack([c, -s], -1) * weight[:, None]).astype(dtype)
    return np.concatenate([np.stack([c, -s], -1), np.stack([s, c], -1)]).astype(dtype)
