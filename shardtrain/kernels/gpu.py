"""Which GPU a program is traced for, and which implementations of kernels that GPU supports."""

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
"""Implementations of kernels in the order in which they are tried: Mosaic GPU (Hopper, Blackwell), Triton
(NVIDIA from Ampere on), plain JAX."""

_CAPABILITIES = {
    "A100": (8, 0), "A10": (8, 6), "A30": (8, 0), "A40": (8, 6), "L4": (8, 9), "L40": (8, 9), "L40S": (8, 9),
    "H100": (9, 0), "H200": (9, 0), "GH200": (9, 0), "H20": (9, 0), "H800": (9, 0),
    "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3), "GB300": (10, 3),
}  # fmt: skip
"""Compute capability by a word of `device_kind`, for programs compiled without the GPU; from NVIDIA's list at
developer.nvidia.com/cuda-gpus."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        kind: `jax.Device.device_kind`.
        capability: compute capability, (9, 0) for Hopper.
        interpreted: whether its kernels run in the interpreters of Pallas, on any machine.
    """

    kind: str
    capability: tuple[int, int]
    interpreted: bool = False

    @property
    def blackwell(self) -> bool:
        """Whether it is of the Blackwell generation, whose tensor cores have a memory of their own."""
        return self.capability[0] == 10


_interpreted: contextvars.ContextVar[Card | None] = contextvars.ContextVar("interpreted", default=None)


@contextlib.contextmanager
def interpreted(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within it, kernels are traced as for a GPU of this capability and run in the interpreters of Pallas.

    It is for tests: an interpreter takes a thousand times as long. Mosaic's also looks for races of copies.
    JAX's caches are cleared on entry and on exit, since they do not depend on this context.

    Example:
        >>> from shardtrain.kernels import gpu
        >>> with gpu.interpreted():
        ...     gpu.card().capability
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
    """The GPU that the program is traced for, None if it is none.

    It is that of the enclosing `interpreted`; else that of the active mesh, whose devices need not exist on
    this machine when a program is compiled ahead of time; else that of this process.
    """
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
    """A sentence that refuses an unknown implementation; None for a known one."""
    if implementation in IMPLEMENTATIONS:
        return None
    return f"implementation={implementation!r}; there are {', '.join(map(repr, IMPLEMENTATIONS))}"


def why_not(implementation: str, at: Card | None) -> str | None:
    """Why a GPU does not support an implementation; None if it does."""
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
    """Operands of a rule of `custom_vmap`, with those that are not mapped repeated `size` times."""
    return [
        x if x is None or m else jnp.broadcast_to(x, (size, *x.shape))
        for x, m in zip(operands, mapped, strict=True)
    ]


def chosen(implementation: str | None, what: str) -> tuple[str, ...]:
    """The implementations to try, in order: all that the present GPU supports, or the named one.

    Args:
        implementation: one of `IMPLEMENTATIONS`, or None for all of them.
        what: the operator's name, for the message.

    Raises:
        UserError: the named one is not supported here.
    """
    at = card()
    if implementation is None:
        return tuple(name for name in IMPLEMENTATIONS if why_not(name, at) is None)
    if reason := why_not(implementation, at):
        raise UserError(f"{what}: {reason}")
    return (implementation,)
