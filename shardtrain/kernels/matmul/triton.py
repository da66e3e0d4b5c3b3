"""Tiled matrix product in Triton, for GPUs that Mosaic GPU does not support.

How CUDA's words map: a block of the grid is one program, whose tiles are given by `BlockSpec`s instead of
index arithmetic; Triton itself copies tiles to shared memory and synchronizes; threads are not visible.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.kernels import pallas

WARPS, STAGES = 8, 3


def tile_sizes(rows: int, columns: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """Rows, columns and depth of the tiles, to multiples of which the operands must be padded."""
    depth = 128 // jnp.dtype(dtype).itemsize
    return (128 if rows > 64 else 64), (128 if columns % 128 == 0 else 64), depth


def matmul(
    a: Float[Array, "batch _ _"],
    b: Float[Array, "batch depth columns"],
    *,
    transpose_a: bool = False,
    precision: lax.DotAlgorithmPreset | lax.Precision | None = None,
    out_type: DTypeLike,
    interpreted: bool,
) -> Float[Array, "batch _ columns"]:
    """`a @ b`, for operands padded to `tile_sizes`.

    Args:
        a: left operand `(batch, rows, depth)`, or `(batch, depth, rows)` with `transpose_a`.
        b: right operand.
        transpose_a: whether `a` is given transposed.
        precision: of float32 products: TF32 by default, three TF32 products, or full float32.
        out_type: of the result; sums are in float32.
        interpreted: whether to run on the CPU.
    """
    batch, depth, columns = b.shape
    rows = a.shape[2 if transpose_a else 1]
    bm, bn, bk = tile_sizes(rows, columns, a.dtype)
    lefts = pl.BlockSpec(
        (None, depth, bm) if transpose_a else (None, bm, depth),
        (lambda p, i, j: (p, 0, i)) if transpose_a else (lambda p, i, j: (p, i, 0)),
    )
    return pallas.triton_kernel(
        functools.partial(_program, bk=bk, transpose_a=transpose_a, precision=precision),
        name="matmul",
        out_shape=(batch, rows, columns),
        out_type=jnp.dtype(out_type),
        grid=(batch, rows // bm, columns // bn),
        in_specs=[lefts, pl.BlockSpec((None, depth, bn), lambda p, i, j: (p, 0, j))],
        out_specs=pl.BlockSpec((None, bm, bn), lambda p, i, j: (p, i, j)),
        warps=WARPS,
        stages=STAGES,
        interpreted=interpreted,
    )(a, b)


def _program(a, b, out, *, bk, transpose_a, precision):  # type: ignore[no-untyped-def]
    """One tile of the result."""

    def multiply(step, acc):  # type: ignore[no-untyped-def]
        along = pl.ds(step * bk, bk)
        left = a[along, :].T if transpose_a else a[:, along]
        return acc + plt.dot(left, b[along, :], precision=precision)

    acc = lax.fori_loop(0, b.shape[0] // bk, multiply, jnp.zeros(out.shape, jnp.float32))
    out[...] = acc.astype(out.dtype)
