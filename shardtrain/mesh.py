"""Makes a `jax.sharding.Mesh` of named axes, on one host or many.

A mesh is written `"data=2,height=2,channel=2"`. The axis names are fixed, because they say what each axis
cuts: `data` the batch, `depth`, `height` and `width` the pixels, `channel` the features, `pipe` the layers.
`replica` numbers copies of the weights that may disagree.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from rich.table import Table

from shardtrain import compat
from shardtrain.errors import UserError

log = logging.getLogger(__name__)

REPLICA = "replica"
"""The mesh axis of copies of the weights; each copy has examples of its own."""

PIPE = "pipe"
"""The mesh axis of the pipeline's ranks."""

AXES = (REPLICA, PIPE, "data", "depth", "height", "width", "channel")
"""Axis names, in the order of a mesh's dimensions. Devices are taken host by host, so that the axes that
communicate in every layer (`channel` and pixels) stay within a host, and `data`, `pipe` and `replica`, which
communicate once a step or a microbatch, cross hosts."""

SPATIAL = ("depth", "height", "width")
"""The axes that cut pixels."""


def parse(spec: str) -> dict[str, int]:
    """Reads `"data=2,height=-1"` into `{"data": 2, "height": -1}`.

    Raises:
        UserError: for a part that is not `axis=number`, or a repeated axis.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, equals, number = (s.strip() for s in part.partition("="))
        if not equals or not re.fullmatch(r"-?[0-9]+", number):
            raise UserError(
                f"mesh {spec!r}: {part!r} is not axis=number; write for example 'data=4,height=2'"
            )
        if name in sizes:
            raise UserError(f"mesh {spec!r} names the axis {name!r} twice; multiply the two numbers")
        sizes[name] = int(number)
    return sizes


def _fit(sizes: dict[str, int], available: int) -> str:
    """A mesh like the requested one that fits: its largest axis is halved, or set to 1, until it does."""
    fit = {name: abs(size) if size != -1 else 1 for name, size in sizes.items()}
    while math.prod(fit.values()) > available:
        name = max(fit, key=lambda n: fit[n])
        fit[name] = fit[name] // 2 if fit[name] % 2 == 0 else 1
    rest = available // math.prod(fit.values())
    if "data" in fit and rest > 1:
        fit["data"] *= rest
    return ",".join(f"{name}={size}" for name, size in fit.items() if size > 1) or "data=1"


def make_mesh(spec: str = "", /, *, devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """A mesh of named axes over the devices of this job.

    Args:
        spec: sizes by axis, such as `"data=2,height=2,channel=2"`; one size may be -1, for all devices that
            are left.
        devices: the devices to use; all of the job by default.
        **axes: sizes as keywords, such as `make_mesh(data=2, height=-1)`.

    Returns:
        A `jax.sharding.Mesh` with the named axes only, in the order of `AXES`, all of them `Auto`. Devices
        are taken host by host, so the last axes stay within a host where they fit.

    Raises:
        UserError: unknown axes, sizes that are not positive, more devices than there are, or a size of -1 for
            a number of devices that does not divide; the message names a mesh that would fit.

    Example:
        >>> mesh = st.make_mesh("data=2,height=2,channel=2")
        >>> dict(mesh.shape)
        {'data': 2, 'height': 2, 'channel': 2}
    """
    sizes = _asked(spec, axes)
    text = _written(sizes)
    pool = sorted(devices if devices is not None else jax.devices(), key=lambda d: (d.process_index, d.id))
    sizes = _with_the_rest(text, sizes, len(pool))
    used = pool[: math.prod(sizes.values())]
    if len(used) < len(pool):
        _check_idle(text, sizes, used, pool)
    names = [name for name in AXES if name in sizes] or ["data"]
    shape = [sizes.get(name, 1) for name in names]
    _warn_across_hosts(names, shape, used)
    return compat.auto_mesh(np.array(used, dtype=object).reshape(shape), names)


def _asked(spec: Any, axes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by axis of the text and the keywords together, -1 for the axis that takes the rest.

    Raises:
        UserError: unknown axes, an axis given twice, sizes that are not positive.
    """
    if not isinstance(spec, str):
        written = _written(dict(spec)) if isinstance(spec, Mapping) else f"data={spec}"
        raise UserError(f"make_mesh({spec!r}): give axes and sizes as text, such as make_mesh({written!r})")
    sizes = parse(spec)
    if twice := [name for name in axes if name in sizes]:
        raise UserError(f"the axis {twice[0]!r} is given both in {spec!r} and as a keyword; give it once")
    sizes |= axes
    text = _written(sizes)
    for name, size in sizes.items():
        if name not in AXES:
            raise UserError(f"mesh {text!r}: there is no axis {name!r}; the axes are {', '.join(AXES)}")
        if size < 1 and size != -1:
            raise UserError(f"mesh {text!r}: {name}={size} is no size; use 1 or more, or -1 for the rest")
    return sizes


def _with_the_rest(text: str, sizes: dict[str, int], available: int) -> dict[str, int]:
    """The sizes, with the number of devices that are left in place of -1.

    Raises:
        UserError: several sizes of -1, one that does not come out even, or too few devices.
    """
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh {text!r} has {len(free)} sizes of -1; only one axis can take the rest")
    if free and (fixed > available or available % fixed):
        raise UserError(
            f"mesh {text!r}: {available} devices do not divide by {fixed}, so {free[0]}=-1 has no size; "
            f"{_fit(sizes, available)} would fit"
        )
    if fixed > available:
        raise UserError(
            f"mesh {text!r} needs {fixed} devices, there are {available}; {_fit(sizes, available)} would fit"
            f"{_simulated(fixed)}"
        )
    return sizes | dict.fromkeys(free, available // fixed)


def _simulated(devices: int) -> str:
    """How devices are simulated, on a machine that has no others and simulates none yet."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return ""
    return f"; to simulate {devices} devices on CPUs, set JAX_NUM_CPU_DEVICES={devices} before jax starts"


def _check_idle(text: str, sizes: dict[str, int], used: Sequence[Any], pool: Sequence[Any]) -> None:
    """Warns of devices that the mesh leaves out, and refuses to leave out all devices of a process."""
    idle = {d.process_index for d in pool} - {d.process_index for d in used}
    if idle:
        raise UserError(
            f"mesh {text!r} uses {len(used)} of {len(pool)} devices and leaves the processes "
            f"{sorted(idle)} without any; {_fit(sizes | {'data': -1}, len(pool))} would fit, "
            f"or start fewer processes"
        )
    log.warning("mesh %s uses %d of %d devices", text or "data=1", len(used), len(pool))


def _warn_across_hosts(names: Sequence[str], shape: Sequence[int], used: Sequence[Any]) -> None:
    grid = np.array([d.process_index for d in used]).reshape(shape)
    for position, name in enumerate(names):
        crosses = (grid != grid.take([0], axis=position)).any()
        if crosses and name in (*SPATIAL, "channel"):
            log.warning(
                "mesh axis %s=%d crosses hosts: its traffic leaves the fast links", name, shape[position]
            )


def size(mesh: Mesh | AbstractMesh, axes: str | Sequence[str]) -> int:
    """The number of shards that `axes` make together; an axis that the mesh does not have counts as 1."""
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape.get(name, 1) for name in names)


def without(mesh: Mesh, axis: str) -> Mesh:
    """The first slice of a mesh along `axis`, such as the devices of the first pipeline rank."""
    if axis not in mesh.axis_names:
        return mesh
    position = mesh.axis_names.index(axis)
    names = [name for name in mesh.axis_names if name != axis]
    devices = mesh.devices.take([0], position)
    return compat.auto_mesh(devices.reshape([mesh.shape[name] for name in names] or [1]), names or ["data"])


def text(mesh: Mesh) -> str:
    """The mesh as a user writes it: `"data=2,height=2"`."""
    return _written(mesh.shape)


def _written(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def describe(mesh: Mesh) -> Table:
    """A table of the mesh's devices with their hosts (process numbers) and coordinates.

    Returns:
        A table for `rich.print`.

    Example:
        >>> table = st.describe(st.make_mesh("data=2,height=4"))
        >>> table.row_count, [column.header for column in table.columns]
        (8, ['device', 'host', 'data', 'height'])
    """
    table = Table(title=f"mesh {text(mesh)}")
    for column in ("device", "host", *mesh.axis_names):
        table.add_column(column, justify="right")
    for place in np.ndindex(mesh.devices.shape):
        device: Any = mesh.devices[place]
        table.add_row(f"{device.platform}:{device.id}", str(device.process_index), *map(str, place))
    return table
