"""The whole run to disk and back, by name: a checkpoint knows no mesh."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from shardtrain.errors import UserError

log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: Any) -> Path:
    """Saves `state` under `folder/step`; a crash in between leaves the earlier checkpoint as it was.

    Returns:
        The checkpoint's folder.
    """
    with _manager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        return Path(manager.directory) / str(step)


def latest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint in `folder`, None if there is none."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def restore(folder: Path, like: Any, several: tuple[int, ...] = ()) -> Any:
    """The newest checkpoint in `folder`, laid out as `like`.

    Args:
        folder: what `save` was given.
        like: a state of the same names and shapes, on any mesh or in numpy arrays.
        several: what may stand before the shapes of numpy arrays in `like`: the number of replicas.

    Raises:
        UserError: no checkpoint, or one of another model or optimizer.
    """
    step = latest(folder)
    if step is None:
        raise UserError(f"there is no checkpoint in {folder}; start without resuming, or name another folder")
    target = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
        ),
        like,
    )
    with _manager(folder) as manager:
        try:
            state = manager.restore(step, args=ocp.args.StandardRestore(target))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"the checkpoint {folder / str(step)} does not fit this model and optimizer "
                f"({str(error).splitlines()[0][:200]}); resume with the flags that it was made with"
            ) from error
    leaves = jax.tree_util.tree_leaves_with_path(like)
    for (path, x), y in zip(leaves, jax.tree.leaves(state), strict=True):
        if np.shape(y) not in (np.shape(x), (*several, *np.shape(x))):
            raise UserError(
                f"the checkpoint {folder / str(step)} does not fit this model and optimizer "
                f"({jax.tree_util.keystr(path)} is {np.shape(y)} there and {np.shape(x)} here); resume with "
                f"the flags that it was made with"
            )
    log.info("restored step %d from %s", step, folder)
    return state


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)
