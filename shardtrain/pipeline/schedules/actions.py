"""The actions of a pipeline: how they are written, what each needs, and which orders are deadlocks.

For every stage and microbatch there is a forward `F`, and either the whole backward `B` or its two halves:
`I`, the gradient with respect to the inputs, for which the stage before waits, and `W`, the gradient with
respect to the weights, for which nothing waits.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from shardtrain.errors import UserError

KINDS = ("F", "B", "I", "W")


class Action(NamedTuple):
    """An action of a rank: `Action(2, "F", 0)`, written `2F0`, is stage 2's forward of microbatch 0."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Returns an action from its text, such as `2F0`.

        Raises:
            UserError: the text is no action.

        Example:
            >>> st.pipeline.Action.parse("1I3")
            Action(stage=1, kind='I', microbatch=3)
        """
        match = re.fullmatch(r"([0-9]{1,9})([FBIW])([0-9]{1,9})", text.strip())
        if not match:
            raise UserError(
                f"{text.strip()!r} is no action; write stage, one of {' '.join(KINDS)}, "
                f"microbatch, such as 2F0"
            )
        return cls(int(match[1]), match[2], int(match[3]))


def needs(action: Action, stages: int) -> list[Action]:
    """Returns the actions that must end before an action can start; an `I` among them stands for `I` or `B`.

    Example:
        >>> [str(a) for a in needs(Action(1, "B", 0), stages=4)]
        ['1F0', '2I0']
    """
    stage, kind, microbatch = action
    if kind == "F":
        return [Action(stage - 1, "F", microbatch)] if stage else []
    if kind == "W":
        return [Action(stage, "I", microbatch)]
    later = [Action(stage + 1, "I", microbatch)] if stage + 1 < stages else []
    return [Action(stage, "F", microbatch), *later]


def gives(action: Action) -> Action:
    """Returns the action for which others wait: for a `B` its `I`, else the action itself."""
    return action._replace(kind="I") if action.kind == "B" else action


def sequence(name: str, ranks_of: Sequence[int], orders: Sequence[Sequence[Action]]) -> list[Action]:
    """Returns all actions in an order in which they could be done one at a time; each rank keeps its own.

    Args:
        name: of the schedule, for messages.
        ranks_of: the rank of each stage.
        orders: for each rank its actions.

    Raises:
        UserError: a deadlock, with the actions that wait for each other.

    Example:
        >>> rows = [[Action(0, "F", 0), Action(0, "B", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
        >>> " ".join(map(str, sequence("tiny", (0, 1), rows)))
        '0F0 1F0 1B0 0B0'
    """
    done: set[Action] = set()
    result: list[Action] = []
    at = [0] * len(orders)
    length = -1
    while length < len(result):
        length = len(result)
        for rank, order in enumerate(orders):
            while at[rank] < len(order) and done.issuperset(needs(order[at[rank]], len(ranks_of))):
                result.append(order[at[rank]])
                done.add(gives(order[at[rank]]))
                at[rank] += 1
    if length < sum(map(len, orders)):
        raise UserError(f"schedule {name!r} deadlocks: {_deadlock(ranks_of, orders, at, done)}")
    return result


def _deadlock(
    ranks_of: Sequence[int], orders: Sequence[Sequence[Action]], at: list[int], done: set[Action]
) -> str:
    """Returns the message for a deadlock: follows who waits for whom until a rank comes up again."""
    rank = next(r for r, order in enumerate(orders) if at[r] < len(order))
    waits: dict[int, tuple[Action, Action, int]] = {}
    while rank not in waits:
        stuck = orders[rank][at[rank]]
        want = next(need for need in needs(stuck, len(ranks_of)) if need not in done)
        holder = ranks_of[want.stage]
        waiting = orders[holder][at[holder] :]
        found = next((a for a in waiting if gives(a) == want), None)
        if found is None:
            return f"rank {rank} waits at {stuck} for {want}, which rank {holder} never does; add it there"
        waits[rank] = stuck, found, holder
        rank = holder
    cycle = [rank]
    while (after := waits[cycle[-1]][2]) != rank:
        cycle.append(after)
    links = [f"rank {r} waits at {waits[r][0]} for {waits[r][1]} of rank {waits[r][2]}" for r in cycle]
    # A rank may wait for the action at which another rank waits; to wait for one behind that is the mistake.
    late, holder = next(waits[r][1:] for r in reversed(cycle) if waits[r][1] != waits[waits[r][2]][0])
    return f"{', '.join(links)}; put {late} before {waits[holder][0]} on rank {holder}"
