"""How long a schedule takes and how many activations it keeps, computed before anything runs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.action_costs import Costs, Number
from shardtrain.pipeline.schedules.actions import Action, gives, needs
from shardtrain.pipeline.schedules.schedule import Schedule

__all__ = ["Costs", "Ticks", "Timeline", "classical", "fastest", "in_flight", "lockstep"]


@dataclass(frozen=True)
class Timeline:
    """A schedule whose ranks wait only for what their actions need.

    Attributes:
        start: the time at which each action starts.
        end: the time at which each action ends.
        makespan: the time until the last action ends.
        idle: the share of ranks x makespan in which nothing is done.
        peak_in_flight: for each rank the most activations that it keeps at once, one for each stage and
            microbatch from the start of its forward to the end of the last part of its backward.
        peak_of_stage: the same for each stage.
    """

    start: dict[Action, Number]
    end: dict[Action, Number]
    makespan: Number
    idle: Fraction
    peak_in_flight: tuple[int, ...]
    peak_of_stage: tuple[int, ...]


@dataclass(frozen=True)
class Ticks:
    """A schedule in lockstep, as one SPMD program runs it: all ranks wait for each other after each tick.

    Attributes:
        table: for each tick what each rank does; None for a rank that idles.
        durations: of each tick, the time of its costliest action.
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
    """Returns the timeline in which every action starts as soon as those it needs have ended.

    Communication is free.

    Args:
        schedule: without deadlocks, see `validate`.
        costs: of its stages; 1 for each `F`, `I` and `W` by default, so 2 for `B`.

    Raises:
        UserError: a deadlock, costs of another number of stages.

    Example:
        >>> st.pipeline.classical(st.pipeline.make("1f1b", ranks=4, microbatches=8)).idle  # (p-1) / (m+p-1)
        Fraction(3, 11)
    """
    costs = _costs(schedule, costs)
    start = _starts(schedule, costs.of, delay=0)
    end = {action: time + costs.of(action) for action, time in start.items()}
    makespan = max(end.values(), default=0)
    return Timeline(start, end, makespan, _idle(schedule, costs, makespan), *in_flight(schedule))


def lockstep(schedule: Schedule, costs: Costs | None = None, latency: int = 1) -> Ticks:
    """Returns the ticks of a schedule.

    In every tick each rank does its next action, if those it needs were done in earlier ticks. All ranks wait
    for the slowest.

    Args:
        schedule: without deadlocks.
        costs: as for `classical`.
        latency: the ticks from an action to the earliest that needs it on another rank. On its own rank that
            is the next tick.

    Raises:
        UserError: a deadlock, costs of another number of stages, a latency below 1.

    Example:
        >>> len(st.pipeline.lockstep(st.pipeline.make("1f1b", ranks=4, microbatches=8)).table)  # 2 (m+p-1)
        22
    """
    if latency < 1:
        raise UserError(f"a latency of {latency} ticks; what a rank sends arrives 1 or more ticks later")
    costs = _costs(schedule, costs)
    start = _starts(schedule, lambda action: 1, delay=latency - 1)
    rows: list[list[Action | None]] = [
        [None] * schedule.ranks for _ in range(1 + int(max(start.values(), default=-1)))
    ]
    for action, tick in start.items():
        rows[int(tick)][schedule.ranks_of[action.stage]] = action
    durations = tuple(max((costs.of(action) for action in row if action), default=0) for row in rows)
    makespan = sum(durations)
    idle = _idle(schedule, costs, makespan)
    return Ticks(tuple(map(tuple, rows)), durations, makespan, idle, *in_flight(schedule))


def fastest(
    schedule: Schedule, costs: Costs, most_in_flight: int | None = None, latency: int = 1
) -> Schedule:
    """Returns the schedule as it is, split or fused, whichever takes the least time in lockstep.

    Args:
        schedule: without deadlocks.
        costs: of its stages.
        most_in_flight: how many activations a rank may keep at once; by default as many as the three need.
        latency: as for `lockstep`.

    Raises:
        UserError: all three keep more.

    Example:
        >>> asked, costs = st.pipeline.make("1f1b", 4, 8), st.pipeline.Costs.equal(4)
        >>> st.pipeline.fastest(asked, costs).name  # since ticks of F, I and W alone are equally long
        '1f1b split'
    """
    forms = (schedule, schedule.with_split(), schedule.with_fused())
    peaks = [max(in_flight(form)[0]) for form in forms]
    limit = max(peaks) if most_in_flight is None else most_in_flight
    fit = [form for form, peak in zip(forms, peaks, strict=True) if peak <= limit]
    if not fit:
        raise UserError(
            f"schedule {schedule.name!r} holds {min(peaks)} activations on a rank, not {limit}; "
            f"allow {min(peaks)}, or take a schedule that holds less"
        )
    return min(fit, key=lambda form: lockstep(form, costs, latency).makespan)


def in_flight(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the most activations that are kept at once, for each rank and for each stage.

    An activation is kept from the start of its forward to the end of the last action of its stage and
    microbatch. Since a rank does one action at a time, the order of its actions says it all, whatever they
    cost.

    Example:
        >>> in_flight(st.pipeline.make("1f1b", ranks=4, microbatches=8))[0]  # p-r
        (4, 3, 2, 1)
    """
    ranks, stages = [0] * schedule.ranks, [0] * schedule.stages
    for rank, order in enumerate(schedule.orders):
        last = {(a.stage, a.microbatch): a for a in order}
        kept: Counter[int] = Counter()
        for action in order:
            kept[action.stage] += action.kind == "F"
            stages[action.stage] = max(stages[action.stage], kept[action.stage])
            ranks[rank] = max(ranks[rank], kept.total())
            kept[action.stage] -= last[action.stage, action.microbatch] == action
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
    """Returns the earliest start of each action; messages arrive `delay` after the action that sends them."""
    start: dict[Action, Number] = {}
    ends: dict[Action, Number] = {}
    free: list[Number] = [0] * schedule.ranks
    for action in schedule.sequence():
        rank = schedule.ranks_of[action.stage]
        arrivals = [
            ends[need] + (delay if schedule.ranks_of[need.stage] != rank else 0)
            for need in needs(action, schedule.stages)
        ]
        start[action] = max(free[rank], *arrivals, 0)
        free[rank] = ends[gives(action)] = start[action] + cost(action)
    return start


def _idle(schedule: Schedule, costs: Costs, makespan: Number) -> Fraction:
    busy = sum((Fraction(costs.of(action)) for order in schedule.orders for action in order), Fraction(0))
    return 1 - busy / (schedule.ranks * Fraction(makespan)) if makespan else Fraction(0)
