"""Gradients of every schedule on every kind of mesh equal those of one device, in float64."""

import pytest
from flax import nnx

from shardtrain.pipeline import Schedule, make

from .models import MODELS, data
from .parity import TOLERANCE, Case, largest_difference

MICROBATCHES = 4


def schedules(ranks: int, chunks: int) -> list[list[Schedule]]:
    """All schedules, in groups of one placement of stages."""
    m = MICROBATCHES
    once = [make(name, ranks, m) for name in ("gpipe", "1f1b", "zb-h1")]
    groups = [[*once, once[0].with_split(), once[1].with_split(), once[2].with_fused()]]
    if chunks > 1:
        twice = make("interleaved", ranks, m, chunks)
        groups.append([twice, twice.with_split()])
        v = make("zb-v", ranks, m)
        groups.append([v, v.with_fused()])
    return groups


def check(name: str, mesh: str, ranks: int, group: list[Schedule], rows: int) -> None:
    make_model, _ = MODELS[name]
    case = Case.of(make_model(nnx.Rngs(0)), mesh, *data(name, rows), group[0])
    grads, moved, sums = case.alone()
    assert len(moved) > 0 or name == "alexnet"
    for schedule, (ours, held, reported) in zip(group, case.run(group), strict=True):
        assert largest_difference(reported, sums) < TOLERANCE, schedule.name
        assert largest_difference(held, moved) < TOLERANCE, schedule.name
        assert largest_difference(ours, {k: grads[k] for k in ours}) < TOLERANCE, schedule.name
        assert set(ours) == set(grads)


QUICK = [
    ("unequal", "pipe=2,data=2,height=2", 2),
    ("resnet", "pipe=4,channel=2", 4),
    ("alexnet", "pipe=2,height=2", 2),
]
SLOW = [
    (name, f"pipe={ranks}{inner}", ranks)
    for name in MODELS
    for ranks, inners in (
        (2, ("", ",data=2", ",height=2", ",channel=2", ",data=2,height=2")),
        (4, ("", ",data=2", ",height=2", ",channel=2")),
        (8, ("",)),
    )
    for inner in inners
    if (name, f"pipe={ranks}{inner}", ranks) not in QUICK
]


@pytest.mark.parametrize("group", range(3), ids=["one stage a rank", "interleaved", "v"])
@pytest.mark.parametrize(("name", "mesh", "ranks"), QUICK)
def test_gradients(name, mesh, ranks, group):
    check(name, mesh, ranks, schedules(ranks, 2)[group], 8)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(3), ids=["one stage a rank", "interleaved", "v"])
@pytest.mark.parametrize(("name", "mesh", "ranks"), SLOW)
def test_gradients_on_more_meshes(name, mesh, ranks, group):
    check(name, mesh, ranks, schedules(ranks, 2)[group], 8)
