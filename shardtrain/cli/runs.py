"""`shardtrain runs`: shows the runs in a folder in a table, and their curves in one picture."""

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from shardtrain.cli.flags import LARGEST_COUNT
from shardtrain.cli.outputs import printable
from shardtrain.cli.pictures import picture, refuse_picture
from shardtrain.errors import UserError
from shardtrain.files import expanded, parsed, regular, whole

SUBFOLDERS = ("checkpoints", "tensorboard", "profile")
"""Folders of a run, in which no other runs are looked for."""

RUNNING_SECONDS = 60.0
"""A run whose files did not change for this time, or for 5 steps if they take longer, is not running."""


MOST_BYTES = 1 << 28
"""A longer `result.json` is none of ours."""

LONGEST_LINE_BYTES = 1 << 20
"""A row of `metrics.jsonl` and of `events.jsonl` is shorter."""

LARGEST_DRAWN = 1e300
"""Numbers beyond it are left out of a picture, whose axis is as long as their difference."""

LONGEST_TEXT = 60
"""Names of models and meshes in the table are cut to so many characters."""


@dataclass(frozen=True)
class Run:
    """One run, as far as its files describe it; unknown values are None."""

    name: str
    model: str | None
    mesh: str | None
    steps: int | None
    loss: float | None
    score: float | None
    speed: float | None
    state: str
    when: float
    rows: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Runs:
    """Shows the runs in a folder, newest last: what they trained, how far they are, and how well they do."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Folder that holds runs, at any depth."""
    plot: Path | None = None
    """File to draw their curves to, a PNG."""

    def run(self, rest: Sequence[str] = ()) -> None:
        """Prints the table, and draws the picture if one is asked for.

        Raises:
            UserError: if there are no runs in the folder, or if the picture cannot be written.
        """
        if rest:
            raise UserError(f"-- {' '.join(rest)}: runs runs no other command; leave it out")
        folder = expanded(self.folder)
        if self.plot is not None:
            refuse_picture("--plot", self.plot)
        if not os.path.isdir(folder):  # also False if the path is longer than paths can be
            raise UserError(f"{self.folder} is no folder; give one that --out was in")
        found = sorted((read(place, folder) for place in places(folder)), key=lambda run: run.when)
        if not found:
            raise UserError(f"there are no runs in {self.folder}; give a folder that --out was in")
        Console(width=100, markup=False, emoji=False, highlight=False).print(table(found))
        if self.plot is not None:
            compare(found, self.plot)


def places(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs in a folder, itself included, without earlier runs that were moved."""
    for place, folders, files in os.walk(folder):
        if {"metrics.jsonl", "result.json"} & set(files):
            yield Path(place)
        folders[:] = sorted(f for f in folders if f not in SUBFOLDERS and not f.startswith((".", "earlier-")))


def read(place: Path, folder: Path) -> Run:
    """Reads the files of a run, as far as they can be read."""
    rows = [row for row in _lines(place / "metrics.jsonl") if _count(row.get("step")) is not None]
    events = _lines(place / "events.jsonl")
    result, intact = _json(place / "result.json")
    first: dict[str, Any] = next((e for e in reversed(events) if e.get("event") in ("start", "resume")), {})
    mesh = result.get("mesh") or first.get("mesh")
    scores = [_number(value) for key, value in result.items() if key.startswith("test_")]
    times = [_time(place / name) for name in ("metrics.jsonl", "events.jsonl", "result.json")]
    steps = rows[-1]["step"] if rows else _count(result.get("steps"))
    return Run(
        name=printable(str(place.relative_to(folder)) if place != folder else place.resolve().name),
        model=_text(result.get("model")),
        mesh=_mesh(mesh),
        steps=steps,
        loss=_number(rows[-1].get("loss")) if rows else _number(result.get("final_loss")),
        score=scores[0] if scores else None,
        speed=_speed(rows),
        state=_state(rows, events, intact, times),
        when=max(times),
        rows=rows,
    )


def _speed(rows: Sequence[dict]) -> float | None:
    """Returns the median of the examples per second, whatever a run calls its examples."""
    rates = [row[key] for row in rows for key in row if key.endswith("_per_second")]
    speeds = [speed for rate in rates if (speed := _number(rate)) is not None]
    return statistics.median(speeds) if speeds else None


def _state(rows: Sequence[dict], events: Sequence[dict], intact: bool | None, times: Sequence[float]) -> str:
    steps, _, result = times
    if intact and result >= steps:
        return "finished"
    last = events[-1].get("event") if events else None
    if last in ("preempted", "exit"):
        return "stopped"
    slowest = max((_number(row.get("seconds")) or 0.0 for row in rows[-5:]), default=0.0)
    if time.time() - max(times) < max(RUNNING_SECONDS, 5 * slowest):
        return "running"
    return "damaged" if intact is False else "stopped"


def table(runs: Sequence[Run]) -> Table:
    """Returns the runs as a table of at most 100 columns."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name, least in (("run", 16), ("model", 7), ("mesh", 12)):
        shown.add_column(name, overflow="fold", min_width=least)
    for name in ("steps", "loss", "score", "ex./s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "when"):
        shown.add_column(name, no_wrap=True)
    for run in runs:
        speed = run.speed
        shown.add_row(
            run.name,
            run.model or "",
            run.mesh or "",
            "" if run.steps is None else str(run.steps),
            "" if run.loss is None else f"{run.loss:.4f}" if abs(run.loss) < 1e4 else f"{run.loss:.1e}",
            "" if run.score is None else f"{run.score:.4f}",
            "" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
            run.state,
            _date(run.when),
        )
    return shown


def compare(runs: Sequence[Run], path: Path) -> None:
    """Draws the curves of the runs side by side: running means of the training loss, and of the accuracy.

    Raises:
        UserError: if no run has steps, or if the file cannot be written.
    """
    drawn = [run for run in runs if run.rows]
    if not drawn:
        raise UserError(f"--plot {path}: none of the runs has a step to draw")
    keys = [key for key in ("loss", "accuracy") if any(key in run.rows[0] for run in drawn)]
    legend_height = 0.25 * len(drawn)
    try:
        with picture(path, 1, max(1, len(keys)), (5.5 * max(1, len(keys)), 3.6 + legend_height)) as (
            figure,
            axes,
        ):
            for key, axis in zip(keys, axes[0], strict=False):
                _curves(axis, drawn, key)
            handles, labels = axes[0, 0].get_legend_handles_labels()
            names = figure.legend(
                handles, labels, loc="outside lower center", fontsize=8, frameon=False, ncols=2
            )
            for name in names.get_texts():
                name.set_parse_math(False)  # a $ in a folder's name is not the beginning of a formula
    except OSError as error:
        raise UserError(
            f"--plot {path} cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error


def _curves(axis: Any, runs: Sequence[Run], key: str) -> None:
    from matplotlib import colormaps

    positive, lowest, highest, starts = True, math.inf, 0.0, 0.0
    for k, run in enumerate(runs):
        found = [(row["step"], _number(row.get(key))) for row in run.rows]
        points = [(step, value) for step, value in found if value is not None and abs(value) < LARGEST_DRAWN]
        if not points:
            continue
        steps, values = np.array(points, float).T
        span = max(1, len(values) // 25)
        smooth = np.convolve(values, np.ones(span) / span, "valid")
        middle = steps[(span - 1) // 2 :][: len(smooth)]
        colour = colormaps["tab20"](k % 20) if len(runs) > 10 else colormaps["tab10"](k)
        name = (
            f"./{run.name}" if run.name.startswith("_") else run.name
        )  # matplotlib leaves out names that begin with _
        axis.plot(middle, smooth, color=colour, label=name, marker="." if len(smooth) == 1 else None)
        positive = positive and (values > 0).all()
        lowest, highest = min(lowest, smooth.min()), max(highest, values.max())
        starts = max(starts, values[0])
    if key == "loss" and positive:
        axis.set_yscale("log")
        if highest > 10 * starts:  # a run that diverged must not flatten all others
            axis.set_ylim(lowest / 1.3, 10 * starts)
    axis.set(xlabel="step", ylabel=f"training {key}")
    axis.grid(alpha=0.3)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines, without damaged ones."""
    rows = []
    with suppress(OSError), regular(path) as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            with suppress(ValueError):
                row = parsed(line.decode(errors="replace"))
                if isinstance(row, dict):
                    rows.append(row)
    return rows


def _json(path: Path) -> tuple[dict[str, Any], bool | None]:
    """Returns the object in a JSON file, and whether the file is intact; None if there is no file."""
    try:
        value = parsed(whole(path, MOST_BYTES).decode(errors="replace"))
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError):
        return {}, False
    return (value, True) if isinstance(value, dict) else ({}, False)


def _number(value: Any) -> float | None:
    try:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return float(value) if good else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= LARGEST_COUNT else None


def _text(value: Any) -> str | None:
    return printable(value[:LONGEST_TEXT]) if isinstance(value, str) else None


def _mesh(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    return _text(",".join(f"{k}={v}" for k, v in list(value.items())[:10] if _count(v) is not None))


def _date(seconds: float) -> str:
    try:
        return time.strftime("%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # a file can have a date that no calendar has
        return ""


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
