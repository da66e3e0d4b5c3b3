"""Where a step's time goes: what the host waits for, device memory, and traces of jax's profiler."""

import logging
import time
from collections import defaultdict
from pathlib import Path

import jax

from shardtrain import compat
from shardtrain.errors import first_line

log = logging.getLogger(__name__)

STEPS = 5
"""Steps that are profiled when a signal asks for it."""


class Clock:
    """Seconds that this process was awake: a job that was stopped as a whole, and goes on, did not hang.

    A thread of its own calls `tick` again and again.
    """

    LONGEST = 5.0
    """Seconds between two ticks, beyond which it was asleep."""

    def __init__(self) -> None:
        self._read = 0.0, time.monotonic()  # of one piece, as other threads see it

    def tick(self) -> None:
        """Counts the time since the last one."""
        self._read = self._at(now := time.monotonic()), now

    def now(self) -> float:
        """Seconds awake so far."""
        return self._at(time.monotonic())

    def _at(self, now: float) -> float:
        awake, last = self._read
        return awake + min(now - last, self.LONGEST)


class Progress:
    """What the main thread is at, since when, and how long it was at each thing.

    Example:
        >>> progress = Progress()
        >>> progress.at("data", step=7)
        >>> progress.at("compute")
        >>> sorted(progress.take())
        ['data', 'starting']
    """

    def __init__(self) -> None:
        self.step = 0
        self.what = "starting"
        self.since = time.monotonic()
        self.marks = 0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def at(self, what: str, step: int | None = None) -> None:
        """From now on it is at `what`, which is progress."""
        now = time.monotonic()
        self._seconds[self.what] += now - self.since
        self.what, self.since, self.marks = what, now, self.marks + 1
        self.step = self.step if step is None else step

    def take(self) -> dict[str, float]:
        """Seconds at each thing since this was last asked."""
        self.at(self.what)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


class Profiler:
    """Traces of jax's profiler for some of the steps.

    Args:
        folder: of the run, in which `profile/` is made.
        steps: to be profiled, or none.
    """

    def __init__(self, folder: Path | None, steps: range | None = None) -> None:
        several = compat.process_count() > 1
        self.folder = (folder or Path()) / "profile"
        if several:  # processes of one host would write files of one name
            self.folder /= f"rank-{compat.process_rank()}"
        self.steps = steps
        self.running = False

    def request(self, step: int) -> range:
        """Asks for the steps after the next; any thread may."""
        if not self.running:
            self.steps = range(step + 2, step + 2 + STEPS)
        return self.steps or range(0)

    def is_edge(self, step: int) -> bool:
        """Whether a trace begins or ends before this step, for which the devices should be idle."""
        if self.steps is None:
            return False
        return step >= self.steps.stop if self.running else step in self.steps

    def turn(self) -> range | None:
        """At an edge: begins a trace, or ends it and returns the steps that are in it.

        A trace that cannot be written is no reason to end a run: it is said, and there is none.
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
    """Most bytes that a device of this process has had in use, None where the back end does not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return float(max(peaks)) if peaks else None
