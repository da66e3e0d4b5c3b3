"""Checks the arguments of windowed operators: one number for each dimension, and padding."""

import operator
from collections.abc import Sequence
from typing import Any

from jax import lax

from shardtrain.errors import UserError

Padding = str | int | Sequence[int | tuple[int, int]]
"""The name of a padding, rows before and after every dimension, or `(before, after)` for each."""

MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
"""Flax's names of paddings that repeat rows of the input -> the `mode` of their windows."""


def tuple_of(value: Any, rank: int, what: str) -> tuple[int, ...]:
    """One number for each of `rank` dimensions, from one number for all (None for 1) or several.

    Raises:
        UserError: the wrong number of values, or one below 1.
    """
    try:
        one = 1 if value is None else operator.index(value)
        values: tuple[int, ...] = (one,) * rank
    except TypeError:
        values = _integers(value, what)
    if len(values) != rank or any(v < 1 for v in values):
        raise UserError(f"{what}={value} for {rank} spatial dimensions; give one positive number or {rank}")
    return values


def numbers_of(value: Any, what: str) -> int | tuple[int, ...]:
    """The number given for all dimensions, as a number, or several as a tuple, each 1 or more.

    For layers that do not know the rank of their inputs yet.

    Raises:
        UserError: anything else.
    """
    numbers = listed(value, what)
    return numbers if isinstance(value, Sequence) else numbers[0]


def listed(value: Any, what: str) -> tuple[int, ...]:
    """The numbers given, each 1 or more, as a tuple; a single number is a tuple of one.

    Raises:
        UserError: anything else.
    """
    return tuple_of(value, len(value) if isinstance(value, Sequence) else 1, what)


def _integers(values: Any, what: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(v) for v in values)
    except TypeError as error:
        raise UserError(f"{what}={values!r} is not made of whole numbers; give one, or several") from error


def mode_of(padding: Padding) -> str:
    """The `Reach.mode` that `padding` asks for."""
    return MODES.get(padding.upper(), "constant") if isinstance(padding, str) else "constant"


def pads_of(
    padding: Padding, extents: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Rows of padding before and after every dimension.

    Args:
        padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, `"REFLECT"`, `"CAUSAL"` (1-D), one number, or for each
            dimension a number or a `(before, after)` pair, as in Flax.
        extents: rows of the input.
        sizes: rows of the window, dilation included.
        strides: rows from one output to the next.

    Raises:
        UserError: anything else, or a repeating padding that is wider than the input.
    """
    if isinstance(padding, str):
        name = padding.upper()
        if name in ("SAME", "VALID"):
            return [(int(a), int(b)) for a, b in lax.padtype_to_pads(extents, sizes, strides, name)]
        if name == "CAUSAL" and len(extents) == 1:
            return [(sizes[0] - 1, 0)]
        if name in MODES:
            pads = [((k - 1) // 2, k // 2) for k in sizes]
            check_repeats(MODES[name], extents, pads)
            return pads
        raise UserError(
            f"padding={padding!r}: use 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', a number, or "
            f"(before, after) pairs"
        )
    return pairs_of(padding, len(extents))


def pairs_of(padding: int | Sequence[int | tuple[int, int]], rank: int) -> list[tuple[int, int]]:
    """Padding given in numbers, as `(before, after)` for each of `rank` dimensions.

    Raises:
        UserError: for another number of dimensions.
    """
    if hasattr(padding, "__index__"):
        padding = [operator.index(padding)] * rank  # type: ignore[arg-type]
    if not isinstance(padding, Sequence) or len(padding) != rank:
        raise UserError(f"padding={padding!r}: {rank} spatial dimensions need {rank} entries")
    pairs = []
    for entry in padding:
        pair = _integers((entry, entry) if hasattr(entry, "__index__") else entry, "padding")
        if len(pair) != 2:
            raise UserError(f"padding={padding}: {entry} is not (before, after)")
        pairs.append((pair[0], pair[1]))
    return pairs


def check_repeats(mode: str, extents: Sequence[int], pads: Sequence[tuple[int, int]]) -> None:
    """Refuses padding that would repeat a row of the input more than once, as PyTorch does.

    Raises:
        UserError: more rows of padding than the input has to give.
    """
    for extent, pad in zip(extents, pads, strict=True):
        most = {"wrap": extent, "reflect": extent - 1}.get(mode)
        if most is not None and max(pad) > most:
            raise UserError(
                f"{mode} padding of {pad} rows for an extent of {extent}, which has {most} to give; "
                f"use less, or a larger input"
            )
