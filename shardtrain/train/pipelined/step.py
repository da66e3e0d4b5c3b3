"""The training step on a mesh with `pipe`: the same model, loss and optimizer, cut into stages.

Every device stores the parameters and the optimizer's state of its own stage, packed. The arrays have names
where names matter: in the optimizer's update, which is traced on named arrays, and in checkpoints.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.table import Table

from shardtrain import compat, jaxprs
from shardtrain.layout import spec
from shardtrain.mesh import PIPE, REPLICA, size, text
from shardtrain.ops.island import crop_to
from shardtrain.pipeline.cut.balance import stage_starts
from shardtrain.pipeline.cut.graph import OperationGraph, Stage
from shardtrain.pipeline.cut.layers import Layers
from shardtrain.pipeline.cut.retrace import cut_by_owner, refuse_counters
from shardtrain.pipeline.localize.evaluate import Block, Cut, cut_of, evaluate
from shardtrain.pipeline.runtime.flat_buffers import Buffers
from shardtrain.pipeline.runtime.stage_programs import StagePrograms, costs_of, localize
from shardtrain.pipeline.runtime.tick_loop import TickLoop
from shardtrain.pipeline.schedules.generate import forward_only
from shardtrain.pipeline.schedules.schedule import Schedule
from shardtrain.pipeline.schedules.simulate import fastest, lockstep
from shardtrain.pipeline.schedules.tick_table import build
from shardtrain.train.batch import Batch
from shardtrain.train.check import refuse_rowless
from shardtrain.train.pipelined.microbatch import Microbatch
from shardtrain.train.pipelined.plan import PipelinePlan
from shardtrain.train.pipelined.state import StatePacking
from shardtrain.train.pipelined.trace import Trace, trace
from shardtrain.train.pipelined.update import PackedUpdate
from shardtrain.train.state import TrainState
from shardtrain.train.step import Mode, Program


class Pipelined:
    """A `Program` cut into stages, for batches of one shape.

    Args:
        program: what a step computes; its `accumulate` is the number of microbatches.
        shapes: of the state as ordinary arrays.
        specs: the PartitionSpecs of these arrays on the mesh, in which `pipe` has no part.
        mesh: with `pipe`.
        batch: on the mesh.
        plan: the schedule and the stages.

    Attributes:
        graph: the operations of a microbatch.
        starts: for each stage but the first the number of the operation with which it begins.
        stage_of: the stage that stores each parameter and variable; the others are on every device.
        programs: of each stage.
        costs: of the programs.
        schedule: that is run.
        ticks: of that schedule in lockstep, with these costs.
        packing: how the state is packed.

    Raises:
        UserError: the model cannot be cut so, or the optimizer joins large arrays of several stages.
    """

    def __init__(
        self,
        program: Program,
        shapes: TrainState,
        specs: TrainState,
        mesh: Mesh,
        batch: Batch,
        plan: PipelinePlan,
    ) -> None:
        self.program, self.shapes, self.mesh, self.plan = program, shapes, mesh, plan
        self.sizes = {n: s for n, s in mesh.shape.items() if n not in (PIPE, REPLICA)}
        self._warned = set[str]()
        self._cuts = _cuts(shapes.params, specs.params) | _cuts(shapes.model_state, specs.model_state)
        self._micro = Microbatch.of(batch, program.accumulate)
        self._trace = self._traced(self._micro, "train")
        self.graph = OperationGraph(self._trace.microbatch)
        self.layers = Layers(self.graph)
        self.starts = stage_starts(self.graph, plan.schedule.stages, plan.stages)
        stages = self.graph.cut(self.starts)
        self.stage_of = {n: k for k, s in enumerate(stages) for n in (*s.params, *s.updated)}
        refuse_counters(self.graph, self.stage_of, program.variables.is_random(), program.accumulate)
        self.programs = self._localized(stages, self._micro, remat=plan.remat)
        self.costs = costs_of(self.programs)
        self.schedule = fastest(plan.schedule, self.costs, plan.in_flight, plan.latency)
        self.ticks = lockstep(self.schedule, self.costs, plan.latency)
        self.packing = StatePacking(shapes, self._cuts, self.stage_of, self.schedule.ranks_of, mesh)
        sums = self._trace.sums.unflatten(self._trace.sum_shapes)
        limit = {"limit": jax.ShapeDtypeStruct((), jnp.float32)} if program.skip_bad else {}
        self._update = PackedUpdate(program, self.packing, {**sums, **limit})

    @property
    def sums(self) -> int:
        """How many leaves the sums of a training step have."""
        return self._trace.sums.num_leaves

    def _traced(self, micro: Microbatch, mode: Mode) -> Trace:
        shapes = self.shapes
        return trace(self.program, shapes.params, shapes.model_state, micro, self.mesh, mode=mode)

    def _localized(
        self,
        stages: Sequence[Stage],
        micro: Microbatch,
        *,
        remat: Collection[int] = (),
        backward: bool = True,
    ) -> tuple[StagePrograms, ...]:
        """Returns the programs of the stages, each for the activations as the one before sends them."""
        outer = compat.with_manual(self.mesh, [PIPE, REPLICA])
        ins: Sequence[Cut] = ()
        found: list[StagePrograms] = []
        for k, stage in enumerate(stages):
            given = [self._cuts[n] for n in (*stage.params, *stage.state)] + list(micro.cuts)
            kinds = {"last": k == len(stages) - 1, "remat": k in remat, "backward": backward}
            found.append(localize(stage, given, ins, outer, **kinds, warned=self._warned))
            ins = found[-1].outs_cut
        return tuple(found)

    def _loop(self, schedule: Schedule, programs: Sequence[StagePrograms], sums: int) -> TickLoop:
        """Returns the loop that runs a schedule; `sums` counts the loss, too."""
        plan = self.plan
        table = build(schedule, lockstep(schedule, latency=plan.latency), plan.latency)
        params, state = (
            self.packing.by_name(group, self.packing.arrays[group].places)
            for group in ("params", "model_state")
        )
        rows = self.packing.arrays["params"].rows
        return TickLoop(table, schedule.ranks_of, tuple(programs), params, state, rows, sums, plan.filler)

    def table(self) -> Table:
        """Returns a table of the stages: what each stores, computes and sends, and how evenly."""
        table = Table(
            title=f"{self.schedule.name} on {text(self.mesh)}, {self.schedule.microbatches} microbatches",
            caption="cost: of F, I and W, the costliest is 1; kept: for one microbatch until its backward",
            width=100,
        )
        table.add_column("stage", justify="right", no_wrap=True)
        table.add_column("rank", justify="right", no_wrap=True)
        table.add_column("layers", overflow="fold", ratio=1)
        for column in ("weights", "cost F I W", "kept", "in flight", "sends"):
            table.add_column(column, justify="right", no_wrap=True)
        names = self.layers.names_of_stages(self.starts)
        rows = (self.costs.forward, self.costs.input, self.costs.weight)
        costliest = max(map(max, rows))
        params = self.packing.arrays["params"]
        for k, program in enumerate(self.programs):
            table.add_row(
                str(k),
                str(self.schedule.ranks_of[k]),
                ", ".join(names[k]),
                _kib(params.places[i] for i in params.at_stage[k]),
                " ".join(f"{float(row[k] / costliest):.2f}" for row in rows),
                _kib((*program.saved, *program.lasting)),
                str(self.ticks.peak_of_stage[k]),
                _kib(program.outs) if k < len(self.programs) - 1 else "",
            )
        return table

    # The programs.

    def _on_devices(self, function: Callable, like: Batch, outs: Any) -> Callable:
        """Returns a function of this device's part of the state and the batch as one of the whole."""
        given = (self.packing.specs, jax.tree.map(lambda x: x.sharding.spec, like))
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=outs, check_vma=False)

    def step(self, mode: Mode, like: Batch) -> Callable[[TrainState, Batch], tuple[Any, Any]]:
        """Returns the step of a mode, for batches of the shape and shardings of `like`."""
        return self.train_step(like) if mode == "train" else self.eval_step(mode, like)

    def train_step(self, like: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
        """Returns one update of a packed state, for batches of the shape and shardings of `like`.

        See `Program.train_step`.
        """
        micro = Microbatch.of(like, self.program.accumulate)
        graph, programs = self.graph, self.programs
        if micro != self._micro:
            graph = OperationGraph(self._traced(micro, "train").microbatch)
            programs = self._localized(self._cut_again(graph), micro, remat=self.plan.remat)
        loop = self._loop(self.schedule, programs, 1 + self.sums)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
            params, before, shared = self._own(state)
            examples = micro.blocks(batch)
            grads, after, sums, _ = loop.run(params, self._cleared(before), shared, examples)
            totals = self._totals(lax.psum(sums, PIPE)[1:], programs, self._trace)
            if self.program.skip_bad:
                totals = {**totals, "limit": batch.limit}
            new_shared = self._advanced(graph, state.model_state[1])
            new, reported = self._update(state, loop.summed(grads), after, new_shared, totals)
            return new, self._over_replicas(reported)

        return self._on_devices(step, like, (self.packing.specs, P()))

    def _cut_again(self, graph: OperationGraph) -> list[Stage]:
        """Returns the stages of a new trace, cut at the same operations or by the owners of parameters."""
        if [e.primitive for e in graph.main] == [e.primitive for e in self.graph.main]:
            return graph.cut(self.starts)
        return cut_by_owner(graph, self.stage_of, self.schedule.stages)

    def _own(self, state: TrainState) -> tuple[Buffers, Buffers, dict[str, Array]]:
        """Returns this device's parameters and variables, and by name the variables of all devices."""
        arrays = self.packing.arrays
        params, _ = arrays["params"].own_row(state.params)
        variables, shared = arrays["model_state"].own_row(state.model_state)
        return params, variables, self.packing.by_name("model_state", shared)

    def _totals(self, sums: Sequence[Any], programs: Sequence[StagePrograms], traced: Trace) -> Any:
        """Returns the sums as a tree of whole arrays, of which each device may have blocks alone."""
        cuts = programs[-1].outs_cut[1 : 1 + len(sums)]
        rows = zip(sums, traced.sum_shapes, cuts, strict=True)
        blocks = [Block(v, s.shape, cut, self.sizes) for v, s, cut in rows]
        return traced.sums.unflatten([b.whole_on(range(len(b.shape))).value for b in blocks])

    def _over_replicas(self, sums: Any) -> Any:
        """Returns sums over the examples of all replicas."""
        return lax.psum(sums, REPLICA) if REPLICA in self.mesh.shape else sums

    def _cleared(self, state: Buffers) -> Buffers:
        """Returns the packed variables as the first microbatch finds them, see `Program.before`."""
        deferred = {f"{path}.{which}" for path in self.program.deferred or () for which in ("mean", "var")}
        if not deferred:
            return state
        arrays, names = self.packing.arrays["model_state"], self.packing.names["model_state"]

        def of_rank(rank: int) -> Callable[[Buffers], Buffers]:
            def run(state: Buffers) -> Buffers:
                blocks = arrays.read(rank, state).items()
                zeros = {i: jnp.zeros_like(v) for i, v in blocks if names[i] in deferred}
                return arrays.write(rank, state, zeros)

            return run

        return lax.switch(lax.axis_index(PIPE), [of_rank(rank) for rank in range(self.schedule.ranks)], state)

    def _advanced(self, graph: OperationGraph, shared: dict[int, Array]) -> dict[int, Array]:
        """Returns the variables that no activation changes (random streams) after a step."""
        traced = graph.traced
        new = list(traced.new_state.values())
        ends = [new[i] for i in shared]
        given = [traced.groups()[1][i] for i in shared]
        part = jaxprs.subprogram(traced.closed, given, graph.repeated(ends), ends)
        blocks = [Block(v, v.shape, ((),) * v.ndim, self.sizes) for v in shared.values()]
        return {i: b.value for i, b in zip(shared, evaluate(part, blocks, self.sizes), strict=True)}

    def eval_step(self, mode: Mode, like: Batch) -> Callable[[TrainState, Batch], tuple[Any, Any]]:
        """Returns outputs or sums in evaluation mode, for batches of the shape and shardings of `like`."""
        rows = like.rows // size(self.mesh, Microbatch.of(like, 1).rows)
        micro = Microbatch.of(like, math.gcd(self.program.accumulate, rows))
        traced = self._traced(micro, mode)
        shapes, sums = traced.output_shapes, 1 + traced.sums.num_leaves
        refuse_rowless(shapes, micro.shapes[0].shape[0])
        graph = OperationGraph(traced.microbatch)
        stages = cut_by_owner(graph, self.stage_of, self.schedule.stages)
        programs = self._localized(stages, micro, backward=False)
        loop = self._loop(forward_only(self.schedule.ranks_of, micro.parts), programs, sums)
        cuts = [_cut_by_rows(cut, micro) for cut in programs[-1].outs_cut[sums:]]

        def step(state: TrainState, batch: Batch) -> tuple[list[Array], Any]:
            _, _, totals, outputs = loop.run(*self._own(state), micro.blocks(batch))
            arrived = zip(outputs, shapes, programs[-1].outs_cut[sums:], cuts, strict=True)
            blocks = [self._rows_of(y, s.shape, cut, end, micro.parts) for y, s, cut, end in arrived]
            whole, totals = lax.psum((blocks, totals[1:]), PIPE)
            # A sum of truth values is an integer.
            blocks = [y.astype(x.dtype) for x, y in zip(blocks, whole, strict=True)]
            return blocks, self._over_replicas(self._totals(totals, programs, traced))

        row_specs = [spec((micro.rows, *cut[1:])) for cut in cuts]
        manual = self._on_devices(step, like, (row_specs, P()))

        def evaluate_batch(state: TrainState, batch: Batch) -> tuple[Any, Any]:
            outputs, totals = manual(state, batch)
            cropped = [crop_to(y, (like.rows, *s.shape[1:])) for y, s in zip(outputs, shapes, strict=True)]
            return traced.outputs.unflatten(cropped), totals

        return evaluate_batch

    def _rows_of(self, outputs: Array, shape: tuple[int, ...], cut: Cut, end: Cut, parts: int) -> Array:
        """Returns this device's rows of the outputs of all microbatches, in the order of the batch."""
        block = Block(outputs, (parts, *shape), ((), *cut), self.sizes).moved(((), *end))
        # Row j of microbatch i is example i + j * m of the batch.
        return block.value.swapaxes(0, 1).reshape(-1, *block.value.shape[2:])


def _cuts(shapes: dict[str, Any], specs: dict[str, Any]) -> dict[str, Cut]:
    return {key: cut_of(specs[key], len(shape.shape)) for key, shape in shapes.items()}


def _cut_by_rows(cut: Cut, micro: Microbatch) -> Cut:
    """Returns the cut that outputs are to have: rows as those of the inputs, all else as the last layer's."""
    rows = micro.cuts[0][0]
    return rows, *(tuple(a for a in axes if a not in rows) for axes in cut[1:])


def _kib(shapes: Iterable[Any]) -> str:
    return f"{sum(s.size * s.dtype.itemsize for s in shapes) / 1024:,.1f} KiB"
