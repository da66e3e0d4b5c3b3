"""Arrays of many shapes in flat buffers, so that every stage's fit the same program.

A buffer's name begins with its dtype. Most arrays share the one named so; see `apart` for the others.
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

ROOM = 1.02
"""How much longer buffers may be if arrays that all stages have alike stand in buffers of their own."""

Buffers = dict[str, Array]


@dataclass(frozen=True)
class Place:
    """Where an array lies: in which buffer, and at which element of it."""

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
        flat = lax.dynamic_slice(buffers[self.buffer], (self.start,), (self.size,))
        return flat.reshape(self.shape)

    def add(self, buffers: Buffers, value: Array) -> Buffers:
        # behind the barrier XLA sees no reshaping, and adds in place
        flat = lax.optimization_barrier(jnp.reshape(value, -1))
        return self.write(buffers, self.read(buffers).reshape(-1) + flat)

    def write(self, buffers: Buffers, value: Array) -> Buffers:
        flat = lax.dynamic_update_slice(buffers[self.buffer], value.reshape(-1), (self.start,))
        return {**buffers, self.buffer: flat}


class Pack:
    """A row of arrays, one after the other in their buffers.

    Args:
        shapes: of the arrays.
        buffers: the name of each one's buffer; without, that of its dtype.
    """

    def __init__(self, shapes: Sequence[Any], buffers: Sequence[str] | None = None) -> None:
        self.lengths: dict[str, int] = {}
        self.places: list[Place] = []
        for s, buffer in zip(shapes, buffers or [str(s.dtype) for s in shapes], strict=True):
            place = Place(self.lengths.get(buffer, 0), tuple(s.shape), buffer)
            self.places.append(place)
            self.lengths[buffer] = place.start + place.size

    def at(self, starts: Mapping[str, Any]) -> list[Place]:
        """The places when the row itself begins at `starts`."""
        return [Place(starts.get(p.buffer, 0) + p.start, p.shape, p.buffer) for p in self.places]


def dtype_of(buffer: str) -> jnp.dtype:
    """What a buffer of this name is made of."""
    return jnp.dtype(buffer.partition(" ")[0])


def apart(rows: Sequence[Sequence[Any]], mark: str = "") -> list[list[str]]:
    """Names of buffers for arrays of which every row has one as large: such a one is alone in its buffer.

    XLA copies what is sliced from a buffer before it multiplies it, but not a whole buffer. What differs
    between the rows shares the buffer of its dtype, so all buffers together are as long as the longest row.

    Args:
        rows: shapes of the arrays of each.
        mark: what sets these buffers apart from others.

    Returns:
        The buffer of each array of each row.
    """
    kinds = [[(str(s.dtype), math.prod(s.shape)) for s in row] for row in rows]
    alike = functools.reduce(operator.and_, map(Counter, kinds))
    names: list[list[str]] = []
    for row in kinds:
        seen: Counter[tuple[str, int]] = Counter()
        names.append([])
        for dtype, size in row:
            own = seen[dtype, size] < alike[dtype, size]
            names[-1].append(f"{dtype} {size} {mark}{seen[dtype, size]}" if own else dtype)
            seen[dtype, size] += 1
    return names


def read(buffers: Mapping[str, Array], places: Sequence[Place]) -> list[Array]:
    """The arrays at `places`."""
    return [place.read(buffers) for place in places]


def write(buffers: Buffers, places: Sequence[Place], values: Sequence[Any]) -> Buffers:
    """The buffers with `values`, some of which may be constants, at `places`."""
    for place, value in zip(places, values, strict=True):
        buffers = place.write(buffers, jnp.asarray(value))
    return buffers


def add(buffers: Buffers, places: Sequence[Place], values: Sequence[Array]) -> Buffers:
    """The buffers with `values` added to what stands at `places`."""
    for place, value in zip(places, values, strict=True):
        buffers = place.add(buffers, value)
    return buffers


def largest(lengths: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Of every buffer the longest."""
    buffers = sorted({b for row in lengths for b in row})
    return {b: max(row.get(b, 0) for row in lengths) for b in buffers}


def zeros(lengths: Mapping[str, int], fill: float = 0.0) -> Buffers:
    """Buffers of `fill`, of zeros where the dtype is no floating one."""
    return {
        b: jnp.full(n, fill if jnp.issubdtype(dtype_of(b), jnp.floating) else 0, dtype_of(b))
        for b, n in lengths.items()
    }


@dataclass(frozen=True)
class SlotPlaces:
    """Where the slots of a pool lie: each stage has a region in the buffers of its rank.

    Attributes:
        packs: of the arrays of each stage.
        bases: where each stage's first slot begins.
        lengths: of the buffers.
    """

    packs: tuple[Pack, ...]
    bases: tuple[dict[str, int], ...]
    lengths: dict[str, int]

    @classmethod
    def of(cls, packs: Sequence[Pack], depth: Sequence[int], ranks_of: Sequence[int]) -> "SlotPlaces":
        """`depth` slots for the arrays of each stage."""
        ends: dict[int, dict[str, int]] = {}
        bases = []
        for pack, slots, rank in zip(packs, depth, ranks_of, strict=True):
            end = ends.setdefault(rank, {})
            bases.append(dict(end))
            for buffer, length in pack.lengths.items():
                end[buffer] = end.get(buffer, 0) + slots * length
        return cls(tuple(packs), tuple(bases), largest(list(ends.values())))

    def starts(self, stage: int, number: Any) -> dict[str, Any]:
        """Where one stage's arrays in one slot begin."""
        pack, base = self.packs[stage], self.bases[stage]
        return {b: base.get(b, 0) + number * n for b, n in pack.lengths.items()}

    def slot(self, stage: int, number: Any) -> list[Place]:
        """The places of one stage's arrays in one slot."""
        return self.packs[stage].at(self.starts(stage, number))

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(n * dtype_of(b).itemsize for b, n in self.lengths.items())


def slots(shapes: Sequence[Sequence[Any]], depth: Sequence[int], ranks_of: Sequence[int]) -> SlotPlaces:
    """Slots for arrays of `shapes`, `depth` of them, for each stage."""
    flat = SlotPlaces.of([Pack(row) for row in shapes], depth, ranks_of)
    own = SlotPlaces.of(list(map(Pack, shapes, apart(shapes))), depth, ranks_of)
    return own if own.nbytes <= ROOM * flat.nbytes else flat
