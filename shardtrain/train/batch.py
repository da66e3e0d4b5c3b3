"""Batches on the mesh, made of host arrays: each process brings the rows of its own devices."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.layout import Dimensions, Layout, default_dimensions, spec
from shardtrain.mesh import SPATIAL, size, text
from shardtrain.ops.island import crop_to, round_up
from shardtrain.train.check import refuse_values

Cuts = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Batch:
    """A batch as global arrays on the mesh.

    Attributes:
        inputs: for the model; pixels are padded to whole blocks, see `extents`.
        targets: for the loss.
        real: False for rows that fill up a ragged batch; None where all rows are real.
        extents: the true extents of the inputs' and targets' leaves after the batch, static.
        limit: the mean loss above which the update is left out; None in a program that leaves out none.
    """

    inputs: Any
    targets: Any
    real: Any
    extents: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    limit: Any = None

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def cropped(self) -> tuple[Any, Any]:
        """Returns inputs and targets in their true extents; the crop moves no data, as XLA pads so itself."""
        leaves, tree = jax.tree.flatten((self.inputs, self.targets))
        whole = [(x.shape[0], *extents) for x, extents in zip(leaves, self.extents, strict=True)]
        return jax.tree.unflatten(tree, [crop_to(x, shape) for x, shape in zip(leaves, whole, strict=True)])


jax.tree_util.register_dataclass(Batch, ["inputs", "targets", "real", "limit"], ["extents"])


@dataclass(frozen=True)
class InputDimensions:
    """What the dimensions of a model's inputs are, and which of them may be cut.

    Attributes:
        declared: the dimensions of every input, a tree like the inputs; one for all; or None, where the
            number of dimensions says what they are (see `default_dimensions`).
        pixels: whether pixels and channels may be cut: the model has layers that take them so.
    """

    declared: Any
    pixels: bool

    @classmethod
    def parse(cls, declared: Any, *, pixels: bool) -> "InputDimensions":
        """Reads `"batch time features"`, or a tree of such strings.

        Raises:
            UserError: see `Dimensions`.
        """
        return cls(None if declared is None else jax.tree.map(Dimensions.parse, declared), pixels)

    def of(self, inputs: Any) -> Any:
        """The dimensions of every input.

        Raises:
            UserError: inputs of another structure than the declared one.
        """
        if self.declared is None:
            return jax.tree.map(lambda x: default_dimensions(np.ndim(x)), inputs)
        if isinstance(self.declared, Dimensions):
            return jax.tree.map(lambda _: self.declared, inputs)
        theirs, ours = str(jax.tree.structure(inputs)), str(jax.tree.structure(self.declared))
        if theirs != ours:
            raise UserError(
                f"the inputs are {theirs}, and dimensions= names those of {ours}; give one string for each "
                f"input"
            )
        return self.declared


def local_rows(mesh: Mesh, layout: Layout, batch_size: int) -> range:
    """Returns the rows of a global batch that the devices of this process store, which it must load.

    Raises:
        UserError: a batch that does not divide by the axes that cut it, or rows that are not contiguous.
    """
    cut = layout.cut("batch", mesh)
    shards = size(mesh, cut)
    if batch_size % shards:
        near = sorted({max(1, batch_size // shards) * shards, (batch_size // shards + 1) * shards})
        raise UserError(
            f"a batch of {batch_size} does not divide by {'*'.join(cut)}={shards}; "
            f"use {' or '.join(map(str, near))}"
        )
    sharding = NamedSharding(mesh, spec([cut]))
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    held = {index[0].indices(batch_size)[:2] for index in indices if index is not None}
    start, stop = min(a for a, _ in held), max(b for _, b in held)
    if sum(b - a for a, b in held) != stop - start:
        raise UserError(
            "this process's devices hold rows of the batch that are not contiguous; let the axes that cut "
            "the batch lie across the processes, as make_mesh does"
        )
    return range(start, stop)


def place_batch(
    inputs: Any,
    targets: Any,
    batch_size: int,
    mesh: Mesh,
    layout: Layout,
    dimensions: InputDimensions,
    sample: Any = None,
) -> Batch:
    """Returns a host batch as global arrays: rows are filled up to `batch_size`, pixels to equal shards.

    The rows that fill up are copies of real ones. Their losses and gradients are masked, but the gradient of
    a masked value is 0 times a derivative, which is NaN where the derivative is infinite, as it may be for a
    row of zeros and is not for rows that the model can be trained on.

    Args:
        inputs: arrays whose first dimension is the batch, this process's rows.
        targets: arrays `(rows, ...)`, or None. One value for every pixel of the (only) input, as for
            segmentation, is cut as the pixels are.
        batch_size: of the global batch.
        mesh, layout: where to.
        dimensions: of the inputs.
        sample: one row of an earlier batch, `(inputs, targets)`, to fill up a batch without any row.

    Raises:
        UserError: arrays that disagree on the rows, or more rows than fit.
    """
    share = local_rows(mesh, layout, batch_size)
    leaves = [np.asarray(x) for x in jax.tree.leaves((inputs, targets))]
    refuse_values(leaves)
    counts = {x.shape[0] if x.ndim else -1 for x in leaves}
    if len(counts) != 1 or -1 in counts:
        raise UserError(f"a batch's arrays disagree on its rows: shapes {[x.shape for x in leaves]}")
    rows = counts.pop()
    if rows > len(share):
        raise UserError(
            f"a batch of {rows} rows came after batches of {len(share)}; keep the first batch the largest"
        )

    if not rows and sample is not None:
        labelled = targets is not None and sample[1] is not None
        inputs, targets = sample[0], sample[1] if labelled else targets

    def put(x: Any, cut: Cuts) -> jax.Array:
        x = np.asarray(x)
        if len(x) not in (0, len(share)):
            x = np.resize(x, (len(share), *x.shape[1:]))
        sharding, extents = _sharding_and_extents(x.shape, cut, mesh)
        widths = [(0, e - n) for e, n in zip((len(share), *extents), x.shape, strict=True)]
        x = np.pad(x, widths) if any(high for _, high in widths) else x
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # jax's type allows it, its callers do not
            first, last, _ = index[0].indices(batch_size)
            return x[(slice(first - share.start, last - share.start), *index[1:])]

        return jax.make_array_from_callback((batch_size, *extents), sharding, block)

    # Full batches need no mask, but the processes of a job must all run one program, so they keep it.
    full = rows == len(share) and jax.process_count() == 1
    real = None if full else put(np.arange(len(share)) < rows, [layout.cut("batch", mesh)])
    return _batch(inputs, targets, real, mesh, layout, dimensions, put)


def batch_shapes(inputs: Any, targets: Any, mesh: Mesh, layout: Layout, dimensions: InputDimensions) -> Batch:
    """Returns what `place_batch` returns for a batch of these shapes, as shapes with shardings.

    Args:
        inputs, targets: as for `place`, of the global batch; only their shapes and dtypes are read.
        mesh, layout, dimensions: as for `place`. On a mesh of several processes' devices there is a mask.
    """

    def put(x: Any, cut: Cuts) -> jax.ShapeDtypeStruct:
        sharding, extents = _sharding_and_extents(x.shape, cut, mesh)
        return jax.ShapeDtypeStruct((x.shape[0], *extents), x.dtype, sharding=sharding)

    rows = jax.tree.leaves(inputs)[0].shape[0]
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    mask = put(jax.ShapeDtypeStruct((rows,), bool), [layout.cut("batch", mesh)]) if several else None
    return _batch(inputs, targets, mask, mesh, layout, dimensions, put)


def with_limit(batch: Batch, limit: float | None, mesh: Mesh) -> Batch:
    """Returns the batch with the loss above which its update is skipped, or with the shape of that number."""
    where = NamedSharding(mesh, P())
    if limit is None:
        return dataclasses.replace(batch, limit=jax.ShapeDtypeStruct((), np.float32, sharding=where))
    return dataclasses.replace(batch, limit=scalar(np.float32(limit), where))


def scalar(value: np.generic | np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """Returns a number that all processes know as an array on every device of a mesh."""
    return jax.make_array_from_callback((), where, lambda _: np.asarray(value))


def _sharding_and_extents(shape: Sequence[int], cut: Cuts, mesh: Mesh) -> tuple[NamedSharding, list[int]]:
    """Returns the sharding of an array with this cut, and its extents (but the batch) in equal shards."""
    return NamedSharding(mesh, spec(cut)), [
        round_up(n, c, mesh) for n, c in zip(shape[1:], cut[1:], strict=True)
    ]


def _batch(
    inputs: Any,
    targets: Any,
    real: Any,
    mesh: Mesh,
    layout: Layout,
    dimensions: InputDimensions,
    put: Callable[[Any, Cuts], Any],
) -> Batch:
    """Returns a batch of arrays, each of which `put(array, cut)` places on the mesh."""
    cut_of_batch = layout.cut("batch", mesh)

    def put_input(x: Any, names: Dimensions) -> Any:
        return put(x, names.cut(np.shape(x), layout, mesh, pixels=dimensions.pixels))

    def put_target(x: Any) -> Any:
        shape = np.shape(x)
        if dense and shape[1 : len(dense) + 1] == dense:
            return put(x, [cut_of_batch, *cut_of_dense, *[()] * (len(shape) - len(dense) - 1)])
        return put(x, [cut_of_batch] + [()] * (len(shape) - 1))

    names = dimensions.of(inputs)
    dense, cut_of_dense = _dense(inputs, names, layout, mesh) if dimensions.pixels else ((), ())
    return Batch(
        jax.tree.map(put_input, inputs, names),
        jax.tree.map(put_target, targets),
        real,
        tuple(tuple(np.shape(x)[1:]) for x in jax.tree.leaves((inputs, targets))),
    )


def _dense(
    inputs: Any, names: Any, layout: Layout, mesh: Mesh
) -> tuple[tuple[int, ...], Sequence[tuple[str, ...]]]:
    """The extents between batch and channels of the only input, if pixels are among them, and their cut.

    Targets with a value for every pixel, as for segmentation, have these extents, too.
    """
    shapes = [np.shape(x) for x in jax.tree.leaves(inputs)]
    found = jax.tree.leaves(names, is_leaf=lambda n: isinstance(n, Dimensions))
    if len(shapes) != 1 or not set(found[0].names) & set(SPATIAL):
        return (), ()
    cut = found[0].cut(shapes[0], layout, mesh, pixels=True)
    inner = slice(1, -1 if found[0].names[-1] == "channels" else None)
    return tuple(shapes[0][inner]), cut[inner]


def fetch(outputs: Any, rows: int, batch_size: int, mesh: Mesh, layout: Layout) -> Any:
    """Returns the first `rows` rows of this process's part of global outputs, as numpy arrays."""
    start = local_rows(mesh, layout, batch_size).start
    whole = NamedSharding(mesh, P())

    def on_host(y: jax.Array) -> np.ndarray:
        # A process that sees all shards puts them together on the host: no device need hold them all.
        return np.asarray(y if y.is_fully_addressable else jax.device_put(y, whole))[start : start + rows]

    return jax.tree.map(on_host, outputs)


def rows_of(inputs: Any) -> int:
    """Returns the number of rows of a host batch."""
    leaves = jax.tree.leaves(inputs)
    if leaves and isinstance(inputs, list | tuple) and not hasattr(leaves[0], "shape"):
        raise UserError("a batch's inputs are a list of numbers; give an array, such as np.asarray(inputs)")
    if not leaves or not np.ndim(leaves[0]):
        raise UserError("a batch has no rows; give arrays whose leading dimension is the batch")
    return np.shape(leaves[0])[0]


def global_batch_size(rows: int, mesh: Mesh, layout: Layout) -> int:
    """Returns the size of the global batch of which this process brings `rows`, in whole shards."""
    shards = size(mesh, layout.cut("batch", mesh))
    mine = len(local_rows(mesh, layout, shards))
    return max(1, math.ceil(rows / mine)) * shards


def indivisible(rows: int, size: int | float, mesh: Mesh, shards: int, parts: int) -> UserError:
    """Returns the error for a batch of `rows`, `size` in all processes, that does not divide."""
    near = max(1, round(size / (shards * parts))) * shards * parts
    times = f" times {parts} microbatches" if parts > 1 else ""
    return UserError(
        f"a batch of {rows} does not divide by the {shards} shards of the batch on mesh {text(mesh)}{times}; "
        f"use {near}"
    )
