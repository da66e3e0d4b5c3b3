"""Rows of a run as a TensorBoard event file."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtrain.files import expanded
from shardtrain.guard.health import Row
from shardtrain.train.callbacks.base import Callback, Run
from shardtrain.train.callbacks.files import close, numbers, writing


class Board:
    """Writes scalars to an event file.

    tensorboardX's own `SummaryWriter` writes in a thread, which dies of a full disk without a word, after
    which later steps wait for it forever. This class uses the writer below it.

    Args:
        folder: for the event file.
        start: updates done before; TensorBoard drops what it has of later ones.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # takes a second, and only a run needs it
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{start}")  # two of one second need two names
        if start:
            again = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=start + 1, session_log=again, wall_time=time.time()))

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row."""
        for key, value in numbers(row).items():
            event = self._event(step=step, summary=self._scalar(key, value), wall_time=time.time())
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class TensorBoard(Callback):
    """Writes the numbers of every step for TensorBoard.

    Args:
        folder: for the event files.

    Raises:
        UserError: a full disk, at the start or at a later step.

    Example:
        >>> board = st.callbacks.TensorBoard("runs/mine/tensorboard")
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)
        self._board: Board | None = None

    def open(self, start: int) -> None:
        """Opens an event file for a run of which `start` updates were done before."""
        with writing(self.folder.parent):
            self._board = Board(self.folder, start)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes the numbers of the row of a step."""
        assert self._board is not None
        with writing(self.folder.parent):
            self._board.write(step, row)

    def on_start(self, run: Run) -> None:
        self.open(run.step)

    def on_step(self, run: Run, row: Row) -> None:
        self.write(run.step, row)

    def on_end(self, run: Run) -> None:
        close(self._board, self.folder.parent, run.error)
