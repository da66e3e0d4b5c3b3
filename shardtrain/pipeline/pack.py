"""Arrays of many shapes in flat buffers, one for each dtype, so that every stage's fit the same program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Buffers = dict[str, Array]
Shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Place:
    """Where an array lies in the buffer of its dtype."""

    start: Any
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n

    def read(self, buffers: Mapping[str, Array]) -> Array:
        flat = lax.dynamic_slice(buffers[self.dtype], (self.start,), (self.size,))
        return flat.reshape(self.shape)

    def write(self, buffers: Buffers, value: Array) -> Buffers:
        flat = lax.dynamic_update_slice(buffers[self.dtype], value.reshape(-1), (self.start,))
        return {**buffers, self.dtype: flat}


class Pack:
    """A row of arrays, one after the other in the buffers of their dtypes.

    Args:
        shapes: of the arrays.
    """

    def __init__(self, shapes: Sequence[Any]) -> None:
        self.lengths: dict[str, int] = {}
        self.places: list[Place] = []
        for s in shapes:
            dtype = str(s.dtype)
            place = Place(self.lengths.get(dtype, 0), tuple(s.shape), dtype)
            self.places.append(place)
            self.lengths[dtype] = place.start + place.size

    def at(self, starts: Mapping[str, Any]) -> list[Place]:
        """The places when the row itself begins at `starts`."""
        return [Place(starts.get(p.dtype, 0) + p.start, p.shape, p.dtype) for p in self.places]


def read(buffers: Mapping[str, Array], places: Sequence[Place]) -> list[Array]:
    """The arrays at `places`."""
    return [place.read(buffers) for place in places]


def write(buffers: Buffers, places: Sequence[Place], values: Sequence[Any]) -> Buffers:
    """The buffers with `values`, some of which may be constants, at `places`."""
    for place, value in zip(places, values, strict=True):
        buffers = place.write(buffers, jnp.asarray(value))
    return buffers


def largest(lengths: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Of every dtype the longest."""
    dtypes = sorted({d for row in lengths for d in row})
    return {d: max(row.get(d, 0) for row in lengths) for d in dtypes}


def zeros(lengths: Mapping[str, int], fill: float = 0.0) -> Buffers:
    """Buffers of `fill`, of zeros where the dtype is no floating one."""
    return {
        d: jnp.full(n, fill if jnp.issubdtype(jnp.dtype(d), jnp.floating) else 0, d)
        for d, n in lengths.items()
    }


@dataclass(frozen=True)
class Rows:
    """Where the slots of a pool lie: each stage has a region in the buffers of its rank."""

    packs: tuple[Pack, ...]
    bases: tuple[dict[str, int], ...]
    lengths: dict[str, int]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[Any]], depth: Sequence[int], ranks_of: Sequence[int]) -> "Rows":
        packs = tuple(Pack(row) for row in shapes)
        ends: dict[int, dict[str, int]] = {}
        bases = []
        for pack, slots, rank in zip(packs, depth, ranks_of, strict=True):
            end = ends.setdefault(rank, {})
            bases.append(dict(end))
            for dtype, length in pack.lengths.items():
                end[dtype] = end.get(dtype, 0) + slots * length
        return cls(packs, tuple(bases), largest(list(ends.values())))

    def slot(self, stage: int, number: Array | int) -> list[Place]:
        """The places of one stage's arrays in one slot."""
        pack, base = self.packs[stage], self.bases[stage]
        return pack.at({d: base.get(d, 0) + number * n for d, n in pack.lengths.items()})
