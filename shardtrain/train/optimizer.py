"""The optimizer as the trainer runs it: what it asks of a step, and its state as plain arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from shardtrain.errors import UserError
from shardtrain.nn.variables import keys_as_words, words_as_keys


@dataclass(frozen=True)
class Optimizer:
    """An optax transformation whose state has arrays alone.

    Random keys, which some transformations keep in their state, are stored as their raw words.

    Attributes:
        transformation: of the gradients.
        template: the shapes of its own state, in which keys are keys.
    """

    transformation: optax.GradientTransformationExtraArgs
    template: Any

    @classmethod
    def of(cls, optimizer: Any, params: Mapping[str, Any], clip_norm: float | None = None) -> "Optimizer":
        """An optimizer for parameters, of which the shapes are enough.

        Args:
            optimizer: what a user gives.
            params: the parameters by name.
            clip_norm: the global norm to which gradients are clipped before.

        Raises:
            UserError: no optax transformation, or one that a training step cannot serve.
        """
        _refuse_others(optimizer)
        if clip_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
        transformation = optax.with_extra_args_support(optimizer)
        shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(params)))
        try:
            one = cls(transformation, jax.eval_shape(transformation.init, shapes))
            loss = jax.ShapeDtypeStruct((), jnp.float32)
            jax.eval_shape(one.update, shapes, keys_as_words(one.template), shapes, loss)
        except (TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            raise UserError(
                f"the optimizer does not take these parameters ({type(error).__name__}: {error}); its update "
                f"is called with the gradients, its state, the parameters (a dictionary of arrays by name), "
                f"and as keywords the loss, value=, and the gradients, grad=; a line search, which evaluates "
                f"the loss elsewhere, is not possible"
            ) from error
        return one

    def init(self, params: Mapping[str, Any]) -> Any:
        """The state before the first update."""
        return keys_as_words(self.transformation.init(dict(params)))

    def update(self, grads: Any, state: Any, params: Any, loss: Array) -> tuple[Any, Any]:
        """The changes of the parameters and the new state.

        Args:
            grads: the mean gradients.
            state: as `init` or this function returned it.
            params: the parameters.
            loss: the mean loss, for transformations that take `value`.
        """
        own = words_as_keys(state, self.template)
        updates, new = self.transformation.update(grads, own, params, value=loss, grad=grads)
        return updates, keys_as_words(new)


def _refuse_others(optimizer: Any) -> None:
    """Refuses what is no optax transformation.

    Raises:
        UserError: says what to give.
    """
    if isinstance(optimizer, str):
        raise UserError(f"the optimizer is {optimizer!r}; give one of optax, such as optax.{optimizer}(1e-3)")
    if isinstance(optimizer, nnx.Optimizer):
        raise UserError(
            "the optimizer is an nnx.Optimizer, which has parameters of its own; give the optax "
            "transformation in it (its tx)"
        )
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        found = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise UserError(
            f"the optimizer is {found}, which has no init and update; give an optax transformation, such as "
            f"optax.adam(1e-3)"
        )
