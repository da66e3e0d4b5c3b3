"""The classical schedules, generated for any number of ranks and microbatches."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.schedule import Action, Schedule, is_file, validate

NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")

Order = list[Action]


def make(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """Returns a schedule by its name or from a file.

    `validate` accepts it. Activations in flight and idle shares are these:

    | name | backward | activations in flight on rank r of p | idle, F = I = W |
    | --- | --- | --- | --- |
    | gpipe | B | m | (p-1) / (m+p-1) |
    | 1f1b | B | p-r | (p-1) / (m+p-1) |
    | interleaved | B | (v-1)p + 2(p-1-r) + 1, each 1/v | (p-1) / (vm+p-1), p divides m |
    | zb-h1 | I, W | p | (p-1) / (3m+p-1), m >= p |
    | zb-v | I, W | 2p, each 1/2 | (p-1) / (6m+p-1), m >= 2p-1 |

    Args:
        name: one of `NAMES`, or the path of a `.csv` file.
        ranks: how many, p.
        microbatches: how many, m.
        chunks: how many stages each rank has, v; 2 by default for interleaved, 2 for zb-v, 1 for the others.

    Raises:
        UserError: an unknown name, sizes below 1, chunks that the schedule does not have, a file of another
            size.

    Example:
        >>> print(st.pipeline.make("1f1b", ranks=2, microbatches=2).to_csv(), end="")
        0F0,0F1,0B0,0B1
        1F0,1B0,1F1,1B1

    References:
        gpipe: Huang et al., arXiv 1811.06965 (its backwards here in the order of the forwards).
        1f1b, interleaved: Narayanan et al., arXiv 2104.04473. zb-h1: Qi et al., arXiv 2401.10241.
        zb-v: the same, and Qi et al., arXiv 2405.15362.
    """
    if ranks < 1 or microbatches < 1:
        raise UserError(
            f"schedule {name!r} of {ranks} ranks and {microbatches} microbatches; use 1 or more of each"
        )
    if is_file(name):
        return _from_file(name, ranks, microbatches, chunks)
    if name not in NAMES:
        raise UserError(
            f"there is no schedule {name!r}; there are {', '.join(NAMES)}, or name a .csv file of actions"
        )
    fixed = {"interleaved": chunks or 2, "zb-v": 2}.get(name, 1)
    if chunks is not None and (chunks != fixed or chunks < 1):
        raise UserError(
            f"schedule {name!r} with {chunks} chunks on each rank; {name} has "
            f"{'1 or more' if name == 'interleaved' else fixed}, "
            f"{'2 by default' if name == 'interleaved' else 'interleaved takes any number'}"
        )
    ranks_of = (*range(ranks), *reversed(range(ranks))) if name == "zb-v" else (*range(ranks),) * fixed
    # The patterns of these two need enough microbatches; those above the number asked for are left out below.
    enough = {"interleaved": -(-microbatches // ranks) * ranks, "zb-v": max(microbatches, 2 * ranks - 1)}
    m = enough.get(name, microbatches)
    order_of: dict[str, Callable[[int], Order]] = {
        "gpipe": lambda rank: _alternating(rank, m, warmup=m),
        "1f1b": lambda rank: _alternating(rank, m, warmup=ranks - 1 - rank),
        "interleaved": lambda rank: _interleaved(rank, ranks, m, fixed),
        "zb-h1": lambda rank: _zb_h1(rank, ranks, m),
        "zb-v": lambda rank: _zb_v(rank, ranks, m),
    }
    orders = tuple(
        tuple(action for action in order_of[name](rank) if action.microbatch < microbatches)
        for rank in range(ranks)
    )
    schedule = Schedule(name, ranks_of, microbatches, orders)
    validate(schedule)
    return schedule


def forward_only(ranks_of: Sequence[int], microbatches: int) -> Schedule:
    """Returns a schedule of forwards alone, for evaluation.

    A rank runs its chunks one after the other, each for as many microbatches as there are ranks.

    Example:
        >>> print(st.pipeline.forward_only((0, 1), 3).to_csv(), end="")
        0F0,0F1,0F2
        1F0,1F1,1F2
    """
    orders = []
    for rank in range(max(ranks_of, default=-1) + 1):
        stages = [stage for stage, r in enumerate(ranks_of) if r == rank]
        orders.append(tuple(_rounds(stages, "F", len(set(ranks_of)), microbatches)))
    schedule = Schedule("forward", tuple(ranks_of), microbatches, tuple(orders))
    validate(schedule, forward_only=True)
    return schedule


def _from_file(path: str, ranks: int, microbatches: int, chunks: int | None) -> Schedule:
    schedule = Schedule.load(path)
    above = {a.microbatch for order in schedule.orders for a in order if a.microbatch >= microbatches}
    if schedule.ranks == ranks and len(above) == 1 and not _is_legal(schedule):
        schedule = replace(schedule, microbatches=microbatches)  # a slip in a file of the right size
    own_chunks = max(schedule.ranks_of.count(rank) for rank in schedule.ranks_of)
    own = schedule.ranks, schedule.microbatches, own_chunks
    if own != (ranks, microbatches, chunks or own_chunks):
        asked = f"{ranks} ranks and {microbatches} microbatches" + (f" in {chunks} chunks" if chunks else "")
        raise UserError(
            f"schedule file {path} is for {schedule.ranks} ranks, {schedule.microbatches} microbatches and "
            f"{own_chunks} chunks on a rank, not for {asked}; ask for what it has (pipe={schedule.ranks} and "
            f"{schedule.microbatches} microbatches)"
        )
    validate(schedule)
    return schedule


def _is_legal(schedule: Schedule) -> bool:
    try:
        validate(schedule)
    except UserError:
        return False
    return True


def _alternating(stage: int, microbatches: int, warmup: int) -> Order:
    """Returns `warmup` forwards, then one forward and one backward in turn, then the remaining backwards."""
    forwards = [Action(stage, "F", i) for i in range(microbatches)]
    backwards = [Action(stage, "B", i) for i in range(microbatches)]
    return _merged(forwards, backwards, warmup)


def _merged(forwards: Order, backwards: Order, warmup: int) -> Order:
    warmup = min(warmup, len(forwards))
    order = forwards[:warmup]
    for k, backward in enumerate(backwards):
        order += [*forwards[warmup + k : warmup + k + 1], backward]
    return order


def _rounds(stages: Sequence[int], kind: str, ranks: int, microbatches: int) -> Order:
    """Returns stage after stage for the first `ranks` microbatches, then the same for the next ones."""
    return [
        Action(stage, kind, i)
        for start in range(0, microbatches, ranks)
        for stage in stages
        for i in range(start, min(start + ranks, microbatches))
    ]


def _interleaved(rank: int, ranks: int, microbatches: int, chunks: int) -> Order:
    stages = range(rank, ranks * chunks, ranks)
    forwards = _rounds(stages, "F", ranks, microbatches)
    backwards = _rounds(stages[::-1], "B", ranks, microbatches)
    # A rank's first backward of the last chunk comes back after its forward has passed the ranks after it,
    # twice: once forward, once backward.
    warmup = (chunks - 1) * ranks + (2 if chunks > 1 else 1) * (ranks - 1 - rank)
    return _merged(forwards, backwards, warmup)


def _zb_h1(rank: int, ranks: int, microbatches: int) -> Order:
    """Returns 1F1B whose `W` lag behind by `rank` microbatches: all ranks then keep as many as the first."""
    inputs = [Action(rank, "I", i) for i in range(microbatches)]
    order = []
    for action in _merged([a._replace(kind="F") for a in inputs], inputs, ranks - 1 - rank):
        order.append(action)
        if action.kind == "I" and action.microbatch >= rank:
            order.append(Action(rank, "W", action.microbatch - rank))
    return order + [Action(rank, "W", i) for i in range(max(0, microbatches - rank), microbatches)]


def _zb_v(rank: int, ranks: int, microbatches: int) -> Order:
    """Returns two chunks in a V: the first rank has the last stage, so that its backwards start at once."""
    stages = {"d": rank, "u": 2 * ranks - 1 - rank}  # down the V, and up
    counts: dict[str, int] = {}
    order: Order = []
    after = ranks - rank
    phases = [
        (2 * after - 1, ["dF"]),  # until the first microbatch is back from the ranks after this one
        (rank, ["uF", "dF"]),  # until its first backward comes up from the rank before
        (after, ["uF", "uI", "uW"]),  # until its first backward is back from the ranks after this one
        (microbatches - ranks, ["dF", "dI", "dW", "uF", "uI", "uW"]),
        (rank, ["dI", "uI"]),  # other ranks wait for I, none for W
        (after, ["dI", "dW"]),
        (rank, ["uW"]),
        (rank, ["dW"]),
    ]
    for times, step in phases:
        for name in step * times:
            i = counts[name] = counts.get(name, -1) + 1
            order.append(Action(stages[name[0]], name[1], i))
    return order
