"""The front door: one convolution by the algorithm that is asked for."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels.conv.direct import direct, transposed
from shardtrain.kernels.conv.fft import fft
from shardtrain.kernels.conv.im2col import im2col
from shardtrain.kernels.conv.tiles import extended, window_sizes
from shardtrain.kernels.conv.winograd import winograd

ALGORITHMS = ("direct", "im2col", "fft", "winograd")


@dataclass(frozen=True)
class Problem:
    """What is static of a convolution on one device.

    Attributes:
        window: rows of the filters in every spatial dimension.
        strides, dilation, input_dilation, padding: one entry per spatial dimension; negative padding crops.
        groups: feature groups.
        precision: of the products.
        out_type: of the result, the input's if None.
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int = 1
    precision: lax.PrecisionLike = None
    out_type: Any = None

    @property
    def spans(self) -> tuple[int, ...]:
        """Rows that the dilated filters span."""
        return window_sizes(self.window, self.dilation)

    @property
    def dual(self) -> "Problem":
        """The convolution that gives the input's gradient from the output's, for strides of 1."""
        pads = tuple((s - 1 - a, s - 1 - b) for s, (a, b) in zip(self.spans, self.padding, strict=True))
        return replace(self, padding=pads)


def refused(algorithm: str, window: Sequence[int], strides: Sequence[int]) -> str | None:
    """Why `algorithm` does not compute a convolution with this window and these strides, None if it does."""
    if algorithm not in ALGORITHMS:
        return f"algorithm={algorithm!r}; there are {', '.join(map(repr, ALGORITHMS))}"
    if algorithm in ("fft", "winograd") and max(strides, default=1) > 1:
        return f"algorithm={algorithm!r} has no strides={tuple(strides)}; use 'direct' or 'im2col'"
    if algorithm == "winograd" and max(window, default=1) > 7:
        return (
            f"algorithm='winograd' has no window of {tuple(window)}: its rounding errors would be beyond "
            f"use; take 'fft' or 'direct'"
        )
    return None


def conv(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
    input_dilation: Sequence[int] | None = None,
    groups: int = 1,
    algorithm: str = "direct",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution on one device, with both gradients by the same algorithm.

    Args:
        x, kernel, strides, dilation, padding, input_dilation, groups, precision, preferred_element_type: as
            in `lax.conv_general_dilated`, channels last.
        algorithm: one of `ALGORITHMS`.

    Raises:
        UserError: an algorithm that there is not, or that does not compute this.

    Example:
        >>> x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
        >>> static = {"strides": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1))}
        >>> conv(x, kernel, **static, algorithm="winograd").shape
        (1, 8, 8, 6)
    """
    given = input_dilation or (1,) * len(strides)
    pads = tuple((int(a), int(b)) for a, b in padding)
    problem = Problem(
        kernel.shape[:-2],
        tuple(strides),
        tuple(dilation),
        tuple(given),
        pads,
        groups,
        precision,
        preferred_element_type,
    )
    if reason := refused(algorithm, problem.window, problem.strides):
        raise UserError(f"conv: {reason}")
    if algorithm == "direct":
        return direct(
            x,
            kernel,
            strides=strides,
            dilation=dilation,
            padding=padding,
            input_dilation=input_dilation,
            groups=groups,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    if max(problem.strides, default=1) == 1 and max(problem.input_dilation, default=1) == 1:
        return _differentiable(problem, algorithm, *compat.alike(x, kernel))
    return _compute(problem, algorithm, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: Problem, algorithm: str, x: Array, kernel: Array) -> Array:
    return _compute(problem, algorithm, x, kernel)


def _forward(problem: Problem, algorithm: str, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _compute(problem, algorithm, x, kernel), (x, kernel)


def _backward(problem: Problem, algorithm: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    dx = _compute(problem.dual, algorithm, dy.astype(x.dtype), transposed(kernel, problem.groups))
    # All of these are linear in the filters: their adjoint is the gradient, by the same products.
    (dkernel,) = jax.vjp(lambda kernel: _compute(problem, algorithm, x, kernel), kernel)[1](dy)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_differentiable.defvjp(_forward, _backward)


def _compute(problem: Problem, algorithm: str, x: Array, kernel: Array) -> Array:
    """Pads and dilates by writing it out, and runs one of the algorithms that take neither."""
    config = [
        (low, high, d - 1) for (low, high), d in zip(problem.padding, problem.input_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    kinds: Any = {"groups": problem.groups, "precision": problem.precision, "out_type": problem.out_type}
    if algorithm == "im2col":
        return im2col(x, kernel, strides=problem.strides, dilation=problem.dilation, **kinds)
    if algorithm == "fft":
        return fft(x, kernel, dilation=problem.dilation, **kinds)
    return _by_phases(x, kernel, problem, **kinds)


def tile_outputs(window: Sequence[int], dtype: DTypeLike) -> tuple[int, ...]:
    """`m` of Winograd's F(m, r) in every dimension: tiles of 6, of 4 where numbers have few digits."""
    few = jnp.finfo(dtype).nmant < 20
    return tuple(max(1, (5 if few else 7) - r if r <= 4 else 9 - r) for r in window)


def _by_phases(x: Array, kernel: Array, problem: Problem, **kinds: Any) -> Array:
    """Winograd's algorithm of every phase of a dilation: the phases are images of their own."""
    rank, batch = len(problem.window), x.shape[0]
    outputs = tile_outputs(problem.window, x.dtype)
    extents = [n - s + 1 for n, s in zip(x.shape[1:-1], problem.spans, strict=True)]
    if max(problem.dilation, default=1) == 1:
        return winograd(x, kernel, outputs=outputs, **kinds)
    for dim, d in enumerate(problem.dilation):
        axis = 1 + dim
        rows = -(-x.shape[axis] // d)
        x = extended(x, axis, rows * d)
        x = x.reshape(*x.shape[:axis], rows, d, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 0).reshape(-1, *x.shape[1 : axis + 1], *x.shape[axis + 2 :])
    y = winograd(x, kernel, outputs=outputs, **kinds)
    for dim in reversed(range(rank)):
        d, axis = problem.dilation[dim], 1 + dim
        y = y.reshape(d, -1, *y.shape[1:])
        y = jnp.moveaxis(y, 0, axis + 1)
        y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    return lax.slice(y, (0,) * y.ndim, (batch, *extents, y.shape[-1]))
