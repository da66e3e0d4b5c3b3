"""Convolution and linear maps, cut on batch, space and channels together."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain.errors import UserError
from shardtrain.kernels import conv as kernels
from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.halo import exchange
from shardtrain.ops.window import Window, pads_of, tuple_of

ChannelMode = Literal["gather", "scatter"]

CONTRACTION = "contraction"
"""Name of convolution and linear outputs, for remat policies that keep them and recompute the rest."""


@dataclass(frozen=True)
class Config:
    """What of a convolution is static: its windows, before they are cut."""

    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    groups: int
    layout: Layout
    mode: ChannelMode | None
    precision: lax.PrecisionLike
    preferred_element_type: DTypeLike | None


def conv(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    bias: Float[Array, " channels_out"] | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    layout: Layout | None = None,
    channel_mode: ChannelMode | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution in 1, 2 or 3 dimensions, channels last, with the same numbers on every mesh.

    Without a mesh this is `lax.conv_general_dilated`. Inside `with jax.set_mesh(mesh)` it is one island:
    halo rows travel between spatial neighbours, corners included; on the channel axis either the input's
    channels are gathered or partial sums are reduce-scattered; the kernel's gradient is summed once over
    all axes that cut the data. Extents need not divide by the axes.

    Args:
        x: input; the leading dimension is the batch.
        kernel: filters, Flax's layout.
        bias: added to every output pixel.
        strides: of the window, one number or one per spatial dimension.
        padding: `"SAME"`, `"VALID"`, `"CAUSAL"` (1-D), a number, or `(before, after)` per dimension.
        dilation: of the kernel.
        groups: feature groups. With channels cut, they must divide by the channel axis.
        layout: which mesh axes cut what; by name by default.
        channel_mode: `"gather"` or `"scatter"`; by default whichever moves fewer bytes, see
            `channel_plan`.
        precision, preferred_element_type: as in `lax.conv_general_dilated`.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: shapes that do not agree, a window larger than the padded input, groups that cannot be
            cut.

    Example:
        >>> x, kernel = jnp.ones((2, 7, 8, 4)), jnp.ones((3, 3, 4, 6))
        >>> with jax.set_mesh(make_mesh("height=2,channel=2")):
        ...     conv(x, kernel, strides=2).shape
        (2, 4, 4, 6)

    References:
        Dryden et al., Improving Strong-Scaling of CNN Training by Exploiting Finer-Grained Parallelism,
        IPDPS 2019; Channel and Filter Parallelism for Large-Scale CNN Training, SC 2019.
    """
    rank = kernel.ndim - 2
    if x.ndim != rank + 2:
        raise UserError(
            f"conv: a kernel of shape {kernel.shape} takes inputs (batch, {rank} spatial, channels), "
            f"not {x.shape}"
        )
    if x.shape[-1] != kernel.shape[-2] * groups or kernel.shape[-1] % groups:
        raise UserError(
            f"conv: {x.shape[-1]} input channels, a kernel of shape {kernel.shape} and groups={groups} do "
            f"not agree; the kernel's last two dimensions are channels_in / groups and channels_out"
        )
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise UserError(f"conv: a bias of shape {bias.shape} for {kernel.shape[-1]} output channels")
    strides = tuple_of(strides, rank, "strides")
    dilation = tuple_of(dilation, rank, "dilation")
    sizes = window_sizes(kernel.shape[:-2], dilation)
    pads = pads_of(padding, x.shape[1:-1], sizes, strides)
    config = Config(
        strides,
        dilation,
        tuple(pads),
        groups,
        layout or Layout(),
        channel_mode,
        precision,
        preferred_element_type,
    )
    return _conv(x, kernel, bias, config=config)


def linear(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "channels_in channels_out"],
    bias: Float[Array, " channels_out"] | None = None,
    *,
    layout: Layout | None = None,
    channel_mode: ChannelMode | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial channels_out"]:
    """`x @ kernel + bias` over the last dimension, cut as a convolution with a window of one pixel.

    `channel_mode="gather"` cuts the kernel by columns (outputs), `"scatter"` by rows (inputs); by default
    whichever moves fewer bytes.

    Raises:
        UserError: shapes that do not agree.

    Example:
        >>> linear(jnp.ones((8, 16)), jnp.ones((16, 10))).shape
        (8, 10)
    """
    rank = x.ndim - 2
    kernel = kernel.reshape((1,) * rank + kernel.shape)
    return conv(
        x,
        kernel,
        bias,
        padding="VALID",
        layout=layout,
        channel_mode=channel_mode,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def window_sizes(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Rows that a dilated kernel spans in each dimension."""
    return tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))


@dataclass(frozen=True)
class ChannelPlan:
    """What happens to the channels of one convolution.

    Attributes:
        cut_in, cut_out: mesh axes that cut the input's and the output's channels.
        mode: `"gather"`: every device has the filters of its output channels and gathers all input
            channels; `"scatter"`: it has the filters' part for its input channels, and partial sums are
            reduce-scattered (all-reduced where the output's channels cannot be cut).
    """

    cut_in: Axes
    cut_out: Axes
    mode: ChannelMode

    @property
    def collective(self) -> str | None:
        """What moves: `"all-gather"`, `"reduce-scatter"`, `"all-reduce"` or nothing."""
        if not self.cut_in or (self.mode == "gather" and not self.cut_out):
            return None
        return "all-gather" if self.mode == "gather" else "reduce-scatter" if self.cut_out else "all-reduce"


def channel_plan(
    layout: Layout,
    mesh: AnyMesh | None,
    channels: tuple[int, int],
    pixels: tuple[int, int],
    groups: int = 1,
    mode: ChannelMode | None = None,
) -> ChannelPlan:
    """Chooses between gathering input channels and scattering partial sums: fewer bytes win.

    With `n` channel shards a gather moves `(n-1)/n * channels_in * pixels_in` values to each device, a
    reduce-scatter `(n-1)/n * channels_out * pixels_out`; the backward pass moves as many again.

    Args:
        layout, mesh: what cuts the channels.
        channels: input and output channels.
        pixels: input pixels a device computes from (halos included) and output pixels it computes, or
            just their ratio.
        groups: feature groups.
        mode: the choice, where the caller has made it.

    Raises:
        UserError: groups with cut channels that do not divide by the channel axis.
    """
    cut_in, cut_out = (layout.channel_cut(c, mesh) for c in channels)
    if groups > 1 and (cut_in or cut_out):
        shards = size(mesh, cut_in or cut_out)  # type: ignore[arg-type]
        if not cut_in or not cut_out or groups % shards:
            raise UserError(
                f"conv: groups={groups} with {channels[0]} -> {channels[1]} channels cannot be cut "
                f"{shards}-fold on the channel axis; use groups that divide by {shards}, or a layout with "
                f"channels=() for this layer"
            )
        return ChannelPlan((), cut_out, "gather")  # whole groups stay on a device
    if cut_in and not cut_out:
        return ChannelPlan(cut_in, (), "scatter")
    if mode is None:
        mode = "gather" if channels[0] * pixels[0] <= channels[1] * pixels[1] else "scatter"
    return ChannelPlan(cut_in, cut_out, mode if cut_in else "gather")


@functools.partial(jax.jit, static_argnames="config")
def _conv(x: Array, kernel: Array, bias: Array | None, config: Config) -> Array:
    layout, mesh = config.layout, active_mesh()
    names = spatial_names(x.ndim - 2)
    batch = layout.cut("batch", mesh)
    windows = []
    for dim, name in enumerate(names):
        extent, span = x.shape[dim + 1], window_sizes(kernel.shape[:-2], config.dilation)[dim]
        axes = layout.cut(name, mesh)
        window = Window(
            extent, span, config.strides[dim], config.pads[dim], size(mesh, axes) if mesh else 1, axes
        )
        if window.extent_out < 1:
            raise UserError(
                f"a window of {span} rows does not fit the {name} of {extent} with padding {window.pad}; "
                f"use padding='SAME' or a larger input"
            )
        windows.append(window)
    pixels = (
        math.prod(w.block_out if w.size == 1 else w.extent if w.shards == 1 else w.need for w in windows),
        math.prod(w.block_out for w in windows),
    )
    plan = channel_plan(layout, mesh, (x.shape[-1], kernel.shape[-1]), pixels, config.groups, config.mode)
    local_groups = config.groups // (size(mesh, plan.cut_out) if mesh and config.groups > 1 else 1)
    cut_x = plan.cut_out if config.groups > 1 else plan.cut_in
    kept = island.at_rest(layout, kernel.shape, -1 if plan.mode == "gather" else -2, mesh)
    kept_bias = island.at_rest(layout, kernel.shape[-1:], 0, mesh)
    vary = (*batch, *(a for w in windows for a in w.axes))

    space = [w.axes for w in windows]
    cuts_in, cuts_out = [batch, *space, cut_x], [batch, *space, plan.cut_out]
    extents_out = (x.shape[0], *(w.extent_out for w in windows), kernel.shape[-1])
    extents_in = x.shape

    def local(x: Array, kernel: Array, bias: Array | None) -> Array:
        x = island.real(x, extents_in, cuts_in, mesh)
        kernel = island.gather(kernel, kept, layout, vary)
        strides = list(config.strides)
        pads = [(0, 0)] * len(windows)
        for dim, window in enumerate(windows):
            if window.shards == 1 and window.size > 1:  # the convolution pads: cheaper, and not sent
                pads[dim] = window.pad
                continue
            x = exchange(x, dim + 1, window, grouped=island.grouped(mesh))
            if window.size == 1 and window.stride > 1:  # move only the rows that are used
                x = lax.slice_in_dim(x, 0, None, window.stride, axis=dim + 1)
                strides[dim] = 1
        if plan.collective == "all-gather":
            x = lax.all_gather(x, plan.cut_in, axis=x.ndim - 1, tiled=True)
        y = kernels.direct(
            x,
            kernel,
            strides=strides,
            dilation=config.dilation,
            padding=pads,
            groups=local_groups,
            precision=config.precision,
            preferred_element_type=config.preferred_element_type,
        )
        if plan.collective == "reduce-scatter":
            y = lax.psum_scatter(y, plan.cut_in, scatter_dimension=y.ndim - 1, tiled=True)
        elif plan.collective == "all-reduce":
            y = lax.psum(y, plan.cut_in)
        y = y if bias is None else y + island.gather(bias, kept_bias, layout, vary)
        return island.real(y, extents_out, cuts_out, mesh)

    if mesh is None:
        return checkpoint_name(local(x, kernel, bias), CONTRACTION)
    y = island.run(
        local,
        mesh,
        (spec(cuts_in), kept, None if bias is None else kept_bias),
        spec(cuts_out),
        island.pad_to(x, [island.even(n, cut, mesh) for n, cut in zip(x.shape, cuts_in, strict=True)]),
        kernel,
        bias,
    )
    return checkpoint_name(island.crop_to(y, extents_out), CONTRACTION)
