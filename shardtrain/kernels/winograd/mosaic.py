"""Winograd's transforms and its product fused with the output transform, in Mosaic GPU.

A program has a strip of tiles in shared memory, which the tensor memory accelerator copies from and to global
memory, and transforms one tile after the other: a vector of 128 channels for each of its points.
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.kernels import pallas
from shardtrain.kernels.matmul.mosaic import swizzled
from shardtrain.kernels.winograd.bilinear import apply_2d, weights
from shardtrain.kernels.winograd.cook_toom import Matrix

LANES = 128
"""Channels of a vector: the threads of a warpgroup."""

BUDGET = 112 * 1024
"""Bytes of shared memory of a program, so that two fit on a multiprocessor where tiles are not large."""

FUSED = {2: (64, 64), 4: (64, 64), 16: (64, 16)}
"""Rows and columns of the fused product's tiles by outputs of a tile: as many as registers hold."""


def together(tile_in: Sequence[int], tile_out: Sequence[int], step: int, dtype: DTypeLike) -> int:
    """Tiles of a strip that one program transforms: the most that fit, up to 8."""
    width = jnp.dtype(dtype).itemsize * LANES
    for count in (8, 4, 2):
        pixels = tile_in[0] * ((count - 1) * step + tile_in[1]) + math.prod(tile_out) * count
        if pixels * width <= BUDGET:
            return count
    return 1


def transform(
    x: Float[Array, "batch rows columns channels"],
    *,
    rows: tuple[Matrix, Matrix],
    steps: tuple[int, int],
    tiles: tuple[int, int],
    strips: int,
    count: int,
    interpreted: bool,
) -> Float[Array, "points strips tiles channels"]:
    """Tiles of an image, each multiplied by `rows` from both sides.

    Args:
        x: the image, padded to whole tiles, channels a multiple of `LANES`.
        rows: the matrices along rows and along columns.
        steps: pixels from a tile to the next.
        tiles: per column and per row, the latter a multiple of `count`.
        strips: rows of tiles to write; those beyond the image are zeros.
        count: tiles of a program.
        interpreted: whether to run on the CPU and look for races.
    """
    extents = len(rows[0][0]), len(rows[1][0])
    points = len(rows[0]) * len(rows[1])
    wide = (count - 1) * steps[1] + extents[1]
    kernel = pallas.mosaic_kernel(
        functools.partial(_transform, rows=rows, steps=steps, tiles=tiles, real=x.shape[0] * tiles[0]),
        name="winograd_transform",
        out_shape=(points, strips, tiles[1], x.shape[3]),
        out_type=x.dtype,
        grid=(x.shape[3] // LANES, tiles[1] // count, strips),  # the last has no limit of 65535
        grid_names=("channels", "tiles", "strip"),
        scratch_types=[
            plgpu.SMEM((extents[0], wide, LANES), x.dtype),
            plgpu.SMEM((points, count, LANES), x.dtype),
            plgpu.Barrier(),
        ],
        interpreted=interpreted,
    )
    return kernel(x)


def _transform(x, out, strip, staged, arrived, *, rows, steps, tiles, real):  # type: ignore[no-untyped-def]
    s, t, c = (lax.axis_index(name) for name in ("strip", "tiles", "channels"))
    image, line = jnp.minimum(lax.div(s, tiles[0]), x.shape[0] - 1), lax.rem(s, tiles[0])
    count, channels = staged.shape[1], pl.ds(c * LANES, LANES)
    window = pl.ds(line * steps[0], strip.shape[0]), pl.ds(t * (count * steps[1]), strip.shape[1])
    plgpu.copy_gmem_to_smem(x.at[image, *window, channels], strip, arrived)
    plgpu.barrier_wait(arrived)
    within = s < real

    def one(tile, _):  # type: ignore[no-untyped-def]
        pixels = [
            [strip[i, tile * steps[1] + j].astype(jnp.float32) for j in range(len(rows[1][0]))]
            for i in range(len(rows[0][0]))
        ]
        values = [value for line in apply_2d(rows, pixels) for value in line]
        for point, value in enumerate(values):
            staged[point, tile] = jnp.where(within, value, jnp.zeros_like(value)).astype(staged.dtype)

    lax.fori_loop(0, count, one, None)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, out.at[:, s, pl.ds(t * count, count), channels])
    plgpu.wait_smem_to_gmem(0)


def untransform(
    m: Float[Array, "points strips tiles channels"],
    bias: Float[Array, " channels"] | None,
    *,
    rows: tuple[Matrix, Matrix],
    tiles: tuple[int, int],
    batch: int,
    count: int,
    relu: bool,
    out_type: DTypeLike,
    interpreted: bool,
) -> Float[Array, "batch rows columns channels"]:
    """The image of products of tiles: they are multiplied by `rows` from both sides, plus bias and ReLU.

    Args:
        m: products, channels a multiple of `LANES`.
        bias: added to every pixel, in float32.
        rows: the matrices along rows and along columns.
        tiles: per column and per row of an image.
        batch: images.
        count: tiles of a program.
        relu: whether to apply ReLU, which keeps NaN.
        out_type: of the result.
        interpreted: whether to run on the CPU and look for races.
    """
    outputs = len(rows[0]), len(rows[1])
    kernel = pallas.mosaic_kernel(
        functools.partial(_untransform, rows=rows, tiles=tiles, relu=relu, biased=bias is not None),
        name="winograd_untransform",
        out_shape=(batch, tiles[0] * outputs[0], tiles[1] * outputs[1], m.shape[3]),
        out_type=jnp.dtype(out_type),
        grid=(m.shape[3] // LANES, tiles[1] // count, batch * tiles[0]),
        grid_names=("channels", "tiles", "strip"),
        scratch_types=[
            plgpu.SMEM((m.shape[0], count, LANES), m.dtype),
            plgpu.SMEM((outputs[0], count * outputs[1], LANES), out_type),
            plgpu.SMEM((LANES,), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if bias is not None else 1),
        ],
        interpreted=interpreted,
    )
    return kernel(m, *([] if bias is None else [bias]))


def _untransform(m, *refs, rows, tiles, relu, biased):  # type: ignore[no-untyped-def]
    bias, (out, products, staged, offset, arrived) = (refs[0], refs[1:]) if biased else (None, refs)
    s, t, c = (lax.axis_index(name) for name in ("strip", "tiles", "channels"))
    count, channels = products.shape[1], pl.ds(c * LANES, LANES)
    plgpu.copy_gmem_to_smem(m.at[:, s, pl.ds(t * count, count), channels], products, arrived)
    if bias is not None:
        plgpu.copy_gmem_to_smem(bias.at[channels], offset, arrived)
    plgpu.barrier_wait(arrived)
    across = len(rows[1][0])

    def one(tile, _):  # type: ignore[no-untyped-def]
        points = [
            [products[i * across + j, tile].astype(jnp.float32) for j in range(across)]
            for i in range(len(rows[0][0]))
        ]
        for i, line in enumerate(apply_2d(rows, points)):
            for j, value in enumerate(line):
                if bias is not None:
                    value = value + offset[...]
                if relu:
                    value = jnp.maximum(value, 0.0)
                staged[i, tile * len(rows[1]) + j] = value.astype(staged.dtype)

    lax.fori_loop(0, count, one, None)
    plgpu.commit_smem()
    place = (
        pl.ds(lax.rem(s, tiles[0]) * staged.shape[0], staged.shape[0]),
        pl.ds(t * staged.shape[1], staged.shape[1]),
    )
    plgpu.copy_smem_to_gmem(staged, out.at[lax.div(s, tiles[0]), *place, channels])
    plgpu.wait_smem_to_gmem(0)


def multiply_and_untransform(
    v: Float[Array, "points rows depth"],
    u: Float[Array, "points depth columns"],
    *,
    rows: tuple[Matrix, Matrix],
    out_type: DTypeLike,
    interpreted: bool,
) -> Float[Array, "outputs rows columns"]:
    """The products of all points, transformed back without being written to global memory.

    A program keeps `outputs` sums of a tile in registers and goes through the points in a loop.

    Args:
        v: transformed input, padded to the tiles of `FUSED` and 128 bytes of depth.
        u: transformed filters.
        rows: the matrices of the output transform.
        out_type: of the result.
        interpreted: whether to run on the CPU and look for races.
    """
    outputs = len(rows[0]) * len(rows[1])
    bm, bn = FUSED[outputs]
    bk = 128 // v.dtype.itemsize
    along = v.dtype == jnp.float32 and (compat.INTERPRETS_TRANSPOSED or not interpreted)
    kernel = pallas.mosaic_kernel(
        functools.partial(_multiply_and_untransform, bk=bk, transpose_u=along, cast=not interpreted),
        name="winograd_fused",
        out_shape=(outputs, v.shape[1], u.shape[2]),
        out_type=jnp.dtype(out_type),
        grid=(v.shape[1] // bm, u.shape[2] // bn),
        grid_names=("row", "column"),
        scratch_types=[plgpu.SMEM((bm, bn), out_type, transforms=swizzled(bn, out_type))],
        interpreted=interpreted,
    )
    return kernel(v, u.mT if along else u, jnp.asarray(weights(rows)))


def _multiply_and_untransform(v, u, shares, out, staged, *, bk, transpose_u, cast):  # type: ignore[no-untyped-def]
    i, j = (lax.axis_index(name) for name in ("row", "column"))
    (points, outputs), (bm, bn), steps = shares.shape, staged.shape, v.shape[2] // bk
    order = swizzled(bk if transpose_u else min(bk, bn), v.dtype)

    def product(point):  # type: ignore[no-untyped-def]
        def accumulate(acc):  # type: ignore[no-untyped-def]
            def multiply(_, left, right):  # type: ignore[no-untyped-def]
                right = compat.transposed(right.at[0]) if transpose_u else right.at[0]
                plgpu.wgmma(acc, left.at[0], right)
                plgpu.wgmma_wait(0)

            shape = (1, bn, bk) if transpose_u else (1, bk, bn)
            plgpu.emit_pipeline(
                multiply,
                grid=(steps,),
                in_specs=[
                    plgpu.BlockSpec((1, bm, bk), lambda k: (point, i, k), transforms=order),
                    plgpu.BlockSpec(
                        shape, lambda k: (point, j, k) if transpose_u else (point, k, j), transforms=order
                    ),
                ],
                max_concurrent_steps=min(3, max(2, steps)),
            )(v, u)
            return acc[...]

        return pl.run_scoped(accumulate, plgpu.ACC((bm, bn), jnp.float32))

    def add(point, sums):  # type: ignore[no-untyped-def]
        found = product(point)
        return tuple(total + found * shares[point, q] for q, total in enumerate(sums))

    zeros = jnp.zeros((bm, bn), jnp.float32)
    if cast:  # jax 0.10's interpreter has no layouts
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    for q, total in enumerate(lax.fori_loop(0, points, add, (zeros,) * outputs)):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = total.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[q, pl.ds(i * bm, bm), pl.ds(j * bn, bn)])
    plgpu.wait_smem_to_gmem(0)
