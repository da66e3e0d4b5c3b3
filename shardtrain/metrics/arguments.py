"""Refuses arguments of which no metric can be made."""

import operator
from typing import Any

from shardtrain.errors import UserError


def refuse_below(least: int, name: str, value: Any) -> None:
    """Raises unless an argument is a whole number of at least `least`.

    Raises:
        UserError: names the argument.

    Example:
        >>> refuse_below(1, "k", 0)
        Traceback (most recent call last):
        shardtrain.errors.UserError: k=0; use a whole number of at least 1
    """
    try:
        good = operator.index(value) >= least
    except TypeError:
        good = False
    if not good:
        raise UserError(f"{name}={value!r}; use a whole number of at least {least}")


def refuse_average(average: Any, allowed: tuple[str, ...]) -> None:
    """Raises unless `average` is one of the allowed words, or None.

    Raises:
        UserError: says what there is.

    Example:
        >>> refuse_average("foo", ("macro", "micro"))
        Traceback (most recent call last):
        shardtrain.errors.UserError: average='foo'; there are 'macro', 'micro' and None
    """
    if average is not None and average not in allowed:
        raise UserError(f"average={average!r}; there are {', '.join(map(repr, allowed))} and None")
