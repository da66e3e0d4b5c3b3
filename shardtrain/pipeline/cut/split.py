"""A model cut into stages, and the table that says how."""

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
from shardtrain.pipeline.cut.balance import balance, stage_costs
from shardtrain.pipeline.cut.graph import OperationGraph, Traced
from shardtrain.pipeline.cut.layers import Layers
from shardtrain.pipeline.cut.operation_costs import flops, size_of, work


@dataclass(frozen=True)
class Part:
    """One stage of a model.

    Attributes:
        layers: their paths, in the order in which they run.
        names: the same, short: `blocks.0` for all layers in it.
        flops: floating point operations of one microbatch forward.
        parameters: bytes of its parameters.
        arrives: types of the activations that arrive from the stage before, skip connections that pass
            through among them, such as `"float32[8,4,4,32]"`.
        bytes: of these.
        cost: what the stage costs: operations and bytes moved, in floating point operations, or seconds if
            measured.
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
        title: what was cut.
        positions: where the stages but the first begin among the model's operations.
        parts: the stages.
        costs: `"counted"` or `"measured"`.
    """

    title: str
    positions: tuple[int, ...]
    parts: tuple[Part, ...]
    costs: str
    _layers: Layers = field(repr=False, compare=False)

    @property
    def balance(self) -> float:
        """Mean cost of a stage by that of the costliest: 1 if all cost the same."""
        costs = [part.cost for part in self.parts]
        return statistics.fmean(costs) / max(costs) if max(costs) else 1.0

    def layout(self) -> str:
        """The layout that cuts the same model so again, for `split` or a trainer.

        Raises:
            UserError: a cut inside a layer, which no layout can say.

        Example:
            >>> split(models.LeNet(rngs=nnx.Rngs(0)), (8, 28, 28, 1), 2).layout()
            'conv1,pool1|conv2,pool2,flatten,linear1,linear2,head'
        """
        return self._layers.layout(self.positions)

    def table(self) -> Table:
        """A table of the stages, at most 100 columns wide."""
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
    stages: int,
    *,
    layout: str | None = None,
    mesh: Mesh | None = None,
    layouts: partition.LayoutTable | None = None,
    costs: str = "counted",
) -> Split:
    """Cuts a model into stages of equal cost, or as a layout says; prints as a table.

    Any NNX model can be cut between its operations, skip connections included: what a later stage needs is
    sent on from stage to stage. A parameter stays in one stage with all of its uses; a loop, and a block
    that is computed again in the backward pass, with all that it runs.

    A layout names the layers of each stage, with `|` between stages: paths of layers, of modules that hold
    them, or shell patterns, in the order in which they run. `...` stands for all the layers in between, so
    that it is enough to name the first of each later stage:

        "stem,norm,blocks.0|blocks.1|blocks.2,mean,head"
        "...|blocks.1,...|blocks.2,..."

    Without a layout the costliest stage is made as cheap as can be, since in a pipeline all wait for it;
    within 2 % of that, cuts between layers are preferred, then those at which fewer bytes arrive. A layer is
    cut through only where that makes the costliest stage 5 % cheaper.

    Args:
        model: any NNX model; it is not changed.
        inputs: shape of a microbatch, `(batch, *spatial, channels)`, or an array or `jax.ShapeDtypeStruct`.
        stages: how many; ranks of the pipeline times stages on each.
        layout: which layers each stage has.
        mesh: the mesh to train on; its `pipe` axis is left out.
        layouts: patterns on layer paths to layouts on this mesh, as for `Trainer`.
        costs: `"counted"` from shapes, or `"measured"`: every operation run by itself on the device at hand.
            Both are of the forward pass, to which the backward pass is taken to be proportional.

    Raises:
        UserError: a layout that the model does not have, more stages than it can be cut into, or what it
            cannot do on this mesh.

    Example:
        >>> model = models.ResNet(8, classes=10, channels=1, rngs=nnx.Rngs(0))
        >>> rich.print(split(model, (8, 8, 8, 1), stages=4))  # doctest: +SKIP
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"split: a {type(model).__name__} is no NNX model; give models.LeNet(...), for one")
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise UserError(f"split: stages={stages!r}; give a number from 1 up, such as 4")
    if not isinstance(layout, str | None):
        raise UserError(f"split: layout={layout!r}; write one such as '...|head', or None to balance")
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"split: mesh={mesh!r}; give st.make_mesh('data=2'), for one, or leave it out")
    inner = None if mesh is None else _without_pipe(mesh)
    batch = _batch(inputs)
    flow = traced(model, batch, inner, layouts)
    layers = Layers(flow)
    done = work(flow, costs, inner)
    positions = balance(flow, stages, done) if layout is None else layers.positions(layout, stages)
    spent = stage_costs(flow, positions, done)
    ends = [0, *positions, len(flow.main)]
    parts = [
        Part(
            layers=paths,
            names=names,
            flops=sum(map(flops, flow.main[ends[k] : ends[k + 1]])),
            parameters=size_of(stage.closed.jaxpr.invars[: len(stage.params)]),
            arrives=tuple(str(v.aval.str_short()) for v in stage.ins),
            bytes=size_of(stage.ins),
            cost=spent[k],
        )
        for k, (paths, names, stage) in enumerate(
            zip(layers.stages(positions), layers.names(positions), flow.cut(positions), strict=True)
        )
    ]
    title = f"{type(model).__name__} in {stages} stages, microbatches {'x'.join(map(str, batch.shape))}"
    return Split(title, tuple(positions), tuple(parts), costs, layers)


def _without_pipe(mesh: Mesh) -> Mesh | None:
    """The part of a mesh that one stage has; None if that is a single device."""
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


def traced(
    model: nnx.Module,
    batch: jax.ShapeDtypeStruct,
    mesh: Mesh | None = None,
    layouts: partition.LayoutTable | None = None,
) -> OperationGraph:
    """One microbatch of training on global arrays, with the sum of the outputs in place of the loss.

    Args:
        model: any NNX model; it is not changed.
        batch: the microbatch. The flow's sides are this and the examples' numbers.
        mesh: to trace on.
        layouts: patterns on layer paths to layouts on this mesh.
    """
    model = nnx.clone(model)  # the caller's keeps its layouts and mode
    model.train()
    default = Layout()
    alone = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    partition.assign(model, alone if mesh is None else mesh, default, layouts or {})
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
    return OperationGraph(Traced(closed, params, state, 1, 0, tuple(partition.leaves(model))))
