"""A model's variables as flat dictionaries of named arrays, and back into the model."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.layout import Layout
from shardtrain.nn import partition
from shardtrain.nn.base import name
from shardtrain.nn.draws import Part


class Variables:
    """A model's variables as flat dictionaries by name, and back into the model.

    Args:
        model: the model; its values are read once.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.layers = tuple(partition.leaves(model))
        model.train()
        self.train_graph, self._params, self._state = _split(model)
        model.eval()
        self.eval_graph, _, _ = _split(model)
        model.train()

    def values(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parameters and other variables by name, arrays or shapes; random keys as their raw words."""
        return flatten(self._params), flatten(self._state)

    def model(
        self,
        params: Mapping[str, Array],
        model_state: Mapping[str, Array],
        *,
        train: bool,
        part: Part | None = None,
    ) -> nnx.Module:
        """The model with these values, usable inside `jit`.

        Args:
            params, model_state: the values.
            train: in training or evaluation mode.
            part: the microbatch that it is to be called with, whose examples its random draws are for.
        """
        graph = self.train_graph if train else self.eval_graph
        return nnx.merge(graph, fill(self._params, params), fill(self._state, model_state, part))

    def state_of(self, model: nnx.Module) -> dict[str, Array]:
        """The variables of a model that are not parameters, after a call may have changed them.

        A variable that the call has added, as models do that keep a part of their loss, is dropped.

        Raises:
            UserError: the call has added variables by `nnx.sow`.
        """
        state = _split(model)[2]
        if sown := [name(path) for path, v in nnx.to_flat_state(state) if isinstance(v, nnx.Intermediate)]:
            raise UserError(
                f"the model sows {sown[0]!r}, which a training step has no place for; leave out nnx.sow, and "
                f"look at intermediates by nnx.capture on trainer.model"
            )
        known = {name(path) for path, _ in nnx.to_flat_state(self._state)}
        state = nnx.from_flat_state([(p, v) for p, v in nnx.to_flat_state(state) if name(p) in known])
        return flatten(state)

    def is_random(self) -> dict[str, bool]:
        """For each variable that is not a parameter, whether it belongs to a random stream."""
        return {name(p): isinstance(v, nnx.RngState) for p, v in nnx.to_flat_state(self._state)}

    def key_names(self) -> set[str]:
        """Names of the variables that are random keys; a call counts its draws and leaves the keys alone."""
        values = {name(p): v.get_value() for p, v in nnx.to_flat_state(self._state)}
        return {key for key, value in values.items() if _is_key(value)}

    def specs(self, model: nnx.Module, mesh: Mesh, layout: Layout) -> tuple[dict[str, P], dict[str, P]]:
        """PartitionSpecs of parameters and of other variables on `mesh`, by name."""
        by_path = partition.parameter_spec(model, mesh, layout)
        params, state = (
            {name(path): by_path[path] for path, _ in nnx.to_flat_state(tree)}
            for tree in (self._params, self._state)
        )
        return params, state


def _split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """The model's graph, its parameters, and its other variables."""
    return nnx.split(model, nnx.Param, ...)  # type: ignore[return-value]


def flatten(state: nnx.State) -> dict[str, Any]:
    """Values by name, random keys as their raw words."""
    return keys_as_words({name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)})


def fill(template: nnx.State, values: Mapping[str, Array], part: Part | None = None) -> nnx.State:
    """The inverse of `flatten`: the state `template` with these values, random keys for a microbatch."""

    def filled(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(words_as_keys(values[name(path)], variable.get_value(), part))

    return nnx.from_flat_state([(path, filled(path, v)) for path, v in nnx.to_flat_state(template)])


def keys_as_words(tree: Any) -> Any:
    """A tree of arrays or shapes with random keys as their raw words, which files can store."""
    return jax.tree.map(lambda x: _words(x) if _is_key(x) else x, tree)


def words_as_keys(tree: Any, template: Any, part: Part | None = None) -> Any:
    """The inverse of `keys_as_words`: keys where `template`, a tree of the same structure, has keys."""

    def key_of(new: Any, old: Any) -> Any:
        if not _is_key(old):
            return new
        base = _implementation(old)
        return jax.random.wrap_key_data(new, impl=base) if part is None else part.key(new, base)

    return jax.tree.map(key_of, tree, template)


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _words(key: Any) -> Any:
    """A random key's raw words, or their shape."""
    words = jax.random.key_data
    return jax.eval_shape(words, key) if isinstance(key, jax.ShapeDtypeStruct) else words(key)


def _implementation(key: Any) -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)  # a shape has one, too
    return found[0]
