"""The threads that watch over a process: they end it when it hangs, fails or is told to stop, and say why.

Watching takes threads, because the main thread may wait for a device or for another process. One thread
watches this process and never waits for another one. A second one exchanges messages with the other processes
through the coordinator, and may wait for it. Whatever else may block has a thread of its own that can be left
behind.
"""

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

from shardtrain import compat, errors, interrupts
from shardtrain.errors import FAULT, REQUEUE, UserError, first_line
from shardtrain.guard import protocol
from shardtrain.guard.events import Events
from shardtrain.guard.peers import Heartbeats, MissingError, Peers, named
from shardtrain.guard.profile import Clock, Progress
from shardtrain.guard.stop import Stop

SLOW_PHASES = ("starting", "compiling", "validating", "checkpoint", "stopping", "evaluating", "ending")
"""Phases that may take longer than a step."""

SLOW_PHASE_FACTOR = 5
"""How many times the time limit of a step a slow phase may take."""

AFTER_TRAINING = ("evaluating", "ending")
"""Phases after training. A process that is told to stop in them leaves at once."""

HEARTBEAT_SECONDS = 1.0
"""Time between two heartbeats, which tell the other processes that this one is alive."""

MOST_SILENT_SECONDS = 60.0
"""A process without heartbeats for longer counts as lost. jax waits 100 s, and then aborts the others."""

REPEATED_SIGNAL_SECONDS = 1.0
"""A second signal within this time is the first one, delivered by two senders."""

COORDINATOR_STAYS_SECONDS = 10.0
"""How long the coordinator stays for the others to read why it leaves: jax aborts them when it is gone."""

GOODBYE_SECONDS = 2.0
"""How long any process tries to say that it leaves: the coordinator may be what does not answer."""


class Watch:
    """Watches over one process, and reads the messages of the others.

    Args:
        seconds: time without progress after which the process ends; None for no limit.
        progress: which phase the main thread is in.
        events: where events are recorded.
        stop: the agreement on the last step, when the process is told to stop.
        peers: the processes of the job; None for a single process.
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
        self.heartbeats = None if peers is None else Heartbeats(peers, self.clock.now)
        self.silence = MOST_SILENT_SECONDS if seconds is None else min(seconds, MOST_SILENT_SECONDS)
        self.why = ""
        self._ended = threading.Event()
        self._leaving = threading.Lock()
        self._contact = self.clock.now()
        self._read: set[str] = set()
        self._stopping = False
        self._signalled: tuple[int, float] | None = None
        self._handlers_before: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads, and handles SIGTERM and SIGUSR1 if this is the main thread."""
        self._ended.clear()
        self.clock.tick()
        self._contact = self.clock.now()
        if self.peers is not None:  # who has to be told
            interrupts.as_exceptions()
        self._signals, self._wakeup_socket = socket.socketpair()
        self._wakeup_socket.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # Python's handlers run in the main thread, which may wait for a device. The wake-up file
            # descriptor receives the signal's number at once, and another thread reads it.
            descriptor = self._wakeup_socket.fileno()
            self._wakeup_before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._handlers_before[number] = signal.signal(number, lambda *_: None)
        self._threads = [_thread(self._watch)]
        if self.heartbeats is not None:
            self._threads.append(_thread(self._communicate, self.heartbeats))

    def end(self) -> None:
        """Ends the threads, and restores the signal handlers."""
        if self.heartbeats is not None:
            with contextlib.suppress(Exception):  # the coordinator may be gone already
                self.heartbeats.send(self.progress.step, "gone")
        self._ended.set()
        if self._handlers_before:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._handlers_before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for thread in self._threads:
            thread.join(timeout=2 * HEARTBEAT_SECONDS)
        self._signals.close()
        self._wakeup_socket.close()

    # The thread that watches this process, and never waits for another one.

    def _watch(self) -> None:
        marks, since = -1, 0.0
        while not self._ended.is_set():
            self.clock.tick()
            if select.select([self._signals], [], [], 0.1)[0]:
                for number in self._signals.recv(64):
                    self._handle_signal(number)
            if marks != self.progress.marks:
                marks, since = self.progress.marks, self.clock.now()
            phase, age = self.progress.what, self.clock.now() - since
            if self.seconds is not None and age > self.seconds * (
                SLOW_PHASE_FACTOR if phase in SLOW_PHASES else 1
            ):
                self._hang(phase, age)
            if phase in AFTER_TRAINING and self.stop.last is not None:  # agreed on, but for a later step
                self.leave(REQUEUE, f"{self.why}; the training was over")
            if self.peers is not None and self.clock.now() - self._contact > self.silence:
                self._dump()
                self.leave(FAULT, f"the coordinator, rank 0, does not answer for {self.silence:.0f} s")

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.profile()
        if number not in (signal.SIGTERM, signal.SIGINT):
            return
        if number == signal.SIGINT and interrupts.is_at_once():  # the main thread may be waiting for a device
            interrupts.leave()
        first, now = self._signalled, time.monotonic()
        if first is None:
            self._signalled = number, now
            if number == signal.SIGTERM:
                self.ask(f"{signal.Signals(number).name} on rank {compat.process_rank()}")
        elif now - first[1] > REPEATED_SIGNAL_SECONDS:
            code = REQUEUE if first[0] == signal.SIGTERM else interrupts.STATUS
            self.leave(code, "a second signal: leaving at once")

    def ask(self, why: str) -> None:
        """Asks all processes to stop after the same step; another thread agrees with them on the step."""
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
        if self.progress.what in AFTER_TRAINING:
            self.leave(REQUEUE, f"{self.why}; the training was over")
        self.events("preempted", self.progress.step, f"{self.why}; stopping after step {last}")

    def _hang(self, phase: str, age: float) -> None:
        message = protocol.no_progress(age, phase)
        self.events("watchdog", self.progress.step, f"{message}; stacks follow", level=logging.ERROR)
        self._dump()
        found: list[str] = []

        def survey(heartbeats: Heartbeats) -> None:
            found.append(str(heartbeats.survey(self.progress.step, phase, 2.5 * HEARTBEAT_SECONDS)))
            self._notice("hung", protocol.saw_no_progress(compat.process_rank(), f"{message}; {found[0]}"))

        if self.heartbeats is not None:  # in another thread: the coordinator may be what hangs
            _thread(survey, self.heartbeats).join(timeout=5 * HEARTBEAT_SECONDS)
            found = found or ["the coordinator, rank 0, does not answer"]
        self.leave(FAULT, "; ".join([message, *found]))

    def _dump(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # stderr may be no file
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)

    # The thread that exchanges messages with the other processes, and may wait for the coordinator.

    def _communicate(self, heartbeats: Heartbeats) -> None:
        while not self._ended.is_set():
            try:
                heartbeats.send(self.progress.step, self.progress.what)
                notices = heartbeats.peers.read("notice")
                if heartbeats.peers.rank == 0:
                    heartbeats.update()
                    self._lose(heartbeats.silent(self.silence))
            except Exception as error:  # the other thread counts how long there is no answer
                self.events("peers", self.progress.step, f"no answer ({first_line(error)})")
            else:
                self._contact = self.clock.now()
                for rank, text in notices.items():
                    if rank != heartbeats.peers.rank and text not in self._read:
                        self._read.add(text)
                        self._handle_notice(rank, json.loads(text))
            self._ended.wait(HEARTBEAT_SECONDS)

    def _handle_notice(self, rank: int, notice: dict[str, Any]) -> None:
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
            notice = {"kind": kind, "text": text, "code": self._final_status(code)}
            self.peers.write("notice", json.dumps(notice))

    def _final_status(self, code: int) -> int:
        """`REQUEUE` for a fault while stopping: some processes may be gone before others have saved."""
        return REQUEUE if code == FAULT and self._stopping else code

    # The ways in which the process ends.

    def give_up(self, message: str) -> NoReturn:
        """Ends this process because others do not answer or come, and tells the rest."""
        with contextlib.suppress(Exception):
            self._notice("lost", message)
        self.leave(FAULT, message)

    def fail(self, error: BaseException) -> NoReturn:
        """Prints an exception, tells the other processes, and ends this one."""
        if self.heartbeats is not None and errors.is_collective_failure(error):
            with contextlib.suppress(Exception):
                self._blame_others(self.heartbeats)
        text = " ".join(str(error).split())
        lines = [f"error: {text}\n"]
        if isinstance(error, UserError):
            code, reason = error.status, text
        elif isinstance(error, MissingError):
            code, reason = FAULT, text
        elif isinstance(error, KeyboardInterrupt):
            code, reason, lines = interrupts.STATUS, "interrupted", []
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
            reason = f"it exited with status {code}"
            lines = lines if isinstance(error.code, str) else []
        else:
            code = FAULT if errors.is_collective_failure(error) else 1
            reason, lines = f"{type(error).__name__}: {text}", traceback.format_exception(error)
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            sys.stderr.writelines(lines)
            sys.stderr.flush()
        with contextlib.suppress(Exception):
            self._notice("failed", reason[:500], code)
        self.leave(code, reason)

    def _blame_others(self, heartbeats: Heartbeats) -> None:
        """Leaves if a collective failed because another process failed or is gone, and names that process."""
        survey = heartbeats.survey(self.progress.step, self.progress.what, 2.5 * HEARTBEAT_SECONDS)
        for rank, text in heartbeats.peers.read("notice").items():
            notice = json.loads(text)
            if rank != heartbeats.peers.rank and notice["kind"] != "stop":
                self._handle_notice(rank, notice)
            self._stopping = self._stopping or notice["kind"] == "stop"
        if survey.is_anyone_gone:
            self.give_up(f"a collective failed: {survey}")

    def leave(self, code: int, why: str) -> NoReturn:
        """Ends the process now, with a last line and without jax's exit handlers, which wait for others."""
        if not self._leaving.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        step, code = self.progress.step, self._final_status(code)
        # A full pipe or the coordinator may block this thread, which is then left behind.
        stay = COORDINATOR_STAYS_SECONDS if self.peers is not None and self.peers.rank == 0 else 0
        _thread(self._say_goodbye, why, code, step).join(timeout=stay + GOODBYE_SECONDS)
        os._exit(code)

    def _say_goodbye(self, why: str, code: int, step: int) -> None:
        self._ended.set()
        self.events("exit", step, f"{why} (exit status {code})", level=logging.ERROR, code=code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if self.heartbeats is None:
            return
        with contextlib.suppress(Exception):
            heartbeats, end = self.heartbeats, time.monotonic() + COORDINATOR_STAYS_SECONDS
            peers = heartbeats.peers
            peers.write("gone", str(code))
            present = set(range(peers.count)) if peers.rank == 0 else set()
            while present and time.monotonic() < end:
                time.sleep(0.1)
                heartbeats.update()
                absent = heartbeats.silent(3 * HEARTBEAT_SECONDS), heartbeats.never_heard()
                present -= {*peers.read("gone"), *absent[0], *absent[1]}


def _thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True, name="guard")
    thread.start()
    return thread
