"""After which step a run stops that was asked to stop: the same one for all its processes."""

import threading

from shardtrain.guard.peers import Peers

NEVER = "none"


class Stop:
    """The agreement of all processes on the last step.

    The main thread asks before every step whether to begin it; meanwhile another thread may agree with the
    other processes. While it does, no step can begin here, so that what this process says stays true. The
    last step is the latest that any process has begun.

    jax has a service for it (`reached_preemption_sync_point`), which loses a signal that comes before the
    first step of a resumed run, and of which nobody can say who is missing.

    Args:
        peers: the processes of the job, None for one alone.
    """

    def __init__(self, peers: Peers | None) -> None:
        self.peers = peers
        self.last: int | None = None
        self._begun: int | None = None
        self._gate = threading.Lock()

    def start(self, done: int) -> None:
        """The main thread is about to train, with so many steps done."""
        with self._gate:
            self._begun = done

    def before(self, step: int) -> bool:
        """Whether to stop before this step; if not, it counts as begun."""
        with self._gate:
            if self.last is not None and step > self.last:
                return True
            self._begun = step
            return False

    def agree(self, limit: float) -> int | None:
        """Agrees with the others on the last step, from a thread other than the main one.

        Returns:
            The step; None where no process has begun to train, so that there is nothing to wait for.

        Raises:
            MissingError: some process did not answer within `limit` seconds.
        """
        with self._gate:
            mine = NEVER if self._begun is None else str(self._begun)
            said = [mine] if self.peers is None else list(self.peers.meet("stop", mine, limit).values())
            steps = [int(text) for text in said if text != NEVER]
            self.last = max(steps, default=None)
            return self.last
