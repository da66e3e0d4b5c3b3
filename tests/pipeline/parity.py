"""Gradients of a pipeline beside those of one device, for many schedules with one compiled program.

A schedule is data: schedules with the same placement of stages differ only in the rows of their tables, so
one program whose buffers hold the most that any of them needs runs them all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import shardtrain as st
from shardtrain.mesh import parse
from shardtrain.pipeline import Schedule, lockstep, make
from shardtrain.pipeline.runtime.tick_loop import TickLoop
from shardtrain.pipeline.schedules.tick_table import COLUMNS, TickTable, build
from shardtrain.train.extra import on_devices
from shardtrain.train.pipelined.microbatch import Microbatch
from shardtrain.train.pipelined.step import Pipelined
from shardtrain.train.state import TrainState

from .models import MODELS, data

TOLERANCE = 1e-10
MICROBATCHES = 4
GROUPS = ["one stage a rank", "interleaved", "v"]

NOTHING = 1e-12
"""An array this much smaller than the largest is rounding of zeros, as a bias's gradient before a batch norm."""


def merged(tables: Sequence[TickTable]) -> TickTable:
    """A table whose branches, routes and slots are enough for all of `tables`."""
    routes: dict[int, set] = {}
    for table in tables:
        for distance, pairs in table.routes.items():
            routes.setdefault(distance, set()).update(pairs)
    return dataclasses.replace(
        tables[0],
        branches=(None, *sorted({b for t in tables for b in t.branches if b is not None})),
        inbox=max(t.inbox for t in tables),
        depth={
            name: tuple(map(max, *(t.depth[name] for t in tables), [0] * len(tables[0].depth[name])))
            for name in tables[0].depth
        },
        routes={d: tuple(sorted(routes[d])) for d in sorted(routes)},
        microbatches=max(t.microbatches for t in tables),
    )


def rows_in(table: TickTable, whole: TickTable, ticks: int) -> np.ndarray:
    """The rows of `table` as `whole` numbers things, filled up with idle ticks."""
    ranks = table.rows.shape[1]
    rows = np.zeros((ticks, ranks, len(COLUMNS) + len(whole.routes)), np.int32)
    rows[:, :, len(COLUMNS) :] = whole.inbox
    n = len(table.rows)
    rows[:n, :, : len(COLUMNS)] = table.rows[:, :, : len(COLUMNS)]
    rows[:n, :, 0] = np.array([whole.branches.index(b) for b in table.branches])[table.rows[:, :, 0]]
    for i, distance in enumerate(table.routes):
        column = table.rows[:, :, len(COLUMNS) + i]
        at = len(COLUMNS) + list(whole.routes).index(distance)
        rows[:n, :, at] = np.where(column == table.inbox, whole.inbox, column)
    return rows


@dataclasses.dataclass
class Case:
    """A model on a mesh with `pipe`, ready to run schedules of one placement of stages."""

    trainer: st.Trainer
    pipeline: Pipelined
    batch: Any
    state: TrainState

    @classmethod
    def of(
        cls, model: nnx.Module, mesh: str, inputs: Any, targets: Any, schedule: Schedule, **kwargs: Any
    ) -> "Case":
        options = {"optimizer": optax.sgd(0.1), "loss": st.losses.cross_entropy} | kwargs
        plan_changes = options.pop("plan", {})
        asked = st.Pipeline(schedule, options.pop("stages", None))
        trainer = st.Trainer(
            model,
            mesh=st.make_mesh(mesh),
            accumulate=schedule.microbatches,
            pipeline=asked,
            **options,
        )
        batch = trainer.place(inputs, targets)
        state = on_devices(trainer.state)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        plan = dataclasses.replace(trainer._plan, **plan_changes)
        pipeline = Pipelined(trainer._program, shapes, trainer._specs, trainer.mesh, batch, plan)
        return cls(trainer, pipeline, batch, pipeline.packing.pack(state))

    def program(self, table: TickTable, change: Callable[[TickLoop], TickLoop] = lambda loop: loop) -> Any:
        """`(rows, state, batch)` to packed gradients, packed variables and sums, compiled once.

        Args:
            table: whose branches, routes and slots are enough for all rows.
            change: makes the loop a wrong one, for tests of the tests.
        """
        pipe = self.pipeline
        micro = Microbatch.of(self.batch, table.microbatches)
        loop = pipe._loop(pipe.schedule, pipe.programs, 1 + pipe.sums)
        loop = change(dataclasses.replace(loop, table=table, filler=float("nan")))
        arrays = pipe.packing.arrays

        def step(rows: Any, state: TrainState, batch: Any) -> Any:
            grads, moved, sums, _ = loop.run(*pipe._own(state), micro.blocks(batch), rows)
            grads = arrays["params"].as_row(loop.summed(grads))
            return grads, arrays["model_state"].as_row(moved), lax.psum(sums, "pipe")

        rest = P(*pipe.mesh.axis_names)
        batch_specs = jax.tree.map(lambda x: x.sharding.spec, self.batch)
        manual = jax.shard_map(
            step,
            mesh=pipe.mesh,
            in_specs=(P(), pipe.packing.specs, batch_specs),
            out_specs=(rest, rest, P()),
            check_vma=False,
        )
        return jax.jit(manual)

    def run(self, schedules: Sequence[Schedule], latency: int = 1) -> list[tuple[dict, dict, list]]:
        """Of every schedule: gradients and variables by name, and the sums."""
        pipe = self.pipeline
        tables = [build(s, lockstep(s, latency=latency), latency) for s in schedules]
        whole = merged(tables)
        ticks = max(len(t.rows) for t in tables)
        program = self.program(whole)
        out = []
        for table in tables:
            grads, moved, sums = program(jnp.asarray(rows_in(table, whole, ticks)), self.state, self.batch)
            named = [
                pipe.packing.by_name(group, dict(enumerate(pipe.packing.arrays[group].unpack(new, shared))))
                for group, new, (_, shared) in (
                    ("params", grads, self.state.params),
                    ("model_state", moved, self.state.model_state),
                )
            ]
            named[1] = {k: v for k, v in named[1].items() if k in pipe.stage_of}
            out.append(jax.device_get((*named, sums)))
        return out

    def alone(self, parts: int | None = None) -> tuple[dict, dict, list]:
        """The same on one device: gradients and variables summed and moved microbatch by microbatch.

        Args:
            parts: how many microbatches; as many as in the pipeline by default.
        """
        program, parts = self.trainer._program, parts or self.pipeline.schedule.microbatches
        first = jax.devices()[0]
        inputs, targets, real = jax.device_put(
            jax.device_get((*self.batch.cropped(), self.batch.real)), first
        )
        index = jnp.arange(self.batch.rows)
        params, state = jax.device_put((self.trainer.state.params, self.trainer.state.model_state), first)

        def summed(params: dict) -> Any:
            total, sums, moving = 0.0, None, state
            for i in range(parts):
                args = jax.tree.map(lambda x, i=i: x[i::parts], (inputs, targets, real, index))
                before = {k: moving[k] if k in self.pipeline.stage_of else v for k, v in state.items()}
                loss, (more, moving) = program.microbatch(params, before, *args)
                total += loss
                sums = more if sums is None else jax.tree.map(jnp.add, sums, more)
            return total, (sums, moving)

        (loss, (sums, moved)), grads = jax.jit(jax.value_and_grad(summed, has_aux=True))(params)
        moved = {k: v for k, v in moved.items() if k in self.pipeline.stage_of}
        return jax.device_get((grads, moved, [loss, *jax.tree.leaves(sums)]))


def largest_difference(ours: Any, theirs: Any) -> float:
    """Of all arrays, each relative to its own largest value; not a number counts as different."""
    pairs = [
        (np.asarray(a, float), np.asarray(b, float))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    ]
    nothing = NOTHING * max((np.abs(b).max(initial=0) for _, b in pairs), default=0.0)

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        scale = np.abs(b).max(initial=0)
        if scale <= nothing:
            return 0.0 if np.abs(a).max(initial=0) <= nothing else float("inf")
        return float(np.abs(a - b).max() / scale)

    gaps = [gap(a, b) for a, b in pairs]
    return float("inf") if np.isnan(gaps).any() else max(gaps, default=0.0)


def schedules(ranks: int, group: str) -> list[Schedule]:
    """The schedules of one placement of stages, as asked, split and fused."""
    m = MICROBATCHES
    if group == "interleaved":
        twice = make("interleaved", ranks, m, 2)
        return [twice, twice.with_split()]
    if group == "v":
        v = make("zb-v", ranks, m)
        return [v, v.with_fused()]
    once = [make(name, ranks, m) for name in ("gpipe", "1f1b", "zb-h1")]
    return [*once, once[0].with_split(), once[1].with_split(), once[2].with_fused()]


def check(name: str, mesh: str, group: str, rows: int) -> None:
    """Gradients, variables and sums of every schedule of a group are those of one device.

    Args:
        name: of a model in `MODELS`.
        mesh: with `pipe`.
        group: one of `GROUPS`.
        rows: of the batch.
    """
    kind, _ = MODELS[name]
    group_of = schedules(parse(mesh)["pipe"], group)
    case = Case.of(kind(nnx.Rngs(0)), mesh, *data(name, rows), group_of[0])
    alone = case.alone()
    if not alone[1]:  # without batch norm the microbatches are the batch as it is
        assert_same(case.alone(1), alone, "one batch")
    for schedule, found in zip(group_of, case.run(group_of), strict=True):
        assert_same(found, alone, schedule.name)


def assert_same(ours: tuple, theirs: tuple, name: str) -> None:
    """Gradients, variables and sums agree."""
    for what, a, b in zip(("gradients", "variables", "sums"), ours, theirs, strict=True):
        assert type(a) is type(b)
        assert not isinstance(a, dict) or set(a) == set(b), f"{name}: other {what}"
        gap = largest_difference(a, b)
        assert gap < TOLERANCE, f"{name}: {what} differ by {gap:.1e}"
