"""Exceptions whose message is for the user, and the exit statuses that ask for a restart."""

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that was told to stop. It should be started again, however often."""

FAULT = 76
"""Exit status of a run that hung, lost a process or could not start. A limited number of restarts helps."""


def first_line(error: BaseException, most: int = 200) -> str:
    """Returns the first line of an exception's message, cut to `most` characters; its type if it has none.

    Example:
        >>> first_line(OSError("no space" + chr(10) + "at all")), first_line(ValueError())
        ('no space', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class UserError(ValueError):
    """Raised when what the user asked for is impossible; the message says what is possible instead.

    The message is one sentence that names the numbers involved and what to type. Recipes print it on stderr,
    without a traceback, and exit with `status`.

    Example:
        >>> raise UserError("mesh 'data=3' needs 3 devices, there are 2; data=2 would fit")
        Traceback (most recent call last):
        shardtrain.errors.UserError: mesh 'data=3' needs 3 devices, there are 2; data=2 would fit
    """

    status = 2
    """Exit status. It does not ask for a restart, since what is refused now is refused again."""


class StartError(UserError):
    """Raised when the processes of a job do not find each other; a restart may succeed."""

    status = FAULT


def is_collective_failure(error: BaseException) -> bool:
    """Whether an error may be due to another process that is gone, judged by its message."""
    words = ("Gloo", "NCCL", "coordination", "collective", "Connection closed", "Connection reset", "barrier")
    return not isinstance(error, UserError) and any(word in str(error) for word in words)
