"""Losses and scores with one value per example, so that means over real examples are exact on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from shardtrain.errors import UserError


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy with integer labels, in nats; NaN for a label that is no class.

    Example:
        >>> cross_entropy(jnp.zeros((2, 10)), jnp.array([3, 1]))  # log(10) each
        Array([2.3025851, 2.3025851], dtype=float32)
    """
    exists = (labels >= 0) & (labels < logits.shape[-1])
    values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(exists, labels, 0))
    return jnp.where(exists, values, jnp.nan)


def mean_squared_error(
    outputs: Float[Array, "batch *features"], targets: Float[Array, "batch *features"]
) -> Float[Array, " batch"]:
    """Mean of squared differences over an example's features.

    Example:
        >>> mean_squared_error(jnp.ones((2, 3)), jnp.zeros((2, 3)))
        Array([1., 1.], dtype=float32)
    """
    return ((outputs - targets) ** 2).reshape(outputs.shape[0], -1).mean(axis=1)


def pixel_cross_entropy(
    logits: Float[Array, "batch *spatial classes"],
    labels: Int[Array, "batch *spatial"],
    ignore_label: int | None = None,
) -> Float[Array, " batch"]:
    """Softmax cross-entropy of every pixel with its label, the mean over an example's pixels, in nats.

    Args:
        logits: one number for each pixel and class.
        labels: the class of each pixel. A label that is no class makes the loss NaN.
        ignore_label: pixels with this label, often 255, are left out; an example of such pixels alone has the
            loss 0. For a trainer: `loss=functools.partial(pixel_cross_entropy, ignore_label=255)`.

    Example:
        >>> pixel_cross_entropy(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 4, 4), int))  # log(3) each
        Array([1.0986123, 1.0986123], dtype=float32)
    """
    exists = (labels >= 0) & (labels < logits.shape[-1])
    # Not optax's, whose gather has a scatter as its gradient: XLA folds that into a constant of all pixels.
    true = labels[..., None] == jnp.arange(logits.shape[-1])
    pixels = jax.nn.logsumexp(logits, axis=-1) - jnp.where(true, logits, 0).sum(-1)
    pixels, space = jnp.where(exists, pixels, jnp.nan), tuple(range(1, pixels.ndim))
    if ignore_label is None:
        return pixels.mean(space)
    counts = labels != ignore_label
    return jnp.where(counts, pixels, 0).sum(space) / jnp.maximum(counts.sum(space), 1)


def dice(
    logits: Float[Array, "batch *spatial classes"],
    labels: Int[Array, "batch *spatial"],
    ignore_label: int | None = None,
) -> Float[Array, " batch"]:
    """The Dice coefficient of the predicted classes, the mean over all but class 0, the background.

    `2 |A and B| / (|A| + |B|)`; a class that is in neither labels nor prediction counts as 1. Pixels with the
    label `ignore_label` are left out.

    Example:
        >>> dice(jnp.eye(2)[jnp.array([[0, 1, 1, 0]])], jnp.array([[0, 1, 0, 0]]))  # 2 * 1 / (2 + 1)
        Array([0.6666667], dtype=float32)

    References:
        Dice, Measures of the Amount of Ecologic Association Between Species, 1945.
    """
    classes = jnp.arange(1, logits.shape[-1])
    counts = jnp.ones(labels.shape, bool) if ignore_label is None else labels != ignore_label
    found, true = ((c[..., None] == classes) & counts[..., None] for c in (logits.argmax(-1), labels))
    space = tuple(range(1, labels.ndim))
    both, either = (found & true).sum(space), found.sum(space) + true.sum(space)
    return jnp.where(either > 0, 2 * both / jnp.maximum(either, 1), 1).mean(-1).astype(logits.dtype)


def accuracy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """1 where the largest logit is the label's, 0 elsewhere.

    Example:
        >>> accuracy(jnp.array([[0.0, 1.0]]), jnp.array([1]))
        Array([1.], dtype=float32)
    """
    return (logits.argmax(-1) == labels).astype(logits.dtype)


BY_LABEL = (cross_entropy, pixel_cross_entropy, accuracy, dice)
"""The functions whose targets are whole numbers, the class of each example or pixel."""


def _by_label(function: Any) -> Any:
    """The function of `BY_LABEL` that a function is, or is a partial of; None for others."""
    plain = getattr(function, "func", function)
    return plain if plain in BY_LABEL else None


def refuse_labels(function: Any, outputs: Any, labels: Any) -> None:
    """Refuses targets that are no labels for a function that takes labels.

    Args:
        function: any loss or metric; only those in `BY_LABEL` are looked at.
        outputs, labels: what it is to be called with.

    Raises:
        UserError: says what the targets are, and how to make labels of them.
    """
    if (named := _by_label(function)) is None:
        return
    name = named.__name__
    if not hasattr(labels, "dtype"):
        raise UserError(
            f"the targets are {type(labels).__name__}, and {name} takes an array of labels; give batches of "
            f"(inputs, labels), or another loss= or objective="
        )
    if not hasattr(outputs, "shape"):
        raise UserError(
            f"the model returns {type(outputs).__name__}, and {name} takes one array of logits; give a loss= "
            f"or an objective= that takes these outputs"
        )
    expected = outputs.shape[:-1]
    given = f"the labels have dtype {labels.dtype} and shape {labels.shape}"
    if labels.shape == outputs.shape and labels.shape[-1:] != (1,):
        raise UserError(f"{given}, a number for each class; {name} takes one class: give labels.argmax(-1)")
    if labels.shape != expected:
        single = labels.shape == (*expected, 1)
        advice = "labels.squeeze(-1)" if single else f"labels of shape {expected}"
        raise UserError(f"{given} for outputs of shape {outputs.shape}; give {advice}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(f"{given}; {name} takes classes, from 0: give labels.astype('int32')")


def refuse_classes(function: Any, labels: Any, classes: int) -> None:
    """Refuses labels of a host batch that are no classes, for a function that takes labels.

    Args:
        function: any loss; only those in `BY_LABEL` and partials of them are looked at.
        labels: whole numbers.
        classes: of the model's outputs.

    Raises:
        UserError: names such a label.
    """
    ignored = getattr(function, "keywords", {}).get("ignore_label")
    if _by_label(function) is None or not labels.size:
        return
    if labels.min() >= 0 and labels.max() < classes:
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    wrong = wrong if ignored is None else wrong[wrong != ignored]
    if wrong.size:
        advice = f"; functools.partial(loss, ignore_label={wrong[0]}) leaves these pixels out"
        advice = advice if labels.ndim > 1 else ""
        raise UserError(
            f"a batch has the label {wrong[0]}, and the model's outputs are for {classes} classes, from 0 to "
            f"{classes - 1}{advice}"
        )
