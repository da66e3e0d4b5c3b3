"""Which collectives a convolution or linear map needs where its channels are cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jax import Array, lax

from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Axes, Layout
from shardtrain.mesh import size

ChannelMode = Literal["gather", "scatter"]


@dataclass(frozen=True)
class ChannelPlan:
    """How a convolution or linear map communicates over the mesh axes that cut its channels.

    Attributes:
        cut_in, cut_out: mesh axes that cut the input's and the output's channels.
        mode: `"gather"`: the kernel is cut by output channels, and every device gathers all input channels;
            `"scatter"`: the kernel is cut by input channels, and partial sums are reduce-scattered, or
            all-reduced where the output's channels cannot be cut.
        sharing: how many neighbouring devices share the channels of one group: all of them without groups,
            1 if every device has whole groups.
        straddle: whether groups begin or end inside the channels of a device. Every device then gathers all
            input channels and computes all groups that its output channels belong to.
    """

    cut_in: Axes
    cut_out: Axes
    mode: ChannelMode
    sharing: int
    straddle: bool = False

    @property
    def collective(self) -> str | None:
        """The collective of the forward pass: `"all-gather"`, `"reduce-scatter"`, `"all-reduce"` or None."""
        if not self.cut_in or self.sharing == 1:
            return None
        return "all-gather" if self.mode == "gather" else "reduce-scatter" if self.cut_out else "all-reduce"

    @property
    def kernel_dim(self) -> int:
        """Dimension of the kernel that is cut by the channel axes: its outputs (-1) or its inputs (-2)."""
        return -1 if self.mode == "gather" else -2

    def gathered(self, x: Array, groups: Sequence[Sequence[int]] | None = None) -> Array:
        """The input with the channels that this device's filters need, gathered from `groups` of devices."""
        if self.collective != "all-gather":
            return x
        to = "varying" if self.cut_out else "invarying"
        return lax.all_gather(x, self.cut_in, axis=x.ndim - 1, tiled=True, axis_index_groups=groups, to=to)

    def scattered(self, dx: Array) -> Array:
        """The transpose of `gathered` without groups: the gradient of its input from that of its result."""
        if self.collective != "all-gather":
            return dx
        return lax.psum_scatter(dx, self.cut_in, scatter_dimension=dx.ndim - 1, tiled=True)

    def summed(self, y: Array) -> Array:
        """This device's output channels, from the output or partial sums of its kernel."""
        if self.collective == "reduce-scatter":
            return lax.psum_scatter(y, self.cut_in, scatter_dimension=y.ndim - 1, tiled=True)
        return lax.psum(y, self.cut_in) if self.collective == "all-reduce" else y


def channel_plan(
    layout: Layout,
    mesh: AnyMesh | None,
    channels: tuple[int, int],
    pixels: tuple[int, int],
    groups: int = 1,
    mode: ChannelMode | None = None,
) -> ChannelPlan:
    """Chooses the collective that sends fewer bytes: a gather of inputs, or a scatter of partial sums.

    With `n` channel shards a gather moves `(n-1)/n * channels_in * pixels_in` values to each device, a
    reduce-scatter `(n-1)/n * channels_out * pixels_out`; the backward pass moves as many again.

    Args:
        layout: which mesh axes cut the channels.
        mesh: the mesh, None on one device.
        channels: input and output channels.
        pixels: input pixels that a device reads, halos included, and output pixels that it computes; only
            their ratio counts.
        groups: feature groups.
        mode: `"gather"` or `"scatter"` instead of the choice by bytes.

    Returns:
        The plan. Channels that do not divide by their axes are not cut.

    Raises:
        UserError: an unknown mode.

    Example:
        >>> plan = st.ops.channel_plan(st.Layout(), st.make_mesh("channel=8"), (64, 128), (100, 100))
        >>> plan.mode, plan.collective
        ('gather', 'all-gather')

    References:
        Dryden et al., Channel and Filter Parallelism for Large-Scale CNN Training, SC 2019.
    """
    if mode not in (None, "gather", "scatter"):
        raise UserError(f"channel_mode={mode!r}; use 'gather', 'scatter' or None for the fewer bytes")
    cut_in, cut_out = (layout.channel_cut(c, mesh) for c in channels)
    cut = cut_in or cut_out
    shards = size(mesh, cut) if mesh is not None and cut else 1
    if groups > 1 and cut:
        if cut_in and cut_out and (groups % shards == 0 or shards % groups == 0):
            return ChannelPlan(cut_in, cut_out, "gather", max(1, shards // groups))
        return ChannelPlan(cut_in, cut_out, "gather", shards, straddle=True)
    if cut_in and not cut_out:
        return ChannelPlan(cut_in, (), "scatter", shards)
    if mode is None:
        mode = "gather" if channels[0] * pixels[0] <= channels[1] * pixels[1] else "scatter"
    return ChannelPlan(cut_in, cut_out, mode if cut_in else "gather", shards)


@dataclass(frozen=True)
class Straddle:
    """Which groups every device computes where groups and the shards of the channels do not line up.

    Attributes:
        groups: how many groups each device computes.
        inputs: for every device, the first input channel of its groups.
        outputs: for every device, the index of its first output channel among those of its groups.
    """

    groups: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def straddle(groups: int, shards: int, channels_in: int, channels_out: int) -> Straddle:
    """The `Straddle` of `groups` over `shards` devices."""
    mine, per_group = channels_out // shards, channels_out // groups
    first = [i * mine // per_group for i in range(shards)]
    last = [((i + 1) * mine - 1) // per_group for i in range(shards)]
    most = max(b - a for a, b in zip(first, last, strict=True)) + 1
    first = [min(a, groups - most) for a in first]
    inputs = tuple(a * channels_in // groups for a in first)
    return Straddle(most, inputs, tuple(i * mine - a * per_group for i, a in enumerate(first)))
