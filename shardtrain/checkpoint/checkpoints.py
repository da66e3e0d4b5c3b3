"""The whole run to disk and back, by name: a checkpoint knows no mesh."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from shardtrain import compat
from shardtrain.checkpoint import manifest
from shardtrain.checkpoint.storage import Handler, Kept, Save, at_low_priority, read
from shardtrain.errors import UserError, first_line
from shardtrain.guard.processes import everyone, meet
from shardtrain.versions import versions

log = logging.getLogger(__name__)

LIMIT = 900
"""Seconds after which a save that is not complete has failed, because a process or the disk hangs."""

UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of what Orbax has not completed."""


class Checkpoints:
    """The checkpoints of a run, in folders named by their steps.

    Saving goes on in the background while steps are made, and a checkpoint gets its name when it is complete:
    a kill at any moment leaves the earlier ones. In a job of several processes all make the same calls, each
    writes and reads the arrays of its own devices, and the folder is one that all of them see.

    Args:
        folder: theirs alone.
        every: steps from one to the next; by default there is only one, at the end of `Trainer.fit`.
        keep: how many of the last ones are kept; None keeps all.
        best: a metric by which the best one is kept, too.
        mode: "max" or "min", which of that metric is better.
        manifest: more entries of each checkpoint's `manifest.json`, of JSON's types, such as a run's flags.

    Raises:
        UserError: an `every` or a `keep` below 1.

    Example:
        >>> with Checkpoints("runs/mine/checkpoints", every=100, best="accuracy") as checkpoints:
        ...     trainer.restore(checkpoints)  # where there is one
        ...     trainer.fit(batches, steps=1000, checkpoints=checkpoints)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int | None = None,
        keep: int | None = 3,
        best: str | None = None,
        mode: str = "max",
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise UserError(f"Checkpoints: {name}={value}; use 1 or more, or None")
        if mode not in ("max", "min"):
            raise UserError(f"Checkpoints: mode={mode!r}; there are 'max' and 'min'")
        self.folder = Path(folder).expanduser().absolute()
        self.every, self._best = every, best
        self._kept = Kept(keep, 1 if mode == "max" else -1, {})
        self._entries = dict(manifest or {})
        self._manager: ocp.CheckpointManager | None = None
        self._saved: int | None = None
        self._whole: dict[int, dict[str, Any]] = {}  # manifests of those that were read through

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # the first error says more
            log.error("%s", first_line(second, 500))

    def steps(self) -> list[int]:
        """Steps of the checkpoints that have got their names, whatever is in their files now.

        They are those that the first process sees: a network file system may show the others older ones.
        """
        return [int(step) for step in everyone(" ".join(map(str, self._here())))[0].split()]

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return self.every is not None and step % self.every == 0

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Begins to save a state: when this returns, its arrays may be changed, and files are being written.

        It waits for the save before, if that is still going on. Checkpoints that are newer than the one the
        run was taken up from (damaged, or of another way to go on) are moved into `aside/`.

        Args:
            step: that it is of. What was saved already is not saved again.
            state: a tree of dictionaries, lists and named tuples, with arrays on any mesh or numpy arrays.
            metrics: of this step; without them it is not among the best.
            about: more entries of the manifest.

        Returns:
            The checkpoint's folder, which is there after `wait`.

        Raises:
            UserError: a checkpoint, this one or the one before it, that could not be written.
        """
        if step == self._saved:
            return self._path(step)
        self._whole = {}
        values = {key: float(value) for key, value in (metrics or {}).items()}
        if self._best is not None and metrics is not None:
            if self._best not in values:
                raise UserError(
                    f"Checkpoints: there is no metric {self._best!r}; there are {', '.join(values)}"
                )
            self._kept.scores[step] = values[self._best]
        more = {"metrics": values, "versions": versions(), **(about or {})}
        try:
            manager = self._opened(step)
            state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), state)
            args = Save(state, entries={"step": step, **self._entries, **more})
            at_low_priority(manager.save, step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._tell(error)
            raise
        self._saved = step
        return self._path(step)

    def wait(self) -> None:
        """Waits until what was begun is complete.

        Raises:
            UserError: a checkpoint that could not be written.
        """
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except (OSError, ValueError, RuntimeError) as error:
                self._tell(error)
                raise

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        try:
            self.wait()
        finally:
            manager, self._manager, self._saved, self._whole = self._manager, None, None, {}
            if manager is not None:
                manager.close()

    def newest(self, *, own: bool = False) -> tuple[int, dict[str, Any]]:
        """The step and the manifest of the newest checkpoint whose files are as they were written.

        Every one that is damaged is named in a warning.

        Args:
            own: of those up to the one that this run saved, or was taken up from, last: later ones are of
                another way to go on.

        Raises:
            UserError: there is none, or none that is whole.
        """
        self.wait()
        self._warn_of_unfinished()
        found = self.steps()
        if own and self._saved is not None:
            found = [step for step in found if step <= self._saved]
        for step in reversed(found):
            entries, trouble = self._look(step)
            if not trouble:
                return step, entries
            then = "; going back to the one before it" if step != found[0] else ""
            log.warning("DAMAGED CHECKPOINT: %s: %s%s", self._path(step), trouble, then)
        if found:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged ({', '.join(map(str, found))}); "
                f"start without resuming, or name another folder"
            )
        raise UserError(
            f"there is no checkpoint in {self.folder}; start without resuming, or name another folder"
        )

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of one checkpoint, after its files were compared with it.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        self.wait()
        found = self.steps()
        if step not in found:
            there = ", ".join(map(str, found)) or "none"
            raise UserError(f"there is no checkpoint of step {step} in {self.folder}; there are {there}")
        entries, trouble = self._look(step)
        if trouble:
            raise UserError(f"the checkpoint {self._path(step)} is damaged ({trouble}); name another one")
        return entries

    def best(self) -> int | None:
        """The step of the best checkpoint that is there; None where `best` was not asked for."""
        self._read_scores()
        return self._kept.best()

    def restore(self, like: Any, several: tuple[int, ...] = (), step: int | None = None) -> tuple[int, Any]:
        """The newest whole checkpoint, laid out as `like`.

        Args:
            like: a state of the same names, shapes and dtypes: arrays on any mesh, shapes that say where
                arrays are to lie, or numpy arrays.
            several: what may stand before the shapes of numpy arrays in `like`: the number of replicas.
            step: that one and no other.

        Returns:
            Its step and the state.

        Raises:
            UserError: no checkpoint, none that is whole, or one of another model or optimizer.
        """
        entries: dict[str, Any]
        step, entries = self.newest() if step is None else (step, self.manifest(step))
        state = at_low_priority(read, self._path(step), like, several, entries)
        self.close()  # what comes next may go another way than the checkpoints after this one
        self._saved = step
        log.info("restored step %d from %s", step, self.folder)
        return step, state

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _look(self, step: int) -> tuple[dict[str, Any], str]:
        """A checkpoint's manifest and what is wrong with it; processes share the reading, and agree."""
        if step in self._whole:
            return self._whole[step], ""
        folder = self._path(step) / "default"
        entries: dict[str, Any] = {}
        trouble = ""
        try:
            entries = manifest.read(folder)
            if entries.get("step") != step:
                raise ValueError(f"{manifest.NAME} is of step {entries.get('step')}")
            manifest.verify(folder, entries, slice(jax.process_index(), None, jax.process_count()))
        except ValueError as error:
            trouble = str(error)
        if not (trouble := next(filter(None, everyone(trouble)), "")):
            self._whole[step] = entries
        return entries, trouble

    def _here(self) -> list[int]:
        if not os.path.isdir(self.folder):  # False, too, where the path is longer than paths can be
            return []
        try:
            return sorted(int(f.name) for f in self.folder.iterdir() if f.is_dir() and f.name.isdecimal())
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be looked into ({error.strerror}); name a folder that you may read"
            ) from error

    def _warn_of_unfinished(self) -> None:
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if UNFINISHED in folder.name:
                log.warning("%s was never finished: its run ended while it was written", folder)

    def _opened(self, step: int) -> ocp.CheckpointManager:
        """The manager, in a folder that holds nothing newer than what the run was taken up from."""
        if self._manager is None:
            since = step if self._saved is None else self._saved + 1
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for other in (s for s in self._here() if s >= since):
                    self._set_aside(other)
            meet("checkpoints are set aside")
            self._read_scores()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                # Threads that wait for folders which could not be made would hold the process for LIMIT.
                async_options=ocp.AsyncOptions(timeout_secs=LIMIT, create_directories_asynchronously=False),
            )
            self._manager = ocp.CheckpointManager(self.folder, item_handlers=Handler(), options=options)
        return self._manager

    def _set_aside(self, step: int) -> None:
        place = self.folder / "aside"
        place.mkdir(exist_ok=True)
        taken = {f.name for f in place.iterdir()}
        name = next(n for k in range(len(taken) + 1) if (n := f"{step}-{k}" if k else str(step)) not in taken)
        self._path(step).rename(place / name)
        log.warning("the checkpoint of step %d is kept in %s: this run goes another way", step, place / name)

    def _read_scores(self) -> None:
        """Adds the scores of checkpoints that an earlier process wrote."""
        if self._best is None:
            return
        for step in set(self._here()) - set(self._kept.scores):
            try:
                entries = manifest.read(self._path(step) / "default")
                self._kept.scores[step] = entries["metrics"][self._best]
            except (ValueError, KeyError):
                continue  # damaged, or saved without the metric: it is none of the best
        there = set(self._here()) | {self._saved}
        self._kept.scores = {step: score for step, score in self._kept.scores.items() if step in there}

    def _tell(self, error: Exception) -> None:
        """Raises what a disk said to a save as a sentence; another process that is gone is another thing."""
        self._saved = None
        if (reason := _of_disk(error)) is not None:
            left = ", ".join(map(str, self._here())) or "none"
            raise UserError(
                f"a checkpoint could not be written to {self.folder} ({reason}); make room there, or name "
                f"another folder; the earlier ones are as they were: {left}"
            ) from error


def _of_disk(error: Exception) -> str | None:
    """What a file system said to a save that failed; None for other failures, as of a process that is gone.

    Tensorstore raises a ValueError that names many files, then the reason, and the system's number of it.
    Orbax raises a TimeoutError, which is an OSError, where processes wait in vain for each other.
    """
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError) and compat.process_count() == 1:
        return f"it was not complete after {LIMIT} s"
    return None
