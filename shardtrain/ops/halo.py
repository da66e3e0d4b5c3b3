"""Halo exchange: a shard of a cut dimension gets the rows its windows reach into (inside an island)."""

import jax.numpy as jnp
from jax import Array, lax

from shardtrain.ops.window import Window


def exchange(x: Array, dim: int, window: Window, *, fill: float = 0.0, grouped: bool = False) -> Array:
    """The rows of dimension `dim` that this shard's outputs are computed from.

    Call it for one dimension after the other: the later ones carry the earlier halos along, corners too.

    Args:
        x: this shard's block, `window.block_in` rows on `dim`, with `fill` past the extent.
        dim: the dimension.
        window: how it is cut.
        fill: the value of padding.
        grouped: send by `all_gather` within the axis instead of `ppermute`. A collective-permute's
            rendezvous is all devices of the program, so it deadlocks in a branch that only some take (a
            pipeline stage); grouped collectives do not. It costs `shards` times the bytes.

    Returns:
        `window.need` rows on `dim`.
    """
    low, high = _grouped(x, dim, window, fill) if grouped else _neighbours(x, dim, window, fill)
    x = jnp.concatenate([*low, x, *high], axis=dim)
    before, after = window.fill
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (before, after, 0)
    x = lax.pad(x, jnp.asarray(fill, x.dtype), config)
    if window.shards == 1 or window.drift == 0:
        return lax.slice_in_dim(x, window.first, window.first + window.need, axis=dim)
    # A last shard that owns no output is clamped to some rows; what it computes is cropped.
    return lax.dynamic_slice_in_dim(
        x, window.first + lax.axis_index(window.axes) * window.drift, window.need, dim
    )


def _neighbours(x: Array, dim: int, window: Window, fill: float) -> tuple[list[Array], list[Array]]:
    """Halo rows before and after, by collective-permute: hop h comes from the h-th neighbour."""
    n, rows = window.shards, x.shape[dim]
    low, high = [], []
    for hop, count in enumerate(window.hops(window.halo[0]), start=1):
        part = lax.slice_in_dim(x, rows - count, rows, axis=dim)
        part = lax.ppermute(part, window.axes, [(k, k + hop) for k in range(n - hop)])
        low.append(_missing(part, lax.axis_index(window.axes) < hop, fill))
    for hop, count in enumerate(window.hops(window.halo[1]), start=1):
        part = lax.slice_in_dim(x, 0, count, axis=dim)
        part = lax.ppermute(part, window.axes, [(k + hop, k) for k in range(n - hop)])
        high.append(_missing(part, lax.axis_index(window.axes) >= n - hop, fill))
    return low[::-1], high


def _missing(part: Array, absent: Array, fill: float) -> Array:
    """A permute hands zeros to whoever has no sender, which is right where padding is zero."""
    return part if fill == 0 else jnp.where(absent, jnp.asarray(fill, part.dtype), part)


def _grouped(x: Array, dim: int, window: Window, fill: float) -> tuple[list[Array], list[Array]]:
    """The same rows by one all-gather of the edges along the axis."""
    if window.halo == (0, 0):
        return [], []
    n, rows = window.shards, x.shape[dim]
    before, after = (min(rows, count) for count in window.halo)
    edges = [
        lax.slice_in_dim(x, 0, after, axis=dim),
        lax.slice_in_dim(x, rows - before, rows, axis=dim),
    ]
    gathered = lax.all_gather(jnp.concatenate(edges, axis=dim), window.axes)
    me = lax.axis_index(window.axes)

    def pick(owner: Array, start: int, count: int) -> Array:
        part = lax.dynamic_index_in_dim(gathered, jnp.clip(owner, 0, n - 1), keepdims=False)
        part = lax.slice_in_dim(part, start, start + count, axis=dim)
        return jnp.where((owner >= 0) & (owner < n), part, jnp.asarray(fill, part.dtype))

    lows, highs = window.hops(window.halo[0]), window.hops(window.halo[1])
    low = [pick(me - hop, after + before - count, count) for hop, count in enumerate(lows, start=1)]
    high = [pick(me + hop, 0, count) for hop, count in enumerate(highs, start=1)]
    return low[::-1], high
