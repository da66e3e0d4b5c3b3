"""Pooling on arrays that are cut on batch, space and channels."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Num

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.arguments import Padding, mode_of, pads_of, tuple_of
from shardtrain.ops.halo import exchange
from shardtrain.ops.window import Window


def max_pool(
    inputs: Num[Array, "*batch_and_pixels channels"],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    layout: Layout | None = None,
) -> Num[Array, "*batch_and_pixels_out channels"]:
    """The largest value in every window; the gradient goes to the first of equal values.

    On a mesh spatial neighbours exchange the halo rows that their windows share.

    Args:
        inputs: arrays `(*batch, *spatial, channels)`, channels last. A window of several numbers says how
            many dimensions are spatial, so there may be none or several batch dimensions before them.
        window_shape: rows of the window, one number for each spatial dimension, or one for all dimensions
            between the first and the last.
        strides: rows from one window to the next; 1 by default, as in Flax.
        padding: `"SAME"`, `"VALID"`, a number, or `(before, after)` pairs. Padding counts as smaller than
            every value; a window of padding alone gives -infinity.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: a window that does not fit.

    Example:
        >>> st.ops.max_pool(jnp.ones((2, 8, 8, 3)), (2, 2), strides=(2, 2)).shape
        (2, 4, 4, 3)
    """
    return _pool(inputs, _windows(inputs, window_shape, strides, padding), "max", chosen(layout))


def min_pool(
    inputs: Num[Array, "*batch_and_pixels channels"],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
    *,
    layout: Layout | None = None,
) -> Num[Array, "*batch_and_pixels_out channels"]:
    """The smallest value in every window; the gradient goes to the first of equal values.

    On a mesh spatial neighbours exchange the halo rows that their windows share.

    Args:
        inputs: arrays `(*batch, *spatial, channels)`, channels last. A window of several numbers says how
            many dimensions are spatial, so there may be none or several batch dimensions before them.
        window_shape: rows of the window, one number for each spatial dimension, or one for all dimensions
            between the first and the last.
        strides: rows from one window to the next; 1 by default, as in Flax.
        padding: `"SAME"`, `"VALID"`, a number, or `(before, after)` pairs. Padding counts as larger than
            every value; a window of padding alone gives infinity.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: a window that does not fit.

    Example:
        >>> st.ops.min_pool(jnp.ones((2, 8, 8, 3)), (2, 2), strides=(2, 2)).shape
        (2, 4, 4, 3)
    """
    return _pool(inputs, _windows(inputs, window_shape, strides, padding), "min", chosen(layout))


def avg_pool(
    inputs: Float[Array, "*batch_and_pixels channels"],
    window_shape: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
    *,
    layout: Layout | None = None,
) -> Float[Array, "*batch_and_pixels_out channels"]:
    """The mean of every window.

    Args:
        inputs: arrays `(*batch, *spatial, channels)`, channels last. A window of several numbers says how
            many dimensions are spatial, so there may be none or several batch dimensions before them.
        window_shape: rows of the window, one number for each spatial dimension, or one for all dimensions
            between the first and the last.
        strides: rows from one window to the next; 1 by default, as in Flax.
        padding: `"SAME"`, `"VALID"`, a number, or `(before, after)` pairs.
        count_include_pad: whether padding counts in the mean, as zeros. Where it does not, a window of
            padding alone gives NaN.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: a window that does not fit.

    Example:
        >>> st.ops.avg_pool(jnp.ones((2, 8, 8, 3)), (3, 3), strides=(2, 2), padding="SAME").shape
        (2, 4, 4, 3)
    """
    windows = _windows(inputs, window_shape, strides, padding)
    total = _pool(inputs, windows, "sum", chosen(layout))
    if count_include_pad:
        return total / math.prod(w.size for w in windows)
    counts = np.ones((*total.shape[-len(windows) - 1 : -1], 1))
    for dim, w in enumerate(windows):
        starts = np.arange(w.extent_out) * w.stride - w.pad[0]
        inside = np.maximum(np.minimum(starts + w.size, w.extent) - np.maximum(starts, 0), 0)
        counts = counts * inside.reshape([-1 if d == dim else 1 for d in range(counts.ndim)])
    return total / jnp.asarray(counts, total.dtype)


def global_avg_pool(
    x: Float[Array, "batch *spatial channels"], *, layout: Layout | None = None
) -> Float[Array, "batch channels"]:
    """The mean over all pixels of each channel; one all-reduce of the sums where pixels are cut.

    Args:
        x: input, channels last.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The means, cut as batch and channels of the input are.

    Example:
        >>> st.ops.global_avg_pool(jnp.ones((2, 8, 8, 3))).shape
        (2, 3)
    """
    return _global_avg_pool(x, chosen(layout))


def _windows(
    x: Array, window: int | Sequence[int], strides: int | Sequence[int] | None, padding: Padding
) -> tuple[Window, ...]:
    rank = len(window) if isinstance(window, Sequence) else x.ndim - 2
    if not 1 <= rank < x.ndim:
        raise UserError(
            f"window_shape={window} for an input of shape {x.shape}; give one number for each spatial "
            f"dimension of inputs (*batch, *spatial, channels)"
        )
    if x.dtype == bool:
        raise UserError("truth values are not pooled; use .astype(...) to numbers first")
    if mode_of(padding) != "constant":
        raise UserError(
            f"padding={padding!r} is not for pooling; use 'SAME', 'VALID' or numbers, or ops.pad first"
        )
    extents = x.shape[-rank - 1 : -1]
    sizes = tuple_of(window, rank, "window_shape")
    steps = tuple_of(strides, rank, "strides")
    pads = pads_of(padding, extents, sizes, steps)
    windows = tuple(
        Window(extent, span, step, pad)
        for extent, span, step, pad in zip(extents, sizes, steps, pads, strict=True)
    )
    for name, w in zip(spatial_names(rank), windows, strict=True):
        if w.extent_out < 1:
            raise UserError(
                f"a pooling window of {w.size} rows does not fit the {name} of {w.extent} with padding "
                f"{w.pad}; use padding='SAME' or a smaller window"
            )
    return windows


def _pool(x: Array, windows: tuple[Window, ...], kind: str, layout: Layout) -> Array:
    """Pools inputs of any number of batch dimensions."""
    batch = x.shape[: x.ndim - len(windows) - 1]
    y = _pool_one_batch(x.reshape(math.prod(batch), *x.shape[len(batch) :]), windows, kind, layout)
    return y.reshape(*batch, *y.shape[1:])


def _neutral(kind: str, dtype: jnp.dtype) -> float | int:
    """What padding holds, so that it has no part in a sum or is never the extreme value."""
    if kind == "sum":
        return 0.0
    if jnp.issubdtype(dtype, jnp.inexact):
        return -np.inf if kind == "max" else np.inf
    limits = jnp.iinfo(dtype)
    return limits.min if kind == "max" else limits.max


@functools.partial(jax.jit, static_argnames=("windows", "kind", "layout"))
def _pool_one_batch(x: Array, windows: tuple[Window, ...], kind: str, layout: Layout) -> Array:
    mesh = active_mesh()
    fill, combine = _neutral(kind, x.dtype), {"max": lax.max, "min": lax.min, "sum": lax.add}[kind]
    names = spatial_names(len(windows))
    cuts = [layout.cut(name, mesh) for name in names]
    windows = tuple(
        w.on(axes, 1 if mesh is None else size(mesh, axes)) for w, axes in zip(windows, cuts, strict=True)
    )
    batch, channels = layout.cut("batch", mesh), layout.channel_cut(x.shape[-1], mesh)
    cut = [batch, *cuts, channels]
    extents_in = x.shape
    extents_out = (x.shape[0], *(w.extent_out for w in windows), x.shape[-1])

    def local(x: Array) -> Array:
        x = island.mask_padding(x, extents_in, cut, mesh, fill)
        pads = [(0, 0)] * len(windows)
        for dim, window in enumerate(windows):
            if window.shards == 1 and min(window.pad) >= 0:  # the reduction pads by itself
                pads[dim] = window.pad
                continue
            x = exchange(x, dim + 1, window, fill=fill, grouped=island.grouped(mesh))
        y = lax.reduce_window(
            x,
            np.asarray(fill, x.dtype),  # a constant: else jax does not see that it is a max pool
            combine,
            (1, *(w.size for w in windows), 1),
            (1, *(w.stride for w in windows), 1),
            [(0, 0), *pads, (0, 0)],
        )
        return island.mask_padding(y, extents_out, cut, mesh)

    if mesh is None:
        return local(x)
    y = island.run(local, mesh, (spec(cut),), spec(cut), island.pad_to_blocks(x, cut, mesh))
    return island.crop_to(y, extents_out)


@functools.partial(jax.jit, static_argnames="layout")
def _global_avg_pool(x: Array, layout: Layout) -> Array:
    mesh, extents = active_mesh(), x.shape
    space = [layout.cut(name, mesh) for name in spatial_names(x.ndim - 2)]
    cut = [layout.cut("batch", mesh), *space, layout.channel_cut(x.shape[-1], mesh)]
    axes = tuple(a for entry in space for a in entry)

    def local(x: Array) -> Array:
        total = island.mask_padding(x, extents, cut, mesh).sum(tuple(range(1, x.ndim - 1)))
        total = lax.psum(total, axes) if axes else total
        return total / math.prod(extents[1:-1])

    if mesh is None:
        return local(x)
    y = island.run(local, mesh, (spec(cut),), spec([cut[0], cut[-1]]), island.pad_to_blocks(x, cut, mesh))
    return island.crop_to(y, (extents[0], extents[-1]))
