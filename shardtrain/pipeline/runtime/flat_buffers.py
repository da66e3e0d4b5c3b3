"""Arrays of many shapes, packed into flat buffers.

All ranks of a pipeline run one program, so what they carry must have the same shapes, although their stages
differ: each rank has one row of flat buffers, as long as the longest that any rank needs. The name of a
buffer begins with its dtype. Most arrays of a dtype share one buffer; see `buffer_names` for the others.
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

GROWTH = 1.02
"""How much longer all buffers together may be for arrays to have buffers of their own."""

Buffers = dict[str, Array]


@dataclass(frozen=True)
class Place:
    """Where an array is stored.

    Attributes:
        start: its first element in the buffer.
        shape: of the array.
        buffer: the name of the buffer.
    """

    start: Any
    shape: tuple[int, ...]
    buffer: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return dtype_of(self.buffer)

    def read(self, buffers: Mapping[str, Array]) -> Array:
        """Returns the array."""
        flat = lax.dynamic_slice(buffers[self.buffer], (self.start,), (self.size,))
        return flat.reshape(self.shape)

    def add(self, buffers: Buffers, value: Array) -> Buffers:
        """Returns the buffers with `value` added to the array."""
        # The barrier hides the reshaping from XLA, which then adds in place.
        flat = lax.optimization_barrier(jnp.reshape(value, -1))
        return self.write(buffers, self.read(buffers).reshape(-1) + flat)

    def write(self, buffers: Buffers, value: Array) -> Buffers:
        """Returns the buffers with `value` in place of the array."""
        flat = lax.dynamic_update_slice(buffers[self.buffer], value.reshape(-1), (self.start,))
        return {**buffers, self.buffer: flat}


class Pack:
    """A list of arrays, one after the other in their buffers.

    Args:
        shapes: of the arrays.
        buffers: the name of the buffer of each; by default its dtype.

    Attributes:
        places: of the arrays.
        lengths: of the buffers.
    """

    def __init__(self, shapes: Sequence[Any], buffers: Sequence[str] | None = None) -> None:
        self.lengths: dict[str, int] = {}
        self.places: list[Place] = []
        for s, buffer in zip(shapes, buffers or [str(s.dtype) for s in shapes], strict=True):
            place = Place(self.lengths.get(buffer, 0), tuple(s.shape), buffer)
            self.places.append(place)
            self.lengths[buffer] = place.start + place.size

    def at(self, starts: Mapping[str, Any]) -> list[Place]:
        """Returns the places of the arrays if the list begins at `starts` of the buffers."""
        return [Place(starts.get(p.buffer, 0) + p.start, p.shape, p.buffer) for p in self.places]


def dtype_of(buffer: str) -> jnp.dtype:
    """Returns the dtype of a buffer, by its name."""
    return jnp.dtype(buffer.partition(" ")[0])


def buffer_names(rows: Sequence[Sequence[Any]], mark: str = "") -> list[list[str]]:
    """Returns names of buffers such that arrays of one size in all rows have buffers of their own.

    XLA copies a slice of a buffer before it multiplies it, but not a whole buffer. So an array has a buffer
    of its own if every row has one of its size and dtype. The others share the buffer of their dtype. All
    buffers together are as long as the longest row, no longer.

    Args:
        rows: for each row the shapes of its arrays.
        mark: tells the names of these buffers from others.

    Returns:
        For each row the name of the buffer of each array.
    """
    kinds = [[(str(s.dtype), math.prod(s.shape)) for s in row] for row in rows]
    common = functools.reduce(operator.and_, map(Counter, kinds))
    names: list[list[str]] = []
    for row in kinds:
        seen: Counter[tuple[str, int]] = Counter()
        names.append([])
        for dtype, size in row:
            own = seen[dtype, size] < common[dtype, size]
            names[-1].append(f"{dtype} {size} {mark}{seen[dtype, size]}" if own else dtype)
            seen[dtype, size] += 1
    return names


def read(buffers: Mapping[str, Array], places: Sequence[Place]) -> list[Array]:
    """Returns the arrays at `places`."""
    return [place.read(buffers) for place in places]


def write(buffers: Buffers, places: Sequence[Place], values: Sequence[Any]) -> Buffers:
    """Returns the buffers with `values`, some of which may be constants, at `places`."""
    for place, value in zip(places, values, strict=True):
        buffers = place.write(buffers, jnp.asarray(value))
    return buffers


def add(buffers: Buffers, places: Sequence[Place], values: Sequence[Array]) -> Buffers:
    """Returns the buffers with `values` added to the arrays at `places`."""
    for place, value in zip(places, values, strict=True):
        buffers = place.add(buffers, value)
    return buffers


def longest(lengths: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Returns the greatest length of each buffer."""
    buffers = sorted({b for row in lengths for b in row})
    return {b: max(row.get(b, 0) for row in lengths) for b in buffers}


def zeros(lengths: Mapping[str, int], fill: float = 0.0) -> Buffers:
    """Returns buffers that are filled with `fill`, or with zeros if their dtype is no floating one."""
    return {
        b: jnp.full(n, fill if jnp.issubdtype(dtype_of(b), jnp.floating) else 0, dtype_of(b))
        for b, n in lengths.items()
    }


@dataclass(frozen=True)
class SlotPlaces:
    """Where the slots of a pool are: each stage has a region in the buffers of its rank.

    Attributes:
        packs: for each stage its arrays in one slot.
        bases: for each stage the element of each buffer at which its first slot begins.
        lengths: of the buffers.
    """

    packs: tuple[Pack, ...]
    bases: tuple[dict[str, int], ...]
    lengths: dict[str, int]

    @classmethod
    def of(cls, packs: Sequence[Pack], depth: Sequence[int], ranks_of: Sequence[int]) -> "SlotPlaces":
        """Returns places for the arrays of each stage in `depth` slots."""
        ends: dict[int, dict[str, int]] = {}
        bases = []
        for pack, slots, rank in zip(packs, depth, ranks_of, strict=True):
            end = ends.setdefault(rank, {})
            bases.append(dict(end))
            for buffer, length in pack.lengths.items():
                end[buffer] = end.get(buffer, 0) + slots * length
        return cls(tuple(packs), tuple(bases), longest(list(ends.values())))

    def starts(self, stage: int, number: Any) -> dict[str, Any]:
        """Returns where a slot of a stage begins in each buffer."""
        pack, base = self.packs[stage], self.bases[stage]
        return {b: base.get(b, 0) + number * n for b, n in pack.lengths.items()}

    def slot(self, stage: int, number: Any) -> list[Place]:
        """Returns the places of a stage's arrays in one slot."""
        return self.packs[stage].at(self.starts(stage, number))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(n * dtype_of(b).itemsize for b, n in self.lengths.items())


def slot_places(shapes: Sequence[Sequence[Any]], depth: Sequence[int], ranks_of: Sequence[int]) -> SlotPlaces:
    """Returns slots for the arrays of each stage, in buffers of their own unless these are much longer.

    Args:
        shapes: for each stage the shapes of its arrays in one slot.
        depth: for each stage the number of its slots.
        ranks_of: the rank of each stage.
    """
    shared = SlotPlaces.of([Pack(row) for row in shapes], depth, ranks_of)
    own = SlotPlaces.of(list(map(Pack, shapes, buffer_names(shapes))), depth, ranks_of)
    return own if own.nbytes <= GROWTH * shared.nbytes else shared
