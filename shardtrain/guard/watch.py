"""The threads that watch over a run: nothing that hangs, fails or is to stop does so without a word."""

import contextlib
import faulthandler
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from shardtrain import compat, errors
from shardtrain.errors import FAULT, REQUEUE, UserError, first_line
from shardtrain.guard import protocol
from shardtrain.guard.events import Events
from shardtrain.guard.peers import Beats, MissingError, Peers, named
from shardtrain.guard.profile import Clock, Progress
from shardtrain.guard.stop import Stop

PATIENCE = 5
"""How many times as long as a step the start, a compilation, a save, the evaluation and the end may take."""

SLOW = ("starting", "compiling", "checkpoint", "stopping", "evaluating", "ending")

OVER = ("evaluating", "ending")
"""What comes after training: who is told to stop then leaves at once."""

PERIOD = 1.0
"""Seconds between two signs of life to the other processes."""

SILENT = 60.0
"""Seconds without one, after which a process counts as lost: jax's own 100 end in an abort."""

AGAIN = 1.0
"""Seconds within which a second signal is the first one, sent twice by two senders."""

LINGER = 10.0
"""Seconds that the coordinator stays for the others to hear why: without it jax aborts them."""

LAST_WORD = 2.0
"""Seconds that others take to say that they go: the coordinator may be what does not answer."""


class Watch:
    """Watches over one process, and hears what the others say.

    Args:
        seconds: without progress, after which the process ends; None: never.
        progress: what the main thread is at.
        events: where to say what happens.
        stop: what is asked for when the process is to end in order.
        peers: the processes of the job, None for one alone.
        profile: called on SIGUSR1.
    """

    def __init__(
        self,
        seconds: float | None,
        progress: Progress,
        events: Events,
        stop: Stop,
        peers: Peers | None,
        profile: Callable[[], None],
    ) -> None:
        self.seconds, self.progress, self.events, self.stop = seconds, progress, events, stop
        self.peers, self.profile = peers, profile
        self.clock = Clock()
        self.beats = None if peers is None else Beats(peers, self.clock.now)
        self.silence = SILENT if seconds is None else min(seconds, SILENT)
        self.why = ""
        self._ended = threading.Event()
        self._leaving = threading.Lock()
        self._contact = self.clock.now()
        self._heard: set[str] = set()
        self._stopping = False
        self._signalled: tuple[int, float] | None = None
        self._before: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads, and takes the signals where this is the main thread."""
        self._ended.clear()
        self.clock.tick()
        self._contact = self.clock.now()
        self._ear, mouth = socket.socketpair()
        self._mouth = mouth
        mouth.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # A thread hears of signals even while the main one waits for a device, where Python's own
            # handlers would wait, too.
            self._wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, lambda *_: None)
        self._threads = [_thread(self._watch)]
        if self.beats is not None:
            self._threads.append(_thread(self._listen, self.beats))

    def end(self) -> None:
        """Ends the threads, and gives the signals back."""
        if self.beats is not None:
            with contextlib.suppress(Exception):  # the coordinator may be gone already
                self.beats.tell(self.progress.step, "gone")
        self._ended.set()
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for thread in self._threads:
            thread.join(timeout=2 * PERIOD)
        self._ear.close()
        self._mouth.close()

    # The thread that watches this process, and never waits for another one.

    def _watch(self) -> None:
        marks, since = -1, 0.0
        while not self._ended.is_set():
            self.clock.tick()
            if select.select([self._ear], [], [], 0.1)[0]:
                for number in self._ear.recv(64):
                    self._signal(number)
            if marks != self.progress.marks:
                marks, since = self.progress.marks, self.clock.now()
            what, age = self.progress.what, self.clock.now() - since
            if self.seconds is not None and age > self.seconds * (PATIENCE if what in SLOW else 1):
                self._hang(what, age)
            if what in OVER and self.stop.last is not None:  # it was agreed on before, for a step too late
                self.leave(REQUEUE, f"{self.why}; the training was over")
            if self.peers is not None and self.clock.now() - self._contact > self.silence:
                self._dump()
                self.leave(FAULT, f"the coordinator, rank 0, does not answer for {self.silence:.0f} s")

    def _signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.profile()
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        first, now = self._signalled, time.monotonic()
        if first is None:
            self._signalled = number, now
            if number == signal.SIGTERM:
                self.ask(f"{signal.Signals(number).name} on rank {compat.process_rank()}")
        elif now - first[1] > AGAIN:
            code = REQUEUE if first[0] == signal.SIGTERM else 130
            self.leave(code, "a second signal: leaving at once")

    def ask(self, why: str) -> None:
        """Asks all processes to stop after the same step, which is agreed on in a thread of its own."""
        if self._stopping:
            return
        self._stopping, self.why = True, why
        _thread(self._agree)

    def _agree(self) -> None:
        limit = self.silence
        try:
            self._notice("stop", self.why)
            last = self.stop.agree(limit)
        except MissingError as error:
            self.leave(REQUEUE, f"{self.why}; {error}; the last checkpoint is the one before")
        except Exception as error:  # the coordinator is gone
            self.leave(REQUEUE, f"{self.why}; the coordinator does not answer ({first_line(error)})")
        if last is None:
            self.leave(REQUEUE, f"{self.why}; no step was done yet")
        if self.progress.what in OVER:
            self.leave(REQUEUE, f"{self.why}; the training was over")
        self.events("preempted", self.progress.step, f"{self.why}; stopping after step {last}")

    def _hang(self, what: str, age: float) -> None:
        message = protocol.no_progress(age, what)
        self.events("watchdog", self.progress.step, f"{message}; stacks follow", level=logging.ERROR)
        self._dump()
        found: list[str] = []

        def look(beats: Beats) -> None:
            found.append(str(beats.survey(self.progress.step, what, 2.5 * PERIOD)))
            self._notice("hung", protocol.saw_no_progress(compat.process_rank(), f"{message}; {found[0]}"))

        if self.beats is not None:  # in a thread of its own: the coordinator may be what hangs
            _thread(look, self.beats).join(timeout=5 * PERIOD)
            found = found or ["the coordinator, rank 0, does not answer"]
        self.leave(FAULT, "; ".join([message, *found]))

    def _dump(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # stderr may be anything
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    # The thread that speaks with the other processes, and waits for the coordinator where it must.

    def _listen(self, beats: Beats) -> None:
        while not self._ended.is_set():
            try:
                beats.tell(self.progress.step, self.progress.what)
                notices = beats.peers.told("notice")
                if beats.peers.rank == 0:
                    beats.look()
                    self._lose(beats.silent(self.silence))
            except Exception as error:  # the other thread counts how long there is no answer
                self.events("peers", self.progress.step, f"no answer ({first_line(error)})")
            else:
                self._contact = self.clock.now()
                for rank, text in notices.items():
                    if rank != beats.peers.rank and text not in self._heard:
                        self._heard.add(text)
                        self._hear(rank, json.loads(text))
            self._ended.wait(PERIOD)

    def _hear(self, rank: int, notice: dict[str, Any]) -> None:
        kind, text = notice["kind"], notice["text"]
        if kind == "stop":
            self.ask(text)
            return
        if kind == "hung":
            self._dump()
        sentence = {"failed": protocol.failed, "lost": protocol.gave_up}.get(kind)
        self.leave(notice["code"], sentence(rank, text) if sentence else text)

    def _lose(self, ranks: list[int]) -> None:
        if not ranks:
            return
        message = f"{named(ranks)} did not answer for {self.silence:.0f} s"
        self.events("watchdog", self.progress.step, f"{message}; stacks follow", level=logging.ERROR)
        self._dump()
        self.give_up(message)

    def _notice(self, kind: str, text: str, code: int = FAULT) -> None:
        if self.peers is not None:
            self.peers.tell("notice", json.dumps({"kind": kind, "text": text, "code": self._fair(code)}))

    def _fair(self, code: int) -> int:
        """A fault while stopping is not counted: some processes may be gone before others have saved."""
        return REQUEUE if code == FAULT and self._stopping else code

    # Ways out.

    def give_up(self, message: str) -> NoReturn:
        """Ends this process, and tells the others, because of those that did not answer or come."""
        with contextlib.suppress(Exception):
            self._notice("lost", message)
        self.leave(FAULT, message)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process of several after an exception, with its message first, and tells the others."""
        if self.beats is not None and errors.is_collective_failure(error):
            with contextlib.suppress(Exception):
                self._blame(self.beats)
        text = " ".join(str(error).split())
        said = [f"error: {text}\n"]
        if isinstance(error, UserError):
            code, words = error.status, text
        elif isinstance(error, MissingError):
            code, words = FAULT, text
        elif isinstance(error, KeyboardInterrupt):
            code, words, said = 130, "interrupted", []
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
            words = f"it exited with status {code}"
            said = said if isinstance(error.code, str) else []
        else:
            code = FAULT if errors.is_collective_failure(error) else 1
            words, said = f"{type(error).__name__}: {text}", traceback.format_exception(error)
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            sys.stderr.writelines(said)
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            self._notice("failed", words[:500], code)
        self.leave(code, words)

    def _blame(self, beats: Beats) -> None:
        """Leaves, where a collective failed because another process did or is gone, with who it is."""
        survey = beats.survey(self.progress.step, self.progress.what, 2.5 * PERIOD)
        for rank, said in beats.peers.told("notice").items():
            notice = json.loads(said)
            if rank != beats.peers.rank and notice["kind"] != "stop":
                self._hear(rank, notice)
            self._stopping = self._stopping or notice["kind"] == "stop"
        if survey.gone:
            self.give_up(f"a collective failed: {survey}")

    def leave(self, code: int, why: str) -> NoReturn:
        """Ends the process now, with a last line; no exit handler of jax waits for others that never come."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is on its way out
        step, code = self.progress.step, self._fair(code)
        # Whatever blocks, a full pipe or the coordinator, does so in a thread that is left behind.
        linger = LINGER if self.peers is not None and self.peers.rank == 0 else 0
        _thread(self._goodbye, why, code, step).join(timeout=linger + LAST_WORD)
        os._exit(code)

    def _goodbye(self, why: str, code: int, step: int) -> None:
        self._ended.set()
        self.events("exit", step, f"{why} (exit status {code})", level=logging.ERROR, code=code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if self.beats is None:
            return
        with contextlib.suppress(Exception):
            peers, until = self.beats.peers, time.monotonic() + LINGER
            peers.tell("gone", str(code))
            there = set(range(peers.count)) if peers.rank == 0 else set()
            while there and time.monotonic() < until:
                time.sleep(0.1)
                self.beats.look()
                there -= {*peers.told("gone"), *self.beats.silent(3 * PERIOD), *self.beats.unheard()}


def _thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True, name="guard")
    thread.start()
    return thread
