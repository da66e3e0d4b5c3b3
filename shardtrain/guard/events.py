"""Records what happens in a run besides its steps, in the log and in `events.jsonl`."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from shardtrain import compat
from shardtrain.guard import protocol

log = logging.getLogger(__name__)


class Events:
    """Writes events to the log and to `folder/events.jsonl`, one line for each event.

    Threads and processes may write at the same time; each line is written in one piece.

    Args:
        folder: folder of the run, which is created with the first event; None for the log alone.

    Example:
        >>> Events(tmp)("checkpoint", 40, "saved", path="checkpoints/40")
        >>> '"event": "checkpoint"' in (tmp / "events.jsonl").read_text()
        True
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def __call__(
        self, event: str, step: int, message: str, *, level: int = logging.INFO, **facts: Any
    ) -> None:
        """Writes an event.

        Args:
            event: its kind: start, resume, checkpoint, nan, rollback, profile, preempted, watchdog, peers,
                exit or end.
            step: number of the update that it belongs to.
            message: a sentence for the reader of the log.
            level: level in the log.
            facts: more entries of the line in the file, which JSON can represent.
        """
        log.log(level, "%s", protocol.line(step, event, message))
        if self.folder is None:
            return
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "rank": compat.process_rank()}
        line = json.dumps(row | {"step": step, "message": message} | facts) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK  # a pipe must not hold up the run
            file = os.open(self.folder / "events.jsonl", flags, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:  # a full disk must not end the run
            log.warning("events.jsonl cannot be written (%s)", error.strerror)
