"""The GPU kernels that `tools/gpu_evidence.py` compiles: all of one layer's convolution and its gradients."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cards import TargetCard

LAYER = 32, 56, 56, 256
"""Batch, rows, columns and channels, in and out, of the layer whose kernels are compiled."""


@dataclass(frozen=True)
class Case:
    """A kernel to compile.

    Attributes:
        kernel, config: its name and what distinguishes it.
        call, operands: a function and the shapes and types of its arguments.
        bytes, least: that it moves, and that it would without padding.
        flops: of products.
        dtype: of its operands.
        loads: bytes, those counted again that are read again.
    """

    kernel: str
    config: str
    call: Callable[..., Any]
    operands: tuple[Any, ...]
    bytes: int
    least: int
    flops: int
    dtype: str
    loads: int = 0


def winograd_cases(
    implementation: str, dtype: Any, outputs: int, taps: int, precision: str
) -> Iterator[Case]:
    """Every kernel of one convolution and its gradients."""
    import jax
    import jax.numpy as jnp

    from shardtrain.kernels.matmul import matmul
    from shardtrain.kernels.winograd import stages
    from shardtrain.kernels.winograd.cook_toom import algorithm

    name = jnp.dtype(dtype).name
    found = algorithm(outputs, taps)
    static = stages.WinogradSettings((found, found), implementation, precision, jnp.dtype(dtype), relu=True)
    batch, rows, columns, channels = LAYER
    shape = batch, rows + taps - 1, columns + taps - 1, channels
    p = stages.plan(static, shape, channels, dtype)
    points, size = found.tile**2, jnp.dtype(dtype).itemsize
    width = p.side * p.depth
    images = p.batch // p.side
    config = f"{implementation} {name} F({outputs},{taps})"

    def of(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def extent(tiles: int, step: int, reach: int) -> int:
        return (tiles - 1) * step + reach

    image = images, *(extent(t, outputs, found.tile) for t in p.tiles), width
    tiles = points, p.strips, p.tiles[1], width
    real = points * batch * math.prod(-(-n // outputs) for n in (rows, columns)) * channels
    strip = {"strips": p.strips, "count": p.count, "tiles": p.tiles, "interpreted": False}
    back = tuple(zip(*found.output, strict=True))
    dense = images, *(t * outputs for t in p.tiles), width
    if precision == "default":
        yield Case(
            "transform of x",
            config,
            lambda x: static.room.transform(x, rows=(found.input,) * 2, steps=(outputs,) * 2, **strip),
            (of(*image),),
            size * (math.prod(image) + math.prod(tiles)),
            size * (math.prod(shape) + real),
            0,
            name,
        )
        yield Case(
            "transform of dy",
            config,
            lambda dy: static.room.transform(dy, rows=(back,) * 2, steps=(outputs,) * 2, **strip),
            (of(*dense),),
            size * (math.prod(dense) + math.prod(tiles)),
            size * (math.prod(LAYER) + real),
            0,
            name,
        )
        yield Case(
            "untransform, bias, relu",
            config,
            lambda m, bias: static.room.untransform(
                m,
                bias,
                rows=(found.output,) * 2,
                tiles=p.tiles,
                batch=images,
                count=p.count,
                relu=True,
                out_type=dtype,
                interpreted=False,
            ),
            (of(*tiles, dtype=jnp.float32), of(width, dtype=jnp.float32)),
            4 * math.prod(tiles) + size * math.prod(dense),
            4 * real + size * math.prod(LAYER),
            0,
            name,
        )
    times = 3 if precision == "tf32x3" else 1
    v, u = (points, p.rows, p.depth), (points, p.depth, p.columns)
    flops = 2 * points * p.rows * p.depth * p.columns * times
    product = {"precision": precision, "implementation": implementation, "out_type": jnp.float32}
    label = config if precision == "default" else f"{config} {precision}"

    def read(bm: int, bn: int) -> int:
        """Bytes of both operands, each as often as a tile of the result needs it."""
        return size * (math.prod(v) * -(-p.columns // bn) + math.prod(u) * -(-p.rows // bm))

    once = size * (math.prod(v) + math.prod(u))
    moved = once + 4 * points * p.rows * p.columns
    least = size * (real + math.prod(u)) + 4 * real
    yield Case(
        "product",
        label,
        lambda v, u: matmul(v, u, **product),
        (of(*v), of(*u)),
        moved,
        least,
        flops,
        name,
        times * read(128, 128),
    )
    yield Case(
        "product for wgrad",
        label,
        lambda v, d: matmul(v, d, transpose_a=True, **product),
        (of(*v), of(*v)),
        2 * size * math.prod(v) + 4 * math.prod(u),
        2 * size * real + 4 * math.prod(u),
        flops,
        name,
        times * 2 * size * math.prod(v) * -(-p.columns // 128),
    )
    if outputs**2 in static.room.FUSED and precision == "default":
        result = outputs**2, p.rows, p.columns
        yield Case(
            "product and untransform",
            config,
            lambda v, u: static.room.multiply_and_untransform(
                v, u, rows=(found.output,) * 2, out_type=dtype, interpreted=False
            ),
            (of(*v), of(*u)),
            once + 3 * size * math.prod(result),  # its result is put in order by a copy
            size * (real + math.prod(u) + math.prod(LAYER)),
            flops,
            name,
            read(*static.room.FUSED[outputs**2]),
        )


def cases(card: TargetCard, quick: bool) -> Iterator[Case]:
    """All kernels for a card, or one of each kind."""
    import jax.numpy as jnp

    def writes(implementation: str, dtype: Any) -> bool:
        if implementation == "triton":
            return not quick or card.capability == 8 or (card.capability == 10 and dtype == jnp.float32)
        return card.capability == 9 or (card.capability == 10 and dtype != jnp.float32)

    few = [(jnp.bfloat16, 2, 3), (jnp.float32, 4, 3)]
    many = [
        (dtype, *tile)
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        for tile in ((2, 3), (4, 3), (6, 3), (4, 5))
    ]
    for implementation in ("mosaic", "triton"):
        for dtype, outputs, taps in few if quick else many:
            if not writes(implementation, dtype):
                continue
            for precision in ("default", "tf32x3") if (dtype, outputs) == (jnp.float32, 4) else ("default",):
                for case in winograd_cases(implementation, dtype, outputs, taps, precision):
                    fused = case.kernel == "product and untransform"
                    if not (fused and implementation == "mosaic" and card.capability == 10):
                        yield case
