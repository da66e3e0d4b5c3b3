"""A schedule's ticks as the numbers that a program reads: who does what, and which slots it uses.

Everything that waits has a slot: messages that arrived, and what the forward pass keeps for the backward
pass. A slot is taken at the tick that writes it and free after the tick that reads it last, so there are as
many as the schedule holds at once, and no more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shardtrain.pipeline.schedules.actions import Action
from shardtrain.pipeline.schedules.schedule import Schedule
from shardtrain.pipeline.schedules.simulate import Ticks

COLUMNS = ("branch", "microbatch", "inbox", "saved", "lasting", "between")
POOLS = {"saved": ("F", "I"), "lasting": ("F", "W"), "between": ("I", "W")}
"""What a stage keeps: the action that writes it, and the last that reads it (`B` is both)."""


@dataclass(frozen=True)
class TickTable:
    """What every rank does in every tick.

    Attributes:
        rows: int32 (ticks, ranks, columns): `COLUMNS`, then for each route the slot for what arrives on it.
            The branch is a number among `branches`.
        branches: what there is to do at all, a stage and a kind of action each; None is to idle.
        inbox: slots for messages on each rank; one more takes what is not meant for anybody.
        depth: slots of each stage in each pool.
        routes: the (source, target) pairs of ranks at each distance that messages travel, 0 for messages
            between stages of one rank.
        hop: ticks from a message's making to its use on another rank.
        microbatches: of the schedule.
    """

    rows: np.ndarray
    branches: tuple[tuple[int, str] | None, ...]
    inbox: int
    depth: dict[str, tuple[int, ...]]
    routes: dict[int, tuple[tuple[int, int], ...]]
    hop: int
    microbatches: int

    def travels(self, rows: Any) -> Any:
        """Whether anything comes by each route: bool (ticks, routes), of rows of this table or a like one."""
        return (rows[..., len(COLUMNS) :] != self.inbox).any(axis=-2)


class _Slots:
    """Hands out the lowest free number."""

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


def build(schedule: Schedule, ticks: Ticks, hop: int = 1) -> TickTable:
    """The table of a schedule whose ticks were simulated with the same `hop`."""
    ranks, stages = schedule.ranks, schedule.stages
    routes = _routes(schedule)
    does = {(a.stage, a.kind) for order in schedule.orders for a in order}
    branches = (None, *sorted(does))
    rows = np.zeros((len(ticks.table), ranks, len(COLUMNS) + len(routes)), np.int32)
    nowhere = -1
    rows[:, :, len(COLUMNS) :] = nowhere
    inbox = [_Slots() for _ in range(ranks)]
    pools = {name: [_Slots() for _ in range(stages)] for name in POOLS}
    arrivals: dict[int, list[tuple[int, int, Action]]] = {}
    for tick in range(len(rows)):
        for rank, action in enumerate(ticks.table[tick]):
            if action is None:
                continue
            stage, kind, microbatch = action
            kept = {name: _kept(pools[name][stage], name, kind, microbatch) for name in POOLS}
            arrived = 0
            if (kind == "F" and stage) or (kind in "IB" and stage < stages - 1):
                arrived = inbox[rank].give((stage, kind == "F", microbatch))
            rows[tick, rank, : len(COLUMNS)] = (
                branches.index((stage, kind)),
                microbatch,
                arrived,
                *kept.values(),
            )
            to = stage + 1 if kind == "F" else stage - 1
            if kind != "W" and 0 <= to < stages:
                target = schedule.ranks_of[to]
                when = tick if target == rank else tick + hop - 1
                message = target, (target - rank) % ranks, Action(to, kind, microbatch)
                arrivals.setdefault(when, []).append(message)
        for target, distance, (stage, kind, microbatch) in arrivals.pop(tick, []):
            column = len(COLUMNS) + list(routes).index(distance)
            rows[tick, target, column] = inbox[target].take((stage, kind == "F", microbatch))
    most = max(slots.most for slots in inbox)
    rows[rows == nowhere] = most
    depth = {name: tuple(slots.most for slots in row) for name, row in pools.items()}
    return TickTable(rows, branches, most, depth, routes, hop, schedule.microbatches)


def _kept(slots: _Slots, pool: str, kind: str, microbatch: int) -> int:
    """The slot of a pool that an action writes or reads, 0 where it does neither."""
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
