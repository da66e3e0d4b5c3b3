"""Times a partitioned convolution that computes its interior while halos travel, against the one we have.

    python tools/bench_overlap.py --markdown

The split version sends its halos, convolves the rows that need none of them, then the border rows, and
joins the three. It depends on the halos later, and pays with two thin convolutions and a copy of the
output. Forward and backward pass, float32, in turns, on 8 simulated devices of one machine, where sending
is a copy; so what is measured is the price, and the most that hiding could save is the share of halos.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import in_turns
from census_conv import write_between
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import shardtrain as st

SHAPES = ((8, 128, 64, 32, 3), (8, 256, 128, 16, 3), (4, 256, 256, 8, 5), (32, 64, 32, 64, 3))
HEADER = ("images", "window", "split, ms", "whole, ms", "ratio", "no halos, ms", "share of halos")

Conv = Callable[[Array, Array], Array]


def convolve(x: Array, kernel: Array, rows: tuple[int, int] = (0, 0)) -> Array:
    columns = (kernel.shape[1] // 2,) * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), [rows, columns], dimension_numbers=numbers)


def in_island(local: Conv) -> Conv:
    where = P(None, "height")
    return lambda x, k: jax.shard_map(local, in_specs=(where, P()), out_specs=where)(x, k)


def split(x: Array, kernel: Array) -> Array:
    """Interior first: only the border rows wait for the halos."""
    reach, n = kernel.shape[0] // 2, lax.axis_size("height")
    low = lax.ppermute(x[:, -reach:], "height", [(i, i + 1) for i in range(n - 1)])
    high = lax.ppermute(x[:, :reach], "height", [(i + 1, i) for i in range(n - 1)])
    inside = convolve(x, kernel)
    above = convolve(jnp.concatenate([low, x[:, : 2 * reach]], axis=1), kernel)
    below = convolve(jnp.concatenate([x[:, -2 * reach :], high], axis=1), kernel)
    return jnp.concatenate([above, inside, below], axis=1)


def alone(x: Array, kernel: Array) -> Array:
    """The same work with zeros for halos: nothing is sent."""
    return convolve(x, kernel, (kernel.shape[0] // 2,) * 2)


def program(conv: Conv, mesh: Mesh, arrays: Sequence[Array]) -> Callable[[], tuple[Array, ...]]:
    """A call of the compiled forward and backward pass."""

    def step(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, ...]:
        y, pull = jax.vjp(conv, x, kernel)
        return y, *pull(cotangent)

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*arrays).compile()
    return lambda: compiled(*arrays)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each side")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a block lasts")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = st.make_mesh("height=8")
    rows: list[list[str]] = []
    for batch, height, width, channels, window in SHAPES:
        random = np.random.default_rng(0)
        images, kernel = (batch, height, width, channels), (window, window, channels, channels)
        places = P(None, "height"), P(), P(None, "height")
        arrays = [
            jax.device_put(random.standard_normal(shape).astype("f4"), NamedSharding(mesh, spec))
            for shape, spec in zip((images, kernel, images), places, strict=True)
        ]
        convs = in_island(split), st.ops.conv, in_island(alone)
        sides = [program(conv, mesh, arrays) for conv in convs]
        for a, b in zip(sides[0](), sides[1](), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)
        taken = in_turns(sides, args.rounds, args.seconds)
        times = [statistics.median(side) for side in taken]
        ratio = statistics.median(a / b for a, b in zip(*taken[:2], strict=True))
        share = statistics.median(1 - a / b for a, b in zip(taken[2], taken[1], strict=True))
        milliseconds = [f"{1e3 * t:.2f}" for t in times]
        shape = "x".join(map(str, images))
        rows.append(
            [shape, f"{window}x{window}", *milliseconds[:2], f"{ratio:.2f}", milliseconds[2], f"{share:.0%}"]
        )
    table = Table(title="interior first, over the whole at once; height=8, forward and backward")
    for name in HEADER:
        table.add_column(name, justify="right")
    for cells in rows:
        table.add_row(*cells)
    Console(width=100).print(table)
    if args.markdown:
        text = [
            f"Forward and backward pass on height=8, float32, {args.rounds} rounds in turns; jax "
            f"{jax.__version__}, 8 simulated CPU devices.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "--:|" * len(HEADER),
            *("| " + " | ".join(cells) + " |" for cells in rows),
        ]
        write_between("bench_overlap", "\n".join(text))


if __name__ == "__main__":
    main()
