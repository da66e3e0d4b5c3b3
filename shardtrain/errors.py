"""The one exception that a user is meant to read, and the exit status that means: run me again."""

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that a scheduler may start again from its last checkpoint."""


class UserError(ValueError):
    """What was asked cannot be done; the message says what is possible instead.

    One sentence that names the numbers involved and what to type. Recipes print it on stderr and
    exit with status 2; a traceback would tell the user nothing more.

    Example:
        >>> raise UserError("mesh 'data=3' needs 3 devices, there are 2; data=2 would fit")
        Traceback (most recent call last):
        shardtrain.errors.UserError: mesh 'data=3' needs 3 devices, there are 2; data=2 would fit
    """
