"""Guards of recipes: their flags, their rows in the closing table, and their log lines."""

import logging
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from shardtrain import compat
from shardtrain.cli.outputs import printable
from shardtrain.errors import UserError
from shardtrain.guard import Guard
from shardtrain.guard.watch import SLOW_PHASE_FACTOR


def guard(flags: Any, out: Path) -> Guard:
    """Returns the guard of a run.

    Args:
        flags: flags of a recipe, a `RunFlags`.
        out: folder of the run.

    Raises:
        UserError: if a flag is out of range.
    """
    watchdog, spike = flags.watchdog, flags.spike
    if not 0 <= watchdog < float("inf"):
        raise UserError(f"--watchdog {watchdog:g}: give seconds, or 0 for no limit")
    if spike is not None and not 1 < spike < float("inf"):
        raise UserError(f"--spike {spike:g}: a spike is more than 1 times the median, such as 3")
    traced = steps_of(flags.profile, flags.steps) if flags.profile else None
    return Guard(out, watchdog=watchdog or None, on_nan=flags.on_nan, spike=spike, profile=traced)


def patience(flags: Any) -> float:
    """Returns how many seconds the processes of a run wait for each other while one may be compiling."""
    return SLOW_PHASE_FACTOR * flags.watchdog or math.inf


def steps_of(text: str, steps: int) -> range:
    """Returns the steps of a text such as `"10:20"`: steps 10 to 20.

    Args:
        text: first and last step.
        steps: number of steps of the run.

    Raises:
        UserError: if the text is no such range, or if it begins after the last step.

    Example:
        >>> steps_of("10:20", steps=100)
        range(10, 21)
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()) or not 1 <= int(first) <= int(last):
        raise UserError(f"--profile {text}: write the first and the last step to trace, such as 10:20")
    if int(first) > steps:
        raise UserError(f"--profile {text}: the run has --steps {steps}; trace earlier ones")
    return range(int(first), min(int(last), steps) + 1)


def summary(rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, str]:
    """Returns rows of the closing table: where the time went, peak memory, and bad steps.

    Args:
        rows: the rows of `metrics.jsonl`.
        out: folder of the run.
    """
    seconds = {
        key: sum(row.get(f"{key}_seconds", 0.0) for row in rows) for key in ("compute", "data", "checkpoint")
    }
    whole = sum(row["seconds"] for row in rows)
    shares = ", ".join(f"{key} {100 * value / max(whole, 1e-9):.0f} %" for key, value in seconds.items())
    step = statistics.median(row["seconds"] for row in rows)
    found = {"time of a step (median)": f"{1000 * step:,.1f} ms; the host waited for {shares}"}
    if peaks := [row["peak_memory"] for row in rows if "peak_memory" in row]:
        found["device memory (peak)"] = f"{max(peaks) / 2**20:,.0f} MiB"
    for key, words in (("skipped", "left out"), ("rolled_back", "gone back from")):
        if count := sum(key in row for row in rows):
            found[f"bad steps {words}"] = str(count)
    found["events"] = str(out / "events.jsonl")
    return found


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a progress bar replaces for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr() -> None:
    """Writes the package's log to stderr, each line with the time and the rank."""

    class Rank(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            record.rank = compat.process_rank()
            return printable(super().format(record), keep="\n\t")

    handler = _Stderr()
    handler.setFormatter(Rank("%(asctime)s rank %(rank)d %(message)s", "%H:%M:%S"))
    log = logging.getLogger("shardtrain")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def hush_late_failures() -> None:
    """Suppresses errors that tensorstore and asyncio report after a save has already failed.

    With a full disk there is one for each file, and their tracebacks would hide the message of the
    `UserError`.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(late: Any) -> None:
        if not (isinstance(late.exc_value, RuntimeError) and "Event loop is closed" in str(late.exc_value)):
            before(late)

    sys.unraisablehook = hook
