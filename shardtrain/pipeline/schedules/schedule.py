"""A pipeline schedule as data: which rank does what, in which order; its files and checks.

Stages are numbered in network order. A rank may have several of them, its chunks. Nothing runs here.
"""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

from shardtrain.errors import UserError
from shardtrain.files import whole
from shardtrain.pipeline.schedules.actions import KINDS, Action, sequence

__all__ = ["Action", "Schedule", "is_file", "validate"]

MOST_BYTES = 1 << 24
"""A longer file is no schedule."""


@dataclass(frozen=True)
class Schedule:
    """The actions of every rank, in order.

    Attributes:
        name: for messages and tables.
        ranks_of: the rank that has each stage.
        microbatches: how many a batch is cut into.
        orders: for every rank its actions.

    Example:
        >>> st.pipeline.Schedule.from_csv("0F0,0B0\\n1F0,1B0", "tiny").ranks_of
        (0, 1)
    """

    name: str
    ranks_of: tuple[int, ...]
    microbatches: int
    orders: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @property
    def stages(self) -> int:
        return len(self.ranks_of)

    @property
    def split(self) -> bool:
        """Whether any backward is split into `I` and `W`."""
        return any(action.kind == "I" for order in self.orders for action in order)

    def sequence(self) -> list[Action]:
        """Returns all actions in an order in which they could be done one at a time; each rank keeps its own.

        Raises:
            UserError: a deadlock, with the actions that wait for each other.
        """
        return sequence(self.name, self.ranks_of, self.orders)

    def with_split(self) -> "Schedule":
        """Returns the schedule in which every `B` is an `I` and a `W`, one after the other."""
        return self._renamed("split", {"B": ("I", "W")})

    def with_fused(self) -> "Schedule":
        """Returns the schedule in which every `I` is a `B`, and there are no `W`.

        This never makes a deadlock: actions only lose others that they wait for.
        """
        return self._renamed("fused", {"I": ("B",), "W": ()})

    def _renamed(self, how: str, kinds: dict[str, tuple[str, ...]]) -> "Schedule":
        orders = tuple(
            tuple(a._replace(kind=kind) for a in order for kind in kinds.get(a.kind, (a.kind,)))
            for order in self.orders
        )
        return self if orders == self.orders else replace(self, name=f"{self.name} {how}", orders=orders)

    def to_csv(self) -> str:
        """Returns the schedule as CSV: a row for every rank, a cell for every action."""
        return "".join(",".join(map(str, order)) + "\n" for order in self.orders)

    @classmethod
    def from_csv(cls, text: str, name: str) -> "Schedule":
        """Returns a schedule from what `to_csv` writes.

        The row of a stage's actions is its rank, and the largest microbatch says how many there are. Empty
        cells and lines are passed over; `;` and tabs separate cells, too.

        Raises:
            UserError: a cell that is no action, a stage in two rows or in none. For the rest see `validate`.
        """
        orders: list[tuple[Action, ...]] = []
        rank_of: dict[int, int] = {}
        place_of: dict[int, str] = {}
        rows = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip(",; \t\ufeff")]
        for rank, (row, line) in enumerate(rows):
            order = []
            for column, cell in enumerate(re.split("[,;\t]", line.strip("\ufeff")), 1):
                if not cell.strip():
                    continue
                try:
                    action = Action.parse(cell.strip().strip('"'))  # some spreadsheets quote all cells
                except UserError as error:
                    raise UserError(f"schedule {name!r}, row {row}, column {column}: {error}") from None
                if rank_of.setdefault(action.stage, rank) != rank:
                    raise UserError(
                        f"schedule {name!r}, row {row}, column {column}: {action} belongs to stage "
                        f"{action.stage}, which already stands in row {rows[rank_of[action.stage]][0]}; "
                        f"keep a stage in one row"
                    )
                place_of.setdefault(action.stage, f"{action} in row {row}, column {column}")
                order.append(action)
            orders.append(tuple(order))
        if not orders:
            raise UserError(
                f"schedule {name!r} is empty; write a row of actions such as 0F0,0B0 for each rank"
            )
        missing = next(stage for stage in itertools.count() if stage not in rank_of)
        if missing < len(rank_of):
            raise UserError(
                f"schedule {name!r} has a stage {max(rank_of)} ({place_of[max(rank_of)]}) and no stage "
                f"{missing}; number stages from 0"
            )
        count = 1 + max(action.microbatch for order in orders for action in order)
        return cls(name, tuple(rank_of[stage] for stage in range(missing)), count, tuple(orders))

    def save(self, path: Path | str) -> None:
        """Writes the schedule to a CSV file.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            Path(path).write_text(self.to_csv())
        except OSError as error:
            raise UserError(
                f"schedule file {path} cannot be written ({error.strerror}); name one in a folder that exists"
            ) from error

    @classmethod
    def load(cls, path: Path | str) -> "Schedule":
        """Returns a schedule from a file that `save` or a spreadsheet wrote; it is named like the file.

        Raises:
            UserError: no such file, no text, or no schedule.
        """
        try:
            text = whole(path, MOST_BYTES).decode()
        except OSError as error:
            raise UserError(
                f"schedule file {path} cannot be read ({error.strerror}); name a CSV file of actions"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"schedule file {path} is no text; name a CSV file of actions") from error
        return cls.from_csv(text, Path(path).name)


def is_file(name: str) -> bool:
    """Whether the name of a schedule is that of a file."""
    return name.lower().endswith(".csv")


def validate(schedule: Schedule, *, forward_only: bool = False) -> None:
    """Checks that a schedule does everything once, on the right rank, and that it ends.

    Args:
        schedule: to be checked.
        forward_only: it has forwards alone, for evaluation.

    Raises:
        UserError: names the first offending action, its rank, and what to do.

    Example:
        >>> st.pipeline.validate(st.pipeline.Schedule.from_csv("0F0,0B0\\n1B0,1F0", "odd"))
        Traceback (most recent call last):
        shardtrain.errors.UserError: schedule 'odd': rank 1 does 1B0 before 1F0; put 1F0 first
    """
    ranks_of, name = schedule.ranks_of, f"schedule {schedule.name!r}"
    if idle := sorted(set(range(schedule.ranks)) - set(ranks_of)):
        raise UserError(f"{name}: rank {idle[0]} holds no stage; leave it out, or give it one")
    if not ranks_of or not set(ranks_of) <= set(range(schedule.ranks)) or schedule.microbatches < 1:
        raise UserError(
            f"{name} has {schedule.microbatches} microbatches, stages on ranks {ranks_of} and actions of "
            f"{schedule.ranks} ranks; use 1 or more of each, and ranks below {schedule.ranks}"
        )
    seen: set[Action] = set()
    for rank, order in enumerate(schedule.orders):
        for action in order:
            if problem := _misplaced(schedule, rank, action, seen, forward_only):
                raise UserError(f"{name}: rank {rank} does {action}{problem}")
            seen.add(action)
    if missing := _missing(schedule, seen, forward_only):
        whole = f" (or {missing._replace(kind='B')} for both halves)" if missing.kind == "I" else ""
        raise UserError(f"{name}: {missing}{whole} is missing; add it to rank {ranks_of[missing.stage]}")
    schedule.sequence()


def _missing(s: Schedule, seen: set[Action], forward_only: bool) -> Action | None:
    """Returns the first action that is not among those `seen`, None if there is none."""
    for stage in range(s.stages):
        for i in range(s.microbatches):  # may be huge in a wrong file; the first gap ends this
            kinds = "F" if forward_only else "FB" if Action(stage, "B", i) in seen else "FIW"
            for kind in kinds:
                if Action(stage, kind, i) not in seen:
                    return Action(stage, kind, i)
    return None


def _misplaced(s: Schedule, rank: int, action: Action, seen: set[Action], forward_only: bool) -> str:
    """Returns what is wrong with an action of a rank that comes after those `seen`, `""` for nothing."""
    return _impossible(s, rank, action, forward_only) or _out_of_order(action, seen)


def _impossible(s: Schedule, rank: int, action: Action, forward_only: bool) -> str:
    """Returns what is wrong with an action wherever it stands among those of its rank."""
    stage, kind, microbatch = action
    if kind not in KINDS:
        return f", and there are only the kinds {' '.join(KINDS)}; write one of them"
    if not 0 <= stage < s.stages:
        return f", and there are only stages 0 to {s.stages - 1}; leave it out"
    if not 0 <= microbatch < s.microbatches:
        return f", and there are only microbatches 0 to {s.microbatches - 1}; leave it out"
    if s.ranks_of[stage] != rank:
        return f", and stage {stage} is on rank {s.ranks_of[stage]}; move it there"
    if forward_only and kind != "F":
        return " in a schedule of forwards only; leave it out"
    return ""


def _out_of_order(action: Action, seen: set[Action]) -> str:
    """Returns what is wrong with an action after those `seen`."""
    stage, kind, microbatch = action
    if action in seen:
        return " twice; leave one out"
    if kind != "F" and (forward := Action(stage, "F", microbatch)) not in seen:
        return f" before {forward}; put {forward} first"
    if kind == "W" and (half := Action(stage, "I", microbatch)) not in seen:
        return f" before {half}; put {half} first"
    for other in {"B": "IW", "I": "B", "W": "B"}.get(kind, ""):
        if (both := Action(stage, other, microbatch)) in seen:
            return f" and {both}; leave out either B, or I and W"
    return ""
