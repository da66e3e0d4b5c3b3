"""A model's own random draws in a microbatch: those of its examples in the whole batch.

A model draws with `jax.random.normal(self.rngs.noise(), x.shape)` whatever batch it is called with. In a
microbatch the same key would give its first example the numbers of the batch's first, and so in every
microbatch. Therefore keys in a microbatch have a random generator of their own. Where it is asked for bits of
a shape that begins with the rows of the microbatch, it draws those of the whole batch and returns the
microbatch's rows; likewise where a key is split into one for each row. The numbers are then the same with and
without microbatches, whatever function of `jax.random` makes them of bits.

The generator knows rows by their number alone. Draws of another kind whose first dimension happens to be as
long as a microbatch, such as a mask of weights, are new in each microbatch then.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import define_prng_impl

OF_AN_EXAMPLE = np.uint32(2**32 - 1)
"""In place of the number of a microbatch, in a key that belongs to one example already."""


_BASES: dict[Any, Any] = {}
"""By each of our generators the one from whose bits it takes its own."""


@dataclass(frozen=True)
class Part:
    """A microbatch of a batch: the examples `number`, `number + parts`, and so on.

    Attributes:
        rows: examples of the microbatch.
        parts: microbatches of the batch.
        number: of the microbatch, a whole number that may be traced.
    """

    rows: int
    parts: int
    number: Any

    def key(self, words: Array, base: Any) -> Array:
        """The random key of a generator `base` with these raw words, as the microbatch uses it."""
        number = jnp.broadcast_to(jnp.asarray(self.number, words.dtype), (*words.shape[:-1], 1))
        words = jnp.concatenate([words, number], axis=-1)
        return jax.random.wrap_key_data(words, impl=_generator(base, self.rows, self.parts))


def key_of_batch(key: Array) -> Array:
    """The key without the microbatch, for layers that draw for each example by its number in the batch."""
    base = (
        _BASES.get(jax.random.key_impl(key))
        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        else None
    )
    return key if base is None else jax.random.wrap_key_data(jax.random.key_data(key)[..., :-1], impl=base)


@functools.lru_cache
def _generator(base: Hashable, rows: int, parts: int) -> Any:
    def key_of(words: Array) -> Array:
        return jax.random.wrap_key_data(words[:-1], impl=base)

    def with_number(keys: Array, words: Array) -> Array:
        new = jax.random.key_data(keys)
        return jnp.concatenate([new, jnp.broadcast_to(words[-1:], (*new.shape[:-1], 1))], axis=-1)

    def bits(words: Array, width: int, shape: tuple[int, ...]) -> Array:
        dtype = jnp.dtype(f"uint{width}")
        if shape[:1] != (rows,):
            return jax.random.bits(key_of(words), shape, dtype)
        drawn = jax.random.bits(key_of(words), (rows * parts, *shape[1:]), dtype)
        drawn = drawn.reshape(rows, parts, *shape[1:])
        mine = jax.lax.dynamic_index_in_dim(drawn, words[-1], 1, keepdims=False)
        return jnp.where(words[-1] == OF_AN_EXAMPLE, jax.random.bits(key_of(words), shape, dtype), mine)

    def split(words: Array, shape: tuple[int, ...]) -> Array:
        if shape[:1] != (rows,) or rows == 2:  # as almost always two keys are no keys by example
            return with_number(jax.random.split(key_of(words), shape), words)
        keys = jax.random.split(key_of(words), (rows * parts, *shape[1:])).reshape(rows, parts, *shape[1:])
        mine = with_number(
            jax.lax.dynamic_index_in_dim(keys, words[-1], 1, keepdims=False),
            jnp.full(1, OF_AN_EXAMPLE, words.dtype),
        )
        other = with_number(jax.random.split(key_of(words), shape), words)
        return jnp.where(words[-1] == OF_AN_EXAMPLE, other, mine)

    size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=base))).shape[-1]
    made = define_prng_impl(
        key_shape=(size + 1,),
        seed=lambda seed: with_number(jax.random.key(seed, impl=base), jnp.zeros(1, jnp.uint32)),
        split=split,
        random_bits=bits,
        fold_in=lambda words, data: with_number(jax.random.fold_in(key_of(words), data), words),
        name=f"{base} of {rows} rows in {parts} microbatches",
        tag="microbatch",
    )
    _BASES[made] = base
    return made
