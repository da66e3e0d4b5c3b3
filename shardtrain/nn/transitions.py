"""Finds where a model's activations change their layout, and redistributes them there.

The model is traced without computing anything; the jaxpr says which layers' outputs reach which layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from shardtrain import compat, jaxprs
from shardtrain.layout import Layout
from shardtrain.nn.base import INPUT_OF, OUTPUT_OF, LayoutChanges, Partitioned, applying, recording

Origin = frozenset[str]
"""The last layers that a value was computed by, on every way to it; `""` is the model's input."""


@dataclass(frozen=True)
class LayerCall:
    """One array argument of one call of one layer.

    Attributes:
        path: of the layer; `""` for what the model returns.
        argument: method and number, such as `"__call__.0"`.
        origins: the layers whose outputs the argument was computed from, `""` for the model's input.
        shape: of the argument.
        shape_out: of the layer's output.
    """

    path: str
    argument: str
    origins: Origin
    shape: tuple[int, ...]
    shape_out: tuple[int, ...]


def trace(model: nnx.Module, *inputs: Any) -> list[LayerCall]:
    """The calls of partitioned layers in one call of `model`, in order.

    Args:
        model: after `partition.assign`, which gives the layers their paths.
        inputs: of the model: arrays, or `jax.ShapeDtypeStruct`s.
    """
    graph, state = nnx.split(model)

    def call(state: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, state, copy=True)(*inputs)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, inputs))
    with recording():
        program = jax.make_jaxpr(call)(shapes[0], *shapes[1])
    values = len(jax.tree.leaves(state))
    given = [frozenset() if i < values else frozenset({""}) for i in range(len(program.jaxpr.invars))]
    calls: list[LayerCall] = []
    for origins, atom in zip(_walk(program.jaxpr, given, calls), program.jaxpr.outvars, strict=True):
        calls.append(LayerCall("", "", origins, atom.aval.shape, ()))
    return calls


def _walk(jaxpr: Any, given: Sequence[Origin], calls: list[LayerCall]) -> list[Origin]:
    """Origins of a jaxpr's outputs, from those of its inputs; appends the calls in it to `calls`."""
    origins: dict[Any, Origin] = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> Origin:
        return frozenset() if hasattr(atom, "val") else origins.get(atom, frozenset())

    for equation in jaxpr.eqns:
        ins = [of(atom) for atom in equation.invars]
        outs = [frozenset().union(*ins)] * len(equation.outvars)
        label = equation.params.get("name", "") if equation.primitive.name == "name" else ""
        if label.startswith(INPUT_OF):
            argument, path = label.removeprefix(INPUT_OF).split(" ", 1)
            calls.append(LayerCall(path, argument, outs[0], equation.invars[0].aval.shape, ()))
        elif label.startswith(OUTPUT_OF):
            path = label.removeprefix(OUTPUT_OF)
            outs = [frozenset({path})]
            shape = equation.outvars[0].aval.shape
            for i, done in enumerate(calls):
                if done.path == path and not done.shape_out:
                    calls[i] = replace(done, shape_out=shape)
        inner = list(jaxprs.inner_jaxprs(equation))
        if inner:
            outs = _inside(equation, inner, ins, calls) or outs
        origins.update(zip(equation.outvars, outs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _inside(equation: Any, inner: Sequence[Any], ins: list[Origin], calls: list[LayerCall]) -> list[Origin]:
    """Origins of the outputs of an equation that runs other jaxprs; empty if this does not know how."""
    kind, params = equation.primitive.name, equation.params
    if kind == "cond":  # the first input is the index of the branch
        found = [_walk(branch, ins[1:], calls) for branch in inner]
        return [frozenset().union(*one) for one in zip(*found, strict=True)]
    if kind == "scan":
        constants, carries = compat.scan_extents(params)
        return _looped(
            inner[0], ins[:constants], ins[constants : constants + carries], ins[constants + carries :], calls
        )
    if kind == "while":
        tests, constants = params["cond_nconsts"], params["body_nconsts"]
        body = jaxprs.inner_jaxpr(params["body_jaxpr"])
        start = ins[tests + constants :]
        outs = _looped(body, ins[tests : tests + constants], start, [], calls)
        return [a | b for a, b in zip(start, outs, strict=True)]  # the loop may run zero times
    for one in inner:
        if len(one.invars) == len(ins) and len(one.outvars) == len(equation.outvars):
            return _walk(one, ins, calls)
        _walk(one, [frozenset().union(*ins)] * len(one.invars), calls)
    return []


def _looped(
    body: Any, constants: list[Origin], carries: list[Origin], slices: list[Origin], calls: list[LayerCall]
) -> list[Origin]:
    """Origins of a loop's outputs: those of the carries grow from turn to turn until they are complete."""
    while True:
        seen: list[LayerCall] = []
        outs = _walk(body, [*constants, *carries, *slices], seen)
        after = [a | b for a, b in zip(carries, outs, strict=False)]
        if after == carries:
            calls += seen
            return outs
        carries = after


def layouts(model: nnx.Module) -> dict[str, Layout]:
    """The layout of every partitioned layer, by path."""
    return {m.path: m.layout for _, m in nnx.iter_modules(model) if isinstance(m, Partitioned)}


def layout_changes(model: nnx.Module, default: Layout, *inputs: Any) -> LayoutChanges:
    """Finds where activations must be redistributed, so that the model itself only joins like layouts.

    Outputs of several layers that the model joins, by a sum for example, leave those layers in one layout:
    the one for which the fewest values are redistributed. An input of a layer that is in another layout than
    the layer's own is redistributed by the layer.

    Args:
        model: after `partition.assign`.
        default: the layout of the model's inputs.
        inputs: of the model: arrays, or `jax.ShapeDtypeStruct`s.
    """
    own = layouts(model) | {"": default}
    if len(set(own.values())) == 1:
        return LayoutChanges(result=default)
    calls = [call for call in trace(model, *inputs) if call.origins]
    after: dict[str, Layout] = {}  # of every layer's output
    for joined in _joined(calls):
        after |= dict.fromkeys(joined, _common(joined, calls, own))
    before = {}  # of inputs that are redistributed
    for call in calls:
        layout = after[min(call.origins)]
        if call.path and layout != own[call.path]:
            before[call.path, call.argument] = layout
    result = next((after[min(call.origins)] for call in calls if not call.path), default)
    changed = {path: layout for path, layout in after.items() if path and layout != own[path]}
    return LayoutChanges(before, changed, result)


def _joined(calls: Sequence[LayerCall]) -> list[Origin]:
    """Sets of layers whose outputs need one layout, since they are joined or reach the same argument."""
    arguments: dict[tuple[str, str], Origin] = {}
    for call in calls:
        argument = call.path, call.argument
        arguments[argument] = arguments.get(argument, frozenset()) | call.origins
    sets: list[Origin] = []
    for origins in arguments.values():
        touched = [other for other in sets if other & origins]
        sets = [other for other in sets if not other & origins]
        sets.append(origins.union(*touched))
    return sets


def _common(joined: Origin, calls: Sequence[LayerCall], own: Mapping[str, Layout]) -> Layout:
    """The layout of the outputs of the layers `joined` for which the fewest values are redistributed."""
    if "" in joined:  # the model's input, whose layout is given
        return own[""]
    # Several layers that take one and the same value share its redistribution.
    takers = {
        (call.origins, own[call.path]): math.prod(call.shape)
        for call in calls
        if call.path and call.origins & joined
    }
    makers = {call.path: math.prod(call.shape_out) for call in calls if call.path in joined}
    ends = [(own[path], n) for path, n in makers.items()] + [(layout, n) for (_, layout), n in takers.items()]

    def redistributed(layout: Layout) -> int:
        return sum(n for end, n in ends if end != layout)

    candidates = (*(own[path] for path in sorted(joined)), *(layout for _, layout in takers))
    return min(candidates, key=redistributed)


@contextmanager
def resharded(model: nnx.Module, default: Layout, *inputs: Any) -> Iterator[Layout]:
    """Within it, calls of `model` redistribute activations where the layouts of its layers change.

    The trainer does this by itself; it is for training loops of your own. Each change of layout is an
    `ops.reshard`.

    Args:
        model: any NNX model, after `assign` has given its layers their layouts.
        default: the layout of the model's inputs.
        inputs: of the model, as it is about to be called: arrays, or `jax.ShapeDtypeStruct`s.

    Yields:
        The layout of what the model returns.

    Example:
        >>> mesh = st.make_mesh("data=2,height=4")
        >>> conv, pool = st.nn.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), st.nn.GlobalAvgPool()
        >>> model, x = nnx.Sequential(conv, pool), jnp.ones((8, 16, 16, 3))
        >>> late = {"layers.1": {"batch": ("data", "height"), "height": ()}}
        >>> layout = st.nn.assign(model, mesh, st.Layout(), late)
        >>> with jax.set_mesh(mesh), st.nn.resharded(model, layout, x) as result:
        ...     y = model(x)
        >>> result.batch
        ('data', 'height')
    """
    changes = layout_changes(model, default, *inputs)
    with applying(changes):
        yield changes.result
