"""The training step on a mesh with `pipe`: the same model, loss and optimizer, cut into stages.

Every device keeps its own stage's parameters and optimizer state, packed. Names come back where they
matter: in the optimizer's update, which is traced on named arrays, and in checkpoints.
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
from shardtrain.pipeline.cut.balance import positions
from shardtrain.pipeline.cut.graph import OperationGraph, Stage, Traced
from shardtrain.pipeline.cut.layers import Layers
from shardtrain.pipeline.cut.retrace import refuse_counters, retrace_stages
from shardtrain.pipeline.localize.evaluate import Block, Cut, cut_of, evaluate
from shardtrain.pipeline.runtime.machine import Machine
from shardtrain.pipeline.runtime.pack import Place
from shardtrain.pipeline.runtime.programs import Programs, costs_of, localize
from shardtrain.pipeline.schedules.generate import forward_only
from shardtrain.pipeline.schedules.schedule import Schedule
from shardtrain.pipeline.schedules.simulate import fastest, lockstep
from shardtrain.pipeline.schedules.table import build
from shardtrain.train import check
from shardtrain.train.batch import Batch
from shardtrain.train.check import refuse_rowless
from shardtrain.train.pipelined.microbatch import Microbatch
from shardtrain.train.pipelined.plan import PipelinePlan
from shardtrain.train.pipelined.state import PackedState
from shardtrain.train.state import TrainState
from shardtrain.train.step import Program

Shape = jax.ShapeDtypeStruct
LIMIT = Shape((), jnp.float32)


class Pipelined(PackedState):
    """A `Program` cut into stages for batches of one shape.

    Args:
        program: what a step computes; its `accumulate` is the number of microbatches.
        named: the shapes of a state of ordinary named arrays.
        specs: how each of them lies on the mesh but for `pipe`.
        mesh: with `pipe`.
        batch: one on the mesh.
        plan: its schedule and stages.

    Raises:
        UserError: a model that cannot be cut so, or an optimizer that cannot be spread.
    """

    def __init__(
        self,
        program: Program,
        named: TrainState,
        specs: TrainState,
        mesh: Mesh,
        batch: Batch,
        plan: PipelinePlan,
    ) -> None:
        self.program, self.named_shapes, self.specs, self.mesh = program, named, specs, mesh
        self.outer = compat.with_manual(mesh, [PIPE, REPLICA])
        self.sizes = {n: s for n, s in mesh.shape.items() if n not in (PIPE, REPLICA)}
        self.plan, self._warned = plan, set[str]()
        self.cuts = cuts = {
            key: cut_of(lie[key], len(shapes[key].shape))
            for shapes, lie in ((named.params, specs.params), (named.model_state, specs.model_state))
            for key in shapes
        }
        self.micro = micro = Microbatch.of(batch, program.accumulate)
        traced, self.sums, _ = self._trace(micro, train=True)
        self.flow = flow = OperationGraph(traced)
        self.layers = Layers(flow)
        self.positions = positions(flow, plan.schedule.stages, plan.stages)
        stages = flow.cut(self.positions)
        stage_of = {n: k for k, s in enumerate(stages) for n in (*s.params, *s.moving)}
        refuse_counters(flow, stage_of, program.variables.is_random(), program.accumulate)
        self.programs = self._localize(stages, micro, remat=plan.remat)
        self.costs = costs_of(self.programs)
        self.schedule = fastest(plan.schedule, self.costs, plan.in_flight, plan.hop)
        self.ticks = lockstep(self.schedule, self.costs, plan.hop)
        super().__init__(named, cuts, stage_of, self.schedule.ranks_of, mesh)
        shapes = dict(zip(self.sums, self.programs[-1].outs[1:], strict=False))
        self.update = self.spread(program, shapes | ({"limit": LIMIT} if program.skip_bad else {}))

    def _trace(self, micro: Microbatch, *, train: bool) -> tuple[Traced, list[str], Any]:
        """One microbatch as a jaxpr of global arrays, the names of its sums, the tree of its outputs."""
        params, state = self.names["params"], self.names["model_state"]
        found: dict[str, Any] = {}

        def run(values: list, variables: list, *sides: Array) -> list:
            args = (
                dict(zip(params, values, strict=True)),
                dict(zip(state, variables, strict=True)),
                *jax.tree.unflatten(micro.tree, sides),
            )
            if train:
                loss, (sums, after) = self.program.microbatch(*args)
                outputs: Any = ()
            else:
                outputs, sums = self.program.evaluated(*args)
                outputs = outputs if args[3] is None else ()  # with targets, only the sums are asked for
                loss, after = jnp.zeros(()), args[1]
            found["sums"] = sorted(sums)
            leaves, found["tree"] = jax.tree.flatten(outputs)
            return [loss, *(sums[key] for key in found["sums"]), *leaves, *(after[key] for key in state)]

        values, variables = (jax.tree.leaves(getattr(self.named_shapes, g)) for g in self.names)
        with jax.sharding.use_abstract_mesh(self.outer):
            closed = jax.make_jaxpr(run)(values, variables, *micro.shapes)
        check.refuse_outside_islands(closed.jaxpr, self.mesh, staged=True)
        results = len(closed.jaxpr.outvars) - len(state) - 1
        traced = Traced(
            closed, tuple(params), tuple(state), micro.inputs, results, self.program.variables.layers
        )
        return traced, found["sums"], found["tree"]

    def _localize(
        self,
        stages: Sequence[Stage],
        micro: Microbatch,
        *,
        remat: Collection[int] = (),
        backward: bool = True,
    ) -> tuple[Programs, ...]:
        ins: Sequence[Cut] = ()
        found: list[Programs] = []
        for k, stage in enumerate(stages):
            given = [self.cuts[n] for n in (*stage.params, *stage.state)] + list(micro.cuts)
            kinds = {"last": k == len(stages) - 1, "remat": k in remat, "backward": backward}
            found.append(localize(stage, given, ins, self.outer, **kinds, warned=self._warned))
            ins = found[-1].outs_cut
        return tuple(found)

    def _machine(self, schedule: Schedule, programs: Sequence[Programs], sums: int) -> Machine:
        hop = self.plan.hop
        table = build(schedule, lockstep(schedule, hop=hop), hop)
        places = [
            {names[i]: place for i, place in held.places.items()}
            for names, held in zip(self.names.values(), (self.params, self.state), strict=True)
        ]
        params, state = places
        ranks_of, bubble, rows = schedule.ranks_of, self.plan.bubble, self.params.rows
        return Machine(table, ranks_of, tuple(programs), params, state, rows, sums, bubble)

    def table(self) -> Table:
        """The stages in a table: what they hold, do and send, and how evenly."""
        named = self.layers.names(self.positions)
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
        rows = (self.costs.forward, self.costs.input, self.costs.weight)
        costliest = max(map(max, rows))
        for k, program in enumerate(self.programs):
            table.add_row(
                str(k),
                str(self.schedule.ranks_of[k]),
                ", ".join(named[k]),
                _kib(self._places(k)),
                " ".join(f"{float(row[k] / costliest):.2f}" for row in rows),
                _kib((*program.saved, *program.lasting)),
                str(self.ticks.peak_of_stage[k]),
                _kib(program.outs) if k < len(self.programs) - 1 else "",
            )
        return table

    def _places(self, stage: int) -> list[Place]:
        return [self.params.places[i] for i in self.params.at_stage[stage]]

    # The programs.

    def _on_devices(self, function: Callable, like: Batch, outs: Any) -> Callable:
        """`function` of this device's part of the state and the batch, manual over every axis."""
        given = (self.state_specs, jax.tree.map(lambda x: x.sharding.spec, like))
        return jax.shard_map(function, mesh=self.mesh, in_specs=given, out_specs=outs, check_vma=False)

    def train_step(self, like: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
        """One update, for batches that lie as `like` does; see `Program.train_step`."""
        micro = Microbatch.of(like, self.program.accumulate)
        flow, programs = self.flow, self.programs
        if micro != self.micro:
            flow = OperationGraph(self._trace(micro, train=True)[0])
            alike = [e.primitive for e in flow.main] == [e.primitive for e in self.flow.main]
            again = (
                retrace_stages(flow, self.stage_of, self.schedule.stages)
                if not alike
                else flow.cut(self.positions)
            )
            programs = self._localize(again, micro, remat=self.plan.remat)
        machine = self._machine(self.schedule, programs, 1 + len(self.sums))

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
            (params, frozen), (before, shared), (opt, others) = map(
                _rows, (state.params, state.model_state, state.opt_state)
            )
            start = self._started(before)
            grads, moved, sums, _ = machine.run(
                params, start, self._by_name("model_state", shared), micro.blocks(batch)
            )
            grads = machine.summed(grads)
            over = dict(zip(self.sums, lax.psum(sums, PIPE)[1:], strict=True))
            if self.program.skip_bad:
                over["limit"] = batch.limit
            everywhere = [{0: state.step}, frozen, shared, others]
            everywhere += [{i: jnp.zeros_like(v) for i, v in frozen.items()}, self._advanced(flow, shared)]
            everywhere += [dict(enumerate(over[key] for key in sorted(over)))]
            known = {
                at + i: v for at, part in zip(self._starts, everywhere, strict=True) for i, v in part.items()
            }
            packed, free = self.update((params, before, opt, grads, moved), known, self._read, self._write)
            parts = [
                (_back(buffers, len(self.mesh.axis_names)), {i: free[start + i] for i in held.shared})
                for buffers, held, start in zip(
                    packed[:3], self.holds.values(), self._starts[1:4], strict=True
                )
            ]
            reported = {
                key: self._over_replicas(free[self._starts[4] + i]) for i, key in enumerate(self.reported)
            }
            return TrainState(free[0], *parts), reported

        return self._on_devices(step, like, (self.state_specs, P()))

    def _over_replicas(self, sums: Any) -> Any:
        """Sums over all examples, those of every replica."""
        return lax.psum(sums, REPLICA) if REPLICA in self.mesh.shape else sums

    def _started(self, state: dict[str, Array]) -> dict[str, Array]:
        """The packed variables as the first microbatch finds them."""
        deferred = {f"{path}.{which}" for path in self.program.deferred or () for which in ("mean", "var")}
        if not deferred:
            return state

        def on(rank: int) -> Callable[[dict[str, Array]], dict[str, Array]]:
            def run(state: dict[str, Array]) -> dict[str, Array]:
                blocks = self.state.read(rank, state)
                sums = {
                    i: jnp.zeros_like(v)
                    for i, v in blocks.items()
                    if self.names["model_state"][i] in deferred
                }
                return self.state.write(rank, state, sums)

            return run

        return lax.switch(lax.axis_index(PIPE), [on(rank) for rank in range(self.schedule.ranks)], state)

    def _advanced(self, flow: OperationGraph, shared: dict[int, Array]) -> dict[int, Array]:
        """The variables that no activation changes (random streams) after a step."""
        traced = flow.traced
        news = traced.closed.jaxpr.outvars[1 + traced.sums :]
        ends = [news[i] for i in shared]
        mine = [traced.groups()[1][i] for i in shared]
        part = jaxprs.subprogram(traced.closed, mine, flow.repeated(ends), ends)
        blocks = [Block(v, v.shape, ((),) * v.ndim, self.sizes) for v in shared.values()]
        return {i: b.value for i, b in zip(shared, evaluate(part, blocks, self.sizes), strict=True)}

    def eval_step(self, like: Batch) -> Callable[[TrainState, Batch], tuple[Any, dict[str, Array]]]:
        """Outputs and sums in evaluation mode, for batches that lie as `like` does."""
        rows = like.rows // size(self.mesh, Microbatch.of(like, 1).rows)
        micro = Microbatch.of(like, math.gcd(self.program.accumulate, rows))
        traced, names, tree = self._trace(micro, train=False)
        flow = OperationGraph(traced)
        outs = traced.closed.jaxpr.outvars[1 + len(names) : 1 + traced.sums]
        refuse_rowless([v.aval for v in outs], micro.shapes[0].shape[0])
        stages = retrace_stages(flow, self.stage_of, self.schedule.stages)
        programs = self._localize(stages, micro, backward=False)
        machine = self._machine(forward_only(self.schedule.ranks_of, micro.parts), programs, 1 + len(names))
        cuts = programs[-1].outs_cut[1 + len(names) :]
        batch_cut = micro.cuts[0][0]
        # Rows come back as the batch lies, however the last layer's do.
        ends = [(batch_cut, *(tuple(a for a in axes if a not in batch_cut) for axes in c[1:])) for c in cuts]

        def moved(y: Array, shape: tuple[int, ...], cut: Cut, end: Cut) -> Array:
            return Block(y, (micro.parts, *shape), ((), *cut), self.sizes).moved(((), *end)).value

        def step(state: TrainState, batch: Batch) -> tuple[list[Array], list[Array]]:
            (params, _), (variables, shared) = map(_rows, (state.params, state.model_state))
            known = self._by_name("model_state", shared)
            _, _, sums, outputs = machine.run(params, variables, known, micro.blocks(batch))
            pairs = zip(outputs, outs, cuts, ends, strict=True)
            outputs = [moved(y, v.aval.shape, cut, end) for y, v, cut, end in pairs]
            # Row j of microbatch i is example i + j * m of the batch.
            rows = [y.swapaxes(0, 1).reshape(-1, *y.shape[2:]) for y in outputs]
            whole, sums = lax.psum((rows, sums[1:]), PIPE)
            rows = [y.astype(x.dtype) for x, y in zip(rows, whole, strict=True)]  # sums of truth values
            return rows, self._over_replicas(sums)

        manual = self._on_devices(step, like, ([spec((micro.rows, *end[1:])) for end in ends], P()))

        def evaluate(state: TrainState, batch: Batch) -> tuple[Any, dict[str, Array]]:
            outputs, sums = manual(state, batch)
            outputs = [crop_to(y, (like.rows, *v.aval.shape[1:])) for y, v in zip(outputs, outs, strict=True)]
            return jax.tree.unflatten(tree, outputs), dict(zip(names, sums, strict=True))

        return evaluate


def _kib(shapes: Iterable[Any]) -> str:
    return f"{sum(s.size * s.dtype.itemsize for s in shapes) / 1024:,.1f} KiB"


def _rows(part: Any) -> Any:
    """This device's row of packed buffers, and the shared arrays."""
    buffers, shared = part
    return {d: b.reshape(-1) for d, b in buffers.items()}, shared


def _back(buffers: dict[str, Array], axes: int) -> dict[str, Array]:
    """A row as this device's part of the packed buffers of a mesh of so many axes."""
    return {d: b.reshape((1,) * axes + b.shape) for d, b in buffers.items()}
