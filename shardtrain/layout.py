"""Layouts: which mesh axes cut which dimension of an array.

The names match by default: the axis `data` cuts the batch, `height` the rows, `channel` the features. Layers
with other layouts than the default are what the field calls hybrid parallelism.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.mesh import AXES, SPATIAL, size

Axes = tuple[str, ...]
AnyMesh = Mesh | AbstractMesh

DIMENSIONS = ("batch", *SPATIAL, "channels")

_UNCUT = {
    "pipe": "a mesh with pipe keeps each stage's parameters on the devices of its rank as it is",
    "replica": "replicas have parameters of their own, which may differ",
    "any": "the axes pipe and replica cut no array: they divide layers and models among devices",
}
"""Why an axis, as a value of `Layout.parameters` or of any field, cuts no dimension."""


@dataclass(frozen=True)
class Layout:
    """The mesh axes that cut each dimension of a layer's activations and parameters.

    Every field takes one axis name or several. An axis that the mesh does not have, or has with size 1,
    cuts nothing, so one layout serves every mesh.

    Attributes:
        batch: axes that cut the batch of inputs and outputs.
        depth: axes that cut the depth of volumes, whether it divides by them or not.
        height: axes that cut the height of images and volumes, likewise.
        width: axes that cut the width of signals, images and volumes, likewise.
        channels: axes that cut the features of inputs, outputs and kernels. Where their number does not
            divide by the axes they are not cut (`nn.partition_table` shows it).
        parameters: axes over which parameters and optimizer state are sharded between their uses. Parameters
            are gathered when they are used, and gradients reduce-scattered (ZeRO-3, fully sharded data
            parallelism).

    Raises:
        UserError: an unknown axis, one that cuts no array, or one axis for two dimensions.

    Example:
        >>> st.Layout(batch=("data", "height"), height=()).batch
        ('data', 'height')
    """

    batch: str | Axes = ("data",)
    depth: str | Axes = ("depth",)
    height: str | Axes = ("height",)
    width: str | Axes = ("width",)
    channels: str | Axes = ("channel",)
    parameters: str | Axes = ()

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if not isinstance(given, str | tuple):
                raise UserError(
                    f"layout: {field.name}={given!r}; give the name of a mesh axis, or several, or ()"
                )
            axes = axes_of(given)
            object.__setattr__(self, field.name, axes)
            for axis in axes:
                if axis not in AXES:
                    raise UserError(
                        f"layout: {field.name}={axis!r} is no mesh axis; they are {', '.join(AXES)}"
                    )
                if axis == "pipe" or (axis == "replica" and field.name != "batch"):
                    what = _UNCUT[axis] if field.name == "parameters" else _UNCUT["any"]
                    raise UserError(
                        f"layout: {field.name}={axis!r}, but {what}; use for example 'data', or ()"
                    )
                rival = owner.get(axis)
                # Parameters may be sharded over the axis that cuts the batch, since they are gathered first.
                if rival and not (field.name == "parameters" and rival != "channels"):
                    raise UserError(
                        f"layout: the axis {axis!r} is asked to cut both {rival} and {field.name}; "
                        f"set one of them to ()"
                    )
                owner[axis] = field.name

    def cut(self, dimension: str, mesh: AnyMesh | None) -> Axes:
        """The axes of `mesh` that cut `dimension`: those that it has, with sizes larger than 1."""
        if mesh is None:
            return ()
        return tuple(axis for axis in axes_of(getattr(self, dimension)) if size(mesh, axis) > 1)

    def channel_cut(self, features: int, mesh: AnyMesh | None) -> Axes:
        """The axes that cut `features` channels; none if they do not divide."""
        axes = self.cut("channels", mesh)
        return axes if axes and features % size(mesh, axes) == 0 else ()  # type: ignore[arg-type]

    def activation(self, shape: Sequence[int], mesh: AnyMesh | None) -> P:
        """The PartitionSpec of an activation `(batch, *spatial, channels)` on `mesh`."""
        dims = ("batch", *spatial_names(len(shape) - 2), "channels")
        cuts = [self.cut(dim, mesh) for dim in dims[:-1]] + [self.channel_cut(shape[-1], mesh)]
        return spec(cuts)

    def parameter(self, shape: Sequence[int], channel: int | None, mesh: AnyMesh | None, space: int = 0) -> P:
        """The PartitionSpec with which a parameter is stored on `mesh`.

        Args:
            shape: the parameter's shape.
            channel: the dimension of the channels that `channels` cuts, None if there is none.
            mesh: the mesh.
            space: how many leading dimensions are pixels, each with parameters of its own.

        Returns:
            Where they divide, pixels are cut as those of activations, the channel dimension by `channels`,
            and the largest other dimension by `parameters`. A parameter without a dimension that divides is
            replicated, which `nn.partition_table` shows.
        """
        cuts: list[Axes] = [()] * len(shape)
        taken = {axis for name in spatial_names(space) for axis in self.cut(name, mesh)}
        for dim, name in enumerate(spatial_names(space)):
            axes = self.cut(name, mesh)
            cuts[dim] = axes if axes and shape[dim] % size(mesh, axes) == 0 else ()  # type: ignore[arg-type]
        if channel is not None:
            cuts[channel] = self.channel_cut(shape[channel], mesh)
        taken |= {axis for axes in cuts for axis in axes}
        free = tuple(axis for axis in self.cut("parameters", mesh) if axis not in taken)
        if free and mesh is not None:
            shards = size(mesh, free)
            left = [extent // size(mesh, cut) for extent, cut in zip(shape, cuts, strict=True)]
            fits = [d for d in range(space, len(shape)) if left[d] % shards == 0 and left[d]]
            if fits:
                best = max(fits, key=lambda d: (not cuts[d], left[d]))
                cuts[best] = cuts[best] + free
        return spec(cuts)


SYNONYMS = {"features": "channels"}
"""Other words for the dimensions that a layout can cut."""


@dataclass(frozen=True)
class Dimensions:
    """The names of an input's dimensions, in order: they say which of them a layout may cut.

    `batch`, `depth`, `height`, `width` and `channels` (or `features`) are cut as the layout says. Any other
    name, such as `time`, is a dimension that is never cut; `_` is one without a name, of which there may be
    several.

    Attributes:
        names: one for every dimension, the first of them `batch`.

    Raises:
        UserError: words that are no names, another first dimension than the batch, or a name given twice.

    Example:
        >>> from shardtrain.layout import Dimensions
        >>> mesh = st.make_mesh("data=2,width=4")
        >>> Dimensions.parse("batch time features").cut((8, 20, 3), st.Layout(), mesh, pixels=True)
        (('data',), (), ())
        >>> Dimensions.parse("batch width channels").cut((8, 20, 3), st.Layout(), mesh, pixels=True)
        (('data',), ('width',), ())
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        known = tuple(SYNONYMS.get(name, name) for name in self.names)
        object.__setattr__(self, "names", known)
        possible = (
            f"write for example 'batch time features' or 'batch height width channels'; "
            f"{', '.join(DIMENSIONS)} are cut by the mesh, dimensions of other names are not"
        )
        if odd := [name for name in known if not name.isidentifier()]:
            raise UserError(f"dimensions {str(self)!r}: {odd[0]!r} is no name; {possible}")
        if known[:1] != ("batch",):
            raise UserError(f"dimensions {str(self)!r}: the first must be 'batch'; {possible}")
        if twice := [name for i, name in enumerate(known) if name != "_" and name in known[:i]]:
            raise UserError(f"dimensions {str(self)!r}: {twice[0]!r} is there twice; {possible}")

    @classmethod
    def parse(cls, text: Any) -> "Dimensions":
        """The dimensions named in a string, separated by spaces: `"batch depth height width channels"`.

        Raises:
            UserError: as the class.

        Example:
            >>> from shardtrain.layout import Dimensions
            >>> Dimensions.parse("batch time features").names
            ('batch', 'time', 'channels')
        """
        if not isinstance(text, str):
            raise UserError(f"dimensions {text!r}; give names in a string, such as 'batch time features'")
        return cls(tuple(text.split()))

    def __str__(self) -> str:
        """As `parse` reads it."""
        return " ".join(self.names)

    def cut(
        self, shape: Sequence[int], layout: Layout, mesh: AnyMesh | None, *, pixels: bool
    ) -> tuple[Axes, ...]:
        """The mesh axes that cut each dimension of an input.

        Args:
            shape: of the input.
            layout: which mesh axes cut what.
            mesh: the mesh; None cuts nothing.
            pixels: whether pixels and channels are cut too, or the batch alone.

        Returns:
            For every dimension the axes that cut it: none for channels that do not divide by their axes, and
            none for dimensions that a layout does not name. Batch and pixels are cut whether they divide or
            not.

        Raises:
            UserError: an input with another number of dimensions.
        """
        if len(shape) != len(self.names):
            raise UserError(
                f"an input of shape {tuple(shape)} has {len(shape)} dimensions, and {str(self)!r} names "
                f"{len(self.names)}; name every dimension, or reshape the input"
            )
        return tuple(
            self._axes(name, extent, layout, mesh, pixels)
            for name, extent in zip(self.names, shape, strict=True)
        )

    @staticmethod
    def _axes(name: str, extent: int, layout: Layout, mesh: AnyMesh | None, pixels: bool) -> Axes:
        if name == "batch":
            return layout.cut("batch", mesh)
        if not pixels or name not in DIMENSIONS:
            return ()
        return layout.channel_cut(extent, mesh) if name == "channels" else layout.cut(name, mesh)


def default_dimensions(rank: int) -> Dimensions:
    """The names of an input of `rank` dimensions that declares none.

    Returns:
        An image's names, `(batch, *spatial, channels)`, for 3 to 5 dimensions; otherwise the batch and
        dimensions without names, which are never cut.

    Raises:
        UserError: `rank` below 1, an input without a batch.

    Example:
        >>> from shardtrain.layout import default_dimensions
        >>> str(default_dimensions(4)), str(default_dimensions(2))
        ('batch height width channels', 'batch _')
    """
    if rank < 1:
        raise UserError(f"an input of {rank} dimensions has no batch; give arrays (batch, ...)")
    if 3 <= rank <= 5:
        return Dimensions(("batch", *spatial_names(rank - 2), "channels"))
    return Dimensions(("batch", *["_"] * (rank - 1)))


def chosen(layout: Any) -> Layout:
    """The layout given to an operator, or the default one for None.

    Raises:
        UserError: for anything else.
    """
    if layout is not None and not isinstance(layout, Layout):
        raise UserError(f"layout={layout!r}; give a shardtrain.Layout, such as Layout(height=())")
    return layout or Layout()


def spatial_names(rank: int) -> tuple[str, ...]:
    """Names of `rank` spatial dimensions: `("width",)`, `("height", "width")`, `("depth", ...)`."""
    if not 0 <= rank <= 3:
        raise UserError(f"an array of {rank + 2} dimensions; it must be (batch, up to 3 spatial, channels)")
    return SPATIAL[3 - rank :]


def spec(cuts: Iterable[Axes]) -> P:
    """The PartitionSpec with these axes for every dimension."""
    return P(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in cuts))


def axes_of(entry: str | Axes | None) -> Axes:
    """An entry of a PartitionSpec as a tuple of axes."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def active_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `jax.set_mesh`; None without one, or if it has a single device.

    Raises:
        UserError: for a mesh with `Explicit` axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return None
    if explicit := compat.explicit_axes(mesh):
        raise UserError(
            f"the mesh has Explicit axes {sorted(explicit)}, which shardtrain's operators do not take; "
            f"make it with shardtrain.make_mesh or axis_types=(AxisType.Auto, ...)"
        )
    return mesh


def resolve(
    default: Layout, table: Mapping[str, Layout | Mapping[str, str | Axes]], paths: Sequence[str]
) -> dict[str, Layout]:
    """The layout of every module path: `default`, or what the last pattern that matches says.

    Args:
        default: for paths that no pattern matches.
        table: shell patterns on module paths (`"stages.2.*"`, `"head"`) -> a `Layout`, or the fields that
            differ from the default (`{"height": (), "batch": ("data", "height")}`). Only the pattern `""`
            matches the path `""`.
        paths: all module paths of the model.

    Raises:
        UserError: a pattern that matches nothing, or a field that a layout does not have.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"layout={table!r}; give a table of patterns, such as {{'head': {{'height': ()}}}}")
    layouts = dict.fromkeys(paths, default)
    for pattern, change in table.items():
        matched = [
            path for path in paths if fnmatch.fnmatchcase(path, pattern) and bool(path) == bool(pattern)
        ]
        if not matched:
            layers = [path for path in paths if path]
            raise UserError(
                f"layout: the pattern {pattern!r} matches no layer; the layers are {', '.join(layers[:12])}"
                + (", ..." if len(layers) > 12 else "")
            )
        if not isinstance(change, Layout):
            if not isinstance(change, Mapping):
                raise UserError(
                    f"layout: {pattern!r} is given {change!r}; give a Layout, or the fields that differ, "
                    f"such as {{'height': ()}}"
                )
            known = {field.name for field in dataclasses.fields(Layout)}
            if unknown := set(change) - known:
                raise UserError(
                    f"layout: {pattern!r} sets {sorted(unknown)}; a layout has {', '.join(sorted(known))}"
                )
            change = dataclasses.replace(default, **change)  # type: ignore[arg-type]
        layouts.update(dict.fromkeys(matched, change))
    return layouts
