"""Starting a recipe: simulated devices before jax starts, and one clear sentence when something is wrong."""

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
import tyro

from shardtrain.cli.guards import hush_late_failures, log_to_stderr
from shardtrain.errors import StartError, UserError, first_line
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
"""What a run leaves in its folder; nothing else is ever moved."""

LOCK = ".run-lock"
"""A file of a run's folder, locked while the run is in it."""

SEEN = 60.0
"""Seconds after which a file that another host has written is not going to be seen."""

MOST_DEVICES = 512
"""Simulated devices beyond which a CPU only thrashes."""


def main(recipe: Callable[[Flags], None], flags: type[Flags], description: str) -> None:
    """Parses the command line into `flags` and runs `recipe`.

    A `UserError` becomes one sentence on stderr and exit status 2 (76 where the processes of a job did not
    find each other); an interrupt exits with 130.

    Example:
        >>> if __name__ == "__main__":
        ...     main(train, Flags, __doc__)
    """
    parsed = tyro.cli(flags, description=description)
    log_to_stderr()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax: tracebacks of what we say in a sentence
    hush_late_failures()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it asks for a trace, before there are steps, too
    with one_sentence():
        recipe(parsed)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process as a command should: a `UserError` on stderr with its status, an interrupt with 130.

    Example:
        >>> with one_sentence():
        ...     make_mesh("data=3")
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def start_jax(devices: int | None, mesh: str, *, x64: bool, processes: int = 1) -> None:
    """Sets jax up before its first use.

    Args:
        devices: simulated CPU devices of each process, where there is no accelerator; by default
            `JAX_NUM_CPU_DEVICES`, or else a share of those that `mesh` names; if it leaves an axis open, 8
            for one process, 1 for each of several.
        mesh: as `make_mesh` takes it.
        x64: compute in float64.
        processes: of the job.

    Raises:
        UserError: a number of devices below 1, a mesh that cannot be read, or one whose devices the
            processes cannot share evenly.
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
        simulated = int(configured)  # jax itself has refused what is no number
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
    """Refuses to go on without devices: `JAX_PLATFORMS` may name a kind that is not here.

    Raises:
        UserError: says what jax says of it.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without words, where a plugin is missing
        platforms = os.environ.get("JAX_PLATFORMS")
        if not platforms or not (isinstance(error, AssertionError) or "initialize backend" in str(error)):
            raise
        why = f" ({first_line(error)})" if str(error) else ""
        raise UserError(
            f"JAX_PLATFORMS={platforms}: jax finds no such devices here{why}; install what they need, "
            f"or unset this variable"
        ) from error


def check_out(folder: Path) -> Path:
    """Whether a run can be written to `folder`; leaves nothing behind.

    Returns:
        The folder, absolute.

    Raises:
        UserError: a folder that cannot be made or written to, or that holds other files than runs.
    """
    folder = folder.expanduser().absolute()
    try:
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
        probe = nearest / f".write-test-{secrets.token_hex(8)}"  # pods have one number, and all look at once
        probe.mkdir()
        probe.rmdir()
        names = _run_of(folder)
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    if foreign := [name for name in names if name.removesuffix(".part") not in RUN_FILES]:
        raise UserError(
            f"--out {folder} holds files that are no run of ours, such as {foreign[0]}; "
            f"name a new or empty folder"
        )
    return folder


def refuse_other_folders(folder: Path, limit: float) -> None:
    """Refuses a job whose processes have not one folder; leaves nothing behind.

    Process 0 writes a file there, and all others look for it. To be called by all at once.

    Args:
        folder: of the run, absolute.
        limit: seconds to look for it, at most a minute: network file systems show each other's files late.

    Raises:
        UserError: some do not see it; says which, on which hosts.
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
        name, end = everyone(probe.name)[0], time.monotonic() + min(limit, SEEN)
        while not (there := (folder / name).exists()) and time.monotonic() < end:
            time.sleep(0.1)
        answers = everyone("sees it" if there else me)
    finally:
        with suppress(OSError):  # another job may have come into the folder
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
def held(folder: Path, wait: float) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made where it is not there.

    The lock is the system's and ends with its process, however that ends. Some file systems have no locks.

    Args:
        folder: of the run.
        wait: seconds to wait for a run that may be on its way out, as before a restart.

    Raises:
        StartError: another run is in it.

    Example:
        >>> with held(Path("runs/mine"), wait=0.0):  # doctest: +SKIP
        ...     open_run(Path("runs/mine"), resume=False)
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait
    with (folder / LOCK).open("a") as file:
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
    """Makes the folder of a run; an earlier run's files move to `earlier-<time>/` in it unless it goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    names = _run_of(folder)
    if names and not resume:
        stem = time.strftime("earlier-%Y%m%d-%H%M%S")
        kept = next(
            k for n in itertools.count() if not (k := folder / f"{stem}{f'-{n}' if n else ''}").exists()
        )
        kept.mkdir()
        for name in names:
            shutil.move(folder / name, kept / name)
        print(f"the run that was in {folder} is kept in {kept.name}/", file=sys.stderr)


def _run_of(folder: Path) -> list[str]:
    """Names of the files of the run in a folder, without earlier runs and what other processes try there.

    NFS keeps a file that is deleted while it is open under a name that begins with `.nfs`.
    """
    aside = ("earlier-", ".write-test-", ".doctor-", ".nfs", LOCK)
    return [f.name for f in folder.iterdir() if not f.name.startswith(aside)] if folder.exists() else []
