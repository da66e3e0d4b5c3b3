"""Refuses what cannot work: wrong arguments, and operators that XLA would compute wrongly."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from shardtrain import jaxprs
from shardtrain.errors import UserError
from shardtrain.mesh import SPATIAL, size, text
from shardtrain.nn.base import Partitioned, name

REMAT = ("contractions", "nothing")

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
        if hasattr(value, "shape") and 0 in value.shape:
            raise UserError(
                f"{name(path)!r} has the shape {value.shape}, no elements, and cannot be saved; leave it out"
            )
        if isinstance(variable, nnx.Param) and not jnp.issubdtype(value.dtype, jnp.inexact):
            raise UserError(
                f"{name(path)!r} is an nnx.Param of {value.dtype}, which has no gradient; make it an "
                f"nnx.Variable, or floating"
            )
    if (masks := plain(model, nnx.Dropout)) and accumulate > 1:
        raise UserError(
            f"{masks[0]!r} is a plain nnx.Dropout, which would drop the same in each of the "
            f"{accumulate} microbatches; use shardtrain.nn.Dropout with the same arguments"
        )
    if (norms := plain(model, nnx.BatchNorm)) and accumulate > 1 and statistics == "batch":
        raise UserError(
            f"{norms[0]!r} is a plain nnx.BatchNorm, whose running statistics move with each of the "
            f"{accumulate} microbatches and not once, as statistics='batch' asks; use "
            f"shardtrain.nn.BatchNorm with the same arguments"
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


def refuse_rowless(outputs: Sequence[Any], rows: int) -> None:
    """Refuses to predict outputs, given as shapes, that do not have one row for each example.

    Raises:
        UserError: names the shape.
    """
    for y in outputs:
        if y.shape[:1] != (rows,):
            raise UserError(
                f"predict: an output of shape {y.shape} for {rows} examples has no row for each of them; "
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
