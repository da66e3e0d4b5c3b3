"""Tiled matrix product with Mosaic GPU for Hopper and Blackwell: tiles come and go by the tensor memory
accelerator, and are multiplied by `wgmma`, or by `tcgen05` into Blackwell's tensor memory.

How CUDA's words map: a block of the grid is one call of `_program`, which finds its place by `axis_index`;
`__shared__` arrays are the `SMEM` scratch and the buffers of `emit_pipeline`; a thread's accumulators are one
`ACC` array, dealt out to the 128 threads of the warpgroup by the compiler; `__syncthreads` is waiting for a
barrier, for a copy or for the tensor cores.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.kernels import pallas

STAGES = 3
"""Tiles in shared memory: one is multiplied, the others are on their way. So few that two programs fit on a
multiprocessor, one of which multiplies while the other writes its result."""


def tile_sizes(rows: int, columns: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """Rows, columns and depth of the tiles: what the operands must be padded to."""
    depth = 128 // jnp.dtype(dtype).itemsize  # a swizzled row is 128 bytes
    del rows
    return 128, (128 if columns % 128 == 0 else 64), depth


def swizzled(columns: int, dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The order in which `wgmma` and the accelerator agree to keep a tile in shared memory."""
    width = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * width * 8)
    return plgpu.TilingTransform((8, swizzle // width)), plgpu.SwizzleTransform(swizzle)


def matmul(
    a: Float[Array, "parts batch _ _"],
    b: Float[Array, "parts batch depth columns"],
    *,
    products: tuple[tuple[int, int], ...] = ((0, 0),),
    transpose_a: bool = False,
    out_type: DTypeLike,
    blackwell: bool,
    interpreted: bool,
) -> Float[Array, "batch _ columns"]:
    """Sum of `a[i] @ b[j]` over `products`, for operands padded to `tile_sizes`.

    Args:
        a: left operands `(parts, batch, rows, depth)`, or `(parts, batch, depth, rows)` with `transpose_a`.
        b: right operands.
        products: which parts are multiplied; several give products of more digits than the type has.
        transpose_a: types of 16 bits only, the tensor cores read float32 along the depth.
        out_type: of the result; sums are in float32.
        blackwell: whether sums are in tensor memory, as Blackwell's cards have them, not in registers.
        interpreted: on the CPU, looking for races.
    """
    # Tensor cores read float32 along the depth only. jax 0.10's interpreter knows no transposed tiles.
    along = a.dtype == jnp.float32 and (compat.INTERPRETS_TRANSPOSED or not interpreted)
    if transpose_a and interpreted and not compat.INTERPRETS_TRANSPOSED:
        a, transpose_a = a.mT, False
    if along:
        b = b.mT
    rows = a.shape[3 if transpose_a else 2]
    batch, columns = b.shape[1], b.shape[2 if along else 3]
    bm, bn, bk = tile_sizes(rows, columns, a.dtype)
    narrow = 128 // jnp.dtype(out_type).itemsize
    kernel = pallas.mosaic_kernel(
        functools.partial(
            _program,
            tile=(bm, bn, bk),
            batch=batch,
            products=products,
            transpose_a=transpose_a,
            transpose_b=along,
            blackwell=blackwell,
        ),
        name="matmul",
        out_shape=(batch, rows, columns),
        out_type=jnp.dtype(out_type),
        grid=(batch, rows // bm, columns // bn),
        grid_names=("batch", "row", "column"),
        scratch_types=[
            plgpu.SMEM((bm, narrow), out_type, transforms=swizzled(narrow, out_type)),
            *(
                [plgpu.TMEM((bm, bn), jnp.float32), plgpu.Barrier(orders_tensor_core=True)]
                if blackwell
                else []
            ),
        ],
        interpreted=interpreted,
    )
    # The accelerator takes arrays of five dimensions, of which swizzling needs two.
    return kernel(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]))


def _program(  # type: ignore[no-untyped-def]
    a, b, out, staged, *tensor_memory, tile, batch, products, transpose_a, transpose_b, blackwell
):
    """One tile of the result: its row of tiles of `a` times its column of tiles of `b`."""
    bm, bn, bk = tile
    p, i, j = (lax.axis_index(name) for name in ("batch", "row", "column"))
    steps = a.shape[1 if transpose_a else 2] // bk

    def matrix(step, which):  # type: ignore[no-untyped-def]
        """The part that is multiplied in this step: all steps of one product, then those of the next."""
        term = lax.div(step, steps)
        part = sum(jnp.where(term == t, pair[which], 0) for t, pair in enumerate(products))
        return part * batch + p if len(products) > 1 else p

    def of_a(step):  # type: ignore[no-untyped-def]
        k = lax.rem(step, steps)
        return (matrix(step, 0), k, i) if transpose_a else (matrix(step, 0), i, k)

    def of_b(step):  # type: ignore[no-untyped-def]
        k = lax.rem(step, steps)
        return (matrix(step, 1), j, k) if transpose_b else (matrix(step, 1), k, j)

    def tiles(left, right):  # type: ignore[no-untyped-def]
        left, right = left.at[0], right.at[0]
        return (
            compat.transposed(left) if transpose_a else left,
            compat.transposed(right) if transpose_b else right,
        )

    def pipeline(multiply, behind):  # type: ignore[no-untyped-def]
        """Runs `multiply` on all tiles; its buffers are free `behind` steps later."""
        order = swizzled(min(bm if transpose_a else bk, bk if transpose_b else bn), a.dtype)
        shape_a = (1, bk, bm) if transpose_a else (1, bm, bk)
        shape_b = (1, bn, bk) if transpose_b else (1, bk, bn)
        plgpu.emit_pipeline(
            multiply,
            grid=(steps * len(products),),
            in_specs=[
                plgpu.BlockSpec(shape_a, of_a, transforms=order, delay_release=behind),
                plgpu.BlockSpec(shape_b, of_b, transforms=order, delay_release=behind),
            ],
            max_concurrent_steps=min(STAGES, max(2, steps * len(products))),
        )(a, b)

    def in_registers(acc):  # type: ignore[no-untyped-def]
        def multiply(_, left, right):  # type: ignore[no-untyped-def]
            plgpu.wgmma(acc, *tiles(left, right))
            plgpu.wgmma_wait(1)  # the product before this one is done: its buffers are free

        pipeline(multiply, 1)
        return acc[...]

    if blackwell:
        acc, done = tensor_memory

        def multiply(index, left, right):  # type: ignore[no-untyped-def]
            plgpu.tcgen05_mma(acc, *tiles(left, right), done, accumulate=index[0] > 0)
            plgpu.barrier_wait(done)

        pipeline(multiply, 0)
    else:
        found = pl.run_scoped(in_registers, plgpu.ACC((bm, bn), jnp.float32))
    narrow = staged.shape[1]
    for start in range(0, bn, narrow):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the part before has left
        if blackwell:
            part = plgpu.async_load_tmem(acc.at[:, pl.ds(start, narrow)])
        else:
            part = found[:, start : start + narrow]
        staged[...] = part.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[p, pl.ds(i * bm, bm), pl.ds(j * bn + start, narrow)])
    plgpu.wait_smem_to_gmem(0)
