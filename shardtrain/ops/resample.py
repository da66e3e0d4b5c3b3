"""Padding, resizing and adaptive pooling: every output row reads its own range of input rows."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Num

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.arguments import check_repeats, pairs_of, tuple_of
from shardtrain.ops.halo import exchange
from shardtrain.ops.window import Bands, Reach, Window

PAD_MODES = ("constant", "wrap", "reflect", "edge")


def pad(
    x: Float[Array, "batch *spatial channels"],
    padding: int | Sequence[int | tuple[int, int]],
    *,
    mode: str = "constant",
    value: float = 0.0,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial_out channels"]:
    """Adds rows before and after every spatial dimension; negative numbers crop.

    The output is cut into equal blocks again, so neighbours exchange rows where padding shifts the blocks.
    The padding of convolutions and pooling itself sends less.

    Args:
        x: input, channels last.
        padding: a number, or for each spatial dimension a number or `(before, after)`.
        mode: `"constant"`, `"wrap"`, `"reflect"` or `"edge"`, as in `numpy.pad`.
        value: of the padding, for mode `"constant"`.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The padded input, cut as the input is.

    Raises:
        UserError: an unknown mode, more repeated rows than the input has, or a crop that leaves no rows.

    Example:
        >>> st.ops.pad(jnp.ones((2, 7, 8, 3)), ((1, 1), (2, 2)), mode="reflect").shape
        (2, 9, 12, 3)
    """
    if mode not in PAD_MODES:
        raise UserError(f"pad: mode={mode!r}; there are {', '.join(map(repr, PAD_MODES))}")
    extents = x.shape[1:-1]
    pads = pairs_of(padding, len(extents))
    check_repeats(mode, extents, pads)
    windows = tuple(Window(n, 1, 1, p, mode=mode) for n, p in zip(extents, pads, strict=True))
    if any(w.extent_out < 1 for w in windows):
        raise UserError(f"pad: padding {pads} leaves nothing of extents {extents}; crop less")
    return _pad(x, windows, float(value), chosen(layout))


def resize(
    x: Num[Array, "batch *spatial channels"],
    extents: int | Sequence[int],
    *,
    method: str = "nearest",
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial_out channels"]:
    """Resizes every spatial dimension, without antialiasing; pixels are sampled at their centres.

    The result is that of `jax.image.resize(..., antialias=False)`, and of PyTorch's `interpolate`
    with `mode="nearest-exact"` or with `"linear"`, `"bilinear"` and `"trilinear"`.

    Args:
        x: input, channels last.
        extents: rows of the output, one number or one per spatial dimension.
        method: `"nearest"`, or `"linear"` for a weighted mean of the two nearest in each dimension.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: extents of another number of dimensions or below 1, an unknown method, or values that are
            not floating point.

    Example:
        >>> st.ops.resize(jnp.ones((2, 7, 8, 3)), (14, 16), method="linear").shape
        (2, 14, 16, 3)
    """
    wanted = _wanted("resize", x, extents)
    weigh = method_of(method)
    weights = tuple(weigh(n, m) for n, m in zip(x.shape[1:-1], wanted, strict=True))
    return _weighted("resize", x, weights, chosen(layout))


def adaptive_avg_pool(
    x: Num[Array, "batch *spatial channels"], extents: int | Sequence[int], *, layout: Layout | None = None
) -> Float[Array, "batch *spatial_out channels"]:
    """The mean of windows that divide the input as evenly as possible among `extents` outputs.

    Output `i` of `m` reads the inputs from `floor(i * n / m)` to `ceil((i + 1) * n / m)`, as in PyTorch.

    Args:
        x: input, channels last.
        extents: rows of the output, one number or one per spatial dimension.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: extents of another number of dimensions or below 1, or values that are not floating point.

    Example:
        >>> st.ops.adaptive_avg_pool(jnp.ones((2, 13, 8, 3)), (6, 6)).shape
        (2, 6, 6, 3)
    """
    wanted = _wanted("adaptive_avg_pool", x, extents)
    weights = []
    for n, m in zip(x.shape[1:-1], wanted, strict=True):
        weights.append(tuple((a, (1 / (b - a),) * (b - a)) for a, b in _ranges(n, m)))
    return _weighted("adaptive_avg_pool", x, tuple(weights), chosen(layout))


def adaptive_max_pool(
    x: Float[Array, "batch *spatial channels"], extents: int | Sequence[int], *, layout: Layout | None = None
) -> Float[Array, "batch *spatial_out channels"]:
    """The largest value of windows that divide the input as in `adaptive_avg_pool`.

    Dimensions are reduced one after the other; of equal values the first gets the gradient in each.

    Args:
        x: input, channels last.
        extents: rows of the output, one number or one per spatial dimension; 1 is a global maximum.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: extents of another number of dimensions or below 1.

    Example:
        >>> st.ops.adaptive_max_pool(jnp.ones((2, 13, 8, 3)), (6, 6)).shape
        (2, 6, 6, 3)
    """
    wanted = _wanted("adaptive_max_pool", x, extents)
    ranges = tuple(_ranges(n, m) for n, m in zip(x.shape[1:-1], wanted, strict=True))
    return _largest(x, ranges, chosen(layout))


def _wanted(what: str, x: Array, extents: int | Sequence[int]) -> tuple[int, ...]:
    if not all(x.shape[1:-1]):
        raise UserError(f"{what}: an input of shape {x.shape} has no pixels")
    return tuple_of(extents, x.ndim - 2, "extents")


def _ranges(n: int, m: int) -> tuple[tuple[int, int], ...]:
    """The inputs `[start, stop)` of each of `m` adaptive windows over `n` rows."""
    return tuple((i * n // m, -(-(i + 1) * n // m)) for i in range(m))


Weights = tuple[tuple[int, tuple[float, ...]], ...]
"""For every output row, its first input row and the weights of the rows from there on."""


def _nearest(n: int, m: int) -> Weights:
    return tuple(((2 * o + 1) * n // (2 * m), (1.0,)) for o in range(m))


def _linear(n: int, m: int) -> Weights:
    found = []
    for o in range(m):
        place = min(max((o + 0.5) * n / m - 0.5, 0.0), n - 1.0)
        first = min(math.floor(place), max(n - 2, 0))
        share = place - first
        two = (first, (1 - share, share))
        found.append(two if 0 < share < 1 else (first + round(share), (1.0,)))  # no input of weight 0
    return tuple(found)


def method_of(method: str) -> Callable[[int, int], Weights]:
    """The function that gives a method's weights from the extents of input and output.

    Raises:
        UserError: an unknown method.
    """
    found = {"nearest": _nearest, "linear": _linear}.get(method)
    if found is None:
        raise UserError(f"resize: method={method!r}; there are 'nearest' and 'linear'")
    return found


@functools.partial(jax.jit, static_argnames=("windows", "value", "layout"))
def _pad(x: Array, windows: tuple[Window, ...], value: float, layout: Layout) -> Array:
    return _each_dimension(x, windows, layout, lambda x, dim, reach: x, value)


def _weighted(what: str, x: Array, weights: tuple[Weights, ...], layout: Layout) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{what}: values of {x.dtype} would be rounded to integers; give floating point")
    return _sums(x, weights, layout)


@functools.partial(jax.jit, static_argnames=("weights", "layout"))
def _sums(x: Array, weights: tuple[Weights, ...], layout: Layout) -> Array:
    bands = tuple(
        Bands(n, tuple((first, first + len(shares)) for first, shares in rows))
        for n, rows in zip(x.shape[1:-1], weights, strict=True)
    )

    def combine(x: Array, dim: int, reach: Reach) -> Array:
        rows = weights[dim - 1]
        times, rest = divmod(len(rows), reach.extent)
        copies = not rest and rows == tuple((o // times, (1.0,)) for o in range(len(rows)))
        if copies and times * x.shape[dim] == reach.block_out:
            return jnp.repeat(x, times, axis=dim)
        matrices = np.zeros((reach.shards, reach.block_out, reach.need))
        for shard, start, _ in reach.spans:
            outputs = range(shard * reach.block_out, min((shard + 1) * reach.block_out, len(rows)))
            for place, o in enumerate(outputs):
                first, shares = rows[o]
                matrices[shard, place, first - start : first - start + len(shares)] = shares
        matrix = island.entry_of_shard(matrices, reach).astype(x.dtype)
        # Full precision: tensor cores would round weights and values.
        y = jnp.tensordot(x, matrix, ((dim,), (1,)), precision=lax.Precision.HIGHEST)
        return jnp.moveaxis(y, -1, dim)

    return _each_dimension(x, bands, layout, combine)


@functools.partial(jax.jit, static_argnames=("ranges", "layout"))
def _largest(x: Array, ranges: tuple[tuple[tuple[int, int], ...], ...], layout: Layout) -> Array:
    bands = tuple(Bands(n, rows) for n, rows in zip(x.shape[1:-1], ranges, strict=True))

    def combine(x: Array, dim: int, reach: Reach) -> Array:
        rows = ranges[dim - 1]
        widest = max(stop - start for start, stop in rows)
        places = np.zeros((reach.shards, reach.block_out, widest), int)
        for shard, start, _ in reach.spans:
            outputs = range(shard * reach.block_out, min((shard + 1) * reach.block_out, len(rows)))
            for place, o in enumerate(outputs):
                first, stop = rows[o]
                # A shorter window reads its last input again: never a new largest value.
                places[shard, place] = np.minimum(np.arange(first, first + widest), stop - 1) - start
        index = island.entry_of_shard(places, reach)
        windows = jnp.take(x, index.reshape(-1), axis=dim)
        windows = windows.reshape(*x.shape[:dim], reach.block_out, widest, *x.shape[dim + 1 :])
        chosen = jnp.expand_dims(windows.argmax(dim + 1), dim + 1)  # the first, for the gradient
        return jnp.take_along_axis(windows, chosen, axis=dim + 1).squeeze(dim + 1)

    return _each_dimension(x, bands, layout, combine)


def _each_dimension(x, reaches, layout, combine, fill=0.0):  # type: ignore[no-untyped-def]
    """An island that calls `combine` for each dimension on the rows that this device's outputs read."""
    mesh = active_mesh()
    cuts = [layout.cut(name, mesh) for name in spatial_names(len(reaches))]
    reaches = [
        r.on(axes, 1 if mesh is None else size(mesh, axes)) for r, axes in zip(reaches, cuts, strict=True)
    ]
    cut = [layout.cut("batch", mesh), *cuts, layout.channel_cut(x.shape[-1], mesh)]
    extents_in = x.shape
    extents_out = (x.shape[0], *(r.extent_out for r in reaches), x.shape[-1])

    def local(x: Array) -> Array:
        x = island.mask_padding(x, extents_in, cut, mesh, fill)
        for dim, reach in enumerate(reaches, start=1):
            x = exchange(x, dim, reach, fill=fill, grouped=island.grouped(mesh))
            x = combine(x, dim, reach)
        return island.mask_padding(x, extents_out, cut, mesh)

    if mesh is None:
        return local(x)
    y = island.run(local, mesh, (spec(cut),), spec(cut), island.pad_to_blocks(x, cut, mesh))
    return island.crop_to(y, extents_out)
