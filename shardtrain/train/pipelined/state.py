"""Where everything of a run lives on a mesh with `pipe`: each array with its stage, packed; and back."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shardtrain import compat
from shardtrain.mesh import PIPE, REPLICA
from shardtrain.pipeline.localize.evaluate import Cut
from shardtrain.pipeline.runtime.resident import ResidentArrays
from shardtrain.pipeline.runtime.update import RankwiseUpdate
from shardtrain.train.state import TrainState, is_shapes, lying, owners, shardings
from shardtrain.train.step import Program


class PackedState:
    """A run's state, packed, and its arrays by name.

    Args:
        shapes: of the state of ordinary named arrays.
        cuts: how each parameter and variable lies on the mesh but for `pipe`.
        stage_of: the stage that keeps it; what is in none is on every device.
        ranks_of: the rank of each stage.
        mesh: with `pipe`.
    """

    def __init__(
        self,
        shapes: TrainState,
        cuts: Mapping[str, Cut],
        stage_of: Mapping[str, int],
        ranks_of: Sequence[int],
        mesh: Mesh,
    ) -> None:
        self.named_shapes, self.stage_of, self.mesh = shapes, stage_of, mesh
        names = jax.tree.leaves(owners(shapes.opt_state, shapes.params))
        opt, self.opt_tree = jax.tree.flatten(shapes.opt_state)

        def held(leaves: Sequence[Any], names: Sequence[str], alike: Sequence[bool]) -> ResidentArrays:
            lie = [
                cuts[name] if same else ((),) * len(x.shape)
                for x, name, same in zip(leaves, names, alike, strict=True)
            ]
            return ResidentArrays(leaves, [stage_of.get(name) for name in names], lie, ranks_of, mesh)

        self.params, self.state = (
            held(jax.tree.leaves(getattr(shapes, group)), names, [True] * len(names))
            for group, names in self.names.items()
        )
        alike = [
            bool(name) and leaf.shape == shapes.params[name].shape
            for leaf, name in zip(opt, names, strict=True)
        ]
        self.opt = held(opt, names, alike)
        self.holds = {"params": self.params, "model_state": self.state, "opt_state": self.opt}

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """Names of parameters and variables, sorted: jax flattens dictionaries so."""
        return {group: sorted(getattr(self.named_shapes, group)) for group in ("params", "model_state")}

    def spread(self, program: Program, sums: Mapping[str, Any]) -> RankwiseUpdate:
        """The update, traced on named arrays, spread over the ranks that hold them.

        Args:
            program: whose `finish` it is.
            sums: shapes of what a batch sums up to.

        Raises:
            UserError: an optimizer that joins large arrays of several stages.
        """
        shapes = self.named_shapes
        args = (shapes, dict(shapes.params), dict(shapes.model_state), dict(sums))
        outer = compat.with_manual(self.mesh, [PIPE, REPLICA])
        with jax.sharding.use_abstract_mesh(outer):
            closed, (_, reported) = jax.make_jaxpr(program.finish, return_shape=True)(*args)
        self.reported = sorted(reported)
        none: list[Any] = [None]
        kept = none + self.params.ranks + self.state.ranks + self.opt.ranks
        lie = [(), *self.params.cuts, *self.state.cuts, *self.opt.cuts]
        homes = kept + self.params.ranks + self.state.ranks + none * len(sums)
        cuts = lie + self.params.cuts + self.state.cuts + [()] * len(sums)
        # Dictionaries are flattened in the order of their sorted names, as the groups are held.
        results = list(zip(kept, lie, strict=True)) + [(None, ())] * len(reported)
        sizes = {n: s for n, s in self.mesh.shape.items() if n not in (PIPE, REPLICA)}
        return RankwiseUpdate(closed, homes, cuts, results, sizes, self.mesh.shape[PIPE])

    @property
    def state_specs(self) -> TrainState:
        """How the packed state lies on the mesh."""
        return TrainState(P(), *(held.specs for held in self.holds.values()))

    def packed(self, named: TrainState) -> TrainState:
        """A state of named arrays, each stage's packed on its devices; of shapes, the shapes of that."""
        if is_shapes(named):
            shapes = TrainState(named.step, *(held.at_rest for held in self.holds.values()))
            return lying(shapes, shardings(self.mesh, self.state_specs))
        step = jax.device_put(named.step, jax.NamedSharding(self.mesh, P()))
        return TrainState(step, *(h.pack(jax.tree.leaves(getattr(named, g))) for g, h in self.holds.items()))

    def named(self, state: TrainState) -> TrainState:
        """The same state as ordinary named arrays, each on the devices of its stage."""
        return self._named(state.step, [h.unpack(*getattr(state, g)) for g, h in self.holds.items()])

    @cached_property
    def spread_shapes(self) -> TrainState:
        """Shapes of what `spread_out` returns, and where it lies."""
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(self.mesh, P()))
        return self._named(step, [held.spread_shapes for held in self.holds.values()])

    def spread_out(self, state: TrainState) -> TrainState:
        """The state as ordinary named arrays, on all devices: a checkpoint is written from these."""
        return self._spreader(state)

    def gathered(self, spread: TrainState) -> TrainState:
        """The packed state again, from what `spread_out` returns."""
        return self._gatherer(spread)

    @cached_property
    def _spreader(self) -> Any:
        def run(state: TrainState) -> TrainState:
            return self._named(state.step, [h.spread(*getattr(state, g)) for g, h in self.holds.items()])

        return self._on_all(run, self.state_specs, self._spread_specs)

    @cached_property
    def _gatherer(self) -> Any:
        def run(spread: TrainState) -> TrainState:
            groups = (h.gather(jax.tree.leaves(getattr(spread, g))) for g, h in self.holds.items())
            return TrainState(spread.step, *groups)

        return self._on_all(run, self._spread_specs, self.state_specs)

    @property
    def _spread_specs(self) -> TrainState:
        return jax.tree.map(lambda s: s.sharding.spec, self.spread_shapes)

    def _on_all(self, run: Any, ins: TrainState, outs: TrainState) -> Any:
        return jax.jit(jax.shard_map(run, mesh=self.mesh, in_specs=(ins,), out_specs=outs, check_vma=False))

    def _named(self, step: Any, groups: Sequence[Sequence[Any]]) -> TrainState:
        params, model_state, opt = groups
        return TrainState(
            step,
            dict(zip(self.names["params"], params, strict=True)),
            dict(zip(self.names["model_state"], model_state, strict=True)),
            jax.tree.unflatten(self.opt_tree, opt),
        )

    @cached_property
    def _starts(self) -> list[int]:
        """Where the arguments of the update begin: step, parameters, variables, optimizer, gradients,
        variables afterwards, sums."""
        p, s, o = (len(held.shapes) for held in self.holds.values())
        return [0, 1, 1 + p, 1 + p + s, 1 + p + s + o, 1 + 2 * p + s + o, 1 + 2 * p + 2 * s + o]

    def _read(self, rank: int, packed: Any) -> dict[int, Array]:
        params, before, opt, grads, moved = packed
        held = [self.params, self.state, self.opt, self.params, self.state]
        return {
            start + i: block
            for start, h, part in zip(
                self._starts[1:6], held, (params, before, opt, grads, moved), strict=True
            )
            for i, block in h.read(rank, part).items()
        }

    def _write(self, rank: int, packed: Any, values: dict[int, Array]) -> Any:
        out = []
        for start, end, held, part in zip(
            self._starts[1:4], self._starts[2:5], self.holds.values(), packed[:3], strict=True
        ):
            out.append(held.write(rank, part, {i - start: v for i, v in values.items() if start <= i < end}))
        return (*out, *packed[3:])

    def _by_name(self, group: str, shared: dict[int, Array]) -> dict[str, Array]:
        return {self.names[group][i]: value for i, value in shared.items()}
