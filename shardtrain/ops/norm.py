"""Batch normalization whose statistics are the same on every mesh, and what all normalizations check."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from shardtrain.errors import UserError
from shardtrain.layout import Axes, Layout, active_mesh, chosen, spatial_names, spec
from shardtrain.ops import island


@dataclass(frozen=True)
class _Sums:
    """What a normalization sums over: mesh axes and, on each device, dimensions of its block.

    Attributes:
        axes: of the mesh.
        dims: of a block.
        epsilon: added to the variance.
        fast_variance: whether the variance is the mean square less the square of the mean.
        least: the least number to divide by where no value counts: 1 gives zeros, 0 gives NaN.
    """

    axes: tuple[str, ...]
    dims: tuple[int, ...]
    epsilon: float
    fast_variance: bool
    least: int

    def over_devices(self, x: Array) -> Array:
        return lax.psum(x, self.axes) if self.axes else x

    def means(self, values: Sequence[Array], counts: Array | None) -> tuple[list[Array], Array | int]:
        """The mean of each of `values`, which are zero where `counts` is False, and how many values count."""
        totals = [value.sum(self.dims) for value in values]
        if counts is None:
            count = values[0].size // values[0].shape[-1] * (lax.axis_size(self.axes) if self.axes else 1)
            return list(self.over_devices(jnp.stack(totals)) / count), count
        counted = counts.sum(self.dims, dtype=totals[0].dtype)
        totals.append(jnp.broadcast_to(counted, totals[0].shape))
        *sums, number = self.over_devices(jnp.stack(totals))
        number = jnp.maximum(number, self.least)
        return [total / number for total in sums], number

    def statistics(self, x: Array, counts: Array | None) -> tuple[Array, Array, Array | int]:
        """Mean, variance, and the number of values of each channel that count."""
        real = x if counts is None else jnp.where(counts, x, 0)
        if self.fast_variance:
            (mean, square), count = self.means([real, real * real], counts)
            return mean, jnp.maximum(0, square - mean**2), count
        (mean,), count = self.means([real], counts)
        deviation = real - mean if counts is None else jnp.where(counts, real - mean, 0)
        return mean, self.over_devices((deviation**2).sum(self.dims)) / count, count


def batch_norm(
    x: Float[Array, "batch *spatial channels"],
    scale: Float[Array, " channels"] | None = None,
    bias: Float[Array, " channels"] | None = None,
    *,
    epsilon: float = 1e-5,
    examples: Bool[Array, " batch"] | None = None,
    mask: Bool[Array, "..."] | None = None,
    use_fast_variance: bool = True,
    layout: Layout | None = None,
) -> tuple[Float[Array, "batch *spatial channels"], Float[Array, " channels"], Float[Array, " channels"]]:
    """Normalizes every channel by its mean and variance over the whole batch and all pixels.

    The forward and the backward pass each all-reduce `2 * channels` numbers once, over all axes that cut
    batch and pixels. The variance is `E[x^2] - E[x]^2` in at least float32, as Flax computes it; without
    `use_fast_variance` the forward pass all-reduces twice, the mean before the variance.

    Args:
        x: input.
        scale: multiplies the normalized input, if given.
        bias: added after the scale, if given.
        epsilon: added to the variance.
        examples: True for real examples. The others, which only pad a ragged batch, are normalized too but
            left out of the statistics. Where no example is real, mean and variance are zero.
        mask: True for values that count in the statistics; it broadcasts against `x`. A channel of which no
            value counts has NaN, as in Flax.
        use_fast_variance: whether the variance is `E[x^2] - E[x]^2`, or `E[(x - E[x])^2]`, which takes a
            second pass and keeps its digits where the mean is large.
        layout: which mesh axes cut what; by name by default.

    Returns:
        The normalized input, the mean and the (biased) variance. The two statistics, which are for running
        averages, carry no gradient.

    Raises:
        UserError: scale or bias of another size, or a mask that does not broadcast against the input.

    Example:
        >>> y, mean, var = st.ops.batch_norm(jnp.ones((8, 4, 4, 3)))
        >>> mean.shape
        (3,)

    References:
        Ioffe and Szegedy, Batch Normalization, ICML 2015.
    """
    check_affine("batch_norm", x, scale, bias)
    mask = checked_mask("batch_norm", x, mask)
    least, counts = (1, None) if mask is None else (0, mask)
    if examples is not None:
        counts = examples.reshape(-1, *[1] * (x.ndim - 1))
        if mask is not None:  # without any real example there is nothing that a mask could choose from
            counts = (counts & mask) | ~examples.any()
    return _batch_norm(
        x,
        scale,
        bias,
        counts,
        epsilon=epsilon,
        fast_variance=use_fast_variance,
        least=least,
        layout=chosen(layout),
    )


def check_affine(what: str, x: Array, scale: Array | None, bias: Array | None) -> None:
    """Refuses a scale or a bias that does not have one number for every channel.

    Raises:
        UserError: one of another size.
    """
    for name, p in (("scale", scale), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise UserError(f"{what}: {name} has shape {p.shape} for {x.shape[-1]} channels")


def checked_mask(what: str, x: Array, mask: Array | None) -> Array | None:
    """The mask with as many dimensions as `x`, each of them whole or of extent 1.

    Raises:
        UserError: a mask that does not broadcast against `x`, or that has other values than truth values.
    """
    if mask is None:
        return None
    aligned = with_all_dimensions(mask, x.shape)
    if mask.dtype != bool or aligned is None:
        raise UserError(
            f"{what}: a mask of {mask.dtype} and shape {mask.shape} for an input of shape {x.shape}; give "
            f"truth values that broadcast against the input: one for each example as "
            f"mask.reshape({', '.join(['-1', *['1'] * (x.ndim - 1)])})"
        )
    return aligned


def with_all_dimensions(given: Array, shape: tuple[int, ...]) -> Array | None:
    """What broadcasts against `shape`, with dimensions that are whole or of extent 1; None for others."""
    fits = zip(reversed(given.shape), reversed(shape), strict=False)
    if given.ndim > len(shape) or any(have not in (1, extent) for have, extent in fits):
        return None
    return given.reshape((1,) * (len(shape) - given.ndim) + given.shape)


def mask_cuts(mask: Array, cuts: Sequence[Axes]) -> list[Axes]:
    """The axes that cut a mask of an input that `cuts` cut: none where it has extent 1."""
    return [axes if extent > 1 else () for extent, axes in zip(mask.shape, cuts, strict=True)]


@functools.partial(jax.jit, static_argnames=("epsilon", "fast_variance", "least", "layout"))
def _batch_norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    counts: Array | None,
    epsilon: float,
    fast_variance: bool,
    least: int,
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
    extents, cut = x.shape, [batch, *cuts, channels]
    uneven = any(island.round_up(n, axes, mesh) != n for n, axes in zip(extents, cut, strict=True))

    def counted(x: Array, counts: Array | None) -> Array | None:
        """True for every value of a block that counts, None where all do. One channel may stand for all."""
        if counts is None and not uneven:
            return None
        counts = jnp.ones((1,) * x.ndim, bool) if counts is None else counts
        counts = jnp.broadcast_to(counts, (*x.shape[:-1], counts.shape[-1]))
        return island.mask_padding(counts, extents, [batch, *cuts, ()], mesh)

    def local(x: Array, scale: Array, bias: Array, counts: Array | None) -> tuple[Array, Array, Array]:
        x = island.mask_padding(x, extents, cut, mesh)
        scale, bias = (island.gather_same(p, stored, layout) for p in (scale, bias))
        sums = _Sums(vary, tuple(range(x.ndim - 1)), epsilon, fast_variance, least)
        y, mean, var = _normalize(sums, x.astype(dtype), scale, bias, counted(x, counts))
        y = island.mask_padding(y, extents, cut, mesh).astype(out_dtype)
        return y, lax.stop_gradient(mean), lax.stop_gradient(var)

    scale = jnp.ones(extents[-1:], dtype) if scale is None else scale.astype(dtype)
    bias = jnp.zeros(extents[-1:], dtype) if bias is None else bias.astype(dtype)
    if mesh is None:
        return local(x, scale, bias, counts)
    counts_spec = None
    if counts is not None:
        counts_cut = mask_cuts(counts, cut)
        counts_spec, counts = spec(counts_cut), island.pad_to_blocks(counts, counts_cut, mesh)
    y, mean, var = island.run(
        local,
        mesh,
        (spec(cut), stored, stored, counts_spec),
        (spec(cut), spec([channels]), spec([channels])),
        island.pad_to_blocks(x, cut, mesh),
        scale,
        bias,
        counts,
    )
    return island.crop_to(y, extents), mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    sums: _Sums, x: Array, scale: Array, bias: Array, counts: Array | None
) -> tuple[Array, Array, Array]:
    return _normalize_forward(sums, x, scale, bias, counts)[0]


def _normalize_forward(sums, x, scale, bias, counts):  # type: ignore[no-untyped-def]
    mean, var, count = sums.statistics(x, counts)
    inverse = lax.rsqrt(var + sums.epsilon)
    normal = (x - mean) * inverse
    saved = (normal, inverse, scale, counts, count)
    return (normal * scale + bias, mean, var), saved


def _normalize_backward(sums, saved, cotangents):  # type: ignore[no-untyped-def]
    normal, inverse, scale, counts, count = saved
    dy = cotangents[0]
    local = jnp.stack([dy.sum(sums.dims), (dy * normal).sum(sums.dims)])
    dbias, dscale = sums.over_devices(local)
    through = (dbias + normal * dscale) / count
    if counts is not None:  # values that do not count have no part in the statistics
        through = jnp.where(counts, through, 0)
    return scale * inverse * (dy - through), dscale, dbias, None


_normalize.defvjp(_normalize_forward, _normalize_backward)
