"""The state of a run as one tree of named arrays, and how the arrays are sharded."""

import dataclasses
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that makes up a run: nothing outside this tree changes from step to step.

    Attributes:
        step: updates done; with the seed it is also the position in the data.
        params: parameters by name (`"blocks.0.conv1.kernel"`).
        model_state: the model's other variables by name: running statistics, random streams.
        opt_state: the optimizer's state, a tree of the same names.
        extra: more trees by name, see `shardtrain.train.extra`.

    Trees of the same form hold shapes, shardings or PartitionSpecs in place of the arrays. On a mesh with
    `pipe` all but `step` is packed, see `shardtrain.train.pipelined.state`.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    extra: Any = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> "TrainState":
        """The same state with some of its fields changed."""
        return dataclasses.replace(self, **changes)


def owners(opt_state: Any, params: Collection[str]) -> Any:
    """Returns for each leaf of an optimizer's state the name of the parameter that it belongs to, or `""`.

    Optimizers store what belongs to a parameter under the parameter's name, possibly in groups or masked.
    """

    def owner(path: tuple, _: Any) -> str:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((key for key in reversed(keys) if key in params), "")

    return jax.tree_util.tree_map_with_path(owner, opt_state)


def by_field(state: TrainState) -> dict[str, Any]:
    """Returns the fields of a state as a dictionary."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def bytes_on_a_device(tree: Any) -> int:
    """Returns the bytes of the arrays on that device of this process which stores the most."""
    stored: Counter[Any] = Counter()
    for x in jax.tree.leaves(tree):
        stored.update({shard.device: shard.data.nbytes for shard in x.addressable_shards})
    return max(stored.values())


def one_replica(values: Any, shapes: Any, number: int) -> Any:
    """Returns the arrays of one replica; those with one more dimension are of all replicas."""
    return jax.tree.map(lambda x, s: x[number] if x.ndim > len(s.shape) else x, values, shapes)


def is_shapes(tree: Any) -> bool:
    """Returns whether the leaves of a tree are shapes in place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def with_shardings(shapes: Any, where: Any) -> Any:
    """Returns shapes that also carry the shardings of their arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Returns a tree of PartitionSpecs as NamedShardings on a mesh."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
