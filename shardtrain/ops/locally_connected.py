"""Locally connected layers: a filter of its own at every pixel, on the device that computes the pixel."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.kernels.conv import window_sizes
from shardtrain.kernels.locally_connected import locally_connected
from shardtrain.layout import Layout, active_mesh, chosen, spatial_names
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.arguments import Padding, mode_of, pads_of, tuple_of
from shardtrain.ops.channels import ChannelMode, channel_plan
from shardtrain.ops.contraction import ContractionPlan
from shardtrain.ops.halo import exchange
from shardtrain.ops.window import Window, check_fits


@dataclass(frozen=True)
class LocalSettings:
    """The static arguments of a locally connected layer, checked; its windows are not cut yet."""

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
    """A convolution with a different filter at every output pixel, cut on batch, space and channels.

    The filters are cut as the output pixels are. Devices therefore exchange halo rows of the input, as in a
    convolution, and no filters; the gradients of the filters are summed over the axes that cut the batch.

    Args:
        x: input; the leading dimension is the batch.
        kernel: the filters of every output pixel; `taps` is `channels_in * prod(window)`, channels
            slowest, as in `lax.conv_general_dilated_local` and `flax.linen.ConvLocal`.
        bias: one vector for every output pixel.
        window: rows of the filters, one number or one per spatial dimension.
        strides: as in `conv`.
        padding: as in `conv`.
        dilation: as in `conv`.
        layout: which mesh axes cut what; by name by default.
        channel_mode: as in `conv`.
        precision: of the products, as in `lax.dot_general`.
        preferred_element_type: of the sums and the output, as in `lax.dot_general`.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: shapes that do not agree, a window larger than the padded input.

    Example:
        >>> x, kernel = jnp.ones((2, 7, 8, 4)), jnp.ones((5, 6, 4 * 9, 3))
        >>> st.ops.local(x, kernel, window=(3, 3), padding="VALID").shape
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
    settings = LocalSettings(
        window,
        tuple_of(dilation, rank, "dilation"),
        windows,
        chosen(layout),
        channel_mode,
        precision,
        preferred_element_type,
    )
    return _local(x, kernel, bias, settings=settings)


def local_windows(
    extents: Sequence[int],
    window: Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int] | None,
) -> tuple[Window, ...]:
    """The window of every dimension before it is cut; its `extent_out` is that of output and filters.

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


@functools.partial(jax.jit, static_argnames="settings")
def _local(x: Array, kernel: Array, bias: Array | None, settings: LocalSettings) -> Array:
    layout, mesh = settings.layout, active_mesh()
    cuts = [layout.cut(name, mesh) for name in spatial_names(len(settings.window))]
    windows = tuple(
        w.on(axes, 1 if mesh is None else size(mesh, axes))
        for w, axes in zip(settings.windows, cuts, strict=True)
    )
    pixels = (
        math.prod(w.extent if w.shards == 1 else w.need for w in windows),
        math.prod(w.block_out for w in windows),
    )
    channels = x.shape[-1], kernel.shape[-1]
    moves = channel_plan(layout, mesh, channels, pixels, mode=settings.channel_mode)
    plan = LocalPlan(layout, mesh, windows, moves, x.shape, kernel.shape, len(windows), settings)
    return plan(x, kernel, bias)


@dataclass(frozen=True)
class LocalPlan(ContractionPlan):
    """One locally connected layer on one mesh."""

    settings: LocalSettings

    def contract(self, x: Array, kernel: Array) -> Array:
        for dim, window in enumerate(self.windows, start=1):
            if window.shards > 1:
                x = exchange(x, dim, window, grouped=island.grouped(self.mesh))
        x = self.channels.gathered(x)
        for dim, window in enumerate(self.windows, start=1):
            if window.shards == 1:  # nothing but padding, which is not sent
                x = exchange(x, dim, window)
        y = locally_connected(
            x,
            kernel,
            window=self.settings.window,
            strides=[w.stride for w in self.windows],
            dilation=self.settings.dilation,
            precision=self.settings.precision,
            preferred_element_type=self.settings.preferred_element_type,
        )
        return self.channels.summed(y)
