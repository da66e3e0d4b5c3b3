"""Calls without the checks of types at run time that tests have and users do not."""

import inspect


def made(kind, *args, **kwargs):
    """An object of a class whose constructor sees its arguments as a user gives them."""
    one = object.__new__(kind)
    inspect.unwrap(kind.__init__)(one, *args, **kwargs)
    return one
