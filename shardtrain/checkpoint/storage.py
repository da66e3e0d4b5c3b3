"""The format of a checkpoint: arrays as Orbax writes them, and a manifest next to them."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from shardtrain.checkpoint import manifest
from shardtrain.errors import UserError, first_line
from shardtrain.versions import newer, versions

P = ParamSpec("P")
T = TypeVar("T")

LEAST_PART_BYTES = 1 << 20
"""Replicas share the writing of an array in parts no smaller than this, because each part costs time."""


def at_low_priority(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function in a thread of the lowest priority, which its own threads (tensorstore's) inherit.

    Example:
        >>> at_low_priority(max, 1, 2)
        2
    """
    with ThreadPoolExecutor(1, "low priority", _lower_priority) as thread:
        return thread.submit(call, *args, **kwargs).result()


def _lower_priority() -> None:
    """Lets this thread run only on cores that no other thread of the job uses.

    This does not starve a save: the next save and the end of the run wait for it, which frees their cores.
    """
    if sys.platform == "linux":  # elsewhere this would change the whole process
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Handler(ocp.PyTreeCheckpointHandler):
    """Writes arrays uncompressed, since the bits of floats do not compress, and adds a manifest."""

    def __init__(self) -> None:
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_PART_BYTES)
        kinds = (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
        registry = ocp.type_handlers.create_type_handler_registry(*kinds)
        super().__init__(use_compression=False, type_handler_registry=registry)
        self._entries: Mapping[str, Any] = {}

    async def async_save(self, directory: Any, args: "Save") -> Any:  # type: ignore[override]
        self._entries = args.entries
        return await super().async_save(directory, args=args)

    def finalize(self, directory: Any) -> None:
        """Called by Orbax when all arrays are written, before the checkpoint gets its name."""
        super().finalize(directory)
        manifest.seal(Path(directory), self._entries)


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.PyTreeSave):
    """Orbax's arguments of a save, and the entries of the manifest."""

    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.PyTreeRestore):
    """Orbax's arguments of a restore."""


@dataclasses.dataclass
class Retention(PreservationPolicy):
    """Keeps the last checkpoints and the best one; Orbax deletes the others.

    Attributes:
        last: number of the last checkpoints that are kept; None keeps all.
        sign: 1 if a higher score is better, -1 if a lower one is.
        scores: the score of each checkpoint that has one, by step.
    """

    last: int | None
    sign: int
    scores: dict[int, float]

    def best(self) -> int | None:
        """Returns the step with the best score, the latest of equal ones; NaN does not count."""
        known = {step: self.sign * score for step, score in self.scores.items() if score == score}
        return max(known, key=lambda step: (known[step], step)) if known else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of the checkpoints is kept."""
        steps = sorted(info.step for info in checkpoints)
        present = dataclasses.replace(self, scores={s: v for s, v in self.scores.items() if s in steps})
        preserved = {*(steps if self.last is None else steps[-self.last :]), present.best()}
        return [info.step in preserved for info in checkpoints]


@dataclasses.dataclass(frozen=True)
class Copies:
    """Stands in a state to be read for copies of an array, of which there may be another number on disk.

    The array is read as numpy, with its copies in the first dimension.

    Attributes:
        shape, dtype: of one copy.
    """

    shape: tuple[int, ...]
    dtype: Any

    def on_disk(self, found: Any) -> np.ndarray:
        """Zeros of the shape that is there, or with one copy where that is none of copies."""
        fits = found is not None and found.shape[1:] == self.shape and len(found.shape) > len(self.shape)
        return np.zeros(found.shape if fits else (1, *self.shape), self.dtype)


def read(folder: Path, like: Any, several: tuple[int, ...], entries: Mapping[str, Any]) -> Any:
    """Returns the state in a checkpoint, with the shardings of `like`.

    Names, shapes and dtypes are compared with `like` first, because Orbax would truncate, pad and convert
    arrays.

    Args:
        folder: the checkpoint's folder.
        like, several: as for `Checkpoints.restore`.
        entries: the checkpoint's manifest.

    Raises:
        UserError: if the checkpoint does not fit `like`, or cannot be read.
    """

    def wanted(x: Any) -> Any:
        placed = isinstance(x, jax.Array | jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if placed else np.asarray(x)

    handler = Handler()
    with _explained(folder, entries):
        stored = ocp.tree.to_flat_dict(handler.metadata(folder / "default").tree)
    like = jax.tree_util.tree_map_with_path(
        lambda path, x: x.on_disk(stored.get(_keys(path))) if isinstance(x, Copies) else x, like
    )
    target = jax.tree.map(wanted, like)
    if differences := _differences(stored, ocp.tree.to_flat_dict(target), several):
        writer = newer(entries.get("versions", {}))
        raise UserError(
            f"the checkpoint {folder} does not fit this model and optimizer ({min(differences)}"
            f"{f'; {writer}' if writer else ''}); resume with the flags that it was made with"
            f"{', and with these versions' if writer else ''}"
        )
    with _explained(folder, entries):
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return handler.restore(folder / "default", args=Restore(target, restore_args=restore_args))


@contextlib.contextmanager
def _explained(folder: Path, entries: Mapping[str, Any]) -> Iterator[None]:
    """Raises a `UserError` that says who wrote a checkpoint if it cannot be read in this context."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        made = entries.get("versions", {}).get("orbax-checkpoint")
        by = f"it was written by orbax-checkpoint {made}, this is {versions()['orbax-checkpoint']}"
        raise UserError(
            f"the checkpoint {folder} is whole but cannot be read ({first_line(error)}); "
            f"{newer(entries.get('versions', {})) or by}"
        ) from error


def _keys(path: Sequence[Any]) -> tuple[str, ...]:
    """The path of a leaf as Orbax writes it."""
    return tuple(jax.tree_util.keystr((part,), simple=True) for part in path)


def _differences(stored: Mapping[Any, Any], wanted: Mapping[Any, Any], several: tuple[int, ...]) -> list[str]:
    """Returns a clause for each array in which a checkpoint differs from the state that is wanted."""
    found = [f"{_name(key)} is not in it" for key in wanted.keys() - stored.keys()]
    found += [f"{_name(key)} is only in it" for key in stored.keys() - wanted.keys()]
    for key in wanted.keys() & stored.keys():
        ours, theirs = wanted[key], stored[key]
        shapes = [ours.shape]
        if not isinstance(ours, jax.ShapeDtypeStruct):
            shapes.append((*several, *ours.shape))
        if theirs.shape not in shapes:
            found.append(f"{_name(key)} is {theirs.shape} there and {ours.shape} here")
        elif theirs.dtype != ours.dtype:
            found.append(f"{_name(key)} is of {theirs.dtype} there and of {ours.dtype} here")
    return found


def _name(key: Sequence[Any]) -> str:
    return ".".join(map(str, key))
