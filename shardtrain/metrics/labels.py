"""Labels beside class scores: whether they fit, and which class each is."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Integer, Num

from shardtrain.errors import UserError


def one_hot(labels: Integer[Array, "*shape"], classes: int) -> Bool[Array, "*shape classes"]:
    """Which class each label is; none for a label that is no class."""
    return widened(labels)[..., None] == jnp.arange(classes)


def widened(labels: Integer[Array, "*shape"]) -> Integer[Array, "*shape"]:
    """Labels as int32 at least, so that they compare with every class number and with -1."""
    return labels.astype(jnp.promote_types(labels.dtype, jnp.int32))


def refuse_labels(
    outputs: Num[Array, "..."], labels: Integer[Array, "..."], classes: int | None = None
) -> None:
    """Raises unless there is one label for every vector of class scores.

    Args:
        outputs: scores, the classes last.
        labels: of the outputs' shape without the classes.
        classes: how many there must be; any number if None.

    Raises:
        UserError: says what the shapes are, and what they should be.
    """
    if outputs.ndim < 2 or outputs.shape[:-1] != labels.shape:
        raise UserError(
            f"outputs of shape {outputs.shape} do not fit labels of shape {labels.shape}; give scores of the "
            f"labels' shape and one more dimension, the classes"
        )
    if classes is not None and outputs.shape[-1] != classes:
        raise UserError(
            f"the metric was made for {classes} classes, and the outputs of shape {outputs.shape} have "
            f"{outputs.shape[-1]}; give classes={outputs.shape[-1]}"
        )
