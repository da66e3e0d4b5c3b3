"""Messages between the processes of a job outside of collectives, through jax's key-value store.

A process writes a value under a topic, which replaces the value that it wrote there before. Every process
reads what all processes have written. The store is in the coordinator, the process of rank 0. Whoever reaches
its port can write there; what carries no code of the job's token is left out.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardtrain.guard.token import authentic, job_token, signed

log = logging.getLogger(__name__)

PHASES = (
    "starting", "data", "compiling", "compute", "validating", "checkpoint", "stopping", "evaluating",
    "ending", "gone",
)  # fmt: skip
"""The phases of a process, in the order of a run and of a step."""

POLL_SECONDS = 0.1
"""Time between two reads of what others have written."""

MOST_STRANGE_KEYS = 100
"""So many keys of strangers are logged; a stranger must not fill the log."""


class MissingError(TimeoutError):
    """Some processes did not come to a meeting in time.

    Attributes:
        ranks: the ranks of these processes.
    """

    def __init__(self, topic: str, ranks: Sequence[int], limit: float) -> None:
        super().__init__(f"{named(ranks)} did not come to {topic!r} within {limit:.0f} s")
        self.ranks = tuple(ranks)


class Peers:
    """The processes of a job, which exchange messages.

    Every call sends one or two messages to the coordinator, rank 0, and blocks while that does not answer. It
    therefore needs a thread that may hang.

    Args:
        client: the client of jax's coordination service, from `compat.coordination_client`.
        rank: rank of this process.
        count: number of processes.
        scope: the beginning of all keys.
        token: of the job; by default that of the environment.
    """

    def __init__(self, client: Any, rank: int, count: int, scope: str, token: bytes | None = None) -> None:
        self.client, self.rank, self.count, self.scope = client, rank, count, scope
        self._token = job_token(os.environ) if token is None else token
        self._strange: set[str] = set()

    def write(self, topic: str, value: str) -> None:
        """Writes the value of this process on a topic, in place of its earlier one."""
        key = self._key(topic, self.rank)
        self.client.key_value_set(key, signed(self._token, key, value), allow_overwrite=True)

    def read(self, topic: str) -> dict[int, str]:
        """Returns the last value of each rank on a topic, without the ranks that have written none.

        What a stranger has written is left out, and logged once for each key.
        """
        found = {}
        ranks = {self._key(topic, rank): rank for rank in range(self.count)}
        for key, message in self.client.key_value_dir_get_bytes(f"{self.scope}/{topic}/"):
            text = authentic(self._token, key, message.decode(errors="replace")) if key in ranks else None
            if text is not None:
                found[ranks[key]] = text
            elif key not in self._strange and len(self._strange) < MOST_STRANGE_KEYS:
                self._strange.add(key)
                log.warning("%r in the store of the job is no message of this job: it is left out", key[:200])
        return found

    def _key(self, topic: str, rank: int) -> str:
        return f"{self.scope}/{topic}/{rank}"

    def meet(self, topic: str, value: str, limit: float) -> dict[int, str]:
        """Waits until all ranks have called this, and exchanges their values.

        Rank 0 waits for all and then writes all values at once, so that the number of messages is the number
        of ranks.

        Args:
            topic: name of the meeting, which must be used once only.
            value: of this rank.
            limit: seconds to wait.

        Returns:
            The value of every rank.

        Raises:
            MissingError: if some ranks do not come within `limit` seconds.

        Example:
            >>> steps = peers.meet("saved", str(step), limit=60)  # doctest: +SKIP
        """
        self.write(topic, value)
        if self.rank == 0:
            found = self._wait(topic, self.count, limit)
            self.write(f"{topic}: all", json.dumps(found))
        else:  # waits a little longer, because rank 0 names those that are missing
            answer = self._wait(f"{topic}: all", 1, limit + 10)
            if not answer:
                raise MissingError(topic, [0], limit)
            found = {int(rank): text for rank, text in json.loads(answer[0]).items()}
        if missing := sorted(set(range(self.count)) - set(found)):
            raise MissingError(topic, missing, limit)
        return found

    def _wait(self, topic: str, count: int, limit: float) -> dict[int, str]:
        """Returns the values of `count` ranks on a topic, or of fewer if the limit is over."""
        end = time.monotonic() + limit
        while len(found := self.read(topic)) < count and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return found


class Heartbeats:
    """The heartbeats of the processes: each writes a growing number, its step and its phase again and again.

    Args:
        peers: the processes of the job.
        now: a clock, in seconds.
    """

    def __init__(self, peers: Peers, now: Callable[[], float]) -> None:
        self.peers, self._now = peers, now
        self.last: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._count = 0

    def send(self, step: int, what: str) -> None:
        """Writes a heartbeat of this process."""
        self._count += 1
        self.peers.write("beat", json.dumps({"n": self._count, "step": step, "what": what}))

    def update(self) -> None:
        """Reads the heartbeats of all processes."""
        now = self._now()
        for rank, text in self.peers.read("beat").items():
            beat = json.loads(text)
            if (
                beat["n"] > self.last.get(rank, {"n": 0})["n"]
            ):  # an earlier one that is written again is no life
                self.last[rank], self._changed[rank] = beat, now

    def silent(self, seconds: float) -> list[int]:
        """Returns the ranks whose last heartbeat is older than that.

        Ranks that never sent one, and those that have said that they leave, are not among them.
        """
        now = self._now()
        return sorted(
            rank
            for rank, at in self._changed.items()
            if now - at > seconds and rank != self.peers.rank and self.last[rank]["what"] != "gone"
        )

    def survey(self, step: int, what: str, wait: float) -> "Survey":
        """Returns which ranks do not answer or are behind, by their heartbeats in the next `wait` seconds.

        Args:
            step: the step of this process.
            what: its phase.
            wait: seconds.
        """
        self.update()
        time.sleep(wait)
        self.update()
        silent = self.silent(0.8 * wait)
        behind = {r: self.last[r] for r in self.behind(step, what) if r not in silent}
        ended = [] if what == "ending" else [r for r, beat in self.last.items() if beat["what"] == "ending"]
        return Survey(tuple(silent), tuple(self.never_heard()), behind, tuple(sorted(ended)))

    def never_heard(self) -> list[int]:
        """Returns the ranks that never sent a heartbeat."""
        return sorted(set(range(self.peers.count)) - set(self.last) - {self.peers.rank})

    def behind(self, step: int, what: str) -> list[int]:
        """Returns the ranks that are in an earlier step, or in an earlier phase of this one."""

        def place(step: int, what: str) -> tuple[int, int]:
            return step, PHASES.index(what) if what in PHASES else len(PHASES)

        return sorted(
            rank
            for rank, beat in self.last.items()
            if rank != self.peers.rank and place(beat["step"], beat["what"]) < place(step, what)
        )


@dataclass(frozen=True)
class Survey:
    """What the other ranks do.

    Attributes:
        silent: ranks that no longer answer.
        never_heard: ranks that never sent a heartbeat.
        behind: the last heartbeats of ranks in an earlier step or phase.
        ended: ranks that have come to the end of the run.
    """

    silent: tuple[int, ...]
    never_heard: tuple[int, ...]
    behind: Mapping[int, Mapping[str, Any]]
    ended: tuple[int, ...] = ()

    @property
    def is_anyone_gone(self) -> bool:
        """Whether a rank does not answer, or never did."""
        return bool(self.silent or self.never_heard)

    def __str__(self) -> str:
        found = [f"{named(self.silent)} did not answer"] if self.silent else []
        found += [f"{named(self.never_heard)} never came"] if self.never_heard else []
        found += [f"rank {r} is behind, at step {b['step']} in {b['what']!r}" for r, b in self.behind.items()]
        found += [f"{named(self.ended)} came to the end"] if self.ended else []
        return "; ".join(found) or "no other rank is behind"


def named(ranks: Sequence[int]) -> str:
    """Returns ranks as text.

    Example:
        >>> named([1]), named([1, 3])
        ('rank 1', 'ranks 1, 3')
    """
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
