"""Normalizations of each example by itself, with the same statistics on every mesh."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island
from shardtrain.ops.norm import check_affine, checked_mask, mask_cuts

Moments = Literal["fast", "two passes", "square alone"]
"""How the variance is found: from the mean square, from deviations, or as the mean square itself."""


@dataclass(frozen=True)
class _Options:
    """What a normalization of each example normalizes.

    Attributes:
        groups: of channels.
        pixels: whether the statistics are over all pixels, or of each pixel.
        moments: how the variance is found.
        epsilon: added to the variance.
        layout: which mesh axes cut what.
    """

    groups: int
    pixels: bool
    moments: Moments
    epsilon: float
    layout: Layout


def group_norm(
    x: Float[Array, "batch *spatial channels"],
    groups: int,
    scale: Float[Array, " _"] | None = None,
    bias: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
    mask: Bool[Array, "..."] | None = None,
    use_fast_variance: bool = True,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial channels"]:
    """Normalizes each group of channels of each example over all its pixels.

    The forward and the backward pass each all-reduce two sums per example and group, over the axes that cut
    pixels and, where a group's channels are on several devices, over those that cut channels.

    Args:
        x: input.
        groups: number of groups, which must divide the channels.
        scale: multiplies the normalized input, if given; one number per channel.
        bias: added after the scale, if given; one number per channel.
        epsilon: added to the variance.
        mask: True for values that count in the statistics; it broadcasts against `x`. Statistics of no value
            at all are NaN, as in Flax.
        use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, or `E[(x - E[x])^2]`, which takes a
            second pass and keeps its digits where the mean is large.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: channels that do not divide by the groups; scale or bias of another size; a mask
            that does not broadcast against the input.

    Example:
        >>> st.ops.group_norm(jnp.ones((8, 4, 4, 6)), groups=3).shape
        (8, 4, 4, 6)

    References:
        Wu and He, Group Normalization, ECCV 2018.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise UserError(f"group_norm: {channels} channels do not divide into {groups} groups")
    moments: Moments = "fast" if use_fast_variance else "two passes"
    options = _Options(groups, True, moments, epsilon, chosen(layout))
    return _checked("group_norm", x, scale, bias, mask, options)


def instance_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " _"] | None = None,
    bias: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
    mask: Bool[Array, "..."] | None = None,
    use_fast_variance: bool = True,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial channels"]:
    """Normalizes each channel of each example over all its pixels: `group_norm` with one channel a group.

    Args:
        x: input.
        scale: multiplies the normalized input, if given; one number per channel.
        bias: added after the scale, if given; one number per channel.
        epsilon: added to the variance.
        mask: True for values that count in the statistics; it broadcasts against `x`. Statistics of no value
            at all are NaN, as in Flax.
        use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, or `E[(x - E[x])^2]`, which takes a
            second pass and keeps its digits where the mean is large.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: scale or bias of another size, or a mask that does not broadcast against the input.

    Example:
        >>> st.ops.instance_norm(jnp.ones((8, 4, 4, 6))).shape
        (8, 4, 4, 6)

    References:
        Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016.
    """
    return group_norm(
        x,
        x.shape[-1],
        scale,
        bias,
        epsilon=epsilon,
        mask=mask,
        use_fast_variance=use_fast_variance,
        layout=layout,
    )


def layer_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " _"] | None = None,
    bias: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
    mask: Bool[Array, "..."] | None = None,
    use_fast_variance: bool = True,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial channels"]:
    """Normalizes every pixel of every example over its channels.

    Where channels are cut, the forward and the backward pass each all-reduce two sums per pixel over their
    axes; otherwise nothing is sent.

    Args:
        x: input.
        scale: multiplies the normalized input, if given; one number per channel.
        bias: added after the scale, if given; one number per channel.
        epsilon: added to the variance.
        mask: True for values that count in the statistics; it broadcasts against `x`. Statistics of no value
            at all are NaN, as in Flax.
        use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, or `E[(x - E[x])^2]`, which takes a
            second pass and keeps its digits where the mean is large.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: scale or bias of another size, or a mask that does not broadcast against the input.

    Example:
        >>> st.ops.layer_norm(jnp.ones((8, 16))).shape
        (8, 16)

    References:
        Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    moments: Moments = "fast" if use_fast_variance else "two passes"
    return _checked("layer_norm", x, scale, bias, mask, _Options(1, False, moments, epsilon, chosen(layout)))


def rms_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
    mask: Bool[Array, "..."] | None = None,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial channels"]:
    """Divides every pixel of every example by the root of the mean square of its channels.

    Where channels are cut, the forward and the backward pass each all-reduce one sum per pixel over their
    axes; otherwise nothing is sent.

    Args:
        x: input.
        scale: multiplies the normalized input, if given; one number per channel.
        epsilon: added to the mean square.
        mask: True for values that count in the mean; it broadcasts against `x`. The mean of no value at all
            is NaN, as in Flax.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: a scale of another size, or a mask that does not broadcast against the input.

    Example:
        >>> st.ops.rms_norm(jnp.ones((8, 16))).shape
        (8, 16)

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019.
    """
    options = _Options(1, False, "square alone", epsilon, chosen(layout))
    return _checked("rms_norm", x, scale, None, mask, options)


def _checked(
    what: str, x: Array, scale: Array | None, bias: Array | None, mask: Array | None, options: _Options
) -> Array:
    check_affine(what, x, scale, bias)
    return _by_example(x, scale, bias, checked_mask(what, x, mask), options)


@functools.partial(jax.jit, static_argnames="options")
def _by_example(
    x: Array, scale: Array | None, bias: Array | None, mask: Array | None, options: _Options
) -> Array:
    mesh = active_mesh()
    out_dtype = jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
    plan = _ExampleNorm(options, mesh, x.shape, out_dtype)
    if mesh is None:
        return plan.on_device(x, scale, bias, mask)
    cut, stored = spec(plan.cuts), plan.affine_spec
    specs = [cut, None if scale is None else stored, None if bias is None else stored, None]
    if mask is not None:
        cuts = mask_cuts(mask, plan.cuts)
        specs[-1], mask = spec(cuts), island.pad_to_blocks(mask, cuts, mesh)
    x_blocks = island.pad_to_blocks(x, plan.cuts, mesh)
    y = island.run(plan.on_device, mesh, tuple(specs), cut, x_blocks, scale, bias, mask)
    return island.crop_to(y, x.shape)


@dataclass(frozen=True)
class _ExampleNorm:
    """Normalization of each example over groups of channels, on one mesh.

    Attributes:
        options: what is normalized, and what cuts it.
        mesh: the mesh.
        shape: of the global input.
        out_dtype: of the output; statistics are in at least float32.
    """

    options: _Options
    mesh: AnyMesh | None
    shape: tuple[int, ...]
    out_dtype: jnp.dtype

    @property
    def space(self) -> list[Axes]:
        """Axes that cut every spatial dimension."""
        return [self.options.layout.cut(name, self.mesh) for name in spatial_names(len(self.shape) - 2)]

    @property
    def channel_axes(self) -> Axes:
        """Axes that cut the channels."""
        return self.options.layout.channel_cut(self.shape[-1], self.mesh)

    @property
    def cuts(self) -> list[Axes]:
        """Axes that cut every dimension of input and output."""
        return [self.options.layout.cut("batch", self.mesh), *self.space, self.channel_axes]

    @property
    def affine_spec(self) -> P:
        """How scale and bias are stored."""
        return island.stored_spec(self.options.layout, self.shape[-1:], 0, self.mesh)

    @property
    def local_channels(self) -> int:
        """Channels of one device."""
        return self.shape[-1] // (size(self.mesh, self.channel_axes) if self.mesh is not None else 1)

    @property
    def per_group(self) -> int:
        """Channels of one group."""
        return self.shape[-1] // self.options.groups

    @property
    def whole_groups(self) -> bool:
        """Whether all channels of a group are on one device."""
        return self.local_channels % self.per_group == 0

    def on_device(self, x: Array, scale: Array | None, bias: Array | None, mask: Array | None) -> Array:
        """One device's block of the output."""
        wide = island.mask_padding(x, self.shape, self.cuts, self.mesh)
        wide = wide.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = self._statistics(wide, None if mask is None else self._counts(x, mask))
        inverse = lax.rsqrt(var + self.options.epsilon)
        scale, bias = (None if p is None else self._gather(p) for p in (scale, bias))
        y = (wide if mean is None else wide - mean) * (inverse if scale is None else inverse * scale)
        y = y if bias is None else y + bias
        return island.mask_padding(y, self.shape, self.cuts, self.mesh).astype(self.out_dtype)

    def _gather(self, parameter: Array) -> Array:
        varying = tuple(axis for axes in self.cuts[:-1] for axis in axes)
        return island.gather(parameter, self.affine_spec, self.options.layout, varying)

    def _counts(self, x: Array, mask: Array) -> Array:
        """The mask of every value of this device's block.

        Rows of padding that are summed do not count. Those that have statistics of their own count: with
        nothing to count they would have NaN, which the gradient of the scale sums over all rows.
        """
        own: list[Axes] = [self.cuts[0], *self.space, ()]
        summed: list[Axes] = [()] * len(own)
        if self.options.pixels:
            own, summed = [self.cuts[0], *[()] * (x.ndim - 1)], [(), *self.space, ()]
        counts = jnp.broadcast_to(mask, x.shape)
        counts = island.mask_padding(counts, self.shape, summed, self.mesh)
        return island.mask_padding(counts, self.shape, own, self.mesh, fill=1.0)

    def _statistics(self, x: Array, counts: Array | None) -> tuple[Array | None, Array]:
        """Mean (None for zero) and variance of the group of every channel of this device."""
        x = x if counts is None else jnp.where(counts, x, 0)
        if self.options.moments == "square alone":
            return None, self._means([x**2], counts)[0][0]
        if self.options.moments == "fast":
            (mean, square), _ = self._means([x, x**2], counts)
            return mean, jnp.maximum(0, square - mean**2)
        (mean,), count = self._means([x], counts)
        if counts is None:
            deviation = island.mask_padding(x - mean, self.shape, self.cuts, self.mesh)
        else:
            deviation = jnp.where(counts, x - mean, 0)
        return mean, self._totals((deviation**2)[None])[0] / count

    def _means(self, values: Sequence[Array], counts: Array | None) -> tuple[list[Array], Array | int]:
        """The means over the group of every channel of this device, and of how many values they are.

        `values` are zero where none counts.
        """
        if counts is None:
            count = self.per_group * (math.prod(self.shape[1:-1]) if self.options.pixels else 1)
            return list(self._totals(jnp.stack(values)) / count), count
        *totals, number = self._totals(jnp.stack([*values, counts.astype(values[0].dtype)]))
        return [total / number for total in totals], number

    def _totals(self, sums: Array) -> Array:
        """The sums over the group of every channel of this device, in all of its dimensions but the first."""
        if self.options.pixels and sums.ndim > 3:
            sums = sums.sum(tuple(range(2, sums.ndim - 1)), keepdims=True)
        if self.whole_groups:
            mine = self.local_channels // self.per_group
            sums = self._over_devices(sums.reshape(*sums.shape[:-1], mine, self.per_group).sum(-1))
            return jnp.repeat(sums, self.per_group, axis=-1)
        member = self._membership(sums.dtype)
        sums = self._over_devices(jnp.matmul(sums, member, precision="highest"))
        return jnp.matmul(sums, member.T, precision="highest")

    def _membership(self, dtype: jnp.dtype) -> Array:
        """`(channels, groups)`: 1 where this device's channel belongs to the group."""
        first = lax.axis_index(self.channel_axes) * self.local_channels
        channels = (first + jnp.arange(self.local_channels))[:, None]
        return (channels // self.per_group == jnp.arange(self.options.groups)).astype(dtype)

    def _over_devices(self, sums: Array) -> Array:
        """Sums over all devices that share a group and, if the statistics are over pixels, an example.

        The result counts as varying over those axes at once, so that the gradient is summed for each group
        and not for each channel.
        """
        across = tuple(axis for axes in self.space for axis in axes) if self.options.pixels else ()
        axes = (*across, *(() if self.whole_groups else self.channel_axes))
        return lax.pcast(lax.psum(sums, axes), axes, to="varying") if axes else sums
