"""A schedule drawn for people: its timeline in colours, and its figures in tables."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shardtrain.pipeline.schedules.action_costs import Costs, Number
from shardtrain.pipeline.schedules.actions import Action
from shardtrain.pipeline.schedules.schedule import Schedule
from shardtrain.pipeline.schedules.simulate import Timeline, classical, in_flight, lockstep

COLOURS = {"F": (142, 190, 255), "B": (255, 178, 102), "I": (255, 214, 102), "W": (136, 214, 170)}
WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}

FINEST = 12
"""The most columns of the costliest action.

If costs share no large unit, times are rounded to such columns, but no action is narrower than one.
"""


@dataclass(frozen=True)
class Bar:
    """An action as it is drawn.

    Attributes:
        action: that is drawn.
        rank: in whose row it is.
        start: its first column.
        end: the column behind it.
        label: such as `F3`; small letters for every other chunk of the rank.
        colour: of the bar, such as `#8ebeff`.
        ink: the colour of the letters on it.
    """

    action: Action
    rank: int
    start: int
    end: int
    label: str
    colour: str
    ink: str


def bars(schedule: Schedule, costs: Costs | None = None) -> list[Bar]:
    """Returns the classical timeline on a grid of columns, each as long as the largest unit of all costs.

    Example:
        >>> [bar.label for bar in bars(st.pipeline.make("1f1b", ranks=1, microbatches=2))]
        ['F0', 'B0', 'F1', 'B1']
    """
    costs = costs or Costs.equal(schedule.stages)
    line = classical(schedule, costs)
    column = _columns(line, _unit(costs))
    chunks = {s: schedule.ranks_of[:s].count(rank) for s, rank in enumerate(schedule.ranks_of)}
    result = []
    for action, start in line.start.items():
        chunk = chunks[action.stage]
        dark = chunk / max(1, max(chunks.values())) * 0.42  # later chunks of a rank are darker
        colour = _hex(action.kind, dark)
        kind = action.kind.lower() if chunk % 2 else action.kind
        ends = column[start], column[line.end[action]]
        rank, ink = schedule.ranks_of[action.stage], "#ffffff" if dark > 0.3 else "#000000"
        result.append(Bar(action, rank, *ends, f"{kind}{action.microbatch}", colour, ink))
    return result


def timeline(schedule: Schedule, costs: Costs | None = None, width: int = 100) -> RenderableType:
    """Returns a picture of a schedule for `rich.print`, with a table of figures.

    Args:
        schedule: without deadlocks; it has a row for each rank, in as many blocks as its length takes.
        costs: of its stages, equal by default.
        width: columns of text.

    Raises:
        UserError: a deadlock, costs of another number of stages.

    Example:
        >>> rich.print(timeline(make("zb-h1", ranks=4, microbatches=8)))  # doctest: +SKIP
    """
    drawn = bars(schedule, costs)
    cell = max(3, 1 + len(str(schedule.microbatches - 1)))
    head = len(f"rank {schedule.ranks - 1} ")
    length = max(1, *(bar.end for bar in drawn))
    most = (width - head) // cell
    # Blocks of one size read better than a short last one.
    block = math.ceil(length / math.ceil(length / most))
    parts: list[RenderableType] = [Text(title(schedule), style="bold"), _coloured(schedule), Text()]
    for start in range(0, length, block):
        parts += [
            *_block(drawn, schedule.ranks, range(start, min(start + block, length)), cell, head),
            Text(),
        ]
    return Group(*parts, Columns([figures(schedule, costs), peaks(schedule)], padding=(0, 3)))


def title(schedule: Schedule) -> str:
    """Returns the name and the sizes of a schedule."""
    chunks = max(schedule.ranks_of.count(rank) for rank in schedule.ranks_of)
    stages = f", {schedule.stages} stages" if chunks > 1 else ""
    return f"{schedule.name}: {schedule.ranks} ranks{stages}, {schedule.microbatches} microbatches"


def legend(schedule: Schedule) -> str:
    """Returns what the letters mean."""
    used = {action.kind for order in schedule.orders for action in order}
    chunks = max(map(schedule.ranks_of.count, schedule.ranks_of))
    words = [f"{kind} {word}" for kind, word in WORDS.items() if kind in used]
    if chunks > 1:
        words.append(f"small letters: a rank's second{' and fourth' if chunks > 3 else ''} stage")
    return ", ".join(words)


def figures(schedule: Schedule, costs: Costs | None = None) -> Table:
    """Returns a table of times and idle shares.

    Its columns are the classical model, lockstep, and lockstep with backwards split or fused.
    """
    table = Table(caption="time 1: a forward of one stage" if costs is None else None, caption_justify="left")
    line = classical(schedule, costs)
    other = schedule.with_fused() if schedule.split else schedule.with_split()
    ticks = [lockstep(one, costs) for one in (schedule, other)]
    for name in ("", "classical", "lockstep", f"lockstep, {'fused' if schedule.split else 'split'}"):
        table.add_column(name, justify="right")
    spans = line.makespan, *(each.makespan for each in ticks)
    table.add_row("makespan", *(f"{float(span):g}" for span in spans))
    table.add_row("idle", *map(percent, (line.idle, *(each.idle for each in ticks))))
    table.add_row("ticks", "", *(str(len(each.table)) for each in ticks))
    return table


def peaks(schedule: Schedule) -> Table:
    """Returns a table of the most activations in flight at once on each rank."""
    table = Table()
    table.add_column("rank")
    table.add_column("peak in flight")
    runs: list[tuple[int, int, int]] = []
    for rank, peak in enumerate(in_flight(schedule)[0]):  # neighbours with the same peak share a row
        if runs and runs[-1][2] == peak:
            runs[-1] = runs[-1][0], rank, peak
        else:
            runs.append((rank, rank, peak))
    for first, last, peak in runs:
        table.add_row(str(first) if first == last else f"{first} to {last}", str(peak))
    return table


def percent(share: Fraction) -> str:
    """Returns `"3/11 = 27.3 %"`; without the fraction if that is long."""
    text = f"{100 * float(share):.1f} %"
    return f"{share} = {text}" if 0 < share.denominator < 10_000 and share else text


def _hex(kind: str, dark: float = 0) -> str:
    return "#" + "".join(f"{int(part * (1 - dark)):02x}" for part in COLOURS[kind])


def _unit(costs: Costs) -> Fraction:
    values = [Fraction(v) for row in (costs.forward, costs.input, costs.weight) for v in row if v]
    if not values:
        return Fraction(1)
    scale = math.lcm(*(v.denominator for v in values))
    shared = Fraction(math.gcd(*(int(v * scale) for v in values)), scale)
    return max(shared, max(values) / FINEST)


def _columns(line: Timeline, unit: Fraction) -> dict[Number, int]:
    """Returns the column at which each time begins."""
    ended: dict[Number, list[Number]] = {}
    for action, end in line.end.items():
        ended.setdefault(end, []).append(line.start[action])
    columns: dict[Number, int] = {}
    moved = 0  # columns by which short actions have moved all that follows
    for time in sorted({*ended, *line.start.values()}):
        least = max((columns[start] + 1 for start in ended.get(time, ()) if start < time), default=0)
        rounded = round(time / unit)
        moved = max(moved, least - rounded)
        columns[time] = rounded + moved
    return columns


def _coloured(schedule: Schedule) -> Text:
    line = Text(legend(schedule))
    for kind in COLOURS:
        line.highlight_regex(rf"\b{kind}\b", f"#000000 on {_hex(kind)}")
    return line


def _block(drawn: list[Bar], ranks: int, columns: range, cell: int, head: int) -> Iterator[Text]:
    """Yields the lines of one block: a ruler, then the ranks."""
    at: Mapping[tuple[int, int], Bar] = {
        (bar.rank, column): bar for bar in drawn for column in range(bar.start, bar.end)
    }
    ruler = "".join(f"{c if c % 5 == 0 else '':<{cell}}" for c in columns)
    yield Text(" " * head + ruler, style="dim", no_wrap=True)
    for rank in range(ranks):
        line = Text(f"{f'rank {rank}':<{head}}", no_wrap=True)
        for column in columns:
            bar = at.get((rank, column))
            if bar is None:
                line.append(f"{'·':<{cell}}", style="dim")
            else:
                named = column in (bar.start, columns[0])
                line.append(f"{bar.label if named else '':<{cell}}", style=f"{bar.ink} on {bar.colour}")
        yield line
