"""Normalization with the statistics of one device, whatever the mesh."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from shardtrain.errors import UserError
from shardtrain.layout import Layout, active_mesh, spatial_names, spec
from shardtrain.ops import island


@dataclass(frozen=True)
class _Sums:
    """Where the sums of a normalization run: the mesh axes and, on one device, the dimensions."""

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

    One island: a single all-reduce of `2 * channels` numbers forward and one backward, over all axes that
    cut batch and space. The variance is `E[x^2] - E[x]^2` in at least float32, as Flax computes it.

    Args:
        x: input.
        scale, bias: the learned affine map, if any.
        epsilon: added to the variance.
        examples: which examples are real; the others (the padding of a ragged batch) are normalized but
            do not count.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input, the mean and the (biased) variance. The two statistics carry no gradient:
        they are for running averages.

    Raises:
        UserError: scale or bias of another size.

    Example:
        >>> y, mean, var = batch_norm(jnp.ones((8, 4, 4, 3)))
        >>> mean.shape
        (3,)

    References:
        Ioffe and Szegedy, Batch Normalization, ICML 2015.
    """
    for name, p in (("scale", scale), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise UserError(f"batch_norm: {name} has shape {p.shape} for {x.shape[-1]} channels")
    return _batch_norm(x, scale, bias, examples, epsilon=epsilon, layout=layout or Layout())


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
    kept = island.at_rest(layout, x.shape[-1:], 0, mesh)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    out_dtype = jnp.result_type(x, *(p for p in (scale, bias) if p is not None))
    extents, cut, cut_weight = x.shape, [batch, *cuts, channels], [batch, *cuts, ()]
    even = [island.even(n, axes, mesh) for n, axes in zip(extents, cut, strict=True)]

    # 1 for every value that counts, None where all do. It has the size of one channel, no more.
    weight = None
    if examples is not None or even != list(extents):
        counts = jnp.ones(x.shape[0], bool) if examples is None else examples
        weight = jnp.broadcast_to(counts.reshape(-1, *[1] * (x.ndim - 1)), (*extents[:-1], 1)).astype(dtype)

    def local(x: Array, scale: Array, bias: Array, weight: Array | None) -> tuple[Array, Array, Array]:
        x = island.real(x, extents, cut, mesh)
        weight = None if weight is None else island.real(weight, (*extents[:-1], 1), cut_weight, mesh)
        scale, bias = (island.gather_same(p, kept, layout) for p in (scale, bias))
        sums = _Sums(vary, tuple(range(x.ndim - 1)), epsilon)
        y, mean, var = _normalize(sums, x.astype(dtype), scale, bias, weight)
        y = island.real(y, extents, cut, mesh).astype(out_dtype)
        return y, lax.stop_gradient(mean), lax.stop_gradient(var)

    scale = jnp.ones(extents[-1:], dtype) if scale is None else scale.astype(dtype)
    bias = jnp.zeros(extents[-1:], dtype) if bias is None else bias.astype(dtype)
    if mesh is None:
        return local(x, scale, bias, weight)
    y, mean, var = island.run(
        local,
        mesh,
        (spec(cut), kept, kept, None if weight is None else spec(cut_weight)),
        (spec(cut), spec([channels]), spec([channels])),
        island.pad_to(x, even),
        scale,
        bias,
        None if weight is None else island.pad_to(weight, (*even[:-1], 1)),
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
    if weight is not None:  # what does not count has no part in the statistics
        through = through * weight
    dx = scale * inverse * (dy - through)
    return dx, dscale, dbias, None if weight is None else jnp.zeros_like(weight)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def group_norm(
    x: Float[Array, "batch *spatial channels"],
    groups: int,
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "batch *spatial channels"]:
    """Normalizes each group of channels of each example over all its pixels.

    Plain global-view reductions, which XLA partitions well: two sums per example and channel cross each
    spatial axis, and only groups that straddle channel shards cross the channel axis.

    Args:
        x: input.
        groups: groups of channels; must divide them.
        scale, bias: the learned affine map, if any.
        epsilon: added to the variance.

    Raises:
        UserError: channels that do not divide by the groups.

    Example:
        >>> group_norm(jnp.ones((8, 4, 4, 6)), groups=3).shape
        (8, 4, 4, 6)

    References:
        Wu and He, Group Normalization, ECCV 2018.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise UserError(f"group_norm: {channels} channels do not divide into {groups} groups")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    space = tuple(range(1, x.ndim - 1))
    # Per channel first: what crosses the mesh is then 2 numbers per example and channel.
    moments = jnp.stack([wide.mean(space), (wide**2).mean(space)]) if space else jnp.stack([wide, wide**2])
    grouped = moments.reshape(2, x.shape[0], groups, channels // groups).mean(-1, keepdims=True)
    grouped = jnp.broadcast_to(grouped, (2, x.shape[0], groups, channels // groups))
    mean, square = grouped.reshape(2, x.shape[0], *[1] * len(space), channels)
    inverse = lax.rsqrt(jnp.maximum(0, square - mean**2) + epsilon)
    y = (wide - mean) * (inverse if scale is None else inverse * scale)
    y = y if bias is None else y + bias
    return y.astype(jnp.result_type(x, *(p for p in (scale, bias) if p is not None)))


def layer_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "batch *spatial channels"]:
    """Normalizes every pixel over its channels; with cut channels, two sums per pixel cross the axis.

    Example:
        >>> layer_norm(jnp.ones((8, 16))).shape
        (8, 16)

    References:
        Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    mean = wide.mean(-1, keepdims=True)
    var = jnp.maximum(0, (wide**2).mean(-1, keepdims=True) - mean**2)
    y = (wide - mean) * (lax.rsqrt(var + epsilon) if scale is None else lax.rsqrt(var + epsilon) * scale)
    y = y if bias is None else y + bias
    return y.astype(jnp.result_type(x, *(p for p in (scale, bias) if p is not None)))
