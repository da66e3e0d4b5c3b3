"""Progress of a run in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shardtrain.guard.health import Row
from shardtrain.train.callbacks.base import Callback, Run

SHOWN = 3
"""Numbers of a row that are shown: the loss and the first metrics."""


class Terminal(Callback):
    """Shows a progress bar with the metrics of the moment; into a pipe, it prints ten lines a run.

    Args:
        console: where to; stderr by default, so that results can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_start(self, run: Run) -> None:
        self.task = self.bar.add_task("", total=run.steps, completed=run.step, metrics="compiling")
        self.bar.start()

    def on_step(self, run: Run, row: Row) -> None:
        line = shown(row, run.unit)
        self.bar.update(self.task, completed=run.step, metrics=line)
        every = max(1, run.steps // 10)
        if not self.console.is_terminal and (run.step % every == 0 or run.step in (1, run.steps)):
            self.console.print(f"step {run.step}/{run.steps}  {line}", highlight=False)

    def on_end(self, run: Run) -> None:
        self.bar.stop()


def shown(row: Mapping[str, Any], unit: str) -> str:
    """Returns the loss, the first metrics and the speed of a row on one line."""
    keys = list(row)
    names = keys[: keys.index("grad_norm")] if "grad_norm" in row else keys
    parts = [f"{key} {row[key]:.4f}" for key in names[:SHOWN] if isinstance(row[key], float)]
    return "  ".join([*parts, f"{row[f'{unit}_per_second']:,.0f} {unit}/s"])
