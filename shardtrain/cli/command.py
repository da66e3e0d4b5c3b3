"""The command `shardtrain`; each of its subcommands is a dataclass of flags that can be run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from shardtrain.cli.pipeline import Show
from shardtrain.cli.runs import Runs
from shardtrain.cli.start import one_sentence

# A union makes subcommands, and needs two members; what is suppressed is not offered.
_Nothing = Annotated[None, tyro.conf.Suppress]


@dataclass(frozen=True)
class Pipeline:
    """Schedules of pipelines."""

    command: Annotated[Show, tyro.conf.subcommand("show")] | _Nothing

    def run(self) -> None:
        """Runs the subcommand."""
        if self.command is not None:
            self.command.run()


Command = (
    Annotated[Pipeline, tyro.conf.subcommand("pipeline")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | _Nothing
)


def main(args: Sequence[str] | None = None) -> None:
    """Parses the command line and runs what it names.

    A `UserError` becomes one sentence on stderr and exit status 2.

    Args:
        args: in place of those of the process.

    Example:
        >>> main(["pipeline", "show", "--schedule", "1f1b"])  # doctest: +SKIP
    """
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="shardtrain",
        description="Tools of shardtrain for the command line.",
        args=args,
        config=config,
    )
    with one_sentence():
        if command is not None:
            command.run()
