"""Where to cut a model: into stages of equal cost, at places where few bytes cross."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardtrain.errors import UserError
from shardtrain.pipeline.cut.graph import OperationGraph
from shardtrain.pipeline.cut.layers import Layers, allowed_starts, incoming_bytes
from shardtrain.pipeline.cut.operation_costs import OperationCosts, operation_costs

SLACK = 1.02
"""How much more than necessary the costliest stage may cost, for cuts between layers and fewer bytes sent."""


def costs_of_stages(graph: OperationGraph, starts: Sequence[int], costs: OperationCosts) -> list[float]:
    """Returns what each stage costs: its operations, and the bytes that the stage before sends to it."""
    ends, bytes_at = [0, *starts, len(graph.main)], incoming_bytes(graph)
    return [
        sum(costs.costs[a:b]) + costs.byte * (bytes_at[a] if a else 0) for a, b in itertools.pairwise(ends)
    ]


def best_starts(
    costs: Sequence[float],
    incoming: Mapping[int, float],
    inner: Mapping[int, bool],
    stages: int,
) -> list[int]:
    """Returns where `stages` stages should begin, the first excepted.

    Of all ways to cut whose costliest stage costs at most `SLACK` times what it must, those with the fewest
    inner cuts are taken, of these those with the least incoming bytes, of these the latest.

    Args:
        costs: of each operation.
        incoming: for each operation with which a stage may begin, the cost of what is sent to that stage.
        inner: which of these operations are inside a layer.
        stages: at most one more than there are such operations.
    """
    boundaries = _Boundaries.of(costs, incoming, inner)
    limit = boundaries.least_maximum(stages) * SLACK
    return boundaries.best_starts(stages, limit)


class _Choice(NamedTuple):
    """The best way to cut all that stands before a boundary into stages; the lesser of two is better.

    Attributes:
        inner: how many cuts are inside layers.
        incoming: the cost of what is sent to the stages.
        earliness: minus the sum of the stages' starts.
        previous: the boundary at which the last of the stages begins.
    """

    inner: int
    incoming: float
    earliness: int
    previous: int


@dataclass(frozen=True)
class _Boundaries:
    """The places at which a stage may begin or end, numbered from the first operation to the last.

    Attributes:
        at: the operation behind each boundary.
        spent: the cost of all operations before each boundary.
        incoming: the cost of what is sent to a stage that begins there.
        inner: whether it is inside a layer.
    """

    at: tuple[int, ...]
    spent: tuple[float, ...]
    incoming: tuple[float, ...]
    inner: tuple[bool, ...]

    @classmethod
    def of(
        cls, costs: Sequence[float], incoming: Mapping[int, float], inner: Mapping[int, bool]
    ) -> "_Boundaries":
        places = sorted(incoming)
        at = (0, *places, len(costs))
        sums = [0.0, *itertools.accumulate(costs)]
        return cls(
            at,
            tuple(sums[i] for i in at),
            (0.0, *(incoming[c] for c in places), 0.0),
            (False, *(inner[c] for c in places), False),
        )

    @property
    def last(self) -> int:
        return len(self.at) - 1

    def operations(self, i: int, j: int) -> float:
        """Returns the cost of the operations between two boundaries."""
        return self.spent[j] - self.spent[i]

    def least_maximum(self, stages: int) -> float:
        """Returns the least that the costliest of `stages` stages can cost."""
        least = {0: 0.0}  # the costliest of k stages, by the boundary at which the last of them ends
        for k in range(1, stages + 1):
            least = {j: self._least_until(j, k, least) for j in range(k, self.last + 1)}
        return least[self.last]

    def _least_until(self, j: int, k: int, least: Mapping[int, float]) -> float:
        found = float("inf")
        for i in range(j - 1, k - 2, -1):
            operations = self.operations(i, j)
            if operations >= found:
                break  # a longer last stage costs even more
            if i in least:
                found = min(found, max(least[i], operations + self.incoming[i]))
        return found

    def best_starts(self, stages: int, limit: float) -> list[int]:
        """Returns the best starts of stages of which none costs more than `limit`."""
        best: list[dict[int, _Choice]] = [{0: _Choice(0, 0.0, 0, 0)}]
        for k in range(1, stages + 1):
            choices = {j: self._choose(j, k, best[-1], limit) for j in range(k, self.last + 1)}
            best.append({j: choice for j, choice in choices.items() if choice is not None})
        starts, j = [], self.last
        for k in range(stages, 1, -1):
            j = best[k][j].previous
            starts.append(self.at[j])
        return starts[::-1]

    def _choose(self, j: int, k: int, best: Mapping[int, _Choice], limit: float) -> _Choice | None:
        """Returns the best way to cut what stands before boundary `j` into `k` stages, None for none."""
        found: _Choice | None = None
        for i in range(j - 1, k - 2, -1):
            operations = self.operations(i, j)
            if operations > limit:
                break
            if i in best and operations + self.incoming[i] <= limit:
                choice = self._extended(best[i], i)
                found = choice if found is None else min(found, choice)
        return found

    def _extended(self, choice: _Choice, i: int) -> _Choice:
        """Returns a choice with one more stage, which begins at boundary `i`."""
        return _Choice(
            choice.inner + self.inner[i],
            choice.incoming + self.incoming[i],
            choice.earliness - self.at[i],
            i,
        )


def balanced_starts(graph: OperationGraph, stages: int, costs: OperationCosts | None = None) -> list[int]:
    """Returns where stages begin, the first excepted, so that the costliest costs as little as can be.

    All ranks of a pipeline in lockstep wait for the costliest stage. A stage costs its operations and the
    bytes that are sent to it. Within 2 % of the best, cuts between layers are preferred, then fewer bytes.

    Args:
        graph: of the model.
        stages: how many.
        costs: of the graph's operations; counted by default.

    Raises:
        UserError: there are fewer places to cut than that many stages need.
    """
    if stages < 1:
        raise UserError(f"pipeline: {stages} stages; use 1 or more")
    places = allowed_starts(graph)
    if len(places) < stages - 1:
        raise UserError(_too_many(graph, stages, len(places) + 1))
    costs = costs or operation_costs(graph)
    bytes_at, between = incoming_bytes(graph), Layers(graph).begins
    return best_starts(
        costs.costs,
        {c: costs.byte * bytes_at[c] for c in places},
        {c: c not in between for c in places},
        stages,
    )


def _too_many(graph: OperationGraph, stages: int, most: int) -> str:
    """Returns the message for too many stages; a parameter that is used far and wide is named."""
    layers = Layers(graph)
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


def stage_starts(graph: OperationGraph, stages: int, text: str | None = None) -> list[int]:
    """Returns where stages begin, the first excepted: as a text says, or balanced without one.

    Args:
        graph: of the model.
        stages: how many.
        text: the layers of each stage, see `split`.

    Raises:
        UserError: a text that does not fit the model, or fewer places to cut than that many stages need.
    """
    return balanced_starts(graph, stages) if text is None else Layers(graph).starts(text, stages)
