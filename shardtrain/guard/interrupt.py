"""Ctrl-C tears no state, and is not lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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


class Interrupts:
    """Whether an interrupt came that nobody has seen."""

    def __init__(self) -> None:
        self.came = False

    def refuse_swallowed(self) -> None:
        """Raises the `KeyboardInterrupt` that a callback of the garbage collector has swallowed."""
        if self.came:
            raise KeyboardInterrupt


@contextmanager
def noticed() -> Iterator[Interrupts]:
    """Within it every SIGINT is noted before its handler is called."""
    interrupts = Interrupts()

    def note(*signalled: Any) -> None:
        interrupts.came = True
        if callable(before):
            before(*signalled)

    with _handling(note) as before:
        yield interrupts


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
