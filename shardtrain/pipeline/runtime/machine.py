"""Runs a schedule: one SPMD program in which every rank does, tick by tick, what its row of the table says.

The program is manual over every mesh axis. In a tick a device enters the loop of its stage and in it that of
its action, `F`, `I`, `W` or the fused `B`, and puts what it makes where that waits; then messages go to the
ranks that are to act on them, along the routes that have any. Devices of other stages enter other loops, so
inside them only grouped collectives stand, whose groups never leave a stage.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardtrain.pipeline.runtime.pack import (
    Buffers,
    Pack,
    Place,
    SlotPlaces,
    add,
    largest,
    read,
    slots,
    write,
    zeros,
)
from shardtrain.pipeline.runtime.programs import Programs, is_float
from shardtrain.pipeline.schedules.table import COLUMNS, POOLS, TickTable

Numbers = Mapping[str, Array]
"""What the table says of a tick, by the names of its columns."""

Carry = dict[str, Any]
"""What actions change, by name."""


def once(needed: Array, do: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """What `do` makes of a carry where that is needed, else the carry.

    A loop of one turn or none: it changes its arrays in place, while XLA copies all that a conditional takes
    and returns.
    """

    def turn(now: tuple[Array, Carry]) -> tuple[Array, Carry]:
        return jnp.bool_(False), do(now[1])

    return lax.while_loop(lambda now: now[0], turn, (needed, carry))[1]


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

    table: TickTable
    ranks_of: tuple[int, ...]
    programs: tuple[Programs, ...]
    params: Mapping[str, Place]
    state: Mapping[str, Place]
    rows: SlotPlaces
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
        table, rank = self.table, lax.axis_index("pipe")

        def tick(c: Carry, row: Array) -> tuple[Carry, None]:
            mine = lax.dynamic_index_in_dim(row, rank, keepdims=False)
            at = {name: mine[i] for i, name in enumerate(COLUMNS)}
            kept = dict(c)
            inbox, before = kept.pop("inbox"), c["message"]
            if table.hop > 1 or self.bubble:  # else what is there is written over
                kept["message"] = acts.empty()
            for stage in range(len(self.programs)):
                kept = acts.act(stage, kept, inbox, at)
            travels = table.travels(row)
            for number, (distance, pairs) in enumerate(table.routes.items()):
                late = distance != 0 and table.hop > 1
                sent = before if late else kept["message"]
                slot = mine[len(COLUMNS) + number]
                deliver = functools.partial(_delivered, sent=sent, pairs=pairs if distance else (), slot=slot)
                # late ones travel beside what is computed, so not in a loop; the loops of others ask the same
                # on all devices, which wait for each other inside
                inbox = deliver(inbox) if late else once(travels[number], deliver, inbox)
            return {**kept, "inbox": inbox}, None

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
    """What a rank may do in a tick, each a function of the carry, the inbox and the table's numbers."""

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
            name: slots([getattr(p, name) for p in programs], table.depth[name], machine.ranks_of)
            for name in POOLS
        }

    def carry(self, state: Buffers) -> Carry:
        """All that waits, before the first tick."""
        table, bubble = self.machine.table, self.machine.bubble
        ends, sums = self.machine.programs[-1].outs, self.machine.sums
        carry = {
            "state": state,
            "inbox": {d: jnp.broadcast_to(v, (table.inbox + 1, len(v))) for d, v in self.empty().items()},
            "message": self.empty(),
            "sums": [jnp.zeros(s.shape, s.dtype) for s in ends[:sums]],
            "outputs": [jnp.zeros((table.microbatches, *s.shape), s.dtype) for s in ends[sums:]],
        }
        if any(doing and doing[1] in "BW" for doing in table.branches):
            carry["grads"] = zeros(self.machine.rows.lengths)
        return carry | {name: zeros(pool.lengths, bubble) for name, pool in self.pools.items()}

    def empty(self) -> Buffers:
        """No message."""
        return zeros(self.lengths, self.machine.bubble)

    def act(self, k: int, c: Carry, inbox: Buffers, at: Numbers) -> Carry:
        """What stage `k` does in a tick, if anything."""
        branches = enumerate(self.machine.table.branches)
        numbers = {doing[1]: i for i, doing in branches if doing and doing[0] == k}

        def turn(c: Carry) -> Carry:
            for kind, number in numbers.items():
                act = self.forward if kind == "F" else functools.partial(self.backward, kind)
                do = functools.partial(act, k, inbox=inbox, at=at)
                c = once(at["branch"] == number, do, c)
            return c

        first, last = min(numbers.values()), max(numbers.values())
        return once((first <= at["branch"]) & (at["branch"] <= last), turn, c)

    def forward(self, k: int, c: Carry, inbox: Buffers, at: Numbers) -> Carry:
        program, state = self.machine.programs[k], self.machine.state
        stage, n = program.stage, len(program.outs)
        variables = [
            state[name].read(c["state"]) if name in state else self.shared[name] for name in stage.state
        ]
        ins = read(_arrived(inbox, at), Pack(program.ins).places)
        given = [*read(self.params, self.weights[k]), *variables, *self.sides(at["microbatch"]), *ins]
        results = jax.core.eval_jaxpr(program.forward.jaxpr, program.forward.consts, *given)
        a, b = n + len(stage.moving), n + len(stage.moving) + len(program.saved)
        c = {**c, "state": write(c["state"], [state[name] for name in stage.moving], results[n:a])}
        c |= self._kept(k, c, at, saved=results[a:b], lasting=results[b:])
        if k < len(self.outs):
            return {**c, "message": write(c["message"], self.outs[k], results[:n])}
        sums = self.machine.sums
        # without the barrier XLA on GPUs sums over devices behind the loop, whatever the stage does in a tick
        new = lax.optimization_barrier(results[:sums])
        c["sums"] = [x + y for x, y in zip(c["sums"], new, strict=True)]
        c["outputs"] = [
            lax.dynamic_update_index_in_dim(x, y, at["microbatch"], 0)
            for x, y in zip(c["outputs"], results[sums:n], strict=True)
        ]
        return c

    def backward(self, kind: str, k: int, c: Carry, inbox: Buffers, at: Numbers) -> Carry:
        program = self.machine.programs[k]
        some = [*read(self.params, self.weights[k]), *self.sides(at["microbatch"])]
        lasting = self._waiting("lasting", k, c, at)
        if kind == "W":
            between = self._waiting("between", k, c, at)
        else:
            if k < len(self.flows):
                cotangents = read(_arrived(inbox, at), self.flows[k])
            else:
                cotangents = [jnp.ones(program.outs[0].shape, program.outs[0].dtype)]
            saved = self._waiting("saved", k, c, at)
            closed = program.input_gradient
            results = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *some, *cotangents, *saved, *lasting)
            flows = sum(is_float(s) for s in program.ins)
            between = results[flows:]
            if k:
                c = {**c, "message": write(c["message"], self.flows[k - 1], results[:flows])}
        if kind == "I":
            return c | self._kept(k, c, at, between=between)
        closed = program.weight_gradient
        new = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *some, *lasting, *between)
        return {**c, "grads": add(c["grads"], self.weights[k], new)}

    def _waiting(self, pool: str, k: int, c: Carry, at: Numbers) -> list[Array]:
        """What waits in the slot of a pool that the tick reads."""
        return read(c[pool], self.pools[pool].slot(k, at[pool]))

    def _kept(self, k: int, c: Carry, at: Numbers, **values: Sequence[Array]) -> Carry:
        """Pools with `values` in the slots that the tick writes."""
        return {name: write(c[name], self.pools[name].slot(k, at[name]), v) for name, v in values.items()}


def _arrived(inbox: Buffers, at: Numbers) -> Buffers:
    """The message that the tick acts on."""
    return {d: lax.dynamic_index_in_dim(v, at["inbox"], keepdims=False) for d, v in inbox.items()}


def _delivered(inbox: Buffers, sent: Buffers, pairs: Sequence[tuple[int, int]], slot: Array) -> Buffers:
    """The inbox with what came, by `pairs` of ranks or from this one."""
    if pairs:
        sent = jax.tree.map(lambda v: lax.ppermute(v, "pipe", pairs), sent)
    return {d: lax.dynamic_update_index_in_dim(v, sent[d], slot, 0) for d, v in inbox.items()}


def message(programs: Sequence[Programs]) -> dict[str, int]:
    """Lengths of the buffers that travel: of the largest activations, or their gradients."""
    outs = [Pack(p.outs).lengths for p in programs[:-1]]
    flows = [Pack([s for s in p.outs if is_float(s)]).lengths for p in programs[:-1]]
    return largest([*outs, *flows])
