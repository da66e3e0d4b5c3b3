"""Rows of a run as a file of JSON lines, and how files of a run are written."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardtrain.errors import UserError
from shardtrain.files import expanded
from shardtrain.guard.health import Row
from shardtrain.train.callbacks.base import Callback, Run

log = logging.getLogger(__name__)

REFUSED = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EEXIST", "EISDIR")
}
"""Error numbers of a file system that is full, that may not be written to, or has something else there."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what a full or forbidden file system raises inside the context into one sentence.

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


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or, after a crash, as it was before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


class JsonLines(Callback):
    """Writes the row of every step as one line of JSON, `{"step": 1, "loss": ...}`.

    A run that is taken up at a step keeps the lines up to it and drops later ones, which belong to another
    way that the run went. Values that are no numbers, such as a confusion matrix, are left out.

    Args:
        path: of the file, whose folder is made where there is none.

    Raises:
        UserError: a full disk, at the start or at a later step.

    Example:
        >>> rows = st.callbacks.JsonLines("metrics.jsonl")
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self._file: Any = None

    def open(self, start: int) -> None:
        """Opens the file for a run of which `start` updates were done before."""
        kept = [row for row in read_rows(self.path) if row["step"] <= start] if start else []
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = self.path.open("a")

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends the row of a step."""
        with writing(self.path.parent):
            self._file.write(json.dumps({"step": step, **numbers(row)}) + "\n")
            self._file.flush()

    def on_start(self, run: Run) -> None:
        self.open(run.step)

    def on_step(self, run: Run, row: Row) -> None:
        self.write(run.step, row)

    def on_end(self, run: Run) -> None:
        close(self._file, self.path.parent, run.error)


def close(file: Any, folder: Path, error: BaseException | None) -> None:
    """Closes a file of a run; after an error, which says more, a failure to do so is not raised."""
    if file is not None:
        with contextlib.suppress(OSError) if error is not None else writing(folder):
            file.close()


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a row that are numbers."""
    return {key: float(value) for key, value in row.items() if isinstance(value, int | float)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a `metrics.jsonl`.

    Lines that are damaged, such as a last one that a kill cut short, are left out, with a warning unless
    it is the last one.

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
