"""The guard of a run: it acts when a run hangs, is told to stop, loses a process, fails or diverges."""

import contextlib
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shardtrain import compat, interrupts
from shardtrain.errors import FAULT, REQUEUE, UserError, first_line
from shardtrain.files import expanded
from shardtrain.guard import protocol
from shardtrain.guard.events import Events
from shardtrain.guard.health import Health, OnNan, Row, not_finite
from shardtrain.guard.peers import MissingError, Peers
from shardtrain.guard.profile import Profiler, Progress
from shardtrain.guard.stop import Stop
from shardtrain.guard.watch import MOST_SILENT_SECONDS, Watch

MOST_SKIPPED = 10
"""After so many bad steps in a row the cause is not the batches, and the run ends."""

MOST_ROLLBACKS = 3
"""After so many returns to one checkpoint the cause is not the batches, and the run ends."""

_numbers = itertools.count()


class Preempted(SystemExit):
    """Raised when the run was told to stop and has stopped after `step`; the exit status is 75."""

    def __init__(self, step: int) -> None:
        super().__init__(REQUEUE)
        self.step = step


class Guard:
    """Watches over a run, and ends it in order when something goes wrong.

    Pass the guard to `Trainer.fit`. Used as a context manager as well, it also watches over what the program
    does before and after training.

    - **Hangs.** Without progress for `watchdog` seconds, the process prints the stacks of all threads, says
      which other processes do not answer or are behind, and exits with status 76.
    - **Preemption.** After SIGTERM on any process, all processes finish the same step, save it if `fit` has
      `checkpoints`, and exit with status 75. A second SIGTERM ends the process at once.
    - **Failures.** If one of several processes raises an exception or is lost, all others print what happened
      and exit within seconds, instead of waiting for it in a collective.
    - **Bad steps.** A loss or gradient that is not finite, and a spike of the loss, is handled as `on_nan`
    says.
    - **Profiles.** After SIGUSR1, the next steps are traced by jax's profiler into `folder/profile`.

    A launcher should start a run again that exits with status 75, without counting it, and one that exits
    with status 76, a limited number of times.

    Args:
        folder: folder of the run, for `events.jsonl` and `profile/`; None for a run without files.
        watchdog: seconds without progress after which the process ends. The start, a compilation, a save, the
            evaluation and the end may take five times as long. None for no limit.
        on_nan: what to do after a bad step. `"stop"` raises a `UserError`. `"skip"` leaves out the update,
            for which the trainer needs `skip_bad=True`. `"rollback"` restores the last checkpoint and
            continues with the batch after the bad one, for which `fit` needs `checkpoints`. None ignores bad
            steps.
        spike: a loss above this many times the median of the last 32 good steps is bad, too; None for no
            limit.
        profile: the steps to trace.

    Raises:
        UserError: if `watchdog` or `spike` is not a positive number, or if `on_nan` is unknown.

    Example:
        >>> model = st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0))
        >>> trainer = st.Trainer(model, optax.sgd(0.1), mesh=st.make_mesh("data=8"))
        >>> batches = st.data.train_batches(st.data.load("digits").train, 64, seed=0)
        >>> with st.Guard(tmp, watchdog=60.0) as guard, st.Checkpoints(tmp / "checkpoints") as checkpoints:
        ...     rows = trainer.fit(batches, steps=2, checkpoints=checkpoints, guard=guard, progress=False)
        >>> len(rows)
        2
    """

    def __init__(
        self,
        folder: str | Path | None = None,
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
        self.folder = None if folder is None else expanded(folder)
        self.on_nan = on_nan
        client = compat.coordination_client()
        several = client is not None and compat.process_count() > 1
        self._peers: Peers | None = None
        if several:
            self._peers = Peers(client, compat.process_rank(), compat.process_count(), "shardtrain")
        self.progress, self.events, self.health = Progress(), Events(), Health(spike)
        self.profiler = Profiler(self.folder, profile)
        self._stop = Stop(self._peers)
        self._limit = MOST_SILENT_SECONDS if watchdog is None else watchdog
        self._watch = Watch(watchdog, self.progress, self.events, self._stop, self._peers, self._on_sigusr1)
        self._bad_in_a_row = 0
        self.counts = {"skipped": 0, "rollback": 0}
        self._rollbacks: tuple[int, int] = (-1, 0)  # a checkpoint and how often it was restored
        self.watching = False

    def __enter__(self) -> "Guard":
        self.watching = True
        self.progress.at("starting")
        if self._peers is not None:  # an earlier guard of this job has used other keys
            self._peers.scope = f"shardtrain/{next(_numbers)}"
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler.running:
            with contextlib.suppress(RuntimeError):
                self.profiler.toggle()
        if self._peers is not None:
            try:
                self._end_together(error)
            except MissingError as missing:
                self._watch.give_up(str(missing))
            except KeyboardInterrupt:
                self._watch.leave(interrupts.STATUS, "interrupted")
            except (
                Exception
            ) as failure:  # without this the process hangs in jax's exit handler, which waits for all
                self._watch.leave(FAULT, f"the coordinator does not answer ({first_line(failure)})")
        elif error is not None and self.events.folder is not None and not isinstance(error, Preempted):
            interrupted = isinstance(error, KeyboardInterrupt)
            text = "interrupted" if interrupted else " ".join(str(error).split()) or type(error).__name__
            level = logging.DEBUG if interrupted else logging.INFO  # the program itself says it on stderr
            self.events("exit", self.progress.step, text[:500], level=level)
        self._watch.end()
        self.watching = False

    def _end_together(self, error: BaseException | None) -> None:
        """Ends one of several processes: after an error at once, otherwise together with the others."""
        assert self._peers is not None
        exits = isinstance(error, SystemExit) and not error.code
        if not (error is None or exits or isinstance(error, Preempted)):
            self._watch.fail(error)
        self.progress.at("stopping" if isinstance(error, Preempted) else "ending")
        self._peers.meet("the end", "", self._limit)
        if isinstance(error, SystemExit):
            self._watch.leave(0 if exits else REQUEUE, self._watch.why or "the end")

    def _on_sigusr1(self) -> None:
        steps = self.profiler.request(self.progress.step)
        self.events("profile", self.progress.step, f"SIGUSR1: steps {_span(steps)} will be traced")

    def say(self, event: str, step: int, message: str, **facts: Any) -> None:
        """Records an event of the whole run, in the first process only."""
        if compat.process_rank() == 0:
            self.events(event, step, message, **facts)

    # The calls of the training loop.

    def start(self, done: int, steps: int, mesh: Mapping[str, int]) -> None:
        """Called when training begins, with `done` of `steps` updates done; opens the file of events."""
        interrupts.as_exceptions()
        self.events.folder = self.folder
        self._stop.start(done)
        facts = {"steps": steps, "mesh": dict(mesh)}
        self.say("resume" if done else "start", done, protocol.steps_done(done, steps), **facts)

    def stops_before(self, step: int) -> bool:
        """Whether the run was told to stop before this step."""
        return self._stop.before(step)

    def good(self, step: int, row: Row, examples: range, batch: Any = None) -> bool:
        """Judges a step by its metrics, and adds an entry to `row` if the step is bad.

        Args:
            step: number of the update.
            row: metrics of the step.
            examples: the examples of the step, counted from the first of the run.
            batch: what the step was given, a tree of arrays; it is looked at if the step is bad.

        Returns:
            False if the run must restore its last checkpoint, otherwise True.

        Raises:
            UserError: if the step is bad and `on_nan` is `"stop"`, or if too many steps are bad.
        """
        skipped = bool(row.pop("skipped", 0.0))
        reason = self.health.reason(row | {"skipped": float(skipped)})
        if self.on_nan is None or reason is None or (self.on_nan == "skip" and not skipped):
            self.health.remember([row["loss"]])
            self._bad_in_a_row = 0
            return True
        self._bad_in_a_row += 1
        data = not_finite(batch)
        where = f"examples {_span(examples)}: {reason}"
        seen = f"; {data}" if data else ""
        instead = "mend the data" if data else "try a lower learning rate or clipped gradients"
        facts = {"first_example": examples[0], "last_example": examples[-1]}
        if self.on_nan == "stop":
            self.say("nan", step, f"{where}; stopping{seen}", **facts)
            raise UserError(
                f"step {step}, {where}{seen}; leave such steps out (--on-nan skip), go back to a checkpoint "
                f"(--on-nan rollback), or {instead}"
            )
        row["skipped" if self.on_nan == "skip" else "rolled_back"] = 1.0
        if self.on_nan == "rollback":
            self.say("nan", step, f"{where}; going back to the last checkpoint{seen}", **facts)
            return False
        self.counts["skipped"] += 1
        self.say("nan", step, f"{where}; its update is left out{seen}", **facts)
        if self._bad_in_a_row == MOST_SKIPPED:
            raise UserError(
                f"step {step}, {where}; so are all of the last {MOST_SKIPPED} steps"
                f"{seen or ': it is not the batches'}; {instead}"
            )
        return True

    def rolled_back(self, step: int, saved: int) -> None:
        """Called when the checkpoint of step `saved` was restored after the bad step `step`.

        Raises:
            UserError: if that checkpoint was restored too often.
        """
        times = self._rollbacks[1] + 1 if self._rollbacks[0] == saved else 1
        self._rollbacks = saved, times
        self.counts["rollback"] += 1
        self.say("rollback", step, f"the weights are those of step {saved} again", checkpoint=saved)
        if times > MOST_ROLLBACKS:
            raise UserError(
                f"step {step}: the run went back to the checkpoint of step {saved} {MOST_ROLLBACKS} times "
                f"and failed again; try a lower learning rate or clipped gradients"
            )

    def preempted(self, step: int, *, saved: bool) -> Preempted:
        """Records that the run has stopped after `step` as it was told to; returns the exception to raise."""
        state = f"step {step} is saved" if saved else "there is nothing new to save"
        self.events("preempted", step, f"{state}; run again to go on (exit status {REQUEUE})")
        return Preempted(step)

    def profile(self) -> None:
        """Begins or ends the trace of the steps to be traced."""
        done = self.profiler.toggle()
        step = self.progress.step
        if done is None:
            self.events("profile", step, f"tracing steps {_span(self.profiler.steps or range(0))}")
        else:
            folder = self.profiler.folder
            self.events("profile", step, f"steps {_span(done)} are traced in {folder}", path=str(folder))


def _span(numbers: range) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
