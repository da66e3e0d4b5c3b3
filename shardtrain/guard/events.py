"""What happens in a run besides its steps: one line each in the log, and one in `events.jsonl`."""

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
    """Writes an event to the log and to `folder/events.jsonl`, as one line each.

    Any thread and any process may write; a line goes out in one piece.

    Args:
        folder: of the run; None for the log alone. It is made when the first event is written.

    Example:
        >>> Events(Path("runs/digits"))("checkpoint", 40, "saved", path="runs/digits/checkpoints/40")
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def __call__(
        self, event: str, step: int, message: str, *, level: int = logging.INFO, **facts: Any
    ) -> None:
        """Writes one.

        Args:
            event: its kind: start, resume, checkpoint, nan, rollback, profile, preempted, watchdog, peers,
                exit, end.
            step: the update that it belongs to.
            message: for the reader of the log.
            level: of `logging`.
            facts: more entries of the line in the file.
        """
        log.log(level, "%s", protocol.line(step, event, message))
        if self.folder is None:
            return
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "rank": compat.process_rank()}
        line = json.dumps(row | {"step": step, "message": message} | facts) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:  # a full disk must not end a run that only wanted to say something
            log.warning("events.jsonl cannot be written (%s)", error.strerror)
