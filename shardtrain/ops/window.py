"""How one dimension of a windowed operator (convolution, pooling) is cut: pure arithmetic, no arrays.

Input and output are both cut in equal blocks of `ceil(extent / shards)` rows, the last ones padded: the
tiling XLA itself gives to an uneven dimension, so cropping the padding moves nothing. Shard `i` owns the
outputs `[i*block_out, (i+1)*block_out)` and so needs the inputs `[start(i), start(i) + need)`, of which it
owns `[i*block_in, (i+1)*block_in)`; the rest are halos, from as many neighbours as it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jax import lax

from shardtrain.errors import UserError

Pads = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """One dimension of a windowed operator over `shards` shards.

    Attributes:
        extent: input rows, of all shards together.
        size: rows of the window, dilation included.
        stride: input rows from one output to the next.
        pad: rows of padding before and after (negative crops).
        shards: how many devices cut this dimension.
        axes: the mesh axes they lie on.
    """

    extent: int
    size: int
    stride: int
    pad: tuple[int, int]
    shards: int = 1
    axes: tuple[str, ...] = ()

    @property
    def extent_out(self) -> int:
        return max(0, (self.extent + sum(self.pad) - self.size) // self.stride + 1)

    @property
    def block_in(self) -> int:
        return -(-self.extent // self.shards)

    @property
    def block_out(self) -> int:
        return -(-self.extent_out // self.shards)

    @property
    def need(self) -> int:
        """Input rows that one shard's outputs are computed from."""
        return (self.block_out - 1) * self.stride + self.size

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        """(shard, first row needed, row after the last needed) of the shards that own real outputs."""
        step = self.block_out * self.stride
        last = (self.extent_out - 1) * self.stride - self.pad[0] + self.size
        busy = range(-(-self.extent_out // self.block_out))
        starts = [i * step - self.pad[0] for i in busy]
        return [(i, start, min(start + self.need, last)) for i, start in zip(busy, starts, strict=True)]

    @cached_property
    def halo(self) -> tuple[int, int]:
        """Rows before and after its own block that some shard must be sent: those that exist."""
        low = max(min(i * self.block_in - start, i * self.block_in) for i, start, _ in self._spans)
        high = max(min(stop, self.extent) - (i + 1) * self.block_in for i, _, stop in self._spans)
        return max(0, low), max(0, high)

    def hops(self, rows: int) -> list[int]:
        """`rows` of halo as the rows taken from the 1st, 2nd, ... neighbour."""
        return [min(self.block_in, rows - taken) for taken in range(0, rows, self.block_in)]

    @property
    def drift(self) -> int:
        """Rows by which a shard's first needed row moves against its block, from shard to shard."""
        return self.block_out * self.stride - self.block_in

    @cached_property
    def _reach(self) -> int:
        """Rows before its own block that some shard needs, padding included."""
        return max(0, *(i * self.block_in - start for i, start, _ in self._spans))

    @property
    def first(self) -> int:
        """Where shard 0's outputs begin in its block extended by `_reach` rows in front."""
        return self._reach - self.pad[0]

    @property
    def fill(self) -> tuple[int, int]:
        """Rows of padding to add before and after the block and its halos."""
        total = max(self.first + i * self.drift + self.need for i, _, _ in self._spans)
        low, high = self.halo
        return self._reach - low, max(0, total - self._reach - self.block_in - high)


def tuple_of(value: int | Sequence[int] | None, rank: int, what: str) -> tuple[int, ...]:
    """`value` for each of `rank` dimensions.

    Raises:
        UserError: the wrong number of values, or one below 1.
    """
    values = (1 if value is None else value,) * rank if isinstance(value, int | None) else tuple(value)
    if len(values) != rank or any(v < 1 for v in values):
        raise UserError(f"{what}={value} for {rank} spatial dimensions; give one positive number or {rank}")
    return values


def pads_of(
    padding: str | int | Sequence[int | tuple[int, int]],
    extents: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    """Rows of padding before and after, for every dimension.

    Args:
        padding: `"SAME"`, `"VALID"`, `"CAUSAL"` (1-D), one number, or for each dimension a number or a
            `(before, after)` pair, as in Flax.

    Raises:
        UserError: anything else.
    """
    if isinstance(padding, str):
        name = padding.upper()
        if name in ("SAME", "VALID"):
            return [(int(a), int(b)) for a, b in lax.padtype_to_pads(extents, sizes, strides, name)]
        if name == "CAUSAL" and len(extents) == 1:
            return [(sizes[0] - 1, 0)]
        raise UserError(f"padding={padding!r}: use 'SAME', 'VALID', a number, or (before, after) pairs")
    if isinstance(padding, int):
        padding = [padding] * len(extents)
    if len(padding) != len(extents):
        raise UserError(f"padding={padding}: {len(extents)} spatial dimensions need {len(extents)} entries")
    return [(p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding]
