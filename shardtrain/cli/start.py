"""Starts a recipe: parses its flags, sets jax up, prepares its folder, and turns errors into one sentence."""

import fcntl
import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import jax

from shardtrain import interrupts
from shardtrain.cli.guards import hush_late_failures, log_to_stderr
from shardtrain.cli.outputs import printable
from shardtrain.cli.parsing import as_typed
from shardtrain.cli.parsing import parse as parse_flags
from shardtrain.errors import StartError, UserError, first_line
from shardtrain.files import expanded
from shardtrain.guard.processes import everyone
from shardtrain.mesh import parse

log = logging.getLogger(__name__)

Flags = TypeVar("Flags")

RUN_FILES = (
    "result.json",
    "metrics.jsonl",
    "events.jsonl",
    "curve.png",
    "predictions.png",
    "memory.png",
    "timeline.png",
    "checkpoints",
    "tensorboard",
    "profile",
)
"""Files and folders that a run writes into its folder; nothing else is ever moved."""

LOCK_FILE = ".run-lock"
"""A file in a run's folder that is locked while a run writes there."""

VISIBLE_SECONDS = 60.0
"""A file of another host that is not visible after this time is in another folder."""

MOST_DEVICES = 512
"""The largest number of simulated devices; with more a CPU only switches between them."""


def main(recipe: Callable[[Flags], None], flags: type[Flags], description: str) -> None:
    """Parses the command line into `flags` and runs `recipe`.

    A `UserError` becomes one sentence on stderr and exit status 2, or 76 if the processes of a job do not
    find each other. Ctrl-C becomes the line `interrupted` and exit status 130: until training begins at once,
    from then on by a `KeyboardInterrupt`.

    Args:
        recipe: called with the parsed flags.
        flags: a dataclass whose fields are the flags.
        description: text of `--help`.

    Example:
        >>> if __name__ == "__main__":  # doctest: +SKIP
        ...     main(train, Flags, __doc__)
    """
    with interrupts.at_once(), one_sentence():
        parsed = parse_flags(flags, description=description)
        log_to_stderr()
        logging.getLogger("absl").setLevel(
            logging.CRITICAL
        )  # Orbax logs tracebacks of errors that become one sentence here
        hush_late_failures()
        signal.signal(
            signal.SIGUSR1, signal.SIG_IGN
        )  # it asks for a trace, and may come before there are steps
        try:
            recipe(parsed)
        except UserError as error:
            raise type(error)(as_typed(str(error), parsed)) from error


@contextmanager
def one_sentence() -> Iterator[None]:
    """Exits with a sentence on stderr after a `UserError`, and with status 130 after a `KeyboardInterrupt`.

    Example:
        >>> with one_sentence():
        ...     mesh = st.make_mesh("data=8")
    """
    try:
        yield
    except UserError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        interrupts.leave()


def start_jax(devices: int | None, mesh: str, *, x64: bool, processes: int = 1) -> None:
    """Sets jax up before its first use.

    Args:
        devices: number of simulated CPU devices of each process, if there is no accelerator. By default it is
            `JAX_NUM_CPU_DEVICES`, or else the share of each process in the devices of the mesh. If an axis of
            the mesh has the size -1, it is 8 for a single process, and 1 for each of several.
        mesh: axes and sizes, as for `make_mesh`.
        x64: whether to compute in float64.
        processes: number of processes in the job.

    Raises:
        UserError: if the number of devices is below 1, if the mesh is malformed, or if the processes cannot
            share its devices evenly.
    """
    sizes = parse(mesh)
    wanted = 1
    for size in sizes.values():
        wanted *= max(1, size)
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices}: use 1 or more")
    configured = os.environ.get("JAX_NUM_CPU_DEVICES")
    if devices is not None:
        simulated = devices
    elif configured:
        simulated = int(configured)  # jax itself refuses a value that is not a number
        if simulated < 1:
            raise UserError(f"JAX_NUM_CPU_DEVICES={configured}: set this variable to 1 or more, or unset it")
    elif -1 in sizes.values():
        simulated = 8 if processes == 1 else 1
    elif wanted % processes:
        raise UserError(
            f"mesh {mesh!r} has {wanted} devices, which {processes} processes cannot share evenly; give one "
            f"axis the size -1, or --devices for each process"
        )
    else:
        simulated = wanted // processes
    if simulated > MOST_DEVICES:
        raise UserError(f"mesh {mesh!r} needs {simulated} devices; at most {MOST_DEVICES} can be simulated")
    jax.config.update("jax_num_cpu_devices", simulated)
    jax.config.update("jax_enable_x64", x64)


def refuse_no_devices() -> None:
    """Refuses a `JAX_PLATFORMS` of which there are no devices here.

    Raises:
        UserError: if jax finds no devices; quotes jax's message.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a message, if a plugin is missing
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms or not (isinstance(error, AssertionError) or "initialize backend" in str(error)):
            raise
        why = f" ({first_line(error)})" if str(error) else ""
        raise UserError(
            f"JAX_PLATFORMS={platforms}: jax finds no such devices here{why}; install what they need, "
            f"or unset this variable"
        ) from error


def check_out(folder: Path) -> Path:
    """Checks that a run can be written to a folder, without leaving anything there.

    Returns:
        The folder as an absolute path.

    Raises:
        UserError: if the folder cannot be created or written to, or if it has files that are not of a run.
    """
    folder = expanded(folder).absolute()
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        probe = nearest / f".write-test-{secrets.token_hex(8)}"  # random, because pods have equal process ids
        probe.mkdir()
        probe.rmdir()
        names = _run_of(folder)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    if odd := [
        name for name in (*names, LOCK_FILE) if (folder / name).exists() and not _is_sound(folder / name)
    ]:
        raise UserError(f"--out {folder} holds a pipe or a device, {odd[0]}; name a new or empty folder")
    if foreign := [name for name in names if name.removesuffix(".part") not in RUN_FILES]:
        raise UserError(
            f"--out {folder} holds files that are no run of ours, such as {foreign[0]}; "
            f"name a new or empty folder"
        )
    return folder


def refuse_other_folders(folder: Path, limit: float) -> None:
    """Refuses a job whose processes do not share the folder of the run.

    Process 0 writes a file there, the others look for it, and the file is deleted. All processes must call
    this at the same point of the program.

    Args:
        folder: absolute path of the run's folder.
        limit: seconds to look for the file, at most a minute: network file systems show new files late.

    Raises:
        UserError: if some processes do not see the file; names them and their hosts.
    """
    if jax.process_count() == 1:
        return
    first, me = jax.process_index() == 0, f"process {jax.process_index()} on {socket.gethostname()}"
    probe, made = folder / f".write-test-{secrets.token_hex(8)}", []
    try:
        if first:
            made = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        name, end = everyone(probe.name)[0], time.monotonic() + min(limit, VISIBLE_SECONDS)
        while not (there := (folder / name).exists()) and time.monotonic() < end:
            time.sleep(0.1)
        answers = everyone("sees it" if there else me)
    finally:
        with suppress(OSError):  # another job may have written into the folder
            if first:
                probe.unlink(missing_ok=True)
            for place in made:
                place.rmdir()
    if blind := [answer for answer in answers if answer != "sees it"]:
        raise UserError(
            f"--out {folder}: {', '.join(blind)} cannot see what process 0 writes there; give all processes "
            f"one --out, a folder of a file system that all hosts share"
        )


@contextmanager
def lock_folder(folder: Path, wait: float) -> Iterator[None]:
    """Locks a run's folder against other runs while the context lasts; creates the folder if necessary.

    The operating system releases the lock when the process ends, however it ends. On a file system without
    locks a warning is logged instead.

    Args:
        folder: the run's folder.
        wait: seconds to wait for another run that is about to end, as before a restart.

    Raises:
        StartError: if another run writes there.

    Example:
        >>> with lock_folder(tmp / "run", wait=0.0):
        ...     open_run(tmp / "run", resume=False)
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait
    with (folder / LOCK_FILE).open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.5)
                    continue
                raise StartError(
                    f"--out {folder}: another run is writing there; stop it, wait for its end, or name "
                    f"another folder"
                ) from None
            except OSError as error:
                log.warning("%s cannot be locked against other runs (%s)", folder, error.strerror)
            break
        yield


def open_run(folder: Path, *, resume: bool) -> None:
    """Creates the folder of a run; an earlier run's files move to `earlier-<time>/` unless it is resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    names = _run_of(folder)
    if names and not resume:
        stem = time.strftime("earlier-%Y%m%d-%H%M%S")
        earlier = next(
            place
            for n in itertools.count()
            if not (place := folder / f"{stem}{f'-{n}' if n else ''}").exists()
        )
        earlier.mkdir()
        for name in names:
            shutil.move(folder / name, earlier / name)
        print(f"the run that was in {folder} is kept in {earlier.name}/", file=sys.stderr)


def _is_sound(path: Path) -> bool:
    """Whether a path is a folder or a regular file: others may block whoever opens them."""
    return path.is_dir() or path.is_file()


def _run_of(folder: Path) -> list[str]:
    """Returns the names of the files in a run's folder, without earlier runs and the probes of other
    processes.

    NFS keeps a file that is deleted while it is open under a name that begins with `.nfs`.
    """
    not_of_the_run = ("earlier-", ".write-test-", ".doctor-", ".nfs", LOCK_FILE)
    return (
        [f.name for f in folder.iterdir() if not f.name.startswith(not_of_the_run)] if folder.exists() else []
    )
