"""The command that a launcher runs in every process."""

from collections.abc import Sequence

from shardtrain.errors import UserError


def refuse_no_command(command: Sequence[str]) -> None:
    """Refuses to launch nothing."""
    if not command:
        raise UserError(
            "there is no command to run; write it after --, as in: -- python recipes/train_cnn.py"
        )
