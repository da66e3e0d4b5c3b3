"""How a run's state lies in a checkpoint: arrays as Orbax writes them, and a manifest beside them."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from shardtrain.checkpoint import manifest
from shardtrain.errors import UserError, first_line
from shardtrain.versions import versions

P = ParamSpec("P")
T = TypeVar("T")

LEAST = 1 << 20
"""Bytes: replicas share the writing of an array in parts no smaller, for to cut each costs time."""


def at_low_priority(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls in a thread of the lowest priority; threads that it starts (Orbax's, tensorstore's) inherit it.

    Example:
        >>> at_low_priority(max, 1, 2)
        2
    """
    with ThreadPoolExecutor(1, "aside", _step_back) as thread:
        return thread.submit(call, *args, **kwargs).result()


def _step_back() -> None:
    """Lets this thread run only on cores that no other thread of the job wants.

    A save is not starved by it: the next save, and the end of the run, wait for it, and leave it the cores.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with contextlib.suppress(OSError):  # a sandbox that allows it to none
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Handler(ocp.PyTreeCheckpointHandler):
    """Writes arrays as they are (random bits of floats do not compress) and seals them with a manifest."""

    def __init__(self) -> None:
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST)
        kinds = (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
        registry = ocp.type_handlers.create_type_handler_registry(*kinds)
        super().__init__(use_compression=False, type_handler_registry=registry)
        self._entries: Mapping[str, Any] = {}

    async def async_save(self, directory: Any, args: "Save") -> Any:  # type: ignore[override]
        self._entries = args.entries
        return await super().async_save(directory, args=args)

    def finalize(self, directory: Any) -> None:
        """Called when all arrays are written, before the checkpoint gets its name."""
        super().finalize(directory)
        manifest.seal(Path(directory), self._entries)


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.PyTreeSave):
    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.PyTreeRestore):
    pass


@dataclasses.dataclass
class Kept(PreservationPolicy):
    """The last ones, and the best one.

    Attributes:
        last: how many, all where it is None.
        sign: 1 where more is better, -1 where less is.
        scores: by step.
    """

    last: int | None
    sign: int
    scores: dict[int, float]

    def best(self) -> int | None:
        """The step with the best score, of equals the latest; a NaN is none."""
        known = {step: self.sign * score for step, score in self.scores.items() if score == score}
        return max(known, key=lambda step: (known[step], step)) if known else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints stay."""
        steps = sorted(info.step for info in checkpoints)
        here = dataclasses.replace(self, scores={s: v for s, v in self.scores.items() if s in steps})
        kept = {*(steps if self.last is None else steps[-self.last :]), here.best()}
        return [info.step in kept for info in checkpoints]


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
    """The state in a checkpoint; it is compared with `like` first, for Orbax would cut and fill up arrays."""

    def wanted(x: Any) -> Any:
        placed = isinstance(x, jax.Array | jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if placed else np.asarray(x)

    handler = Handler()
    there = ocp.tree.to_flat_dict(handler.metadata(folder / "default").tree)
    like = jax.tree_util.tree_map_with_path(
        lambda path, x: x.on_disk(there.get(_keys(path))) if isinstance(x, Copies) else x, like
    )
    target = jax.tree.map(wanted, like)
    here = ocp.tree.to_flat_dict(target)
    trouble = [f"{_name(key)} is not in it" for key in here.keys() - there.keys()]
    trouble += [f"{_name(key)} is only in it" for key in there.keys() - here.keys()]
    for key in here.keys() & there.keys():
        ours, theirs = here[key], there[key]
        shapes = (
            [ours.shape] if isinstance(ours, jax.ShapeDtypeStruct) else [ours.shape, (*several, *ours.shape)]
        )
        if theirs.shape not in shapes:
            trouble.append(f"{_name(key)} is {theirs.shape} there and {ours.shape} here")
        elif theirs.dtype != ours.dtype:
            trouble.append(f"{_name(key)} is of {theirs.dtype} there and of {ours.dtype} here")
    if trouble:
        raise UserError(
            f"the checkpoint {folder} does not fit this model and optimizer ({min(trouble)}); resume with "
            f"the flags that it was made with"
        )
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return handler.restore(folder / "default", args=Restore(target, restore_args=restore_args))
    except (ValueError, KeyError, TypeError, OSError) as error:
        made = entries.get("versions", {}).get("orbax-checkpoint")
        raise UserError(
            f"the checkpoint {folder} is whole but cannot be read ({first_line(error)}); it "
            f"was written by orbax-checkpoint {made}, this is {versions()['orbax-checkpoint']}"
        ) from error


def _keys(path: Sequence[Any]) -> tuple[str, ...]:
    """The path of a leaf as Orbax writes it."""
    return tuple(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path
    )


def _name(key: Sequence[Any]) -> str:
    return ".".join(map(str, key))
