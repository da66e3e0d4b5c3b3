"""The network of `bench_pipeline.py` in pipelines of PyTorch: a process of one thread a rank, over gloo.

Only the standard library is imported here, for an environment that has PyTorch and no jax. What is run is a
process of `Team`: `torch_pipeline.py '[RANK, PORT, FEATURES, ROWS]'`.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from bench_step import Workers, free_port

LAYERS, INPUTS, CLASSES, RATE = 8, 16, 10, 0.01
DEVICES = 2
ALONE = "unpipelined"
TORCH = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb-h1": ("ScheduleInterleavedZeroBubble", 1),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
}
"""PyTorch's class for each of our schedules, and how many stages a rank holds there."""

Step = Callable[[], float]
"""Does one step and returns its seconds."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A dense layer of few inputs, then `LAYERS` equal ones, so that every equal one has both gradients.

    Attributes:
        features: of each.
        rows: examples of a microbatch.
    """

    features: int
    rows: int


def work(rank: int, port: int, features: int, rows: int) -> None:
    """A rank: `[schedule, microbatches]` comes in on stdin, the seconds of a step go out on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo prints
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch: Any = importlib.import_module("torch")
    pipelining: Any = importlib.import_module("torch.distributed.pipelining")
    nn, functional = torch.nn, torch.nn.functional
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=DEVICES,
        timeout=timedelta(seconds=60),
    )
    print(json.dumps({"version": f"PyTorch {torch.__version__}"}), file=answers, flush=True)

    def stages(count: int) -> list[Any]:
        """The network, cut into so many parts."""
        torch.manual_seed(0)
        parts: list[list[Any]] = [[] for _ in range(count)]
        parts[0] += [nn.Linear(INPUTS, features), nn.ReLU()]
        for i in range(LAYERS):
            parts[i * count // LAYERS] += [nn.Linear(features, features), nn.ReLU()]
        parts[-1] += [nn.Linear(features, CLASSES)]
        return [nn.Sequential(*part) for part in parts]

    def batch(microbatches: int) -> tuple[Any, Any]:
        return torch.randn(rows * microbatches, INPUTS), torch.randint(0, CLASSES, (rows * microbatches,))

    def alone(microbatches: int) -> Callable[[], None]:
        (whole,) = stages(1)
        optimizer = torch.optim.SGD(whole.parameters(), lr=RATE)
        inputs, labels = batch(microbatches)
        parts = list(zip(inputs.chunk(microbatches), labels.chunk(microbatches), strict=True))

        def step() -> None:
            optimizer.zero_grad()
            for x, y in parts:
                (functional.cross_entropy(whole(x), y) / microbatches).backward()
            optimizer.step()

        return step

    def pipelined(name: str, microbatches: int) -> Callable[[], None]:
        kind, chunks = TORCH[name]
        count = chunks * DEVICES
        ours = [rank, count - 1 - rank] if name == "zb-v" else list(range(rank, count, DEVICES))
        networks = stages(count)
        held = [pipelining.PipelineStage(networks[s], s, count, torch.device("cpu")) for s in ours]
        single = name in ("gpipe", "1f1b")
        schedule = getattr(pipelining, kind)(
            held[0] if single else held, microbatches, loss_fn=functional.cross_entropy
        )
        optimizer = torch.optim.SGD([p for s in ours for p in networks[s].parameters()], lr=RATE)
        inputs, labels = batch(microbatches)

        def step() -> None:
            optimizer.zero_grad()
            last = {"target": labels, "losses": []} if count - 1 in ours else {}
            schedule.step(*([inputs] if 0 in ours else []), **last)
            optimizer.step()

        return step

    known: dict[tuple[str, int], Callable[[], None]] = {}
    for line in sys.stdin:
        name, microbatches = json.loads(line)
        begun = time.perf_counter()
        try:
            if (name, microbatches) not in known:
                make = alone if name == ALONE else lambda m, name=name: pipelined(name, m)
                known[name, microbatches] = make(microbatches)
            clock = time.perf_counter()
            known[name, microbatches]()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - clock}
        except Exception as error:  # a schedule that does not work here is a line of the table
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
            answer = {"error": reason, "after": time.perf_counter() - begun}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # no shutdown barrier: the other rank ends by itself


class Team(Workers):
    """PyTorch's processes."""

    def __init__(self, python: str, network: Network) -> None:
        job = free_port(), network.features, network.rows
        commands = [[python, __file__, json.dumps([rank, *job])] for rank in range(DEVICES)]
        super().__init__("PyTorch", commands, 1)
        self.version: str = self.about["version"]

    def step(self, name: str, microbatches: int) -> Step:
        """A step of all ranks; the unpipelined one is each rank's own.

        Raises:
            RuntimeError: from the step, with PyTorch's own reason.
        """

        def run() -> float:
            answers = list(map(json.loads, self.ask(json.dumps([name, microbatches]))))
            if failed := [answer for answer in answers if "error" in answer]:
                # the first to fail has the reason, others the time they waited for it
                raise RuntimeError(min(failed, key=lambda answer: answer["after"])["error"])
            return float(max(answer["seconds"] for answer in answers))

        return run


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
