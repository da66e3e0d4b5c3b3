"""Normalization layers whose statistics are the same on every mesh."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Axes, Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.mesh import size
from shardtrain.ops import island


@dataclass(frozen=True)
class _Sums:
    """What a normalization sums over: mesh axes and, on each device, dimensions of its block."""

    axes: tuple[str, ...]
    dims: tuple[int, ...]
    epsilon: float

    def over_devices(self, x: Array) -> Array:
        return lax.psum(x, self.axes) if self.axes else x


def batch_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-5,
    examples: Bool[Array, " batch"] | None = None,
    layout: Layout | None = None,
) -> tuple[Float[Array, "batch *spatial channels"], Float[Array, " channels"], Float[Array, " channels"]]:
    """Normalizes every channel by its mean and variance over the whole batch and all pixels.

    The forward and the backward pass each all-reduce `2 * channels` numbers once, over all axes that cut
    batch and pixels. The variance is `E[x^2] - E[x]^2` in at least float32, as Flax computes it.

    Args:
        x: input.
        scale: multiplies the normalized input, if given.
        bias: added after the scale, if given.
        epsilon: added to the variance.
        examples: True for real examples. The others, which only pad a ragged batch, are normalized too but
            left out of the statistics.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input, the mean and the (biased) variance. The two statistics, which are for running
        averages, carry no gradient.

    Raises:
        UserError: scale or bias of another size.

    Example:
        >>> y, mean, var = st.ops.batch_norm(jnp.ones((8, 4, 4, 3)))
        >>> mean.shape
        (3,)

    References:
        Ioffe and Szegedy, Batch Normalization, ICML 2015.
    """
    _check_affine("batch_norm", x, scale, bias)
    return _batch_norm(x, scale, bias, examples, epsilon=epsilon, layout=chosen(layout))


def _check_affine(what: str, x: Array, scale: Array | None, bias: Array | None) -> None:
    for name, p in (("scale", scale), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise UserError(f"{what}: {name} has shape {p.shape} for {x.shape[-1]} channels")


@functools.partial(jax.jit, static_argnames=("epsilon", "layout"))
def _batch_norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    examples: Array | None,
    epsilon: float,
    layout: Layout,
) -> tuple[Array, Array, Array]:
    mesh = active_mesh()
    batch = layout.cut("batch", mesh)
    cuts = [layout.cut(name, mesh) for name in spatial_names(x.ndim - 2)]
    vary = (*batch, *(a for cut in cuts for a in cut))
    channels = layout.channel_cut(x.shape[-1], mesh)
    stored = island.stored_spec(layout, x.shape[-1:], 0, mesh)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    out_dtype = jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
    extents, cut, cut_weight = x.shape, [batch, *cuts, channels], [batch, *cuts, ()]
    padded = [island.round_up(n, axes, mesh) for n, axes in zip(extents, cut, strict=True)]

    # 1 for every value that counts, None where all do. One channel suffices.
    weight = None
    if examples is not None or padded != list(extents):
        counts = jnp.ones(x.shape[0], bool) if examples is None else examples
        weight = jnp.broadcast_to(counts.reshape(-1, *[1] * (x.ndim - 1)), (*extents[:-1], 1)).astype(dtype)

    def local(x: Array, scale: Array, bias: Array, weight: Array | None) -> tuple[Array, Array, Array]:
        x = island.mask_padding(x, extents, cut, mesh)
        weight = None if weight is None else island.mask_padding(weight, (*extents[:-1], 1), cut_weight, mesh)
        scale, bias = (island.gather_same(p, stored, layout) for p in (scale, bias))
        sums = _Sums(vary, tuple(range(x.ndim - 1)), epsilon)
        y, mean, var = _normalize(sums, x.astype(dtype), scale, bias, weight)
        y = island.mask_padding(y, extents, cut, mesh).astype(out_dtype)
        return y, lax.stop_gradient(mean), lax.stop_gradient(var)

    scale = jnp.ones(extents[-1:], dtype) if scale is None else scale.astype(dtype)
    bias = jnp.zeros(extents[-1:], dtype) if bias is None else bias.astype(dtype)
    if mesh is None:
        return local(x, scale, bias, weight)
    y, mean, var = island.run(
        local,
        mesh,
        (spec(cut), stored, stored, None if weight is None else spec(cut_weight)),
        (spec(cut), spec([channels]), spec([channels])),
        island.pad_to_blocks(x, cut, mesh),
        scale,
        bias,
        None if weight is None else island.pad_to_blocks(weight, cut_weight, mesh),
    )
    return island.crop_to(y, extents), mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    sums: _Sums, x: Array, scale: Array, bias: Array, weight: Array | None
) -> tuple[Array, Array, Array]:
    return _normalize_forward(sums, x, scale, bias, weight)[0]


def _normalize_forward(sums, x, scale, bias, weight):  # type: ignore[no-untyped-def]
    real = x if weight is None else x * weight
    moments = [real.sum(sums.dims), (real * x).sum(sums.dims)]
    if weight is None:
        count = x.size // x.shape[-1] * lax.axis_size(sums.axes) if sums.axes else x.size // x.shape[-1]
        mean, square = sums.over_devices(jnp.stack(moments)) / count
    else:
        moments.append(jnp.broadcast_to(weight.sum(), moments[0].shape))
        mean, square, count = sums.over_devices(jnp.stack(moments))
        count = jnp.maximum(count, 1)
        mean, square = mean / count, square / count
    var = jnp.maximum(0, square - mean**2)
    inverse = lax.rsqrt(var + sums.epsilon)
    normal = (x - mean) * inverse
    saved = (normal, inverse, scale, bias, weight, count)
    return (normal * scale + bias, mean, var), saved


def _normalize_backward(sums, saved, cotangents):  # type: ignore[no-untyped-def]
    normal, inverse, scale, _, weight, count = saved
    dy = cotangents[0]
    local = jnp.stack([dy.sum(sums.dims), (dy * normal).sum(sums.dims)])
    dbias, dscale = sums.over_devices(local)
    through = (dbias + normal * dscale) / count
    if weight is not None:  # examples that do not count have no part in the statistics
        through = through * weight
    dx = scale * inverse * (dy - through)
    return dx, dscale, dbias, None if weight is None else jnp.zeros_like(weight)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def group_norm(
    x: Float[Array, "batch *spatial channels"],
    groups: int,
    scale: Float[Array, " _"] | None = None,
    bias: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
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
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: channels that do not divide by the groups; scale or bias of another size.

    Example:
        >>> st.ops.group_norm(jnp.ones((8, 4, 4, 6)), groups=3).shape
        (8, 4, 4, 6)

    References:
        Wu and He, Group Normalization, ECCV 2018.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise UserError(f"group_norm: {channels} channels do not divide into {groups} groups")
    _check_affine("group_norm", x, scale, bias)
    return _by_example(x, scale, bias, groups=groups, pixels=True, epsilon=epsilon, layout=chosen(layout))


def instance_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " _"] | None = None,
    bias: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
    layout: Layout | None = None,
) -> Float[Array, "batch *spatial channels"]:
    """Normalizes each channel of each example over all its pixels: `group_norm` with one channel a group.

    Args:
        x: input.
        scale: multiplies the normalized input, if given; one number per channel.
        bias: added after the scale, if given; one number per channel.
        epsilon: added to the variance.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: scale or bias of another size.

    Example:
        >>> st.ops.instance_norm(jnp.ones((8, 4, 4, 6))).shape
        (8, 4, 4, 6)

    References:
        Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016.
    """
    return group_norm(x, x.shape[-1], scale, bias, epsilon=epsilon, layout=layout)


def layer_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " _"] | None = None,
    bias: Float[Array, " _"] | None = None,
    *,
    epsilon: float = 1e-6,
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
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input.

    Raises:
        UserError: scale or bias of another size.

    Example:
        >>> st.ops.layer_norm(jnp.ones((8, 16))).shape
        (8, 16)

    References:
        Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    _check_affine("layer_norm", x, scale, bias)
    return _by_example(x, scale, bias, groups=1, pixels=False, epsilon=epsilon, layout=chosen(layout))


@functools.partial(jax.jit, static_argnames=("groups", "pixels", "epsilon", "layout"))
def _by_example(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    groups: int,
    pixels: bool,
    epsilon: float,
    layout: Layout,
) -> Array:
    mesh = active_mesh()
    out_dtype = jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
    plan = _ExampleNorm(layout, mesh, x.shape, groups, pixels, epsilon, out_dtype)
    if mesh is None:
        return plan.on_device(x, scale, bias)
    cut, stored = spec(plan.cuts), plan.affine_spec
    specs = (cut, None if scale is None else stored, None if bias is None else stored)
    y = island.run(plan.on_device, mesh, specs, cut, island.pad_to_blocks(x, plan.cuts, mesh), scale, bias)
    return island.crop_to(y, x.shape)


@dataclass(frozen=True)
class _ExampleNorm:
    """Normalization of each example over groups of channels, on one mesh.

    Attributes:
        layout, mesh: what cuts the input.
        shape: of the global input.
        groups: of channels.
        pixels: whether the statistics are over all pixels, or of each pixel.
        epsilon: added to the variance.
        out_dtype: of the output; statistics are in at least float32.
    """

    layout: Layout
    mesh: AnyMesh | None
    shape: tuple[int, ...]
    groups: int
    pixels: bool
    epsilon: float
    out_dtype: jnp.dtype

    @property
    def space(self) -> list[Axes]:
        """Axes that cut every spatial dimension."""
        return [self.layout.cut(name, self.mesh) for name in spatial_names(len(self.shape) - 2)]

    @property
    def channel_axes(self) -> Axes:
        """Axes that cut the channels."""
        return self.layout.channel_cut(self.shape[-1], self.mesh)

    @property
    def cuts(self) -> list[Axes]:
        """Axes that cut every dimension of input and output."""
        return [self.layout.cut("batch", self.mesh), *self.space, self.channel_axes]

    @property
    def affine_spec(self) -> P:
        """How scale and bias are stored."""
        return island.stored_spec(self.layout, self.shape[-1:], 0, self.mesh)

    @property
    def local_channels(self) -> int:
        """Channels of one device."""
        return self.shape[-1] // (size(self.mesh, self.channel_axes) if self.mesh is not None else 1)

    @property
    def per_group(self) -> int:
        """Channels of one group."""
        return self.shape[-1] // self.groups

    @property
    def whole_groups(self) -> bool:
        """Whether all channels of a group are on one device."""
        return self.local_channels % self.per_group == 0

    def on_device(self, x: Array, scale: Array | None, bias: Array | None) -> Array:
        """One device's block of the output."""
        wide = island.mask_padding(x, self.shape, self.cuts, self.mesh)
        wide = wide.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, square = self._moments(wide)
        inverse = lax.rsqrt(jnp.maximum(0, square - mean**2) + self.epsilon)
        scale, bias = (None if p is None else self._gather(p) for p in (scale, bias))
        y = (wide - mean) * (inverse if scale is None else inverse * scale)
        y = y if bias is None else y + bias
        return island.mask_padding(y, self.shape, self.cuts, self.mesh).astype(self.out_dtype)

    def _gather(self, parameter: Array) -> Array:
        varying = tuple(axis for axes in self.cuts[:-1] for axis in axes)
        return island.gather(parameter, self.affine_spec, self.layout, varying)

    def _moments(self, x: Array) -> tuple[Array, Array]:
        """Mean and mean square of the group of every channel of this device."""
        sums = jnp.stack([x, x**2])
        if self.pixels and x.ndim > 2:
            sums = sums.sum(tuple(range(2, x.ndim)), keepdims=True)
        count = self.per_group * (math.prod(self.shape[1:-1]) if self.pixels else 1)
        if self.whole_groups:
            mine = self.local_channels // self.per_group
            sums = self._over_devices(sums.reshape(*sums.shape[:-1], mine, self.per_group).sum(-1))
            sums = jnp.repeat(sums, self.per_group, axis=-1)
        else:
            member = self._membership(sums.dtype)
            sums = self._over_devices(sums @ member) @ member.T
        mean, square = sums / count
        return mean, square

    def _membership(self, dtype: jnp.dtype) -> Array:
        """`(channels, groups)`: 1 where this device's channel belongs to the group."""
        first = lax.axis_index(self.channel_axes) * self.local_channels
        channels = (first + jnp.arange(self.local_channels))[:, None]
        return (channels // self.per_group == jnp.arange(self.groups)).astype(dtype)

    def _over_devices(self, sums: Array) -> Array:
        """Sums over all devices that share a group and, if the statistics are over pixels, an example.

        The result counts as varying over those axes at once, so that the gradient is summed for each group
        and not for each channel.
        """
        across = tuple(axis for axes in self.space for axis in axes) if self.pixels else ()
        axes = (*across, *(() if self.whole_groups else self.channel_axes))
        return lax.pcast(lax.psum(sums, axes), axes, to="varying") if axes else sums
