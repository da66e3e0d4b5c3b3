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


class Rank:
    """One process of PyTorch's pipeline: makes training steps, and answers for how long they take.

    Args:
        rank: number of this process.
        port: where the processes meet.
        network: what is trained.
    """

    def __init__(self, rank: int, port: int, network: Network) -> None:
        self.rank, self.network = rank, network
        self.torch: Any = importlib.import_module("torch")
        self.torch.set_num_threads(1)
        self.torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=DEVICES,
            timeout=timedelta(seconds=60),
        )
        self._steps: dict[tuple[str, int], Callable[[], None]] = {}

    def answer(self, name: str, microbatches: int) -> dict[str, Any]:
        """Does a step of a schedule; returns its seconds, or why it failed."""
        begun = time.perf_counter()
        try:
            if (name, microbatches) not in self._steps:
                make = self._alone(microbatches) if name == ALONE else self._pipelined(name, microbatches)
                self._steps[name, microbatches] = make
            clock = time.perf_counter()
            self._steps[name, microbatches]()
            return {"seconds": time.perf_counter() - clock}
        except Exception as error:  # a schedule that does not work here is a line of the table
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
            return {"error": reason, "after": time.perf_counter() - begun}

    def _stages(self, count: int) -> list[Any]:
        """The network, cut into `count` parts."""
        nn, features = self.torch.nn, self.network.features
        self.torch.manual_seed(0)
        parts: list[list[Any]] = [[] for _ in range(count)]
        parts[0] += [nn.Linear(INPUTS, features), nn.ReLU()]
        for i in range(LAYERS):
            parts[i * count // LAYERS] += [nn.Linear(features, features), nn.ReLU()]
        parts[-1] += [nn.Linear(features, CLASSES)]
        return [nn.Sequential(*part) for part in parts]

    def _batch(self, microbatches: int) -> tuple[Any, Any]:
        rows = self.network.rows * microbatches
        return self.torch.randn(rows, INPUTS), self.torch.randint(0, CLASSES, (rows,))

    def _alone(self, microbatches: int) -> Callable[[], None]:
        """A step of the whole network in this process."""
        cross_entropy = self.torch.nn.functional.cross_entropy
        (whole,) = self._stages(1)
        optimizer = self.torch.optim.SGD(whole.parameters(), lr=RATE)
        inputs, labels = self._batch(microbatches)
        parts = list(zip(inputs.chunk(microbatches), labels.chunk(microbatches), strict=True))

        def step() -> None:
            optimizer.zero_grad()
            for x, y in parts:
                (cross_entropy(whole(x), y) / microbatches).backward()
            optimizer.step()

        return step

    def _pipelined(self, name: str, microbatches: int) -> Callable[[], None]:
        """A step of this process's stages in PyTorch's schedule of that name."""
        pipelining: Any = importlib.import_module("torch.distributed.pipelining")
        kind, chunks = TORCH[name]
        count = chunks * DEVICES
        ours = list(range(self.rank, count, DEVICES))
        if name == "zb-v":
            ours = [self.rank, count - 1 - self.rank]
        networks = self._stages(count)
        stages = [pipelining.PipelineStage(networks[s], s, count, self.torch.device("cpu")) for s in ours]
        schedule = getattr(pipelining, kind)(
            stages[0] if name in ("gpipe", "1f1b") else stages,
            microbatches,
            loss_fn=self.torch.nn.functional.cross_entropy,
        )
        optimizer = self.torch.optim.SGD([p for s in ours for p in networks[s].parameters()], lr=RATE)
        inputs, labels = self._batch(microbatches)

        def step() -> None:
            optimizer.zero_grad()
            last = {"target": labels, "losses": []} if count - 1 in ours else {}
            schedule.step(*([inputs] if 0 in ours else []), **last)
            optimizer.step()

        return step


def work(rank: int, port: int, features: int, rows: int) -> None:
    """Runs a rank: `[schedule, microbatches]` comes in on stdin, the seconds of a step go out on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo prints on stdout
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    process = Rank(rank, port, Network(features, rows))
    version = f"PyTorch {process.torch.__version__}"
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(process.answer(*json.loads(line))), file=answers, flush=True)
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
