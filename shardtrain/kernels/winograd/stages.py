"""Winograd's convolution by the kernels of a GPU: what is the same for all that they are written in.

Transform the input's tiles, multiply them by the transformed filters for every point of a tile, transform
back. Filters, small as they are, are left to XLA, which also fills the borders and crops them.
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
from shardtrain.kernels.tiles import filled, transposed, whole
from shardtrain.kernels.winograd import xla
from shardtrain.kernels.winograd.cook_toom import Algorithm

LARGEST_TILE = 8
"""Of either dimension: a larger one does not fit in the registers."""


@dataclass(frozen=True)
class WinogradSettings:
    """What is static of a convolution by kernels.

    Attributes:
        found: F(m, r) along rows and along columns.
        implementation: "mosaic" or "triton".
        precision: of the products, as in `shardtrain.kernels.matmul`.
        out_type: of the result.
        relu: whether the result is rectified.
        fused: whether the product and the output transform are one kernel; None for what moves fewer bytes.
    """

    found: tuple[Algorithm, Algorithm]
    implementation: str
    precision: str
    out_type: Any
    relu: bool = False
    fused: bool | None = None

    @property
    def room(self) -> Any:
        # Imported when it is needed, as in matmul's.
        return importlib.import_module(f"shardtrain.kernels.winograd.{self.implementation}")


@dataclass(frozen=True)
class Plan:
    """The sizes of everything that the kernels see.

    Attributes:
        batch: images, filled up so that they can lie side by side.
        side: images side by side in the channels, so that narrow layers fill the vectors too.
        extents: rows and columns of the output.
        tiles: per column and row of an image.
        strips: rows of tiles of all images, filled up so that the products have whole tiles.
        count: tiles of a program.
        depth, columns: channels in and out, filled up.
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
        """Of the products: tiles of all images."""
        return self.strips * self.tiles[1] * self.side


def plan(static: WinogradSettings, shape: tuple[int, ...], columns: int, dtype: DTypeLike) -> Plan:
    """Sizes for an input of `(batch, rows, columns, channels)` and `columns` filters."""
    batch, *spatial, channels = shape
    depth = whole(channels, 128 // jnp.dtype(dtype).itemsize)  # that of the product's tiles
    wide = whole(columns, 64)
    lanes = static.room.LANES
    side = max(lanes // math.gcd(lanes, depth), lanes // math.gcd(lanes, wide))
    extents = tuple(n - f.taps + 1 for n, f in zip(spatial, static.found, strict=True))
    tile = [f.tile for f in static.found]
    step = static.found[1].outputs
    # Float32 products are the widest that a program holds.
    count = min(
        static.room.together(tile, tile, step, dtype),
        static.room.together((1, 1), tile, 1, jnp.float32),
        _power(-(-extents[1] // step)),
    )
    down, across = (-(-n // f.outputs) for n, f in zip(extents, static.found, strict=True))
    across = whole(across, count)
    images = whole(batch, side) // side
    strips = whole(images * down, 128 // math.gcd(128, across * side))
    return Plan(
        images * side,
        side,
        (extents[0], extents[1]),
        (down, across),
        strips,
        count,
        depth,
        wide,
    )


def _folded(static: WinogradSettings) -> Callable[..., Array]:
    """`_convolve` that under `vmap` of the input alone takes one larger batch where it can, and otherwise one
    example after the other: kernels have no dimension to spare."""
    folded = jax.custom_batching.custom_vmap(functools.partial(_convolve, static))

    @folded.def_vmap
    def rule(size: int, mapped: Any, x: Array, kernel: Array, bias: Array | None) -> tuple[Array, bool]:
        batch = size * x.shape[1], *x.shape[2:]
        if not any(jax.tree.leaves(mapped[1:])) and not refused(static, batch, kernel.shape[-1], x.dtype):
            y = folded(x.reshape(-1, *x.shape[2:]), kernel, bias)
            return y.reshape(size, -1, *y.shape[1:]), True
        return _in_turn(folded, size, mapped, x, kernel, bias), True

    return folded


def _in_turn(run: Callable[..., Array], size: int, mapped: Any, *operands: Array | None) -> Array:
    return lax.map(lambda one: run(*one), gpu.all_mapped(size, mapped, operands))


def convolve(
    static: WinogradSettings,
    x: Float[Array, "batch rows columns channels_in"],
    kernel: Float[Array, "taps_down taps_across channels_in channels_out"],
    bias: Float[Array, " channels_out"] | None,
) -> Float[Array, "batch rows_out columns_out channels_out"]:
    """Convolution with stride 1 and no padding, plus the bias, rectified if asked."""
    return _folded(static)(x, kernel, bias)


def _convolve(
    static: WinogradSettings,
    x: Float[Array, "batch rows columns channels_in"],
    kernel: Float[Array, "taps_down taps_across channels_in channels_out"],
    bias: Float[Array, " channels_out"] | None,
) -> Float[Array, "batch rows_out columns_out channels_out"]:
    p = plan(static, x.shape, kernel.shape[-1], x.dtype)
    u = _filters(static, kernel, p)
    v = _tiles(static, x, p)
    if _fused(static, p, x.dtype):
        y = static.room.multiply_and_untransform(
            v, u, rows=_rows(static, "output"), out_type=static.out_type, interpreted=_interpreted()
        )
        return _finished(static, _from_points(static, y, p), x.shape[0], bias, kernel.shape[-1], p)
    m = matmul(v, u, precision=static.precision, out_type=jnp.float32, implementation=static.implementation)
    m = m.reshape(m.shape[0], p.strips, p.tiles[1], p.side * p.columns)
    if bias is not None:
        bias = jnp.tile(filled(bias.astype(jnp.float32), (p.columns,)), p.side)
    y = static.room.untransform(
        m,
        bias,
        rows=_rows(static, "output"),
        tiles=p.tiles,
        batch=p.batch // p.side,
        count=p.count,
        relu=static.relu,
        out_type=static.out_type,
        interpreted=_interpreted(),
    )
    return _cropped(_apart(y, p.side), x.shape[0], p.extents, kernel.shape[-1])


def filter_gradient(
    static: WinogradSettings,
    x: Float[Array, "batch rows columns channels_in"],
    dy: Float[Array, "batch rows_out columns_out channels_out"],
) -> Float[Array, "taps_down taps_across channels_in channels_out"]:
    """Gradient of the filters: the adjoint of the same algorithm, `G^T [V^T (A dy A^T)] G`, in float32.

    The transposed product is over all tiles; it is cut in chunks, which are summed at the end, so that there
    are programs for all of the card.
    """
    run = jax.custom_batching.custom_vmap(functools.partial(_filter_gradient, static))

    @run.def_vmap
    def rule(size: int, mapped: Any, x: Array, dy: Array) -> tuple[Array, bool]:
        return _in_turn(run, size, mapped, x, dy), True

    return run(x, dy)


def _filter_gradient(static: WinogradSettings, x: Array, dy: Array) -> Array:
    p = plan(static, x.shape, dy.shape[-1], x.dtype)
    v = _tiles(static, x, p)
    back = tuple(tuple(zip(*f.output, strict=True)) for f in static.found)
    m, n = (f.outputs for f in static.found)
    filled = _side_by_side(dy, p, (p.tiles[0] * m, p.tiles[1] * n), p.columns)
    d = static.room.transform(
        filled,
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
        precision=static.precision,
        out_type=jnp.float32,
        implementation=static.implementation,
    )
    du = du.reshape(-1, chunks, p.depth, p.columns).sum(1)
    du = du.reshape(*(f.tile for f in static.found), p.depth, p.columns)
    for dim, f in enumerate(static.found):
        du = xla.apply(tuple(zip(*f.filter, strict=True)), du, dim)
    return du[:, :, : x.shape[-1], : dy.shape[-1]]


def input_gradient(
    static: WinogradSettings,
    kernel: Float[Array, "taps_down taps_across channels_in channels_out"],
    dy: Float[Array, "batch rows_out columns_out channels_out"],
) -> Float[Array, "batch rows columns channels_in"]:
    """Gradient of the input: the convolution of `dy` with the filters turned round."""
    margins = [(0, 0, 0), *((f.taps - 1, f.taps - 1, 0) for f in static.found), (0, 0, 0)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), margins)
    return convolve(replace(static, relu=False, out_type=dy.dtype), dy, transposed(kernel, 1), None)


def bytes_moved(static: WinogradSettings, p: Plan, dtype: DTypeLike, *, fused: bool) -> int:
    """Bytes to and from memory of the product and the output transform, for choosing between the two ways.

    Operands are counted as often as a column or a row of tiles of the product reads them.
    """
    width, out = jnp.dtype(dtype).itemsize, jnp.dtype(static.out_type).itemsize
    points = math.prod(f.tile for f in static.found)
    outputs = math.prod(f.outputs for f in static.found)
    bm, bn = static.room.FUSED[outputs] if fused else (128, 128 if p.columns % 128 == 0 else 64)
    operands = points * p.rows * p.depth * width * -(-p.columns // bn)
    operands += points * p.depth * p.columns * width * -(-p.rows // bm)
    result = outputs * p.rows * p.columns * out
    if fused:
        return operands + 3 * result  # written by points, read and written as an image
    return operands + 2 * points * p.rows * p.columns * 4 + result


def refused(static: WinogradSettings, shape: tuple[int, ...], columns: int, dtype: DTypeLike) -> str | None:
    """Why kernels do not compute this, for an input of `shape` and `columns` filters; None if they do."""
    name = f"implementation={static.implementation!r}"
    tile = [f.tile for f in static.found]
    if max(tile) > LARGEST_TILE:
        return f"{name} holds tiles of {LARGEST_TILE} pixels, not {max(tile)}; use 'xla'"
    p = plan(static, shape, columns, dtype)
    if min(*shape, *p.extents, columns) < 1:
        return f"{name} has nothing to compute for an input of {shape}; use 'xla'"
    back = [n + 2 * (f.taps - 1) for n, f in zip(p.extents, static.found, strict=True)]
    dual = plan(static, (shape[0], *back, columns), shape[-1], dtype)  # the input's gradient
    rows = max(p.rows, dual.rows, p.depth)
    if (numbers := math.prod(tile) * rows * max(p.depth, p.columns)) >= 2**31:  # indices are of 32 bits
        return f"{name} takes transformed images of 2^31 numbers, not {numbers}; cut the batch, or use 'xla'"
    if static.fused:
        return _fusible(static, dtype)
    return None


def _fusible(static: WinogradSettings, dtype: DTypeLike) -> str | None:
    """Why the product and the output transform are not one kernel; None if they can be."""
    name, tile = f"implementation={static.implementation!r}", [f.tile for f in static.found]
    if math.prod(f.outputs for f in static.found) not in static.room.FUSED:
        return f"{name} has no fused product for {tile[0]}x{tile[1]} tiles; leave fused out"
    if static.implementation == "mosaic" and (at := gpu.card()) is not None and at.blackwell:
        return f"{name} has its fused product for Hopper only; leave fused out"
    if static.precision != "default" and jnp.dtype(dtype) == jnp.float32:
        return f"{name} fuses products of the default precision only; leave fused out"
    return None


def _fused(static: WinogradSettings, p: Plan, dtype: DTypeLike) -> bool:
    if static.fused is not None:
        return static.fused
    return _fusible(static, dtype) is None and bytes_moved(static, p, dtype, fused=True) < bytes_moved(
        static, p, dtype, fused=False
    )


def _filters(static: WinogradSettings, kernel: Array, p: Plan) -> Array:
    u = xla.transform_filters(kernel, static.found)
    u = u.reshape(-1, *u.shape[2:])
    return filled(u, (u.shape[0], p.depth, p.columns))


def _tiles(static: WinogradSettings, x: Array, p: Plan) -> Array:
    """Transformed tiles of the input, `(points, rows of the products, depth)`."""
    down, across = static.found
    rows = p.tiles[0] * down.outputs + down.taps - 1, p.tiles[1] * across.outputs + across.taps - 1
    v = static.room.transform(
        _side_by_side(x, p, rows, p.depth),
        rows=_rows(static, "input"),
        steps=(down.outputs, across.outputs),
        tiles=p.tiles,
        strips=p.strips,
        count=p.count,
        interpreted=_interpreted(),
    )
    return v.reshape(v.shape[0], p.rows, p.depth)


def _side_by_side(x: Array, p: Plan, extents: tuple[int, int], channels: int) -> Array:
    """Filled with zeros to whole tiles, and neighbouring images side by side in the channels."""
    wanted = p.batch, *extents, channels
    x = filled(x, wanted)
    if p.side == 1:
        return x
    x = jnp.moveaxis(x.reshape(-1, p.side, *wanted[1:]), 1, 3)
    return x.reshape(*x.shape[:3], -1)


def _apart(y: Array, side: int) -> Array:
    """`_side_by_side` undone."""
    if side == 1:
        return y
    y = jnp.moveaxis(y.reshape(*y.shape[:3], side, -1), 3, 1)
    return y.reshape(-1, *y.shape[2:])


def _from_points(static: WinogradSettings, y: Array, p: Plan) -> Array:
    """`(outputs, rows, columns)` of the fused product as images side by side."""
    m, n = (f.outputs for f in static.found)
    real = p.batch // p.side * p.tiles[0]
    y = y.reshape(m, n, p.strips, p.tiles[1], p.side, p.columns)[:, :, :real]
    y = y.reshape(m, n, -1, *p.tiles, p.side, p.columns)  # (m, n, images, down, across, side, columns)
    y = y.transpose(2, 5, 3, 0, 4, 1, 6)
    return y.reshape(p.batch, p.tiles[0] * m, p.tiles[1] * n, p.columns)


def _finished(
    static: WinogradSettings, y: Array, batch: int, bias: Array | None, columns: int, p: Plan
) -> Array:
    """Cropped, with bias and rectifier, which XLA puts into the copy that reorders the fused product."""
    y = _cropped(y, batch, p.extents, columns)
    if bias is not None:
        y = (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)
    return jax.nn.relu(y) if static.relu else y


def _cropped(y: Array, batch: int, extents: tuple[int, int], columns: int) -> Array:
    return y[:batch, : extents[0], : extents[1], :columns]


def _rows(static: WinogradSettings, which: str) -> tuple[Any, Any]:
    return getattr(static.found[0], which), getattr(static.found[1], which)


def _chunks(p: Plan, points: int) -> int:
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
