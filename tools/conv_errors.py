"""Rounding errors of convolution by every algorithm, against float64.

    python tools/conv_errors.py --markdown

Normal data, 256 channels, filters scaled to outputs of size 1; root mean square of the error over that of
the output. The points of the literature (Lavin and Gray's, wincnn's) stand beside ours.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from census_conv import write_between
from rich.console import Console
from rich.table import Table

from shardtrain.kernels.conv import conv
from shardtrain.kernels.winograd import cook_toom
from shardtrain.kernels.winograd import xla as winograd

CHANNELS, FILTERS, EXTENT = 256, 16, 24
TYPES = "float32", "float16", "bfloat16"
USUAL = {
    (2, 3): ("0", "1", "-1"),
    (4, 3): ("0", "1", "-1", "2", "-2"),
    (6, 3): ("0", "1", "-1", "2", "-2", "1/2", "-1/2"),
}
HEADER = ("window", "algorithm", *TYPES)


def data(window: int) -> tuple[np.ndarray, np.ndarray]:
    """An input and filters, rounded to nothing yet."""
    rng = np.random.default_rng(window)
    x = rng.standard_normal((1, EXTENT, EXTENT, CHANNELS))
    kernel = rng.standard_normal((window, window, CHANNELS, FILTERS)) / (window * CHANNELS**0.5)
    return x, kernel


def error(found: jax.Array, right: jax.Array) -> float:
    """Relative root mean square."""
    return float(jnp.sqrt(((found.astype(float) - right) ** 2).mean() / (right**2).mean()))


def rows() -> list[list[str]]:
    """The table's lines."""
    found = []
    for window in (3, 5, 9):
        x, kernel = data(window)
        plain: Any = {"strides": (1, 1), "dilation": (1, 1), "padding": ((0, 0), (0, 0))}
        tried: dict[str, Any] = dict.fromkeys(("direct", "im2col", "fft"))
        tried |= {
            f"Winograd F({m}, {r})": cook_toom.algorithm(m, r)
            for m, r in ((2, 3), (4, 3), (6, 3), (2, 5), (4, 5))
            if r == window
        }
        tried |= {
            f"Winograd F({m}, {r}), points {', '.join(points)}": cook_toom.algorithm(
                m, r, tuple(map(cook_toom.Fraction, points))
            )
            for (m, r), points in USUAL.items()
            if r == window and m > 2
        }
        for name, algorithm in tried.items():
            errors = []
            for dtype in TYPES:
                a, b = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
                right = conv(a.astype(float), b.astype(float), **plain)
                if algorithm is None:
                    y = conv(a, b, algorithm=name, preferred_element_type=jnp.float32, **plain)
                else:
                    u = winograd.transform_filters(b, (algorithm,) * 2)
                    y = winograd.from_filters(a, u, (algorithm,) * 2)
                errors.append(f"{error(y, right):.1e}")
            found.append([f"{window}x{window}", name, *errors])
    return found


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    found = rows()
    table = Table(title=f"relative rms error, {CHANNELS} channels")
    for name in HEADER:
        table.add_column(name, justify="left" if name in HEADER[:2] else "right")
    for cells in found:
        table.add_row(*cells)
    Console(width=100).print(table)
    if args.markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in found]
        head = ["| " + " | ".join(HEADER) + " |", "|---|---|--:|--:|--:|"]
        write_between("conv_errors", "\n".join([f"jax {jax.__version__}, CPU.", "", *head, *lines]))


if __name__ == "__main__":
    main()
