"""2,000 random legal tables, run: whatever the order, the gradient is that of one device."""

import itertools

import pytest

from shardtrain.pipeline import lockstep, validate

from ..parity import TOLERANCE
from ..tables import legal
from ..tiny import Runs

MICROBATCHES = 3

# name: ranks of the stages, mesh, ticks from a message to its use
PLACEMENTS = {
    "one stage a rank, out of order": ((2, 0, 3, 1), "pipe=4", 1),
    "neighbours, twice around": ((0, 1, 0, 1), "pipe=2,data=2", 1),
    "one rank has three": ((1, 1, 0, 1), "pipe=2", 1),
    "messages that skip ranks": ((0, 2, 1, 0, 2), "pipe=3", 1),
    "messages on their way for two ticks": ((1, 0, 0, 2), "pipe=3", 2),
}


QUICK = ["messages that skip ranks"]


@pytest.mark.parametrize(
    "placement", [pytest.param(p, marks=[] if p in QUICK else pytest.mark.slow) for p in PLACEMENTS]
)
def test_random_tables_give_the_gradient_of_one_device(placement):
    ranks_of, mesh, latency = PLACEMENTS[placement]
    schedules = [legal(seed, placed=(ranks_of, MICROBATCHES)) for seed in range(400)]
    for schedule in schedules:
        validate(schedule)
    runs = Runs.of(mesh, schedules, latency)
    gaps = [runs.gap(runs.rows(schedule)) for schedule in schedules]
    assert [(seed, gap) for seed, gap in enumerate(gaps) if not gap < TOLERANCE] == []


def test_the_tables_differ():
    """Fused, split and mixed; in many orders; forwards of microbatches in any order."""
    tables = [legal(seed, placed=((2, 0, 3, 1), MICROBATCHES)) for seed in range(100)]
    assert len({t.orders for t in tables}) > 95
    assert len({len(lockstep(t).table) for t in tables}) > 10
    kinds = [{a.kind for order in t.orders for a in order} for t in tables]
    assert {"BF", "FIW", "BFIW"} == {"".join(sorted(k)) for k in kinds}
    firsts = {tuple(a.microbatch for a in t.orders[2] if a.kind == "F") for t in tables}
    assert firsts == set(itertools.permutations(range(MICROBATCHES)))
