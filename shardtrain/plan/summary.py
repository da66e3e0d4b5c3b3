"""Summarizes a model on a mesh, layer by layer, before anything is placed."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shardtrain.errors import UserError
from shardtrain.layout import Axes, Layout, axes_of
from shardtrain.mesh import size, text
from shardtrain.nn import partition, transitions
from shardtrain.nn.base import byte_count, layer_of, name
from shardtrain.ops.reshard import SCOPE
from shardtrain.plan.census import census
from shardtrain.plan.program import compiled_assigned
from shardtrain.plan.trace import Sent, left_to_xla, sent

PURPOSES = {
    "collective-permute": "halos",
    "all-gather": "gather",
    "reduce-scatter": "scatter",
    "all-reduce": "sum",
    "all-to-all": "turn",
}
"""Column of the table for each kind of collective; those that change a layout are in `"reshard"`."""


@dataclass(frozen=True)
class Line:
    """One layer of a model on a mesh.

    Attributes:
        path: path of the layer in the model; `""` for everything outside of layers.
        kind: class of the layer.
        shape: shape of its output in its last call; None if it is not called or if no inputs were given.
        cut: for every dimension of the output, the mesh axes that it is sharded over.
        parameters: bytes of its parameters on each device.
        sent: collectives of the layer in a training step, forward and backward.
    """

    path: str
    kind: str
    shape: tuple[int, ...] | None
    cut: tuple[Axes, ...]
    parameters: int
    sent: tuple[Sent, ...]

    @property
    def bytes(self) -> int:
        """Bytes that one device sends in a step."""
        return sum(s.bytes for s in self.sent)


def lines(
    model: Any,
    mesh: Any,
    inputs: Any = None,
    *,
    layout: partition.LayoutTable | None = None,
    parameters: str | Axes = (),
) -> list[Line]:
    """Returns the layers of a model on a mesh, with shapes, shardings, parameters and collectives.

    A step is the forward pass and the gradients of all parameters. The loss, the metrics and the norms of the
    optimizer would add a few numbers. A model of operators of this package, and of operations on each element
    between them, is only traced. Where XLA may have to move something for what the model computes between
    them, such as a mean over pixels or a Fourier transform, the step is compiled, and what it sends is read
    from the program. No array is created.

    Args:
        model: any NNX model.
        mesh: a mesh from `make_mesh`.
        inputs: shape of the batch, `(batch, *spatial, channels)`, or an array or `jax.ShapeDtypeStruct`.
            Without it only the parameters are listed.
        layout, parameters: as for `Trainer`.

    Raises:
        UserError: if the model cannot be partitioned over this mesh, or does not take these inputs.

    Example:
        >>> model = st.models.LeNet(10, (16, 16, 1), rngs=nnx.Rngs(0))
        >>> first, *_ = lines(model, st.make_mesh("data=2,height=4"), (64, 16, 16, 1))
        >>> first.kind, first.shape, first.cut[:2]
        ('Conv', (64, 16, 16, 8), (('data',), ('height',)))
    """
    if not isinstance(model, nnx.Module) or not isinstance(mesh, Mesh):
        raise UserError(
            f"summary: {type(model).__name__} and {type(mesh).__name__}; give an NNX model and a mesh, "
            f"such as make_mesh('data=2,height=4')"
        )
    model = nnx.clone(model)  # the layouts of the caller's model stay as they are
    default = partition.assign(model, mesh, Layout(parameters=parameters), layout or {})
    found = partition.leaves(model)
    paths = list(found)
    parameter_bytes = _parameter_bytes(model, mesh, default)
    moved: dict[str, list[Sent]] = defaultdict(list)
    shapes: dict[str, tuple[int, ...]] = {}
    if inputs is not None:
        batch = _batch(inputs)
        for row in _sent(model, mesh, default, batch):
            moved[layer_of(row.scope, paths)].append(row)
        calls = transitions.trace(model, batch)
        shapes = {call.path: call.shape_out for call in calls if call.path}
        paths.sort(key=lambda path: next((i for i, c in enumerate(calls) if c.path == path), len(calls)))
    layouts = transitions.layouts(model)

    def line(path: str, kind: str) -> Line:
        shape = shapes.get(path)
        own = layouts.get(path)
        cut = () if shape is None or own is None else tuple(map(axes_of, own.activation(shape, mesh)))
        return Line(path, kind, shape, cut, parameter_bytes.get(path, 0), tuple(moved.get(path, ())))

    found_lines = [line(path, type(found[path]).__name__) for path in paths]
    outside = "" not in found and (moved.get("") or parameter_bytes.get(""))
    return [*found_lines, line("", "")] if outside else found_lines


def summary(
    model: Any,
    mesh: Any,
    inputs: Any = None,
    *,
    layout: partition.LayoutTable | None = None,
    parameters: str | Axes = (),
) -> Table:
    """Returns a table of a model's layers on a mesh, for the terminal.

    For every layer it has the shape of the output and how it is sharded, the bytes of the parameters on each
    device, and the bytes that each device sends in a training step, by kind of collective.

    Args:
        model: any NNX model.
        mesh: a mesh from `make_mesh`.
        inputs: shape of the batch, `(batch, *spatial, channels)`, or an array or `jax.ShapeDtypeStruct`.
            Without it only the parameters are listed.
        layout, parameters: as for `Trainer`.

    Returns:
        A table for `rich.print`.

    Raises:
        UserError: if the model cannot be partitioned over this mesh, or does not take these inputs.

    Example:
        >>> model = st.models.LeNet(10, (16, 16, 1), rngs=nnx.Rngs(0))
        >>> table = st.summary(model, st.make_mesh("data=2,height=4"), (64, 16, 16, 1))
        >>> table.title
        'LeNet on data=2,height=4: KiB on, and sent by, each device'
    """
    rows = lines(model, mesh, inputs, layout=layout, parameters=parameters)
    moved = [_by_what(row.sent) for row in rows]
    kinds = [what for what in ("reshard", *PURPOSES.values()) if any(m[what] for m in moved)]
    table = Table(
        title=f"{type(model).__name__} on {text(mesh)}: KiB on, and sent by, each device",
        caption=None
        if inputs is None
        else "/n: cut n-fold; kept: parameters; sent: in a forward and backward pass, and by what: "
        "change of layout (reshard), collective-permute (halos), all-gather, reduce-scatter, "
        "all-reduce (sum), all-to-all (turn)",
        show_footer=True,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", "all", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("output", no_wrap=True)
    table.add_column("kept", _kib(sum(row.parameters for row in rows)), justify="right", no_wrap=True)
    table.add_column("sent", _kib(sum(row.bytes for row in rows)), justify="right", no_wrap=True)
    for what in kinds:
        table.add_column(what, _kib(sum(m[what] for m in moved)), justify="right", no_wrap=True)
    for row, by in zip(rows, moved, strict=True):
        output = "x".join(
            f"{n}/{size(mesh, axes)}" if axes else str(n)
            for n, axes in zip(row.shape or (), row.cut, strict=False)
        )
        numbers = [row.parameters, row.bytes, *(by[what] for what in kinds)]
        table.add_row(row.path or "(outside)", row.kind, output, *map(_kib, numbers))
    return table


def _kib(amount: int) -> str:
    """Returns bytes as KiB with at least three digits; an empty text for 0."""
    return "" if not amount else f"{amount / 1024:,.{max(0, 2 - len(str(amount // 1024)))}f}"


def _by_what(moved: Sequence[Sent]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for s in moved:
        totals["reshard" if SCOPE in s.scope else PURPOSES[s.kind]] += s.bytes
    return totals


def _parameter_bytes(model: nnx.Module, mesh: Mesh, default: Layout) -> Counter[str]:
    specs: dict[tuple, P] = partition.parameter_spec(model, mesh, default)
    found: Counter[str] = Counter()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shards = math.prod(size(mesh, axes_of(entry)) for entry in specs[path])
        value = variable.get_value()
        found[name(path[:-1])] += byte_count(value) // shards
    return found


def _batch(inputs: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(inputs, "shape"):
        if not isinstance(inputs, Sequence) or not all(hasattr(n, "__index__") for n in inputs):
            raise UserError(f"summary: inputs={inputs!r}; give the batch's shape, such as (64, 28, 28, 1)")
        return jax.ShapeDtypeStruct(tuple(inputs), jnp.float32)
    return jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)


def _sent(model: nnx.Module, mesh: Mesh, default: Layout, batch: jax.ShapeDtypeStruct) -> list[Sent]:
    """Returns the collectives of a step from its trace, or from its program where the trace has not all."""
    jaxpr = _step(model, mesh, default, batch)
    if mesh.size == 1 or not left_to_xla(jaxpr):
        return sent(jaxpr, mesh)
    program = compiled_assigned(model, mesh, default, batch)
    return [Sent(c.kind, c.axes or (), c.payload, c.bytes, c.scope) for c in census(program, mesh)]


def _step(model: nnx.Module, mesh: Mesh, default: Layout, batch: jax.ShapeDtypeStruct) -> Any:
    """Returns the jaxpr of a forward pass and the gradients of all parameters."""
    graph, *values = nnx.split(model, nnx.Param, ...)

    def step(params: Any, rest: Any, x: Any) -> Any:
        def forward(params: Any) -> Any:
            merged: Any = nnx.merge(graph, params, rest, copy=True)
            with transitions.resharded(merged, default, x):
                return merged(x)

        y, pull = jax.vjp(forward, params)
        return y, pull(jax.tree.map(jnp.ones_like, y))

    shapes = jax.eval_shape(lambda: tuple(values))
    with jax.set_mesh(mesh):
        return jax.make_jaxpr(step)(*shapes, batch).jaxpr
