"""Matrices of fractions times lists of arrays, by which the GPU kernels transform tiles in registers."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardtrain.kernels.winograd.cook_toom import Matrix, matrix


def apply(rows: Matrix, parts: Sequence[Any]) -> list[Any]:
    """Sums of `parts`, weighted by each of `rows`.

    Two rows that differ in signs only, as those of points p and -p do, share two sums: of the terms whose
    signs agree and of those whose signs differ.

    Example:
        >>> from shardtrain.kernels.winograd.bilinear import apply
        >>> from fractions import Fraction as F
        >>> apply(((F(1), F(1)), (F(1), F(-1))), [3.0, 1.0])
        [4.0, 2.0]
    """
    done: dict[int, Any] = {}
    for i, row in enumerate(rows):
        if i in done:
            continue
        twin = next((j for j in range(i + 1, len(rows)) if j not in done and _mirrored(row, rows[j])), None)
        if twin is None:
            done[i] = _weighted(row, parts)
            continue
        like = _weighted([a if a == b else 0 for a, b in zip(row, rows[twin], strict=True)], parts)
        unlike = _weighted([a if a != b else 0 for a, b in zip(row, rows[twin], strict=True)], parts)
        done[i], done[twin] = like + unlike, like - unlike
    return [done[i] for i in range(len(rows))]


def apply_2d(rows: tuple[Matrix, Matrix], tile: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """`rows[0] @ tile @ rows[1].T` of a tile given as rows of arrays."""
    columns = [apply(rows[0], [line[j] for line in tile]) for j in range(len(tile[0]))]
    return [apply(rows[1], [column[i] for column in columns]) for i in range(len(rows[0]))]


def weights(rows: tuple[Matrix, Matrix]) -> np.ndarray:
    """`(points, outputs)`: the weights of all points of a tile in all outputs of `apply_2d`."""
    both = np.einsum("si,tj->ijst", *map(matrix, rows))
    return both.reshape(-1, len(rows[0]) * len(rows[1])).astype(np.float32)


def _mirrored(a: Sequence[Any], b: Sequence[Any]) -> bool:
    pairs = list(zip(a, b, strict=True))
    alike = any(x == y != 0 for x, y in pairs)
    unlike = any(x == -y != 0 for x, y in pairs)
    return alike and unlike and all(abs(x) == abs(y) for x, y in pairs)


def _weighted(row: Sequence[Any], parts: Sequence[Any]) -> Any:
    terms = [
        part if w == 1 else -part if w == -1 else part * float(w)
        for w, part in zip(row, parts, strict=True)
        if w
    ]
    return functools.reduce(operator.add, terms)
