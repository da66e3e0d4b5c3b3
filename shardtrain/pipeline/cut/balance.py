"""Where to cut: stages of equal cost, where little crosses."""

import itertools
from collections.abc import Mapping, Sequence

from shardtrain.errors import UserError
from shardtrain.pipeline.cut.graph import OperationGraph
from shardtrain.pipeline.cut.layers import Layers, allowed, arriving
from shardtrain.pipeline.cut.operation_costs import OperationCosts, work

SLACK = 1.02
"""How much costlier than it need be the costliest stage may get for cuts between layers and fewer bytes."""

INNER = 0.05
"""What a cut inside a layer, or elsewhere than where layers meet, is charged: this part of a mean stage.

Counted costs are no better than that: elementwise operations around such a cut would be fused with others.
"""

_Ranked = tuple[tuple[int, float, int], int] | None


def stage_costs(flow: OperationGraph, positions: Sequence[int], done: OperationCosts) -> list[float]:
    """What each stage costs: its operations and the bytes that arrive at it."""
    ends, bytes_at = [0, *positions, len(flow.main)], arriving(flow)
    return [sum(done.costs[a:b]) + done.byte * (bytes_at[a] if a else 0) for a, b in itertools.pairwise(ends)]


def best_positions(
    costs: Sequence[float],
    arrivals: Mapping[int, float],
    inner: Mapping[int, bool],
    stages: int,
) -> list[int]:
    """The positions of cuts, so that the costliest of `stages` stages costs little and the cuts are good.

    Of all cuts whose costliest stage costs at most `SLACK` times what it must, those with the fewest inner
    cuts, of these those at which least arrives, of these the latest.

    Args:
        costs: of each operation.
        arrivals: what arrives costs, for each position at which a stage may begin.
        inner: which of these positions lie inside a layer.
        stages: how many; at most one more than there are positions.
    """
    sums = [0.0]
    for value in costs:
        sums.append(sums[-1] + value)
    places = sorted(arrivals)
    ends = [0, *places, len(costs)]
    cost_in = [0.0, *(arrivals[c] for c in places)]
    last = len(ends) - 1

    least: list[float] = [0.0] + [float("inf")] * last  # the costliest of the stages that end here
    for k in range(1, stages + 1):
        row = [float("inf")] * (last + 1)
        for j in range(k, last + 1):
            for i in range(j - 1, k - 2, -1):
                here = sums[ends[j]] - sums[ends[i]]
                if here >= row[j]:
                    break
                row[j] = min(row[j], max(least[i], here + cost_in[i]))
        least = row
    limit = least[last] * SLACK

    none: _Ranked = None
    best: list[list[_Ranked]] = [[((0, 0.0, 0), 0), *([none] * last)]]
    for k in range(1, stages + 1):
        ranks: list[_Ranked] = [None] * (last + 1)
        for j in range(k, last + 1):
            for i in range(j - 1, k - 2, -1):
                here = sums[ends[j]] - sums[ends[i]]
                if here > limit:
                    break
                before = best[-1][i]
                if before is None or here + cost_in[i] > limit:
                    continue
                (cuts, moved, early), _ = before
                if i:
                    cuts, moved = cuts + bool(inner[ends[i]]), moved + cost_in[i]
                one = ((cuts, moved, early - ends[i]), i)
                found = ranks[j]
                if found is None or one < found:
                    ranks[j] = one
        best.append(ranks)
    positions, j = [], last
    for k in range(stages, 1, -1):
        found = best[k][j]
        assert found is not None  # the limit leaves at least the cut that gave it
        j = found[1]
        positions.append(ends[j])
    return positions[::-1]


def balance(flow: OperationGraph, stages: int, done: OperationCosts | None = None) -> list[int]:
    """The positions at which `stages` stages begin (but the first), so that the costliest costs least.

    A pipeline in lockstep waits for its costliest stage, so that one counts. A stage costs its operations
    and the bytes that arrive at it, and 5 % of a mean stage if it begins inside a layer. Within 2 % of the
    best, cuts between layers are preferred, then fewer bytes.

    Args:
        flow: what is cut.
        stages: how many.
        done: what its operations cost; counted by default.

    Raises:
        UserError: fewer places to cut than stages.
    """
    if stages < 1:
        raise UserError(f"pipeline: {stages} stages; use 1 or more")
    places = allowed(flow)
    if len(places) < stages - 1:
        raise UserError(_too_many(flow, stages, len(places) + 1))
    done = done or work(flow)
    bytes_at, between = arriving(flow), Layers(flow).begins
    return best_positions(
        done.costs,
        {c: done.byte * bytes_at[c] for c in places},
        {c: c not in between for c in places},
        stages,
    )


def _too_many(flow: OperationGraph, stages: int, most: int) -> str:
    """What to say of more stages than there are; a parameter whose uses lie far apart is named."""
    layers = Layers(flow)
    spans = {
        n: span for n, span in layers.spans.items() if len(layers.within(span)) > 1 and span[0] < span[1]
    }
    widest = max(spans, key=lambda n: spans[n][1] - spans[n][0], default="")
    why, less = "a parameter stays in one stage with all of its uses", "or a deeper model"
    if widest and most + spans[widest][1] - spans[widest][0] >= stages:
        first, *_, last = layers.within(spans[widest])
        why += f", and {widest!r} is used from the layer {first!r} to {last!r}"
        less = "or give these layers parameters of their own"
    how = f"use {most} stages (pipe={most})" if most > 1 else "train it without pipe"
    return (
        f"pipeline: the model can be cut into {most} stages at most, not {stages}, since {why}; {how} {less}"
    )


def positions(flow: OperationGraph, stages: int, layout: str | None = None) -> list[int]:
    """Where `stages` stages begin (but the first): as a layout says, or balanced without one.

    Args:
        flow: what is cut.
        stages: how many.
        layout: which layers each stage has, see `split`.

    Raises:
        UserError: a layout that the model does not have, or fewer places to cut than stages.
    """
    if layout is not None:
        return Layers(flow).positions(layout, stages)
    return balance(flow, stages)
