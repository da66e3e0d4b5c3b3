"""Times a training step of `st.Trainer` against a hand-written jitted step, and against PyTorch.

    python tools/bench_step.py --markdown --torch-python venv-with-torch/bin/python

The model is ResNet-8 (width 16, 10 classes) in float32 with SGD and momentum, on batches of random images.
What is compared runs in turns, in blocks of some steps: the ratio is the median over the pairs of blocks,
so that other work on the machine slows both equally. PyTorch is needed by nothing else; `pip install torch`
in any environment and name its python, without it that table is left out.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Only the standard library here: the PyTorch workers import this file in an environment without jax.

MARKERS = ("bench_trainer", "bench_torch")
MESHES = ("data=1", "data=8", "data=2,height=2,channel=2")
BATCH = 128
WIDTH, CLASSES, RATE, MOMENTUM = 16, 10, 0.1, 0.9

Block = Callable[[int], float]
"""Runs so many steps and returns the seconds for one."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds for one step of what was timed in turns, a number for every round.

    Attributes:
        seconds: by name, in the order in which they were named.
        host: of them, seconds in which Python's own thread was busy.
        steps: of one block.
    """

    seconds: dict[str, list[float]]
    host: dict[str, list[float]]
    steps: int

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, over: str, under: str) -> list[float]:
        return sorted(a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True))

    def ratio(self, over: str, under: str) -> float:
        return statistics.median(self.ratios(over, under))

    def fastest(self, over: str, under: str) -> float:
        return min(self.seconds[over]) / min(self.seconds[under])


def in_turns(blocks: dict[str, Block], rounds: int, seconds: float) -> Timing:
    """Rounds of one block each, in alternating order; blocks last about `seconds`."""
    for block in blocks.values():
        block(3)  # compiles, and lets arrays settle
    steps = max(3, round(seconds / max(block(5) for block in blocks.values())))
    taken: dict[str, list[float]] = {name: [] for name in blocks}
    busy: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(rounds):
        for name in list(blocks)[:: 1 if turn % 2 else -1]:
            clock = time.thread_time()
            taken[name].append(blocks[name](steps))
            busy[name].append((time.thread_time() - clock) / steps)
    return Timing(taken, busy, steps)


# --- the trainer and the hand-written step ---


def host_batch(extent: int) -> tuple[Any, Any]:
    """One batch of random images and labels on the host."""
    import numpy as np

    random = np.random.default_rng(0)
    images = random.standard_normal((BATCH, extent, extent, 1), np.float32)
    return images, random.integers(0, CLASSES, BATCH, np.int32)


def trainer_block(mesh: Any, extent: int) -> tuple[Block, int]:
    """Blocks of `Trainer.fit`, the loop that users run, and the number of parameters."""
    import itertools

    import optax
    from flax import nnx

    import shardtrain as st

    model = st.models.ResNet(8, CLASSES, 1, width=WIDTH, rngs=nnx.Rngs(0))
    trainer = st.Trainer(model, optax.sgd(RATE, momentum=MOMENTUM), mesh=mesh)
    rows = trainer.rows(BATCH)
    images, labels = host_batch(extent)
    batch = images[rows.start : rows.stop], labels[rows.start : rows.stop]
    done = 0

    def block(steps: int) -> float:
        nonlocal done
        clock = time.perf_counter()
        trainer.fit(itertools.repeat(batch), steps=done + steps, progress=False)
        done += steps
        return (time.perf_counter() - clock) / steps

    return block, sum(p.size for p in trainer.state.params.values())


def by_hand_block(mesh: Any, extent: int) -> Block:
    """The same model and metrics in a step as one writes it without a trainer; reads one step behind too."""
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import shardtrain as st
    from shardtrain.nn import partition

    model = st.models.ResNet(8, CLASSES, 1, width=WIDTH, rngs=nnx.Rngs(0))
    layout = st.Layout()
    specs = partition.parameter_spec(model, mesh, layout)
    model.train()
    split: Any = nnx.split(model, nnx.Param, ...)
    graph, params, other = split

    def placed(tree: nnx.State) -> nnx.State:
        # numpy in between: a step donates its state, the model keeps its own arrays
        flat = [(path, v, np.array(v.get_value())) for path, v in nnx.to_flat_state(tree)]
        return nnx.from_flat_state(
            [(p, v.replace(jax.device_put(x, NamedSharding(mesh, specs[p])))) for p, v, x in flat]
        )

    params, other = placed(params), placed(other)
    optimizer = optax.sgd(RATE, momentum=MOMENTUM)
    state = params, other, optimizer.init(params)
    images, labels = host_batch(extent)
    at_images = NamedSharding(mesh, layout.activation(images.shape, mesh))
    at_labels = NamedSharding(mesh, P(at_images.spec[0]))

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, other, opt_state = state

        def loss_of(params: nnx.State) -> Any:
            model: Any = nnx.merge(graph, params, other, copy=True)
            logits = model(images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, ((logits.argmax(-1) == labels).mean(), nnx.state(model, nnx.Not(nnx.Param)))

        (loss, (accuracy, new)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), new, opt_state), (loss, accuracy)

    where = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))

    def block(steps: int) -> float:
        nonlocal state
        pending = None
        clock = time.perf_counter()
        with jax.set_mesh(mesh):
            for _ in range(steps):
                batch = jax.device_put(images, at_images), jax.device_put(labels, at_labels)
                state, metrics = jitted(state, *batch)
                if pending is not None:
                    jax.device_get(pending)
                pending = metrics
            jax.device_get(pending)
        return (time.perf_counter() - clock) / steps

    return block


def trainer_table(meshes: Sequence[str], extent: int, rounds: int, seconds: float) -> dict[str, Timing]:
    """Trainer and hand-written step on every mesh."""
    import shardtrain as st

    found = {}
    for text in meshes:
        mesh = st.make_mesh(text)
        sides = {"Trainer": trainer_block(mesh, extent)[0], "by hand": by_hand_block(mesh, extent)}
        found[text] = in_turns(sides, rounds, seconds)
        show(f"{text}: Trainer over hand-written {found[text].ratio('Trainer', 'by hand'):.3f}")
    return found


# --- PyTorch and shardtrain in processes of their own ---


@dataclasses.dataclass(frozen=True)
class Setup:
    """How many processes, and how many threads each."""

    processes: int
    threads: int

    @property
    def text(self) -> str:
        return f"{self.processes} x {self.threads}"


def torch_block(extent: int, setup: Setup, variant: str) -> tuple[Block, int]:
    """Blocks of the usual eager loop in PyTorch, under DDP if there are several processes."""
    torch: Any = importlib.import_module("torch")
    functional, nn = torch.nn.functional, torch.nn
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)

    def conv(features_in: int, out: int, window: int, stride: int = 1) -> Any:
        return nn.Conv2d(features_in, out, window, stride, padding=window // 2, bias=False)

    class Unit(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, features_in: int, out: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = conv(features_in, out, 3, stride), nn.BatchNorm2d(out)
            self.conv2, self.norm2 = conv(out, out, 3), nn.BatchNorm2d(out)
            same = features_in == out and stride == 1
            self.shortcut = (
                None if same else nn.Sequential(conv(features_in, out, 1, stride), nn.BatchNorm2d(out))
            )

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))

    model: Any = nn.Sequential(
        conv(1, WIDTH, 3),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        Unit(WIDTH, WIDTH, 1),
        Unit(WIDTH, 2 * WIDTH, 2),
        Unit(2 * WIDTH, 4 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * WIDTH, CLASSES),
    )
    rows = BATCH // setup.processes
    images, labels = torch.randn(rows, 1, extent, extent), torch.randint(0, CLASSES, (rows,))
    if variant == "NHWC":
        model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    count = sum(p.numel() for p in model.parameters())
    if setup.processes > 1:
        model = nn.parallel.DistributedDataParallel(model)
    if variant == "compiled":
        model = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss.item(), (logits.argmax(-1) == labels).float().mean().item()

    def block(steps: int) -> float:
        clock = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - clock) / steps

    return block, count


def work(side: str, extent: int, setup: Setup, rank: int, port: int) -> None:
    """A worker: a number of steps comes in on stdin, the seconds for one of them go out on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo prints
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[rank * setup.threads : (rank + 1) * setup.threads]
    os.sched_setaffinity(0, mine or cores)  # XLA starts as many threads as it may use cores
    if side == "shardtrain":
        import jax

        import shardtrain as st

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
        if setup.processes > 1:
            jax.distributed.initialize(f"127.0.0.1:{port}", setup.processes, rank)
        block, count = trainer_block(st.make_mesh(data=setup.processes), extent)
        version = f"jax {jax.__version__}"
    else:
        torch: Any = importlib.import_module("torch")
        if setup.processes > 1:
            address = f"tcp://127.0.0.1:{port}"
            torch.distributed.init_process_group(
                "gloo", init_method=address, rank=rank, world_size=setup.processes
            )
        block, count = torch_block(extent, setup, side.removeprefix("PyTorch").strip())
        version = f"PyTorch {torch.__version__}"
    print(json.dumps({"parameters": count, "version": version}), file=answers, flush=True)
    for line in sys.stdin:
        print(block(int(line)), file=answers, flush=True)
    os._exit(0)  # no shutdown barrier: the other ranks end by themselves


class Workers:
    """Processes that write a line when they are ready, and one for each line that they read.

    Args:
        side: whose they are, for errors.
        commands: one for each.
        threads: of each, of OpenMP.
    """

    def __init__(self, side: str, commands: Sequence[Sequence[str]], threads: int) -> None:
        self.side = side
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the workers)
        self.workers = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
                # Idle threads of PyTorch that spin would slow it tenfold where other work runs.
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
            )
            for command in commands
        ]
        self.about: dict[str, Any] = json.loads(self._answers()[0])

    def _answers(self) -> list[str]:
        lines = [worker.stdout.readline() for worker in self.workers if worker.stdout]
        if not all(lines):
            self.stop()
            self.log.seek(0)
            raise RuntimeError(f"{self.side} ended early:\n" + "".join(self.log.readlines()[-12:]))
        return lines

    def ask(self, line: str) -> list[str]:
        """What all answer."""
        for worker in self.workers:
            if worker.stdin:
                worker.stdin.write(f"{line}\n")
                worker.stdin.flush()
        return self._answers()

    def stop(self) -> None:
        for worker in self.workers:
            if worker.stdin:
                worker.stdin.close()
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()


class Team(Workers):
    """The worker processes of one side."""

    def __init__(self, python: str, side: str, extent: int, setup: Setup) -> None:
        job, port = [side, extent, setup.processes, setup.threads], free_port()
        ranks = range(setup.processes)
        commands = [[python, __file__, "--worker", json.dumps([*job, rank, port])] for rank in ranks]
        super().__init__(side, commands, setup.threads)

    def block(self, steps: int) -> float:
        return max(map(float, self.ask(str(steps))))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass(frozen=True)
class Match:
    """shardtrain and PyTorch in one setup, at one size of image."""

    extent: int
    setup: Setup
    timing: Timing
    about: dict[str, dict[str, Any]]

    @property
    def best(self) -> str:
        """The fastest way that PyTorch has."""
        seconds = self.timing.seconds
        return min((name for name in seconds if name != "shardtrain"), key=lambda name: min(seconds[name]))


def torch_table(
    python: str, variants: Sequence[str], extents: Sequence[int], rounds: int, seconds: float
) -> list[Match]:
    """Both frameworks in every setup that the cores allow."""
    cores = len(os.sched_getaffinity(0))
    setups = dict.fromkeys([Setup(1, 1), Setup(1, cores), Setup(2, max(1, cores // 2))])
    found = []
    for extent in extents:
        for setup in setups:
            teams: dict[str, Team] = {}
            try:
                for side in ("shardtrain", *variants):
                    teams[side] = Team(
                        python if side != "shardtrain" else sys.executable, side, extent, setup
                    )
                blocks: dict[str, Block] = {side: team.block for side, team in teams.items()}
                about = {side: team.about for side, team in teams.items()}
                counts = {a["parameters"] for a in about.values()}
                if len(counts) != 1:
                    raise RuntimeError(f"the models differ: {about}")
                found.append(Match(extent, setup, in_turns(blocks, rounds, seconds), about))
            finally:
                for team in teams.values():
                    team.stop()
            row = found[-1]
            ratio = row.timing.fastest("shardtrain", row.best)
            show(f"{extent}x{extent}, {setup.text} threads: shardtrain over {row.best} {ratio:.2f}")
    return found


def has_torch(python: str) -> bool:
    """Whether this python finds PyTorch."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        return subprocess.run([python, "-c", code], check=False).returncode == 0
    except OSError:  # there is no such python
        return False


# --- tables ---


def milliseconds(timing: Timing, name: str) -> str:
    return f"{1000 * timing.median(name):.2f}"


def spread(ratios: Sequence[float]) -> str:
    """The middle half of the rounds' ratios."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{low:.2f} to {high:.2f}"


def trainer_cells(found: dict[str, Timing]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    names = "Trainer", "by hand"
    header = ["mesh", "Trainer, ms", "by hand, ms", "ratio", "middle half", "fastest", "host, ms"]
    rows = []
    for mesh, timing in found.items():
        ratio, half = f"{timing.ratio(*names):.3f}", spread(timing.ratios(*names))
        times = [milliseconds(timing, name) for name in names]
        host = " / ".join(f"{1000 * statistics.median(timing.host[name]):.2f}" for name in names)
        rows.append([mesh, *times, ratio, half, f"{timing.fastest(*names):.3f}", host])
    return header, rows


def torch_cells(found: Sequence[Match]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    sides = list(found[0].timing.seconds)
    header = [
        "images",
        "processes x threads",
        *(f"{side}, ms" for side in sides),
        "ratio",
        "by rounds",
        "middle half",
    ]
    rows = []
    for row in found:
        ratios = row.timing.ratios("shardtrain", row.best)
        times = [f"{1000 * min(row.timing.seconds[side]):.2f}" for side in sides]
        ratio = f"{row.timing.fastest('shardtrain', row.best):.2f}"
        by_rounds = f"{statistics.median(ratios):.2f}", spread(ratios)
        rows.append([f"{row.extent}x{row.extent}", row.setup.text, *times, ratio, *by_rounds])
    return header, rows


def trainer_caption(found: dict[str, Timing], extent: int, seconds: float) -> str:
    """What was timed, where."""
    import flax
    import jax

    rounds = len(next(iter(found.values())).seconds["Trainer"])
    return (
        f"Median of a step over {rounds} rounds in turns, blocks of about {seconds:g} s; batch {BATCH} of "
        f"{extent}x{extent} images, simulated devices. Ratio: Trainer over hand-written, median over the "
        f"rounds, and the middle half of the rounds; fastest: ratio of the fastest blocks; host: time that "
        f"Python's thread is busy in a step, Trainer / by hand, mostly hidden behind the devices. "
        f"{machine()}, jax {jax.__version__}, flax {flax.__version__}."
    )


def torch_caption(found: Sequence[Match], seconds: float) -> str:
    """What was timed, where."""
    about = found[0].about
    versions = ", ".join(dict.fromkeys(a["version"] for a in about.values()))
    rounds = len(found[0].timing.seconds["shardtrain"])
    return (
        f"A step in the fastest of {rounds} blocks of about {seconds:g} s, which take turns; {BATCH} images "
        f"over all processes, {about['shardtrain']['parameters']:,} parameters on both sides. Ratio: "
        f"shardtrain over the fastest PyTorch of the row, below 1 shardtrain is faster; by rounds: median of "
        f"the rounds' ratios. Two processes talk by gloo: mesh data=2 by jax.distributed, DDP in PyTorch, "
        f"where batch norm takes the statistics of each process's own images, ours those of the whole batch. "
        f"{machine()}, {versions}."
    )


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU cores ({platform.machine()}), Python {platform.python_version()}"


def show(text: Any) -> None:
    from rich.console import Console

    Console(width=100).print(text, highlight=False)


def show_table(title: str, cells: tuple[list[str], list[list[str]]], caption: str) -> None:
    """A table in the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, caption=escape(caption))  # which may hold what PyTorch says of a failure
    for position, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if position else "left", no_wrap=not position)
    for row in cells[1]:
        table.add_row(*row)
    show(table)


def markdown(cells: tuple[list[str], list[list[str]]], caption: str) -> str:
    header, rows = cells
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return caption + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("trainer", "torch"), help="one of the two tables")
    parser.add_argument(
        "--mesh", action="append", metavar="MESH", help="meshes of the first, of <= 8 devices"
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds of blocks (15)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="length of a block (1)")
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PATH", help="a python that has PyTorch (this one)"
    )
    parser.add_argument("--torch-compile", action="store_true", help="also time PyTorch under torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--markdown", action="store_true", help="write the tables into docs/measurements.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, extent, processes, threads, rank, port = json.loads(args.worker)
        return work(side, extent, Setup(processes, threads), rank, port)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: use 2 or more")

    from census_conv import write_between

    numbers: dict[str, Any] = {}
    if args.only != "trainer":
        if not has_torch(args.torch_python):
            show("PyTorch is not there, so its table is left out; pip install torch, or give --torch-python")
        else:
            variants = ["PyTorch", "PyTorch NHWC"] + ["PyTorch compiled"] * args.torch_compile
            matches = torch_table(args.torch_python, variants, (8, 28), args.rounds, args.seconds)
            caption = torch_caption(matches, args.seconds)
            show_table("one training step, shardtrain and PyTorch", torch_cells(matches), caption)
            numbers["torch"] = [dataclasses.asdict(match) for match in matches]
            if args.markdown:
                write_between(MARKERS[1], markdown(torch_cells(matches), caption))
    if args.only != "torch":
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        timings = trainer_table(args.mesh or MESHES, 8, args.rounds, args.seconds)
        caption = trainer_caption(timings, 8, args.seconds)
        show_table("one training step, Trainer and by hand", trainer_cells(timings), caption)
        numbers["trainer"] = {mesh: dataclasses.asdict(timing) for mesh, timing in timings.items()}
        if args.markdown:
            write_between(MARKERS[0], markdown(trainer_cells(timings), caption))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
