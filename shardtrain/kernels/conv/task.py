"""The description of a convolution on one device: its windows and shapes, all static."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jax import lax

from shardtrain.errors import UserError
from shardtrain.kernels import gpu
from shardtrain.kernels.tiles import window_sizes

ALGORITHMS = ("direct", "im2col", "fft", "winograd")
PASSES = ("forward", "input", "kernel")
"""The convolution, and the gradients of its input and of its kernel."""


class Passes(NamedTuple):
    """The algorithm of every pass, see `PASSES`."""

    forward: str
    input: str
    kernel: str


@dataclass(frozen=True)
class Problem:
    """The static arguments of a convolution on one device, without its shapes.

    Attributes:
        window: rows of the filters in every spatial dimension.
        strides: of the window, one per spatial dimension.
        dilation: of the filters, one per spatial dimension.
        input_dilation: of the input, one per spatial dimension.
        padding: rows before and after every spatial dimension; negative numbers crop.
        groups: feature groups.
        precision: of the products.
        out_type: of the result; None for the input's.
        implementation: of Winograd's algorithm; None for the first that supports device and arguments.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int = 1
    precision: lax.PrecisionLike = None
    out_type: Any = None
    implementation: str | None = None

    @property
    def spans(self) -> tuple[int, ...]:
        """Rows that the dilated filters span."""
        return window_sizes(self.window, self.dilation)

    @property
    def dense(self) -> bool:
        """Whether strides and input dilations are all 1."""
        return max(self.strides, default=1) == 1 and max(self.input_dilation, default=1) == 1

    @property
    def dual(self) -> "Problem":
        """The convolution that gives the input's gradient from the output's, for strides of 1."""
        pads = tuple((s - 1 - a, s - 1 - b) for s, (a, b) in zip(self.spans, self.padding, strict=True))
        return replace(self, padding=pads)


@dataclass(frozen=True)
class ConvTask:
    """A `Problem` with its shapes.

    Attributes:
        problem: the static arguments.
        batch: examples of the input.
        extents: rows of the input in every spatial dimension, before padding.
        channels: of the input.
        filters: output channels.
        dtype: name of the type of the input.

    Example:
        >>> from shardtrain.kernels.conv.task import parse
        >>> str(parse("32x56x56x64->128,window=3"))
        '32x56x56x64->128,window=3x3'
    """

    problem: Problem
    batch: int
    extents: tuple[int, ...]
    channels: int
    filters: int
    dtype: str = "float32"

    @property
    def padded(self) -> tuple[int, ...]:
        """Rows of the input after dilation and padding."""
        wide = window_sizes(self.extents, self.problem.input_dilation)
        return tuple(n + a + b for n, (a, b) in zip(wide, self.problem.padding, strict=True))

    @property
    def outputs(self) -> tuple[int, ...]:
        """Rows of the output."""
        p = self.problem
        return tuple((n - k) // s + 1 for n, k, s in zip(self.padded, p.spans, p.strides, strict=True))

    @property
    def key(self) -> tuple[object, ...]:
        """What the time depends on, apart from the batch; padding and halo rows cost the same as others."""
        p = self.problem
        what = p.window, p.strides, p.dilation, p.input_dilation, p.groups
        return self.outputs, self.channels, self.filters, *what, self.dtype

    @property
    def dual(self) -> "ConvTask":
        """The convolution that gives the input's gradient from the output's, for strides of 1."""
        return replace(
            self,
            problem=self.problem.dual,
            extents=self.outputs,
            channels=self.filters,
            filters=self.channels,
        )

    @property
    def products(self) -> int:
        """Multiplications of direct convolution, those with padding included."""
        per_output = math.prod(self.problem.window) * self.channels // self.problem.groups
        return self.batch * math.prod(self.outputs) * self.filters * per_output

    def __str__(self) -> str:
        """As `parse` reads it, without fields that have their default values."""
        p = self.problem
        shape = _times((self.batch, *self.extents, self.channels))
        found = [f"{shape}->{self.filters}", f"window={_times(p.window)}"]
        for name, values in (("strides", p.strides), ("dilation", p.dilation), ("input", p.input_dilation)):
            if max(values, default=1) > 1:
                found.append(f"{name}={_times(values)}")
        if p.padding != _same(window_sizes(self.extents, p.input_dilation), p.spans, p.strides):
            found.append("padding=" + "x".join(str(a) if a == b else f"{a}:{b}" for a, b in p.padding))
        if p.groups > 1:
            found.append(f"groups={p.groups}")
        return ",".join(found + ([f"dtype={self.dtype}"] if self.dtype != "float32" else []))


def refused(
    algorithm: str, window: Sequence[int], strides: Sequence[int], implementation: str | None = None
) -> str | None:
    """Why `algorithm` does not support this window and these strides; None if it does."""
    if algorithm not in ("auto", *ALGORITHMS):
        return f"algorithm={algorithm!r}; there are 'auto', {', '.join(map(repr, ALGORITHMS))}"
    if implementation is not None:
        if reason := gpu.unknown(implementation):
            return reason
        if algorithm != "winograd":
            return f"implementation={implementation!r} is of algorithm='winograd', not of {algorithm!r}"
    if algorithm in ("fft", "winograd") and max(strides, default=1) > 1:
        return f"algorithm={algorithm!r} has no strides={tuple(strides)}; use 'direct' or 'im2col'"
    if algorithm == "winograd" and max(window, default=1) > 7:
        return (
            f"algorithm='winograd' has no window of {tuple(window)}: its rounding errors would be beyond "
            f"use; take 'fft' or 'direct'"
        )
    return None


def parse(text: str) -> ConvTask:
    """Reads a convolution written as `batch x rows x columns x channels->filters,window=...`.

    One number stands for all dimensions. Fields beside `window` are `strides`, `dilation`, `input` (its
    dilation), `padding` (`same`, which is the default, numbers, or `before:after`), `groups` and `dtype`.

    Raises:
        UserError: text that describes no convolution.

    Example:
        >>> from shardtrain.kernels.conv.task import parse
        >>> parse("2x224x224x3->64,window=11,strides=4,padding=2").outputs
        (55, 55)
    """
    try:
        shape, *fields = text.replace(" ", "").split(",")
        image, filters = shape.split("->")
        batch, *extents, channels = map(int, image.split("x"))
        given = dict(field.split("=", 1) for field in fields)
        if unknown := set(given) - {"window", "strides", "dilation", "input", "padding", "groups", "dtype"}:
            raise ValueError(f"{min(unknown)!r} is none of its fields")

        def numbers(name: str, default: str) -> tuple[int, ...]:
            values = tuple(int(v) for v in given.get(name, default).split("x"))
            return _each(values, len(extents), name)

        window, strides = numbers("window", ""), numbers("strides", "1")
        dilation, input_dilation = numbers("dilation", "1"), numbers("input", "1")
        wide, spans = window_sizes(extents, input_dilation), window_sizes(window, dilation)
        pads = _padding(given.get("padding", "same"), wide, spans, strides)
        problem = Problem(window, strides, dilation, input_dilation, pads, int(given.get("groups", "1")))
        task = ConvTask(
            problem, batch, tuple(extents), channels, int(filters), str(given.get("dtype", "float32"))
        )
        sizes = (batch, *extents, channels, task.filters, *window, *strides, *task.outputs, problem.groups)
        if min(sizes) < 1 or channels % problem.groups or task.filters % problem.groups:
            raise ValueError("its sizes do not agree")
    except ValueError as error:
        raise UserError(
            f"layer {text!r} is no convolution ({error}); write one like 32x56x56x64->128,window=3,strides=2"
        ) from error
    return task


def _times(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _each(values: tuple[Any, ...], rank: int, name: str) -> tuple[Any, ...]:
    """One entry per dimension."""
    if len(values) not in (1, rank):
        raise ValueError(f"{len(values)} numbers of {name} for {rank} dimensions")
    return values * rank if len(values) == 1 else values


def _same(
    extents: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """XLA's `"SAME"`."""
    totals = [max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in zip(extents, spans, strides, strict=True)]
    return tuple((t // 2, t - t // 2) for t in totals)


def _padding(
    text: str, extents: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if text == "same":
        return _same(extents, spans, strides)
    pairs = [part.split(":") for part in text.split("x")]
    return _each(tuple((int(p[0]), int(p[-1])) for p in pairs), len(extents), "padding")
