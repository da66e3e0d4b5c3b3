"""`shardtrain pipeline show`: draws a schedule in the terminal, and writes it as CSV or as a picture."""

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from shardtrain.cli.pictures import picture, refuse_picture
from shardtrain.errors import UserError
from shardtrain.pipeline import Costs, Schedule, make
from shardtrain.pipeline.schedules.schedule import is_file, validate
from shardtrain.pipeline.schedules.show import Bar, bars, legend, timeline, title

LONGEST = 10_000
"""The most actions of a timeline that is drawn."""

PANEL = 64
"""The columns of a panel of a picture."""


@dataclass(frozen=True)
class Show:
    """Draws a schedule, and says how long it takes, how much of that is idle, and what every rank keeps."""

    schedule: str = "1f1b"
    """gpipe, 1f1b, interleaved, zb-h1, zb-v, or a .csv file with a row of actions for each rank."""
    stages: int | None = None
    """Ranks of the pipeline, the size of the mesh axis pipe; by default 4, or what the file has."""
    microbatches: int | None = None
    """Microbatches of a batch; by default 8, or what the file has."""
    chunks: int | None = None
    """Stages on each rank, for interleaved (2 by default)."""
    costs: str = ""
    """Relative times of the stages in network order, such as 1,1,2,1."""
    csv: Path | None = None
    """File to write the schedule to."""
    png: Path | None = None
    """File to draw the timeline to."""

    def run(self) -> None:
        """Prints the timeline, and writes the files asked for."""
        schedule = self.read()
        costs = read_costs(self.costs, schedule) if self.costs else None
        if self.png is not None:
            draw(schedule, self.png, costs)
        if self.csv is not None:
            refuse_other_than_schedule(self.csv)
            schedule.save(self.csv)
        Console(width=100).print(timeline(schedule, costs))

    def read(self) -> Schedule:
        """The schedule that the flags ask for.

        Raises:
            UserError: what `make` refuses, and sizes that fill more than a screen or two.
        """
        ranks, microbatches = self.stages, self.microbatches
        if is_file(self.schedule):
            file = Schedule.load(self.schedule)
            validate(file)
            ranks = file.ranks if ranks is None else ranks
            microbatches = file.microbatches if microbatches is None else microbatches
        ranks, microbatches = 4 if ranks is None else ranks, 8 if microbatches is None else microbatches
        if (actions := 3 * ranks * microbatches * (self.chunks or 1)) > LONGEST:
            raise UserError(
                f"--stages {ranks} --microbatches {microbatches}: a timeline of {actions:,} actions is "
                f"too long to read; show at most {LONGEST:,}"
            )
        return make(self.schedule, ranks, microbatches, self.chunks)


def refuse_other_than_schedule(path: Path) -> None:
    """Refuses to write a schedule to a file that is there and is no schedule.

    Raises:
        UserError: if there is such a file.
    """
    if os.path.lexists(path) and not path.is_dir():  # for a folder, saving says it
        try:
            Schedule.load(path)
        except UserError as error:
            raise UserError(
                f"--csv {path} is there and is no schedule; name a new file, or remove it"
            ) from error


def read_costs(text: str, schedule: Schedule) -> Costs:
    """Returns costs from text such as `"1,1,2,1"`: the time of `F`, `I` and `W` each, for every stage.

    Raises:
        UserError: the text is no list of positive numbers, one for each stage.
    """
    cells = text.split(",")
    try:
        # Read as floats first, since the fraction 1e99999999 would have all its digits.
        positive = all(0 < float(n) < math.inf for cell in cells for n in cell.split("/"))
        row = tuple(map(Fraction, cells)) if positive else ()
    except ValueError as error:
        raise UserError(f"--costs {text}: write a number for each stage, such as 1,1,2,1") from error
    if len(row) != schedule.stages:
        raise UserError(
            f"--costs {text}: {schedule.name} has {schedule.stages} stages; "
            f"write {schedule.stages} positive numbers"
        )
    return Costs(row, row, row)


def draw(schedule: Schedule, path: Path, costs: Costs | None = None) -> None:
    """Writes the timeline of a schedule as a PNG; a long one in panels one below the other.

    Args:
        schedule: without deadlocks.
        path: of the file.
        costs: of its stages, equal by default.

    Raises:
        UserError: the file cannot be written, is no PNG by its name, or is another file that is there.

    Example:
        >>> draw(st.pipeline.make("zb-h1", ranks=4, microbatches=8), Path("zb-h1.png"))  # doctest: +SKIP
    """
    refuse_picture("--png", path)
    drawn = bars(schedule, costs)
    length = max(1, *(bar.end for bar in drawn))
    panels = math.ceil(length / PANEL)
    columns = math.ceil(length / panels)
    size = 1.2 + 0.24 * columns, 0.8 + panels * (0.55 + 0.28 * schedule.ranks)
    try:
        with picture(path, panels, 1, size) as (figure, axes):
            figure.suptitle(f"{title(schedule)}\n{legend(schedule)}", fontsize=9)
            for panel, axis in enumerate(axes[:, 0]):
                _panel(axis, drawn, schedule.ranks, panel * columns, columns)
    except OSError as error:
        raise UserError(
            f"--png {path} cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error


def _panel(axis: Any, drawn: list[Bar], ranks: int, start: int, columns: int) -> None:
    for bar in drawn:
        left, right = max(bar.start, start), min(bar.end, start + columns)
        if left >= right:
            continue
        axis.barh(bar.rank, right - left, left=left, height=0.9, color=bar.colour, edgecolor="white", lw=0.8)
        small = {1: 8, 2: 8, 3: 7}.get(len(bar.label), 6)
        axis.text(
            (left + right) / 2, bar.rank, bar.label, color=bar.ink, ha="center", va="center", fontsize=small
        )
    axis.set_xlim(start, start + columns)
    axis.set_ylim(ranks - 0.4, -0.6)
    axis.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(length=0)
    axis.set_facecolor("#f0f0f0")
    for side in axis.spines.values():
        side.set_visible(False)
