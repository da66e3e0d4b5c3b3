"""What a run says of itself: a live line in the terminal, JSON lines, TensorBoard, a picture."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shardtrain.errors import UserError

log = logging.getLogger(__name__)

REFUSED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EEXIST", "EISDIR")
}
"""What a file system says that takes no more, or has something else in the place."""


Observer = Callable[[int, Mapping[str, float]], None]
"""Sees every step as it ends: the number of the update (from 1) and its metrics."""


class Terminal:
    """A progress bar with the metrics of the moment; into a pipe, a line now and then.

    Args:
        steps: updates in all.
        start: updates done before.
        console: where to; stderr by default, so that results can be piped.
    """

    def __init__(self, steps: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.steps = steps
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=start, metrics="compiling")

    def __enter__(self) -> "Terminal":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = [f"{key} {metrics[key]:.4f}" for key in metrics if key in ("loss", "accuracy")]
        line = "  ".join([*shown, f"{metrics['images_per_second']:,.0f} images/s"])
        self.bar.update(self.task, completed=step, metrics=line)
        every = max(1, self.steps // 10)
        if not self.console.is_terminal and (step % every == 0 or step in (1, self.steps)):
            self.console.print(f"step {step}/{self.steps}  {line}", highlight=False)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While files are written: a disk that is full, or that may not be written to, in a sentence.

    Raises:
        UserError: what the system said.

    Example:
        >>> with writing(Path("runs/mine")):
        ...     Path("runs/mine/notes.txt").write_text("...")  # doctest: +SKIP
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise UserError(
            f"{folder} could not be written to ({error.strerror}); make room there, or name another folder; "
            f"checkpoints that were there are as they were"
        ) from error


class Recorder:
    """Writes every step to `metrics.jsonl` and to a TensorBoard event file in `tensorboard/`.

    Args:
        folder: of the run.
        start: updates done before; rows of later ones, from a run that went on past its checkpoint, are
            dropped.

    Raises:
        UserError: a full disk, then or at a later step.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= start] if start else []
        with writing(folder):
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self.file = self.path.open("a")
            self.board = Board(folder / "tensorboard", start)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self.file, self.board):  # after an error that says more, what is lost here is no news
            with contextlib.suppress(OSError) if kind is not None else writing(self.folder):
                file.close()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        with writing(self.folder):
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            self.board(step, metrics)


class Board:
    """Writes scalars for TensorBoard.

    tensorboardX's own `SummaryWriter` does so in a thread, which dies of a full disk without a word, and
    later steps wait for it forever.

    Args:
        folder: for the event file.
        start: updates done before; what TensorBoard has of later ones it shall forget.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # takes a second, and only a run needs it
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{start}")  # else of the second alone
        if start:
            again = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=start + 1, session_log=again, wall_time=time.time()))

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            row = self._event(step=step, summary=self._scalar(key, value), wall_time=time.time())
            self._writer.write_event(row)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; lines that are damaged, such as a last one that a kill cut short, are
    left out.

    Raises:
        UserError: a file that may not be read.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); move it away, or make it readable"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step, loss = row["step"], row["loss"]
        except (ValueError, TypeError, KeyError):
            step = loss = None
        if isinstance(step, int) and isinstance(loss, int | float):
            rows.append(row)
        elif number < len(lines):
            log.warning("%s: line %d is damaged, and left out", path, number)
    return rows


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or, after a crash, as it was before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draws loss and accuracy against the step as a PNG: every step thin, their running mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    keys = [key for key in ("loss", "accuracy") if rows and key in rows[0]]
    figure, axes = plt.subplots(
        1, max(1, len(keys)), figsize=(5 * max(1, len(keys)), 3.6), layout="constrained"
    )
    for key, axis in zip(keys, np.atleast_1d(axes), strict=False):
        steps = np.array([row["step"] for row in rows])
        values = np.array([row[key] for row in rows])
        span = max(1, len(values) // 25)
        smooth = np.convolve(values, np.ones(span) / span, "valid")
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
        axis.plot(
            steps[(span - 1) // 2 :][: len(smooth)], smooth, color="tab:blue", label=f"mean of {span} steps"
        )
        if key == "loss" and (values > 0).all():
            axis.set_yscale("log")
        axis.set(xlabel="step", ylabel=f"training {key}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize=10, parse_math=False)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, path)
    plt.close(figure)
