"""Which examples of the batch a model is being applied to, for the layers that must know."""

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
    """The rows of the (micro)batch at hand.

    Attributes:
        index: each row's place in the whole batch. Dropout draws by it, so that a mask depends neither on
            the mesh nor on gradient accumulation.
        real: False for rows that only fill up a ragged batch. Batch statistics leave them out.
        summing: running statistics are not moved but summed, for the step to take the whole batch's.
        times: rows of each example.
    """

    index: Int[Array, " batch"]
    real: Bool[Array, " batch"] | None = None
    summing: bool = False
    times: int = 1

    def for_rows(self, rows: int) -> "Examples":
        """The same for activations of `rows` rows: a multiple, if time was merged into the batch."""
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
    """Says for the calls inside which examples they see; the trainer does this, users rarely need to.

    Example:
        >>> with examples(jnp.arange(4), jnp.array([True, True, True, False])):
        ...     y = BatchNorm(3, rngs=nnx.Rngs(0))(jnp.ones((4, 3)))
    """
    token = _current.set(Examples(index, real, summing))
    try:
        yield
    finally:
        _current.reset(token)


def current_examples(rows: int) -> Examples:
    """The examples of the enclosing `examples`, or all rows in order without one."""
    found = _current.get()
    return Examples(jnp.arange(rows)) if found is None else found.for_rows(rows)
