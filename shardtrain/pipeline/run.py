"""Runs a schedule: one SPMD program in which every rank does, tick by tick, what its row of the table says.

The program is manual over every mesh axis. A tick is one `switch` over all stages' `F`, `I`, `W` (or the
fused `B`), in which devices of other stages take other branches, and then the messages to the ranks that
are to act on them. Inside a branch only grouped collectives stand, whose groups never leave a stage.

Branches read the buffers in which things wait, and return what is to be written into them, which is done
behind the switch: XLA copies every array that a conditional takes and returns, at every tick.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardtrain.pipeline.pack import (
    Buffers,
    Pack,
    Place,
    Rows,
    Window,
    largest,
    put,
    read,
    window,
    write,
    zeros,
)
from shardtrain.pipeline.stages import Programs, is_float
from shardtrain.pipeline.table import COLUMNS, POOLS, Table

Done = tuple[dict[str, Any], dict[str, Window], Buffers]
"""What a branch returns: small values of the carry, windows of the buffers, a message."""


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
        lengths = message(programs)
        ends = programs[-1].outs
        trains = any(doing is not None and doing[1] != "F" for doing in table.branches)
        carry: dict[str, Any] = {
            "state": state,
            "grads": zeros(self.lengths if trains else {}),
            "inbox": {
                d: jnp.full((table.inbox + 1, n), b[0] if n else 0, d)
                for (d, n), b in zip(
                    lengths.items(), zeros(dict.fromkeys(lengths, 1), self.bubble).values(), strict=True
                )
            },
            "sums": [jnp.zeros(s.shape, s.dtype) for s in ends[: self.sums]],
            "outputs": [jnp.zeros((table.microbatches, *s.shape), s.dtype) for s in ends[self.sums :]],
            **{name: zeros(rows.lengths, self.bubble) for name, rows in pools.items()},
        }
        empty = zeros(lengths, self.bubble)
        weights_of = [[self.params[n] for n in p.stage.params] for p in programs]
        reach = {
            name: largest([p.lengths for p, n in zip(rows.packs, table.depth[name], strict=True) if n])
            for name, rows in pools.items()
        }
        reach["grads"] = largest([_reach(places) for places in weights_of]) if trains else {}
        small = ("state", "sums", "outputs")

        def done(
            c: dict[str, Any], written: Mapping[str, tuple[Sequence[Place], Sequence[Array]]], sent: Buffers
        ) -> Done:
            parts = {
                name: window(c[name], extents, *written.get(name, ((), ())))
                for name, extents in reach.items()
            }
            return {name: c[name] for name in small}, parts, sent

        if table.hop > 1:
            carry["sent"] = empty

        def step(k: int, kind: str) -> Callable[[dict[str, Any], Mapping[str, Array]], Done]:
            program, last = programs[k], k == len(programs) - 1
            stage = program.stage
            floats = [i for i, s in enumerate(program.ins) if is_float(s)]

            def forward(c: dict[str, Any], at: Mapping[str, Array]) -> Done:
                weights = read(params, weights_of[k])
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
                keeps = {"saved": results[a:b], "lasting": results[b:]}
                written = {name: (pools[name].slot(k, at[name]), values) for name, values in keeps.items()}
                if last:
                    c["sums"] = [x + y for x, y in zip(c["sums"], results[: self.sums], strict=True)]
                    c["outputs"] = [
                        lax.dynamic_update_index_in_dim(x, y, at["microbatch"], 0)
                        for x, y in zip(c["outputs"], results[self.sums : n], strict=True)
                    ]
                    return done(c, written, empty)
                return done(c, written, write(dict(empty), outs[k].places, results[:n]))

            def backward(c: dict[str, Any], at: Mapping[str, Array]) -> Done:
                weights = read(params, weights_of[k])
                some = [*weights, *sides(at["microbatch"])]
                lasting = read(c["lasting"], pools["lasting"].slot(k, at["lasting"]))
                sent, written = empty, dict[str, Any]()
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
                        written["between"] = pools["between"].slot(k, at["between"]), between
                else:
                    between = read(c["between"], pools["between"].slot(k, at["between"]))
                if kind in "WB":
                    closed = program.weight_gradient
                    new = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *some, *lasting, *between)
                    pairs = sorted(zip(weights_of[k], new, strict=True), key=lambda pair: pair[0].start)
                    places = [place for place, _ in pairs]
                    sums = [a + b for a, (_, b) in zip(read(c["grads"], places), pairs, strict=True)]
                    written["grads"] = places, sums
                return done(c, written, sent)

            return forward if kind == "F" else backward

        branches = [
            (lambda c, at: done(c, {}, empty)) if doing is None else step(*doing) for doing in table.branches
        ]
        rank = lax.axis_index("pipe")

        def tick(c: dict[str, Any], row: Array) -> tuple[dict[str, Any], None]:
            mine = lax.dynamic_index_in_dim(row, rank, keepdims=False)
            at = {name: mine[i] for i, name in enumerate(COLUMNS)}
            before = c.get("sent")
            kept = {key: value for key, value in c.items() if key != "sent"}
            changed, written, made = lax.switch(at["branch"], branches, kept, at)
            kept |= changed | {name: put(kept[name], part) for name, part in written.items()}
            for number, (distance, pairs) in enumerate(table.routes.items()):
                sent = made if before is None or distance == 0 else before
                if distance:
                    sent = jax.tree.map(lambda v, pairs=pairs: lax.ppermute(v, "pipe", pairs), sent)
                slot = mine[len(COLUMNS) + number]
                kept["inbox"] = {
                    d: lax.dynamic_update_index_in_dim(v, sent[d], slot, 0) for d, v in kept["inbox"].items()
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


def message(programs: Sequence[Programs]) -> dict[str, int]:
    """Lengths of the buffers that travel at every tick: of the largest activations, or their gradients."""
    outs = [Pack(p.outs).lengths for p in programs[:-1]]
    flows = [Pack([s for s in p.outs if is_float(s)]).lengths for p in programs[:-1]]
    return largest([*outs, *flows])


def _reach(places: Sequence[Place]) -> dict[str, int]:
    """Of each dtype, from the begin of the first place to the end of the last."""
    ends = {
        d: [(p.start, p.start + p.size) for p in places if p.dtype == d] for d in {p.dtype for p in places}
    }
    return {d: max(e for _, e in row) - min(s for s, _ in row) for d, row in ends.items()}
