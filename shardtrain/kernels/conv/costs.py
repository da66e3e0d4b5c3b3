"""A cost model of the algorithms: a roofline of their operations and bytes and a device's rates."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from shardtrain import compat
from shardtrain.kernels.conv import fft, im2col
from shardtrain.kernels.conv.task import PASSES, ConvTask
from shardtrain.kernels.winograd import tile_outputs
from shardtrain.kernels.winograd.cook_toom import Algorithm
from shardtrain.kernels.winograd.xla import algorithms

Rate = tuple[float, float]
"""Operations and bytes per second; a multiplication and its addition are two operations."""


@dataclass(frozen=True)
class Rates:
    """The speed of a device.

    Attributes:
        by_pass: pass -> algorithm -> `Rate`.
        launch: seconds that every program takes at least.
        workspace: bytes beyond which `auto` refuses an algorithm.
        margins: pass -> algorithm -> how many times faster than direct convolution the model must predict it
            to be.
    """

    by_pass: Mapping[str, Mapping[str, Rate]]
    launch: float
    workspace: int
    margins: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ProgramCost:
    """The cost of one program on the device, which takes the longer of the times of operations and bytes.

    Attributes:
        operations: of the program.
        bytes: that it reads and writes.
    """

    operations: float
    bytes: int


# NVIDIA's data sheets, dense (without sparsity), in teraflop/s and terabyte/s: A100 SXM (2021), H100 SXM
# (2023), H200 SXM (2024), a GPU of HGX B200 (2025): FP32 outside the tensor cores, TF32, 16 bits; memory.
SHEETS = {
    r"NVIDIA A100-SXM4-80GB": (19.5, 156, 312, 2.04),
    r"NVIDIA A100-SXM4-40GB": (19.5, 156, 312, 1.56),
    r"NVIDIA H100 80GB HBM3": (67, 495, 989, 3.35),
    r"NVIDIA H200( .*)?": (67, 495, 989, 4.8),
    r"NVIDIA B200( .*)?": (75, 1125, 2250, 7.7),
}

REACHED = 0.85, 0.6, 0.65, 0.85
"""Shares of these figures that good kernels reach, in the same order."""

DOUBTS = {"direct": 1.0, "im2col": 1.3, "winograd": 1.3, "fft": 2.0}
"""Margins where nothing was measured; the programs of `fft` are furthest from what libraries tune."""


def sheet_rates(kind: str, dtype: str, precision: lax.PrecisionLike) -> Rates | None:
    """Rates of a GPU by its data sheet; None for devices that are not in `SHEETS`, and for other types."""
    figures = next((v for pattern, v in SHEETS.items() if re.fullmatch(pattern, kind)), None)
    if figures is None or dtype not in ("float32", "float16", "bfloat16"):
        return None
    fp32, tf32, half, memory = (1e12 * v * share for v, share in zip(figures, REACHED, strict=True))
    products = half if dtype != "float32" else tf32 if few_digits(kind, dtype, precision) else fp32
    rate = {"direct": (products, memory), "im2col": (products, memory), "winograd": (products, memory)}
    rate["fft"] = fp32, memory  # its products are of complex numbers in float32
    return Rates(
        dict.fromkeys(PASSES, rate), launch=4e-6, workspace=2 << 30, margins=dict.fromkeys(PASSES, DOUBTS)
    )


def few_digits(kind: str, dtype: str, precision: lax.PrecisionLike) -> bool:
    """Whether products take factors of 10 bits or fewer: float16, bfloat16, and TF32 on tensor cores."""
    if jnp.finfo(dtype).nmant < 20:
        return True
    named = precision or compat.default_precision()
    given = set(map(str, named if isinstance(named, tuple) else (named,)))
    exact = given <= {"highest", "float32", "HIGHEST", str(lax.Precision.HIGHEST)}
    return dtype == "float32" and kind.startswith("NVIDIA") and not exact


def tiles(task: ConvTask) -> tuple[Algorithm, ...]:
    """Winograd's F(m, r) in every dimension."""
    window = task.problem.window
    return algorithms(window, tile_outputs(window, task.dtype))


def stages(task: ConvTask, algorithm: str) -> list[ProgramCost]:
    """The programs that an algorithm runs, one after the other."""
    size = jnp.dtype(task.dtype).itemsize
    p = task.problem
    x = task.batch * math.prod(task.extents) * task.channels * size
    y = task.batch * math.prod(task.outputs) * task.filters * size
    k = math.prod(p.window) * task.channels // p.groups * task.filters * size
    sums = 2.0 * multiplications(task, algorithm)
    if algorithm == "direct":
        return [ProgramCost(sums, x + k + y)]
    if algorithm == "im2col":
        rows = workspace(task, algorithm)
        return [ProgramCost(0.0, x + rows), ProgramCost(sums, rows + k + y)]
    v, u, m = _transformed(task, algorithm)
    transforms = _waves(task) if algorithm == "fft" else (0.0, 0.0, 0.0)  # Winograd's are few sums
    moved = x + v, k + u, m + y
    given, filters, back = (ProgramCost(o, b) for o, b in zip(transforms, moved, strict=True))
    return [given, filters, ProgramCost(sums, v + u + m), back]


def _waves(task: ConvTask) -> tuple[float, float, float]:
    """Operations of the Fourier transforms of inputs, filters and outputs."""
    sizes, count = _cut(task)
    spans = task.problem.spans
    steps = [t - s + 1 for t, s in zip(sizes, spans, strict=True)]
    pairs = task.channels // task.problem.groups * task.filters
    return (
        count * task.channels * fft.operations(sizes, sizes),
        pairs * fft.operations(sizes, spans),
        count * task.filters * fft.operations(sizes, steps),
    )


def _transformed(task: ConvTask, algorithm: str) -> tuple[int, int, int]:
    """Bytes of transformed inputs, filters and outputs."""
    size = jnp.dtype(task.dtype).itemsize
    per_group = task.channels // task.problem.groups
    if algorithm == "fft":
        points, count = _spectrum(task)
        size = 2 * max(4, size)  # complex
    else:
        points, count = _points(task)
    return (
        points * count * task.channels * size,
        points * per_group * task.filters * size,
        points * count * task.filters * max(4, size),
    )


def _points(task: ConvTask) -> tuple[int, int]:
    """Points of a tile of Winograd's, and tiles; the phases of a dilation are images of their own."""
    found = tiles(task)
    rows = [-(-n // d) for n, d in zip(task.outputs, task.problem.dilation, strict=True)]
    count = math.prod(-(-n // f.outputs) for n, f in zip(rows, found, strict=True))
    return math.prod(f.tile for f in found), task.batch * count * math.prod(task.problem.dilation)


def _spectrum(task: ConvTask) -> tuple[int, int]:
    """Frequencies of a tile, and tiles."""
    sizes, count = _cut(task)
    return fft.frequencies(sizes), count


def _cut(task: ConvTask) -> tuple[tuple[int, ...], int]:
    """Rows of a tile of Fourier's, and tiles."""
    spans, groups = task.problem.spans, task.problem.groups
    sizes = fft.tile_sizes(task.outputs, spans, task.batch, task.channels // groups, task.filters, groups)
    count = [-(-n // (t - s + 1)) for n, t, s in zip(task.outputs, sizes, spans, strict=True)]
    return sizes, task.batch * math.prod(count)


def multiplications(task: ConvTask, algorithm: str) -> int:
    """Multiplications, without those of the transforms."""
    pairs = task.channels // task.problem.groups * task.filters
    if algorithm == "fft":
        return 3 * math.prod(_spectrum(task)) * pairs  # three real ones for a complex one
    if algorithm == "winograd":
        return math.prod(_points(task)) * pairs
    return task.products


def workspace(task: ConvTask, algorithm: str) -> int:
    """Bytes of memory that an algorithm needs beside input, filters and output."""
    if algorithm == "direct":
        return 0
    if algorithm == "im2col":
        p, size = task.problem, jnp.dtype(task.dtype).itemsize
        shape = (task.batch, *task.padded, task.channels)
        return im2col.workspace(shape, p.window, p.strides, p.dilation, size)
    return sum(_transformed(task, algorithm))


def seconds(task: ConvTask, algorithm: str, rate: Rate, launch: float) -> float:
    """The seconds that the model predicts."""
    operations, bandwidth = rate
    return sum(launch + max(s.operations / operations, s.bytes / bandwidth) for s in stages(task, algorithm))


def error(task: ConvTask, algorithm: str, kind: str) -> float:
    """Relative root mean square of the rounding errors, before the result is rounded to its own type.

    The model is fitted to the table that `tools/conv_errors.py` measures (256 channels). In float32 the
    errors of sums dominate: 12 units of rounding by direct convolution and im2col, 7 by Fourier transforms.
    Winograd's grow with `cook_toom.Algorithm.amplification` in every dimension, from 3 units in float32 or
    float64, and from 0.6 units of the factors where these are rounded to few digits. Rounding the factors to
    TF32 costs every algorithm but Fourier's the same.
    """
    bits = jnp.finfo(task.dtype).nmant
    unit = 2.0 ** -(max(bits, 23) + 1)  # sums are in float32 or wider
    coarse = few_digits(kind, task.dtype, task.problem.precision)
    if algorithm == "winograd":
        grown = math.prod(f.amplification for f in tiles(task) if f.taps > 1)
        return grown * (0.6 * 2.0 ** -(min(bits, 10) + 1) if coarse else 3 * unit)
    if coarse and bits > 10 and algorithm != "fft":
        return 0.6 * 2.0**-11
    return (7 if algorithm == "fft" else 12) * unit
