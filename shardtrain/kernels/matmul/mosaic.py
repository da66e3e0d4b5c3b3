"""Tiled matrix product with Mosaic GPU for Hopper and Blackwell: tiles come and go by the tensor memory
accelerator, and are multiplied by `wgmma`, or by `tcgen05` into Blackwell's tensor memory.

How CUDA's words map: a block of the grid is one call of `_Product.program`, which reads its indices by
`axis_index`; `__shared__` arrays are the `SMEM` scratch and the buffers of `emit_pipeline`; a thread's
accumulators are one `ACC` array, which the compiler distributes over the 128 threads of the warpgroup;
`__syncthreads` is waiting for a barrier, for a copy or for the tensor cores.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.kernels import pallas

STAGES = 3
"""Tiles in shared memory: one is multiplied while the others are copied. So few that two programs fit on a
multiprocessor, one of which multiplies while the other writes its result."""


def tile_sizes(rows: int, columns: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """Rows, columns and depth of the tiles, to multiples of which the operands must be padded."""
    depth = 128 // jnp.dtype(dtype).itemsize  # a swizzled row is 128 bytes
    del rows
    return 128, (128 if columns % 128 == 0 else 64), depth


def swizzled(columns: int, dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The order of a tile in shared memory that both `wgmma` and the tensor memory accelerator read."""
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
        products: which parts are multiplied; several parts give more digits than the type has.
        transpose_a: whether `a` is given transposed; for types of 16 bits only, since tensor cores read
            float32 along the depth.
        out_type: of the result; sums are in float32.
        blackwell: whether sums are in Blackwell's tensor memory instead of in registers.
        interpreted: whether to run on the CPU and look for races.
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
    product = _Product((bm, bn, bk), batch, products, transpose_a, transpose_b=along, blackwell=blackwell)
    kernel = pallas.mosaic_kernel(
        product.program,
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


@dataclass(frozen=True)
class _Product:
    """What one block of the grid does; its methods run while the kernel is traced.

    Attributes:
        tile: rows, columns and depth of the tiles.
        batch: matrices of every part.
        products: which parts are multiplied, see `matmul`.
        transpose_a, transpose_b: whether an operand's tiles are stored transposed.
        blackwell: whether sums are in tensor memory.
    """

    tile: tuple[int, int, int]
    batch: int
    products: tuple[tuple[int, int], ...]
    transpose_a: bool
    transpose_b: bool
    blackwell: bool

    def program(self, a, b, out, staged, *tensor_memory):  # type: ignore[no-untyped-def]
        """One tile of the result: its row of tiles of `a` times its column of tiles of `b`."""
        bm, bn, _ = self.tile
        p, i, j = place = tuple(lax.axis_index(name) for name in ("batch", "row", "column"))
        narrow = staged.shape[1]
        if self.blackwell:
            acc = self._in_tensor_memory(place, a, b, *tensor_memory)

            def part(start):  # type: ignore[no-untyped-def]
                return plgpu.async_load_tmem(acc.at[:, pl.ds(start, narrow)])

        else:
            found = self._in_registers(place, a, b)

            def part(start):  # type: ignore[no-untyped-def]
                return found[:, start : start + narrow]

        for start in range(0, bn, narrow):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous part has been read
            staged[...] = part(start).astype(staged.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out.at[p, pl.ds(i * bm, bm), pl.ds(j * bn + start, narrow)])
        plgpu.wait_smem_to_gmem(0)

    def _in_tensor_memory(self, place, a, b, acc, done):  # type: ignore[no-untyped-def]
        """Sums by `tcgen05`."""

        def multiply(index, left, right):  # type: ignore[no-untyped-def]
            plgpu.tcgen05_mma(acc, *self._oriented(left, right), done, accumulate=index[0] > 0)
            plgpu.barrier_wait(done)

        self._pipeline(place, a, b, multiply, delay_release=0)
        return acc

    def _in_registers(self, place, a, b):  # type: ignore[no-untyped-def]
        """Sums by `wgmma`."""

        def summed(acc):  # type: ignore[no-untyped-def]
            def multiply(_, left, right):  # type: ignore[no-untyped-def]
                plgpu.wgmma(acc, *self._oriented(left, right))
                plgpu.wgmma_wait(1)  # the product before this one is done: its buffers are free

            self._pipeline(place, a, b, multiply, delay_release=1)
            return acc[...]

        return pl.run_scoped(summed, plgpu.ACC(self.tile[:2], jnp.float32))

    def _pipeline(self, place, a, b, multiply, *, delay_release):  # type: ignore[no-untyped-def]
        """Runs `multiply` on all pairs of tiles; their buffers are free `delay_release` steps later."""
        bm, bn, bk = self.tile
        steps = a.shape[1 if self.transpose_a else 2] // bk * len(self.products)
        smallest = min(bm if self.transpose_a else bk, bk if self.transpose_b else bn)
        order = swizzled(smallest, a.dtype)
        shape_a = (1, bk, bm) if self.transpose_a else (1, bm, bk)
        shape_b = (1, bn, bk) if self.transpose_b else (1, bk, bn)
        of_a, of_b = self._tiles_of(place, steps // len(self.products))
        plgpu.emit_pipeline(
            multiply,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(shape_a, of_a, transforms=order, delay_release=delay_release),
                plgpu.BlockSpec(shape_b, of_b, transforms=order, delay_release=delay_release),
            ],
            max_concurrent_steps=min(STAGES, max(2, steps)),
        )(a, b)

    def _tiles_of(self, place, steps):  # type: ignore[no-untyped-def]
        """Which tiles of `a` and of `b` are multiplied in a step: all steps of one product, then the next."""
        p, i, j = place

        def matrix(step, which):  # type: ignore[no-untyped-def]
            if len(self.products) == 1:
                return p
            term = lax.div(step, steps)
            part = sum(jnp.where(term == t, pair[which], 0) for t, pair in enumerate(self.products))
            return part * self.batch + p

        def of_a(step):  # type: ignore[no-untyped-def]
            k = lax.rem(step, steps)
            return (matrix(step, 0), k, i) if self.transpose_a else (matrix(step, 0), i, k)

        def of_b(step):  # type: ignore[no-untyped-def]
            k = lax.rem(step, steps)
            return (matrix(step, 1), j, k) if self.transpose_b else (matrix(step, 1), k, j)

        return of_a, of_b

    def _oriented(self, left, right):  # type: ignore[no-untyped-def]
        """A pair of tiles as the tensor cores multiply them."""
        left, right = left.at[0], right.at[0]
        return (
            compat.transposed(left) if self.transpose_a else left,
            compat.transposed(right) if self.transpose_b else right,
        )
