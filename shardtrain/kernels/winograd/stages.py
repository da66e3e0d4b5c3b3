"""Winograd's convolution by GPU kernels: the steps that are the same in Mosaic GPU and in Triton.

The kernels transform the input's tiles, multiply them by the transformed filters for every point of a tile,
and transform the products back. XLA transforms the filters, which are small, and pads and crops the borders.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.kernels import gpu
from shardtrain.kernels.matmul import matmul
from shardtrain.kernels.tiles import next_multiple, pad_or_crop, transposed
from shardtrain.kernels.winograd import xla
from shardtrain.kernels.winograd.cook_toom import Algorithm

LARGEST_TILE = 8
"""Pixels of a tile in either dimension, at most: larger tiles do not fit into registers."""


@dataclass(frozen=True)
class WinogradSettings:
    """The static arguments of a convolution by GPU kernels.

    Attributes:
        found: F(m, r) along rows and along columns.
        implementation: "mosaic" or "triton".
        precision: of the products, as in `shardtrain.kernels.matmul`.
        out_type: of the result.
        relu: whether to apply ReLU to the result.
        fused: whether the product and the output transform are one kernel; None for whichever moves fewer
            bytes.
    """

    found: tuple[Algorithm, Algorithm]
    implementation: str
    precision: str
    out_type: Any
    relu: bool = False
    fused: bool | None = None

    @property
    def room(self) -> Any:
        """The module of the implementation; imported only where it is needed, as in `kernels.matmul`."""
        return importlib.import_module(f"shardtrain.kernels.winograd.{self.implementation}")


@dataclass(frozen=True)
class TilePlan:
    """The sizes of the arrays that the kernels read and write.

    Attributes:
        batch: images, padded to a multiple of `side`.
        side: images side by side in the channels, so that narrow layers fill the vectors too.
        extents: rows and columns of the output.
        tiles: per column and row of an image.
        strips: rows of tiles of all images, padded so that the products have whole tiles.
        count: tiles of a program.
        depth: input channels, padded.
        columns: output channels, padded.
    """

    batch: int
    side: int
    extents: tuple[int, int]
    tiles: tuple[int, int]
    strips: int
    count: int
    depth: int
    columns: int

    @property
    def rows(self) -> int:
        """Rows of the products: tiles of all images."""
        return self.strips * self.tiles[1] * self.side


def plan(settings: WinogradSettings, shape: tuple[int, ...], columns: int, dtype: DTypeLike) -> TilePlan:
    """The sizes for an input of shape `(batch, rows, columns, channels)` and `columns` filters."""
    batch, *spatial, channels = shape
    depth = next_multiple(channels, 128 // jnp.dtype(dtype).itemsize)  # that of the product's tiles
    wide = next_multiple(columns, 64)
    lanes = settings.room.LANES
    side = max(lanes // math.gcd(lanes, depth), lanes // math.gcd(lanes, wide))
    extents = tuple(n - f.taps + 1 for n, f in zip(spatial, settings.found, strict=True))
    tile = [f.tile for f in settings.found]
    step = settings.found[1].outputs
    # The products are float32, the widest type that a program stores.
    count = min(
        settings.room.together(tile, tile, step, dtype),
        settings.room.together((1, 1), tile, 1, jnp.float32),
        _power(-(-extents[1] // step)),
    )
    down, across = (-(-n // f.outputs) for n, f in zip(extents, settings.found, strict=True))
    across = next_multiple(across, count)
    images = next_multiple(batch, side) // side
    strips = next_multiple(images * down, 128 // math.gcd(128, across * side))
    return TilePlan(
        images * side,
        side,
        (extents[0], extents[1]),
        (down, across),
        strips,
        count,
        depth,
        wide,
    )


def _folded(settings: WinogradSettings) -> Callable[..., Array]:
    """`_convolve` with a rule for `vmap`, since the kernels have a fixed number of dimensions.

    If the input alone is mapped, the rule merges the mapped dimension into the batch where the kernels allow;
    otherwise it computes one example after the other.
    """
    folded = jax.custom_batching.custom_vmap(functools.partial(_convolve, settings))

    @folded.def_vmap
    def rule(size: int, mapped: Any, x: Array, kernel: Array, bias: Array | None) -> tuple[Array, bool]:
        batch = size * x.shape[1], *x.shape[2:]
        if not any(jax.tree.leaves(mapped[1:])) and not refused(settings, batch, kernel.shape[-1], x.dtype):
            y = folded(x.reshape(-1, *x.shape[2:]), kernel, bias)
            return y.reshape(size, -1, *y.shape[1:]), True
        return _in_turn(folded, size, mapped, x, kernel, bias), True

    return folded


def _in_turn(run: Callable[..., Array], size: int, mapped: Any, *operands: Array | None) -> Array:
    return lax.map(lambda one: run(*one), gpu.all_mapped(size, mapped, operands))


def convolve(
    settings: WinogradSettings,
    x: Float[Array, "batch rows columns channels_in"],
    kernel: Float[Array, "taps_down taps_across channels_in channels_out"],
    bias: Float[Array, " channels_out"] | None,
) -> Float[Array, "batch rows_out columns_out channels_out"]:
    """Convolution with stride 1 and without padding, plus the bias, and ReLU if the settings say so."""
    return _folded(settings)(x, kernel, bias)


def _convolve(
    settings: WinogradSettings,
    x: Float[Array, "batch rows columns channels_in"],
    kernel: Float[Array, "taps_down taps_across channels_in channels_out"],
    bias: Float[Array, " channels_out"] | None,
) -> Float[Array, "batch rows_out columns_out channels_out"]:
    p = plan(settings, x.shape, kernel.shape[-1], x.dtype)
    u = _filters(settings, kernel, p)
    v = _tiles(settings, x, p)
    if _fused(settings, p, x.dtype):
        y = settings.room.multiply_and_untransform(
            v, u, rows=_rows(settings, "output"), out_type=settings.out_type, interpreted=_interpreted()
        )
        return _finished(settings, _from_points(settings, y, p), x.shape[0], bias, kernel.shape[-1], p)
    m = matmul(
        v, u, precision=settings.precision, out_type=jnp.float32, implementation=settings.implementation
    )
    m = m.reshape(m.shape[0], p.strips, p.tiles[1], p.side * p.columns)
    if bias is not None:
        bias = jnp.tile(pad_or_crop(bias.astype(jnp.float32), (p.columns,)), p.side)
    y = settings.room.untransform(
        m,
        bias,
        rows=_rows(settings, "output"),
        tiles=p.tiles,
        batch=p.batch // p.side,
        count=p.count,
        relu=settings.relu,
        out_type=settings.out_type,
        interpreted=_interpreted(),
    )
    return _cropped(_apart(y, p.side), x.shape[0], p.extents, kernel.shape[-1])


def filter_gradient(
    settings: WinogradSettings,
    x: Float[Array, "batch rows columns channels_in"],
    dy: Float[Array, "batch rows_out columns_out channels_out"],
) -> Float[Array, "taps_down taps_across channels_in channels_out"]:
    """Gradient of the filters by the transpose of the algorithm, `G^T [V^T (A dy A^T)] G`, in float32.

    The transposed product sums over all tiles. It is divided into chunks, which are summed at the end, so
    that there are programs for all multiprocessors of the GPU.
    """
    run = jax.custom_batching.custom_vmap(functools.partial(_filter_gradient, settings))

    @run.def_vmap
    def rule(size: int, mapped: Any, x: Array, dy: Array) -> tuple[Array, bool]:
        return _in_turn(run, size, mapped, x, dy), True

    return run(x, dy)


def _filter_gradient(settings: WinogradSettings, x: Array, dy: Array) -> Array:
    p = plan(settings, x.shape, dy.shape[-1], x.dtype)
    v = _tiles(settings, x, p)
    back = tuple(tuple(zip(*f.output, strict=True)) for f in settings.found)
    m, n = (f.outputs for f in settings.found)
    padded = _side_by_side(dy, p, (p.tiles[0] * m, p.tiles[1] * n), p.columns)
    d = settings.room.transform(
        padded,
        rows=back,
        steps=(m, n),
        tiles=p.tiles,
        strips=p.strips,
        count=p.count,
        interpreted=_interpreted(),
    ).reshape(v.shape[0], p.rows, p.columns)
    chunks = _chunks(p, v.shape[0])
    v, d = (a.reshape(-1, p.rows // chunks, a.shape[-1]) for a in (v, d))
    du = matmul(
        v,
        d,
        transpose_a=True,
        precision=settings.precision,
        out_type=jnp.float32,
        implementation=settings.implementation,
    )
    du = du.reshape(-1, chunks, p.depth, p.columns).sum(1)
    du = du.reshape(*(f.tile for f in settings.found), p.depth, p.columns)
    for dim, f in enumerate(settings.found):
        du = xla.apply(tuple(zip(*f.filter, strict=True)), du, dim)
    return du[:, :, : x.shape[-1], : dy.shape[-1]]


def input_gradient(
    settings: WinogradSettings,
    kernel: Float[Array, "taps_down taps_across channels_in channels_out"],
    dy: Float[Array, "batch rows_out columns_out channels_out"],
) -> Float[Array, "batch rows columns channels_in"]:
    """Gradient of the input: the convolution of `dy` with the transposed filters."""
    margins = [(0, 0, 0), *((f.taps - 1, f.taps - 1, 0) for f in settings.found), (0, 0, 0)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), margins)
    return convolve(replace(settings, relu=False, out_type=dy.dtype), dy, transposed(kernel, 1), None)


def bytes_moved(settings: WinogradSettings, p: TilePlan, dtype: DTypeLike, *, fused: bool) -> int:
    """Bytes that the product and the output transform read and write, as one kernel or as two.

    Operands count once for every column or row of tiles of the product that reads them.
    """
    width, out = jnp.dtype(dtype).itemsize, jnp.dtype(settings.out_type).itemsize
    points = math.prod(f.tile for f in settings.found)
    outputs = math.prod(f.outputs for f in settings.found)
    bm, bn = settings.room.FUSED[outputs] if fused else (128, 128 if p.columns % 128 == 0 else 64)
    operands = points * p.rows * p.depth * width * -(-p.columns // bn)
    operands += points * p.depth * p.columns * width * -(-p.rows // bm)
    result = outputs * p.rows * p.columns * out
    if fused:
        return operands + 3 * result  # written by points, read and written as an image
    return operands + 2 * points * p.rows * p.columns * 4 + result


def refused(settings: WinogradSettings, shape: tuple[int, ...], columns: int, dtype: DTypeLike) -> str | None:
    """Why the kernels do not support an input of `shape` and `columns` filters; None if they do."""
    name = f"implementation={settings.implementation!r}"
    tile = [f.tile for f in settings.found]
    if max(tile) > LARGEST_TILE:
        return f"{name} holds tiles of {LARGEST_TILE} pixels, not {max(tile)}; use 'xla'"
    p = plan(settings, shape, columns, dtype)
    if min(*shape, *p.extents, columns) < 1:
        return f"{name} has nothing to compute for an input of {shape}; use 'xla'"
    back = [n + 2 * (f.taps - 1) for n, f in zip(p.extents, settings.found, strict=True)]
    dual = plan(settings, (shape[0], *back, columns), shape[-1], dtype)  # the input's gradient
    rows = max(p.rows, dual.rows, p.depth)
    if (numbers := math.prod(tile) * rows * max(p.depth, p.columns)) >= 2**31:  # indices are of 32 bits
        return f"{name} takes transformed images of 2^31 numbers, not {numbers}; cut the batch, or use 'xla'"
    if settings.fused:
        return _fusible(settings, dtype)
    return None


def _fusible(settings: WinogradSettings, dtype: DTypeLike) -> str | None:
    """Why the product and the output transform cannot be one kernel; None if they can."""
    name, tile = f"implementation={settings.implementation!r}", [f.tile for f in settings.found]
    if math.prod(f.outputs for f in settings.found) not in settings.room.FUSED:
        return f"{name} has no fused product for {tile[0]}x{tile[1]} tiles; leave fused out"
    if settings.implementation == "mosaic" and (at := gpu.card()) is not None and at.blackwell:
        return f"{name} has its fused product for Hopper only; leave fused out"
    if settings.precision != "default" and jnp.dtype(dtype) == jnp.float32:
        return f"{name} fuses products of the default precision only; leave fused out"
    return None


def _fused(settings: WinogradSettings, p: TilePlan, dtype: DTypeLike) -> bool:
    if settings.fused is not None:
        return settings.fused
    return _fusible(settings, dtype) is None and bytes_moved(settings, p, dtype, fused=True) < bytes_moved(
        settings, p, dtype, fused=False
    )


def _filters(settings: WinogradSettings, kernel: Array, p: TilePlan) -> Array:
    u = xla.transform_filters(kernel, settings.found)
    u = u.reshape(-1, *u.shape[2:])
    return pad_or_crop(u, (u.shape[0], p.depth, p.columns))


def _tiles(settings: WinogradSettings, x: Array, p: TilePlan) -> Array:
    """Transformed tiles of the input, `(points, rows of the products, depth)`."""
    down, across = settings.found
    rows = p.tiles[0] * down.outputs + down.taps - 1, p.tiles[1] * across.outputs + across.taps - 1
    v = settings.room.transform(
        _side_by_side(x, p, rows, p.depth),
        rows=_rows(settings, "input"),
        steps=(down.outputs, across.outputs),
        tiles=p.tiles,
        strips=p.strips,
        count=p.count,
        interpreted=_interpreted(),
    )
    return v.reshape(v.shape[0], p.rows, p.depth)


def _side_by_side(x: Array, p: TilePlan, extents: tuple[int, int], channels: int) -> Array:
    """The images padded to whole tiles, with `side` neighbouring images side by side in the channels."""
    wanted = p.batch, *extents, channels
    x = pad_or_crop(x, wanted)
    if p.side == 1:
        return x
    x = jnp.moveaxis(x.reshape(-1, p.side, *wanted[1:]), 1, 3)
    return x.reshape(*x.shape[:3], -1)


def _apart(y: Array, side: int) -> Array:
    """The inverse of `_side_by_side`."""
    if side == 1:
        return y
    y = jnp.moveaxis(y.reshape(*y.shape[:3], side, -1), 3, 1)
    return y.reshape(-1, *y.shape[2:])


def _from_points(settings: WinogradSettings, y: Array, p: TilePlan) -> Array:
    """Images of the result `(outputs, rows, columns)` of the fused product."""
    m, n = (f.outputs for f in settings.found)
    real = p.batch // p.side * p.tiles[0]
    y = y.reshape(m, n, p.strips, p.tiles[1], p.side, p.columns)[:, :, :real]
    y = y.reshape(m, n, -1, *p.tiles, p.side, p.columns)  # (m, n, images, down, across, side, columns)
    y = y.transpose(2, 5, 3, 0, 4, 1, 6)
    return y.reshape(p.batch, p.tiles[0] * m, p.tiles[1] * n, p.columns)


def _finished(
    settings: WinogradSettings, y: Array, batch: int, bias: Array | None, columns: int, p: TilePlan
) -> Array:
    """The result cropped, plus bias and ReLU, which XLA fuses with the copy that reorders the product."""
    y = _cropped(y, batch, p.extents, columns)
    if bias is not None:
        y = (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)
    return jax.nn.relu(y) if settings.relu else y


def _cropped(y: Array, batch: int, extents: tuple[int, int], columns: int) -> Array:
    return y[:batch, : extents[0], : extents[1], :columns]


def _rows(settings: WinogradSettings, which: str) -> tuple[Any, Any]:
    return getattr(settings.found[0], which), getattr(settings.found[1], which)


def _chunks(p: TilePlan, points: int) -> int:
    """Parts of the sum over tiles: enough programs for two on each of 132 multiprocessors."""
    programs = points * -(-p.depth // 128) * -(-p.columns // 128)
    chunks = 1
    while chunks * programs < 264 and p.rows // chunks % 256 == 0:
        chunks *= 2
    return chunks


def _interpreted() -> bool:
    return bool((at := gpu.card()) and at.interpreted)


def _power(n: int) -> int:
    """The largest power of two up to `n`."""
    return 1 << (max(1, n).bit_length() - 1)
