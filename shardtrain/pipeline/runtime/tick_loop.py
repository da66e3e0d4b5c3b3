"""Runs a schedule: a loop over ticks, in which every rank does what its row of the tick table says.

The loop is one SPMD program, manual over every mesh axis. In a tick, each device runs the action of its rank:
`F`, `I`, `W` or the fused `B` of one stage. It keeps what a later action needs in slots, and writes what
another stage needs into its message. Messages are then sent along those routes between ranks that have any.

Four things here look strange and have reasons:

- An action is the body of a loop that runs once or not at all, not a branch of a conditional. XLA copies all
  that a conditional takes and returns, which would be all gradients and all that is kept, at every tick; a
  loop changes its arrays in place.
- Devices of different stages are in different such loops at a time. A collective in one of them must be one
  that devices of other stages need not join: all-gathers, sums and all-to-alls, whose groups stay within a
  stage. In a collective-permute all devices of the program meet, also those that send nothing, so that one in
  a loop would wait for ever. That is why layers exchange halos by all-gathers here, and why messages, which
  are permutes, are sent outside of the stages' loops.
- The loop of a route asks the table, not the rank, whether any message is sent in a tick, so that all devices
  enter it or none does.
- Slots that nothing was written to, and messages of ranks that send none, have a filler. It is zero; tests
  set it to NaN, and any value that is used before it was written then makes the results NaN.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardtrain.pipeline.runtime.flat_buffers import (
    Buffers,
    Pack,
    Place,
    SlotPlaces,
    add,
    longest,
    read,
    slot_places,
    write,
    zeros,
)
from shardtrain.pipeline.runtime.stage_programs import StagePrograms, is_float
from shardtrain.pipeline.schedules.tick_table import COLUMNS, POOLS, TickTable

Numbers = Mapping[str, Array]
"""What the table says of this rank in a tick, by the names of its columns."""

Carry = dict[str, Any]
"""What actions change, by name."""


def run_if(wanted: Array, action: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Returns `action(carry)` if that is wanted, else the carry, by a loop of at most one turn."""

    def turn(now: tuple[Array, Carry]) -> tuple[Array, Carry]:
        return jnp.bool_(False), action(now[1])

    return lax.while_loop(lambda now: now[0], turn, (wanted, carry))[1]


@dataclass(frozen=True)
class TickLoop:
    """A schedule and its stages' programs, ready to run inside a `shard_map` over all axes.

    Attributes:
        table: of the schedule.
        ranks_of: the rank of each stage.
        programs: of each stage.
        params: by name, the place of each parameter in the buffers of its rank.
        state: the same for variables that one stage stores.
        rows: the places of all stages' parameters.
        sums: how many of the last stage's results are summed over microbatches, the loss first. The other
            results are collected.
        filler: what slots have that nothing was written to, and messages of ranks that send none.
    """

    table: TickTable
    ranks_of: tuple[int, ...]
    programs: tuple[StagePrograms, ...]
    params: Mapping[str, Place]
    state: Mapping[str, Place]
    rows: SlotPlaces
    sums: int
    filler: float = 0.0

    def run(
        self,
        params: Buffers,
        state: Buffers,
        shared: Mapping[str, Array],
        examples: Callable[[Array], Sequence[Array]],
        rows: Array | None = None,
    ) -> tuple[Buffers, Buffers, list[Array], list[Array]]:
        """Runs all microbatches.

        Args:
            params: this device's packed parameters.
            state: this device's packed variables.
            shared: variables that every stage may read and none changes.
            examples: returns this device's blocks of microbatch `i`: inputs, targets and so on.
            rows: of another table with the same branches, routes and slots.

        Returns:
            Packed gradients, summed over microbatches but not over the mesh; packed variables; the sums; and
            the collected results of all microbatches. The last two are zeros on all ranks but that of the
            last stage.
        """
        actions = _Actions(self, params, shared, examples)
        table, rank = self.table, lax.axis_index("pipe")

        def tick(carry: Carry, row: Array) -> tuple[Carry, None]:
            mine = lax.dynamic_index_in_dim(row, rank, keepdims=False)
            at = {name: mine[i] for i, name in enumerate(COLUMNS)}
            now = dict(carry)
            inbox = now.pop("inbox")
            if table.latency > 1 or self.filler:  # else the old message is overwritten or sent to nobody
                now["message"] = actions.no_message()
            for stage in range(len(self.programs)):
                now = actions.run_stage(stage, now, inbox, at)
            slots = mine[len(COLUMNS) :]
            inbox = self._delivered(inbox, carry["message"], now["message"], table.travels(row), slots)
            return {**now, "inbox": inbox}, None

        carry, _ = lax.scan(
            tick, actions.first_carry(state), jnp.asarray(table.rows) if rows is None else rows
        )
        return carry.get("grads", {}), carry["state"], carry["sums"], carry["outputs"]

    def _delivered(
        self, inbox: Buffers, previous: Buffers, current: Buffers, travels: Array, slots: Array
    ) -> Buffers:
        """Returns the inbox after the messages of a tick were delivered.

        Args:
            inbox: before.
            previous: the message of this rank of the tick before, which is sent now if sending takes a tick.
            current: the message of this rank of this tick.
            travels: for each route whether there is any message.
            slots: for each route the slot of what this rank receives.
        """
        for number, (distance, pairs) in enumerate(self.table.routes.items()):
            overlaps = distance != 0 and self.table.latency > 1
            deliver = functools.partial(
                _deliver,
                message=previous if overlaps else current,
                pairs=pairs if distance else (),
                slot=slots[number],
            )
            # A message that overlaps with computation must not be in a loop, which computes nothing else.
            inbox = deliver(inbox) if overlaps else run_if(travels[number], deliver, inbox)
        return inbox

    def summed(self, grads: Buffers) -> Buffers:
        """Returns packed gradients, each summed over the mesh axes over which its stage left it unsummed."""

        def of_rank(rank: int) -> Callable[[Buffers], Buffers]:
            programs = [p for p, r in zip(self.programs, self.ranks_of, strict=True) if r == rank]
            unsummed = [pair for p in programs for pair in zip(p.stage.params, p.unsummed_axes, strict=True)]

            def run(grads: Buffers) -> Buffers:
                for name, axes in unsummed:
                    if axes:
                        place = self.params[name]
                        grads = place.write(grads, lax.psum(place.read(grads), axes))
                return grads

            return run

        ranks = max(self.ranks_of) + 1
        return lax.switch(lax.axis_index("pipe"), [of_rank(rank) for rank in range(ranks)], grads)


class _Actions:
    """What a rank may do in a tick, each a function of the carry, the inbox and the table's numbers.

    Args:
        loop: the schedule and its programs.
        params, shared, examples: see `TickLoop.run`.

    Attributes:
        weights: for each stage the places of its parameters.
        outs: for each stage but the last the places of its activations in a message.
        cotangents: for each stage but the last the places of the gradients of its activations in a message.
        message_lengths: of the buffers of a message.
        pools: for each pool the places of its slots.
    """

    def __init__(
        self,
        loop: TickLoop,
        params: Buffers,
        shared: Mapping[str, Array],
        examples: Callable[[Array], Sequence[Array]],
    ) -> None:
        self.loop, self.params, self.shared, self.examples = loop, params, shared, examples
        table, programs = loop.table, loop.programs
        self.weights = [[loop.params[n] for n in p.stage.params] for p in programs]
        self.outs = [Pack(p.outs).places for p in programs[:-1]]
        self.cotangents = [Pack([s for s in p.outs if is_float(s)]).places for p in programs[:-1]]
        self.message_lengths = message_lengths(programs)
        self.pools = {
            name: slot_places([getattr(p, name) for p in programs], table.depth[name], loop.ranks_of)
            for name in POOLS
        }

    def first_carry(self, state: Buffers) -> Carry:
        """Returns the carry before the first tick."""
        table, filler = self.loop.table, self.loop.filler
        results, sums = self.loop.programs[-1].outs, self.loop.sums
        inbox = {b: jnp.broadcast_to(v, (table.inbox + 1, len(v))) for b, v in self.no_message().items()}
        carry = {
            "state": state,
            "inbox": inbox,
            "message": self.no_message(),
            "sums": [jnp.zeros(s.shape, s.dtype) for s in results[:sums]],
            "outputs": [jnp.zeros((table.microbatches, *s.shape), s.dtype) for s in results[sums:]],
        }
        if any(branch and branch[1] in "BW" for branch in table.branches):
            carry["grads"] = zeros(self.loop.rows.lengths)
        return carry | {name: zeros(pool.lengths, filler) for name, pool in self.pools.items()}

    def no_message(self) -> Buffers:
        """Returns the message of a rank that sends none."""
        return zeros(self.message_lengths, self.loop.filler)

    def run_stage(self, k: int, carry: Carry, inbox: Buffers, at: Numbers) -> Carry:
        """Returns the carry after what stage `k` does in a tick, if anything."""
        branches = enumerate(self.loop.table.branches)
        number_of = {branch[1]: i for i, branch in branches if branch and branch[0] == k}

        def act(carry: Carry) -> Carry:
            for kind, number in number_of.items():
                run = self.forward if kind == "F" else functools.partial(self.backward, kind)
                action = functools.partial(run, k, inbox=inbox, at=at)
                carry = run_if(at["branch"] == number, action, carry)
            return carry

        first, last = min(number_of.values()), max(number_of.values())
        return run_if((first <= at["branch"]) & (at["branch"] <= last), act, carry)

    def forward(self, k: int, carry: Carry, inbox: Buffers, at: Numbers) -> Carry:
        """Returns the carry after the action `F` of stage `k`."""
        program, state = self.loop.programs[k], self.loop.state
        stage, n = program.stage, len(program.outs)
        variables = [
            state[name].read(carry["state"]) if name in state else self.shared[name] for name in stage.state
        ]
        ins = read(_received(inbox, at), Pack(program.ins).places)
        given = [*read(self.params, self.weights[k]), *variables, *self.examples(at["microbatch"]), *ins]
        results = jax.core.eval_jaxpr(program.forward.jaxpr, program.forward.consts, *given)
        a, b = n + len(stage.updated), n + len(stage.updated) + len(program.saved)
        new_state = write(carry["state"], [state[name] for name in stage.updated], results[n:a])
        carry = {**carry, "state": new_state}
        carry |= self._keep(k, carry, at, saved=results[a:b], lasting=results[b:])
        if k < len(self.outs):
            return {**carry, "message": write(carry["message"], self.outs[k], results[:n])}
        return {**carry, **self._with_results(carry, results[:n], at)}

    def _with_results(self, carry: Carry, results: Sequence[Any], at: Numbers) -> Carry:
        """Returns the sums and the outputs with the last stage's results of one microbatch."""
        sums = self.loop.sums
        # Without the barrier, XLA on GPUs moves the sum over devices out of the action, so that it runs in
        # every tick, whatever the stage does.
        new = lax.optimization_barrier(list(results[:sums]))
        outputs = zip(carry["outputs"], results[sums:], strict=True)
        return {
            "sums": [x + y for x, y in zip(carry["sums"], new, strict=True)],
            "outputs": [lax.dynamic_update_index_in_dim(x, y, at["microbatch"], 0) for x, y in outputs],
        }

    def backward(self, kind: str, k: int, carry: Carry, inbox: Buffers, at: Numbers) -> Carry:
        """Returns the carry after the action `I`, `W` or `B` of stage `k`."""
        program = self.loop.programs[k]
        given = [*read(self.params, self.weights[k]), *self.examples(at["microbatch"])]
        lasting = self._kept("lasting", k, carry, at)
        if kind == "W":
            between = self._kept("between", k, carry, at)
        else:
            saved = self._kept("saved", k, carry, at)
            arguments = [*given, *self._cotangents(k, inbox, at), *saved, *lasting]
            closed = program.input_gradient
            results = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arguments)
            sent = sum(is_float(s) for s in program.ins)
            between = results[sent:]
            if k:
                message = write(carry["message"], self.cotangents[k - 1], results[:sent])
                carry = {**carry, "message": message}
        if kind == "I":
            return carry | self._keep(k, carry, at, between=between)
        closed = program.weight_gradient
        new = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *given, *lasting, *between)
        return {**carry, "grads": add(carry["grads"], self.weights[k], new)}

    def _cotangents(self, k: int, inbox: Buffers, at: Numbers) -> list[Array]:
        """Returns the gradients of a stage's results; that of the loss is 1."""
        if k < len(self.cotangents):
            return read(_received(inbox, at), self.cotangents[k])
        loss = self.loop.programs[k].outs[0]
        return [jnp.ones(loss.shape, loss.dtype)]

    def _kept(self, pool: str, k: int, carry: Carry, at: Numbers) -> list[Array]:
        """Returns the values in the slot of a pool that the tick reads."""
        return read(carry[pool], self.pools[pool].slot(k, at[pool]))

    def _keep(self, k: int, carry: Carry, at: Numbers, **values: Sequence[Any]) -> Carry:
        """Returns pools with `values` in the slots that the tick writes."""
        return {name: write(carry[name], self.pools[name].slot(k, at[name]), v) for name, v in values.items()}


def _received(inbox: Buffers, at: Numbers) -> Buffers:
    """Returns the message that the action of a tick uses."""
    return {b: lax.dynamic_index_in_dim(v, at["inbox"], keepdims=False) for b, v in inbox.items()}


def _deliver(inbox: Buffers, message: Buffers, pairs: Sequence[tuple[int, int]], slot: Array) -> Buffers:
    """Returns the inbox with a message, sent by `pairs` of ranks, or from this rank without any."""
    if pairs:
        message = jax.tree.map(lambda v: lax.ppermute(v, "pipe", pairs), message)
    return {b: lax.dynamic_update_index_in_dim(v, message[b], slot, 0) for b, v in inbox.items()}


def message_lengths(programs: Sequence[StagePrograms]) -> dict[str, int]:
    """Returns the lengths of the buffers of a message: those of the largest activations or gradients."""
    outs = [Pack(p.outs).lengths for p in programs[:-1]]
    cotangents = [Pack([s for s in p.outs if is_float(s)]).lengths for p in programs[:-1]]
    return longest([*outs, *cotangents])
