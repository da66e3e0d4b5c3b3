"""`conv`: one convolution and both its gradients by the chosen algorithms."""

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
from shardtrain.kernels.tiles import pad_axis, transposed
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
    """Convolution on one device.

    Args:
        x: input, channels last.
        kernel: filters.
        strides: of the window.
        dilation: of the filters.
        padding: rows before and after every spatial dimension; negative numbers crop.
        input_dilation: of the input, none by default.
        groups: feature groups.
        algorithm: one of `ALGORITHMS`, for the output and both gradients; `"auto"` takes for each of them the
            one that `select` finds fastest.
        implementation: of Winograd's algorithm: `"mosaic"`, `"triton"`, `"xla"`, or None for the first of
            them that supports the arguments and the device that the program is traced for.
        precision: of the products.
        preferred_element_type: of the sums and the output.

    Raises:
        UserError: an unknown algorithm, or one that does not support the arguments.

    Example:
        >>> from shardtrain.kernels.conv import conv
        >>> x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 6))
        >>> windows = {"strides": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1))}
        >>> conv(x, kernel, **windows, algorithm="winograd").shape
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
        precision = compat.default_precision()  # so that "auto" knows the one that will be used
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
        return _compute(problem, passes.forward, x, kernel)  # JAX's own gradients, forward mode too
    return _differentiable(problem, passes, *compat.match_varying(x, kernel))


def implementation(task: ConvTask) -> str:
    """The implementation that Winograd's algorithm would have for this task and the present device."""
    p = task.problem
    if refused("winograd", p.window, p.strides):
        return "xla"
    settings = picked(
        (task.batch, *task.padded, task.channels),
        (*p.window, task.channels // p.groups, task.filters),
        task.dtype,
        outputs=tile_outputs(p.window, task.dtype),
        groups=p.groups,
        precision=p.precision,
        implementation=p.implementation,
    )
    return settings.implementation if settings else "xla"


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
    # Every algorithm is linear in the filters, so its transpose is the gradient, by the same products.
    (dkernel,) = jax.vjp(lambda kernel: _compute(problem, passes.kernel, x, kernel), kernel)[1](dy)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_differentiable.defvjp(_forward, _backward)


def _compute(problem: Problem, algorithm: str, x: Array, kernel: Array) -> Array:
    """Runs one algorithm, on an input padded and dilated beforehand for those that do neither."""
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
    """Winograd's algorithm; the phases of a dilation are separate images of one larger batch."""
    rank, batch = len(problem.window), x.shape[0]
    outputs = tile_outputs(problem.window, x.dtype)
    extents = [n - s + 1 for n, s in zip(x.shape[1:-1], problem.spans, strict=True)]
    if max(problem.dilation, default=1) == 1:
        return winograd(x, kernel, outputs=outputs, **kinds)
    for dim, d in enumerate(problem.dilation):
        axis = 1 + dim
        rows = -(-x.shape[axis] // d)
        x = pad_axis(x, axis, rows * d)
        x = x.reshape(*x.shape[:axis], rows, d, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 0).reshape(-1, *x.shape[1 : axis + 1], *x.shape[axis + 2 :])
    y = winograd(x, kernel, outputs=outputs, **kinds)
    for dim in reversed(range(rank)):
        d, axis = problem.dilation[dim], 1 + dim
        y = y.reshape(d, -1, *y.shape[1:])
        y = jnp.moveaxis(y, 0, axis + 1)
        y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
    return lax.slice(y, (0,) * y.ndim, (batch, *extents, y.shape[-1]))
