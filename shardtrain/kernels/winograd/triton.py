"""Winograd's transforms and its fused product in Triton, for GPUs that Mosaic GPU does not support."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.kernels import pallas
from shardtrain.kernels.winograd.bilinear import apply_2d, weights
from shardtrain.kernels.winograd.cook_toom import Matrix

LANES = 32
"""Channels of a program of the transforms."""

FUSED = {2: (64, 64), 4: (64, 64), 16: (64, 16)}
"""Rows and columns of the fused product's tiles by outputs of a tile: as many as registers hold."""


def together(tile_in: Sequence[int], tile_out: Sequence[int], step: int, dtype: DTypeLike) -> int:
    """Tiles of a strip that one program transforms: a power of two, as many as its registers hold."""
    del step, dtype
    return 8 if max(*tile_in, *tile_out) <= 6 else 4


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
    """As in `shardtrain.kernels.winograd.mosaic`."""
    points = len(rows[0]) * len(rows[1])
    return pallas.triton_kernel(
        functools.partial(
            _transform,
            rows=rows,
            steps=steps,
            tiles=tiles,
            count=count,
            extents=x.shape[1:3],
            images=x.shape[0],
        ),
        name="winograd_transform",
        out_shape=(points, strips, tiles[1], x.shape[3]),
        out_type=x.dtype,
        grid=(strips, tiles[1] // count, x.shape[3] // LANES),
        warps=4,
        stages=1,
        interpreted=interpreted,
    )(x.reshape(-1, x.shape[3]))


def _transform(x, out, *, rows, steps, tiles, count, extents, images):  # type: ignore[no-untyped-def]
    s, t, c = (pl.program_id(axis) for axis in range(3))
    image, line = jnp.minimum(lax.div(s, tiles[0]), images - 1), lax.rem(s, tiles[0])
    corner = (image * extents[0] + line * steps[0]) * extents[1] + t * (count * steps[1])
    first = corner + steps[1] * jnp.arange(count)
    channels = c * LANES + jnp.arange(LANES)
    pixels = [
        [
            plt.load(x.at[(first + i * extents[1] + j)[:, None], channels[None, :]]).astype(jnp.float32)
            for j in range(len(rows[1][0]))
        ]
        for i in range(len(rows[0][0]))
    ]
    values = [value for line in apply_2d(rows, pixels) for value in line]
    within = jnp.full((count, LANES), s < images * tiles[0])
    for point, value in enumerate(values):
        value = jnp.where(within, value, jnp.zeros_like(value)).astype(out.dtype)
        out[point, s, pl.ds(t * count, count), pl.ds(c * LANES, LANES)] = value


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
    """As in `shardtrain.kernels.winograd.mosaic`."""
    extents = tiles[0] * len(rows[0]), tiles[1] * len(rows[1])
    y = pallas.triton_kernel(
        functools.partial(
            _untransform, rows=rows, tiles=tiles, count=count, relu=relu, biased=bias is not None
        ),
        name="winograd_untransform",
        out_shape=(batch * extents[0] * extents[1], m.shape[3]),
        out_type=jnp.dtype(out_type),
        grid=(batch * tiles[0], tiles[1] // count, m.shape[3] // LANES),
        warps=4,
        stages=1,
        interpreted=interpreted,
    )(m, *([] if bias is None else [bias]))
    return y.reshape(batch, *extents, m.shape[3])


def _untransform(m, *refs, rows, tiles, count, relu, biased):  # type: ignore[no-untyped-def]
    bias, out = refs if biased else (None, refs[0])
    s, t, c = (pl.program_id(axis) for axis in range(3))
    across, lanes = len(rows[1][0]), pl.ds(c * LANES, LANES)
    points = [
        [m[i * across + j, s, pl.ds(t * count, count), lanes].astype(jnp.float32) for j in range(across)]
        for i in range(len(rows[0][0]))
    ]
    width = tiles[1] * len(rows[1])
    first = s * len(rows[0]) * width + (t * count + jnp.arange(count)) * len(rows[1])
    channels = c * LANES + jnp.arange(LANES)
    for i, line in enumerate(apply_2d(rows, points)):
        for j, value in enumerate(line):
            if bias is not None:
                value = value + bias[lanes][None, :]
            if relu:
                value = jnp.where(value < 0, jnp.zeros_like(value), value)
            plt.store(out.at[(first + i * width + j)[:, None], channels[None, :]], value.astype(out.dtype))


def multiply_and_untransform(
    v: Float[Array, "points rows depth"],
    u: Float[Array, "points depth columns"],
    *,
    rows: tuple[Matrix, Matrix],
    out_type: DTypeLike,
    interpreted: bool,
) -> Float[Array, "outputs rows columns"]:
    """As in `shardtrain.kernels.winograd.mosaic`."""
    outputs = len(rows[0]) * len(rows[1])
    bm, bn = FUSED[outputs]
    return pallas.triton_kernel(
        functools.partial(
            _multiply_and_untransform, bm=bm, bn=bn, bk=128 // v.dtype.itemsize, points=v.shape[0]
        ),
        name="winograd_fused",
        out_shape=(outputs, v.shape[1], u.shape[2]),
        out_type=jnp.dtype(out_type),
        grid=(v.shape[1] // bm, u.shape[2] // bn),
        warps=8 if outputs == 16 else 4,
        stages=3,
        interpreted=interpreted,
    )(v, u, jnp.asarray(weights(rows)))


def _multiply_and_untransform(v, u, shares, out, *, bm, bn, bk, points):  # type: ignore[no-untyped-def]
    tile = pl.ds(pl.program_id(0) * bm, bm), pl.ds(pl.program_id(1) * bn, bn)

    def add(point, sums):  # type: ignore[no-untyped-def]
        def multiply(step, acc):  # type: ignore[no-untyped-def]
            along = pl.ds(step * bk, bk)
            return acc + plt.dot(v[point, tile[0], along], u[point, along, tile[1]])

        found = lax.fori_loop(0, v.shape[2] // bk, multiply, jnp.zeros((bm, bn), jnp.float32))
        return tuple(total + found * shares[point, q] for q, total in enumerate(sums))

    zeros = tuple(jnp.zeros((bm, bn), jnp.float32) for _ in range(out.shape[0]))
    for q, total in enumerate(lax.fori_loop(0, points, add, zeros)):
        out[q, *tile] = total.astype(out.dtype)
