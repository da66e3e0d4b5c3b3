"""Winograd's algorithms F(m, r): `m` outputs of a filter of `r` taps from `m + r - 1` multiplications.

Exact rational arithmetic, no arrays. The bilinear algorithm is `y = A^T [(G w) * (B^T x)]`: polynomials are
evaluated at points, multiplied there, and interpolated.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Matrix = tuple[tuple[Fraction, ...], ...]


@dataclass(frozen=True)
class Algorithm:
    """The matrices of one F(m, r).

    Attributes:
        outputs: `m`.
        taps: `r`.
        points: the finite points; the last point is infinity, which gives the leading coefficients.
        output: `A^T`, of `m` rows.
        filter: `G`, of `m + r - 1` rows.
        input: `B^T`, of `m + r - 1` rows.
    """

    outputs: int
    taps: int
    points: tuple[Fraction, ...]
    output: Matrix
    filter: Matrix
    input: Matrix

    @property
    def tile(self) -> int:
        """Multiplications, and inputs, of a tile: `m + r - 1`."""
        return self.outputs + self.taps - 1

    @property
    def amplification(self) -> float:
        """How much rounding errors grow in one dimension, by the model that ranks points.

        `sqrt(mean_a sum_i A[a,i]^2 |B_i|^2 |G_i|^2 / r)`: errors of independent products, weighted as they
        are summed. In two dimensions it is squared.
        """
        a, g, b = (matrix(rows) for rows in (self.output, self.filter, self.input))
        size = (b**2).sum(1) * (g**2).sum(1)
        return float(np.sqrt((a**2 @ size).mean() / self.taps))


def matrix(rows: Matrix) -> np.ndarray:
    """The nearest float64 numbers."""
    return np.array([[float(value) for value in row] for row in rows])


@functools.lru_cache(maxsize=256)
def algorithm(outputs: int, taps: int, points: tuple[Fraction, ...] | None = None) -> Algorithm:
    """F(outputs, taps) by the method of Cook and Toom.

    Args:
        outputs: `m`, 1 or more.
        taps: `r`, 1 or more.
        points: `m + r - 2` different ones; those of `best_points` by default.

    Raises:
        ValueError: numbers below 1, too few or too many points, or a point given twice.

    Example:
        >>> from shardtrain.kernels.winograd.cook_toom import algorithm
        >>> algorithm(2, 3).input[1]
        (Fraction(0, 1), Fraction(1, 1), Fraction(1, 1), Fraction(0, 1))

    References:
        Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms for
        Convolutional Neural Networks, CVPR 2016; Blahut, Fast Algorithms for Signal Processing, 2010.
    """
    if outputs < 1 or taps < 1:
        raise ValueError(f"F({outputs}, {taps}): outputs and taps must be 1 or more")
    tile = outputs + taps - 1
    found = best_points(tile - 1) if points is None else points
    if len(found) != tile - 1 or len(set(found)) != tile - 1:
        given = ", ".join(map(str, found))
        raise ValueError(f"F({outputs}, {taps}) takes {tile - 1} different points, not {given}")
    filters, inputs = [], []
    for i, p in enumerate(found):
        others = [q for j, q in enumerate(found) if j != i]
        scale = math.prod((p - q for q in others), start=Fraction(1))
        sign = 1 if scale > 0 else -1  # the filter's row begins positive
        filters.append(tuple(sign * p**k / scale for k in range(taps)))
        inputs.append((*(sign * c for c in _from_roots(others)), Fraction(0)))
    last = _from_roots(found)
    sign = 1 if next(c for c in last if c) > 0 else -1  # the input's last row begins positive
    filters.append(tuple(Fraction(k == taps - 1) for k in range(taps)))
    inputs.append(tuple(sign * c for c in last))
    output = [[p**k for p in found] + [Fraction(sign * (k == outputs - 1))] for k in range(outputs)]
    return Algorithm(outputs, taps, tuple(found), tuple(map(tuple, output)), tuple(filters), tuple(inputs))


def _from_roots(roots: tuple[Fraction, ...] | list[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of `prod (x - root)`, lowest first."""
    found = [Fraction(1)]
    for root in roots:
        found = [b - root * a for a, b in zip([*found, Fraction(0)], [Fraction(0), *found], strict=True)]
    return tuple(found)


_PAIRS = {
    3: (),
    5: ("5/8", "3/2"),
    7: ("1/2", "1", "2"),
    9: ("1/2", "1", "2", "3/4"),
    11: ("1/2", "1", "2", "3/4", "4/3"),
}
"""Plus and minus these, and 0. Of all pairs of fractions up to 8 those of least `amplification` that are sums
of few powers of two, exact in every floating point type; `tools/winograd_points.py` searches them."""


def best_points(count: int) -> tuple[Fraction, ...]:
    """`count` finite points that keep rounding errors small: 0, then pairs of plus and minus."""
    if count <= 3:
        return tuple(map(Fraction, (0, 1, -1)[:count]))
    odd = count if count % 2 else count + 1
    pairs = _PAIRS.get(odd)
    if pairs is None:
        raise ValueError(
            f"no points for tiles of {count + 1}: errors grow beyond use; 12 is the largest tile"
        )
    found = [Fraction(0)]
    for pair in pairs:
        found += [Fraction(pair), -Fraction(pair)]
    return tuple(found[:count])
