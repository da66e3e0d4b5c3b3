"""Times and activations of schedules: closed forms, a case by hand, and simulators that share nothing."""

import itertools
import random
from fractions import Fraction as Fr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain import UserError
from shardtrain.pipeline import Costs, Schedule, classical, fastest, forward_only, lockstep, make
from shardtrain.pipeline.schedules import simulate

from .. import tables

RANKS = (2, 3, 4, 8)
SIZES = [(p, m) for p in RANKS for m in sorted({p, p + 1, 2 * p - 1, 2 * p, 3 * p + 2, 32, 64})]
TOTALS = {"gpipe": 3, "1f1b": 3, "interleaved": 6, "zb-h1": 3, "zb-v": 6}
"""What a rank does for one microbatch in units of F = I = W of a stage."""


def bubble(p, m, units):
    """The share of time that is idle where every rank idles p-1 units and works `units` on a microbatch."""
    return Fr(p - 1, units * m + p - 1)


# --- closed forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_idle_is_the_literature_s(p, m):
    assert classical(make("gpipe", p, m)).idle == bubble(p, m, 1)
    assert classical(make("1f1b", p, m)).idle == bubble(p, m, 1)
    assert classical(make("zb-h1", p, m)).idle == bubble(p, m, 3)
    if m >= 2 * p - 1:
        assert classical(make("zb-v", p, m)).idle == bubble(p, m, 6)
    for v in (1, 2, 3, 4):
        if m % p == 0:
            assert classical(make("interleaved", p, m, v)).idle == bubble(p, m, v)


def test_a_few_of_them_as_numbers():
    assert classical(make("1f1b", 4, 8)).idle == Fr(3, 11)
    assert classical(make("interleaved", 4, 8)).idle == Fr(3, 19)
    assert classical(make("zb-h1", 4, 8)).idle == Fr(1, 9)
    assert classical(make("zb-v", 4, 8)).idle == Fr(1, 17)
    # too few microbatches for the pattern of zb-v; less than 1F1B's 3/7 nevertheless
    assert classical(make("zb-v", 4, 4)).idle == Fr(1, 5)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_activations_in_flight(p, m):
    peak = {name: simulate.in_flight(make(name, p, m))[0] for name in TOTALS}
    assert peak["gpipe"] == (m,) * p
    assert peak["1f1b"] == tuple(p - r for r in range(p))
    assert peak["zb-h1"] == (p,) * p
    assert max(peak["zb-v"]) <= 2 * p
    if m >= 2 * p - 1:
        assert peak["zb-v"] == (2 * p,) * p
    for v in (2, 3):
        if m % p == 0 and m > p:  # Megatron's warm-up and one more
            wanted = tuple((v - 1) * p + 2 * (p - 1 - r) + 1 for r in range(p))
            assert simulate.in_flight(make("interleaved", p, m, v))[0] == wanted
    assert max(simulate.in_flight(forward_only(range(p), m))[0]) == 1


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_ticks_in_lockstep(p, m):
    def ticks(schedule, latency=1):
        return len(lockstep(schedule, latency=latency).table)

    for name in ("gpipe", "1f1b"):
        assert ticks(make(name, p, m)) == 2 * (m + p - 1)
        assert ticks(make(name, p, m).with_split()) == 3 * m + 2 * (p - 1)
    assert ticks(make("zb-h1", p, m)) == 3 * m + p - 1
    assert ticks(make("zb-h1", p, m).with_fused()) == 2 * (m + p - 1)
    if m >= 2 * p - 1:
        assert ticks(make("zb-v", p, m)) == 6 * m + p - 1
    if m % p == 0:
        assert ticks(make("interleaved", p, m)) == 4 * m + 2 * (p - 1)
        assert ticks(make("interleaved", p, m).with_split()) == 6 * m + 2 * (p - 1)
    assert ticks(make("gpipe", p, m), latency=2) == 2 * m + 4 * (p - 1)
    assert ticks(forward_only(range(p), m)) == m + p - 1


def test_split_ticks_are_equally_long():
    """What lockstep costs: 1F1B's ticks of B are two units long, and few are of F alone."""
    whole, split = make("1f1b", 4, 8), make("1f1b", 4, 8).with_split()
    assert (lockstep(whole).makespan, lockstep(split).makespan) == (40, 30)
    assert (lockstep(whole).idle, lockstep(split).idle) == (Fr(2, 5), Fr(1, 5))
    assert set(lockstep(split).durations) == {1}


# --- unequal costs ----------------------------------------------------------------------------------------


def test_a_case_by_hand():
    """F 1 and 2, B 1+3 and 1+1:

    rank 0: F0 0-1, F1 1-2, B0 5-9, B1 9-13
    rank 1: F0 1-3, B0 3-5, F1 5-7, B1 7-9
    """
    one = make("1f1b", 2, 2)
    costs = Costs(forward=(1, 2), input=(1, 1), weight=(3, 1))
    line = classical(one, costs)
    assert {str(a): (line.start[a], line.end[a]) for a in line.start} == {
        "0F0": (0, 1), "0F1": (1, 2), "0B0": (5, 9), "0B1": (9, 13),
        "1F0": (1, 3), "1B0": (3, 5), "1F1": (5, 7), "1B1": (7, 9),
    }  # fmt: skip
    assert (line.makespan, line.idle) == (13, Fr(4, 13))
    assert (line.peak_in_flight, line.peak_of_stage) == ((2, 1), (2, 1))
    ticks = lockstep(one, costs)
    assert [[str(a or "-") for a in row] for row in ticks.table] == [
        ["0F0", "-"], ["0F1", "1F0"], ["-", "1B0"], ["0B0", "1F1"], ["-", "1B1"], ["0B1", "-"],
    ]  # fmt: skip
    assert ticks.durations == (1, 2, 2, 4, 2, 4)
    assert (ticks.makespan, ticks.idle) == (15, Fr(2, 5))
    later = lockstep(one, costs, latency=2)
    assert [[str(a or "-") for a in row] for row in later.table] == [
        ["0F0", "-"], ["0F1", "-"], ["-", "1F0"], ["-", "1B0"], ["-", "1F1"], ["0B0", "1B1"], ["-", "-"], ["0B1", "-"],
    ]  # fmt: skip
    assert later.makespan == 1 + 1 + 2 + 2 + 2 + 4 + 0 + 4


def test_costs_are_exact_or_floats():
    assert Costs((1, 0.5), (1, 1), (1, 1)).forward == (Fr(1), 0.5)
    assert isinstance(Costs((1,), (1,), (1,)).forward[0], Fr)
    assert classical(make("1f1b", 4, 8), Costs.equal(4, chunks=3)).makespan == 11
    assert classical(make("interleaved", 4, 8), Costs.equal(8, chunks=2)).makespan == Fr(57, 2)
    nothing = classical(make("1f1b", 2, 2), Costs((0, 0), (0, 0), (0, 0)))
    assert (nothing.makespan, nothing.idle) == (0, 0)


def test_costs_that_make_no_sense_are_refused():
    for rows, sentence in [
        (((1,), (1, 2), (1,)), r"costs of \(1, 2, 1\) stages; give forward, input and weight for the same"),
        (((1,), (-1,), (1,)), "the cost -1 in input; use numbers from 0 up"),
        (((float("nan"),), (1,), (1,)), "the cost nan in forward"),
        (((1,), (1,), (float("inf"),)), "the cost inf in weight"),
    ]:
        with pytest.raises(UserError, match=sentence):
            Costs(*rows)
    for simulator in (classical, lockstep):
        with pytest.raises(UserError, match="costs of 3 stages for schedule '1f1b' of 4; give one for each"):
            simulator(make("1f1b", 4, 4), Costs.equal(3))
        with pytest.raises(UserError, match="deadlocks: rank 0 waits at 1F0 for 0F0 of rank 0"):
            simulator(Schedule.from_csv("1F0,0F0,1B0,0B0", "mine"))
    with pytest.raises(UserError, match="a latency of 0 ticks"):
        lockstep(make("1f1b", 4, 4), latency=0)


def test_the_fastest_of_three():
    equal = Costs.equal(4)
    assert fastest(make("1f1b", 4, 8), equal).name == "1f1b split"
    assert fastest(make("zb-h1", 4, 8), equal).name == "zb-h1"
    free = Costs((2,) * 4, (2,) * 4, (0,) * 4)  # W costs nothing but its tick, which others fill
    assert fastest(make("zb-h1", 4, 8), free).name == "zb-h1 fused"
    assert fastest(make("zb-h1", 4, 8), equal, most_in_flight=4).name == "zb-h1"
    fused = make("zb-v", 4, 16).with_fused()
    peak = max(simulate.in_flight(fused)[0])
    with pytest.raises(UserError, match=f"holds {peak} activations on a rank, not {peak - 1}; allow {peak}"):
        fastest(make("zb-v", 4, 16), Costs.equal(8), most_in_flight=peak - 1)


def test_memory_decides_where_time_does_not():
    """W put off to the end hold what they need: fused, nothing is held longer than its backward."""
    late = Schedule.from_csv("0F0,0I0,0F1,0I1,0W0,0W1\n1F0,1I0,1F1,1I1,1W0,1W1", "late")
    assert simulate.in_flight(late)[0] == (2, 2)
    assert fastest(late, Costs.equal(2)).name == "late"
    assert fastest(late, Costs.equal(2), most_in_flight=1).name == "late fused"


# --- other simulators -------------------------------------------------------------------------------------


def longest_paths(schedule, cost):
    """Start times as longest paths, found by raising them until no demand is broken."""
    actions = [a for order in schedule.orders for a in order]
    pairs = tables.links(actions, schedule.stages)
    pairs += [pair for order in schedule.orders for pair in itertools.pairwise(order)]
    start = dict.fromkeys(actions, Fr(0))
    moved = True
    while moved:
        moved = False
        for first, later in pairs:
            if start[first] + cost(first) > start[later]:
                start[later] = start[first] + cost(first)
                moved = True
    return start


def tick_by_tick(schedule, latency):
    """Lockstep in the words of its definition."""
    before = {}
    for first, later in tables.links([a for order in schedule.orders for a in order], schedule.stages):
        before.setdefault(later, set()).add(first)
    left = [list(order) for order in schedule.orders]
    done, table = {}, []
    while any(left):
        now = len(table)
        row = []
        for rank, order in enumerate(left):
            ready = order and all(
                need in done and now - done[need] >= (1 if schedule.ranks_of[need.stage] == rank else latency)
                for need in before.get(order[0], ())
            )
            row.append(order.pop(0) if ready else None)
        done |= {action: now for action in row if action}
        table.append(tuple(row))
    return tuple(table)


def peaks(schedule, start, end):
    """The most intervals from the start of F to the end of the last part that overlap, on every rank."""
    peaks = []
    for order in schedule.orders:
        pieces = {(a.stage, a.microbatch) for a in order}
        spans = [
            (min(start[a] for a in mine), max(end[a] for a in mine))
            for mine in ([a for a in order if (a.stage, a.microbatch) == piece] for piece in pieces)
        ]
        peaks.append(max(sum(a <= t < b for a, b in spans) for t, _ in spans))
    return tuple(peaks)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_other_simulators_agree(seed):
    draw = random.Random(seed)
    one = tables.legal(seed)
    costs = Costs(*(tuple(Fr(draw.randint(1, 6), 2) for _ in range(one.stages)) for _ in range(3)))
    line = classical(one, costs)
    assert line.start == longest_paths(one, costs.of)
    assert line.makespan == max(line.end.values())
    busy = sum(line.end[a] - line.start[a] for a in line.start)
    assert line.idle == 1 - busy / (one.ranks * line.makespan)
    assert line.peak_in_flight == peaks(one, line.start, line.end)
    latency = draw.randint(1, 3)
    ticks = lockstep(one, costs, latency)
    assert ticks.table == tick_by_tick(one, latency)
    assert ticks.durations == tuple(max((costs.of(a) for a in row if a), default=0) for row in ticks.table)
    assert ticks.peak_in_flight == line.peak_in_flight
    assert ticks.idle == 1 - busy / (one.ranks * ticks.makespan)
    assert ticks.makespan >= line.makespan  # lockstep only waits more
    best = fastest(one, costs)
    assert lockstep(best, costs).makespan <= lockstep(one, costs).makespan
