"""Measures every algorithm of convolution on this device and writes the table that `algorithm="auto"` uses.

    python tools/tune_conv.py                                  # the layers of tools/bench_conv.py and more
    python tools/tune_conv.py --layer '32x56x56x64->128,window=3' --layer ... --out mine.json

The first writes the table of this kind of device that comes with shardtrain, with the rates of the cost model
fitted to it; the second one of your own, for `st.ops.load_conv_table("mine.json")`. A layer is what one
device computes: batch, extents, channels -> filters, window; then strides, dilation, padding (`same`, or
numbers), groups and dtype as they are needed. Output and both gradients are timed in turns.
"""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_conv import LAYERS, SWEEP
from bench_ops import in_turns
from rich.console import Console
from rich.progress import track

from shardtrain.cli.start import main as start
from shardtrain.errors import UserError
from shardtrain.kernels.conv import costs, tables
from shardtrain.kernels.conv.api import conv
from shardtrain.kernels.conv.select import rows_of
from shardtrain.kernels.conv.task import ALGORITHMS, PASSES, ConvTask, parse

MORE = (
    "8x1024x64->64,window=3",
    "8x1024x64->64,window=9",
    "8x4096x16->16,window=31",
    "8x4096x8->8,window=127",
    "1x24x24x24x16->16,window=3",
    "1x24x24x24x32->32,window=3",
    "1x16x16x16x64->64,window=3",
    "1x24x24x24x8->8,window=5",
    "32x8x8x64->64,window=3",
    "32x8x8x16->16,window=3",
    "32x28x28x1->32,window=3",
    "32x28x28x32->64,window=3",
    "16x32x32x64->64,window=3",
    "4x32x32x128->128,window=5",
    "8x32x32x32->32,window=7",
    "2x128x128x32->32,window=3",
    "1x128x128x8->8,window=11",
    "4x32x32x64->64,window=3,dilation=2",
)
LARGEST = 2 << 30
"""Bytes of workspace beyond which nothing is measured."""

WORKSPACE = 256 << 20
"""Bytes of workspace beyond which `auto` refuses an algorithm on a device that was tuned."""

LAUNCH = 5e-6
"""Seconds that every stage of the model takes at least."""

Seconds = dict[str, dict[str, float]]
"""By pass and algorithm."""


@dataclass(frozen=True)
class Flags:
    """What is measured, and where it goes."""

    layer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="LAYER")] = ()
    """Layers such as 32x56x56x64->128,window=3,strides=2; repeat the flag. By default those of the table that
    comes with shardtrain."""
    out: Path | None = None
    """File of the table; by default, and without --layer only, the one that comes with shardtrain."""
    rounds: int = 7
    """Blocks of calls of each side; the median counts."""
    again: bool = False
    """Keep the lower one of every time that is in the file already and the new one: on machines that also do
    other work."""


def programs(task: ConvTask) -> dict[tuple[str, str], Callable[[], object]]:
    """One compiled program for every pass and algorithm that computes it."""
    rng = np.random.default_rng(0)
    p = task.problem
    shape = (task.batch, *task.extents, task.channels)
    window = (*p.window, task.channels // p.groups, task.filters)
    x = jnp.asarray(rng.standard_normal(shape), task.dtype)
    kernel = jnp.asarray(rng.standard_normal(window) / math.sqrt(math.prod(window[:-1])), task.dtype)
    dy = jnp.asarray(rng.standard_normal((task.batch, *task.outputs, task.filters)), task.dtype)
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for name, rows in rows_of(task, "unknown").items():
        for row in rows:
            if not row.multiplications or row.workspace > LARGEST:
                continue
            program = jax.jit(_pass(task, name, row.algorithm)).lower(x, kernel, dy).compile()
            found[name, row.algorithm] = lambda run=program: run(x, kernel, dy).block_until_ready()  # type: ignore[misc]
    return found


def _pass(task: ConvTask, name: str, algorithm: str) -> Callable[..., Any]:
    p = task.problem

    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(
            x,
            kernel,
            strides=p.strides,
            dilation=p.dilation,
            input_dilation=p.input_dilation,
            padding=p.padding,
            groups=p.groups,
            algorithm=algorithm,
        )

    if name == "forward":
        return lambda x, kernel, dy: run(x, kernel)
    which = PASSES.index(name) - 1
    return lambda x, kernel, dy: jax.vjp(run, x, kernel)[1](dy)[which]


def measured(task: ConvTask, rounds: int) -> Seconds:
    """Median seconds; sides that are ten times as slow as direct convolution are called twice only."""
    sides = programs(task)
    once = {}
    for key, side in sides.items():
        side()
        clock = time.perf_counter()
        side()
        once[key] = time.perf_counter() - clock
    near = {key: side for key, side in sides.items() if once[key] < 10 * once[key[0], "direct"]}
    taken = dict(zip(near, in_turns(list(near.values()), rounds, seconds=0.02), strict=True))
    found: Seconds = {name: {} for name in PASSES}
    for name, algorithm in sides:
        times = taken.get((name, algorithm))
        found[name][algorithm] = float(f"{statistics.median(times) if times else once[name, algorithm]:.4g}")
    return found


def lower(found: dict[ConvTask, Seconds], path: Path) -> dict[ConvTask, Seconds]:
    """The lower ones of these times and of those in a file."""
    before = json.loads(path.read_text())["rows"]
    for row in before:
        for name, times in found.get(parse(row["layer"]), {}).items():
            for algorithm, value in row["seconds"].get(name, {}).items():
                times[algorithm] = min(value, times.get(algorithm, value))
    return found


def fitted(found: dict[ConvTask, Seconds]) -> dict[str, Any] | None:
    """The cost model's rates for every pass and algorithm, and how far they can be trusted.

    A margin is the ninth decile of how much the model overrates an algorithm beside direct convolution.
    """
    plain = {t: s for t, s in found.items() if t.dtype == "float32" and t.problem.groups == 1}
    if len(plain) < 20:
        return None
    by_pass: dict[str, dict[str, tuple[float, float]]] = {}
    margins: dict[str, dict[str, float]] = {}
    for name in PASSES:
        runs = {t: t.dual if name == "input" and t.problem.dense else t for t in plain}
        by_pass[name], over = {}, {}
        for algorithm in ALGORITHMS:
            taken = {t: s[name][algorithm] for t, s in plain.items() if algorithm in s[name]}
            rate = _fit([(runs[t], v) for t, v in taken.items()], algorithm)
            by_pass[name][algorithm] = rate
            over[algorithm] = {
                t: costs.seconds(runs[t], algorithm, rate, LAUNCH) / v for t, v in taken.items()
            }
        direct = over["direct"]
        margins[name] = {
            a: round(float(np.quantile([direct[t] / v for t, v in o.items()], 0.9)), 2)
            for a, o in over.items()
        }
    return {"by_pass": by_pass, "margins": margins, "launch": LAUNCH, "workspace": WORKSPACE}


def _fit(rows: list[tuple[ConvTask, float]], algorithm: str) -> tuple[float, float]:
    """Operations and bytes in a second, on a grid of factors of 1.2, by the least error in the logarithm."""
    grid = np.array([float(f"{1e8 * 1.2**i:.3g}") for i in range(45)])
    operations, bandwidth = grid[:, None], grid[None]
    miss = np.zeros((grid.size, grid.size))
    for task, taken in rows:
        stages = costs.stages(task, algorithm)
        times = sum(LAUNCH + np.maximum(s.operations / operations, s.bytes / bandwidth) for s in stages)
        miss += abs(np.log(times / taken))
    i, j = np.unravel_index(miss.argmin(), miss.shape)
    return float(grid[i]), float(grid[j])


def machine() -> str:
    """Which one was measured."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", lines)
    return (
        f"{os.cpu_count()} cores, {model.group(1) if model else platform.processor()}, {platform.machine()}"
    )


def write(flags: Flags) -> None:
    """Measures and writes."""
    if flags.layer and flags.out is None:
        raise UserError("--layer: name the file of your table with --out")
    kind = jax.devices()[0].device_kind
    path = flags.out or tables.shipped_path(kind)
    if flags.again and not path.exists():
        raise UserError(f"--again: there is no {path} yet")
    if flags.rounds < 1:
        raise UserError(f"--rounds {flags.rounds}: use 1 or more")
    texts = flags.layer or tuple(layer.text for layer in (*LAYERS, *SWEEP)) + MORE
    tasks = list(dict.fromkeys(map(parse, texts)))
    for dtype in {t.dtype for t in tasks} - {"float32", "bfloat16", "float16"}:
        raise UserError(f"a layer of dtype={dtype}; there are float32, bfloat16 and float16")
    progress = track(tasks, f"timing on {kind}", console=Console(stderr=True), transient=True)
    found = {task: measured(task, flags.rounds) for task in progress}
    if flags.again:
        tables.read(path.read_text(), str(path))
        found = lower(found, path)
    rows = [{"layer": str(task), "seconds": seconds} for task, seconds in found.items()]
    head = {"version": tables.VERSION, "device_kind": kind, "jax": jax.__version__, "machine": machine()}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(head)[:-1] + f',\n "rates": {json.dumps(fitted(found))},\n "rows": [\n  {lines}\n]}}\n'
    tables.read(text, str(path))  # what cannot be read again is not written
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror})") from error
    print(f"{len(rows)} layers in {path}")


if __name__ == "__main__":
    start(write, Flags, __doc__)
