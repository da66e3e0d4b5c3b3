"""What the processes of a job say to each other beside their collectives, through jax's key-value store."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ORDER = (
    "starting", "data", "compiling", "compute", "checkpoint", "stopping", "evaluating", "ending", "gone",
)  # fmt: skip
"""What a process is at, in the order of a run."""

POLL = 0.1
"""Seconds between two looks at what others have said."""


class MissingError(TimeoutError):
    """Processes did not come to a meeting in time.

    Attributes:
        ranks: of those.
    """

    def __init__(self, topic: str, ranks: Sequence[int], limit: float) -> None:
        super().__init__(f"{named(ranks)} did not come to {topic!r} within {limit:.0f} s")
        self.ranks = tuple(ranks)


class Peers:
    """The processes of a job.

    Every call is a message or two to the coordinator, rank 0, and blocks for as long as that does not answer:
    threads that must not hang leave it to others.

    Args:
        client: of `compat.coordination_client`.
        rank: of this process.
        count: of processes.
        scope: what keys begin with.
    """

    def __init__(self, client: Any, rank: int, count: int, scope: str) -> None:
        self.client, self.rank, self.count, self.scope = client, rank, count, scope

    def tell(self, topic: str, value: str) -> None:
        """Says something, in place of what this process said before on this topic."""
        self.client.key_value_set(f"{self.scope}/{topic}/{self.rank}", value, allow_overwrite=True)

    def told(self, topic: str) -> dict[int, str]:
        """What each rank last said on a topic, of those that said something."""
        said = self.client.key_value_dir_get(f"{self.scope}/{topic}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in said}

    def meet(self, topic: str, value: str, limit: float) -> dict[int, str]:
        """A barrier with a time limit: what every rank brought to it.

        Rank 0 waits for all and passes on what they brought, so that the messages are as many as the ranks.

        Raises:
            MissingError: some did not come within `limit` seconds.

        Example:
            >>> steps = peers.meet("saved", str(step), limit=60)  # doctest: +SKIP
        """
        self.tell(topic, value)
        if self.rank == 0:
            found = self._wait(topic, self.count, limit)
            self.tell(f"{topic}: all", json.dumps(found))
        else:  # a little longer, for what rank 0 has to say of those that are missing
            said = self._wait(f"{topic}: all", 1, limit + 10)
            if not said:
                raise MissingError(topic, [0], limit)
            found = {int(rank): text for rank, text in json.loads(said[0]).items()}
        if missing := sorted(set(range(self.count)) - set(found)):
            raise MissingError(topic, missing, limit)
        return found

    def _wait(self, topic: str, count: int, limit: float) -> dict[int, str]:
        """What `count` ranks say on a topic, or as many of them as do within the limit."""
        until = time.monotonic() + limit
        while len(said := self.told(topic)) < count and time.monotonic() < until:
            time.sleep(POLL)
        return said


class Beats:
    """Who of the other processes still answers, by a number that each says anew again and again.

    Args:
        peers: the processes of the job.
        now: a clock.
    """

    def __init__(self, peers: Peers, now: Callable[[], float]) -> None:
        self.peers, self._now = peers, now
        self.last: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._count = 0

    def tell(self, step: int, what: str) -> None:
        """Says that this process answers, and what it is at."""
        self._count += 1
        self.peers.tell("beat", json.dumps({"n": self._count, "step": step, "what": what}))

    def look(self) -> None:
        """Notes what the others have said."""
        now = self._now()
        for rank, said in self.peers.told("beat").items():
            beat = json.loads(said)
            if beat != self.last.get(rank):
                self.last[rank], self._changed[rank] = beat, now

    def silent(self, seconds: float) -> list[int]:
        """Ranks that have said nothing for so long; not those that never said anything, or said goodbye."""
        now = self._now()
        return sorted(
            rank
            for rank, at in self._changed.items()
            if now - at > seconds and rank != self.peers.rank and self.last[rank]["what"] != "gone"
        )

    def survey(self, step: int, what: str, wait: float) -> "Survey":
        """Who does not answer or is behind, by what all say within `wait` seconds."""
        self.look()
        time.sleep(wait)
        self.look()
        silent = self.silent(0.8 * wait)
        behind = {r: self.last[r] for r in self.behind(step, what) if r not in silent}
        over = [] if what == "ending" else [r for r, beat in self.last.items() if beat["what"] == "ending"]
        return Survey(tuple(silent), tuple(self.unheard()), behind, tuple(sorted(over)))

    def unheard(self) -> list[int]:
        """Ranks that never said anything."""
        return sorted(set(range(self.peers.count)) - set(self.last) - {self.peers.rank})

    def behind(self, step: int, what: str) -> list[int]:
        """Ranks that are at an earlier step, or at an earlier part of this one."""

        def place(step: int, what: str) -> tuple[int, int]:
            return step, ORDER.index(what) if what in ORDER else len(ORDER)

        return sorted(
            rank
            for rank, beat in self.last.items()
            if rank != self.peers.rank and place(beat["step"], beat["what"]) < place(step, what)
        )


@dataclass(frozen=True)
class Survey:
    """What the others were found to be at: ranks that do not answer, never came, lag, are at the end."""

    silent: tuple[int, ...]
    unheard: tuple[int, ...]
    behind: Mapping[int, Mapping[str, Any]]
    over: tuple[int, ...] = ()

    @property
    def gone(self) -> bool:
        """Whether a rank is not there at all."""
        return bool(self.silent or self.unheard)

    def __str__(self) -> str:
        found = [f"{named(self.silent)} did not answer"] if self.silent else []
        found += [f"{named(self.unheard)} never came"] if self.unheard else []
        found += [f"rank {r} is behind, at step {b['step']} in {b['what']!r}" for r, b in self.behind.items()]
        found += [f"{named(self.over)} came to the end"] if self.over else []
        return "; ".join(found) or "no other rank is behind"


def named(ranks: Sequence[int]) -> str:
    """`"rank 1"`, `"ranks 1, 3"`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
