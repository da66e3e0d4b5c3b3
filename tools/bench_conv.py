"""Times convolution by every algorithm, forward pass on one CPU, in turns.

    python tools/bench_conv.py --markdown --plot docs/conv_window_sizes.png

Layers of AlexNet, VGG-16 and ResNet-50, and windows from 3 to 31 pixels; float32. PyTorch is timed,
too, if it is installed. `auto` runs the same program as the algorithm that it chooses. Scalar loops, one
multiplication and addition at a time, are timed on one layer: in Python, jitted, and in C where there is a
compiler.
"""

import argparse
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from shardtrain.kernels.conv import ALGORITHMS, conv, refused, rows_of
from shardtrain.kernels.conv.select import chosen
from shardtrain.kernels.conv.task import parse

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

    @property
    def text(self) -> str:
        """As `tools/tune_conv.py` takes it."""
        shape = f"{self.batch}x{self.extent}x{self.extent}x{self.channels}->{self.filters}"
        more = f"strides={self.stride},padding={self.pad},groups={self.groups}"
        return f"{shape},window={self.window},{more}"

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

OURS = (*ALGORITHMS, "auto")

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


NEST = Layer("", 1, 28, 64, 64, 3)
"""What the scalar loops compute; without padding."""

LOOP_IN_C = """
void nest(const float *x, const float *k, float *y, int n, int m, int w, int c, int f) {
  for (int i = 0; i < m; i++) for (int j = 0; j < m; j++) for (int o = 0; o < f; o++)
    for (int a = 0; a < w; a++) for (int b = 0; b < w; b++) for (int q = 0; q < c; q++)
      y[(i * m + j) * f + o] += x[((i + a) * n + j + b) * c + q] * k[((a * w + b) * c + q) * f + o];
}
"""


def in_python(x: np.ndarray, k: np.ndarray) -> float:
    """Seconds of a nest of loops over lists, one row of outputs timed."""
    (window, _, channels, filters), rows = k.shape, x.shape[0] - k.shape[0] + 1
    image, kernel = x.tolist(), k.tolist()
    clock = time.perf_counter()
    for j in range(rows):
        for f in range(filters):
            total = 0.0
            for a in range(window):
                for b in range(window):
                    for c in range(channels):
                        total += image[a][j + b][c] * kernel[a][b][c][f]
    return (time.perf_counter() - clock) * rows


def jitted(x: np.ndarray, k: np.ndarray) -> float:
    """Seconds of the nest as one `lax.fori_loop` compiled by XLA."""
    (w, _, c, f), m = k.shape, x.shape[0] - k.shape[0] + 1
    steps = m * m * f * w * w * c

    def add(n: jax.Array, y: jax.Array, x: jax.Array, k: jax.Array) -> jax.Array:
        i, j, o, a, b, q = jnp.unravel_index(n, (m, m, f, w, w, c))
        return y.at[i, j, o].add(x[i + a, j + b, q] * k[a, b, q, o])

    def run(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, steps, lambda n, y: add(n, y, x, k), jnp.zeros((m, m, f)))

    program = jax.jit(run).lower(x, k).compile()
    clock = time.perf_counter()
    jax.block_until_ready(program(x, k))
    return time.perf_counter() - clock


def in_c(x: np.ndarray, k: np.ndarray) -> float | None:
    """Seconds of the nest compiled by `cc -O2`, None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "nest.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=LOOP_IN_C.encode(), check=True)
        nest = ctypes.CDLL(str(library)).nest
    (w, _, c, f), m = k.shape, x.shape[0] - k.shape[0] + 1
    y = np.zeros((m, m, f), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, k, y)]
    clock = time.perf_counter()
    nest(*pointers, x.shape[0], m, w, c, f)
    return time.perf_counter() - clock


def loops(rounds: int) -> str:
    """How long the scalar loops take, as multiples of im2col's time."""
    x, k = NEST.arrays()
    gemm = statistics.median(measured(NEST, rounds)["im2col"])
    x = np.pad(x[0], ((NEST.pad,) * 2, (NEST.pad,) * 2, (0, 0)))
    found = {
        "in Python": in_python(x, k),
        "jitted (`lax.fori_loop`)": jitted(x, k),
        "in C (`cc -O2`, one core)": in_c(x, k),
    }
    ratios = ", ".join(f"{name} {v / gemm:,.0f} times" for name, v in found.items() if v is not None)
    return (
        f"Scalar loops, one multiplication and addition at a time, take {ratios} as long as im2col "
        f"({1e3 * gemm:.2f} ms for 28², 64 -> 64, 3²; two cores)."
    )


def verdict(found: dict[Layer, dict[str, list[float]]]) -> list[str]:
    """Sentences on `auto` and on large windows."""
    lost, noise = {}, {}
    for layer, times in found.items():
        taken = chosen(rows_of(parse(layer.text), jax.devices()[0].device_kind)["forward"])
        medians = {name: statistics.median(times[name]) for name in ALGORITHMS if name in times}
        lost[layer.name] = medians[taken] / min(medians.values())
        noise[layer.name] = min(times["auto"]) / min(min(times[name]) for name in medians)
    says = []
    for what, ratios in (
        ("The algorithm that `auto` takes over the fastest, by these medians", lost),
        ("`auto` timed by itself over the fastest, by the fastest block of each", noise),
    ):
        slow = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > 1.05]
        says.append(f"{what}: " + (f"above 1.05 in {', '.join(slow)}." if slow else "at most 1.05."))
    large = {layer.window: found[layer] for layer in SWEEP if layer.window >= 15}
    gemm = ", ".join(f"{over(t['im2col'], t['fft']):.1f} at {k}" for k, t in large.items())
    direct = ", ".join(f"{over(t['direct'], t['fft']):.1f} at {k}" for k, t in large.items())
    says.append(f"Times by which fft is faster than im2col: {gemm}; than direct: {direct}.")
    return says


def measured(layer: Layer, rounds: int) -> dict[str, list[float]]:
    """Seconds by algorithm, in every round."""
    sides = {name: ours(layer, name) for name in OURS} | {"PyTorch": theirs(layer)}
    there = {name: side for name, side in sides.items() if side is not None}
    return dict(zip(there, in_turns(list(there.values()), rounds, seconds=0.02), strict=True))


def over(a: list[float], b: list[float]) -> float:
    """Returns the median ratio over the rounds, since other work on the machine slows both sides equally."""
    return statistics.median(p / q for p, q in zip(a, b, strict=True))


def draw(times: dict[int, dict[str, float]], path: Path) -> None:
    """Time over window size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name in (*ALGORITHMS, "PyTorch"):  # auto would hide one of the others
        points = [(k, 1e3 * found[name]) for k, found in times.items() if name in found]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xlabel="window, pixels", ylabel="forward pass, ms", yscale="log", xticks=list(times))
    axis.set_title("64x64 image, 16 channels to 16")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclass(frozen=True)
class Timings:
    """The table: median seconds of every algorithm for every layer.

    Attributes:
        medians: seconds by algorithm, for each layer.
        columns: the algorithms that have a time for at least one layer.
    """

    medians: Mapping[Layer, Mapping[str, float]]
    columns: Sequence[str]

    def rows(self, highlight: str) -> Iterator[list[str]]:
        """Lines of cells; `highlight` formats the cell of the fastest algorithm, such as `"**{}**"`."""
        for layer, times in self.medians.items():
            best = min(times[name] for name in ALGORITHMS if name in times)
            shape = f"{layer.batch}x{layer.extent}²x{layer.channels} -> {layer.filters}, {layer.window}²"
            cells = [f"{1e3 * times[name]:.2f}" if name in times else "" for name in self.columns]
            marked = [
                highlight.format(cell) if times.get(name) == best else cell
                for name, cell in zip(self.columns, cells, strict=True)
            ]
            yield [layer.name, shape, *marked]

    def terminal(self) -> Table:
        """The table for the terminal."""
        table = Table(title="forward pass, ms")
        for name in ("layer", "shape", *self.columns):
            table.add_column(name, justify="left" if name in ("layer", "shape") else "right")
        for row in self.rows("[green]{}[/]"):
            table.add_row(*row)
        return table

    def markdown(self) -> list[str]:
        """The table as lines of Markdown."""
        head = "| " + " | ".join(["layer", "shape", *self.columns]) + " |"
        lines = ["| " + " | ".join(row) + " |" for row in self.rows("**{}**")]
        return [head, "|---|---|" + "--:|" * len(self.columns), *lines]


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
    medians = {layer: {a: statistics.median(t) for a, t in times.items()} for layer, times in found.items()}
    columns = [name for name in (*OURS, "PyTorch") if any(name in times for times in found.values())]
    timings = Timings(medians, columns)
    Console(width=100).print(timings.terminal())
    conclusions = "\n".join([*verdict(found), loops(args.rounds)])
    print(conclusions)
    if args.plot:
        draw({layer.window: medians[layer] for layer in SWEEP}, args.plot)
    if args.markdown:
        intro = f"Milliseconds, float32, median of {args.rounds} in turns; jax {jax.__version__}, CPU."
        write_between("bench_conv", "\n".join([intro, "", *timings.markdown(), "", conclusions]))


if __name__ == "__main__":
    main()
