"""Exports a model's variables to one `.npz` file and imports them: to share weights, not to resume a run.

The file is a zip of plain arrays by name, which programs in any language can read. It holds no code and is
read with `allow_pickle=False`. Floats that numpy does not have, such as bfloat16, are stored as their bytes.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.files import expanded, regular
from shardtrain.nn.variables import fill, flatten


def export_state(path: str | Path, model: nnx.Module) -> Path:
    """Writes a model's variables (parameters, running statistics, random streams) to an `.npz` file.

    The file is replaced only when the new one is complete. In a job of several processes the first process
    writes the file. It must be able to read every array as a whole, which is true of `Trainer.model` on one
    host.

    Args:
        path: path of the file; `.npz` is added if it has another ending.
        model: any NNX model. An array is stored under the path of its variable, such as
            `"blocks.0.conv1.kernel"`.

    Returns:
        The path of the file.

    Raises:
        UserError: if the file cannot be written.

    Example:
        >>> model = st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0))
        >>> path = st.export_state(tmp / "lenet.npz", model)
        >>> len(np.load(path).files) == len(jax.tree.leaves(nnx.state(model)))
        True
    """
    path = expanded(path)
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
    """Reads a file of `export_state` into a model that has the same variables, in place.

    Args:
        path: path of the file.
        model: the model to change. The new arrays have the shardings of its arrays. A model of shapes, from
            `nnx.eval_shape`, gets arrays on jax's default device.

    Raises:
        UserError: if there is no such file, if it is damaged or contains pickles, or if its variables have
            other names, shapes or dtypes than the model's; names the first difference.

    Example:
        >>> model = st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(0))
        >>> path = st.export_state(tmp / "lenet.npz", model)
        >>> other = nnx.eval_shape(lambda: st.models.LeNet(10, (8, 8, 1), rngs=nnx.Rngs(1)))
        >>> st.import_state(path, other)
    """
    path = expanded(path)
    state = nnx.state(model)
    variables = flatten(state)
    try:
        # np.load would accept a single array, too, because it goes by content.
        with regular(path) as file, zipfile.ZipFile(file) as archive:
            headers = {name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()}
            _refuse_other_model(path, variables, headers)  # before arrays of whatever size are read
            found = {key: _read(archive, f"{key}.npy") for key in headers}
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read ({reason}); give a file that export_state wrote") from error
    for key, ours in variables.items():
        if found[key].dtype != ours.dtype:
            found[key] = found[key].view(ours.dtype)
    shardings = {
        key: ours.sharding if isinstance(ours, jax.Array) else None for key, ours in variables.items()
    }
    nnx.update(model, fill(state, jax.device_put(found, shardings)))


def _refuse_other_model(path: Path, variables: Mapping[str, Any], headers: Mapping[str, Any]) -> None:
    """Refuses a file whose variables have other names, shapes or dtypes than the model's."""
    for key in sorted(variables.keys() | headers.keys()):
        if key not in headers or key not in variables:
            where = "is not in the file" if key not in headers else "is only in the file"
            raise UserError(f"{path} is of another model: {key} {where}")
        ours, (shape, dtype) = variables[key], headers[key]
        if dtype.kind == "V" and dtype.itemsize == ours.dtype.itemsize:
            dtype = ours.dtype
        if (shape, dtype) != (ours.shape, ours.dtype):
            raise UserError(
                f"{path} is of another model: {key} is {shape} of {dtype} there and "
                f"{ours.shape} of {ours.dtype} here"
            )


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of an array in an archive, without reading it."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    return shape, dtype


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
