"""The front door: one convolution by the algorithm that is asked for."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels.conv.direct import direct
from shardtrain.kernels.conv.fft import fft
from shardtrain.kernels.conv.im2col import im2col
from shardtrain.kernels.conv.select import heard, passes_of
from shardtrain.kernels.conv.task import ConvTask, Passes, Problem, refused
from shardtrain.kernels.tiles import extended, transposed
from shardtrain.kernels.winograd import picked, tile_outputs, winograd


def conv(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    *,
    strides: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
    input_dilation: Sequence[int] | None = None,
    groups: int = 1,
    algorithm: str = "auto",
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution on one device, with both gradients.

    Args:
        x, kernel, strides, dilation, padding, input_dilation, groups, precision, preferred_element_type: as
            in `lax.conv_general_dilated`, channels last.
        algorithm: one of `ALGORITHMS`, for all passes; `"auto"` takes for each what `select` finds fastest.
        implementation: of Winograd's algorithm: `"mosaic"`, `"triton"`, `"xla"`, or None for the first of
            them that does it on the device that is traced for.

    Raises:
        UserError: an algorithm that there is not, or that does not compute this.

    Example:
        >>> x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
        >>> static = {"strides": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1))}
        >>> conv(x, kernel, **static, algorithm="winograd").shape
        (1, 8, 8, 6)
    """
    given = tuple(input_dilation or (1,) * len(strides))
    pads = tuple((int(a), int(b)) for a, b in padding)
    window = kernel.shape[:-2]
    if reason := refused(algorithm, window, strides, implementation):
        raise UserError(f"conv: {reason}")
    if algorithm not in ("auto", "direct") and not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"conv: algorithm={algorithm!r} is for floating point, not {x.dtype}; use 'direct'")
    if precision is None:
        precision = compat.default_precision()  # what "auto" believes is what is computed
    problem = Problem(
        window,
        tuple(strides),
        tuple(dilation),
        given,
        pads,
        groups,
        precision,
        preferred_element_type,
        implementation,
    )
    task = ConvTask(problem, x.shape[0], x.shape[1:-1], x.shape[-1], kernel.shape[-1], x.dtype.name)
    if 0 in (*x.shape, *kernel.shape):
        algorithm = "direct"  # nothing to compute
    passes = passes_of(task) if algorithm == "auto" else Passes(*(algorithm,) * 3)
    heard(task, passes)
    if set(passes) == {"direct"} or (algorithm != "auto" and not problem.dense):
        return _compute(problem, passes.forward, x, kernel)  # jax's own gradients, of both modes
    return _differentiable(problem, passes, *compat.match_varying(x, kernel))


def implementation(task: ConvTask) -> str:
    """What Winograd's algorithm is written in where this is traced, chosen for the task or not."""
    p = task.problem
    if refused("winograd", p.window, p.strides):
        return "xla"
    static = picked(
        (task.batch, *task.padded, task.channels),
        (*p.window, task.channels // p.groups, task.filters),
        task.dtype,
        outputs=tile_outputs(p.window, task.dtype),
        groups=p.groups,
        precision=p.precision,
        implementation=p.implementation,
    )
    return static.implementation if static else "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(problem: Problem, passes: Passes, x: Array, kernel: Array) -> Array:
    return _compute(problem, passes.forward, x, kernel)


def _forward(problem: Problem, passes: Passes, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _compute(problem, passes.forward, x, kernel), (x, kernel)


def _backward(problem: Problem, passes: Passes, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    if passes.input == "direct":
        (dx,) = jax.vjp(lambda x: _compute(problem, "direct", x, kernel), x)[1](dy)
    else:
        dx = _compute(problem.dual, passes.input, dy.astype(x.dtype), transposed(kernel, problem.groups))
    # All of these are linear in the filters: their adjoint is the gradient, by the same products.
    (dkernel,) = jax.vjp(lambda kernel: _compute(problem, passes.kernel, x, kernel), kernel)[1](dy)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_differentiable.defvjp(_forward, _backward)


def _compute(problem: Problem, algorithm: str, x: Array, kernel: Array) -> Array:
    """Runs one algorithm; pads and dilates by writing it out for those that take neither."""
    if algorithm == "direct":
        return direct(
            x,
            kernel,
            strides=problem.strides,
            dilation=problem.dilation,
            padding=problem.padding,
            input_dilation=problem.input_dilation,
            groups=problem.groups,
            precision=problem.precision,
            preferred_element_type=problem.out_type,
        )
    config = [
        (low, high, d - 1) for (low, high), d in zip(problem.padding, problem.input_dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    kinds: Any = {"groups": problem.groups, "precision": problem.precision, "out_type": problem.out_type}
    if algorithm == "im2col":
        return im2col(x, kernel, strides=problem.strides, dilation=problem.dilation, **kinds)
    if algorithm == "fft":
        return fft(x, kernel, dilation=problem.dilation, **kinds)
    return _by_phases(x, kernel, problem, **kinds, implementation=problem.implementation)


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
