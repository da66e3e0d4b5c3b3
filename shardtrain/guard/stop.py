"""The agreement of all processes on the step after which a run stops that was told to stop."""

import threading

from shardtrain.guard.peers import Peers

NEVER = "none"
"""What a process answers that has not begun to train."""


class Stop:
    """The last step of a run, on which all processes agree.

    The main thread asks before every step whether to begin it. Another thread may agree with the other
    processes at the same time; while it does, no step can begin here, so that the step that this process has
    named remains its latest. The last step is the latest that any process has begun.

    jax has a service for this (`reached_preemption_sync_point`), but it loses a signal that comes before the
    first step of a resumed run, and it cannot name the process that is missing.

    Args:
        peers: the processes of the job; None for a single process.

    Attributes:
        last: the last step; None until there is an agreement.
    """

    def __init__(self, peers: Peers | None) -> None:
        self.peers = peers
        self.last: int | None = None
        self._begun: int | None = None
        self._gate = threading.Lock()

    def start(self, done: int) -> None:
        """Called by the main thread before it trains, with the number of steps that are done."""
        with self._gate:
            self._begun = done

    def before(self, step: int) -> bool:
        """Whether to stop before this step; if not, the step counts as begun."""
        with self._gate:
            if self.last is not None and step > self.last:
                return True
            self._begun = step
            return False

    def agree(self, limit: float) -> int | None:
        """Agrees with the other processes on the last step. Not to be called by the main thread.

        Returns:
            The step; None if no process has begun to train, so that there is nothing to wait for.

        Raises:
            MissingError: if a process does not answer within `limit` seconds.
        """
        with self._gate:
            mine = NEVER if self._begun is None else str(self._begun)
            found = [mine] if self.peers is None else list(self.peers.meet("stop", mine, limit).values())
            steps = [int(text) for text in found if text != NEVER]
            self.last = max(steps, default=None)
            return self.last
