"""A model's variables in one file that numpy reads, and back: to hand weights on, not to resume a run.

The file is an `.npz`: a zip of plain arrays by name, which any language reads and which holds no code (it is
read with `allow_pickle=False`). Floats that numpy does not know, such as bfloat16, are stored as their bytes.
"""

import os
import zipfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.nn.variables import fill, flatten


def export_state(path: str | Path, model: nnx.Module) -> Path:
    """Writes a model's variables (parameters, running statistics, random streams) to an `.npz` file.

    The file is there whole or, after a crash, as it was before. In a job of several processes the first one
    writes, and every array must be one that it can read whole, as those of `Trainer.model` on one host are.

    Args:
        path: of the file; `.npz` is added where it has another ending.
        model: the variables' paths are the names of the arrays: `"blocks.0.conv1.kernel"`.

    Returns:
        The file's path.

    Raises:
        UserError: a path that cannot be written.

    Example:
        >>> export_state("resnet.npz", trainer.model)  # doctest: +SKIP
        >>> numpy.load("resnet.npz")["head.kernel"].shape  # doctest: +SKIP
        (512, 10)
    """
    path = Path(path).expanduser()
    path = path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz")
    values = {key: np.asarray(value) for key, value in flatten(nnx.state(model)).items()}
    if jax.process_index():
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            for key, value in values.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error
    return path


def import_state(path: str | Path, model: nnx.Module) -> None:
    """Reads a file that `export_state` wrote into a model of the same variables, in place.

    Args:
        path: of the file.
        model: its arrays say where the new ones are to lie; one of shapes, from `nnx.eval_shape`, gets arrays
            on jax's default device.

    Raises:
        UserError: no such file, one that is damaged or holds pickles, or variables of other names, shapes or
            dtypes; names the first of them.

    Example:
        >>> model = models.ResNet(18, classes=10, channels=3, rngs=nnx.Rngs(0))
        >>> import_state("resnet.npz", model)  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    state = nnx.state(model)
    variables = flatten(state)
    try:
        # Not np.load, which goes by content: it would take a single array, too.
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy"): _read(archive, name) for name in archive.namelist()}
    except Exception as error:  # a damaged file can raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read ({reason}); give a file that export_state wrote") from error
    for key in sorted(variables.keys() | found.keys()):
        if key not in found or key not in variables:
            where = "is not in the file" if key not in found else "is only in the file"
            raise UserError(f"{path} is of another model: {key} {where}")
        ours, theirs = variables[key], found[key]
        if theirs.dtype.kind == "V" and theirs.dtype.itemsize == ours.dtype.itemsize:
            found[key] = theirs = theirs.view(ours.dtype)
        if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
            raise UserError(
                f"{path} is of another model: {key} is {theirs.shape} of {theirs.dtype} there and "
                f"{ours.shape} of {ours.dtype} here"
            )
    lie = {key: ours.sharding if isinstance(ours, jax.Array) else None for key, ours in variables.items()}
    nnx.update(model, fill(state, jax.device_put(found, lie)))


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
