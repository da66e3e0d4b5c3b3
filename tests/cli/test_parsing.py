"""What is wrong with a command line is one sentence that names the flag as it was typed."""

from dataclasses import dataclass

import pytest
import tyro

from shardtrain import UserError
from shardtrain.cli.command import Command
from shardtrain.cli.flags import RunFlags
from shardtrain.cli.parsing import as_typed, parse

CONFIG = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)


@dataclass(frozen=True, kw_only=True)
class Flags(RunFlags):
    mesh: str = "data=2"
    data: str = "digits"
    out: str = "runs"
    schedule: str = "1f1b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps x", "--steps x: write a whole number"),
        ("--steps=x", "--steps x: write a whole number"),
        ("--steps 1e99", "--steps 1e99: write a whole number"),
        ("--lr 1,5", "--lr 1,5: write a number"),
        ("--clip-norm a", "--clip-norm a: write a number or None"),
        ("--clip_norm a", "--clip-norm a: write a number or None"),
        ("--checkpoint-every often", "--checkpoint-every often: write a whole number or None"),
        ("--on-nan bad", "--on-nan bad: there is stop, skip, rollback"),
        ("--mesh", "--mesh: write a value behind it"),
        ("--nosuch 3", "--nosuch 3: there is no such flag or value"),
        ("words", "words: there is no such flag or value"),
    ],
)
def test_flags_of_recipes(words, message, capsys):
    with pytest.raises(UserError) as told:
        parse(Flags, words.split())
    assert str(told.value) == f"{message}; --help lists what there is"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("launch", "there is no subcommand; write local, slurm, k8s"),
        ("launch k8s", "--image is missing"),
        ("launch local -n x", "-n x: write a whole number"),
        ("launch local --processes x", "--processes x: write a whole number"),
        ("launch slurm --gpus 3", "--gpus 3: there is no such flag or value"),
        ("rns", "rns: there is no such flag or value"),
        ("runs a b", "b: there is no such flag or value"),
    ],
)
def test_flags_of_the_command(words, message):
    with pytest.raises(UserError) as told:
        parse(Command, words.split(), prog="shardtrain", config=CONFIG)
    assert str(told.value) == f"{message}; --help lists what there is"


def test_help_is_as_it_was(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Flags, ["--help"])
    assert not end.value.code
    assert "--clip-norm" in capsys.readouterr().out


def test_a_message_of_the_library_names_the_flag_that_was_typed():
    flags = parse(Flags, ["--clip-norm", "-1", "--batch-size", "7"])
    assert as_typed("clip_norm=-1.0; use a positive norm", flags) == "--clip-norm -1.0; use a positive norm"
    assert as_typed("fit: batch_size=7 is odd", flags) == "fit: --batch-size 7 is odd"
    assert as_typed("accumulate=1 is too few, such as accumulate=8", flags) == (
        "--accumulate 1 is too few, such as --accumulate 8"
    )
    for other in (
        "mesh 'clip_norm=2' is",
        "data=2,pipe=2 has",
        "my.batch_size=7",
        "seed == 3",
        "--out a.steps=3",
    ):
        assert as_typed(other, flags) == other
