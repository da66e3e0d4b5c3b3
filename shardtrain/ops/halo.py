"""Halo exchange: inside an island, a device gets the rows of its neighbours that its outputs read."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from shardtrain import compat
from shardtrain.layout import Axes
from shardtrain.ops.window import Reach, Round


def exchange(x: Array, dim: int, reach: Reach, *, fill: float | int = 0.0, grouped: bool = False) -> Array:
    """The rows of dimension `dim` that this device's outputs are computed from.

    To be called for one dimension after the other: the halos of later dimensions include those of earlier
    ones, and so the corners.

    Args:
        x: this device's block, `reach.block_in` rows on `dim`, with `fill` past the extent.
        dim: the dimension.
        reach: how the dimension is cut, and which rows the outputs read.
        fill: the value of padding, where `reach.mode` is `"constant"`.
        grouped: send by `all_gather` within the axis instead of by `ppermute`. All devices of the program
            take part in a collective-permute, so it deadlocks in a branch that only some of them take, such
            as a pipeline stage; collectives within groups of devices do not. They send `shards` times the
            bytes.

    Returns:
        `reach.need` rows on `dim`.
    """
    if reach.mode != "constant":  # padding repeats rows of the input
        return rerouted(x, dim, *reach.repeated, reach.axes, grouped=grouped)
    low, high = _grouped(x, dim, reach, fill) if grouped else _neighbours(x, dim, reach, fill)
    x = jnp.concatenate([*low, x, *high], axis=dim)
    before, after = reach.fill
    config = [(0, 0, 0)] * x.ndim
    config[dim] = (before, after, 0)
    x = lax.pad(x, jnp.asarray(fill, x.dtype), config)
    return block(x, dim, reach.offsets, reach.need, reach.axes)


def block(x: Array, dim: int, starts: tuple[int, ...], rows: int, axes: Axes) -> Array:
    """`rows` rows of dimension `dim`, from this shard's entry of `starts` on."""
    if len(set(starts)) == 1:
        return lax.slice_in_dim(x, starts[0], starts[0] + rows, axis=dim)
    start = jnp.asarray(starts, jnp.int32)[lax.axis_index(axes)]
    return lax.dynamic_slice_in_dim(x, start, rows, dim)


def _neighbours(x: Array, dim: int, reach: Reach, fill: float | int) -> tuple[list[Array], list[Array]]:
    """Halo rows before and after the block by collective-permute: hop h is sent by the h-th neighbour."""
    n, rows = reach.shards, x.shape[dim]
    low, high = [], []
    for hop, count in enumerate(reach.hops(reach.halo[0]), start=1):
        part = lax.slice_in_dim(x, rows - count, rows, axis=dim)
        part = compat.ppermute(part, reach.axes, [(k, k + hop) for k in range(n - hop)])
        low.append(_missing(part, lax.axis_index(reach.axes) < hop, fill))
    for hop, count in enumerate(reach.hops(reach.halo[1]), start=1):
        part = lax.slice_in_dim(x, 0, count, axis=dim)
        part = compat.ppermute(part, reach.axes, [(k + hop, k) for k in range(n - hop)])
        high.append(_missing(part, lax.axis_index(reach.axes) >= n - hop, fill))
    return low[::-1], high


def _missing(part: Array, absent: Array, fill: float | int) -> Array:
    """A received part with `fill` where no device sent any: a permute gives zeros there."""
    return part if fill == 0 else jnp.where(absent, jnp.asarray(fill, part.dtype), part)


def _grouped(x: Array, dim: int, reach: Reach, fill: float | int) -> tuple[list[Array], list[Array]]:
    """Halo rows before and after the block by one all-gather of all blocks' edges along the axis."""
    if reach.halo == (0, 0):
        return [], []
    n, rows = reach.shards, x.shape[dim]
    before, after = (min(rows, count) for count in reach.halo)
    edges = [
        lax.slice_in_dim(x, 0, after, axis=dim),
        lax.slice_in_dim(x, rows - before, rows, axis=dim),
    ]
    gathered = lax.all_gather(jnp.concatenate(edges, axis=dim), reach.axes)
    me = lax.axis_index(reach.axes)

    def pick(owner: Array, start: int, count: int) -> Array:
        part = lax.dynamic_index_in_dim(gathered, jnp.clip(owner, 0, n - 1), keepdims=False)
        part = lax.slice_in_dim(part, start, start + count, axis=dim)
        return jnp.where((owner >= 0) & (owner < n), part, jnp.asarray(fill, part.dtype))

    lows, highs = reach.hops(reach.halo[0]), reach.hops(reach.halo[1])
    low = [pick(me - hop, after + before - count, count) for hop, count in enumerate(lows, start=1)]
    high = [pick(me + hop, 0, count) for hop, count in enumerate(highs, start=1)]
    return low[::-1], high


def rerouted(
    x: Array, dim: int, rounds: Sequence[Round], table: np.ndarray, axes: Axes, *, grouped: bool = False
) -> Array:
    """The rows of dimension `dim` that this shard wants, by the rounds and the table of `window.reroute`."""
    pieces = [x, *(_received(x, dim, part, axes, grouped) for part in rounds)]
    x = jnp.concatenate(pieces, axis=dim) if rounds else x
    if (table != table[0]).any():
        return jnp.take(x, jnp.asarray(table)[lax.axis_index(axes)], axis=dim)
    breaks = np.flatnonzero(np.diff(table[0]) != 1) + 1
    runs = [
        lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1, axis=dim) for run in np.split(table[0], breaks)
    ]
    return jnp.concatenate(runs, axis=dim) if len(runs) > 1 else runs[0]


def _received(x: Array, dim: int, part: Round, axes: Axes, grouped: bool) -> Array:
    sent = block(x, dim, part.starts, part.rows, axes)
    return sent_by(sent, part.senders, axes, grouped=grouped)


def sent_by(x: Array, senders: Sequence[int], axes: Axes, *, grouped: bool = False) -> Array:
    """The array of device `senders[i]` of `axes`, on device `i`; see `exchange` for `grouped`.

    A device that names itself keeps its array, or gets zeros if it sends it to another device.
    """
    if not grouped:
        busy = {sender for i, sender in enumerate(senders) if sender != i}
        pairs = [(sender, i) for i, sender in enumerate(senders) if sender != i or i not in busy]
        return compat.ppermute(x, axes, pairs)
    sender = jnp.asarray(senders, jnp.int32)[lax.axis_index(axes)]
    return lax.dynamic_index_in_dim(lax.all_gather(x, axes), sender, keepdims=False)
