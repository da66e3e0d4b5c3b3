"""The exceptions that a user is meant to read, and the exit statuses that mean: run me again."""

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that was told to stop: to be run again, as often as that happens."""

FAULT = 76
"""Exit status of a run that hung, lost a process or could not start: to be run again, so many times."""


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an exception's message, of `most` characters at most; its type where it has none.

    Example:
        >>> first_line(OSError("no space" + chr(10) + "at all")), first_line(ValueError())
        ('no space', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class UserError(ValueError):
    """What was asked cannot be done; the message says what is possible instead.

    One sentence that names the numbers involved and what to type. Recipes print it on stderr and
    exit with `status`; a traceback would tell the user nothing more.

    Example:
        >>> raise UserError("mesh 'data=3' needs 3 devices, there are 2; data=2 would fit")
        Traceback (most recent call last):
        shardtrain.errors.UserError: mesh 'data=3' needs 3 devices, there are 2; data=2 would fit
    """

    status = 2
    """To exit with: what is refused now is refused again."""


class StartError(UserError):
    """The processes of a job did not find each other, for a reason that may be gone the next time."""

    status = FAULT


def is_collective_failure(error: BaseException) -> bool:
    """Whether an error may only say that another process is gone: runtimes have no type for it."""
    words = ("Gloo", "NCCL", "coordination", "collective", "Connection closed", "Connection reset", "barrier")
    return not isinstance(error, UserError) and any(word in str(error) for word in words)
