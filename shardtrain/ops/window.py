"""How one dimension of a windowed operator (convolution, pooling, resizing) is cut: arithmetic, no arrays.

Input and output are both cut into equal blocks of `ceil(extent / shards)` rows, of which the last are padded.
XLA stores an uneven dimension in the same blocks, so cropping the padding sends nothing. Shard `i` owns the
outputs `[i*block_out, (i+1)*block_out)` and needs the inputs `[start(i), start(i) + need)`. It owns those in
`[i*block_in, (i+1)*block_in)`; the others are halos, which one or several neighbours send.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from shardtrain.errors import UserError

AnyReach = TypeVar("AnyReach", bound="Reach")


class Span(NamedTuple):
    """The inputs `[start, stop)` that the outputs of `shard` read; outside of the input they are padding."""

    shard: int
    start: int
    stop: int


class Round(NamedTuple):
    """One permute of a reroute, in which every device sends at most once and receives at most once."""

    rows: int
    starts: tuple[int, ...]  # for every sender, the first row of its block that it sends
    senders: tuple[int, ...]  # for every receiver; itself, if it receives nothing


class Stretch(NamedTuple):
    """Neighbouring rows that one shard takes from another one's block, or from its own."""

    owner: int
    receiver: int
    first: int  # row of the owner's block


def reroute(wanted: Sequence[Sequence[tuple[int, int]]], block: int) -> tuple[tuple[Round, ...], np.ndarray]:
    """The permutes by which every shard gets the rows that it wants, whichever shards own them.

    Args:
        wanted: for every shard, the owner of each row and the index of the row in the owner's block.
        block: rows of a block.

    Returns:
        Rounds of permutes, as few as one stretch for each sender and receiver in a round allows; and for
        every shard the indices of its rows in its own block followed by the rows received in each round.
    """
    found = [_stretches(receiver, rows) for receiver, rows in enumerate(wanted)]
    lengths = {s: n for _, rows_of in found for s, n in rows_of.items() if s.owner != s.receiver}
    rounds, places, base = [], dict[Stretch, int](), block
    for sent in _in_rounds(lengths, len(wanted)):
        rows = max(lengths[stretch] for stretch in sent.values())
        starts, senders = [0] * len(wanted), list(range(len(wanted)))
        for receiver, stretch in sent.items():
            # Everyone sends as many rows as the longest stretch has, which must lie inside the block.
            starts[stretch.owner] = min(stretch.first, block - rows)
            senders[receiver] = stretch.owner
            places[stretch] = base + stretch.first - starts[stretch.owner]
        rounds.append(Round(rows, tuple(starts), tuple(senders)))
        base += rows
    table = [
        [
            row if owner == receiver else places[stretch] + row - stretch.first
            for (owner, row), stretch in zip(rows_of, found[receiver][0], strict=True)
        ]
        for receiver, rows_of in enumerate(wanted)
    ]
    return tuple(rounds), np.array(table)


def _stretches(receiver: int, wanted: Sequence[tuple[int, int]]) -> tuple[list[Stretch], dict[Stretch, int]]:
    """The stretch of every row that a shard wants, each as long as rows follow one another; their rows."""
    found: list[Stretch] = []
    rows: dict[Stretch, int] = {}
    for owner, row in wanted:
        stretch = Stretch(owner, receiver, row)
        if found and found[-1].owner == owner and found[-1].first + rows[found[-1]] == row:
            stretch = found[-1]
        rows[stretch] = max(rows.get(stretch, 0), row - stretch.first + 1)
        found.append(stretch)
    return found, rows


def _in_rounds(lengths: Mapping[Stretch, int], shards: int) -> list[dict[int, Stretch]]:
    """Rounds of stretches by receiver: in a round every shard sends at most one and receives at most one."""
    rounds: list[dict[int, Stretch]] = []
    # Long stretches first, then by distance: in a ring, all neighbours of one side share a round.
    order = sorted(lengths, key=lambda s: (-lengths[s], (s.receiver - s.owner) % shards, s))
    for stretch in order:
        for sent in rounds:
            if stretch.receiver not in sent and all(s.owner != stretch.owner for s in sent.values()):
                sent[stretch.receiver] = stretch
                break
        else:
            rounds.append({stretch.receiver: stretch})
    return rounds


class Reach(ABC):
    """Which input rows each output row of one dimension reads, and which shards own them.

    Attributes:
        extent: input rows, of all shards together.
        shards: into how many blocks the dimension is cut.
        axes: the mesh axes that cut it.
        mode: the padding outside the input: `"constant"`, or repeated rows of the input: `"wrap"` (as on a
            ring), `"reflect"` (mirrored at the border row) or `"edge"` (the border row).
    """

    extent: int
    shards: int
    axes: tuple[str, ...]
    mode: str

    @property
    @abstractmethod
    def extent_out(self) -> int:
        """Output rows, of all shards together."""

    @abstractmethod
    def rows(self, output: int) -> tuple[int, int]:
        """The inputs `[start, stop)` that `output` reads; neither bound decreases with `output`."""

    def on(self: AnyReach, axes: tuple[str, ...], shards: int) -> AnyReach:
        """The same dimension, cut by `axes` into `shards` blocks."""
        return dataclasses.replace(self, axes=axes, shards=shards)  # type: ignore[type-var]

    @property
    def block_in(self) -> int:
        """Input rows of a shard's block."""
        return -(-self.extent // self.shards)

    @property
    def block_out(self) -> int:
        """Output rows of a shard's block."""
        return -(-self.extent_out // self.shards)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The inputs of every shard that owns outputs; what shards beyond the extent compute is cropped."""
        busy = range(-(-self.extent_out // self.block_out))
        ends = [(i * self.block_out, min((i + 1) * self.block_out, self.extent_out) - 1) for i in busy]
        return tuple(
            Span(i, self.rows(first)[0], self.rows(last)[1])
            for i, (first, last) in zip(busy, ends, strict=True)
        )

    @property
    def need(self) -> int:
        """Input rows that the outputs of one shard read, padding included: the most of any shard."""
        return max(1, *(stop - start for _, start, stop in self.spans))

    @cached_property
    def halo(self) -> tuple[int, int]:
        """Rows of the input before and after a shard's block that it must receive: the most of any shard."""
        reads = [span for span in self.spans if span.start < span.stop]
        low = [min(i * self.block_in - start, i * self.block_in) for i, start, _ in reads]
        high = [min(stop, self.extent) - (i + 1) * self.block_in for i, _, stop in reads]
        return max([0, *low]), max([0, *high])

    def hops(self, rows: int) -> list[int]:
        """`rows` of halo, divided into those of the 1st, 2nd, ... neighbour."""
        return [min(self.block_in, rows - taken) for taken in range(0, rows, self.block_in)]

    @cached_property
    def _reach(self) -> int:
        """Rows before a shard's block that it reads, padding included: the most of any shard."""
        return max(0, *(i * self.block_in - start for i, start, _ in self.spans))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """For each shard, the first row it reads, counted in its block extended by `_reach` rows in front."""
        found = [start - i * self.block_in + self._reach for i, start, _ in self.spans]
        return (*found, *found[-1:] * (self.shards - len(found)))

    @property
    def fill(self) -> tuple[int, int]:
        """Rows of padding to add before and after the block and its halos."""
        total = max(self.offsets) + self.need
        low, high = self.halo
        return self._reach - low, max(0, total - self._reach - self.block_in - high)

    def source(self, row: int) -> int:
        """The input row that the padding repeats at `row`; not for mode `"constant"`."""
        last = self.extent - 1
        if self.mode == "wrap":
            return row % self.extent
        if self.mode == "reflect" and last:
            row = row % (2 * last)
            return min(row, 2 * last - row)
        return min(max(row, 0), last)

    @cached_property
    def repeated(self) -> tuple[tuple[Round, ...], np.ndarray]:
        """The `reroute` of every shard's `need` rows, where padding repeats rows of the input."""
        wanted = []
        for _, start, stop in self.spans:
            rows = [min(start + place, max(start, stop - 1)) for place in range(self.need)]
            wanted.append([divmod(self.source(row), self.block_in) for row in rows])
        wanted += [[(shard, 0)] * self.need for shard in range(len(self.spans), self.shards)]
        return reroute(wanted, self.block_in)


@dataclass(frozen=True)
class Window(Reach):
    """A window that slides over the input.

    Attributes:
        extent: input rows, of all shards together.
        size: rows of the window, dilation included.
        stride: rows from one output to the next.
        pad: rows of padding before and after (negative crops).
        shards: see `Reach`.
        axes: see `Reach`.
        dilation: of the input, which is a transposed convolution: `dilation - 1` rows of zeros between two
            rows. Window, stride and padding are counted in the dilated rows.
        mode: see `Reach`.
    """

    extent: int
    size: int
    stride: int
    pad: tuple[int, int]
    shards: int = 1
    axes: tuple[str, ...] = ()
    dilation: int = 1
    mode: str = "constant"

    @property
    def extent_out(self) -> int:
        dilated = (self.extent - 1) * self.dilation + 1
        return max(0, (dilated + sum(self.pad) - self.size) // self.stride + 1)

    def rows(self, output: int) -> tuple[int, int]:
        first = output * self.stride - self.pad[0]
        return -(-first // self.dilation), (first + self.size - 1) // self.dilation + 1

    @property
    def phases(self) -> tuple[int, ...]:
        """Dilated rows from the first row that a shard reads to the start of its first window; 0 or less."""
        step = self.block_out * self.stride
        found = [i * step - self.pad[0] - start * self.dilation for i, start, _ in self.spans]
        return (*found, *found[-1:] * (self.shards - len(found)))


def check_fits(window: Window, name: str) -> None:
    """Refuses a window that has no output along the dimension `name`.

    Raises:
        UserError: it is larger than the padded input.
    """
    if window.extent_out < 1:
        raise UserError(
            f"a window of {window.size} rows does not fit the {name} of {window.extent} with padding "
            f"{window.pad}; use padding='SAME' or a larger input"
        )


@dataclass(frozen=True)
class Bands(Reach):
    """Outputs that each read a range of inputs of their own: adaptive pooling, resizing.

    Attributes:
        extent: input rows, of all shards together.
        ranges: for every output its inputs `[start, stop)`, inside the input.
        shards: see `Reach`.
        axes: see `Reach`.
        mode: see `Reach`.
    """

    extent: int
    ranges: tuple[tuple[int, int], ...]
    shards: int = 1
    axes: tuple[str, ...] = ()
    mode: str = "constant"

    @property
    def extent_out(self) -> int:
        return len(self.ranges)

    def rows(self, output: int) -> tuple[int, int]:
        return self.ranges[output]
