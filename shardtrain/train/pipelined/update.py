"""The update of a packed state: `Program.finish`, computed by the ranks that store the arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardtrain import compat
from shardtrain.mesh import PIPE, REPLICA
from shardtrain.pipeline.runtime.flat_buffers import Buffers
from shardtrain.pipeline.runtime.rankwise_update import Groups, Placement, RankwiseUpdate
from shardtrain.pipeline.runtime.resident_arrays import ResidentArrays
from shardtrain.train.pipelined.state import GROUPS, StatePacking
from shardtrain.train.state import TrainState
from shardtrain.train.step import Program


class PackedUpdate:
    """The update of a packed state from packed gradients.

    Args:
        program: whose `finish` it is.
        packing: of the state.
        sums: the shapes of the sums that `finish` takes.

    Raises:
        UserError: the optimizer joins large arrays of several stages.
    """

    def __init__(self, program: Program, packing: StatePacking, sums: Any) -> None:
        mesh, shapes = packing.mesh, packing.shapes
        # Gradients are packed as the parameters are, and the new variables as the old ones.
        self.arrays = {
            **packing.arrays,
            "gradients": packing.arrays["params"],
            "new_state": packing.arrays["model_state"],
        }
        args = shapes, dict(shapes.params), dict(shapes.model_state), sums
        with jax.sharding.use_abstract_mesh(compat.with_manual(mesh, [PIPE, REPLICA])):
            closed, (_, reported) = jax.make_jaxpr(program.finish, return_shape=True)(*args)
        step = [Placement(None, ())]
        placements = {name: _placements(arrays) for name, arrays in self.arrays.items()}
        # The order of these groups is that in which jax flattens the arguments and results of `finish`.
        arguments = {"step": step, **placements, "sums": _on_every_rank(sums)}
        results = {"step": step, **{group: placements[group] for group in GROUPS}}
        results["reported"] = _on_every_rank(reported)
        self.reported: Any = jax.tree.structure(reported)
        sizes = {n: s for n, s in mesh.shape.items() if n not in (PIPE, REPLICA)}
        self.update = RankwiseUpdate(closed, arguments, results, sizes, mesh.shape[PIPE])

    def __call__(
        self,
        state: TrainState,
        gradients: Buffers,
        new_state: Buffers,
        new_shared: Mapping[int, Array],
        sums: Any,
    ) -> tuple[TrainState, Any]:
        """Returns the packed state after the update, and what is reported; within a `shard_map`.

        Args:
            state: packed.
            gradients: this device's packed gradients of the summed loss.
            new_state: this device's packed variables after the last microbatch.
            new_shared: the variables after a step that every device stores.
            sums: over all examples, a tree.
        """
        own = {group: self.arrays[group].own_row(getattr(state, group)) for group in GROUPS}
        packed = {group: buffers for group, (buffers, _) in own.items()}
        packed |= {"gradients": gradients, "new_state": new_state}
        shared: dict[str, Mapping[int, Array]] = {group: arrays for group, (_, arrays) in own.items()}
        # A parameter that no stage uses has no gradient.
        shared["gradients"] = {i: jnp.zeros_like(v) for i, v in shared["params"].items()}
        shared |= {"step": {0: state.step}, "new_state": new_shared}
        shared["sums"] = dict(enumerate(jax.tree.leaves(sums)))
        packed, results = self.update(packed, shared, self._read, self._write)
        groups = {
            group: (self.arrays[group].as_row(packed[group]), results.get(group, {})) for group in GROUPS
        }
        reported = results["reported"]
        leaves = [reported[i] for i in range(len(reported))]
        return TrainState(results["step"][0], **groups), self.reported.unflatten(leaves)

    def _read(self, rank: int, packed: Mapping[str, Buffers]) -> Groups:
        return {name: self.arrays[name].read(rank, buffers) for name, buffers in packed.items()}

    def _write(self, rank: int, packed: Mapping[str, Buffers], results: Groups) -> dict[str, Buffers]:
        written = {
            group: self.arrays[group].write(rank, packed[group], results.get(group, {})) for group in GROUPS
        }
        return {**packed, **written}


def _placements(arrays: ResidentArrays) -> list[Placement]:
    return [Placement(rank, cut) for rank, cut in zip(arrays.ranks, arrays.cuts, strict=True)]


def _on_every_rank(tree: Any) -> list[Placement]:
    return [Placement(None, ((),) * len(x.shape)) for x in jax.tree.leaves(tree)]
