"""The base class of partitioned layers, and the redistribution of activations where layouts change."""

import functools
import math
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
from shardtrain.errors import UserError
from shardtrain.layout import AnyMesh, Layout


class Partitioned:
    """Base class of layers that have a layout.

    A subclass calls operators of `shardtrain.ops` with `layout=self.layout`, decorates the methods that do so
    with `in_layout`, and overrides those of the methods below that apply: what is returned here is right for
    a layer without parameters that takes any number of pixels and channels.

    Attributes:
        layout: which mesh axes cut what in this layer; set by `assign` from a layout table.
        path: of the layer in its model, such as `"blocks.0.conv1"`; set by `assign` too.

    Example:
        >>> from shardtrain.nn.base import in_layout
        >>> class SquaredPool(st.nn.Partitioned, nnx.Module):
        ...     @in_layout
        ...     def __call__(self, x):
        ...         return st.ops.avg_pool(x**2, 2, strides=2, layout=self.layout)
        >>> SquaredPool()(jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 4, 3)
    """

    layout: Layout = Layout()
    path: str = ""

    def parameter_specs(self, mesh: AnyMesh | None) -> dict[str, P]:
        """How each parameter is stored on `mesh` between steps, by attribute name.

        A specification has one entry for each dimension that the layer gave the parameter. Layers that
        `nnx.vmap` stacked have more dimensions in front, which are not cut (`partition.parameter_spec`).
        """
        return {}

    def undivided(self, mesh: AnyMesh) -> Iterator[str]:
        """Sentences about dimensions that `layout` asks to cut and that stay whole on every device of `mesh`.

        A dimension stays whole where it does not divide by its axes. `{layers}` in a sentence stands for the
        paths of all layers with the same sentence.
        """
        yield from ()

    def channels(self) -> tuple[int, ...]:
        """Numbers of channels, of inputs and outputs, that the layer's layout cuts where they divide."""
        return ()

    def spatial(self) -> tuple[str, ...] | None:
        """Names of the spatial dimensions; None for a layer that takes any number of them."""
        return None


def refuse(layer: Any, name: str, usual: Collection[Any], why: str) -> None:
    """Refuses an argument of a constructor, kept under its name, that is none of the `usual` values.

    Raises:
        UserError: with the argument, and `why` it has no other value here.
    """
    given = getattr(layer, name)
    if not any(given is value or given == value for value in usual):
        shown = getattr(given, "__name__", repr(given))
        raise UserError(f"nn.{type(layer).__name__}: {name}={shown}, but {why}; leave {name} out")


def refuse_sharding(layer: Any, **shardings: Any) -> None:
    """Refuses shardings of the output that are given to a call.

    Raises:
        UserError: for one that is not None.
    """
    for name, given in shardings.items():
        if given is not None:
            raise UserError(
                f"nn.{type(layer).__name__}: {name}={given!r}, but outputs are cut by the layer's layout; "
                f"leave {name} out, and say in the layout table what is cut otherwise"
            )


def name(path: tuple) -> str:
    """A path in a model as a string: `("blocks", 0, "kernel")` as `"blocks.0.kernel"`."""
    return ".".join(map(str, path))


def byte_count(value: Any) -> int:
    """The bytes of an array, of which shape and type are enough."""
    return math.prod(value.shape) * value.dtype.itemsize


def layer_of(scope: str, paths: Collection[str]) -> str:
    """The innermost of the layers `paths` that a scope names, `""` for none."""
    names = set(re.split(r"[/()]", scope))
    return max((path for path in paths if path in names), key=len, default="")


INPUT_OF, OUTPUT_OF = "shardtrain input of ", "shardtrain output of "
"""Prefixes of the `checkpoint_name`s that `recording` gives to inputs and outputs of layers.

After the prefix comes the path of the layer, for inputs after the argument (see `LayoutChanges`).
"""


@dataclass(frozen=True)
class LayoutChanges:
    """Where a model's activations are redistributed from one layout to another.

    Attributes:
        inputs: the present layout of a layer's input that is not in the layer's layout, by the path of the
            layer and the argument: method and number, such as `"__call__.0"`.
        outputs: the layout to which a layer's output is redistributed, where that is not the layer's own, by
            path.
        result: the layout of what the model returns.
    """

    inputs: Mapping[tuple[str, str], Layout] = field(default_factory=dict)
    outputs: Mapping[str, Layout] = field(default_factory=dict)
    result: Layout = field(default_factory=Layout)


_recording: ContextVar[bool] = ContextVar("recording", default=False)
_changes: ContextVar[LayoutChanges] = ContextVar("changes", default=LayoutChanges())  # noqa: B039  immutable
_redistributed: ContextVar[list[tuple[Any, ...]]] = ContextVar("redistributed")


@contextmanager
def recording() -> Iterator[None]:
    """Within it every layer names its inputs and output in the jaxpr, for `transitions.trace` to read."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


@contextmanager
def applying(changes: LayoutChanges) -> Iterator[None]:
    """Within it layers redistribute their inputs and outputs as `changes` says."""
    tokens = _changes.set(changes), _redistributed.set([])
    try:
        yield
    finally:
        _changes.reset(tokens[0])
        _redistributed.reset(tokens[1])


def _reshard_once(x: Array, before: Layout, after: Layout) -> Array:
    """`ops.reshard`, once for all layers that take the same array; so its gradient is moved once, too."""
    trace = get_opaque_trace_state(convention="nnx")  # a tracer must not leave the trace that made it
    for value, *key, y in _redistributed.get():
        if value is x and key == [before, after, trace]:
            return y
    y = ops.reshard(x, before, after)
    _redistributed.get().append((x, before, after, trace, y))
    return y


def _is_activation(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.ndim >= 2


def in_layout(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a layer's `__call__`: its inputs are redistributed to the layer's layout where they must be.

    The equations of the call are named by the layer's path, too.
    """

    @functools.wraps(call)
    def call_in_layout(self: Partitioned, *args: Any, **kwargs: Any) -> Any:
        changes = _changes.get()

        def take(number: int, value: Any) -> Any:
            if not _is_activation(value):
                return value
            argument = f"{call.__name__}.{number}"
            if _recording.get():
                value = checkpoint_name(value, f"{INPUT_OF}{argument} {self.path}")
            before = changes.inputs.get((self.path, argument))
            return value if before is None else _reshard_once(value, before, self.layout)

        with jax.named_scope(self.path or type(self).__name__):
            taken = [take(i, value) for i, value in enumerate((*args, *kwargs.values()))]
            y = call(self, *taken[: len(args)], **dict(zip(kwargs, taken[len(args) :], strict=True)))
            if self.path in changes.outputs and _is_activation(y):
                y = ops.reshard(y, self.layout, changes.outputs[self.path])
        return checkpoint_name(y, OUTPUT_OF + self.path) if _recording.get() and _is_activation(y) else y

    return call_in_layout
