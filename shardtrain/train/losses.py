"""Losses and metrics: one value for every example, so that means are over real examples on any mesh."""

import optax
from jax import Array
from jaxtyping import Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy with integer labels, in nats.

    Example:
        >>> cross_entropy(jnp.zeros((2, 10)), jnp.array([3, 1]))  # log(10) each
        Array([2.3025851, 2.3025851], dtype=float32)
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def mean_squared_error(
    outputs: Float[Array, "batch *features"], targets: Float[Array, "batch *features"]
) -> Float[Array, " batch"]:
    """Mean of squared differences over an example's features.

    Example:
        >>> mean_squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3)))
        Array([1., 1.], dtype=float32)
    """
    return ((outputs - targets) ** 2).reshape(outputs.shape[0], -1).mean(axis=1)


def accuracy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """1 where the largest logit is the label's, 0 elsewhere.

    Example:
        >>> accuracy(jnp.array([[0.0, 1.0]]), jnp.array([1]))
        Array([1.], dtype=float32)
    """
    return (logits.argmax(-1) == labels).astype(logits.dtype)
