"""How what a branch makes gets into the buffers in which it waits.

XLA copies every array that a conditional returns, at every tick. So a branch only reads the buffers, and
returns one window, as large as the most that any branch writes, and where its parts belong. They are put
there behind the conditional by loops of one turn or none, which change their buffers in place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from shardtrain.pipeline.pack import Buffers, Pack, Place, largest, zeros

Starts = dict[str, Any]
"""Where a part of a window begins in the buffer of each dtype."""

Parts = dict[str, list[Array]]
"""Of each dtype what stands in a part of a window, one after the other."""


@dataclass(frozen=True)
class Pool:
    """Slots in which arrays of each stage wait, those of one rank's stages one after the other.

    Attributes:
        packs: of the arrays of each stage.
        bases: where each stage's first slot begins.
        lengths: of the buffers.
        reach: of the part that a branch writes, the same for all stages.
    """

    packs: tuple[Pack, ...]
    bases: tuple[dict[str, int], ...]
    lengths: dict[str, int]
    reach: dict[str, int]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[Any]], depth: Sequence[int], ranks_of: Sequence[int]) -> "Pool":
        """Slots for arrays of `shapes`, `depth` of them, for each stage."""
        packs = tuple(Pack(row) for row in shapes)
        reach = largest([pack.lengths for pack, slots in zip(packs, depth, strict=True) if slots])
        ends: dict[int, dict[str, int]] = {}
        bases, needed = [], []
        for pack, slots, rank in zip(packs, depth, ranks_of, strict=True):
            base = dict(ends.setdefault(rank, {}))
            bases.append(base)
            for dtype, length in pack.lengths.items():
                ends[rank][dtype] = base.get(dtype, 0) + slots * length
            if slots:  # a part that begins at the last slot must not end behind the buffer
                last = {d: base.get(d, 0) + (slots - 1) * pack.lengths.get(d, 0) for d in reach}
                needed.append({d: last[d] + n for d, n in reach.items()})
        return cls(packs, tuple(bases), largest([*ends.values(), *needed]), reach)

    def slot(self, stage: int, number: Any) -> list[Place]:
        """The places of one stage's arrays in one slot."""
        return self.packs[stage].at(self._starts(stage, number))

    def part(
        self, buffers: Mapping[str, Array], stage: int, number: Any, values: Sequence[Array]
    ) -> tuple[Starts, Parts]:
        """One stage's arrays in one slot, and behind them what is there."""
        starts, pack = self._starts(stage, number), self.packs[stage]
        parts: Parts = {}
        for d, n in self.reach.items():
            parts[d] = [jnp.reshape(v, -1) for v, p in zip(values, pack.places, strict=True) if p.dtype == d]
            own = pack.lengths.get(d, 0)
            if own < n:
                parts[d].append(lax.dynamic_slice(buffers[d], (starts[d] + own,), (n - own,)))
        return starts, parts

    def _starts(self, stage: int, number: Any) -> Starts:
        pack, base = self.packs[stage], self.bases[stage]
        return {d: base.get(d, 0) + number * pack.lengths.get(d, 0) for d in {*self.reach, *pack.lengths}}


class Window:
    """One array of each dtype, in which every branch returns what it writes.

    Args:
        targets: the buffers.
        kinds: which of them a branch of each kind writes.
    """

    def __init__(self, targets: Mapping[str, Pool], kinds: Mapping[str, Sequence[str]]) -> None:
        self.targets, self.kinds = targets, kinds
        sums = []
        for names in kinds.values():
            dtypes = {d for name in names for d in targets[name].reach}
            sums.append({d: sum(targets[name].reach.get(d, 0) for name in names) for d in dtypes})
        self.lengths = largest(sums)

    def nothing(self) -> tuple[dict[str, Starts], Buffers]:
        """What a branch returns that writes nothing."""
        starts = {name: dict.fromkeys(target.reach, jnp.int32(0)) for name, target in self.targets.items()}
        return starts, zeros(self.lengths)

    def filled(
        self, kind: str, parts: Mapping[str, tuple[Starts, Parts]]
    ) -> tuple[dict[str, Starts], Buffers]:
        """What a branch returns that writes `parts`."""
        starts, _ = self.nothing()
        for name, (begins, _) in parts.items():
            starts[name] = {d: jnp.asarray(begins[d], jnp.int32) for d in starts[name]}
        whole = zeros(self.lengths)
        for d in whole:
            end = 0
            for value in (v for name in self.kinds[kind] for v in parts[name][1].get(d, [])):
                whole[d] = lax.dynamic_update_slice(whole[d], value, (end,))
                end += value.size
        return starts, whole

    def put(
        self,
        buffers: Mapping[str, Buffers],
        acted: Mapping[str, Array],
        written: tuple[dict[str, Starts], Buffers],
    ) -> dict[str, Buffers]:
        """The buffers with what a branch wrote.

        Args:
            acted: whether it was a branch of each kind.
        """
        starts, whole = written
        new = dict(buffers)
        for kind, names in self.kinds.items():

            def turn(now: tuple[Array, dict[str, Buffers]], names: Sequence[str] = names) -> Any:
                _, old = now
                ends = dict.fromkeys(self.lengths, 0)
                fresh: dict[str, Buffers] = {name: dict(old[name]) for name in names}
                for name in names:
                    target = self.targets[name]
                    for d, n in target.reach.items():
                        part, at = whole[d][ends[d] : ends[d] + n], (starts[name][d],)
                        fresh[name][d] = lax.dynamic_update_slice(old[name][d], part, at)
                        ends[d] += n
                return jnp.bool_(False), fresh

            todo = acted[kind], {name: new[name] for name in names}
            new |= lax.while_loop(lambda now: now[0], turn, todo)[1]
        return new
