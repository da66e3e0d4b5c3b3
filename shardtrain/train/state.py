"""The state of a run in one tree of named arrays, and where each lies on the mesh."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.nn.variables import Variables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run is, law 7: nothing outside this tree changes from step to step.

    Attributes:
        step: updates done; with the seed it is also the position in the data.
        params: parameters by name (`"blocks.0.conv1.kernel"`).
        model_state: the model's other variables by name: running statistics, random streams.
        opt_state: the optimizer's state, a tree of the same names.
        extra: other trees by name. An array in them is placed like the parameter under whose name it is (EMA
            weights), or is whole on every device.

    Trees of the same form hold shapes, shardings or PartitionSpecs in the arrays' places. On a mesh with
    `pipe` the last three are packed, see `pipeline.hold`.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    extra: Any = dataclasses.field(default_factory=dict)


def initial_state(
    variables: Variables, optimizer: optax.GradientTransformation, mesh: Mesh, specs: Any, *, staged: bool
) -> TrainState:
    """The state before the first update; of a model of shapes, shapes.

    Args:
        variables: of the model.
        optimizer: makes its own state.
        mesh, specs: where arrays are to lie.
        staged: where they lie is known only when the first batch is seen, and they wait on the host.
    """
    params, model_state = variables.values()
    if is_shapes(params):
        opt = jax.eval_shape(optimizer.init, params)
        shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, model_state, opt)
        return shapes if staged else lying(shapes, shardings(mesh, specs))
    if staged:
        params, model_state = jax.tree.map(np.array, (params, model_state))
        opt = jax.tree.map(np.asarray, optimizer.init(params))
        return TrainState(np.zeros((), np.int32), params, model_state, opt)
    where = shardings(mesh, specs)
    # A copy: the step donates its state, and the caller's model keeps its own arrays.
    params, model_state = jax.tree.map(
        lambda x, s: jax.device_put(np.array(x), s),
        (params, model_state),
        (where.params, where.model_state),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=where.opt_state)(params)
    step = jax.device_put(np.zeros((), np.int32), where.step)
    return TrainState(step, params, model_state, opt_state)


def owners(opt_state: Any, params: Collection[str]) -> Any:
    """The name of the parameter that each leaf of an optimizer's state belongs to, `""` for none.

    Optimizers keep what belongs to a parameter under its name, alone, in a group of names or masked.
    """

    def owner(path: tuple, _: Any) -> str:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((key for key in reversed(keys) if key in params), "")

    return jax.tree_util.tree_map_with_path(owner, opt_state)


def opt_state_specs(
    optimizer: optax.GradientTransformation, params: Mapping[str, Any], specs: Mapping[str, P]
) -> Any:
    """How the optimizer's state lies on the mesh: like the parameter where it has its shape, else whole."""
    shapes = jax.eval_shape(optimizer.init, dict(params))
    return jax.tree.map(
        lambda leaf, name: specs[name] if name and leaf.shape == params[name].shape else P(),
        shapes,
        owners(shapes, params),
    )


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
