"""What each stage keeps at rest: named arrays, packed into one row of buffers for every device."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import compat
from shardtrain.layout import spec
from shardtrain.pipeline.localize.evaluate import Cut, block_shape
from shardtrain.pipeline.runtime.pack import (
    Buffers,
    Pack,
    Place,
    SlotPlaces,
    apart,
    dtype_of,
    read,
    write,
    zeros,
)


class ResidentArrays:
    """A list of arrays, each of which lives with one stage, or with all of them.

    Args:
        shapes: of the (global) arrays.
        homes: the stage of each, None for one that every device has.
        cuts: how each lies over the mesh axes within its stage.
        ranks_of: the rank of each stage.
        mesh: with `pipe`.
    """

    def __init__(
        self,
        shapes: Sequence[Any],
        homes: Sequence[int | None],
        cuts: Sequence[Cut],
        ranks_of: Sequence[int],
        mesh: Mesh,
    ) -> None:
        self.shapes, self.cuts, self.mesh, self.ranks_of = list(shapes), list(cuts), mesh, tuple(ranks_of)
        stages = range(len(ranks_of))
        self.at_stage = [[i for i, home in enumerate(homes) if home == k] for k in stages]
        self.shared = [i for i, home in enumerate(homes) if home is None]
        blocks = [
            jax.ShapeDtypeStruct(block_shape(s.shape, c, mesh.shape), s.dtype)
            for s, c in zip(shapes, cuts, strict=True)
        ]
        self.ranks = [None if home is None else self.ranks_of[home] for home in homes]
        self.rows = SlotPlaces.of(self._packs(blocks), [1] * len(ranks_of), ranks_of)
        self.places = {
            i: place
            for k, at in enumerate(self.at_stage)
            for i, place in zip(at, self.rows.slot(k, 0), strict=True)
        }

    def _packs(self, blocks: Sequence[Any]) -> list[Pack]:
        """Of each stage; what the first stages of all ranks have alike is apart, so are the second ones'."""
        rows = [[blocks[i] for i in at] for at in self.at_stage]
        ranks = max(self.ranks_of) + 1
        chunks = [self.ranks_of[:k].count(rank) for k, rank in enumerate(self.ranks_of)]
        packs: dict[int, Pack] = {}
        for chunk in range(max(chunks) + 1):
            stages = [k for k, c in enumerate(chunks) if c == chunk]
            without: list[list[Any]] = [[]] * (ranks - len(stages))
            names = apart([*(rows[k] for k in stages), *without], f"{chunk}.")
            packs |= {k: Pack(rows[k], row) for k, row in zip(stages, names, strict=False)}
        return [packs[k] for k in range(len(rows))]

    def _places(self, rank: int) -> dict[int, Place]:
        return {i: place for i, place in self.places.items() if self.ranks[i] == rank}

    def read(self, rank: int, buffers: Mapping[str, Array]) -> dict[int, Array]:
        """The blocks that a rank keeps, by number."""
        places = self._places(rank)
        return dict(zip(places, read(buffers, list(places.values())), strict=True))

    def write(self, rank: int, buffers: Buffers, values: Mapping[int, Array]) -> Buffers:
        """The buffers with new blocks."""
        places = self._places(rank)
        return write(buffers, [places[i] for i in values], list(values.values()))

    @property
    def specs(self) -> tuple[dict[str, P], dict[int, P]]:
        """How the buffers and the shared arrays lie on the mesh."""
        return {d: P(*self.mesh.axis_names) for d in self.rows.lengths}, {i: P() for i in self.shared}

    @property
    def at_rest(self) -> tuple[dict[str, Any], dict[int, Any]]:
        """Shapes of what `pack` returns."""
        sizes = tuple(self.mesh.shape.values())
        lengths = self.rows.lengths.items()
        buffers = {b: jax.ShapeDtypeStruct((*sizes, n), dtype_of(b)) for b, n in lengths}
        shared = {i: jax.ShapeDtypeStruct(self.shapes[i].shape, self.shapes[i].dtype) for i in self.shared}
        return buffers, shared

    def pack(self, arrays: Sequence[Any]) -> tuple[dict[str, Any], dict[int, Any]]:
        """Arrays from anywhere as one row of buffers for every device, and the shared ones.

        On a mesh with `replica` that may be an array's first dimension; without it all get the same.
        """
        names, sizes = self.mesh.axis_names, tuple(self.mesh.shape.values())
        lie = NamedSharding(self.mesh, P(*names))
        whole: dict[int, np.ndarray] = {}

        def row(index: tuple[slice, ...] | None, buffer: str) -> np.ndarray:
            assert index is not None
            at = {name: part.start or 0 for name, part in zip(names, index, strict=False)}
            out = np.zeros(self.rows.lengths[buffer], dtype_of(buffer))
            for i, place in self._places(at.get("pipe", 0)).items():
                if place.buffer == buffer:
                    if i not in whole:
                        whole[i] = np.asarray(arrays[i])
                    one = whole[i][at["replica"]] if whole[i].ndim > len(self.shapes[i].shape) else whole[i]
                    out[place.start : place.start + place.size] = self._block(one, i, at).ravel()
            return out.reshape((1,) * len(sizes) + (-1,))

        buffers = {
            b: jax.make_array_from_callback((*sizes, n), lie, partial(row, buffer=b))
            for b, n in self.rows.lengths.items()
        }
        everywhere = NamedSharding(self.mesh, P())
        return buffers, {i: jax.device_put(np.asarray(arrays[i]), everywhere) for i in self.shared}

    def _block(self, array: np.ndarray, i: int, at: Mapping[str, int]) -> np.ndarray:
        for dim, axes in enumerate(self.cuts[i]):
            shards = math.prod(self.mesh.shape[a] for a in axes)
            number = 0
            for a in axes:
                number = number * self.mesh.shape[a] + at[a]
            rows = array.shape[dim] // shards
            array = array.take(range(number * rows, (number + 1) * rows), dim) if shards > 1 else array
        return array

    def unpack(self, buffers: Mapping[str, Array], shared: Mapping[int, Array]) -> list[Array]:
        """The arrays by their own shapes again, each on the devices of its stage; nothing moves.

        On a mesh with `replica` that is their first dimension.
        """
        several = self._several
        copies = tuple(self.mesh.shape[axis] for axis in several)
        out: list[Any] = [shared.get(i) for i in range(len(self.shapes))]
        position = self.mesh.axis_names.index("pipe")
        for rank in range(self.mesh.shape["pipe"]):
            part = compat.auto_mesh(self.mesh.devices.take([rank], position), self.mesh.axis_names)
            shards = {
                d: [s for s in b.addressable_shards if (s.index[position].start or 0) == rank]
                for d, b in buffers.items()
            }
            for i, place in self._places(rank).items():
                blocks = [
                    s.data.reshape(-1)[place.start : place.start + place.size].reshape(
                        (1,) * len(several) + place.shape
                    )
                    for s in shards[place.buffer]
                ]
                lie = NamedSharding(part, spec([*((axis,) for axis in several), *self.cuts[i]]))
                shape = (*copies, *self.shapes[i].shape)
                out[i] = jax.make_array_from_single_device_arrays(shape, lie, blocks)
        return out

    @property
    def _several(self) -> tuple[str, ...]:
        return ("replica",) if "replica" in self.mesh.shape else ()

    def _shared_by_ranks(self, i: int) -> int | None:
        """The dimension of an array's blocks that divides by the ranks, None for an array without one."""
        ranks = self.mesh.shape["pipe"]
        return next((dim for dim, n in enumerate(self.places[i].shape) if n and n % ranks == 0), None)

    @property
    def spread_shapes(self) -> list[Any]:
        """Shapes of what `spread` returns, and where it lies."""
        out = []
        for i, s in enumerate(self.shapes):
            cuts = [tuple(cut) for cut in self.cuts[i]]
            if i in self.places and (dim := self._shared_by_ranks(i)) is not None:
                cuts[dim] = (*cuts[dim], "pipe")
            several = self._several if i in self.places else ()
            shape = (*(self.mesh.shape[axis] for axis in several), *s.shape)
            lie = spec([*((axis,) for axis in several), *cuts]) if i in self.places else P()
            out.append(jax.ShapeDtypeStruct(shape, s.dtype, sharding=NamedSharding(self.mesh, lie)))
        return out

    def spread(self, buffers: Mapping[str, Array], shared: Mapping[int, Array]) -> list[Array]:
        """The arrays by their own shapes, on the devices of all ranks; within a `shard_map` over the mesh.

        Every process of a job has part of each then, which the writers of checkpoints need.
        """
        rank = lax.axis_index("pipe")
        flat = {d: b.reshape(-1) for d, b in buffers.items()}
        out: list[Any] = [shared.get(i) for i in range(len(self.shapes))]
        for i, place in self.places.items():
            block = place.read(flat)
            block = jnp.where(rank == self.ranks[i], block, jnp.zeros_like(block))
            if (dim := self._shared_by_ranks(i)) is None:
                block = lax.psum(block, "pipe")
            else:
                block = lax.psum_scatter(block, "pipe", scatter_dimension=dim, tiled=True)
            out[i] = block.reshape((1,) * len(self._several) + block.shape)
        return out

    def gather(self, arrays: Sequence[Array]) -> tuple[Buffers, dict[int, Array]]:
        """What `spread` was given, from what it returned; within a `shard_map` over the mesh."""
        rank = lax.axis_index("pipe")
        flat = zeros(self.rows.lengths)
        for i, place in self.places.items():
            block = arrays[i].reshape(arrays[i].shape[len(self._several) :])
            if (dim := self._shared_by_ranks(i)) is not None:
                block = lax.all_gather(block, "pipe", axis=dim, tiled=True)
            flat = place.write(flat, jnp.where(rank == self.ranks[i], block, place.read(flat)))
        ones = (1,) * len(self.mesh.axis_names)
        return {d: b.reshape(ones + b.shape) for d, b in flat.items()}, {i: arrays[i] for i in self.shared}
