"""How long a schedule takes and how much it holds, counted before anything runs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.actions import Action, gives, needs
from shardtrain.pipeline.schedules.costs import Costs, Number
from shardtrain.pipeline.schedules.schedule import Schedule

__all__ = ["Costs", "Ticks", "Timeline", "classical", "fastest", "in_flight", "lockstep"]


@dataclass(frozen=True)
class Timeline:
    """A schedule whose ranks wait for nothing but what they need.

    Attributes:
        start, end: of every action.
        makespan: time until the last action ends.
        idle: share of ranks x makespan in which nothing is done.
        peak_in_flight: for every rank, the most activations held at once, one for each stage and microbatch
            from the start of its forward to the end of its backward's last part.
        peak_of_stage: the same for every stage.
    """

    start: dict[Action, Number]
    end: dict[Action, Number]
    makespan: Number
    idle: Fraction
    peak_in_flight: tuple[int, ...]
    peak_of_stage: tuple[int, ...]


@dataclass(frozen=True)
class Ticks:
    """A schedule in lockstep, as one SPMD program runs it.

    Attributes:
        table: for every tick, what each rank does; `None` where it idles.
        durations: of every tick, the time of its costliest action.
        makespan: their sum.
        idle, peak_in_flight, peak_of_stage: as in `Timeline`.
    """

    table: tuple[tuple[Action | None, ...], ...]
    durations: tuple[Number, ...]
    makespan: Number
    idle: Fraction
    peak_in_flight: tuple[int, ...]
    peak_of_stage: tuple[int, ...]


def classical(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Every rank starts its next action as soon as what it needs is done; communication is free.

    Args:
        schedule: one that ends (`validate` says so).
        costs: 1 for each `F`, `I` and `W` by default, so 2 for `B`.

    Raises:
        UserError: a deadlock, costs of another number of stages.

    Example:
        >>> classical(make("1f1b", ranks=4, microbatches=8)).idle  # (p-1) / (m+p-1)
        Fraction(3, 11)
    """
    costs = _costs(schedule, costs)
    start = _starts(schedule, costs.of, delay=0)
    end = {action: time + costs.of(action) for action, time in start.items()}
    makespan = max(end.values(), default=0)
    return Timeline(start, end, makespan, _idle(schedule, costs, makespan), *in_flight(schedule))


def lockstep(schedule: Schedule, costs: Costs | None = None, hop: int = 1) -> Ticks:
    """Every tick, each rank does its next action if what it needs is done, and all wait for the slowest.

    Args:
        schedule: one that ends.
        costs: as for `classical`.
        hop: ticks from an action to one that needs it on another rank; on its own rank, the next tick.

    Raises:
        UserError: a deadlock, costs of another number of stages, a hop below 1.

    Example:
        >>> len(lockstep(make("1f1b", ranks=4, microbatches=8)).table)  # 2 (m+p-1)
        22
    """
    if hop < 1:
        raise UserError(f"a hop of {hop} ticks; what a rank sends arrives 1 or more ticks later")
    costs = _costs(schedule, costs)
    start = _starts(schedule, lambda action: 1, delay=hop - 1)
    rows: list[list[Action | None]] = [
        [None] * schedule.ranks for _ in range(1 + int(max(start.values(), default=-1)))
    ]
    for action, tick in start.items():
        rows[int(tick)][schedule.ranks_of[action.stage]] = action
    durations = tuple(max((costs.of(action) for action in row if action), default=0) for row in rows)
    makespan = sum(durations)
    idle = _idle(schedule, costs, makespan)
    return Ticks(tuple(map(tuple, rows)), durations, makespan, idle, *in_flight(schedule))


def fastest(schedule: Schedule, costs: Costs, most_in_flight: int | None = None, hop: int = 1) -> Schedule:
    """The schedule as it is, split, or fused: what takes the least time in lockstep with these costs.

    Args:
        schedule: one that ends.
        costs: of its stages.
        most_in_flight: activations that a rank can hold.
        hop: as for `lockstep`.

    Raises:
        UserError: where all three hold more.

    Example:
        >>> fastest(make("1f1b", 4, 8), Costs.equal(4)).name  # ticks of F, I, W alone are equally long
        '1f1b split'
    """
    asked = (schedule, schedule.with_split(), schedule.with_fused())
    held = [max(in_flight(one)[0]) for one in asked]
    limit = max(held) if most_in_flight is None else most_in_flight
    fit = [one for one, peak in zip(asked, held, strict=True) if peak <= limit]
    if not fit:
        raise UserError(
            f"schedule {schedule.name!r} holds {min(held)} activations on a rank, not {limit}; "
            f"allow {min(held)}, or take a schedule that holds less"
        )
    return min(fit, key=lambda one: lockstep(one, costs, hop).makespan)


def in_flight(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The most activations held at once, on every rank and of every stage.

    Held from the start of the forward to the end of the last action of that stage and microbatch. A rank
    does one thing at a time, so its order says it all, whatever the times.

    Example:
        >>> in_flight(make("1f1b", ranks=4, microbatches=8))[0]  # p-r
        (4, 3, 2, 1)
    """
    ranks, stages = [0] * schedule.ranks, [0] * schedule.stages
    for rank, order in enumerate(schedule.orders):
        last = {(a.stage, a.microbatch): a for a in order}
        held: Counter[int] = Counter()
        for action in order:
            held[action.stage] += action.kind == "F"
            stages[action.stage] = max(stages[action.stage], held[action.stage])
            ranks[rank] = max(ranks[rank], held.total())
            held[action.stage] -= last[action.stage, action.microbatch] == action
    return tuple(ranks), tuple(stages)


def _costs(schedule: Schedule, costs: Costs | None) -> Costs:
    costs = costs or Costs.equal(schedule.stages)
    if len(costs.forward) != schedule.stages:
        raise UserError(
            f"costs of {len(costs.forward)} stages for schedule {schedule.name!r} of {schedule.stages}; "
            f"give one for each stage"
        )
    return costs


def _starts(schedule: Schedule, cost: Callable[[Action], Number], delay: int) -> dict[Action, Number]:
    """When each action starts at the earliest; what comes from another rank arrives `delay` after its end."""
    start: dict[Action, Number] = {}
    ends: dict[Action, Number] = {}
    free: list[Number] = [0] * schedule.ranks
    for action in schedule.sequence():
        rank = schedule.ranks_of[action.stage]
        there = [
            ends[need] + (delay if schedule.ranks_of[need.stage] != rank else 0)
            for need in needs(action, schedule.stages)
        ]
        start[action] = max(free[rank], *there, 0)
        free[rank] = ends[gives(action)] = start[action] + cost(action)
    return start


def _idle(schedule: Schedule, costs: Costs, makespan: Number) -> Fraction:
    busy = sum((Fraction(costs.of(action)) for order in schedule.orders for action in order), Fraction(0))
    return 1 - busy / (schedule.ranks * Fraction(makespan)) if makespan else Fraction(0)
