"""Times convolution by every algorithm, forward pass on one CPU, in turns.

    python tools/bench_conv.py --markdown --plot docs/conv_window_sizes.png

Layers of AlexNet, VGG-16 and ResNet-50, and windows from 3 to 31 pixels; float32. PyTorch stands beside ours
where it is installed. `naive` is a loop over output pixels in Python, timed on one small image.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import in_turns
from census_conv import write_between
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shardtrain.kernels.conv import ALGORITHMS, conv, refused

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Layer:
    """One convolution: a square image and window, padded to keep its extent where it has no stride."""

    name: str
    batch: int
    extent: int
    channels: int
    filters: int
    window: int
    stride: int = 1
    padding: int | None = None
    groups: int = 1

    @property
    def pad(self) -> int:
        return self.window // 2 if self.padding is None else self.padding

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self.batch, self.extent, self.extent, self.channels), np.float32)
        shape = self.window, self.window, self.channels // self.groups, self.filters
        return x, rng.standard_normal(shape, np.float32) / self.window


LAYERS = (
    Layer("AlexNet 1", 2, 224, 3, 64, 11, 4, 2),
    Layer("AlexNet 2", 2, 27, 64, 192, 5),
    Layer("AlexNet 3", 2, 13, 192, 384, 3),
    Layer("AlexNet 4", 2, 13, 384, 256, 3),
    Layer("AlexNet 5", 2, 13, 256, 256, 3),
    Layer("VGG 1.1", 1, 224, 3, 64, 3),
    Layer("VGG 1.2", 1, 224, 64, 64, 3),
    Layer("VGG 2.1", 1, 112, 64, 128, 3),
    Layer("VGG 2.2", 1, 112, 128, 128, 3),
    Layer("VGG 3.1", 1, 56, 128, 256, 3),
    Layer("VGG 3.2", 1, 56, 256, 256, 3),
    Layer("VGG 4.1", 1, 28, 256, 512, 3),
    Layer("VGG 4.2", 1, 28, 512, 512, 3),
    Layer("VGG 5", 1, 14, 512, 512, 3),
    Layer("ResNet 1", 1, 224, 3, 64, 7, 2, 3),
    Layer("ResNet 2, 1x1 in", 1, 56, 256, 64, 1),
    Layer("ResNet 2, 3x3", 1, 56, 64, 64, 3),
    Layer("ResNet 2, 1x1 out", 1, 56, 64, 256, 1),
    Layer("ResNet 3, 1x1 s2", 1, 56, 256, 512, 1, 2, 0),
    Layer("ResNet 3, 3x3 s2", 1, 56, 128, 128, 3, 2, 1),
    Layer("ResNet 3, 3x3", 1, 28, 128, 128, 3),
    Layer("ResNet 4, 3x3", 1, 14, 256, 256, 3),
    Layer("ResNet 4, 1x1 out", 1, 14, 256, 1024, 1),
    Layer("ResNet 5, 3x3", 1, 7, 512, 512, 3),
    Layer("ResNeXt, 32 groups", 1, 28, 256, 256, 3, groups=32),
)
SIZES = (3, 5, 7, 9, 11, 15, 19, 23, 31)
SWEEP = tuple(Layer(f"window {k}", 1, 64, 16, 16, k) for k in SIZES)

Side = Callable[[], object]


def ours(layer: Layer, algorithm: str) -> Side | None:
    """One of our algorithms compiled, None where it does not compute the layer."""
    if refused(algorithm, (layer.window,) * 2, (layer.stride,) * 2):
        return None
    x, kernel = map(jnp.asarray, layer.arrays())

    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(
            x,
            kernel,
            strides=(layer.stride,) * 2,
            dilation=(1, 1),
            padding=((layer.pad, layer.pad),) * 2,
            groups=layer.groups,
            algorithm=algorithm,
        )

    program = jax.jit(run).lower(x, kernel).compile()
    return lambda: program(x, kernel).block_until_ready()


def theirs(layer: Layer) -> Side | None:
    """PyTorch's convolution, channels last as ours."""
    if torch is None:
        return None
    x, kernel = layer.arrays()
    image = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    weight = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    weight = weight.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.no_grad():
            return torch.nn.functional.conv2d(
                image, weight, stride=layer.stride, padding=layer.pad, groups=layer.groups
            )

    return run


def naive(layer: Layer) -> float:
    """Seconds of a loop over the pixels and filters of one image, in plain numpy."""
    x, kernel = layer.arrays()
    x = np.pad(x, ((0, 0), (layer.pad,) * 2, (layer.pad,) * 2, (0, 0)))
    flat = kernel.reshape(-1, layer.filters)
    y = np.zeros((layer.extent, layer.extent, layer.filters), np.float32)
    clock = time.perf_counter()
    for i in range(layer.extent):
        for j in range(layer.extent):
            patch = x[0, i : i + layer.window, j : j + layer.window].reshape(-1)
            for f in range(layer.filters):
                y[i, j, f] = patch @ flat[:, f]
    return time.perf_counter() - clock


def measured(layer: Layer, rounds: int) -> dict[str, float]:
    """Seconds by algorithm."""
    sides = {name: ours(layer, name) for name in ALGORITHMS} | {"PyTorch": theirs(layer)}
    there = {name: side for name, side in sides.items() if side is not None}
    taken = in_turns(list(there.values()), rounds, seconds=0)  # one call of each in a round
    return dict(zip(there, map(statistics.median, taken), strict=True))


def draw(times: dict[int, dict[str, float]], path: Path) -> None:
    """Time over window size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name in (*ALGORITHMS, "PyTorch"):
        points = [(k, 1e3 * found[name]) for k, found in times.items() if name in found]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xlabel="window, pixels", ylabel="forward pass, ms", yscale="log", xticks=list(times))
    axis.set_title("64x64 image, 16 channels to 16")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="calls of each side")
    parser.add_argument("--plot", type=Path, help="where to draw time over window size")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    progress = track((*LAYERS, *SWEEP), "timing", console=Console(stderr=True), transient=True)
    found = {layer: measured(layer, args.rounds) for layer in progress}
    columns = [name for name in (*ALGORITHMS, "PyTorch") if any(name in times for times in found.values())]
    table = Table(title="forward pass, ms")
    lines = []
    for name in ("layer", "shape", *columns):
        table.add_column(name, justify="left" if name in ("layer", "shape") else "right")
    for layer, times in found.items():
        best = min(times[name] for name in ALGORITHMS if name in times)
        shape = f"{layer.batch}x{layer.extent}²x{layer.channels} -> {layer.filters}, {layer.window}²"
        cells = [f"{1e3 * times[c]:.2f}" if c in times else "" for c in columns]
        marked = [
            f"[green]{v}[/]" if times.get(c) == best else v for c, v in zip(columns, cells, strict=True)
        ]
        table.add_row(layer.name, shape, *marked)
        bold = [f"**{v}**" if times.get(c) == best else v for c, v in zip(columns, cells, strict=True)]
        lines.append("| " + " | ".join([layer.name, shape, *bold]) + " |")
    Console(width=100).print(table)
    small = Layer("", 1, 32, 16, 16, 5)
    loop, gemm = naive(small), measured(small, args.rounds)["im2col"]
    says = (
        f"A loop over pixels and filters takes {loop / gemm:.0f} times as long as im2col (32², 16 -> 16, 5²)."
    )
    print(says)
    if args.plot:
        draw({layer.window: found[layer] for layer in SWEEP}, args.plot)
    if args.markdown:
        head = ["| " + " | ".join(["layer", "shape", *columns]) + " |", "|---|---|" + "--:|" * len(columns)]
        intro = f"Milliseconds, float32, median of {args.rounds} in turns; jax {jax.__version__}, CPU."
        write_between("bench_conv", "\n".join([intro, "", *head, *lines, "", says]))


if __name__ == "__main__":
    main()
