"""Assigns layouts to the layers of a model, checks them against a mesh, and shows them in a table."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.table import Table

from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Axes, Layout, axes_of, resolve
from shardtrain.mesh import SPATIAL, size
from shardtrain.nn import conv, linear, norm, pool
from shardtrain.nn.base import Partitioned, byte_count, name
from shardtrain.nn.contraction import Contraction

log = logging.getLogger(__name__)

LayoutTable = Mapping[str, Layout | Mapping[str, str | Axes]]
"""Patterns on layer paths -> a layout, or the fields that differ from the default one."""

_NAMESAKES: dict[type, type] = {
    nnx.Conv: conv.Conv,
    nnx.ConvTranspose: conv.ConvTranspose,
    nnx.Linear: linear.Linear,
    nnx.Embed: linear.Embed,
    nnx.BatchNorm: norm.BatchNorm,
    nnx.GroupNorm: norm.GroupNorm,
    nnx.InstanceNorm: norm.InstanceNorm,
    nnx.LayerNorm: norm.LayerNorm,
    nnx.Dropout: pool.Dropout,
}

WHOLE_BYTES = 2**20
"""A parameter of a module of the user's own may be whole on every device up to this size."""

WHOLE_SHARE = 100
"""It may also be as large as the model's parameters together, divided by this."""

_CUT_BY_CHANNEL = (nnx.LinearGeneral, nnx.Einsum)
"""Plain layers that XLA gets right, and that have a namesake here which does not stay whole or says so."""


def leaves(model: nnx.Module) -> dict[str, nnx.Module]:
    """The layers of a model by path (`"stages.0.conv1"`): partitioned ones, and others with variables."""
    found = {}
    for path, module in nnx.iter_modules(model):
        own = any(isinstance(value, nnx.Variable) for value in vars(module).values())
        if isinstance(module, Partitioned | nnx.Dropout) or own:
            found[name(path)] = module
    return found


def assign(model: nnx.Module, mesh: AnyMesh, default: Layout, table: LayoutTable) -> Layout:
    """Sets the layout of every layer of a model, and refuses layouts that do not fit the mesh.

    The trainer does this by itself; it is for training loops of your own.

    Args:
        model: any NNX model; its layers' `layout` and `path` are set.
        mesh: the mesh that the model will run on.
        default: the layout of layers that no pattern matches.
        table: patterns on layer paths -> layouts or the fields that differ, see `shardtrain.layout.resolve`;
            the pattern `""` is the model's input.

    Returns:
        The layout of the model's input.

    Raises:
        UserError: a pattern that matches nothing; a dimension that cannot be cut as asked; a plain `nnx`
            layer that XLA would compute wrongly or replicate on this mesh; a mesh axis that cuts nothing.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> conv, head = st.nn.Conv(3, 8, (3, 3), rngs=rngs), st.nn.Linear(8, 10, rngs=rngs)
        >>> model = nnx.Sequential(conv, st.nn.GlobalAvgPool(), head)
        >>> mesh = st.make_mesh("data=2,height=2,channel=2")
        >>> layout = st.nn.assign(model, mesh, st.Layout(), {"layers.2": {"channels": ()}})
        >>> model.layers[2].layout.channels, layout == st.Layout()
        ((), True)
    """
    found = leaves(model)
    layouts = resolve(default, table, ["", *found])
    limit = max(
        WHOLE_BYTES, sum(map(byte_count, jax.tree.leaves(nnx.state(model, nnx.Param)))) // WHOLE_SHARE
    )
    for path, module in found.items():
        if isinstance(module, Partitioned):
            module.layout, module.path = layouts[path], path
            _check_asked(path, module, default, mesh)
        elif layouts[path] != default:
            raise UserError(
                f"layout: {path!r} is a plain {type(module).__name__}, which has no layout; "
                f"use the layer of the same name from shardtrain.nn"
            )
        else:
            _check_plain(path, module, mesh, limit)
    _check_axes_used(found, layouts, mesh)
    _log_undivided(found, mesh)
    _log_whole(found, mesh)
    _check_parameters_spread(model, default, mesh)
    return dataclasses.replace(layouts[""], parameters=default.parameters)


def _log_undivided(found: Mapping[str, nnx.Module], mesh: AnyMesh) -> None:
    """Logs dimensions that layouts ask to cut and that do not divide, once for all layers alike."""
    layers: dict[str, list[str]] = {}
    for path, module in found.items():
        if isinstance(module, Partitioned):
            for sentence in module.undivided(mesh):
                layers.setdefault(sentence, []).append(path)
    for sentence, paths in layers.items():
        log.warning("%s", sentence.format(layers=", ".join(paths)))


def _check_parameters_spread(model: nnx.Module, default: Layout, mesh: AnyMesh) -> None:
    """Logs parameters that the `parameters` axes cannot cut, and refuses axes that can cut none of them."""
    axes = default.cut("parameters", mesh)
    if not axes:
        return
    specs = parameter_spec(model, mesh, default)
    params = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    whole = [name(p) for p in params if not any(set(axes) & set(axes_of(e)) for e in specs[p])]
    if len(whole) == len(params):
        raise UserError(
            f"parameters={'*'.join(sorted(axes))}: no parameter has a dimension that divides by "
            f"{size(mesh, axes)}, so nothing would be spread; leave it out or use another size"
        )
    if whole:
        log.warning("not spread, since no dimension divides by %d: %s", size(mesh, axes), ", ".join(whole))


def _check_asked(path: str, module: Partitioned, default: Layout, mesh: AnyMesh) -> None:
    """Refuses channels that do not divide where a table asks for the cut; the default cuts those that do."""
    asked = module.layout.cut("channels", mesh)
    if module.layout.channels != default.channels and asked:
        for features in module.channels():
            if features % size(mesh, asked):
                raise UserError(
                    f"layout: {path!r} has {features} channels, which do not divide by {'*'.join(asked)}="
                    f"{size(mesh, asked)}; use channels=() for this layer or another number of features"
                )


def _check_plain(path: str, module: nnx.Module, mesh: AnyMesh, limit: int) -> None:
    """Refuses `nnx` layers that XLA would compute wrongly or replicate on this mesh, and large parameters."""
    cut = [axis for axis in (*SPATIAL, "channel") if size(mesh, axis) > 1]
    for plain, ours in _NAMESAKES.items():
        if cut and isinstance(module, plain):
            name = f"nnx.{plain.__name__}"
            raise UserError(
                f"layer {path!r} is a plain {name}, which XLA gets wrong or keeps whole on a mesh with "
                f"{cut[0]}={size(mesh, cut[0])}; use shardtrain.nn.{ours.__name__} with the same arguments"
            )
    if size(mesh, "channel") > 1:
        _refuse_whole(path, module, f"channel={size(mesh, 'channel')}", limit)


def _refuse_whole(path: str, module: nnx.Module, cut: str, limit: int) -> None:
    """Refuses what each device would keep whole: layers of nnx, and parameters of more than `limit` bytes."""
    kind = type(module).__name__
    parameters = {
        key: value for key, value in _parameters(module).items() if sum(n > 1 for n in value.shape) > 1
    }
    if parameters and type(module).__module__.startswith("flax.nnx.nn."):
        instead = f"shardtrain.nn.{kind}" if type(module) in _CUT_BY_CHANNEL else "layers of shardtrain.nn"
        raise UserError(
            f"layer {path!r}, a plain {kind}, would be kept whole on each of the {cut} devices; "
            f"use {instead}, or a mesh without channel"
        )
    for key, value in parameters.items():
        if (held := byte_count(value)) > limit:
            raise UserError(
                f"the parameter {f'{path}.{key}'.lstrip('.')!r} of shape {tuple(value.shape)}, "
                f"{held / 2**20:,.1f} MiB, would be kept whole on each of the {cut} devices, which only "
                f"parameters of at most {limit / 2**20:,.1f} MiB are; let a layer of shardtrain.nn hold it, "
                f"such as Embed, Einsum or LinearGeneral, or use a mesh without channel"
            )


def _parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """A module's own parameters by the names of its attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}


def _log_whole(found: Mapping[str, nnx.Module], mesh: AnyMesh) -> None:
    """Logs the parameters of plain modules, which XLA keeps whole on a mesh that cuts channels."""
    whole = sorted(
        f"{path}.{key}".lstrip(".") + f" ({byte_count(value):,} bytes)"
        for path, module in found.items()
        if not isinstance(module, Partitioned)
        for key, value in _parameters(module).items()
    )
    if whole and size(mesh, "channel") > 1:
        log.warning("whole on each of the channel=%d devices: %s", size(mesh, "channel"), ", ".join(whole))


def has_any_pixels(modules: Iterable[nnx.Module]) -> bool:
    """Whether the partitioned layers, of which there are some, all take any number of spatial dimensions."""
    partitioned = [module for module in modules if isinstance(module, Partitioned)]
    return bool(partitioned) and all(module.spatial() is None for module in partitioned)


def _check_axes_used(found: Mapping[str, nnx.Module], layouts: Mapping[str, Layout], mesh: AnyMesh) -> None:
    """Refuses mesh axes that cut nothing in this model.

    Where no layer says which pixels it takes, the first batch says what is cut (`check.refuse_idle`).
    """
    used = set[str]()
    if has_any_pixels(found.values()):
        used |= {*SPATIAL}
    for path, module in found.items():
        layout = layouts[path]
        used |= set(axes_of(layout.batch))
        if isinstance(module, Partitioned):
            for name in module.spatial() or ():
                used |= set(layout.cut(name, mesh))
            if any(layout.channel_cut(features, mesh) for features in module.channels()):
                used |= set(axes_of(layout.channels))
    for layout in layouts.values():
        if absent := [axis for axis in axes_of(layout.parameters) if axis not in mesh.shape]:
            raise UserError(
                f"parameters={absent[0]!r}: the mesh has no such axis; it has {', '.join(mesh.axis_names)}"
            )
    idle = [axis for axis in mesh.axis_names if size(mesh, axis) > 1 and axis not in used]
    if idle:
        sizes = sorted({f for m in found.values() if isinstance(m, Partitioned) for f in m.channels()})
        hint = f" (its layers have {', '.join(map(str, sizes))} channels)" if idle == ["channel"] else ""
        raise UserError(
            f"the mesh axis {idle[0]}={size(mesh, idle[0])} cuts nothing in this model{hint}, so all of it "
            f"would be repeated {size(mesh, idle[0])} times; leave {idle[0]} out or use a size that divides"
        )


def parameter_spec(model: nnx.Module, mesh: AnyMesh, default: Layout) -> dict[tuple, P]:
    """The PartitionSpec with which every variable of the model is stored on `mesh`, by path in its state.

    Of variables that no partitioned layer places, parameters are cut over the `parameters` axes of the
    default layout; all others, such as random keys, are replicated.
    """
    specs: dict[tuple, P] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Partitioned):
            specs |= {(*path, name): spec for name, spec in module.parameter_specs(mesh).items()}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        shape = jax.numpy.shape(variable.get_value())
        if path in specs:
            specs[path] = _stacked(path, specs[path], shape, mesh)
        else:
            is_parameter = isinstance(variable, nnx.Param)
            specs[path] = default.parameter(shape, None, mesh) if is_parameter else P()
    return specs


def _stacked(path: tuple, one: P, shape: Sequence[int], mesh: AnyMesh) -> P:
    """The PartitionSpec of a variable of layers that `nnx.vmap` stacked, from that of `one` layer's."""
    if len(shape) == len(one):
        return one
    stacked = P(*[None] * (len(shape) - len(one)), *one)
    if any(n % size(mesh, axes_of(entry)) for n, entry in zip(shape, stacked, strict=True)):
        raise UserError(
            f"the variable {name(path)!r} has the shape {tuple(shape)}, whose last dimensions do not divide "
            f"as {one} of one layer; stack layers along the first dimension, by nnx.vmap(..., out_axes=0)"
        )
    return stacked


def partition_table(model: nnx.Module, mesh: AnyMesh, default: Layout | None = None) -> Table:
    """A table of every parameter: its shape, the axes that cut it, its bytes per device, its collective.

    Args:
        model: any NNX model, after `assign` or a trainer has given its layers their layouts.
        mesh: the mesh.
        default: the layout of parameters that belong to no partitioned layer.

    Returns:
        A table for `rich.print`.

    Example:
        >>> model = nnx.Sequential(st.nn.Linear(8, 16, rngs=nnx.Rngs(0)))
        >>> table = st.nn.partition_table(model, st.make_mesh("data=2,channel=4"))
        >>> table.row_count  # kernel, bias and the sum of both
        3
    """
    specs = parameter_spec(model, mesh, default or Layout())
    modules = dict(nnx.iter_modules(model))
    table = Table(title="parameters on " + ",".join(f"{n}={s}" for n, s in mesh.shape.items()))
    table.add_column("parameter", no_wrap=True)
    for column in ("shape", "cut by", "KiB/device", "channels move by"):
        table.add_column(column, justify="right" if column == "KiB/device" else "left")
    total = whole = 0.0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value()
        cuts = [axes_of(entry) for entry in specs[path]]
        kib = value.nbytes / 1024 / math.prod(size(mesh, axes) for axes in cuts if axes)
        total, whole = total + kib, whole + value.nbytes / 1024
        cut = " ".join("*".join(axes) or "-" for axes in cuts) if any(cuts) else "whole"
        module = modules[path[:-1]]
        moves = None
        if path[-1] == "kernel" and isinstance(module, Contraction):
            moves = module.channel_plan(mesh).collective
        table.add_row(name(path), "x".join(map(str, value.shape)), cut, f"{kib:.1f}", moves or "")
    table.add_section()
    table.add_row("all", "", "", f"{total:.1f}", f"of {whole:.1f} KiB in all")
    return table
