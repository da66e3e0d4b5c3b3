"""Tells layers which examples of the batch they are applied to: dropout and batch statistics depend on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from shardtrain.errors import UserError


@dataclass(frozen=True)
class Examples:
    """The rows of the batch or microbatch that a model is applied to.

    Attributes:
        index: of each row in the whole batch. Dropout draws by it, so that its masks depend neither on the
            mesh nor on gradient accumulation.
        real: False for rows that only pad a ragged batch, which batch statistics leave out; None if all rows
            are real.
        summing: whether layers sum batch statistics over microbatches instead of updating the running ones;
            the training step then updates them with those of the whole batch.
        times: rows of each example, if another dimension was merged into the batch.
    """

    index: Int[Array, " batch"]
    real: Bool[Array, " batch"] | None = None
    summing: bool = False
    times: int = 1

    def for_rows(self, rows: int) -> "Examples":
        """These examples for `rows` rows, a multiple of them if a dimension was merged into the batch."""
        times, rest = divmod(rows, self.index.shape[0])
        if rest or not times:
            raise UserError(
                f"a layer got {rows} rows for a batch of {self.index.shape[0]} examples; keep the batch the "
                f"leading dimension, merged with others only as reshape((batch * n, ...))"
            )
        index = (self.index[:, None] * times + jnp.arange(times)).reshape(-1)
        real = None if self.real is None else jnp.repeat(self.real, times)
        return Examples(index, real, self.summing, times)


_current: ContextVar[Examples | None] = ContextVar("examples", default=None)


@contextmanager
def examples(
    index: Int[Array, " batch"], real: Bool[Array, " batch"] | None = None, *, summing: bool = False
) -> Iterator[None]:
    """Within it, layers take their rows for these examples. The trainer does this by itself.

    Args:
        index: of each row in the whole batch.
        real: False for rows that only pad a ragged batch; all are real by default.
        summing: whether layers sum their batch statistics, see `Examples`.

    Example:
        >>> norm = st.nn.BatchNorm(3, use_running_average=False, rngs=nnx.Rngs(0))
        >>> with st.nn.examples(jnp.arange(4), jnp.array([True, True, True, False])):
        ...     norm(jnp.ones((4, 3))).shape
        (4, 3)
    """
    token = _current.set(Examples(index, real, summing))
    try:
        yield
    finally:
        _current.reset(token)


def current_examples(rows: int) -> Examples:
    """The examples of the enclosing `examples`; without one, `rows` real examples in order."""
    found = _current.get()
    return Examples(jnp.arange(rows)) if found is None else found.for_rows(rows)
