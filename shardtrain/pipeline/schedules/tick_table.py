"""A schedule's ticks as a table of integers that a compiled program reads: who does what, with which slots.

Everything that waits has a slot: messages that were received, and what the forward pass keeps for the
backward pass. A slot is taken at the tick that writes it and is free after the tick that reads it last. There
are therefore as many slots as the schedule needs at once, and no more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardtrain.pipeline.schedules.actions import Action
from shardtrain.pipeline.schedules.schedule import Schedule
from shardtrain.pipeline.schedules.simulate import Ticks

COLUMNS = ("branch", "microbatch", "inbox", "saved", "lasting", "between")
"""What the table says of a rank in a tick, before the slots of the messages that it receives."""

POOLS = {"saved": ("F", "I"), "lasting": ("F", "W"), "between": ("I", "W")}
"""What a stage keeps: the action that writes it, and the action that reads it last (`B` is `I` and `W`)."""

_NOTHING = -1


@dataclass(frozen=True)
class TickTable:
    """What every rank does in every tick.

    Attributes:
        rows: int32 (ticks, ranks, columns): `COLUMNS`, then for each route the slot of the message that is
            received on it. The branch is a number among `branches`.
        branches: the stages and kinds of actions that the schedule has; None stands for an idle tick.
        inbox: the number of slots for messages on each rank. One more takes what is meant for nobody.
        depth: the number of slots of each stage in each pool.
        routes: for each distance that messages travel the (source, target) pairs of ranks; 0 stands for
            messages between stages of one rank.
        latency: the ticks from the action that makes a message to the earliest that uses it on another rank.
        microbatches: of the schedule.
    """

    rows: np.ndarray
    branches: tuple[tuple[int, str] | None, ...]
    inbox: int
    depth: dict[str, tuple[int, ...]]
    routes: dict[int, tuple[tuple[int, int], ...]]
    latency: int
    microbatches: int

    def travels(self, rows: Any) -> Any:
        """Returns whether any message is received on each route, as bools (ticks, routes).

        Args:
            rows: of this table, or of another one with the same routes and slots.
        """
        return (rows[..., len(COLUMNS) :] != self.inbox).any(axis=-2)


def build(schedule: Schedule, ticks: Ticks, latency: int = 1) -> TickTable:
    """Returns the table of a schedule whose ticks were simulated with the same `latency`."""
    return _Builder(schedule, ticks, latency).table()


class _Slots:
    """Hands out the lowest slot that is free."""

    def __init__(self) -> None:
        self.busy: dict[object, int] = {}
        self.most = 0

    def take(self, key: object) -> int:
        slot = next(i for i in range(len(self.busy) + 1) if i not in self.busy.values())
        self.busy[key] = slot
        self.most = max(self.most, slot + 1)
        return slot

    def give(self, key: object) -> int:
        return self.busy.pop(key)


@dataclass(frozen=True)
class _Message:
    """What one action sends to another stage.

    Attributes:
        rank: on which the stage is.
        distance: from the rank that sends it.
        key: tells it apart from the other messages in the inbox.
    """

    rank: int
    distance: int
    key: tuple[int, str, int]


class _Builder:
    """Fills a table tick by tick, in the order in which a program runs it."""

    def __init__(self, schedule: Schedule, ticks: Ticks, latency: int) -> None:
        self.schedule, self.ticks, self.latency = schedule, ticks, latency
        self.routes = _routes(schedule)
        kinds = {(a.stage, a.kind) for order in schedule.orders for a in order}
        self.branches = (None, *sorted(kinds))
        columns = len(COLUMNS) + len(self.routes)
        self.rows = np.zeros((len(ticks.table), schedule.ranks, columns), np.int32)
        self.rows[:, :, len(COLUMNS) :] = _NOTHING
        self.inbox = [_Slots() for _ in range(schedule.ranks)]
        self.pools = {name: [_Slots() for _ in range(schedule.stages)] for name in POOLS}
        self.under_way: dict[int, list[_Message]] = {}

    def table(self) -> TickTable:
        for tick, row in enumerate(self.ticks.table):
            for rank, action in enumerate(row):
                if action is not None:
                    self._act(tick, rank, action)
                    self._send(tick, rank, action)
            self._receive(tick)
        slots = max(inbox.most for inbox in self.inbox)
        self.rows[self.rows == _NOTHING] = slots
        depth = {name: tuple(pool.most for pool in pools) for name, pools in self.pools.items()}
        return TickTable(
            self.rows, self.branches, slots, depth, self.routes, self.latency, self.schedule.microbatches
        )

    def _act(self, tick: int, rank: int, action: Action) -> None:
        """Writes what a rank does, and the slots that it reads and writes."""
        stage, kind, microbatch = action
        kept = [_slot_of(pools[stage], name, kind, microbatch) for name, pools in self.pools.items()]
        message = 0
        if (kind == "F" and stage) or (kind in "IB" and stage < self.schedule.stages - 1):
            message = self.inbox[rank].give(_message_key(stage, kind, microbatch))
        branch = self.branches.index((stage, kind))
        self.rows[tick, rank, : len(COLUMNS)] = (branch, microbatch, message, *kept)

    def _send(self, tick: int, rank: int, action: Action) -> None:
        """Notes the message that an action sends, if it sends one."""
        stage, kind, microbatch = action
        to = stage + 1 if kind == "F" else stage - 1
        if kind == "W" or not 0 <= to < self.schedule.stages:
            return
        target = self.schedule.ranks_of[to]
        received = tick if target == rank else tick + self.latency - 1
        distance = (target - rank) % self.schedule.ranks
        message = _Message(target, distance, _message_key(to, kind, microbatch))
        self.under_way.setdefault(received, []).append(message)

    def _receive(self, tick: int) -> None:
        """Writes the slots of the messages that are received at the end of a tick."""
        for message in self.under_way.pop(tick, []):
            column = len(COLUMNS) + list(self.routes).index(message.distance)
            self.rows[tick, message.rank, column] = self.inbox[message.rank].take(message.key)


def _message_key(stage: int, kind: str, microbatch: int) -> tuple[int, str, int]:
    """Activations and gradients for one stage and microbatch are different messages."""
    return stage, "activations" if kind == "F" else "gradients", microbatch


def _slot_of(slots: _Slots, pool: str, kind: str, microbatch: int) -> int:
    """Returns the slot of a pool that an action writes or reads, 0 if it does neither."""
    first, last = POOLS[pool]
    if kind == "B":
        return 0 if pool == "between" else slots.give(microbatch)
    if kind == first:
        return slots.take(microbatch)
    if kind == last:
        return slots.give(microbatch)
    return slots.busy.get(microbatch, 0)


def _routes(schedule: Schedule) -> dict[int, tuple[tuple[int, int], ...]]:
    backward = any(action.kind != "F" for order in schedule.orders for action in order)
    found: dict[int, set[tuple[int, int]]] = {}
    for a, b in zip(schedule.ranks_of, schedule.ranks_of[1:], strict=False):
        for source, target in ((a, b), (b, a)) if backward else ((a, b),):
            found.setdefault((target - source) % schedule.ranks, set()).add((source, target))
    return {distance: tuple(sorted(found[distance])) for distance in sorted(found)}
