"""The state of a run in one tree of named arrays, and where each lies on the mesh."""

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
    """The name of the parameter that each leaf of an optimizer's state belongs to, `""` for none.

    Optimizers keep what belongs to a parameter under its name, alone, in a group of names or masked.
    """

    def owner(path: tuple, _: Any) -> str:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((key for key in reversed(keys) if key in params), "")

    return jax.tree_util.tree_map_with_path(owner, opt_state)


def by_field(state: TrainState) -> dict[str, Any]:
    """A state as a dictionary, one level deep."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def bytes_on_a_device(tree: Any) -> int:
    """What arrays take on the device, of this process, that has most of them."""
    held: Counter[Any] = Counter()
    for x in jax.tree.leaves(tree):
        held.update({shard.device: shard.data.nbytes for shard in x.addressable_shards})
    return max(held.values())


def one_replica(values: Any, shapes: Any, number: int) -> Any:
    """A tree of arrays of `shapes`, of which those that have one more dimension give one replica's."""
    return jax.tree.map(lambda x, s: x[number] if x.ndim > len(s.shape) else x, values, shapes)


def is_shapes(tree: Any) -> bool:
    """Whether a tree holds shapes in the arrays' places."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def lying(shapes: Any, where: Any) -> Any:
    """Shapes that also say where the arrays are to lie."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The tree of PartitionSpecs as NamedShardings."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
