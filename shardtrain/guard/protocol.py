"""The sentences of a guard that `launch local` reads, each next to the pattern that reads it.

A launcher sees the exit status of its processes and what they write on stderr. From stderr it takes two
facts: whether training has begun, and which process failed first. This module needs neither jax nor the rest
of the guard, and it is all of the guard that the launcher imports.
"""

import re

_TRAINING_BEGINS = re.compile(r"rank \d+ step \d+: (?:start|resume): \d+ of \d+ steps are done")
_BLAMES = re.compile(r": exit: rank (\d+) (?:failed|gave up|saw no progress)")


def line(step: int, event: str, message: str) -> str:
    """Returns the log line of an event.

    Example:
        >>> line(0, "start", steps_done(0, 9))
        'step 0: start: 0 of 9 steps are done'
    """
    return f"step {step}: {event}: {message}"


def steps_done(done: int, steps: int) -> str:
    """Returns the message of the events `start` and `resume`, which say that training begins."""
    return f"{done} of {steps} steps are done"


def failed(rank: int, message: str) -> str:
    """Returns why other processes exit after `rank` has raised an exception."""
    return f"rank {rank} failed: {message}"


def gave_up(rank: int, message: str) -> str:
    """Returns why other processes exit after `rank` has stopped waiting for one that does not answer."""
    return f"rank {rank} gave up: {message}"


def no_progress(seconds: float, activity: str) -> str:
    """Returns the message of an expired watchdog."""
    return f"no progress for {seconds:.0f} s in {activity!r}"


def saw_no_progress(rank: int, message: str) -> str:
    """Returns why other processes exit after the watchdog of `rank` has expired with `no_progress(...)`."""
    return f"rank {rank} saw {message}"


def says_that_training_begins(text: str) -> bool:
    """Whether a line of stderr says that training begins.

    Every mistake in the flags is refused before this line. An exit status of 2 after it is therefore not
    about the number of processes.

    Example:
        >>> says_that_training_begins("12:00:00 rank 0 " + line(5, "resume", steps_done(5, 9)))
        True
    """
    return _TRAINING_BEGINS.search(text) is not None


def blamed_rank(text: str) -> int | None:
    """Returns the rank that a process names in its last line as the reason why it exits, if it names one.

    Example:
        >>> blamed_rank(line(7, "exit", failed(2, "the disk is full")))
        2
    """
    found = _BLAMES.search(text)
    return int(found[1]) if found else None
