"""Runs a schedule: one SPMD program in which every rank does, tick by tick, what its row of the table says.

The program is manual over every mesh axis. A tick is one `switch` over all stages' `F`, `I`, `W` (or the
fused `B`), in which devices of other stages take other branches, and then the messages to the ranks that
are to act on them. Inside a branch only grouped collectives stand, whose groups never leave a stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardtrain.pipeline.pack import Buffers, Pack, Place, Rows, largest, read, write, zeros
from shardtrain.pipeline.stages import Programs, is_float
from shardtrain.pipeline.table import COLUMNS, POOLS, Table


@dataclass(frozen=True)
class Machine:
    """A schedule and its stages' programs, ready to run inside a `shard_map` over all axes.

    Attributes:
        table: of the schedule.
        ranks_of: the rank of each stage.
        programs: of each stage.
        params, state: where each parameter and each variable that one stage keeps lies, by name.
        lengths: of the packed parameters.
        sums: how many of the last stage's outputs are summed over microbatches, the loss first; the others
            are collected.
        bubble: what fills buffers that nothing has been written to, and messages of idle ranks. Tests set
            it to NaN, to prove that nothing leaks.
    """

    table: Table
    ranks_of: tuple[int, ...]
    programs: tuple[Programs, ...]
    params: Mapping[str, Place]
    state: Mapping[str, Place]
    lengths: Mapping[str, int]
    sums: int
    bubble: float = 0.0

    def run(
        self,
        params: Buffers,
        state: Buffers,
        shared: Mapping[str, Array],
        sides: Callable[[Array], Sequence[Array]],
        rows: Array | None = None,
    ) -> tuple[Buffers, Buffers, list[Array], list[Array]]:
        """All microbatches.

        Args:
            params, state: this device's packed parameters and variables.
            shared: variables that every stage may read and none changes.
            sides: the blocks of microbatch `i`: inputs, targets and so on.
            rows: of another table with the same branches, routes and slots.

        Returns:
            Packed gradients, summed over microbatches but not over the mesh; packed variables; the sums and
            the outputs of all microbatches, which are zeros on all ranks but the last stage's.
        """
        table, programs = self.table, self.programs
        pools = {
            name: Rows.of([getattr(p, name) for p in programs], table.depth[name], self.ranks_of)
            for name in POOLS
        }
        outs = [Pack(p.outs) if k < len(programs) - 1 else Pack([]) for k, p in enumerate(programs)]
        flows = [Pack([s for s in p.outs if is_float(s)]) for p in programs[:-1]]
        message = largest([pack.lengths for pack in (*outs, *flows)])
        ends = programs[-1].outs
        trains = any(doing is not None and doing[1] != "F" for doing in table.branches)
        carry: dict[str, Any] = {
            "state": state,
            "grads": zeros(self.lengths if trains else {}),
            "inbox": {
                d: jnp.full((table.inbox + 1, n), b[0] if n else 0, d)
                for (d, n), b in zip(
                    message.items(), zeros(dict.fromkeys(message, 1), self.bubble).values(), strict=True
                )
            },
            "sums": [jnp.zeros(s.shape, s.dtype) for s in ends[: self.sums]],
            "outputs": [jnp.zeros((table.microbatches, *s.shape), s.dtype) for s in ends[self.sums :]],
            **{name: zeros(rows.lengths, self.bubble) for name, rows in pools.items()},
        }
        empty = zeros(message, self.bubble)
        if table.hop > 1:
            carry["sent"] = empty

        def step(k: int, kind: str) -> Callable[[dict[str, Any], Mapping[str, Array]], tuple[Any, Buffers]]:
            program, last = programs[k], k == len(programs) - 1
            stage = program.stage
            floats = [i for i, s in enumerate(program.ins) if is_float(s)]

            def forward(c: dict[str, Any], at: Mapping[str, Array]) -> tuple[Any, Buffers]:
                weights = read(params, [self.params[n] for n in stage.params])
                variables = [
                    self.state[n].read(c["state"]) if n in self.state else shared[n] for n in stage.state
                ]
                arrived = {
                    d: lax.dynamic_index_in_dim(v, at["inbox"], keepdims=False) for d, v in c["inbox"].items()
                }
                ins = read(arrived, Pack(program.ins).places)
                results = jax.core.eval_jaxpr(
                    program.forward.jaxpr,
                    program.forward.consts,
                    *weights,
                    *variables,
                    *sides(at["microbatch"]),
                    *ins,
                )
                n = len(program.outs)
                a, b = n + len(stage.moving), n + len(stage.moving) + len(program.saved)
                c = dict(c)
                c["state"] = write(c["state"], [self.state[name] for name in stage.moving], results[n:a])
                c["saved"] = write(c["saved"], pools["saved"].slot(k, at["saved"]), results[a:b])
                c["lasting"] = write(c["lasting"], pools["lasting"].slot(k, at["lasting"]), results[b:])
                if last:
                    c["sums"] = [x + y for x, y in zip(c["sums"], results[: self.sums], strict=True)]
                    c["outputs"] = [
                        lax.dynamic_update_index_in_dim(x, y, at["microbatch"], 0)
                        for x, y in zip(c["outputs"], results[self.sums : n], strict=True)
                    ]
                    return c, empty
                return c, write(dict(empty), outs[k].places, results[:n])

            def backward(c: dict[str, Any], at: Mapping[str, Array]) -> tuple[Any, Buffers]:
                weights = read(params, [self.params[n] for n in stage.params])
                some = [*weights, *sides(at["microbatch"])]
                lasting = read(c["lasting"], pools["lasting"].slot(k, at["lasting"]))
                c, sent = dict(c), empty
                if kind in "IB":
                    if last:
                        cotangents = [jnp.ones(program.outs[0].shape, program.outs[0].dtype)]
                    else:
                        arrived = {
                            d: lax.dynamic_index_in_dim(v, at["inbox"], keepdims=False)
                            for d, v in c["inbox"].items()
                        }
                        cotangents = read(arrived, flows[k].places)
                    saved = read(c["saved"], pools["saved"].slot(k, at["saved"]))
                    closed = program.input_gradient
                    results = jax.core.eval_jaxpr(
                        closed.jaxpr, closed.consts, *some, *cotangents, *saved, *lasting
                    )
                    between = results[len(floats) :]
                    if k:
                        sent = write(dict(empty), flows[k - 1].places, results[: len(floats)])
                    if kind == "I":
                        c["between"] = write(c["between"], pools["between"].slot(k, at["between"]), between)
                else:
                    between = read(c["between"], pools["between"].slot(k, at["between"]))
                if kind in "WB":
                    closed = program.weight_gradient
                    new = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *some, *lasting, *between)
                    places = [self.params[n] for n in stage.params]
                    old = read(c["grads"], places)
                    c["grads"] = write(c["grads"], places, [a + b for a, b in zip(old, new, strict=True)])
                return c, sent

            return forward if kind == "F" else backward

        branches = [(lambda c, at: (c, empty)) if doing is None else step(*doing) for doing in table.branches]
        rank = lax.axis_index("pipe")

        def tick(c: dict[str, Any], row: Array) -> tuple[dict[str, Any], None]:
            mine = lax.dynamic_index_in_dim(row, rank, keepdims=False)
            at = {name: mine[i] for i, name in enumerate(COLUMNS)}
            before = c.get("sent")
            kept = {key: value for key, value in c.items() if key != "sent"}
            kept, made = lax.switch(at["branch"], branches, kept, at)
            for number, (distance, pairs) in enumerate(table.routes.items()):
                message = made if before is None or distance == 0 else before
                if distance:
                    message = jax.tree.map(lambda v, pairs=pairs: lax.ppermute(v, "pipe", pairs), message)
                slot = mine[len(COLUMNS) + number]
                kept["inbox"] = {
                    d: lax.dynamic_update_index_in_dim(v, message[d], slot, 0)
                    for d, v in kept["inbox"].items()
                }
            return (kept if before is None else {**kept, "sent": made}), None

        carry, _ = lax.scan(tick, carry, jnp.asarray(table.rows) if rows is None else rows)
        return carry["grads"], carry["state"], carry["sums"], carry["outputs"]

    def summed(self, grads: Buffers) -> Buffers:
        """The gradients summed over the mesh, each over the axes over which its stage left it unsummed."""

        def of(rank: int) -> Callable[[Buffers], Buffers]:
            def run(grads: Buffers) -> Buffers:
                for k, program in enumerate(self.programs):
                    if self.ranks_of[k] == rank:
                        for name, axes in zip(program.stage.params, program.sums, strict=True):
                            if axes:
                                place = self.params[name]
                                grads = place.write(grads, lax.psum(place.read(grads), axes))
                return grads

            return run

        ranks = max(self.ranks_of) + 1
        return lax.switch(lax.axis_index("pipe"), [of(rank) for rank in range(ranks)], grads)
