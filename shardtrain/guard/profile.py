"""Measures where the time of a step goes: phases of the host, device memory, traces of jax's profiler."""

import logging
import time
from collections import defaultdict
from pathlib import Path

import jax

from shardtrain import compat
from shardtrain.errors import first_line

log = logging.getLogger(__name__)

STEPS_ON_SIGNAL = 5
"""Number of steps that are profiled after SIGUSR1."""


class Clock:
    """Counts the seconds in which this process ran: a job that was suspended as a whole did not hang.

    A thread calls `tick` again and again. Of a longer gap between two ticks, only `LONGEST_TICK_SECONDS`
    count.
    """

    LONGEST_TICK_SECONDS = 5.0

    def __init__(self) -> None:
        self._read = 0.0, time.monotonic()  # one tuple, so that other threads see both values of one tick

    def tick(self) -> None:
        """Counts the time since the last tick."""
        self._read = self._at(now := time.monotonic()), now

    def now(self) -> float:
        """Returns the seconds counted so far."""
        return self._at(time.monotonic())

    def _at(self, now: float) -> float:
        awake, last = self._read
        return awake + min(now - last, self.LONGEST_TICK_SECONDS)


class Progress:
    """The phase of the main thread, since when, and how much time each phase took.

    Attributes:
        step: the current step.
        what: the current phase, one of `peers.PHASES`.
        since: when it began, by the monotonic clock.
        marks: how often a phase has begun, by which others see progress.

    Example:
        >>> progress = Progress()
        >>> progress.at("data", step=7)
        >>> progress.at("compute")
        >>> progress.take()[1]["data"] >= 0
        True
    """

    def __init__(self) -> None:
        self.step = 0
        self.what = "starting"
        self.since = time.monotonic()
        self.marks = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def at(self, what: str, step: int | None = None) -> None:
        """Begins a phase, of another step if one is given."""
        now = time.monotonic()
        self._seconds[self.what] += now - self.since
        self.what, self.since, self.marks = what, now, self.marks + 1
        self.step = self.step if step is None else step

    def take(self) -> tuple[float, dict[str, float]]:
        """Returns the time of now, and the seconds of each phase since the last call."""
        self.at(self.what)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return self.since, taken


class Profiler:
    """Traces some steps with jax's profiler.

    Args:
        folder: folder of the run, in which `profile/` is created.
        steps: the steps to trace; None for none.
    """

    def __init__(self, folder: Path | None, steps: range | None = None) -> None:
        several = compat.process_count() > 1
        self.folder = (folder or Path()) / "profile"
        if several:  # processes of one host would write files of one name
            self.folder /= f"rank-{compat.process_rank()}"
        self.steps = steps
        self.running = False

    def request(self, step: int) -> range:
        """Asks for a trace that begins with the step after the next, from any thread; returns its steps."""
        if not self.running:
            self.steps = range(step + 2, step + 2 + STEPS_ON_SIGNAL)
        return self.steps or range(0)

    def is_edge(self, step: int) -> bool:
        """Whether a trace begins or ends before this step. The devices should be idle then."""
        if self.steps is None:
            return False
        return step >= self.steps.stop if self.running else step in self.steps

    def toggle(self) -> range | None:
        """Begins a trace, or ends it and returns its steps.

        A trace that cannot be written does not end the run: the error is logged, and there is no trace.
        """
        begins = not self.running
        try:
            if begins:
                jax.profiler.start_trace(self.folder)
                self.running = True
                return None
            self.running = False
            jax.profiler.stop_trace()
        except (jax.errors.JaxRuntimeError, OSError) as error:
            self.steps = None
            log.error("no profile could be written to %s (%s)", self.folder, first_line(error))
            return None
        done, self.steps = self.steps, None
        return done


def peak_memory() -> float | None:
    """Returns the peak of the bytes in use on a device of this process; None if it is not known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return float(max(peaks)) if peaks else None
