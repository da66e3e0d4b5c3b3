"""What the layers of this room have in common, and how their inputs come to lie as they want them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
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

    def kept(self, mesh: AnyMesh | None) -> dict[str, P]:
        """How each parameter lies on `mesh` at rest, by attribute name."""
        return {}

    def channels(self) -> tuple[int, ...]:
        """Numbers of channels that the channel axis cuts in this layer, where they divide."""
        return ()

    def spatial(self) -> tuple[str, ...] | None:
        """Names of the spatial dimensions, None for a layer that takes any number of them."""
        return None


def name(path: tuple) -> str:
    """`("blocks", 0, "conv1", "kernel")` as `"blocks.0.conv1.kernel"`."""
    return ".".join(map(str, path))


ARRIVES, LEAVES = "shardtrain arrives at ", "shardtrain leaves "
"""What `recording` names a layer's input and output, before the layer's path."""

_recording: ContextVar[bool] = ContextVar("recording", default=False)
_arrivals: ContextVar[Mapping[str, Layout]] = ContextVar("arrivals", default={})  # noqa: B039  never changed


@contextmanager
def recording() -> Iterator[None]:
    """In here every layer marks its input and output in the jaxpr, for `flow.trace` to read."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


@contextmanager
def arrivals(layouts: Mapping[str, Layout]) -> Iterator[None]:
    """In here layers know how their input lies, by path, and move it where they want it otherwise."""
    token = _arrivals.set(layouts)
    try:
        yield
    finally:
        _arrivals.reset(token)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.ndim >= 2


def _mark(value: Any, label: str) -> Any:
    return checkpoint_name(value, label) if _is_array(value) else value


def placed(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `__call__` with its input moved to the layer's layout, and its path in the program."""

    @functools.wraps(call)
    def placed_call(self: Partitioned, x: Array, *args: Any, **kwargs: Any) -> Any:
        if _recording.get():
            x, args = _mark(x, ARRIVES + self.path), tuple(_mark(a, ARRIVES + self.path) for a in args)
        with jax.named_scope(self.path or type(self).__name__):
            if self.path in _arrivals.get():
                before = _arrivals.get()[self.path]
                x = ops.reshard(x, before, self.layout)
                args = tuple(ops.reshard(a, before, self.layout) if _is_array(a) else a for a in args)
            y = call(self, x, *args, **kwargs)
        return _mark(y, LEAVES + self.path) if _recording.get() else y

    return placed_call
