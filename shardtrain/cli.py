"""Running a recipe: simulated devices before jax starts, and one clear sentence when something is wrong."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from shardtrain.errors import UserError
from shardtrain.mesh import parse

Flags = TypeVar("Flags")


def main(recipe: Callable[[Flags], None], flags: type[Flags], description: str) -> None:
    """Parses the command line into `flags` and runs `recipe`.

    A `UserError` becomes one sentence on stderr and exit status 2; an interrupt exits with 130.

    Example:
        >>> if __name__ == "__main__":
        ...     main(train, Flags, __doc__)
    """
    parsed = tyro.cli(flags, description=description)
    try:
        recipe(parsed)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def start_jax(devices: int | None, mesh: str, *, x64: bool) -> None:
    """Sets jax up before its first use.

    Args:
        devices: simulated CPU devices, where there is no accelerator; by default as many as `mesh` names,
            8 if it leaves an axis open.
        mesh: as `make_mesh` takes it.
        x64: compute in float64.

    Raises:
        UserError: a number of devices below 1, or a mesh that cannot be read.
    """
    sizes = parse(mesh)
    wanted = 1
    for size in sizes.values():
        wanted *= max(1, size)
    if devices is not None and devices < 1:
        raise UserError(f"--devices {devices}: use 1 or more")
    jax.config.update("jax_num_cpu_devices", devices or (8 if -1 in sizes.values() else wanted))
    jax.config.update("jax_enable_x64", x64)


def open_run(folder: Path, *, resume: bool) -> Path:
    """Makes the folder of a run; an earlier run's files move to `earlier-<time>/` in it unless it goes on.

    Raises:
        UserError: a folder that cannot be made or written to.
    """
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    files = [f for f in folder.iterdir() if not f.name.startswith("earlier-")]
    if files and not resume:
        if not any(f.name in ("result.json", "metrics.jsonl", "checkpoints") for f in files):
            raise UserError(f"--out {folder} holds files that are no run of ours; name a new or empty folder")
        kept = folder / time.strftime("earlier-%Y%m%d-%H%M%S")
        kept.mkdir()
        for file in files:
            shutil.move(file, kept / file.name)
        print(f"the run that was in {folder} is kept in {kept.name}/", file=sys.stderr)
    return folder
