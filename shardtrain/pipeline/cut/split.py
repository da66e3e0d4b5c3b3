"""Cuts a model into stages for a user, and shows them as a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shardtrain import compat
from shardtrain.errors import UserError
from shardtrain.layout import Layout
from shardtrain.nn import partition
from shardtrain.nn.base import name
from shardtrain.nn.examples import examples
from shardtrain.nn.transitions import resharded
from shardtrain.pipeline.cut.balance import balanced_starts, costs_of_stages
from shardtrain.pipeline.cut.graph import OperationGraph, TracedMicrobatch
from shardtrain.pipeline.cut.layers import Layers
from shardtrain.pipeline.cut.operation_costs import OperationCosts, flops, operation_costs, size_of


@dataclass(frozen=True)
class Part:
    """One stage of a model.

    Attributes:
        layers: the paths of its layers, in the order in which they run.
        names: the same, each as short as it may be: `blocks.0` for all layers in it.
        flops: floating point operations of the forward pass of one microbatch.
        parameters: bytes of its parameters.
        arrives: the types of the activations that the stage before sends, such as `"float32[8,4,4,32]"`, skip
            connections that pass through among them.
        bytes: of these activations.
        cost: of the stage: operations and bytes moved, in floating point operations, or seconds if measured.
    """

    layers: tuple[str, ...]
    names: tuple[str, ...]
    flops: float
    parameters: int
    arrives: tuple[str, ...]
    bytes: int
    cost: float


@dataclass(frozen=True)
class Split:
    """A model cut into stages, from `split`.

    Attributes:
        title: names the model.
        starts: for each stage but the first the number of the model's operation with which it begins.
        parts: the stages.
        costs: `"counted"` or `"measured"`.
    """

    title: str
    starts: tuple[int, ...]
    parts: tuple[Part, ...]
    costs: str
    _layers: Layers = field(repr=False, compare=False)

    @property
    def balance(self) -> float:
        """The mean cost of a stage divided by that of the costliest: 1 if all cost the same."""
        costs = [part.cost for part in self.parts]
        return statistics.fmean(costs) / max(costs) if max(costs) else 1.0

    def stages_text(self) -> str:
        """Returns the stages as text, by which `split` or a trainer cuts the same model the same way.

        Raises:
            UserError: a stage begins inside a layer, which cannot be written so.

        Example:
            >>> st.pipeline.split(st.models.LeNet(rngs=nnx.Rngs(0)), (8, 28, 28, 1), 2).stages_text()
            'conv1,pool1|conv2,pool2,flatten,linear1,linear2,head'
        """
        return self._layers.text(self.starts)

    def table(self) -> Table:
        """Returns a table of the stages, at most 100 columns wide."""
        table = Table(
            title=self.title,
            caption=f"balance {self.balance:.0%}: the mean cost by the costliest, {self.costs}; cost 1.00 is "
            f"the mean; of a microbatch, forward; arrives: activations from the stage before",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            width=100,
        )
        table.add_column("stage", justify="right", no_wrap=True)
        table.add_column("layers", overflow="fold", ratio=1)
        for column in ("MFLOP", "cost", "KiB kept"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("arrives", overflow="fold", max_width=26)
        table.add_column("KiB", justify="right", no_wrap=True)
        mean = statistics.fmean(part.cost for part in self.parts) or 1.0
        for k, part in enumerate(self.parts):
            table.add_row(
                str(k),
                ", ".join(part.names),
                _short(part.flops / 1e6),
                f"{part.cost / mean:.2f}",
                _short(part.parameters / 1024),
                "\n".join(part.arrives),
                _short(part.bytes / 1024) if part.bytes else "",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 1 else f"{number:,.1f}"


def split(
    model: Any,
    inputs: Any,
    stages: int | str,
    *,
    mesh: Mesh | None = None,
    layout: partition.LayoutTable | None = None,
    costs: str = "counted",
) -> Split:
    """Cuts a model into stages, and returns them for inspection; the result prints as a table.

    Any NNX model can be cut between its operations, skip connections included: what a later stage needs is
    sent on from stage to stage. A parameter stays in one stage with all of its uses. A loop stays in one
    stage with all that it runs, and so does a block that is computed again in the backward pass.

    A number of stages is balanced: the costliest stage is made as cheap as can be, since all others of a
    pipeline wait for it. Within 2 % of that, cuts between layers are preferred to cuts inside of them, then
    those at which fewer bytes are sent.

    A text names the layers of each stage, with `|` between stages: paths of layers, of modules that hold
    them, or shell patterns, in the order in which the layers run. `...` stands for all the layers in between,
    so that it is enough to name the first layer of each later stage:

        "stem,norm,blocks.0|blocks.1|blocks.2,mean,head"
        "...|blocks.1,...|blocks.2,..."

    Args:
        model: any NNX model; it is not changed.
        inputs: the shape of a microbatch, `(batch, *spatial, channels)`, or an array or
            `jax.ShapeDtypeStruct`.
        stages: how many (the ranks of the pipeline times the stages on each), or their layers as text.
        mesh: the mesh to train on; its `pipe` axis is left out.
        layout: patterns on layer paths to layouts on this mesh, as for `Trainer`.
        costs: `"counted"` from shapes, or `"measured"`: every operation is run by itself on the device at
            hand. Both are of the forward pass, to which the backward pass is taken to be proportional.

    Returns:
        The stages with their layers, costs and activations.

    Raises:
        UserError: a text that does not fit the model, more stages than the model can be cut into, or a model
            that this mesh cannot train.

    Example:
        >>> model = st.models.ResNet(8, classes=10, channels=1, rngs=nnx.Rngs(0))
        >>> [part.names for part in st.pipeline.split(model, (8, 8, 8, 1), "...|blocks.1,...").parts]
        [('stem', 'norm', 'blocks.0'), ('blocks.1', 'blocks.2', 'mean', 'head')]
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"split: a {type(model).__name__} is no NNX model; give models.LeNet(...), for one")
    if not _is_stages(stages):
        raise UserError(
            f"split: stages={stages!r}; give a number from 1 up, such as 4, or write the layers of each, "
            f"such as '...|head'"
        )
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"split: mesh={mesh!r}; give st.make_mesh('data=2'), for one, or leave it out")
    inner = None if mesh is None else _without_pipe(mesh)
    batch = _batch(inputs)
    graph = trace(model, batch, inner, layout)
    layers = Layers(graph)
    spent = operation_costs(graph, costs, inner)
    if isinstance(stages, str):
        starts = layers.starts(stages, 1 + stages.count("|"))
    else:
        starts = balanced_starts(graph, stages, spent)
    title = (
        f"{type(model).__name__} in {1 + len(starts)} stages, microbatches {'x'.join(map(str, batch.shape))}"
    )
    return Split(title, tuple(starts), _parts(graph, layers, starts, spent), costs, layers)


def _is_stages(stages: Any) -> bool:
    whole = isinstance(stages, int) and not isinstance(stages, bool)
    return isinstance(stages, str) or (whole and stages > 0)


def _parts(
    graph: OperationGraph, layers: Layers, starts: Sequence[int], costs: OperationCosts
) -> tuple[Part, ...]:
    """Returns what a user wants to know of each stage."""
    ends = [0, *starts, len(graph.main)]
    rows = zip(
        layers.of_stages(starts),
        layers.names_of_stages(starts),
        graph.cut(starts),
        costs_of_stages(graph, starts, costs),
        strict=True,
    )
    return tuple(
        Part(
            layers=paths,
            names=names,
            flops=sum(map(flops, graph.main[ends[k] : ends[k + 1]])),
            parameters=size_of(stage.closed.jaxpr.invars[: len(stage.params)]),
            arrives=tuple(str(v.aval.str_short()) for v in stage.ins),
            bytes=size_of(stage.ins),
            cost=cost,
        )
        for k, (paths, names, stage, cost) in enumerate(rows)
    )


def _without_pipe(mesh: Mesh) -> Mesh | None:
    """Returns the part of a mesh that one stage has; None if that is a single device."""
    names = [name for name in mesh.axis_names if name != "pipe"]
    place = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
    devices = np.asarray(mesh.devices[place])
    return compat.auto_mesh(devices, names) if devices.size > 1 else None


def _batch(inputs: Any) -> jax.ShapeDtypeStruct:
    if hasattr(inputs, "shape"):
        return jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    numbers = isinstance(inputs, Sequence) and all(hasattr(n, "__index__") for n in inputs)
    if not numbers or not inputs or min(inputs) < 1:
        raise UserError(f"split: inputs={inputs!r}; give the shape of a microbatch, such as (8, 28, 28, 1)")
    return jax.ShapeDtypeStruct(tuple(inputs), jnp.float32)


def trace(
    model: nnx.Module,
    batch: jax.ShapeDtypeStruct,
    mesh: Mesh | None = None,
    layout: partition.LayoutTable | None = None,
) -> OperationGraph:
    """Returns the graph of one microbatch of training, with the sum of the outputs in place of the loss.

    Args:
        model: any NNX model; it is not changed.
        batch: the inputs. The examples' arrays are these and the examples' numbers.
        mesh: to trace on.
        layout: patterns on layer paths to layouts on this mesh.
    """
    model = nnx.clone(model)  # the caller's keeps its layouts and mode
    model.train()
    default = Layout()
    alone = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    partition.assign(model, alone if mesh is None else mesh, default, layout or {})
    graph, *trees = nnx.split(model, nnx.Param, ...)
    flat = [nnx.to_flat_state(tree) for tree in trees]
    params, state = (tuple(name(path) for path, _ in variables) for variables in flat)

    def filled(variables: Any, values: Sequence[Any]) -> nnx.State:
        pairs = zip(variables, values, strict=True)
        return nnx.from_flat_state([(path, variable.replace(value)) for (path, variable), value in pairs])

    def micro(params: Any, state: Any, x: Any, index: Any) -> Any:
        merged: Any = nnx.merge(graph, filled(flat[0], params), filled(flat[1], state), copy=True)
        with examples(index), resharded(merged, default, x):
            y = merged(x)
        loss = sum(
            leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).sum() for leaf in jax.tree.leaves(y)
        )
        _, *after = nnx.split(merged, nnx.Param, ...)
        return loss, [variable.get_value() for _, variable in nnx.to_flat_state(after[1])]

    shapes = [[jax.typeof(variable.get_value()) for _, variable in variables] for variables in flat]
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)
    rows = jax.ShapeDtypeStruct(batch.shape[:1], jnp.int32)
    with jax.sharding.use_abstract_mesh(alone if mesh is None else mesh.abstract_mesh):
        closed = jax.make_jaxpr(micro)(*args, batch, rows)
    return OperationGraph(TracedMicrobatch(closed, params, state, 1, 0, tuple(partition.leaves(model))))
