"""The command `shardtrain`; each of its subcommands is a dataclass of flags that can be run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from shardtrain import interrupts
from shardtrain.cli.doctor import Doctor
from shardtrain.cli.launch import Kubernetes, Local, Slurm
from shardtrain.cli.parsing import parse
from shardtrain.cli.pipeline import Show
from shardtrain.cli.runs import Runs
from shardtrain.cli.start import one_sentence
from shardtrain.errors import UserError

# tyro makes subcommands of a union, which needs two members; a suppressed one is not offered.
_Nothing = Annotated[None, tyro.conf.Suppress]


@dataclass(frozen=True)
class Pipeline:
    """Schedules of pipelines."""

    command: Annotated[Show, tyro.conf.subcommand("show")] | _Nothing

    def run(self, rest: Sequence[str]) -> None:
        """Runs the subcommand."""
        if rest:
            raise UserError(f"-- {' '.join(rest)}: this subcommand runs no other command; leave it out")
        if self.command is not None:
            self.command.run()


@dataclass(frozen=True)
class Launch:
    """Runs a command, given after --, in the processes of one job."""

    command: (
        Annotated[Local, tyro.conf.subcommand("local")]
        | Annotated[Slurm, tyro.conf.subcommand("slurm")]
        | Annotated[Kubernetes, tyro.conf.subcommand("k8s")]
    )

    def run(self, rest: Sequence[str]) -> None:
        """Runs the subcommand with the command after --."""
        self.command.run(rest)


Command = (
    Annotated[Pipeline, tyro.conf.subcommand("pipeline")]
    | Annotated[Launch, tyro.conf.subcommand("launch")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Runs, tyro.conf.subcommand("runs")]
    | _Nothing
)


def main(args: Sequence[str] | None = None) -> None:
    """Parses the command line and runs what it names.

    A `UserError` becomes one sentence on stderr and exit status 2.

    Args:
        args: the arguments, by default those of the process; after `--` comes a command for `launch`.

    Example:
        >>> main(["pipeline", "show", "--schedule", "1f1b"])  # doctest: +SKIP
    """
    words = list(sys.argv[1:] if args is None else args)
    end = words.index("--") if "--" in words else len(words)
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    with interrupts.at_once(), one_sentence():
        command = parse(
            Command,
            prog="shardtrain",
            description="Tools of shardtrain for the command line.",
            args=words[:end],
            config=config,
        )
        if command is not None:
            command.run(words[end + 1 :])
