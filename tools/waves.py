"""Programs, warps and waves of our GPU kernels on a card, without a card.

    python tools/waves.py
    python tools/waves.py --config 'mosaic bfloat16 F(2,3)'
    python tools/waves.py --target sm_80 --config 'triton float32 F(4,3)'
    python tools/waves.py --markdown           # writes the table into docs/kernels.md

The grid of a kernel is read where the kernel is made, from a trace of the layer that `tools/gpu_evidence.py`
compiles; registers and shared memory are the compiler's words, from the table in docs/gpu_evidence.md. How
many programs are resident on a multiprocessor follows from these by CUDA's rules: registers are allocated in
units of 256 for each warp, and each program has 1 KB of shared memory more than it asks for. A wave is one
program on each of these places of the card. The model says how full the card is, not how fast it is.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cards import CARDS, TargetCard
from gpu_cases import Case, cases

EVIDENCE = Path(__file__).parents[1] / "docs" / "gpu_evidence.md"
CONFIG = "mosaic float32 F(4,3)"
REGISTERS, UNIT = 65536, 256
"""Registers of a multiprocessor, and how many a warp is given at a time."""
THREADS, BLOCKS, RESERVED = 2048, 32, 1024
"""Of a multiprocessor: threads and programs that may be resident; and the bytes of shared memory that the
system takes for each program."""


@dataclass(frozen=True)
class Launch:
    """The size of a launch.

    Attributes:
        grid: programs along each dimension.
        warps: of 32 threads, in a program.
    """

    grid: tuple[int, ...]
    warps: int

    @property
    def programs(self) -> int:
        """Blocks of threads, in CUDA's words."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Occupancy:
    """How a launch fills a card.

    Attributes:
        launch: its size.
        registers: of a thread.
        shared: bytes of a program.
        by_registers, by_shared, by_threads: programs that fit on a multiprocessor by each of its resources.
        cores: multiprocessors of the card.
    """

    launch: Launch
    registers: int
    shared: int
    by_registers: int
    by_shared: int
    by_threads: int
    cores: int

    @property
    def resident(self) -> int:
        """Programs on a multiprocessor at a time."""
        return min(self.by_registers, self.by_shared, self.by_threads)

    @property
    def waves(self) -> float:
        """Programs of the launch over those that the card runs at a time."""
        return self.launch.programs / (self.resident * self.cores)

    @property
    def busy(self) -> float:
        """Share of the card's places that have a program, over all waves: the last one is rarely full."""
        return self.waves / math.ceil(self.waves)

    @property
    def limit(self) -> str:
        """What keeps another program from a multiprocessor."""
        found = {"registers": self.by_registers, "shared memory": self.by_shared, "threads": self.by_threads}
        return min(found, key=lambda name: found[name])


def occupancy(card: TargetCard, launch: Launch, registers: int, shared: int) -> Occupancy:
    """How a launch fills a card, by the resources of its programs."""
    of_warp = -(-registers * 32 // UNIT) * UNIT
    return Occupancy(
        launch,
        registers,
        shared,
        REGISTERS // (of_warp * launch.warps),
        card.shared_per_core // (shared + RESERVED),
        min(BLOCKS, THREADS // (32 * launch.warps)),
        card.cores,
    )


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Notes the grid and the warps of every kernel that is made inside."""
    from shardtrain.kernels import pallas

    found: list[Launch] = []
    mosaic, triton = pallas.mosaic_kernel, pallas.triton_kernel

    def of_mosaic(*args: Any, **kwargs: Any) -> Any:
        found.append(Launch(tuple(kwargs["grid"]), 4))  # one warpgroup
        return mosaic(*args, **kwargs)

    def of_triton(*args: Any, **kwargs: Any) -> Any:
        found.append(Launch(tuple(kwargs["grid"]), kwargs["warps"]))
        return triton(*args, **kwargs)

    with mock.patch.multiple(pallas, mosaic_kernel=of_mosaic, triton_kernel=of_triton):
        yield found


def launch_of(case: Case, card: TargetCard) -> Launch:
    """The launch of one kernel, from a trace for this card."""
    import jax

    from shardtrain.kernels import gpu

    here = gpu.Card(card.kind, (card.capability, 0))
    with mock.patch.object(gpu, "card", return_value=here), recording() as found:
        jax.eval_shape(case.call, *case.operands)
    (launch,) = set(found)
    return launch


def compiled(target: str, config: str) -> dict[str, tuple[int, int]]:
    """Registers of a thread and bytes of shared memory of each kernel, from docs/gpu_evidence.md."""
    rows = [line.strip("| \n").split(" | ") for line in EVIDENCE.read_text().splitlines()]
    found = [row for row in rows if len(row) == 10 and row[0] == target and row[2] == config]
    return {row[1]: (int(row[3]), 1024 * int(row[5].removesuffix("K"))) for row in found}


HEADER = ("kernel", "grid", "programs", "warps", "registers", "shared", "resident", "limit", "waves", "busy")


def cells(kernel: str, found: Occupancy) -> list[str]:
    """A row of the table."""
    return [
        kernel,
        " x ".join(map(str, found.launch.grid)),
        f"{found.launch.programs:,}",
        f"{found.launch.warps}",
        f"{found.registers}",
        f"{found.shared // 1024} KB",
        f"{found.resident}",
        found.limit,
        f"{found.waves:.1f}",
        f"{100 * found.busy:.0f} %",
    ]


def table(target: str, config: str) -> list[list[str]]:
    """The rows for one configuration of the kernels."""
    card, known = CARDS[target], compiled(target, config)
    mine = [case for case in cases(card, quick=False) if case.config == config and case.kernel in known]
    return [cells(case.kernel, occupancy(card, launch_of(case, card), *known[case.kernel])) for case in mine]


def main() -> None:
    """Prints the table, or writes it into docs/kernels.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=list(CARDS), default="sm_90a")
    parser.add_argument("--config", default=CONFIG, help=f"as in docs/gpu_evidence.md ({CONFIG})")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/kernels.md")
    args = parser.parse_args()
    rows = table(args.target, args.config)
    if not rows:
        parser.error(f"--config {args.config!r}: docs/gpu_evidence.md has no such kernels for {args.target}")
    card = CARDS[args.target]
    says = f"{args.config} for {card.kind}, {card.cores} multiprocessors."
    if args.markdown:
        from census_conv import write_between

        head = ["| " + " | ".join(HEADER) + " |", "|---|---|" + "--:|" * 5 + "---|--:|--:|"]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        write_between("waves", "\n".join([says, "", *head, *lines]), EVIDENCE.with_name("kernels.md"))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=says)
    for name in HEADER:
        shown.add_column(name, justify="left" if name in ("kernel", "grid", "limit") else "right")
    for row in rows:
        shown.add_row(*row)
    Console(width=130).print(shown)


if __name__ == "__main__":
    main()
