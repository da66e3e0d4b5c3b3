"""The block of a global array that one device stores.

Blocks are as large as XLA's tiles: all of one array are equal, and the last ones are padded where an extent
does not divide. The padding may have any values, NaN among them; a rule that would mix it with real elements
fills it with a neutral value first.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from shardtrain.layout import Axes, axes_of

Cut = tuple[Axes, ...]
Sizes = Mapping[str, int]


_notice: ContextVar["Callable[[Block, Axes], None] | None"] = ContextVar("notice", default=None)


@contextmanager
def noticing(notice: "Callable[[Block, Axes], None] | None") -> Iterator[None]:
    """Calls `notice` inside for each block that is gathered, with the axes that do not cut it any more."""
    token = _notice.set(notice)
    try:
        yield
    finally:
        _notice.reset(token)


@dataclass(frozen=True)
class Block:
    """One device's block of a global array. No mesh axis cuts two of its dimensions.

    Attributes:
        value: the block, or its shape alone.
        shape: of the global array.
        cut: for each dimension the mesh axes that cut it.
        sizes: of the mesh axes.
    """

    value: Any
    shape: tuple[int, ...]
    cut: Cut
    sizes: Sizes

    def shards(self, dim: int) -> int:
        """Returns into how many blocks a dimension is cut."""
        return shards(self.cut[dim], self.sizes)

    def uneven(self, dim: int) -> bool:
        """Whether the last block of a dimension is padded."""
        return self.shape[dim] % self.shards(dim) != 0

    def moved(self, cut: Cut) -> "Block":
        """Returns the block of the same array with another cut: it is gathered, then sliced, as needed."""
        if cut == self.cut:
            return self
        if is_key(self.value):  # collectives take the numbers of keys, but no keys
            raw = self._as_numbers()
            moved = raw.moved((*cut, *raw.cut[len(cut) :]))
            value = jax.random.wrap_key_data(moved.value, impl=jax.random.key_impl(self.value))
            return replace(self, value=value, cut=cut)
        cutting = {a for axes in cut for a in axes}
        lost = tuple(a for axes in self.cut for a in axes if a not in cutting and self.sizes[a] > 1)
        if lost and (notice := _notice.get()):
            notice(self, lost)
        x = self
        kept = tuple(self._kept(dim, axes) for dim, axes in enumerate(cut))
        for dim, axes in enumerate(kept):
            x = x._gathered(dim, axes)
        for dim, axes in enumerate(cut):
            x = x._sliced(dim, axes)
        return x

    def whole_on(self, dims: Collection[int]) -> "Block":
        """Returns the block of the same array with no cut of some dimensions."""
        return self.moved(tuple(() if d in dims else axes for d, axes in enumerate(self.cut)))

    def filled(self, fill: Any, dims: Iterable[int]) -> "Block":
        """Returns the block with `fill` in its padding along `dims`."""
        value = self.value
        for dim in dims:
            if self.uneven(dim):
                rows = value.shape[dim]
                first = lax.axis_index(self.cut[dim]) * rows
                row = first + lax.broadcasted_iota(jnp.int32, value.shape, dim)
                value = jnp.where(row < self.shape[dim], value, jnp.asarray(fill, value.dtype))
        return replace(self, value=value)

    def _kept(self, dim: int, new: Axes) -> Axes:
        """Returns the leading axes of a dimension that can stay when it is to be cut by `new`."""
        old = self.cut[dim]
        if old == new:
            return old
        if self.uneven(dim) or self.shape[dim] % shards(new, self.sizes):
            return ()
        n = 0
        while n < min(len(old), len(new)) and old[n] == new[n]:
            n += 1
        return old[:n]

    def _gathered(self, dim: int, kept: Axes) -> "Block":
        if self.cut[dim] == kept:
            return self
        value = lax.all_gather(self.value, self.cut[dim][len(kept) :], axis=dim, tiled=True)
        if not kept:
            value = lax.slice_in_dim(value, 0, self.shape[dim], axis=dim)
        return replace(self, value=value, cut=(*self.cut[:dim], kept, *self.cut[dim + 1 :]))

    def _sliced(self, dim: int, new: Axes) -> "Block":
        more = new[len(self.cut[dim]) :]
        if not more:
            return self
        have = self.value.shape[dim]
        rows = -(-have // shards(more, self.sizes))
        widths = [(0, 0, 0)] * len(self.shape)
        widths[dim] = (0, rows * shards(more, self.sizes) - have, 0)
        value = lax.pad(self.value, jnp.zeros((), self.value.dtype), widths) if widths[dim][1] else self.value
        value = lax.dynamic_slice_in_dim(value, lax.axis_index(more) * rows, rows, dim)
        return replace(self, value=value, cut=(*self.cut[:dim], new, *self.cut[dim + 1 :]))

    def _as_numbers(self) -> "Block":
        data = jax.random.key_data(self.value)
        more = data.shape[len(self.shape) :]
        return Block(data, (*self.shape, *more), (*self.cut, *((),) * len(more)), self.sizes)


def whole(value: Any, sizes: Sizes) -> Block:
    """Returns the block of an array that no axis cuts."""
    return Block(value, value.shape, ((),) * len(value.shape), sizes)


def shards(axes: Axes, sizes: Sizes) -> int:
    """Returns the number of blocks that `axes` make together."""
    return math.prod(sizes[a] for a in axes)


def finest(cuts: Iterable[Cut]) -> Cut:
    """Returns the cut by the most axes, the first among equals."""
    return max(cuts, key=lambda cut: sum(map(len, cut)))


def is_key(value: Any) -> bool:
    """Whether this is an array of random keys, whose elements are several numbers each."""
    return jnp.issubdtype(value.dtype, jax.dtypes.extended)


def cut_of(entries: P | None, rank: int) -> Cut:
    """Returns the axes of each of `rank` dimensions, from a PartitionSpec."""
    given = [] if entries is None else [axes_of(entry) for entry in entries]
    return tuple(given + [()] * (rank - len(given)))


def block_shape(shape: Sequence[int], cut: Cut, sizes: Sizes) -> tuple[int, ...]:
    """Returns the shape of one device's block."""
    return tuple(-(-n // shards(axes, sizes)) for n, axes in zip(shape, cut, strict=True))
