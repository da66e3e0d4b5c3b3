"""Saves and restores whole runs. Arrays are stored by name and whole, so any mesh can restore them."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from shardtrain import compat
from shardtrain.checkpoint import manifest
from shardtrain.checkpoint.storage import Handler, Retention, Save, at_low_priority, read
from shardtrain.errors import UserError, first_line
from shardtrain.files import expanded
from shardtrain.guard.processes import everyone, meet
from shardtrain.versions import versions

log = logging.getLogger(__name__)

SAVE_LIMIT_SECONDS = 900
"""A save that is not complete after this time has failed, because a process or the disk hangs."""

UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the names of folders that Orbax has not completed."""


class Checkpoints:
    """The checkpoints of a run, in a folder that has one folder for each saved step.

    A checkpoint is written in the background while training continues. It gets its name only when it is
    complete, so a process that is killed at any moment leaves the earlier checkpoints as they were. Each has
    a manifest with the lengths and checksums of its files, which are compared before anything is restored.

    In a job of several processes all of them make the same calls on the same folder. Each process writes and
    reads the shards of its own devices. A checkpoint can be restored on any mesh and any number of processes.

    Args:
        folder: a folder that is used for nothing else.
        every: number of steps between two checkpoints. By default `Trainer.fit` saves once, at its end.
        keep: number of the most recent checkpoints that are kept; None keeps all.
        best: name of a metric; the checkpoint with the best value of it is kept, too.
        mode: `"max"` if larger values of that metric are better, or `"min"`.
        manifest: more entries of each checkpoint's `manifest.json`, which JSON can represent, such as the
            flags of the run.

    Raises:
        UserError: if `every` or `keep` is below 1, or if `mode` is unknown.

    Example:
        >>> model = st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0))
        >>> trainer = st.Trainer(model, optax.adam(1e-3), mesh=st.make_mesh("data=8"))
        >>> batches = st.data.train_batches(st.data.load("digits").train, 64, seed=0)
        >>> with st.Checkpoints(tmp, every=2) as checkpoints:
        ...     rows = trainer.fit(batches, steps=4, checkpoints=checkpoints, progress=False)
        >>> checkpoints.steps()
        [2, 4]
        >>> trainer.restore(checkpoints)
        4
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
        self.folder = expanded(folder).absolute()
        self.every, self._best = every, best
        self._retention = Retention(keep, 1 if mode == "max" else -1, {})
        self._entries = dict(manifest or {})
        self._manager: ocp.CheckpointManager | None = None
        self._saved: int | None = None
        self._verified: dict[int, dict[str, Any]] = {}  # manifests of checkpoints whose files were compared

    @property
    def best_metric(self) -> str | None:
        """The metric by which the best checkpoint is kept, too."""
        return self._best

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which of that metric is better."""
        return "max" if self._retention.sign > 0 else "min"

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
        except Exception as second:  # the first error is the cause
            log.error("%s", first_line(second, 500))

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in order, without reading their files.

        All processes get the steps that the first process sees: a network file system may show the others an
        older state of the folder.
        """
        return [int(step) for step in everyone(" ".join(map(str, self._here())))[0].split()]

    def due(self, step: int) -> bool:
        """Whether `every` asks for a checkpoint after this step."""
        return self.every is not None and step % self.every == 0

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Begins to save a state, and returns before its files are written.

        The arrays of the state may be changed or donated afterwards. If the save before is not complete yet,
        this waits for it. Checkpoints that are newer than the one that the run was restored from, because
        they are damaged or because the run continues from an earlier one, are moved into the folder `aside/`.

        Args:
            step: step of the state. If it was the last one saved, nothing happens.
            state: a tree of dictionaries, lists and named tuples of jax arrays, on any mesh, or numpy arrays.
            metrics: metrics of this step; without them the checkpoint cannot be the best one.
            about: more entries of the manifest.

        Returns:
            The checkpoint's folder, which is complete after `wait`.

        Raises:
            UserError: if this checkpoint or the one before it cannot be written, or if `metrics` lacks
                `best`.
        """
        if step == self._saved:
            return self._path(step)
        self._verified = {}
        values = {key: float(value) for key, value in (metrics or {}).items()}
        if self._best is not None and metrics is not None:
            if self._best not in values:
                raise UserError(
                    f"Checkpoints: there is no metric {self._best!r}; there are {', '.join(values)}"
                )
            self._retention.scores[step] = values[self._best]
        more = {"metrics": values, "versions": versions(), **(about or {})}
        try:
            manager = self._open(step)
            state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), state)
            args = Save(state, entries={"step": step, **self._entries, **more})
            at_low_priority(manager.save, step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            self._raise_disk_error(error)
            raise
        self._saved = step
        return self._path(step)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
            UserError: if it cannot be written.
        """
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except (OSError, ValueError, RuntimeError) as error:
                self._raise_disk_error(error)
                raise

    def close(self) -> None:
        """Waits for the last save, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            manager, self._manager, self._saved, self._verified = self._manager, None, None, {}
            if manager is not None:
                manager.close()

    def newest(self, *, own: bool = False) -> tuple[int, dict[str, Any]]:
        """Returns step and manifest of the newest checkpoint whose files are as they were written.

        A warning names every damaged checkpoint.

        Args:
            own: whether to leave out checkpoints later than the one that this run saved or restored last,
                which belong to another continuation.

        Raises:
            UserError: if there is no checkpoint, or if all of them are damaged.
        """
        self.wait()
        self._warn_of_unfinished()
        found = self.steps()
        if own and self._saved is not None:
            found = [step for step in found if step <= self._saved]
        for step in reversed(found):
            entries, trouble = self._verify(step)
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
        """Returns the manifest of a checkpoint, after comparing the files with it.

        Raises:
            UserError: if there is no checkpoint of this step, or if it is damaged.
        """
        self.wait()
        found = self.steps()
        if step not in found:
            there = ", ".join(map(str, found)) or "none"
            raise UserError(f"there is no checkpoint of step {step} in {self.folder}; there are {there}")
        entries, trouble = self._verify(step)
        if trouble:
            raise UserError(f"the checkpoint {self._path(step)} is damaged ({trouble}); name another one")
        return entries

    def best(self) -> int | None:
        """Returns the step of the best checkpoint in the folder; None without `best` or without scores."""
        self._read_scores()
        return self._retention.best()

    def restore(self, like: Any, several: tuple[int, ...] = (), step: int | None = None) -> tuple[int, Any]:
        """Restores the newest undamaged checkpoint, with the shardings of `like`.

        Args:
            like: a state of the same names, shapes and dtypes. Its leaves are jax arrays or
                `jax.ShapeDtypeStruct`s, whose shardings the result has, or numpy arrays.
            several: leading dimensions that numpy arrays may have in addition to their shapes in `like`: the
                number of replicas.
            step: restore the checkpoint of this step instead.

        Returns:
            The step and the state.

        Raises:
            UserError: if there is no checkpoint, if all are damaged, or if it does not fit `like`.
        """
        entries: dict[str, Any]
        step, entries = self.newest() if step is None else (step, self.manifest(step))
        state = at_low_priority(read, self._path(step), like, several, entries)
        self.close()  # the run may continue in another way than the checkpoints after this one
        self._saved = step
        log.info("restored step %d from %s", step, self.folder)
        return step, state

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _verify(self, step: int) -> tuple[dict[str, Any], str]:
        """Returns a checkpoint's manifest and what is wrong with it; processes share the reading."""
        if step in self._verified:
            return self._verified[step], ""
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
            self._verified[step] = entries
        return entries, trouble

    def _here(self) -> list[int]:
        if not os.path.isdir(self.folder):  # also False if the path is longer than paths can be
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

    def _open(self, step: int) -> ocp.CheckpointManager:
        """Returns Orbax's manager, after moving newer checkpoints out of its folder."""
        if self._manager is None:
            since = step if self._saved is None else self._saved + 1
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for other in (s for s in self._here() if s >= since):
                    self._set_aside(other)
            meet("checkpoints are set aside")
            self._read_scores()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,
                # Threads that wait for a folder which cannot be created would keep the process alive for
                # SAVE_LIMIT_SECONDS.
                async_options=ocp.AsyncOptions(
                    timeout_secs=SAVE_LIMIT_SECONDS, create_directories_asynchronously=False
                ),
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
        for step in set(self._here()) - set(self._retention.scores):
            try:
                entries = manifest.read(self._path(step) / "default")
                self._retention.scores[step] = float(entries["metrics"][self._best])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # a damaged checkpoint, or one without the metric, is never the best
        there = set(self._here()) | {self._saved}
        self._retention.scores = {
            step: score for step, score in self._retention.scores.items() if step in there
        }

    def _raise_disk_error(self, error: Exception) -> None:
        """Raises a `UserError` if a save failed because of the disk, and not because a process is gone."""
        self._saved = None
        if (reason := _disk_error(error)) is not None:
            left = ", ".join(map(str, self._here())) or "none"
            raise UserError(
                f"a checkpoint could not be written to {self.folder} ({reason}); make room there, or name "
                f"another folder; the earlier ones are as they were: {left}"
            ) from error


def _disk_error(error: Exception) -> str | None:
    """Returns the error of the file system that made a save fail; None if the cause is another one.

    Tensorstore raises a ValueError that names many files, then the reason and its error number.
    Orbax raises a TimeoutError, which is an OSError, if processes wait in vain for each other.
    """
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, TimeoutError) and compat.process_count() == 1:
        return f"it was not complete after {SAVE_LIMIT_SECONDS} s"
    return None
