"""The token of a job: a secret by which its processes know each other's messages from those of strangers.

A message carries a code that is computed from the token, from the place where the message stands, and from
its text (HMAC, RFC 2104, with SHA-256). The token itself is never sent. A message is not encrypted: whoever
listens can read it, but can neither change it nor put it in another place.
"""

import hashlib
import hmac
from collections.abc import Mapping

from shardtrain.errors import UserError

TOKEN = "SHARDTRAIN_TOKEN"
"""The variable that holds the token. A launcher sets it to a new one for every start."""

FALLBACK = ("SHARDTRAIN_JOB", "SLURM_JOB_ID")
"""Variables that tell jobs apart where nobody gave a token. They are no secret."""

LEAST_CHARACTERS = 16
"""A shorter token could be guessed."""

_CODE_CHARACTERS = 2 * hashlib.sha256().digest_size


def job_token(env: Mapping[str, str]) -> bytes:
    """Returns the token of this job.

    Where `SHARDTRAIN_TOKEN` is not set, it is the number of the job, which keeps jobs apart, but which an
    attacker may guess; without a number it is empty.

    Args:
        env: the environment variables.

    Raises:
        UserError: if the token is shorter than `LEAST_CHARACTERS`.

    Example:
        >>> job_token({"SLURM_JOB_ID": "4711"})
        b'4711'
    """
    token = env.get(TOKEN, "")
    if token and len(token) < LEAST_CHARACTERS:
        raise UserError(
            f"{TOKEN} has {len(token)} characters; give {LEAST_CHARACTERS} or more, such as those of "
            f"openssl rand -hex 16, or unset this variable"
        )
    return (token or next(filter(None, map(env.get, FALLBACK)), "") or "").encode(errors="surrogatepass")


def signed(token: bytes, place: str, text: str) -> str:
    """Returns a message: the code of a text, a blank, and the text.

    Args:
        token: of the job.
        place: where the message stands, such as its key in a store. At another place it is not authentic.
        text: what it says.
    """
    return f"{_code(token, place, text)} {text}"


def authentic(token: bytes, place: str, message: str) -> str | None:
    """Returns the text of a message, or None if a process without the token wrote it.

    Args:
        token: of the job.
        place: where the message stands.
        message: what stands there, of whatever form.

    Example:
        >>> message = signed(b"secret", "beat/1", "step 7")
        >>> authentic(b"secret", "beat/1", message), authentic(b"secret", "beat/2", message)
        ('step 7', None)
    """
    code, text = message[:_CODE_CHARACTERS], message[_CODE_CHARACTERS + 1 :]
    expected = _code(token, place, text)
    same = hmac.compare_digest(code.encode(errors="replace"), expected.encode())  # takes equally long for all
    return text if same and message[_CODE_CHARACTERS : _CODE_CHARACTERS + 1] == " " else None


def _code(token: bytes, place: str, text: str) -> str:
    whole = f"{len(place)} {place} {text}".encode(errors="surrogatepass")
    return hmac.new(token, whole, hashlib.sha256).hexdigest()
