"""Which layer's output arrives at which layer: read from a trace of the model, on no device."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from shardtrain import compat, jaxprs
from shardtrain.layout import Layout
from shardtrain.nn.base import ARRIVES, LEAVES, Changes, Partitioned, changing, recording

Origin = frozenset[str]
"""The layers that a value was last computed by; `""` is the model's input."""


@dataclass(frozen=True)
class LayerCall:
    """One array that arrives at one call of one layer.

    Attributes:
        path: of the layer; `""` for what the model returns.
        place: of the input: the method and its number there, such as `"__call__.0"`.
        origins: the layers whose outputs its input was computed from, `""` for the model's input.
        shape, shape_out: of its input and output.
    """

    path: str
    place: str
    origins: Origin
    shape: tuple[int, ...]
    shape_out: tuple[int, ...]


def trace(model: nnx.Module, *inputs: Any) -> list[LayerCall]:
    """The calls of our layers in one call of `model`, in order.

    Args:
        model: after `partition.assign`, which gives the layers their paths.
        inputs: arrays, or their `jax.ShapeDtypeStruct`.
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
    """Follows the origins of values through a jaxpr; returns those of its outputs."""
    origins: dict[Any, Origin] = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> Origin:
        return frozenset() if hasattr(atom, "val") else origins.get(atom, frozenset())

    for equation in jaxpr.eqns:
        ins = [of(atom) for atom in equation.invars]
        outs = [frozenset().union(*ins)] * len(equation.outvars)
        label = equation.params.get("name", "") if equation.primitive.name == "name" else ""
        if label.startswith(ARRIVES):
            place, path = label.removeprefix(ARRIVES).split(" ", 1)
            calls.append(LayerCall(path, place, outs[0], equation.invars[0].aval.shape, ()))
        elif label.startswith(LEAVES):
            path = label.removeprefix(LEAVES)
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
    """Origins of what an equation gives that runs other jaxprs; nothing where it is not known how."""
    kind, params = equation.primitive.name, equation.params
    if kind == "cond":  # the first input says which branch
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
        return [a | b for a, b in zip(start, outs, strict=True)]  # it may not turn at all
    for one in inner:
        if len(one.invars) == len(ins) and len(one.outvars) == len(equation.outvars):
            return _walk(one, ins, calls)
        _walk(one, [frozenset().union(*ins)] * len(one.invars), calls)
    return []


def _looped(
    body: Any, constants: list[Origin], carries: list[Origin], slices: list[Origin], calls: list[LayerCall]
) -> list[Origin]:
    """What a loop gives: what one turn leaves in the carries arrives in the next."""
    while True:
        seen: list[LayerCall] = []
        outs = _walk(body, [*constants, *carries, *slices], seen)
        after = [a | b for a, b in zip(carries, outs, strict=False)]
        if after == carries:
            calls += seen
            return outs
        carries = after


def layouts(model: nnx.Module) -> dict[str, Layout]:
    """The layout of every one of our layers, by path."""
    return {m.path: m.layout for _, m in nnx.iter_modules(model) if isinstance(m, Partitioned)}


def changes(model: nnx.Module, default: Layout, *inputs: Any) -> Changes:
    """Which inputs and outputs of layers are moved, so that the model itself only joins what lies alike.

    Where the model adds up outputs of several layers, they leave those layers in one layout: the one for
    which the fewest values are moved. Whatever arrives at a layer in another layout than its own is moved
    there.

    Args:
        model: after `partition.assign`.
        default: how the model's inputs lie.
        inputs: arrays, or their `jax.ShapeDtypeStruct`.
    """
    lies = layouts(model) | {"": default}
    if len(set(lies.values())) == 1:
        return Changes(result=default)
    calls = [call for call in trace(model, *inputs) if call.origins]
    leave: dict[str, Layout] = {}
    for together in _joined(calls):
        leave |= dict.fromkeys(together, _common(together, calls, lies))
    arrive = {}
    for call in calls:
        before = leave[min(call.origins)]
        if call.path and before != lies[call.path]:
            arrive[call.path, call.place] = before
    result = next((leave[min(call.origins)] for call in calls if not call.path), default)
    moved = {path: after for path, after in leave.items() if path and after != lies[path]}
    return Changes(arrive, moved, result)


def _joined(calls: Sequence[LayerCall]) -> list[Origin]:
    """Sets of layers whose outputs must lie alike, since they are joined or arrive at the same place."""
    places: dict[tuple[str, str], Origin] = {}
    for call in calls:
        place = call.path, call.place
        places[place] = places.get(place, frozenset()) | call.origins
    sets: list[Origin] = []
    for origins in places.values():
        touched = [other for other in sets if other & origins]
        sets = [other for other in sets if not other & origins]
        sets.append(origins.union(*touched))
    return sets


def _common(together: Origin, calls: Sequence[LayerCall], lies: Mapping[str, Layout]) -> Layout:
    """The layout that the outputs of the layers `together` leave in."""
    if "" in together:  # the model's input, which lies as it does
        return lies[""]
    # Several takers of one and the same value share a move.
    takers = {
        (call.origins, lies[call.path]): math.prod(call.shape)
        for call in calls
        if call.path and call.origins & together
    }
    makers = {call.path: math.prod(call.shape_out) for call in calls if call.path in together}

    def moved(layout: Layout) -> int:
        ends = [(lies[path], n) for path, n in makers.items()] + [(lie, n) for (_, lie), n in takers.items()]
        return sum(n for lie, n in ends if lie != layout)

    return min((*(lies[path] for path in sorted(together)), *(lie for _, lie in takers)), key=moved)


@contextmanager
def resharded(model: nnx.Module, default: Layout, *inputs: Any) -> Iterator[Layout]:
    """Calls of `model` inside move activations where layouts change, by `ops.reshard`.

    Gives the layout in which the model's result lies.

    The trainer does this; in a loop of your own:

        with nn.resharded(model, Layout(), x):
            y = model(x)
    """
    found = changes(model, default, *inputs)
    with changing(found):
        yield found.result
