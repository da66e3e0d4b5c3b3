"""Times pipeline schedules on two devices against the ideal that their bubbles allow, and PyTorch's.

    python tools/bench_pipeline.py --markdown --torch-python venv-with-torch/bin/python

The network is a row of equal dense layers, so the stages are balanced, in float32; XLA's convolutions are
slow inside loops on CPUs (jax-ml/jax#12868), which would hide what a pipeline costs. With as many rows as
features F, I and W take about equally long. A device is one core. If an unpipelined run of the same model and
microbatches, alone and held to one core, takes T, the ideal is T / (devices * (1 - idle)), where idle is the
schedule's bubble if F, I and W take equally long and messages no time. Two such runs at once, one on each
device, show what cores take from each other, whatever they do.

Freed memory stays in the process, on all sides: on GPUs an allocator keeps it, here it would go back, and
every step would begin with a hundred thousand page faults. XLA multiplies by Eigen, on all sides, too: with
YNNPACK, its default on CPUs (`--ynnpack`), steps take longer, those of pipelines most. All that is compared
takes turns, one step each, an unpipelined one before and after each pipelined one: a machine may be fast in
one minute and slow in the next. Ratios are medians over the rounds. A step during which other processes took
cores is done again, while there is patience. Linux only, whose `/proc` says so.

PyTorch runs its own schedules of the same names by `torch.distributed.pipelining`, in two gloo processes of
one thread, over an ideal from its own unpipelined step in both at once. It is needed by nothing else: `pip
install torch numpy` in any environment and name its python, without it those rows are left out.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench_step import has_torch, machine, markdown, show, show_table
from rich.progress import track
from torch_pipeline import ALONE, CLASSES, DEVICES, INPUTS, LAYERS, RATE, TORCH, Network, Step, Team

MARKERS = ("bench_pipeline", "bench_pipeline_torch")
QUIET = 0.08
APART = "two apart"
KEEPING = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
"""Keeps freed memory in the process, as the allocators of GPUs do; all arenas but the first give it back."""

EIGEN = "--xla_cpu_experimental_ynn_fusion_type="
"""XLA's flag against products by YNNPACK."""


class Watch:
    """Sees what share of the cores is taken by other processes than ours.

    Args:
        patience: seconds in all that may be spent on doing steps again.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.processes = ["self"]
        self.shares: list[float] = []

    def _others(self) -> int:
        """Ticks of the clock, over all cores."""
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        stats = [Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in self.processes]
        return sum(fields) - fields[3] - fields[4] - sum(int(s[11]) + int(s[12]) for s in stats)

    def quietest(self, step: Step) -> float:
        """A step, done again and again until it has the machine for itself."""
        best = 2.0, 0.0
        while best[0] == 2.0 or (best[0] > QUIET and self.patience > 0):
            ticks, clock = self._others(), time.perf_counter()
            seconds = step()
            past = time.perf_counter() - clock
            others = (self._others() - ticks) / (past * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1))
            self.patience -= past if best[0] < 2.0 else 0.0
            best = min(best, (others, seconds))
        self.shares.append(best[0])
        return best[1]


def in_turns(
    steps: Mapping[str, Step], rounds: int, watch: Watch, bases: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of steps, in alternating order.

    Args:
        bases: the step against which another is measured, by that one's name. It is done before and after it.

    Returns:
        The seconds of each step, a number for every round, for bases one for every time that they were done;
        and for each step that has a base the mean of the base's two, a number for every round.
    """
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    beside: dict[str, list[float]] = {name: [] for name in bases}

    def do(name: str) -> float:
        taken[name].append(watch.quietest(steps[name]))
        return taken[name][-1]

    others = [name for name in steps if name not in bases.values()]
    for turn in track(range(rounds), f"{len(steps)} kinds of steps", refresh_per_second=0.5):
        done = ""
        for name in others[:: 1 if turn % 2 else -1]:
            base = bases.get(name)
            if base and base != done:
                do(base)
            do(name)
            if base:
                before = taken[base][-1]
                beside[name].append((before + do(base)) / 2)
            done = base or ""
    return taken, beside


def on_one_core(step: Step) -> Step:
    """A step with all threads of this process on one core.

    XLA's devices share threads: while others are idle, one device's operations run on their cores too.
    """

    def bind(cores: set[int]) -> None:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        cores = os.sched_getaffinity(0)
        bind({min(cores)})
        try:
            yield
        finally:
            bind(cores)

    def run() -> float:
        with held():
            return step()

    return run


# --- shardtrain ---


def batch_of(network: Network, microbatches: int) -> tuple[Any, Any]:
    """Random rows and labels on the host."""
    import numpy as np

    random, rows = np.random.default_rng(0), network.rows * microbatches
    inputs = random.standard_normal((rows, INPUTS), np.float32)
    return inputs, random.integers(0, CLASSES, rows, np.int32)


def model(network: Network) -> Any:
    from flax import nnx

    import shardtrain as st

    class Row(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            extents = [INPUTS] + [network.features] * (LAYERS + 1)
            self.layers = nnx.List(st.nn.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(extents))
            self.head = st.nn.Linear(network.features, CLASSES, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return self.head(x)

    return Row(nnx.Rngs(0))


class Ours:
    """A trainer and its compiled step."""

    def __init__(self, network: Network, mesh: Any, microbatches: int, schedule: str | None = None) -> None:
        import optax

        import shardtrain as st

        self.trainer = st.Trainer(
            model(network),
            optax.sgd(RATE),
            mesh=mesh,
            accumulate=microbatches,
            pipeline=st.Pipeline(schedule=schedule),
        )
        batch = batch_of(network, microbatches)
        self.compiled = self.trainer.prepare(*batch)
        self.batch = self.trainer.place(*batch)

    def start(self) -> Any:
        sums = self.trainer.advance(self.batch)
        return self.trainer.state, sums

    def step(self) -> float:
        import jax

        clock = time.perf_counter()
        jax.block_until_ready(self.start())
        return time.perf_counter() - clock


def apart(one: Ours, other: Ours) -> Step:
    """The unpipelined step of two devices at once."""
    import jax

    def step() -> float:
        clock = time.perf_counter()
        jax.block_until_ready((one.start(), other.start()))
        return time.perf_counter() - clock

    return step


def action_times(programs: Sequence[Any], calls: int, watch: Watch) -> Any:
    """What `F`, `I` and `W` of each stage take alone on one device, as `Costs` in seconds."""
    import jax
    import numpy as np

    from shardtrain.pipeline import Costs

    random = np.random.default_rng(0)

    def given(aval: Any) -> Any:
        floating = np.issubdtype(aval.dtype, np.floating)
        return jax.device_put(
            random.standard_normal(aval.shape, np.float32) if floating else np.zeros(aval.shape, aval.dtype)
        )

    def step(closed: Any) -> Step:
        compiled = jax.jit(functools.partial(jax.core.eval_jaxpr, closed.jaxpr, closed.consts))
        arguments = [given(aval) for aval in closed.in_avals]

        def run() -> float:
            clock = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            return time.perf_counter() - clock

        return on_one_core(run)

    kinds = ("forward", "input_gradient", "weight_gradient")
    steps = {f"{k} {kind}": step(getattr(p, kind)) for k, p in enumerate(programs) for kind in kinds}
    taken, _ = in_turns(steps, calls, watch)
    rows = [tuple(statistics.median(taken[f"{k} {kind}"]) for k in range(len(programs))) for kind in kinds]
    return Costs(*rows)


# --- tables ---


@dataclasses.dataclass
class Found:
    """What was measured with one number of microbatches.

    Attributes:
        microbatches: of the batch.
        taken: seconds by name, a number for every round; PyTorch's names have `torch ` in front.
        beside: the mean of the unpipelined steps before and after, by name, a number for every round.
        idle: of our schedules by name: classical, and in lockstep, with equal actions.
        lockstep: of our schedules by name, seconds of all ticks by the measured times of the actions.
        runs: the schedule that was run, which may be a split one.
        failed: PyTorch's reason for each schedule that does not work.
    """

    microbatches: int
    taken: dict[str, list[float]]
    beside: dict[str, list[float]]
    idle: dict[str, float]
    lockstep: dict[str, float]
    runs: dict[str, str]
    failed: dict[str, str]

    def milliseconds(self, name: str) -> str:
        return f"{1000 * statistics.median(self.taken[name]):.0f}"

    def over(self, name: str, idle: float) -> list[float]:
        """Times over the ideal, of each round."""
        share = DEVICES * (1 - idle)
        return sorted(t * share / a for t, a in zip(self.taken[name], self.beside[name], strict=True))


def half(values: Sequence[float]) -> str:
    """The middle half."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2f} to {high:.2f}"


def measure(
    network: Network,
    schedules: Sequence[str],
    microbatches: int,
    rounds: int,
    team: Team | None,
    costs: dict[int, Any],
    watch: Watch,
) -> Found:
    """All schedules with so many microbatches, in turns."""
    import jax

    import shardtrain as st
    from shardtrain.pipeline import classical, lockstep, make

    devices = jax.devices()
    ones = [Ours(network, st.make_mesh("data=1", devices=[d]), microbatches) for d in devices]
    pipe = st.make_mesh(f"pipe={DEVICES}", devices=devices)
    ours = {name: Ours(network, pipe, microbatches, name) for name in schedules}
    steps: dict[str, Step] = {ALONE: on_one_core(ones[0].step), APART: apart(ones[0], ones[1])}
    steps |= {name: one.step for name, one in ours.items()}
    failed = {}
    for name in (ALONE, *schedules) if team else ():
        assert team is not None
        step = team.step(name, microbatches)
        try:
            step()
        except RuntimeError as error:
            failed[name] = str(error)
            if name == ALONE:  # against which all others are measured
                break
        else:
            steps[f"torch {name}"] = step
    bases = {name: ALONE for name in (APART, *ours)}
    bases |= {name: f"torch {ALONE}" for name in steps if name.startswith("torch ") and name[6:] in ours}
    taken, beside = in_turns(steps, rounds, watch, bases)
    idle, ticks, runs = {}, {}, {}
    for name, one in ours.items():
        pipeline = one.trainer.pipeline
        assert pipeline is not None
        stages = pipeline.schedule.stages
        if stages not in costs:
            costs[stages] = action_times(pipeline.programs, rounds, watch)
        idle[name] = float(classical(make(name, DEVICES, microbatches)).idle)
        ticks[name] = float(lockstep(pipeline.schedule, costs[stages]).makespan)
        runs[name] = pipeline.schedule.name
    return Found(microbatches, taken, beside, idle, ticks, runs, failed)


def our_cells(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["schedule", "m", "runs as", "idle", "ideal, ms", "time, ms", "time / ideal"]
    header += ["middle half", "ticks, ms", "time / ticks"]
    rows = []
    for row in found:
        for name in (ALONE, APART, *row.idle):
            count, time_ = str(row.microbatches), row.milliseconds(name)
            if name == ALONE:
                rows.append([name, count, "", "", "", time_, "", "", "", ""])
                continue
            if name == APART:
                ratios = row.over(name, 0.5)
                ratio, middle = f"{statistics.median(ratios):.2f}", half(ratios)
                rows.append([name, count, "", "", row.milliseconds(ALONE), time_, ratio, middle, "", ""])
                continue
            idle = row.idle[name]
            ratios = row.over(name, idle)
            ideal = 1000 * statistics.median(row.taken[ALONE]) / (DEVICES * (1 - idle))
            over = statistics.median(row.taken[name]) / row.lockstep[name]
            cells = [name, count, row.runs[name], f"{idle:.1%}", f"{ideal:.0f}", time_]
            cells += [f"{statistics.median(ratios):.2f}", half(ratios)]
            rows.append([*cells, f"{1000 * row.lockstep[name]:.0f}", f"{over:.2f}"])
    return header, rows


def torch_cells(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    header = ["schedule", "m", "PyTorch, ms", "over its ideal", "middle half"]
    header += ["shardtrain, ms", "over its ideal", "shardtrain / PyTorch"]
    rows = []
    for row in found:
        for name in (ALONE, *row.idle):
            theirs, count = f"torch {name}", str(row.microbatches)
            ours = APART if name == ALONE else name
            if theirs not in row.taken:
                rows.append([name, count, "fails", "", "", row.milliseconds(ours), "", ""])
                continue
            ratio = f"{statistics.median(row.taken[ours]) / statistics.median(row.taken[theirs]):.2f}"
            cells = [row.milliseconds(theirs), "", "", row.milliseconds(ours), ""]
            if name != ALONE:
                over = row.over(theirs, row.idle[name])
                cells[1:3] = f"{statistics.median(over):.2f}", half(over)
                cells[4] = f"{statistics.median(row.over(name, row.idle[name])):.2f}"
            rows.append([name, count, *cells, ratio])
    return header, rows


def our_caption(network: Network, found: Sequence[Found], costs: dict[int, Any], watch: Watch) -> str:
    """What was timed, where."""
    import jax

    library = "Eigen" if EIGEN in os.environ["XLA_FLAGS"].split() else "YNNPACK"
    rounds = len(found[0].taken[APART])
    loud = sum(share > QUIET for share in watch.shares)
    times = "; ".join(
        f"{stages} stages F {_all(cost.forward)}, I {_all(cost.input)}, W {_all(cost.weight)} ms"
        for stages, cost in costs.items()
    )
    return (
        f"Median of a step over {rounds} rounds in turns, an unpipelined one before and after each: {LAYERS} "
        f"dense layers of {network.features} "
        f"features behind one of {INPUTS} inputs, m microbatches of {network.rows} rows, float32, SGD, XLA's "
        f"products by {library}; "
        f"{DEVICES} simulated devices, the unpipelined run held to one core. {APART.capitalize()}: the "
        f"unpipelined step on both devices at once, and its time over the unpipelined. Idle: the schedule's "
        f"bubble with equal F, I, W. Ideal: the unpipelined time / ({DEVICES} (1 - idle)). Time / ideal: by "
        f"the unpipelined steps beside it, median and middle half over the rounds. Ticks: every tick as long "
        f"as its slowest action, by their times alone: {times}. "
        f"Steps with over {QUIET:.0%} of the cores taken by other processes: {loud} of {len(watch.shares)}. "
        f"{machine()}, jax {jax.__version__}."
    )


def _all(seconds: Sequence[Any]) -> str:
    return " ".join(f"{1000 * float(s):.1f}" for s in seconds)


def torch_caption(network: Network, found: Sequence[Found], version: str) -> str:
    """What was timed, where."""
    text = (
        f"{network.features} features and {network.rows} rows, in turns with all of ours. PyTorch: "
        f"torch.distributed.pipelining, {DEVICES} processes of one thread on a core each, gloo; "
        f"its ideal is from its own unpipelined steps, in both processes at once. "
        f"{version}."
    )
    reasons = {name: reason for row in found for name, reason in row.failed.items()}
    lines = [f"{name} (`{TORCH[name][0]}`) fails: {reason}." for name, reason in reasons.items()]
    return " ".join([text, *lines])


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedule", action="append", choices=tuple(TORCH), help="only these schedules")
    parser.add_argument("--microbatches", type=int, action="append", metavar="M", help="of a batch (8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each (5)")
    parser.add_argument("--features", type=int, default=1536, metavar="N", help="of a layer (1536)")
    parser.add_argument("--rows", type=int, default=1536, metavar="N", help="of a microbatch (1536)")
    parser.add_argument(
        "--patience", type=float, default=60, metavar="S", help="seconds for doing disturbed steps again (60)"
    )
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PATH", help="a python that has PyTorch (this one)"
    )
    parser.add_argument("--ynnpack", action="store_true", help="XLA's default on CPUs, and not Eigen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--markdown", action="store_true", help="write the tables into docs/measurements.md")
    args = parser.parse_args()
    for flag, numbers, least in (
        ("rounds", [args.rounds], 2),
        ("microbatches", args.microbatches or [], 2),
        ("features", [args.features], 1),
        ("rows", [args.rows], 1),
    ):
        if min(numbers, default=least) < least:
            parser.error(f"--{flag} {min(numbers)}: use {least} or more")
    return args


def prepare(ynnpack: bool) -> None:
    """Sets the process up to be timed; starts it again where flags that are read at its start differ."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag != EIGEN]
    asked = {"GLIBC_TUNABLES": KEEPING, "XLA_FLAGS": " ".join(flags + [EIGEN] * (not ynnpack))}
    if asked.items() - os.environ.items():  # PyTorch's processes inherit them
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | asked)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if cores < DEVICES or load > 0.5:
        show(f"{cores} cores, load {load:.1f}: with other work on them, devices do not have a core each")


@contextlib.contextmanager
def torch_team(python: str, network: Network, watch: Watch) -> Iterator[Team | None]:
    """PyTorch's processes while the context lasts; None if that python has no PyTorch."""
    if not has_torch(python):
        show("PyTorch is not there, so its table is left out; pip install torch numpy or give --torch-python")
        yield None
        return
    team = Team(python, network)
    watch.processes += [str(worker.pid) for worker in team.workers]
    try:
        yield team
    finally:
        team.stop()


def main() -> None:
    """Measures, prints, writes."""
    args = arguments()
    prepare(args.ynnpack)
    from census_conv import write_between

    watch, network = Watch(args.patience), Network(args.features, args.rows)
    costs: dict[int, Any] = {}
    schedules, counts = args.schedule or list(TORCH), args.microbatches or (8,)
    with torch_team(args.torch_python, network, watch) as team:
        found = [measure(network, schedules, m, args.rounds, team, costs, watch) for m in counts]
    caption = our_caption(network, found, costs, watch)
    show_table(f"a training step in a pipeline of {DEVICES}", our_cells(found), caption)
    texts = [markdown(our_cells(found), caption)]
    if team:
        caption = torch_caption(network, found, team.version)
        show_table("beside PyTorch", torch_cells(found), caption)
        texts.append(markdown(torch_cells(found), caption))
    if args.markdown:
        for marker, text in zip(MARKERS, texts, strict=False):
            write_between(marker, text)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
