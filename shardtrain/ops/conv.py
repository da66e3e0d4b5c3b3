"""Convolution on arrays that are cut on batch, space and channels together."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.kernels import conv as kernels
from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, chosen, spatial_names
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.arguments import Padding, mode_of, pads_of, tuple_of
from shardtrain.ops.channels import ChannelMode, ChannelPlan, Straddle, channel_plan, straddle
from shardtrain.ops.contraction import ContractionPlan
from shardtrain.ops.halo import block, exchange
from shardtrain.ops.window import Window, check_fits


@dataclass(frozen=True)
class ConvSettings:
    """The static arguments of a convolution, checked, with one entry for every spatial dimension."""

    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    padding_mode: str
    groups: int
    layout: Layout
    channel_mode: ChannelMode | None = None
    precision: lax.PrecisionLike = None
    preferred_element_type: DTypeLike | None = None
    algorithm: str = "auto"
    implementation: str | None = None


def conv(
    x: Float[Array, "batch *spatial channels_in"],
    kernel: Float[Array, "*window channels_per_group channels_out"],
    bias: Float[Array, " channels_out"] | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    algorithm: str = "auto",
    implementation: str | None = None,
    layout: Layout | None = None,
    channel_mode: ChannelMode | None = None,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "batch *spatial_out channels_out"]:
    """Convolution in 1, 2 or 3 dimensions, channels last, with the same numbers on every mesh.

    Without a mesh this is `lax.conv_general_dilated`. Inside `with jax.set_mesh(mesh):` it runs as one
    `shard_map` with explicit communication: spatial neighbours exchange halo rows, corners included; on the
    channel axis either the input's channels are gathered or partial sums are reduce-scattered; the kernel's
    gradient is summed once over all axes that cut the batch or the pixels. Extents need not divide by the
    axes. On a mesh only reverse-mode gradients (`jax.grad`, of any order) are available, as for the
    normalizations and `reshard`.

    Args:
        x: input; the leading dimension is the batch.
        kernel: filters in Flax's layout.
        bias: added to every output pixel.
        strides: of the window, one number or one per spatial dimension.
        padding: as in Flax: `"SAME"`, `"VALID"`, `"CAUSAL"` (1-D), `"CIRCULAR"`, `"REFLECT"`, a number, or
            `(before, after)` per dimension.
        dilation: of the kernel.
        input_dilation: of the input, see `conv_transpose`.
        groups: feature groups. Where channels are cut and the groups divide by the channel axis, every
            device has whole groups and gathers nothing; where the axis divides by the groups, the devices
            that share a group gather its channels; otherwise every device gathers all channels.
        algorithm: how each device computes its part of the output and of both gradients, see below.
        implementation: of Winograd's algorithm: `"mosaic"` (Mosaic GPU: Hopper, Blackwell), `"triton"`
            (NVIDIA from Ampere on), `"xla"` (plain JAX, everywhere), or None for the first that supports the
            device and the arguments. The two GPU kernels take float32, bfloat16 and float16 in 1 and 2
            dimensions without groups; they compute float32 as TF32 or, with `precision="high"`, as three
            products of TF32. Their gradients cannot be differentiated again.
        layout: which mesh axes cut what; by name by default.
        channel_mode: `"gather"` or `"scatter"`, see `channel_plan`; by default whichever sends fewer bytes.
        precision: of the products, as in `lax.conv_general_dilated`.
        preferred_element_type: of the sums and the output, as in `lax.conv_general_dilated`.

    The algorithms are `"direct"` (`lax.conv_general_dilated`), `"im2col"` (one matrix product on a copy of
    the input of `prod(window)` times its size), `"fft"` (Fourier transforms of tiles, for large windows and
    stride 1) and `"winograd"` (windows up to 7, stride 1). `"auto"` chooses for the output and for each
    gradient the one that was measured to be the fastest on this kind of device, or that a cost model
    predicts to be; `"direct"` where neither is available. `explain_conv` shows the choice and the reasons.

    All algorithms give the same numbers up to rounding. Winograd's errors in float32 are those of the others
    for windows of 3 and four times those for windows of 5; in bfloat16 they are 0.4 % for windows of 3, for
    which F(2, 3) is used, and 4 % for windows of 5; on GPUs its products are TF32, see `precision`. Where
    `"direct"` gives NaN or infinity so do all others: `"im2col"` in the same outputs, `"winograd"` and
    `"fft"` in up to all outputs of the tiles that contain the pixel. Only `"direct"` has forward-mode
    gradients.

    Returns:
        The output, cut as the input is.

    Raises:
        UserError: shapes that do not agree, a window larger than the padded input, or an algorithm that does
            not support the arguments.

    Example:
        >>> x, kernel = jnp.ones((2, 7, 8, 4)), jnp.ones((3, 3, 4, 6))
        >>> with jax.set_mesh(st.make_mesh("data=2,height=2,channel=2")):
        ...     st.ops.conv(x, kernel, strides=2).shape
        (2, 4, 4, 6)

    References:
        Dryden et al., Improving Strong-Scaling of CNN Training by Exploiting Finer-Grained Parallelism,
        IPDPS 2019; Channel and Filter Parallelism for Large-Scale CNN Training, SC 2019.
    """
    settings = conv_settings(
        x,
        kernel,
        bias,
        strides=strides,
        padding=padding,
        dilation=dilation,
        input_dilation=input_dilation,
        groups=groups,
        algorithm=algorithm,
        implementation=implementation,
        layout=layout,
        channel_mode=channel_mode,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return convolve(x, kernel, bias, settings=settings)


def conv_settings(
    x: Any,
    kernel: Any,
    bias: Any = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    groups: int = 1,
    algorithm: str = "auto",
    implementation: str | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> ConvSettings:
    """Checks the arguments of `conv`; of `x`, `kernel` and `bias` only shapes and types are read."""
    check("conv", x, kernel, bias, groups)
    rank = kernel.ndim - 2
    strides = tuple_of(strides, rank, "strides")
    dilation = tuple_of(dilation, rank, "dilation")
    input_dilation = tuple_of(input_dilation, rank, "input_dilation")
    if reason := kernels.refused(algorithm, kernel.shape[:-2], strides, implementation):
        raise UserError(f"conv: {reason}")
    sizes = kernels.window_sizes(kernel.shape[:-2], dilation)
    mode = mode_of(padding)
    if mode != "constant" and max(input_dilation, default=1) > 1:
        raise UserError(f"conv: padding={padding!r} with input_dilation; use conv_transpose for a ring")
    extents = kernels.window_sizes(x.shape[1:-1], input_dilation)
    return ConvSettings(
        strides,
        dilation,
        input_dilation,
        tuple(pads_of(padding, extents, sizes, strides)),
        mode,
        groups,
        chosen(layout),
        algorithm=algorithm,
        implementation=implementation,
        **others,
    )


def check(what: str, x: Any, kernel: Any, bias: Any, groups: int) -> None:
    """Refuses shapes, types and groups that do not agree; `what` is the operator's name."""
    rank = kernel.ndim - 2
    if rank < 0:
        raise UserError(f"{what}: a kernel of shape {kernel.shape}; it must be (*window, channels, channels)")
    if x.ndim != rank + 2:
        raise UserError(
            f"{what}: a kernel of shape {kernel.shape} takes inputs (batch, {rank} spatial, channels), "
            f"not {x.shape}"
        )
    if 0 in kernel.shape[:-2]:
        raise UserError(f"{what}: a kernel of shape {kernel.shape} has a window without a pixel")
    if x.dtype != kernel.dtype:
        raise UserError(
            f"{what}: an input of {x.dtype} and a kernel of {kernel.dtype}; cast one with .astype(...)"
        )
    if (
        not isinstance(groups, int)
        or groups < 1
        or x.shape[-1] != kernel.shape[-2] * groups
        or kernel.shape[-1] % groups
    ):
        raise UserError(
            f"{what}: {x.shape[-1]} input channels, a kernel of shape {kernel.shape} and groups={groups} do "
            f"not agree; the kernel's last two dimensions are channels_in / groups and channels_out"
        )
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise UserError(f"{what}: a bias of shape {bias.shape} for {kernel.shape[-1]} output channels")


@functools.partial(jax.jit, static_argnames="settings")
def convolve(x: Array, kernel: Array, bias: Array | None, settings: ConvSettings) -> Array:
    """Any convolution, transposed ones included, as one island; `settings` have been checked."""
    return _plan(x, kernel, settings)(x, kernel, bias)


@dataclass(frozen=True)
class ConvolutionPlan(ContractionPlan):
    """One convolution on one mesh.

    Attributes:
        settings: of the convolution.
        shards: devices among which the groups are divided, 1 without groups.
        straddle: what devices compute where groups and shards of the channels do not line up, else None.
        duals: windows of the convolution that gives the input's gradient, none where `jax.vjp` of the
            forward pass is better; see `_duals`.
    """

    settings: ConvSettings
    shards: int
    straddle: Straddle | None
    duals: tuple[Window, ...]

    @property
    def local_groups(self) -> int:
        """Groups that one device computes: its share of them, or the one that it shares."""
        return max(1, self.settings.groups // self.shards)

    @property
    def teams(self) -> list[list[int]] | None:
        """The devices that share a group and gather its channels; None for all devices of the axes."""
        n = self.channels.sharing
        if self.settings.groups == 1 or n == 1 or self.straddle is not None:
            return None
        return [list(range(first, first + n)) for first in range(0, self.shards, n)]

    def contract(self, x: Array, kernel: Array) -> Array:
        if self.duals:
            return contract_dually(self, *compat.match_varying(x, kernel))
        x = self.gather_inputs(x)
        y = self.product(x, kernel) if self.straddle is None else self._straddling(self.straddle, x, kernel)
        return self.channels.summed(y)

    def gather_inputs(self, x: Array) -> Array:
        """The pixels and channels that this device's outputs are computed from."""
        return self.channels.gathered(self.with_halos(x, self.windows), self.teams)

    def with_halos(self, x: Array, windows: Sequence[Window]) -> Array:
        """This device's block with the rows that its outputs need of other devices' blocks."""
        for dim, window in enumerate(windows, start=1):
            if _pads(window):
                continue
            x = exchange(x, dim, window, grouped=island.grouped(self.mesh))
            if window.dilation > 1 and len(set(window.phases)) > 1:
                x = _dilated(x, dim, window)
            elif window.size == 1 and window.stride > 1:  # move only the rows that are used
                x = lax.slice_in_dim(x, 0, None, window.stride, axis=dim)
        return x

    def product(
        self, x: Array, kernel: Array, windows: Sequence[Window] | None = None, groups: int | None = None
    ) -> Array:
        """What a device computes of its gathered inputs, with its own windows and groups by default."""
        return kernels.conv(
            x,
            kernel,
            **_steps(self.windows if windows is None else windows),
            algorithm=self.settings.algorithm,
            implementation=self.settings.implementation,
            dilation=self.settings.dilation,
            groups=self.local_groups if groups is None else groups,
            precision=self.settings.precision,
            preferred_element_type=self.settings.preferred_element_type,
        )

    def _straddling(self, straddle: Straddle, x: Array, kernel: Array) -> Array:
        """Whole groups from gathered inputs, of which this device keeps its own output channels."""
        axes, outputs = self.channels.cut_out, self.kernel_shape[-1]
        x = block(x, x.ndim - 1, straddle.inputs, straddle.groups * kernel.shape[-2], axes)
        room = straddle.groups * (outputs // self.settings.groups)
        kernel = _among(kernel, straddle.outputs, room, axes)
        y = self.product(x, kernel, groups=straddle.groups)
        return block(y, y.ndim - 1, straddle.outputs, outputs // self.shards, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract_dually(plan: ConvolutionPlan, x: Array, kernel: Array) -> Array:
    """`ConvolutionPlan.contract` whose input gradient is a convolution with the plan's `duals`."""
    return _forward(plan, x, kernel)[0]


def _forward(plan: ConvolutionPlan, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    x = plan.gather_inputs(x)
    return plan.product(x, kernel), (x, kernel)


def _backward(plan: ConvolutionPlan, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    (dkernel,) = jax.vjp(functools.partial(plan.product, x), kernel)[1](dy)
    mirrored = kernels.transposed(kernel, plan.local_groups)
    dx = plan.product(plan.with_halos(dy, plan.duals), mirrored, plan.duals)
    return plan.channels.scattered(dx), dkernel


contract_dually.defvjp(_forward, _backward)


def _plan(x: Array, kernel: Array, settings: ConvSettings) -> ConvolutionPlan:
    """Decides what every device does, from shapes, settings and the active mesh alone."""
    layout, mesh, groups = settings.layout, active_mesh(), settings.groups
    windows = _windows(x, kernel, settings, mesh)
    pixels = (
        math.prod(w.block_out if w.size == 1 else w.extent if w.shards == 1 else w.need for w in windows),
        math.prod(w.block_out for w in windows),
    )
    channels = x.shape[-1], kernel.shape[-1]
    moves = channel_plan(layout, mesh, channels, pixels, groups, settings.channel_mode)
    shards = size(mesh, moves.cut_out) if mesh is not None and groups > 1 else 1
    return ConvolutionPlan(
        layout,
        mesh,
        windows,
        moves,
        shape=x.shape,
        kernel_shape=kernel.shape,
        pixel_dims=0,
        settings=settings,
        shards=shards,
        straddle=straddle(groups, shards, *channels) if moves.straddle else None,
        duals=tuple(_duals(windows, settings, moves, channels)),
    )


def _duals(
    windows: Sequence[Window], settings: ConvSettings, plan: ChannelPlan, channels: tuple[int, int]
) -> list[Window]:
    """Windows of the convolution that gives the input's gradient; none where `jax.vjp` is better.

    With them, devices exchange halos of the output's gradient, and each computes the input gradient of its
    own rows. `jax.vjp` of the forward pass instead computes the gradient of halo rows too, on every device
    that received them, and sends it back to their owner.
    """
    simple = settings.padding_mode == "constant" and settings.preferred_element_type is None
    if not simple or plan.straddle or plan.mode == "scatter" or (settings.groups > 1 and plan.sharing > 1):
        return []
    duals = []
    for w in windows:
        low = w.size - 1 - w.pad[0]
        high = (w.extent - 1) * w.dilation + w.size - 1 - (w.extent_out - 1) * w.stride - low
        dual = Window(w.extent_out, w.size, w.dilation, (low, high), w.shards, w.axes, w.stride)
        if dual.extent_out != w.extent or len(set(dual.phases)) > 1:
            return []
        duals.append(dual)

    def rows(windows: Sequence[Window], channels: int) -> int:
        blocks = [w.block_in for w in windows]
        halos = [sum(w.halo) * math.prod(blocks) // n for w, n in zip(windows, blocks, strict=True)]
        return sum(halos) * channels

    back = rows(windows, channels[0])
    return duals if 0 < rows(duals, channels[1]) <= back else []


def _among(kernel: Array, starts: tuple[int, ...], channels: int, axes: Axes) -> Array:
    """This device's filters at their index among `channels` output channels, zeros elsewhere."""
    if len(starts) == 1:
        return kernel
    room = lax.pcast(jnp.zeros((*kernel.shape[:-1], channels), kernel.dtype), axes, to="varying")
    start = jnp.asarray(starts, jnp.int32)[lax.axis_index(axes)]
    return lax.dynamic_update_slice_in_dim(room, kernel, start, kernel.ndim - 1)


def _windows(x: Array, kernel: Array, settings: ConvSettings, mesh: AnyMesh | None) -> tuple[Window, ...]:
    """The window of every spatial dimension with the mesh axes that cut it."""
    found = []
    for dim, name in enumerate(spatial_names(x.ndim - 2)):
        span = kernels.window_sizes(kernel.shape[:-2], settings.dilation)[dim]
        axes = settings.layout.cut(name, mesh)
        window = Window(
            x.shape[dim + 1],
            span,
            settings.strides[dim],
            settings.pads[dim],
            size(mesh, axes) if mesh is not None else 1,
            axes,
            settings.input_dilation[dim],
            settings.padding_mode,
        )
        check_fits(window, name)
        found.append(window)
    return tuple(found)


def _pads(window: Window) -> bool:
    """Whether the kernel itself pads this dimension, which is cheaper than padding the block."""
    alone = window.shards == 1 and window.mode == "constant"
    return alone and (window.size > 1 or window.dilation > 1)


def _steps(windows: Sequence[Window]) -> dict[str, Any]:
    """Strides, input dilation and padding that the kernel applies after `with_halos`."""
    strides, dilation, pads = [], [], []
    for w in windows:
        strides.append(1 if w.size == 1 and w.dilation == 1 and not _pads(w) else w.stride)
        written_out = not _pads(w) and len(set(w.phases)) > 1
        dilation.append(1 if written_out else w.dilation)
        pads.append(w.pad if _pads(w) else (0, 0) if w.dilation == 1 or written_out else _margins(w))
    return {"strides": strides, "input_dilation": dilation, "padding": pads}


def _margins(window: Window) -> tuple[int, int]:
    """Padding of a shard's dilated rows such that its first window starts at the first padded row."""
    rows = (window.block_out - 1) * window.stride + window.size
    return -min(window.phases), rows + max(window.phases) - (window.need - 1) * window.dilation - 1


def _dilated(x: Array, dim: int, window: Window) -> Array:
    """The block with its dilation zeros inserted, for shards whose windows start at different phases."""
    low, high = _margins(window)
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (low, max(0, high), window.dilation - 1)
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    rows = (window.block_out - 1) * window.stride + window.size
    return block(x, dim, tuple(low + phase for phase in window.phases), rows, window.axes)
