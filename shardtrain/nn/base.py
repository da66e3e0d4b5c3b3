"""What the layers of this room have in common, and how their inputs come to lie as they want them."""

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import get_opaque_trace_state
from jax.sharding import PartitionSpec as P

from shardtrain import ops
from shardtrain.layout import AnyMesh, Layout


class Partitioned:
    """What the layers of this room have in common.

    Attributes:
        layout: which mesh axes cut what in this layer; set by `partition.assign` from a layout table.
        path: of the layer in its model; set with it.
    """

    layout: Layout = Layout()
    path: str = ""

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        """How each parameter is stored on `mesh` between steps, by attribute name."""
        return {}

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        """Sentences about dimensions that `layout` asks to cut and that stay whole on every device of `mesh`.

        A dimension stays whole where it does not divide by its axes. `{layers}` in a sentence stands for the
        paths of all layers with the same sentence.
        """
        yield from ()

    def channels(self) -> tuple[int, ...]:
        """Numbers of channels that the channel axis cuts in this layer, where they divide."""
        return ()

    def spatial(self) -> tuple[str, ...] | None:
        """Names of the spatial dimensions, None for a layer that takes any number of them."""
        return None


def name(path: tuple) -> str:
    """`("blocks", 0, "conv1", "kernel")` as `"blocks.0.conv1.kernel"`."""
    return ".".join(map(str, path))


def layer_of(scope: str, paths: Collection[str]) -> str:
    """The innermost of the layers `paths` that a scope lies in, `""` for none."""
    names = set(re.split(r"[/()]", scope))
    return max((path for path in paths if path in names), key=len, default="")


ARRIVES, LEAVES = "shardtrain arrives at ", "shardtrain leaves "
"""What `recording` names a layer's inputs and output, before the layer's path; inputs have a place too."""


@dataclass(frozen=True)
class Changes:
    """Where activations come to lie otherwise.

    Attributes:
        arrive: how an input of a layer lies that the layer wants otherwise, by path and place of the input.
        leave: how a layer's output is to lie, where that is not as the layer itself has it, by path.
        result: how what the model returns lies.
    """

    arrive: Mapping[tuple[str, str], Layout] = field(default_factory=dict)
    leave: Mapping[str, Layout] = field(default_factory=dict)
    result: Layout = field(default_factory=Layout)


_recording: ContextVar[bool] = ContextVar("recording", default=False)
_changes: ContextVar[Changes] = ContextVar("changes", default=Changes())  # noqa: B039  never changed


@contextmanager
def recording() -> Iterator[None]:
    """In here every layer marks its inputs and output in the jaxpr, for `flow.trace` to read."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


_moved: ContextVar[list[tuple[Any, ...]]] = ContextVar("moved")


@contextmanager
def changing(changes: Changes) -> Iterator[None]:
    """In here layers move their inputs and outputs as `changes` says."""
    tokens = _changes.set(changes), _moved.set([])
    try:
        yield
    finally:
        _changes.reset(tokens[0])
        _moved.reset(tokens[1])


def _arrived(x: Array, before: Layout, after: Layout) -> Array:
    """`x` moved; where several layers take it, once for all of them, and its gradient too."""
    trace = get_opaque_trace_state(convention="nnx")  # what is made in an inner trace must not leave it
    for value, *key, y in _moved.get():
        if value is x and key == [before, after, trace]:
            return y
    y = ops.reshard(x, before, after)
    _moved.get().append((x, before, after, trace, y))
    return y


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.ndim >= 2


def placed(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `__call__` with its inputs moved to the layer's layout, and its path in the program."""

    @functools.wraps(call)
    def placed_call(self: Partitioned, *args: Any, **kwargs: Any) -> Any:
        changes = _changes.get()

        def arrive(number: int, value: Any) -> Any:
            if not _is_array(value):
                return value
            place = f"{call.__name__}.{number}"
            if _recording.get():
                value = checkpoint_name(value, f"{ARRIVES}{place} {self.path}")
            before = changes.arrive.get((self.path, place))
            return value if before is None else _arrived(value, before, self.layout)

        with jax.named_scope(self.path or type(self).__name__):
            given = [arrive(i, value) for i, value in enumerate((*args, *kwargs.values()))]
            y = call(self, *given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
            if self.path in changes.leave and _is_array(y):
                y = ops.reshard(y, self.layout, changes.leave[self.path])
        return checkpoint_name(y, LEAVES + self.path) if _recording.get() and _is_array(y) else y

    return placed_call
