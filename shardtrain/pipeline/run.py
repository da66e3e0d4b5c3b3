"""Runs a schedule: one SPMD program in which every rank does, tick by tick, what its row of the table says.

The program is manual over every mesh axis. A tick is one `switch` over all stages' `F`, `I`, `W` (or the
fused `B`), in which devices of other stages take other branches; then what the branch made is put where it
waits, and messages go to the ranks that are to act on them. Inside a branch only grouped collectives stand,
whose groups never leave a stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from shardtrain.pipeline.pack import Buffers, Pack, Place, Rows, largest, read, write, zeros
from shardtrain.pipeline.stages import Programs, is_float
from shardtrain.pipeline.table import COLUMNS, POOLS, Table
from shardtrain.pipeline.window import Pool, Sums, Window, Written

WHOLE = ("state", "sums", "outputs")
"""What a branch returns whole."""

Numbers = Mapping[str, Array]
"""What the table says of a tick, by the names of its columns."""

Done = tuple[dict[str, Any], Written, Buffers]
"""What a branch returns: part of the carry, a window for what waits or is summed, a message."""


@dataclass(frozen=True)
class Machine:
    """A schedule and its stages' programs, ready to run inside a `shard_map` over all axes.

    Attributes:
        table: of the schedule.
        ranks_of: the rank of each stage.
        programs: of each stage.
        params, state: where each parameter and each variable that one stage keeps lies, by name.
        rows: the packed parameters of all stages.
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
    rows: Rows
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
        acts = _Acts(self, params, shared, sides)
        table, window, branches = self.table, acts.window, acts.branches()
        kinds = ["" if doing is None else acts.writes(*doing) for doing in table.branches]
        of_kind = {kind: np.array([kind == k for k in kinds]) for kind in window.kinds}
        rank = lax.axis_index("pipe")

        def tick(c: dict[str, Any], row: Array) -> tuple[dict[str, Any], None]:
            mine = lax.dynamic_index_in_dim(row, rank, keepdims=False)
            at = {name: mine[i] for i, name in enumerate(COLUMNS)}
            before = c.get("sent")
            kept = {key: value for key, value in c.items() if key != "sent"}
            whole, written, made = lax.switch(at["branch"], branches, kept, at)
            acted = {kind: jnp.asarray(is_it)[at["branch"]] for kind, is_it in of_kind.items()}
            kept |= whole | window.put(kept, acted, written)
            for number, (distance, pairs) in enumerate(table.routes.items()):
                sent = made if before is None or distance == 0 else before
                if distance:
                    sent = jax.tree.map(lambda v, pairs=pairs: lax.ppermute(v, "pipe", pairs), sent)
                slot = mine[len(COLUMNS) + number]
                kept["inbox"] = {
                    d: lax.dynamic_update_index_in_dim(v, sent[d], slot, 0) for d, v in kept["inbox"].items()
                }
            return (kept if before is None else {**kept, "sent": made}), None

        carry, _ = lax.scan(tick, acts.carry(state), jnp.asarray(table.rows) if rows is None else rows)
        return carry.get("grads", {}), carry["state"], carry["sums"], carry["outputs"]

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


class _Acts:
    """What a rank may do in a tick, each a function of the carry and of the table's numbers."""

    def __init__(
        self,
        machine: Machine,
        params: Buffers,
        shared: Mapping[str, Array],
        sides: Callable[[Array], Sequence[Array]],
    ) -> None:
        self.machine, self.params, self.shared, self.sides = machine, params, shared, sides
        table, programs = machine.table, machine.programs
        self.weights = [[machine.params[n] for n in p.stage.params] for p in programs]
        self.outs = [Pack(p.outs).places for p in programs[:-1]]
        self.flows = [Pack([s for s in p.outs if is_float(s)]).places for p in programs[:-1]]
        self.lengths = message(programs)
        self.pools = {
            name: Pool.of([getattr(p, name) for p in programs], table.depth[name], machine.ranks_of)
            for name in POOLS
        }
        self.chunks = [machine.ranks_of[:k].count(rank) for k, rank in enumerate(machine.ranks_of)]
        self.sums = [
            Sums.of(machine.rows, [k for k, c in enumerate(self.chunks) if c == chunk])
            for chunk in range(max(self.chunks) + 1)
        ]
        kinds: dict[str, dict[str, Pool | Sums]] = {}
        for k, kind in (doing for doing in table.branches if doing is not None):
            kinds[self.writes(k, kind)] = (
                {"grads": self.sums[self.chunks[k]]}
                if kind in "WB"
                else {name: self.pools[name] for name, (first, _) in POOLS.items() if first == kind}
            )
        self.window = Window(kinds)

    def writes(self, k: int, kind: str) -> str:
        """What an action is to the window, to which gradients of a rank's stages are different kinds."""
        return f"W{self.chunks[k]}" if kind in "WB" else kind

    def carry(self, state: Buffers) -> dict[str, Any]:
        """All that waits, before the first tick."""
        table, bubble = self.machine.table, self.machine.bubble
        ends, sums = self.machine.programs[-1].outs, self.machine.sums
        inbox = {d: jnp.broadcast_to(v, (table.inbox + 1, len(v))) for d, v in self.empty().items()}
        carry: dict[str, Any] = {
            "state": state,
            "inbox": inbox,
            "sums": [jnp.zeros(s.shape, s.dtype) for s in ends[:sums]],
            "outputs": [jnp.zeros((table.microbatches, *s.shape), s.dtype) for s in ends[sums:]],
        }
        for targets in self.window.kinds.values():
            carry |= {name: target.empty(bubble) for name, target in targets.items()}
        if table.hop > 1:
            carry["sent"] = self.empty()
        return carry

    def branches(self) -> list[Callable[[dict[str, Any], Numbers], Done]]:
        """In the order of the table."""

        def of(k: int, kind: str) -> Callable[[dict[str, Any], Numbers], Done]:
            if kind == "F":
                return lambda c, at: self.forward(k, c, at)
            return lambda c, at: self.backward(k, kind, c, at)

        return [self.idle if doing is None else of(*doing) for doing in self.machine.table.branches]

    def empty(self) -> Buffers:
        """No message. Made in each branch: what all of them share, XLA makes at every tick and copies."""
        return zeros(self.lengths, self.machine.bubble)

    def idle(self, c: dict[str, Any], at: Numbers) -> Done:
        return {name: c[name] for name in WHOLE}, self.window.filled(), self.empty()

    def forward(self, k: int, c: dict[str, Any], at: Numbers) -> Done:
        program, state = self.machine.programs[k], self.machine.state
        stage, n = program.stage, len(program.outs)
        variables = [
            state[name].read(c["state"]) if name in state else self.shared[name] for name in stage.state
        ]
        ins = read(self._arrived(c, at), Pack(program.ins).places)
        given = [*read(self.params, self.weights[k]), *variables, *self.sides(at["microbatch"]), *ins]
        results = jax.core.eval_jaxpr(program.forward.jaxpr, program.forward.consts, *given)
        a, b = n + len(stage.moving), n + len(stage.moving) + len(program.saved)
        whole = {name: c[name] for name in WHOLE}
        whole["state"] = write(c["state"], [state[name] for name in stage.moving], results[n:a])
        keeps = {"saved": results[a:b], "lasting": results[b:]}
        parts = {name: self.pools[name].part(c[name], k, at[name], values) for name, values in keeps.items()}
        message = self.empty()
        if k < len(self.outs):
            message = write(message, self.outs[k], results[:n])
        else:
            sums = self.machine.sums
            whole["sums"] = [x + y for x, y in zip(c["sums"], results[:sums], strict=True)]
            whole["outputs"] = [
                lax.dynamic_update_index_in_dim(x, y, at["microbatch"], 0)
                for x, y in zip(c["outputs"], results[sums:n], strict=True)
            ]
        return whole, self.window.filled("F", parts), message

    def backward(self, k: int, kind: str, c: dict[str, Any], at: Numbers) -> Done:
        program = self.machine.programs[k]
        some = [*read(self.params, self.weights[k]), *self.sides(at["microbatch"])]
        lasting = read(c["lasting"], self.pools["lasting"].slot(k, at["lasting"]))
        message, whole = self.empty(), {name: c[name] for name in WHOLE}
        if kind == "W":
            between = read(c["between"], self.pools["between"].slot(k, at["between"]))
        else:
            if k < len(self.flows):
                cotangents = read(self._arrived(c, at), self.flows[k])
            else:
                cotangents = [jnp.ones(program.outs[0].shape, program.outs[0].dtype)]
            saved = read(c["saved"], self.pools["saved"].slot(k, at["saved"]))
            closed = program.input_gradient
            results = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *some, *cotangents, *saved, *lasting)
            flows = sum(is_float(s) for s in program.ins)
            between = results[flows:]
            if k:
                message = write(message, self.flows[k - 1], results[:flows])
        if kind == "I":
            part = self.pools["between"].part(c["between"], k, at["between"], between)
            return whole, self.window.filled("I", {"between": part}), message
        closed = program.weight_gradient
        new = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *some, *lasting, *between)
        part = self.sums[self.chunks[k]].part(k, self.weights[k], new)
        return whole, self.window.filled(self.writes(k, kind), {"grads": part}), message

    def _arrived(self, c: dict[str, Any], at: Numbers) -> Buffers:
        """The message that the tick acts on."""
        return {d: lax.dynamic_index_in_dim(v, at["inbox"], keepdims=False) for d, v in c["inbox"].items()}


def message(programs: Sequence[Programs]) -> dict[str, int]:
    """Lengths of the buffers that travel at every tick: of the largest activations, or their gradients."""
    outs = [Pack(p.outs).lengths for p in programs[:-1]]
    flows = [Pack([s for s in p.outs if is_float(s)]).lengths for p in programs[:-1]]
    return largest([*outs, *flows])
