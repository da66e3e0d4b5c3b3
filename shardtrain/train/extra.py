"""Trees of a run's own in its state: averaged weights, memories of errors, clocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.mesh import PIPE, REPLICA, size, text
from shardtrain.train.state import TrainState

Placement = Literal["parameters", "whole", "replica", "device"]
PLACEMENTS = get_args(Placement)


class Extra:
    """A tree in `TrainState.extra` that is placed, updated and saved with the run; subclass to make one.

    Attributes:
        placement: how the tree is placed on the mesh.
            `"parameters"`: a dictionary of arrays with the parameters' names and shapes, each sharded as its
            parameter is and, on a mesh with `pipe`, stored with its stage.
            `"whole"`: small arrays, on every device.
            `"replica"`: one copy of the tree for each replica, which may differ. Arrays have one more
            dimension in front, as long as the mesh axis `replica`.
            `"device"`: one copy of the tree for each device, in a dimension in front as long as the mesh has
            devices. A run that is taken up on another number of devices or replicas gives each of them the
            mean of the old copies (of whole numbers the smallest).

    Example:
        >>> class Count(st.Extra):
        ...     placement = "whole"
        ...
        ...     def init(self, params):
        ...         return {"updates": jnp.zeros((), jnp.int32)}
        ...
        ...     def update(self, tree, state):
        ...         return {"updates": tree["updates"] + 1}
    """

    placement: ClassVar[Placement] = "parameters"

    def init(self, params: Mapping[str, Any]) -> Any:
        """The tree before the first update, one copy of it, from the parameters by name."""
        raise NotImplementedError

    def update(self, tree: Any, state: TrainState) -> Any:
        """The tree after an update, inside the compiled step.

        Args:
            tree: as placed, with the dimension of copies in front for `"replica"` and `"device"`.
            state: after the update; its `extra` is still the one before.
        """
        return tree


@dataclass(frozen=True)
class EMA(Extra):
    """Exponential moving average of the parameters: `average = decay * average + (1 - decay) * parameters`.

    It begins at the initial parameters. `trainer.extra_model(name)` is the model with the averaged weights.

    Args:
        decay: between 0 and 1; an average over about `1 / (1 - decay)` updates.

    Raises:
        UserError: a decay that is not between 0 and 1.

    Example:
        >>> average = st.EMA(0.999)

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
    """

    decay: Any

    def __post_init__(self) -> None:
        if not isinstance(self.decay, float) or not 0 < self.decay < 1:
            raise UserError(f"EMA(decay={self.decay}): give a number between 0 and 1, such as 0.999")

    def init(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return dict(params)

    def update(self, tree: Any, state: TrainState) -> Any:
        return jax.tree.map(
            lambda average, new: (self.decay * average + (1 - self.decay) * new).astype(average.dtype),
            tree,
            dict(state.params),
        )


def refuse_extra(extra: Mapping[str, Any], params: Mapping[str, Any], mesh: Mesh) -> None:
    """Refuses extra trees that cannot be placed on a mesh.

    Raises:
        UserError: names the tree, and what is possible.
    """
    for name, one in extra.items():
        named = isinstance(name, str) and name.isidentifier() and name != POSITION
        if not isinstance(one, Extra) or not named:
            raise UserError(
                f"extra={{{name!r}: ...}}: give names such as 'ema' (not {POSITION!r}) and instances of "
                f"st.Extra, such as st.EMA(0.999)"
            )
        if one.placement not in PLACEMENTS:
            raise UserError(
                f"extra {name!r} has placement={one.placement!r}; there are {', '.join(PLACEMENTS)}"
            )
        if one.placement in ("replica", "device") and size(mesh, PIPE) > 1:
            raise UserError(
                f"extra {name!r} has a copy for each {one.placement}, which mesh {text(mesh)} with "
                f"its stages has no place for; leave out pipe, or place it as 'parameters' or 'whole'"
            )
        _refuse_tree(name, one, params)


def _refuse_tree(name: str, one: Extra, params: Mapping[str, Any]) -> None:
    """Refuses an initial tree that is not as its placement needs it."""
    if type(one).init is Extra.init:
        raise UserError(
            f"extra {name!r}: {type(one).__name__} has no init(params); define it to return the tree before "
            f"the first update"
        )
    tree = jax.eval_shape(one.init, dict(params))
    if not jax.tree.leaves(tree):
        raise UserError(f"extra {name!r}: init returned no arrays; return the tree before the first update")
    if one.placement != "parameters":
        return
    theirs = tree if isinstance(tree, Mapping) else {}
    wrong = set(theirs) ^ set(params)
    wrong |= {key for key in set(theirs) & set(params) if theirs[key].shape != params[key].shape}
    if wrong:
        raise UserError(
            f"extra {name!r} is placed as the parameters are, but {min(wrong)!r} is of another name "
            f"or shape; return one array for each parameter, or set placement='whole'"
        )


POSITION = "position"
"""The name in `TrainState.extra` of what the host knows of a run, which no compiled step takes: `examples`,
the real examples that it has trained on, and `recent`, the losses that a spike is measured by."""


PACKED = "(packed)"
"""The name of all other trees on a mesh with `pipe`, where they are packed together; no tree of a user's."""


def on_devices(state: TrainState) -> TrainState:
    """The part of a state that compiled steps take: all but the position."""
    trees = {name: tree for name, tree in state.extra.items() if name != POSITION}
    return state.replace(extra=trees.get(PACKED, trees))


def with_position(state: TrainState, position: Mapping[str, Any]) -> TrainState:
    """A state as compiled steps return it, with the position beside its trees."""
    trees = state.extra if isinstance(state.extra, dict) else {PACKED: state.extra}
    return state.replace(extra={**trees, POSITION: position})


def copies(one: Extra, mesh: Mesh) -> int | None:
    """Copies of an extra tree on a mesh; None for one that has no dimension of copies."""
    return {"replica": size(mesh, REPLICA), "device": mesh.size}.get(one.placement)


def initial_extra(one: Extra, params: Mapping[str, Any], mesh: Mesh) -> Any:
    """An extra tree before the first update, with all of its copies."""
    tree, count = one.init(dict(params)), copies(one, mesh)
    return tree if count is None else jax.tree.map(lambda x: jnp.stack([x] * count), tree)


def extra_specs(one: Extra, params: Mapping[str, Any], specs: Mapping[str, P], mesh: Mesh) -> Any:
    """The PartitionSpecs of an extra tree.

    Args:
        one: the declaration.
        params: shapes of the parameters.
        specs: of the parameters.
        mesh: of the run.
    """
    if one.placement == "parameters":
        return dict(specs)
    axes = {"replica": (REPLICA,) if REPLICA in mesh.shape else (), "device": tuple(mesh.axis_names)}
    spec = P(axes[one.placement]) if one.placement in axes else P()
    return jax.tree.map(lambda _: spec, jax.eval_shape(one.init, dict(params)))


def updated(name: str, one: Extra, state: TrainState) -> Any:
    """An extra tree after an update, which must be a tree as before.

    Args:
        name: of the tree.
        one: the declaration.
        state: after the update, with the extra trees from before.

    Raises:
        UserError: a tree of another structure, or an array of another shape or dtype.
    """
    before = state.extra[name]
    after = one.update(before, state)

    def kinds(tree: Any) -> Any:
        return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(np.shape(x))}", tree)

    if kinds(before) != kinds(after):
        raise UserError(
            f"extra {name!r}: update returned {kinds(after)} for {kinds(before)}; return a tree of the same "
            f"structure, with arrays of the same shapes and dtypes"
        )
    return after


def with_copies(old: np.ndarray, count: int) -> np.ndarray:
    """The copies of one array for another number of devices or replicas, see `Extra`."""
    if len(old) == count:
        return old
    one = old.astype(np.float64).mean(0) if jnp.issubdtype(old.dtype, jnp.floating) else old.min(0)
    return np.broadcast_to(one.astype(old.dtype), (count, *old.shape[1:])).copy()
