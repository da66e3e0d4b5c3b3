"""Which GPU a kernel is traced for, and by what it may be written for it."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from shardtrain import compat
from shardtrain.errors import UserError

IMPLEMENTATIONS = ("mosaic", "triton", "xla")
"""In the order in which they are tried: Mosaic GPU (Hopper, Blackwell), Triton (NVIDIA from Ampere on), plain
jax."""

_CAPABILITIES = {
    "A100": (8, 0), "A10": (8, 6), "A30": (8, 0), "A40": (8, 6), "L4": (8, 9), "L40": (8, 9), "L40S": (8, 9),
    "H100": (9, 0), "H200": (9, 0), "GH200": (9, 0), "H20": (9, 0), "H800": (9, 0),
    "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3), "GB300": (10, 3),
}  # fmt: skip
"""Compute capability by a word of the device's kind, for programs compiled without the card; NVIDIA's list at
developer.nvidia.com/cuda-gpus."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        kind: jax's `device_kind`.
        capability: compute capability, (9, 0) for Hopper.
        interpreted: its kernels run in the interpreters of Pallas, on any machine.
    """

    kind: str
    capability: tuple[int, int]
    interpreted: bool = False

    @property
    def blackwell(self) -> bool:
        """Whether its tensor cores have a memory of their own."""
        return self.capability[0] == 10


_interpreted: contextvars.ContextVar[Card | None] = contextvars.ContextVar("interpreted", default=None)


@contextlib.contextmanager
def interpreted(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within it, kernels are traced as for a card of this capability and run in Pallas' interpreters.

    For tests: an interpreter takes a thousand times as long. Mosaic's looks for races of the copies. All that
    was jitted before is forgotten, inside and afterwards, because it does not know what it was traced for.

    Example:
        >>> with interpreted():
        ...     card().capability
        (9, 0)
    """
    token = _interpreted.set(Card("interpreted", capability, interpreted=True))
    jax.clear_caches()
    try:
        yield
    finally:
        _interpreted.reset(token)
        jax.clear_caches()


def card() -> Card | None:
    """The GPU that is traced for: of `interpreted`, of the mesh that is set (also one of devices that are not
    here, for compiling ahead of time), or of this process. None without one."""
    if (pretended := _interpreted.get()) is not None:
        return pretended
    kind = compat.device_kind()
    words = kind.replace("-", " ").split()
    found = next((_CAPABILITIES[word] for word in words if word in _CAPABILITIES), None)
    if found is None and (here := jax.local_devices()[0]).device_kind == kind:
        major, dot, minor = str(getattr(here, "compute_capability", "")).partition(".")
        found = (int(major), int(minor)) if dot and (major + minor).isdigit() else None  # AMD has "gfx90a"
    return Card(kind, found) if found else None


def unknown(implementation: str) -> str | None:
    """A sentence on an implementation that there is not; None if there is."""
    if implementation in IMPLEMENTATIONS:
        return None
    return f"implementation={implementation!r}; there are {', '.join(map(repr, IMPLEMENTATIONS))}"


def why_not(implementation: str, at: Card | None) -> str | None:
    """Why kernels cannot be written by `implementation` on this card; None if they can."""
    if reason := unknown(implementation):
        return reason
    if implementation == "xla":
        return None
    if at is None:
        return (
            f"implementation={implementation!r} is for NVIDIA GPUs, and this program is traced for "
            f"{jax.default_backend()!r}; leave it out, or set a mesh of the GPUs to compile for"
        )
    if implementation == "mosaic" and at.capability[0] not in (9, 10):
        return (
            f"implementation='mosaic' is for compute capability 9 and 10 (Hopper, Blackwell), not "
            f"{at.kind}'s {_dotted(at)}"
        )
    if implementation == "triton" and at.capability < (8, 0):
        return f"implementation='triton' takes compute capability 8 or more, not {at.kind}'s {_dotted(at)}"
    return None


def _dotted(at: Card) -> str:
    return ".".join(map(str, at.capability))


def all_mapped(size: int, mapped: Sequence[Any], operands: Sequence[Array | None]) -> list[Any]:
    """Operands of a rule of `custom_vmap`, those that are not mapped repeated `size` times."""
    return [
        x if x is None or m else jnp.broadcast_to(x, (size, *x.shape))
        for x, m in zip(operands, mapped, strict=True)
    ]


def chosen(implementation: str | None, what: str) -> tuple[str, ...]:
    """What to try, in order: all that the card takes, or the one that is named.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for the first that does it.
        what: for the sentence.

    Raises:
        UserError: the named one cannot run here.
    """
    at = card()
    if implementation is None:
        return tuple(name for name in IMPLEMENTATIONS if why_not(name, at) is None)
    if reason := why_not(implementation, at):
        raise UserError(f"{what}: {reason}")
    return (implementation,)
