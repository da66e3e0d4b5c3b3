"""A run that hangs, is told to stop, fails or diverges says so, keeps what it can, and ends in time."""

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shardtrain import compat
from shardtrain.errors import FAULT, REQUEUE, UserError, first_line
from shardtrain.guard import protocol
from shardtrain.guard.events import Events
from shardtrain.guard.health import Health, OnNan, Row
from shardtrain.guard.peers import MissingError, Peers
from shardtrain.guard.profile import Profiler, Progress
from shardtrain.guard.stop import Stop
from shardtrain.guard.watch import SILENT, Watch

MOST_SKIPPED = 10
"""Bad steps one after the other, after which it is no longer the batches."""

MOST_ROLLBACKS = 3
"""Returns to one checkpoint, after which it is no longer the batches."""

_numbers = itertools.count()


class Preempted(SystemExit):
    """The run was told to stop, and did after `step`; exit status 75."""

    def __init__(self, step: int) -> None:
        super().__init__(REQUEUE)
        self.step = step


class Guard:
    """Watches over a run; `Trainer.fit` takes one. As a context it watches what is before and after it, too.

    - No progress for `watchdog` seconds: all stacks on stderr, who is missing or behind, exit status 76.
    - SIGTERM on any process: all of them save the same step (where `fit` has `checkpoints`) and exit with 75,
      also after the last step, in its save, or in the evaluation. A second one: at once.
    - An exception in one of several processes: its message, and all of them exit within seconds.
    - A loss or gradient that is not finite, or a spike: `on_nan`.
    - SIGUSR1: the next steps are traced by jax's profiler into `folder/profile`.

    Args:
        folder: of the run, for `events.jsonl` and `profile/`; None for a run without files.
        watchdog: seconds without progress, five times as many for the start, compilations, saves, the
            evaluation and the end; None: no limit.
        on_nan: after a bad step `"stop"` with a sentence; `"skip"`, its update is not applied (the trainer
            must be one with `skip_bad=True`); `"rollback"` to the last checkpoint and go on with the batch
            behind the bad one (`fit` must have `checkpoints`); None: nothing.
        spike: a loss above this many times the median of the last 32 good steps is bad, too.
        profile: steps to be traced.

    Raises:
        UserError: a watchdog or a spike that is no positive number, or an unknown policy.

    Example:
        >>> with Guard(Path("runs/mine"), watchdog=60) as guard, Checkpoints("runs/mine/checkpoints") as kept:
        ...     trainer.fit(batches, steps=500, checkpoints=kept, guard=guard)
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        watchdog: float | None = 600.0,
        on_nan: OnNan | None = "stop",
        spike: float | None = None,
        profile: range | None = None,
    ) -> None:
        if watchdog is not None and not 0 < watchdog < float("inf"):
            raise UserError(f"watchdog={watchdog}: give seconds, or None for no limit")
        if on_nan not in ("stop", "skip", "rollback", None):
            raise UserError(f"on_nan={on_nan!r}: there are 'stop', 'skip', 'rollback' and None")
        if spike is not None and not 1 < spike < float("inf"):
            raise UserError(f"spike={spike}: a spike is more than 1 times the median, such as 3")
        self.folder, self.on_nan = folder, on_nan
        client = compat.coordination_client()
        several = client is not None and compat.process_count() > 1
        self._peers: Peers | None = None
        if several:
            self._peers = Peers(client, compat.process_rank(), compat.process_count(), "shardtrain")
        self.progress, self.events, self.health = Progress(), Events(), Health(spike)
        self.profiler = Profiler(folder, profile)
        self._stop = Stop(self._peers)
        self._limit = SILENT if watchdog is None else watchdog
        self._watch = Watch(watchdog, self.progress, self.events, self._stop, self._peers, self._on_demand)
        self._bad = 0
        self.counts = {"skipped": 0, "rollback": 0}
        self._rolled: tuple[int, int] = (-1, 0)
        self.watching = False

    def __enter__(self) -> "Guard":
        self.watching = True
        self.progress.at("starting")
        if self._peers is not None:  # keys of an earlier guard of this job are not ours
            self._peers.scope = f"shardtrain/{next(_numbers)}"
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler.running:
            with contextlib.suppress(RuntimeError):
                self.profiler.turn()
        if self._peers is not None:
            try:
                self._part(error)
            except MissingError as missing:
                self._watch.give_up(str(missing))
            except KeyboardInterrupt:
                self._watch.leave(130, "interrupted")
            except Exception as failure:  # not to leave here is to hang in jax's own end, which waits for all
                self._watch.leave(FAULT, f"the coordinator does not answer ({first_line(failure)})")
        elif error is not None and self.events.folder is not None and not isinstance(error, Preempted):
            text = " ".join(str(error).split()) or type(error).__name__
            self.events("exit", self.progress.step, text[:500])
        self._watch.end()
        self.watching = False

    def _part(self, error: BaseException | None) -> None:
        """The end of one of several processes: with the others where there is no error."""
        assert self._peers is not None
        exits = isinstance(error, SystemExit) and not error.code
        if not (error is None or exits or isinstance(error, Preempted)):
            self._watch.fail(error)
        self.progress.at("stopping" if isinstance(error, Preempted) else "ending")
        self._peers.meet("the end", "", self._limit)
        if isinstance(error, SystemExit):
            self._watch.leave(0 if exits else REQUEUE, self._watch.why or "the end")

    def _on_demand(self) -> None:
        steps = self.profiler.request(self.progress.step)
        self.events("profile", self.progress.step, f"SIGUSR1: steps {_span(steps)} will be traced")

    def say(self, event: str, step: int, message: str, **facts: Any) -> None:
        """An event of the whole run, which one of its processes writes down."""
        if compat.process_rank() == 0:
            self.events(event, step, message, **facts)

    # What the loop asks.

    def start(self, done: int, steps: int, mesh: Mapping[str, int]) -> None:
        """Training begins, with `done` of `steps` updates done; from now on there are files."""
        self.events.folder = self.folder
        self._stop.start(done)
        facts = {"steps": steps, "mesh": dict(mesh)}
        self.say("resume" if done else "start", done, protocol.steps_done(done, steps), **facts)

    def stops_before(self, step: int) -> bool:
        """Whether the run was told to stop before this step."""
        return self._stop.before(step)

    def good(self, step: int, row: Row, examples: range) -> bool:
        """Judges a step by its metrics, and marks a bad one in `row`.

        Args:
            step: the number of the update.
            row: its metrics.
            examples: which it was computed from, counted from the run's first.

        Returns:
            False where the run is to go back to its last checkpoint.

        Raises:
            UserError: the step is bad and the run is to stop; or too many are.
        """
        skipped = bool(row.pop("skipped", 0.0))
        reason = self.health.reason(row | {"skipped": float(skipped)})
        if self.on_nan is None or reason is None or (self.on_nan == "skip" and not skipped):
            self.health.remember([row["loss"]])
            self._bad = 0
            return True
        self._bad += 1
        where = f"examples {_span(examples)}: {reason}"
        facts = {"first_example": examples[0], "last_example": examples[-1]}
        if self.on_nan == "stop":
            self.say("nan", step, f"{where}; stopping", **facts)
            raise UserError(
                f"step {step}, {where}; leave such steps out (on-nan skip), go back to a checkpoint (on-nan "
                f"rollback), or try a lower learning rate or clipped gradients"
            )
        row["skipped" if self.on_nan == "skip" else "rolled_back"] = 1.0
        if self.on_nan == "rollback":
            self.say("nan", step, f"{where}; going back to the last checkpoint", **facts)
            return False
        self.counts["skipped"] += 1
        self.say("nan", step, f"{where}; its update is left out", **facts)
        if self._bad == MOST_SKIPPED:
            raise UserError(
                f"step {step}, {where}; so are all of the last {MOST_SKIPPED} steps: it is not the "
                f"batches; try a lower learning rate or clipped gradients"
            )
        return True

    def rolled_back(self, step: int, saved: int) -> None:
        """The run is where it was after `saved`, and goes on behind the bad `step`.

        Raises:
            UserError: it went back there too often.
        """
        again = self._rolled[1] + 1 if self._rolled[0] == saved else 1
        self._rolled = saved, again
        self.counts["rollback"] += 1
        self.say("rollback", step, f"the weights are those of step {saved} again", checkpoint=saved)
        if again > MOST_ROLLBACKS:
            raise UserError(
                f"step {step}: the run went back to the checkpoint of step {saved} {MOST_ROLLBACKS} times "
                f"and failed again; try a lower learning rate or clipped gradients"
            )

    def preempted(self, step: int, *, saved: bool) -> Preempted:
        """What to raise when the run stopped after `step` as it was told to."""
        kept = f"step {step} is saved" if saved else "there is nothing new to save"
        self.events("preempted", step, f"{kept}; run again to go on (exit status {REQUEUE})")
        return Preempted(step)

    def profile(self) -> None:
        """At an edge of the steps to be traced, begins or ends the trace."""
        done = self.profiler.turn()
        step = self.progress.step
        if done is None:
            self.events("profile", step, f"tracing steps {_span(self.profiler.steps or range(0))}")
        else:
            folder = self.profiler.folder
            self.events("profile", step, f"steps {_span(done)} are traced in {folder}", path=str(folder))


def _span(numbers: range) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
