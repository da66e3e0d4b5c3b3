"""The command that a launcher runs in every process."""

from collections.abc import Sequence

from shardtrain.errors import UserError


def refuse_no_command(command: Sequence[str]) -> None:
    """Refuses an empty command.

    Raises:
        UserError: if there is no word in it.
    """
    if not command:
        raise UserError(
            "there is no command to run; write it after --, as in: -- python recipes/train_cnn.py"
        )


def refuse_unprintable(command: Sequence[str]) -> None:
    """Refuses words that cannot be written into a script, such as file names that are not UTF-8.

    Raises:
        UserError: if a word has such a character.
    """
    for word in command:
        if not all(letter.isprintable() or letter in "\n\t" for letter in word):
            raise UserError(
                f"the command's {word!r} has characters that cannot be written down; name it otherwise"
            )
