"""Which layer's output arrives at which layer: read from a trace of the model, on no device."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from shardtrain import compat
from shardtrain.layout import Layout
from shardtrain.nn.base import ARRIVES, LEAVES, Partitioned, arrivals, recording

log = logging.getLogger(__name__)

Origin = frozenset[str]
"""The layers that a value was last computed by; `""` is the model's input."""


@dataclass(frozen=True)
class Call:
    """One array that arrives at one call of one layer.

    Attributes:
        path: of the layer.
        origins: the layers whose outputs its input was computed from, `""` for the model's input.
        shape, shape_out: of its input and output.
    """

    path: str
    origins: Origin
    shape: tuple[int, ...]
    shape_out: tuple[int, ...]


def trace(model: nnx.Module, *inputs: Any) -> list[Call]:
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
    calls: list[Call] = []
    _walk(program.jaxpr, given, calls)
    return calls


def _walk(jaxpr: Any, given: Sequence[Origin], calls: list[Call]) -> list[Origin]:
    """Follows the origins of values through a jaxpr; returns those of its outputs."""
    origins: dict[Any, Origin] = dict(zip(jaxpr.invars, given, strict=True))

    def of(atom: Any) -> Origin:
        return frozenset() if hasattr(atom, "val") else origins.get(atom, frozenset())

    for equation in jaxpr.eqns:
        ins = [of(atom) for atom in equation.invars]
        outs = [frozenset().union(*ins)] * len(equation.outvars)
        label = equation.params.get("name", "") if equation.primitive.name == "name" else ""
        if label.startswith(ARRIVES):
            shape = equation.invars[0].aval.shape
            calls.append(Call(label.removeprefix(ARRIVES), outs[0], shape, ()))
        elif label.startswith(LEAVES):
            path = label.removeprefix(LEAVES)
            outs = [frozenset({path})]
            shape = equation.outvars[0].aval.shape
            for i, done in enumerate(calls):
                if done.path == path and not done.shape_out:
                    calls[i] = Call(path, done.origins, done.shape, shape)
        for inner in compat.inner_jaxprs(equation):
            same = len(inner.invars) == len(ins) and len(inner.outvars) == len(outs)
            found = _walk(inner, ins if same else [frozenset().union(*ins)] * len(inner.invars), calls)
            outs = found if same else outs
        origins.update(zip(equation.outvars, outs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def layouts(model: nnx.Module) -> dict[str, Layout]:
    """The layout of every one of our layers, by path."""
    return {m.path: m.layout for _, m in nnx.iter_modules(model) if isinstance(m, Partitioned)}


def changes(model: nnx.Module, default: Layout, *inputs: Any) -> dict[str, Layout]:
    """For the layers whose input comes from layers of another layout: that layout.

    Left out are layers that get their input in several layouts; there XLA moves what must be moved.

    Args:
        model: after `partition.assign`.
        default: how the model's inputs lie.
        inputs: arrays, or their `jax.ShapeDtypeStruct`.
    """
    lies = layouts(model) | {"": default}
    if len(set(lies.values())) == 1:
        return {}
    found: dict[str, set[Layout]] = {}
    for call in trace(model, *inputs):
        found.setdefault(call.path, set()).update(lies[origin] for origin in call.origins)
    mixed = [path for path, befores in found.items() if len(befores) > 1]
    if mixed:
        log.warning("activations of several layouts arrive at %s: XLA moves them by itself", ", ".join(mixed))
    return {
        path: next(iter(befores))
        for path, befores in found.items()
        if len(befores) == 1 and befores != {lies[path]}
    }


@contextmanager
def resharded(model: nnx.Module, default: Layout, *inputs: Any) -> Iterator[None]:
    """Calls of `model` inside move activations where layouts change, by `ops.reshard`.

    The trainer does this; in a loop of your own:

        with nn.resharded(model, Layout(), x):
            y = model(x)
    """
    befores: Mapping[str, Layout] = changes(model, default, *inputs)
    with arrivals(befores):
        yield
