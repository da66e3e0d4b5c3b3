"""How what a branch makes gets into the buffers in which it waits.

XLA copies every array that a conditional returns, at every tick. So a branch only reads the buffers, and
returns one window, as large as the most that any branch writes, and where its parts belong. They are put
there behind the conditional by loops of one turn or none, which change their buffers in place.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from shardtrain.pipeline.pack import Buffers, Pack, Place, Rows, apart, dtype_of, largest, zeros

ROOM = 1.02
"""How much longer buffers may be if arrays that all stages have alike stand in buffers of their own."""

Starts = dict[str, Any]
"""Where a part of a window begins in each buffer."""

Parts = dict[str, list[Array]]
"""What stands in a part of a window for each buffer, one after the other."""

Written = tuple[dict[str, dict[str, Starts]], Buffers]
"""Where parts begin, for each kind of branch and target; and the window."""


@dataclass(frozen=True)
class Pool:
    """Slots in which arrays of each stage wait, those of one rank's stages one after the other.

    Attributes:
        rows: where they lie.
        lengths: of the buffers.
        reach: of the part that a branch writes, the same for all stages.
    """

    rows: Rows
    lengths: dict[str, int]
    reach: dict[str, int]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[Any]], depth: Sequence[int], ranks_of: Sequence[int]) -> "Pool":
        """Slots for arrays of `shapes`, `depth` of them, for each stage."""
        flat = Rows.of([Pack(row) for row in shapes], depth, ranks_of)
        own = Rows.of(list(map(Pack, shapes, apart(shapes))), depth, ranks_of)
        rows = own if own.nbytes <= ROOM * flat.nbytes else flat
        used = [k for k, slots in enumerate(depth) if slots]
        reach = largest([rows.packs[k].lengths for k in used])
        needed = []  # a part that begins at the last slot must not end behind the buffer
        for k in used:
            last = rows.starts(k, depth[k] - 1)
            needed.append({b: last.get(b, rows.bases[k].get(b, 0)) + n for b, n in reach.items()})
        return cls(rows, largest([rows.lengths, *needed]), reach)

    def slot(self, stage: int, number: Any) -> list[Place]:
        """The places of one stage's arrays in one slot."""
        return self.rows.slot(stage, number)

    def empty(self, bubble: float) -> Buffers:
        """Buffers in which nothing waits yet."""
        return zeros(self.lengths, bubble)

    def part(
        self, buffers: Mapping[str, Array], stage: int, number: Any, values: Sequence[Array]
    ) -> tuple[Starts, Parts]:
        """One stage's arrays in one slot, and behind them what is there."""
        pack, base = self.rows.packs[stage], self.rows.bases[stage]
        found, starts, parts = self.rows.starts(stage, number), {}, {}
        for b, n in self.reach.items():
            starts[b] = jnp.asarray(found.get(b, base.get(b, 0)), jnp.int32)
            parts[b] = _flat(values, pack.places, b)
            own = pack.lengths.get(b, 0)
            if own < n:
                parts[b].append(lax.dynamic_slice(buffers[b], (starts[b] + own,), (n - own,)))
        return starts, parts

    def merged(self, old: Array, part: Array, at: Array) -> Array:
        """A buffer with the part that stands in it from `at` on."""
        return lax.dynamic_update_slice(old, part, (at,))


@dataclass(frozen=True)
class Sums:
    """Sums of arrays of each stage, those of one rank's stages one after the other.

    Attributes:
        rows: where they lie.
        reach: of the part that a branch adds to, the same for all stages that add here.
    """

    rows: Rows
    reach: dict[str, int]

    @classmethod
    def of(cls, rows: Rows, stages: Sequence[int]) -> "Sums":
        """Those of some stages, at most one of a rank."""
        return cls(rows, largest([rows.packs[k].lengths for k in stages]))

    def empty(self, bubble: float) -> Buffers:
        """Nothing yet."""
        return zeros(self.rows.lengths)

    def part(self, stage: int, places: Sequence[Place], values: Sequence[Array]) -> tuple[Starts, Parts]:
        """What is added to the sums of one stage, which lie at `places`, and zeros beside it."""
        base, pack = self.rows.bases[stage], self.rows.packs[stage]
        order = sorted(range(len(places)), key=lambda i: places[i].start)
        values, places = [values[i] for i in order], [places[i] for i in order]
        starts, parts = {}, {}
        for b, n in self.reach.items():
            begin, own = base.get(b, 0), pack.lengths.get(b, 0)
            at = min(begin, self.rows.lengths[b] - n)
            starts[b] = jnp.int32(at)
            none = functools.partial(jnp.zeros, dtype=dtype_of(b))
            parts[b] = [none(begin - at), *_flat(values, places, b), none(at + n - begin - own)]
        return starts, parts

    def merged(self, old: Array, part: Array, at: Array) -> Array:
        """A buffer with what is added to it from `at` on."""
        return lax.dynamic_update_slice(old, lax.dynamic_slice(old, (at,), part.shape) + part, (at,))


def _flat(values: Sequence[Array], places: Sequence[Place], buffer: str) -> list[Array]:
    return [jnp.reshape(v, -1) for v, p in zip(values, places, strict=True) if p.buffer == buffer]


def _row(pieces: Sequence[Array], length: int, dtype: jnp.dtype) -> Array:
    """Pieces one after the other, and zeros behind them."""
    pieces = [piece for piece in pieces if piece.size]
    if len(pieces) == 1 and pieces[0].size == length:
        return pieces[0]
    row, end = jnp.zeros(length, dtype), 0
    if pieces:  # without the barrier XLA joins zeros and a piece by a pad, which is slow on CPUs
        row = lax.optimization_barrier(row)
    for piece in pieces:
        row = lax.dynamic_update_slice(row, piece, (end,))
        end += piece.size
    return row


class Window:
    """Arrays in which every branch returns what it writes.

    What goes to a buffer that all share one after the other goes through one array of its dtype, what goes to
    a buffer of one array in each slot through an array of that size.

    Args:
        kinds: what branches of each kind write, by the names of the buffers.
    """

    def __init__(self, kinds: Mapping[str, Mapping[str, Pool | Sums]]) -> None:
        self.kinds = kinds
        self.through: dict[tuple[str, str, str], str] = {}
        """Which array leads a kind of branch to a target's buffer."""
        sums = []
        for kind, targets in kinds.items():
            seen: Counter[str] = Counter()
            lengths: Counter[str] = Counter()
            for name, target in targets.items():
                for buffer, n in target.reach.items():
                    alike, _, numbered = buffer.rpartition(" ")
                    key = f"{alike} {seen[alike]}" if alike else numbered
                    self.through[kind, name, buffer] = key
                    seen[alike] += 1
                    lengths[key] += n
            sums.append(lengths)
        self.lengths = largest(sums)

    def filled(self, kind: str = "", parts: Mapping[str, tuple[Starts, Parts]] | None = None) -> Written:
        """What a branch returns that writes `parts`; without any, nothing."""
        starts: dict[str, dict[str, Starts]] = {
            key: {name: dict.fromkeys(target.reach, jnp.int32(0)) for name, target in targets.items()}
            for key, targets in self.kinds.items()
        }
        pieces: dict[str, list[Array]] = {key: [] for key in self.lengths}
        for name, (begins, values) in (parts or {}).items():
            starts[kind][name] = begins
            for buffer in begins:
                pieces[self.through[kind, name, buffer]] += values[buffer]
        return starts, {key: _row(pieces[key], n, dtype_of(key)) for key, n in self.lengths.items()}

    def put(
        self, buffers: Mapping[str, Any], acted: Mapping[str, Array], written: Written
    ) -> dict[str, Buffers]:
        """The buffers, some of `buffers`, with what a branch wrote.

        Args:
            acted: whether it was a branch of each kind.
        """
        starts, whole = written
        new: dict[str, Buffers] = {}
        for kind, targets in self.kinds.items():

            def turn(
                now: tuple[Array, dict[str, Buffers]],
                kind: str = kind,
                targets: Mapping[str, Pool | Sums] = targets,
            ) -> tuple[Array, dict[str, Buffers]]:
                _, old = now
                ends = dict.fromkeys(self.lengths, 0)
                fresh = {name: dict(old[name]) for name in targets}
                for name, target in targets.items():
                    for buffer, n in target.reach.items():
                        key, at = self.through[kind, name, buffer], starts[kind][name][buffer]
                        part = whole[key][ends[key] : ends[key] + n]
                        fresh[name][buffer] = target.merged(old[name][buffer], part, at)
                        ends[key] += n
                return jnp.bool_(False), fresh

            todo = acted[kind], {name: new.get(name, buffers[name]) for name in targets}
            new |= lax.while_loop(lambda now: now[0], turn, todo)[1]
        return new
