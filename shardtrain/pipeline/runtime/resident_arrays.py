"""Named arrays between steps, each stored with its stage, packed into one row of buffers for every device.

Arrays have three forms:

- *packed*: `(buffers, shared)`. A buffer has a row for every device, sharded over all mesh axes; `shared` has
  the arrays that belong to no stage, replicated on all devices. Training steps work on this form.
- on the devices of their stages: ordinary arrays, each on the part of the mesh that its stage has.
- on all devices: ordinary arrays on the whole mesh, each sharded over the ranks as well where its shape
  divides. Checkpoints are written from this form, since every process of a job has a part of each array then.
"""

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
from shardtrain.pipeline.runtime.flat_buffers import (
    Buffers,
    Pack,
    Place,
    SlotPlaces,
    buffer_names,
    dtype_of,
    read,
    write,
    zeros,
)

Packed = tuple[dict[str, Any], dict[int, Any]]
"""Buffers by name, and the arrays that every device stores by number."""


class ResidentArrays:
    """A list of arrays, each stored with one stage or on all devices.

    Args:
        shapes: of the global arrays.
        stages: for each array its stage, None for one that all devices store.
        cuts: for each array the mesh axes that cut its dimensions within its stage.
        ranks_of: the rank of each stage.
        mesh: with `pipe`.

    Attributes:
        at_stage: for each stage the numbers of its arrays.
        shared: the numbers of the arrays that all devices store.
        ranks: for each array its rank, None for one that all devices store.
        places: for each array of a stage the place of its block in the buffers of a device.
        rows: the places of all stages' arrays.
    """

    def __init__(
        self,
        shapes: Sequence[Any],
        stages: Sequence[int | None],
        cuts: Sequence[Cut],
        ranks_of: Sequence[int],
        mesh: Mesh,
    ) -> None:
        self.shapes, self.cuts, self.mesh, self.ranks_of = list(shapes), list(cuts), mesh, tuple(ranks_of)
        self.at_stage = [[i for i, stage in enumerate(stages) if stage == k] for k in range(len(ranks_of))]
        self.shared = [i for i, stage in enumerate(stages) if stage is None]
        blocks = [
            jax.ShapeDtypeStruct(block_shape(s.shape, c, mesh.shape), s.dtype)
            for s, c in zip(shapes, cuts, strict=True)
        ]
        self.ranks = [None if stage is None else self.ranks_of[stage] for stage in stages]
        self.rows = SlotPlaces.of(self._packs(blocks), [1] * len(ranks_of), ranks_of)
        self.places: dict[int, Place] = {}
        for k, numbers in enumerate(self.at_stage):
            self.places |= zip(numbers, self.rows.slot(k, 0), strict=True)

    def _packs(self, blocks: Sequence[Any]) -> list[Pack]:
        """Returns the pack of each stage.

        Arrays that the first stages of all ranks have in common get buffers of their own, and so do those
        that the second stages of all ranks have in common, and so on.
        """
        rows = [[blocks[i] for i in numbers] for numbers in self.at_stage]
        ranks = max(self.ranks_of) + 1
        chunks = [self.ranks_of[:k].count(rank) for k, rank in enumerate(self.ranks_of)]
        packs: dict[int, Pack] = {}
        for chunk in range(max(chunks) + 1):
            stages = [k for k, c in enumerate(chunks) if c == chunk]
            without: list[list[Any]] = [[]] * (ranks - len(stages))
            names = buffer_names([*(rows[k] for k in stages), *without], f"{chunk}.")
            packs |= {k: Pack(rows[k], row) for k, row in zip(stages, names, strict=False)}
        return [packs[k] for k in range(len(rows))]

    # On a device, within a `shard_map` over the mesh.

    def places_on(self, rank: int) -> dict[int, Place]:
        """Returns the places of the arrays that a rank stores, by number."""
        return {i: place for i, place in self.places.items() if self.ranks[i] == rank}

    def read(self, rank: int, buffers: Mapping[str, Array]) -> dict[int, Array]:
        """Returns the blocks that a rank stores, by number."""
        places = self.places_on(rank)
        return dict(zip(places, read(buffers, list(places.values())), strict=True))

    def write(self, rank: int, buffers: Buffers, values: Mapping[int, Array]) -> Buffers:
        """Returns the buffers with new blocks of a rank."""
        places = self.places_on(rank)
        return write(buffers, [places[i] for i in values], list(values.values()))

    def own_row(self, packed: Packed) -> Packed:
        """Returns what this device has of packed arrays, its row of each buffer as a flat one."""
        buffers, shared = packed
        return {b: row.reshape(-1) for b, row in buffers.items()}, shared

    def as_row(self, buffers: Mapping[str, Array]) -> Buffers:
        """Returns flat buffers of this device as its row of the buffers of the mesh."""
        ones = (1,) * len(self.mesh.axis_names)
        return {b: flat.reshape(ones + flat.shape) for b, flat in buffers.items()}

    # Packed.

    @property
    def specs(self) -> tuple[dict[str, P], dict[int, P]]:
        """The PartitionSpecs of packed arrays."""
        return {b: P(*self.mesh.axis_names) for b in self.rows.lengths}, {i: P() for i in self.shared}

    @property
    def packed_shapes(self) -> Packed:
        """The shapes of packed arrays."""
        sizes = tuple(self.mesh.shape.values())
        lengths = self.rows.lengths.items()
        buffers = {b: jax.ShapeDtypeStruct((*sizes, n), dtype_of(b)) for b, n in lengths}
        shared = {i: jax.ShapeDtypeStruct(self.shapes[i].shape, self.shapes[i].dtype) for i in self.shared}
        return buffers, shared

    def pack(self, arrays: Sequence[Any]) -> Packed:
        """Returns arrays, from wherever they are, in packed form.

        On a mesh with `replica`, that may be the first dimension of an array: then each replica gets its own
        part, else all get the same.
        """
        names, sizes = self.mesh.axis_names, tuple(self.mesh.shape.values())
        over_all_axes = NamedSharding(self.mesh, P(*names))
        on_host: dict[int, np.ndarray] = {}

        def row(index: tuple[slice, ...] | None, buffer: str) -> np.ndarray:
            assert index is not None
            at = {name: part.start or 0 for name, part in zip(names, index, strict=False)}
            out = np.zeros(self.rows.lengths[buffer], dtype_of(buffer))
            for i, place in self.places_on(at.get("pipe", 0)).items():
                if place.buffer == buffer:
                    if i not in on_host:
                        on_host[i] = np.asarray(arrays[i])
                    block = self._block(self._of_replica(on_host[i], i, at), i, at)
                    out[place.start : place.start + place.size] = block.ravel()
            return out.reshape((1,) * len(sizes) + (-1,))

        buffers = {
            b: jax.make_array_from_callback((*sizes, n), over_all_axes, partial(row, buffer=b))
            for b, n in self.rows.lengths.items()
        }
        replicated = NamedSharding(self.mesh, P())
        return buffers, {i: jax.device_put(np.asarray(arrays[i]), replicated) for i in self.shared}

    def _of_replica(self, array: np.ndarray, i: int, at: Mapping[str, int]) -> np.ndarray:
        return array[at["replica"]] if array.ndim > len(self.shapes[i].shape) else array

    def _block(self, array: np.ndarray, i: int, at: Mapping[str, int]) -> np.ndarray:
        """Returns the block of an array that the device at a position of the mesh stores."""
        for dim, axes in enumerate(self.cuts[i]):
            shards = math.prod(self.mesh.shape[a] for a in axes)
            number = 0
            for a in axes:
                number = number * self.mesh.shape[a] + at[a]
            rows = array.shape[dim] // shards
            array = array.take(range(number * rows, (number + 1) * rows), dim) if shards > 1 else array
        return array

    # On the devices of their stages.

    def unpack(self, buffers: Mapping[str, Array], shared: Mapping[int, Array]) -> list[Array]:
        """Returns packed arrays as ordinary ones, each on the devices of its stage; nothing is moved.

        On a mesh with `replica`, that is their first dimension.
        """
        out: list[Any] = [shared.get(i) for i in range(len(self.shapes))]
        for rank in range(self.mesh.shape["pipe"]):
            for i, array in self._unpack_rank(rank, buffers).items():
                out[i] = array
        return out

    def _unpack_rank(self, rank: int, buffers: Mapping[str, Array]) -> dict[int, Array]:
        dim = self.mesh.axis_names.index("pipe")
        part = compat.auto_mesh(self.mesh.devices.take([rank], dim), self.mesh.axis_names)
        shards = {
            b: [s.data.reshape(-1) for s in rows.addressable_shards if (s.index[dim].start or 0) == rank]
            for b, rows in buffers.items()
        }
        copies = tuple(self.mesh.shape[axis] for axis in self._replica_axes)
        found: dict[int, Any] = {}
        for i, place in self.places_on(rank).items():
            shape = (1,) * len(copies) + place.shape
            parts = [flat[place.start : place.start + place.size] for flat in shards[place.buffer]]
            blocks = [block.reshape(shape) for block in parts]
            sharding = NamedSharding(part, self._spec(self.cuts[i]))
            whole = (*copies, *self.shapes[i].shape)
            found[i] = jax.make_array_from_single_device_arrays(whole, sharding, blocks)
        return found

    @property
    def _replica_axes(self) -> tuple[str, ...]:
        return ("replica",) if "replica" in self.mesh.shape else ()

    def _spec(self, cuts: Sequence[Any]) -> P:
        """Returns the PartitionSpec of an array with these cuts; its first dimension may be the replicas."""
        return spec([*((axis,) for axis in self._replica_axes), *cuts])

    # On all devices.

    @property
    def shapes_on_all_ranks(self) -> list[Any]:
        """The shapes and shardings of what `unpack_onto_all_ranks` returns."""
        out = []
        for i, s in enumerate(self.shapes):
            if i not in self.places:
                out.append(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(self.mesh, P())))
                continue
            cuts = [tuple(cut) for cut in self.cuts[i]]
            if (dim := self._dim_over_ranks(i)) is not None:
                cuts[dim] = (*cuts[dim], "pipe")
            shape = (*(self.mesh.shape[axis] for axis in self._replica_axes), *s.shape)
            sharding = NamedSharding(self.mesh, self._spec(cuts))
            out.append(jax.ShapeDtypeStruct(shape, s.dtype, sharding=sharding))
        return out

    def _dim_over_ranks(self, i: int) -> int | None:
        """Returns the dimension of an array's blocks that is sharded over the ranks, None for none."""
        ranks = self.mesh.shape["pipe"]
        return next((dim for dim, n in enumerate(self.places[i].shape) if n and n % ranks == 0), None)

    def unpack_onto_all_ranks(self, buffers: Mapping[str, Array], shared: Mapping[int, Array]) -> list[Array]:
        """Returns packed arrays as ordinary ones on all devices; within a `shard_map` over the mesh."""
        rank = lax.axis_index("pipe")
        flat, _ = self.own_row((dict(buffers), {}))
        out: list[Any] = [shared.get(i) for i in range(len(self.shapes))]
        for i, place in self.places.items():
            block = place.read(flat)
            block = jnp.where(rank == self.ranks[i], block, jnp.zeros_like(block))
            if (dim := self._dim_over_ranks(i)) is None:
                block = lax.psum(block, "pipe")
            else:
                block = lax.psum_scatter(block, "pipe", scatter_dimension=dim, tiled=True)
            out[i] = block.reshape((1,) * len(self._replica_axes) + block.shape)
        return out

    def pack_from_all_ranks(self, arrays: Sequence[Array]) -> Packed:
        """Returns what `unpack_onto_all_ranks` returned in packed form; within a `shard_map`."""
        rank = lax.axis_index("pipe")
        flat = zeros(self.rows.lengths)
        for i, place in self.places.items():
            block = arrays[i].reshape(arrays[i].shape[len(self._replica_axes) :])
            if (dim := self._dim_over_ranks(i)) is not None:
                block = lax.all_gather(block, "pipe", axis=dim, tiled=True)
            flat = place.write(flat, jnp.where(rank == self.ranks[i], block, place.read(flat)))
        return self.as_row(flat), {i: arrays[i] for i in self.shared}
