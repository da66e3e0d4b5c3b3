"""How the state of a run is packed on a mesh with `pipe`: each array with its stage.

`TrainState` has a step number and groups of arrays, each group a tree: parameters, the model's other
variables, the optimizer's state, extra trees. All groups are packed in the same way. An array that belongs to
a parameter or variable (the parameter itself, its momentum, its running average) is stored with the stage
that uses that one, sharded like it if it has its shape. All other arrays are stored on every device.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shardtrain.pipeline.localize.evaluate import Cut
from shardtrain.pipeline.runtime.resident_arrays import ResidentArrays
from shardtrain.train.state import TrainState, is_shapes, owners, shardings, with_shardings

GROUPS = tuple(field.name for field in dataclasses.fields(TrainState) if field.name != "step")
"""The fields of a state that are trees of arrays, in their order."""


class StatePacking:
    """How the state of a run is packed.

    Args:
        shapes: of the state as ordinary arrays.
        cuts: for each parameter and variable, by name, the mesh axes that cut its dimensions.
        stage_of: the stage that stores each of them; those that are missing are stored on every device.
        ranks_of: the rank of each stage.
        mesh: with `pipe`.

    Attributes:
        arrays: for each group its arrays.
        names: the names of the parameters and of the variables, in the order of their arrays.
    """

    def __init__(
        self,
        shapes: TrainState,
        cuts: Mapping[str, Cut],
        stage_of: Mapping[str, int],
        ranks_of: Sequence[int],
        mesh: Mesh,
    ) -> None:
        self.shapes, self.mesh = shapes, mesh
        # jax flattens dictionaries in the order of their sorted keys.
        self.names = {group: sorted(getattr(shapes, group)) for group in ("params", "model_state")}
        self.arrays: dict[str, ResidentArrays] = {}
        self._trees: dict[str, Any] = {}
        variables = {**shapes.params, **shapes.model_state}
        for group in GROUPS:
            leaves, self._trees[group] = jax.tree.flatten(getattr(shapes, group))
            names = jax.tree.leaves(owners(getattr(shapes, group), variables))
            own_cuts = [
                cuts[name] if name and leaf.shape == variables[name].shape else ((),) * len(leaf.shape)
                for leaf, name in zip(leaves, names, strict=True)
            ]
            stages = [stage_of.get(name) for name in names]
            self.arrays[group] = ResidentArrays(leaves, stages, own_cuts, ranks_of, mesh)

    def by_name(self, group: str, arrays: Mapping[int, Any]) -> dict[str, Any]:
        """Returns some arrays of the parameters or the variables by name instead of number."""
        return {self.names[group][i]: value for i, value in arrays.items()}

    @property
    def specs(self) -> TrainState:
        """The PartitionSpecs of a packed state."""
        return self._state(P(), lambda group, arrays: arrays.specs)

    def pack(self, state: TrainState) -> TrainState:
        """Returns a state of ordinary arrays in packed form; of shapes, the shapes of that."""
        if is_shapes(state):
            shapes = self._state(state.step, lambda group, arrays: arrays.packed_shapes)
            return with_shardings(shapes, shardings(self.mesh, self.specs))
        step = jax.device_put(state.step, jax.NamedSharding(self.mesh, P()))
        return self._state(step, lambda group, arrays: arrays.pack(jax.tree.leaves(getattr(state, group))))

    def unpack(self, state: TrainState) -> TrainState:
        """Returns a packed state as ordinary arrays, each on the devices of its stage; nothing is moved."""
        return self._named(state.step, lambda group, arrays: arrays.unpack(*getattr(state, group)))

    @cached_property
    def shapes_on_all_ranks(self) -> TrainState:
        """The shapes and shardings of what `unpack_onto_all_ranks` returns."""
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(self.mesh, P()))
        return self._named(step, lambda group, arrays: arrays.shapes_on_all_ranks)

    def unpack_onto_all_ranks(self, state: TrainState) -> TrainState:
        """Returns a packed state as ordinary arrays on all devices, from which checkpoints are written."""
        return self._unpack_onto_all_ranks(state)

    def pack_from_all_ranks(self, state: TrainState) -> TrainState:
        """Returns what `unpack_onto_all_ranks` returned in packed form."""
        return self._pack_from_all_ranks(state)

    @cached_property
    def _unpack_onto_all_ranks(self) -> Any:
        def run(state: TrainState) -> TrainState:
            return self._named(state.step, lambda group, a: a.unpack_onto_all_ranks(*getattr(state, group)))

        return self._on_all_devices(run, self.specs, self._specs_on_all_ranks)

    @cached_property
    def _pack_from_all_ranks(self) -> Any:
        def run(state: TrainState) -> TrainState:
            leaves = {group: jax.tree.leaves(getattr(state, group)) for group in GROUPS}
            return self._state(state.step, lambda group, a: a.pack_from_all_ranks(leaves[group]))

        return self._on_all_devices(run, self._specs_on_all_ranks, self.specs)

    @property
    def _specs_on_all_ranks(self) -> TrainState:
        return jax.tree.map(lambda s: s.sharding.spec, self.shapes_on_all_ranks)

    def _on_all_devices(self, run: Callable, ins: TrainState, outs: TrainState) -> Any:
        return jax.jit(jax.shard_map(run, mesh=self.mesh, in_specs=(ins,), out_specs=outs, check_vma=False))

    def _state(self, step: Any, value: Callable[[str, ResidentArrays], Any]) -> TrainState:
        """Returns a state with `value(group, arrays)` for each group."""
        return TrainState(step, **{group: value(group, arrays) for group, arrays in self.arrays.items()})

    def _named(self, step: Any, leaves: Callable[[str, ResidentArrays], Sequence[Any]]) -> TrainState:
        """Returns a state with the trees whose leaves `leaves(group, arrays)` returns."""
        return self._state(step, lambda group, arrays: self._trees[group].unflatten(leaves(group, arrays)))
