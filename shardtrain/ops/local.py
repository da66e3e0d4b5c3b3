"""Locally connected layers: a filter of its own at every pixel, kept where the pixel is."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.kernels import local as kernels
from shardtrain.kernels.conv import window_sizes
from shardtrain.layout import Axes, Layout, active_mesh, axes_of, chosen, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.arguments import Padding, mode_of, pads_of, tuple_of
from shardtrain.ops.channels import ChannelMode, channel_plan
from shardtrain.ops.conv import CONTRACTION
from shardtrain.ops.halo import exchange
from shardtrain.ops.reshard import move
from shardtrain.ops.window import Window, check_fits


@dataclass(frozen=True)
class _Config:
    """What is static: the windows before they are cut."""

    window: tuple[int, ...]
    dilation: tuple[int, ...]
    windows: tuple[Window, ...]
    layout: Layout
    channel_mode: ChannelMode | None
    precision: lax.PrecisionLike
    preferred_element_type: DTypeLike | None


def local(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*spatial_out taps channels_out"],
    bias: Float[Array, "*spatial_out channels_out"] | None = None,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = 1,
    layout: Layout | None = None,
    channel_mode: ChannelMode | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """A convolution whose filter differs from pixel to pixel, cut on batch, space and channels together.

    One island. The filters are cut as the output pixels are, so only halo rows of the input travel, as in
    a convolution; no device ever holds the filters of another's pixels, and their gradients are summed
    over the axes that cut the batch alone.

    Args:
        x: input; the leading dimension is the batch.
        kernel: the filters of every output pixel; `taps` is `channels_in * prod(window)`, channels
            slowest, as in `lax.conv_general_dilated_local` and `flax.linen.ConvLocal`.
        bias: added to every output pixel, its own.
        window: rows of the filter, one number or one per spatial dimension.
        strides, padding, dilation, layout, channel_mode: as in `conv`.
        precision, preferred_element_type: as in `lax.dot_general`.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: shapes that do not agree, a window larger than the padded input.

    Example:
        >>> x, kernel = jnp.ones((2, 7, 8, 4)), jnp.ones((5, 6, 4 * 9, 3))
        >>> local(x, kernel, window=(3, 3), padding="VALID").shape
        (2, 5, 6, 3)

    References:
        Coates et al., Deep Learning with COTS HPC Systems, ICML 2013; Dean et al., Large Scale Distributed
        Deep Networks, NIPS 2012.
    """
    rank = len(window) if isinstance(window, Sequence) else x.ndim - 2
    if x.ndim != rank + 2 or kernel.ndim != rank + 2:
        raise UserError(
            f"local: a window of {rank} dimensions takes inputs (batch, {rank} spatial, channels) and a "
            f"kernel (*spatial_out, taps, channels_out), not {x.shape} and {kernel.shape}"
        )
    window = tuple_of(window, rank, "window")
    windows = local_windows(x.shape[1:-1], window, strides, padding, dilation)
    taps = x.shape[-1] * math.prod(window)
    expected = (*(w.extent_out for w in windows), taps, kernel.shape[-1])
    if kernel.shape != expected:
        raise UserError(
            f"local: an input of {x.shape} with a window of {window} needs a kernel of {expected}, "
            f"not {kernel.shape}"
        )
    if bias is not None and bias.shape != (*kernel.shape[:rank], kernel.shape[-1]):
        raise UserError(
            f"local: a bias of {bias.shape} for outputs {(*kernel.shape[:rank], kernel.shape[-1])}"
        )
    config = _Config(
        window,
        tuple_of(dilation, rank, "dilation"),
        windows,
        chosen(layout),
        channel_mode,
        precision,
        preferred_element_type,
    )
    return _local(x, kernel, bias, config=config)


def local_windows(
    extents: Sequence[int],
    window: Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int] | None,
) -> tuple[Window, ...]:
    """The uncut window of every dimension; its `extent_out` is that of the output and of the filters.

    Raises:
        UserError: a window that does not fit.
    """
    rank = len(window)
    strides, dilation = tuple_of(strides, rank, "strides"), tuple_of(dilation, rank, "dilation")
    sizes = window_sizes(window, dilation)
    pads = pads_of(padding, extents, sizes, strides)
    found = tuple(
        Window(extent, span, stride, pad, mode=mode_of(padding))
        for extent, span, stride, pad in zip(extents, sizes, strides, pads, strict=True)
    )
    for name, w in zip(spatial_names(rank), found, strict=True):
        check_fits(w, name)
    return found


def _cut_pixels(parameter: Array, kept: P, space: Sequence[Axes]) -> tuple[Array, P]:
    """A parameter cut as its pixels are: those that do not divide are whole at rest."""
    now = tuple(map(axes_of, kept))
    wanted = (*space, *now[len(space) :])
    return move(parameter, now, wanted), spec(wanted)


@functools.partial(jax.jit, static_argnames="config")
def _local(x: Array, kernel: Array, bias: Array | None, config: _Config) -> Array:
    layout, mesh = config.layout, active_mesh()
    rank = len(config.window)
    batch = layout.cut("batch", mesh)
    cuts = [layout.cut(name, mesh) for name in spatial_names(rank)]
    windows = [
        w.on(axes, 1 if mesh is None else size(mesh, axes))
        for w, axes in zip(config.windows, cuts, strict=True)
    ]
    pixels = (
        math.prod(w.extent if w.shards == 1 else w.need for w in windows),
        math.prod(w.block_out for w in windows),
    )
    channels = x.shape[-1], kernel.shape[-1]
    plan = channel_plan(layout, mesh, channels, pixels, mode=config.channel_mode)
    vary = (*batch, *(a for w in windows for a in w.axes))

    space = [w.axes for w in windows]
    cuts_in, cuts_out = [batch, *space, plan.cut_in], [batch, *space, plan.cut_out]
    extents_in, extents_out = x.shape, (x.shape[0], *kernel.shape[:rank], kernel.shape[-1])
    # Pixels are always cut in here, where they divide at rest too.
    kept = island.at_rest(layout, kernel.shape, -1 if plan.mode == "gather" else -2, mesh, rank)
    kernel, kept = _cut_pixels(kernel, kept, space)
    kept_bias = island.at_rest(layout, (*kernel.shape[:rank], kernel.shape[-1]), -1, mesh, rank)
    if bias is not None:
        bias, kept_bias = _cut_pixels(bias, kept_bias, space)

    def local(x: Array, kernel: Array, bias: Array | None) -> Array:
        x = island.mask_padding(x, extents_in, cuts_in, mesh)
        kernel = island.gather(kernel, kept, layout, vary, rank)
        for dim, window in enumerate(windows):
            if window.shards > 1:
                x = exchange(x, dim + 1, window, grouped=island.grouped(mesh))
        x = plan.gathered(x)
        for dim, window in enumerate(windows):
            if window.shards == 1:  # nothing but padding, which is not sent
                x = exchange(x, dim + 1, window)
        y = kernels.local(
            x,
            kernel,
            window=config.window,
            strides=[w.stride for w in windows],
            dilation=config.dilation,
            precision=config.precision,
            preferred_element_type=config.preferred_element_type,
        )
        y = plan.summed(y)
        y = y if bias is None else y + island.gather(bias, kept_bias, layout, vary, rank)
        return island.mask_padding(y, extents_out, cuts_out, mesh)

    if mesh is None:
        return checkpoint_name(local(x, kernel, bias), CONTRACTION)
    y = island.run(
        local,
        mesh,
        (spec(cuts_in), kept, None if bias is None else kept_bias),
        spec(cuts_out),
        island.fill_up(x, cuts_in, mesh),
        island.fill_up(kernel, [*space, (), ()], mesh),
        None if bias is None else island.fill_up(bias, [*space, ()], mesh),
    )
    return checkpoint_name(island.crop_to(y, extents_out), CONTRACTION)
