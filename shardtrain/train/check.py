"""Refuses what cannot work: wrong arguments, and operators that XLA would compute wrongly."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from shardtrain import hlo, jaxprs
from shardtrain.errors import UserError
from shardtrain.layout import axes_of, spatial_names
from shardtrain.mesh import SPATIAL, size, text
from shardtrain.nn.base import Partitioned, name

log = logging.getLogger(__name__)

SMALL_BYTES = 1024
"""Collectives outside of islands that send less are labels, keys and the like."""

REMAT = ("contractions", "nothing")

_SHOWN = 5
"""A warning names this many operations, those that move most."""

_HERE = str(Path(__file__).parents[1])

_MOVES = ("all-gather", "all-to-all", "collective-permute")

_WINDOWED = {
    "conv_general_dilated": ("convolution", "shardtrain.ops.conv or shardtrain.nn.Conv"),
    "reduce_window_max": ("max pooling", "shardtrain.ops.max_pool"),
    "reduce_window_sum": ("average pooling", "shardtrain.ops.avg_pool"),
    "reduce_window": ("window reduction", "shardtrain.ops.max_pool or avg_pool"),
}


def refuse_outside_islands(jaxpr: Any, mesh: Mesh, *, staged: bool = False) -> None:
    """Refuses convolutions and pooling that are left to XLA on a mesh where XLA cannot be trusted with them.

    On cut pixels or channels XLA's partitioner returns wrong convolutions (height x output channels) and
    replicates uneven outputs; a grouped convolution gathers the whole batch on every device even on a
    data-parallel mesh (openxla/xla#47945).

    Args:
        jaxpr: of a step.
        mesh: which it runs on.
        staged: whether it is a pipeline's, in which XLA partitions nothing.

    Raises:
        UserError: names the operator, where it stands, and what to use instead.
    """
    cut = [axis for axis in (*SPATIAL, "channel") if size(mesh, axis) > 1]
    for equation in _equations(jaxpr):
        name = equation.primitive.name
        if name == "sort" and not staged:
            _refuse_uneven_sort(equation, mesh)
        if name not in _WINDOWED:
            continue
        what, instead = _WINDOWED[name]
        grouped = equation.params.get("feature_group_count", 1) > 1
        if cut:
            reason = f"which XLA gets wrong or replicates on a mesh with {cut[0]}={size(mesh, cut[0])}"
        elif grouped and mesh.size > 1 and not staged:
            reason = "with groups, for which XLA gathers the whole batch on every device"
        else:
            continue
        raise UserError(
            f"the model has a {what} outside shardtrain's operators ({jaxprs.where(equation)}), {reason}; "
            f"use {instead}"
        )


def _refuse_uneven_sort(equation: Any, mesh: Mesh) -> None:
    """Refuses to sort arrays whose pixels do not divide by the axes that cut them: XLA aborts the process.

    Raises:
        UserError: says where, and which dimension does not divide.
    """
    shape = equation.invars[0].aval.shape
    if not 2 < len(shape) < 6:  # no pixels
        return
    for axis, extent in zip(spatial_names(len(shape) - 2), shape[1:-1], strict=True):
        if extent % size(mesh, axis):
            raise UserError(
                f"the model sorts an array of shape {shape} ({jaxprs.where(equation)}), as jnp.sort and "
                f"jnp.median do, and its {axis} of {extent} does not divide by {axis}={size(mesh, axis)}, "
                f"which XLA cannot compile; pad the array to a multiple, or use another mesh"
            )


def warn_of_foreign_collectives(text: str, mesh: Mesh) -> None:
    """Logs what a compiled step moves outside of the islands, where no operator of ours asked for it.

    On cut pixels and channels XLA keeps an operation right that it cannot partition, such as a Fourier
    transform between two layers, by gathering its operands on every device.

    Args:
        text: of the compiled program.
        mesh: that it runs on.
    """
    instructions = itertools.chain.from_iterable(hlo.parse(text)[1].values())
    foreign = [i for i in instructions if i.collective in _MOVES and "shard_map" not in i.scope]
    if not foreign:
        return
    found = Counter[tuple[str, str, str]]()
    places = hlo.places(text, lambda path: "/flax/" in path or path.startswith(_HERE))
    for one in foreign:
        axes = hlo.crossed(hlo.groups(one, mesh.size), mesh)
        if {*axes} & {*SPATIAL, "channel"}:
            place = places.get(one.frame)
            what = (one.scope.rpartition("/")[2] or "an operation") + (f" at {place}" if place else "")
            sizes = [size for shape, size in hlo.arrays(one.shape) if shape[0] in "fcb"]
            found[what, str(one.collective), ",".join(axes)] += sum(sizes)
    large = [(what, moved) for what, moved in found.most_common() if moved > SMALL_BYTES]
    if large:
        shown = [
            f"{what}, {moved / 1024:,.1f} KiB of it over {over} ({kind})"
            for (what, kind, over), moved in large[:_SHOWN]
        ]
        more = [f"{len(large) - _SHOWN} more"] if len(large) > _SHOWN else []
        log.warning(
            "XLA moves %s KiB on each device for operations between the layers: %s; write them with "
            "operators of shardtrain, or use a mesh that does not cut what they need whole",
            f"{sum(moved for _, moved in large) / 1024:,.1f}",
            "; ".join(shown + more),
        )


def refuse_idle(inputs: Any, mesh: Mesh) -> None:
    """Refuses a batch of which a spatial axis of the mesh cuts nothing, where layers take any pixels.

    Raises:
        UserError: names the axis, and the dimensions that the inputs have.
    """
    leaves = jax.tree.leaves(inputs)
    cut = {axis for x in leaves for entry in x.sharding.spec for axis in axes_of(entry)}
    for axis in SPATIAL:
        if size(mesh, axis) > 1 and axis not in cut:
            shapes = ", ".join(str(x.shape) for x in leaves)
            raise UserError(
                f"the mesh axis {axis}={size(mesh, axis)} cuts nothing in this model with inputs of shape "
                f"{shapes}, so all of it would be repeated; leave {axis} out of the mesh, or name it in "
                f"dimensions="
            )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations that are not inside a `shard_map`."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            continue
        yield equation
        for inner in jaxprs.inner_jaxprs(equation):
            yield from _equations(inner)


def refuse_arguments(
    remat: Any, accumulate: int, clip_norm: float | None, dtype: DTypeLike | None, statistics: str
) -> None:
    """Refuses arguments of a trainer that are wrong whatever the model and the mesh are.

    Raises:
        UserError: says which, and what there is.
    """
    if isinstance(remat, str) and remat not in REMAT:
        raise UserError(f"remat={remat!r}; there are None, {', '.join(map(repr, REMAT))} and jax's policies")
    if accumulate < 1:
        raise UserError(f"accumulate={accumulate}; use 1 for no accumulation, or more")
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm={clip_norm}; use a positive norm, or None for no clipping")
    if dtype is not None and not jnp.issubdtype(_dtype(dtype), jnp.floating):
        raise UserError(f"dtype={dtype!r}; compute in 'bfloat16', 'float16', 'float32' or 'float64'")
    if statistics not in ("microbatch", "batch"):
        raise UserError(f"statistics={statistics!r}; there are 'microbatch' and 'batch'")


def refuse_two_objectives(loss: Any, objective: Any) -> None:
    """Refuses a trainer that is told twice what to minimize.

    Raises:
        UserError: says which to leave out.
    """
    if loss is not None and objective is not None:
        raise UserError(
            "both loss= and objective= say what to minimize; give one of them (an objective calls the "
            "model and its loss itself)"
        )


def refuse_replicas_alone(mesh: Mesh) -> None:
    """Refuses a mesh with `replica` and without a pipeline.

    Raises:
        UserError: says what to use instead.
    """
    if size(mesh, "replica") > 1 and size(mesh, "pipe") == 1:
        raise UserError(
            f"mesh {text(mesh)}: replicas are for pipelines, of two stages or more; add pipe=2, or use "
            f"data={size(mesh, 'replica')} to train one model"
        )


def _dtype(name: DTypeLike) -> Any:
    """Returns the numpy dtype of a name; for an unknown name bool, in which nothing computes."""
    try:
        return jnp.dtype(name)
    except TypeError:
        return jnp.dtype(bool)


def plain(model: nnx.Module, kind: type) -> list[str]:
    """Returns the paths of the layers of a class that are not partitioned."""
    modules = nnx.iter_modules(model)
    return [name(path) for path, m in modules if isinstance(m, kind) and not isinstance(m, Partitioned)]


def refuse_model(model: nnx.Module, accumulate: int, statistics: str) -> None:
    """Refuses variables that cannot be trained or saved, and layers that would treat all microbatches alike.

    Raises:
        UserError: names the variable or the layer.
    """
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if not isinstance(variable, nnx.Variable):
            raise UserError(
                f"{name(path)!r} is a bare array, of which nothing says whether it is trained; make it an "
                f"nnx.Param or an nnx.Variable (if it is of a layer of nnx's own, leave that layer out)"
            )
        value = variable.get_value()
        if not hasattr(value, "shape"):
            raise UserError(
                f"{name(path)!r} is an nnx.{type(variable).__name__} of {type(value).__name__}; give it an "
                f"array, such as jnp.asarray({value!r})"
            )
        if 0 in value.shape:
            raise UserError(
                f"{name(path)!r} has the shape {value.shape}, no elements, and cannot be saved; leave it out"
            )
        if isinstance(variable, nnx.Param) and not jnp.issubdtype(value.dtype, jnp.inexact):
            raise UserError(
                f"{name(path)!r} is an nnx.Param of {value.dtype}, which has no gradient; make it an "
                f"nnx.Variable, or floating"
            )
    if (norms := plain(model, nnx.BatchNorm)) and accumulate > 1 and statistics == "batch":
        raise UserError(
            f"{norms[0]!r} is a plain nnx.BatchNorm, whose running statistics move with each of the "
            f"{accumulate} microbatches and not once, as statistics='batch' asks; use "
            f"shardtrain.nn.BatchNorm with the same arguments"
        )


def refuse_no_model(model: Any) -> None:
    """Refuses what is no model, such as the class in place of an instance.

    Raises:
        UserError: says what it is, and what to give.
    """
    if isinstance(model, nnx.Module):
        return
    if isinstance(model, type):
        raise UserError(
            f"the model is the class {model.__name__}; give an instance, such as "
            f"{model.__name__}(rngs=nnx.Rngs(0))"
        )
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    linen = any("flax.linen" in base.__module__ for base in type(model).__mro__)
    if linen:
        raise UserError(f"the model is {kind}, a Linen module; write it with flax.nnx")
    raise UserError(f"the model is {kind}; give an instance of flax.nnx.Module")


def refuse_item(item: Any) -> None:
    """Refuses what is no batch `(inputs, targets)`.

    Raises:
        UserError: says what it is.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return
    if isinstance(item, tuple | list):
        what = f"a {type(item).__name__} of {len(item)}"
    elif isinstance(item, Mapping):
        what = f"a dictionary of {', '.join(map(str, item))}"
    else:
        what = f"an array of shape {item.shape}" if hasattr(item, "shape") else type(item).__name__
    raise UserError(
        f"a batch is {what}, and must be (inputs, targets), where inputs and targets may be trees of several "
        f"arrays; give an iterable of batches, such as [(inputs, targets)]"
    )


def refuse_steps(steps: Any, done: int) -> None:
    """Refuses numbers of steps that are none, and says when there is nothing left to do.

    Raises:
        UserError: says what was given.
    """
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 0:
        raise UserError(f"fit(steps={steps!r}): give a whole number, the updates in all")
    if done >= steps:
        log.warning("steps=%d counts all updates, and %d are done: there is nothing to do", steps, done)


def refuse_values(arrays: Sequence[np.ndarray]) -> None:
    """Refuses arrays in a batch that are no numbers.

    Raises:
        UserError: names the dtype.
    """
    for x in arrays:
        if x.dtype.kind in "OSUMm":
            raise UserError(
                f"a batch has an array of {x.dtype} and shape {x.shape}, which no device takes; leave "
                f"it out, or make numbers of it"
            )


def refuse_empty(rows: int) -> None:
    """Refuses a training batch without rows.

    Raises:
        UserError: says what to do.
    """
    if not rows:
        raise UserError("fit: a batch has no rows; leave empty batches out")


def refuse_ragged(rows: int, norms: Sequence[str]) -> None:
    """Refuses a batch that is smaller than the first to a model with plain batch norms.

    Raises:
        UserError: names the layer.
    """
    if norms:
        raise UserError(
            f"a batch of {rows} rows is smaller than the first, and {norms[0]!r} is a plain nnx.BatchNorm, "
            f"which would count the rows that fill it up; use shardtrain.nn.BatchNorm"
        )


def refuse_other_rank(inputs: Any, sample: Any) -> None:
    """Refuses inputs with a dimension less than the trainer has seen, as one example without a batch has.

    Args:
        inputs: a host batch.
        sample: `(inputs, targets)` of one row, None where no batch was seen.

    Raises:
        UserError: says how to make a batch of it.
    """
    before = [] if sample is None else jax.tree.leaves(sample[0])
    for x, seen in zip(jax.tree.leaves(inputs), before, strict=False):
        if np.ndim(x) == np.ndim(seen) - 1:
            raise UserError(
                f"predict: the inputs have shape {np.shape(x)}, and those before (rows, "
                f"{', '.join(map(str, np.shape(seen)[1:]))}); give a batch, for one example inputs[None]"
            )


def refuse_rowless(outputs: Sequence[Any], rows: int) -> None:
    """Refuses to predict outputs, given as shapes, that do not have one row for each example.

    Raises:
        UserError: names the shape.
    """
    for y in outputs:
        if np.shape(y)[:1] != (rows,):
            raise UserError(
                f"predict: an output of shape {np.shape(y)} for {rows} examples has no row for each of them; "
                f"return such outputs in training mode only"
            )


def refuse_uncut(plan: Any, pipeline: Any) -> None:
    """Refuses questions that a trainer can answer only once its model has been cut into stages.

    Raises:
        UserError: says how to get it.
    """
    if plan is not None and pipeline is None:
        raise UserError(
            "the pipeline is cut when the first training batch is seen; call fit first, or "
            "prepare(inputs, targets)"
        )
