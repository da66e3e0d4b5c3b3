"""How Ctrl-C ends a program of the command line: always with one line on stderr and exit status 130.

Python answers SIGINT with a `KeyboardInterrupt` wherever the main thread is. That is right while a run
trains, because files are open then. Before, it has three faults: its traceback; callbacks of the garbage
collector, in which Python reports it and goes on; and the end of the interpreter, where threads that still
compile crash. Therefore a program is left at once as long as it has nothing to put away, and always without
the end of the interpreter.

While a run trains, in a program or a notebook, `uninterrupted` and `resent` see to it that an interrupt
neither tears the state of the run nor is lost.

No jax.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT
"""The exit status of a program that was interrupted."""

AGAIN_SECONDS = 0.02
"""An interrupt that a callback has swallowed comes again after this time."""

_leaving = threading.RLock()
_unflushed = ["stderr", "stdout"]


def leave() -> NoReturn:
    """Writes `interrupted` on stderr, and ends the process with status 130."""
    with _leaving:  # and never released: another thread that comes here waits for the end
        while _unflushed:  # not again at a second signal: the first may hang in a full pipe
            with suppress(Exception):  # closed, or the signal has come while it was being written
                getattr(sys, _unflushed.pop()).flush()
        with suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(STATUS)


@contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C leaves the program at once while the context lasts, or until `as_exceptions` is called.

    A handler that is not Python's own stays, and only the main thread has handlers.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    with _handling(_leave), resent():
        yield


def as_exceptions() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt` again: the program has something to put away."""
    if is_at_once() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_at_once() -> bool:
    """Whether Ctrl-C leaves the program at once."""
    return signal.getsignal(signal.SIGINT) is _leave


def without_traceback() -> None:
    """A `KeyboardInterrupt` that nothing handles is one line from here on, and no traceback."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            leave()
        before(kind, error, trace)

    sys.excepthook = hook


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    leave()


class _Again:
    """Sends an interrupt again that a callback or a `__del__` could not pass on; reports other errors."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self, swallowed: Any) -> None:
        if issubclass(swallowed.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            self.before(swallowed)


@contextmanager
def resent() -> Iterator[None]:
    """Within it an interrupt comes again that a callback of the garbage collector has swallowed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hook = sys.unraisablehook
    sys.unraisablehook = _Again(hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it SIGINT waits: its handler, which raises `KeyboardInterrupt`, is called at the end.

    Where several assignments make one state, an interrupt between two of them would leave a torn one. Only
    the main thread is interrupted, so elsewhere there is nothing to do.
    """
    received: list[Any] = []
    with _handling(lambda *signalled: received.append(signalled)) as before:
        yield
    if received and callable(before):
        before(*received[0])


@contextmanager
def _handling(handler: Callable[..., None]) -> Iterator[Any]:
    """Within it SIGINT has this handler; gives the one before. Only the main thread can set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    before: Any = signal.signal(signal.SIGINT, handler)
    try:
        yield before
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
