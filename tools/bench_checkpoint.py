"""Times checkpoints: steps while one is written, and saving and restoring compared with a file copy.

    python tools/bench_checkpoint.py --markdown
    python tools/bench_checkpoint.py --spare --markdown

A ResNet-18 in float32 with adam, on batches of random images. Blocks of steps take turns: in every other
one a save is begun before the first step. "While it is written" are the steps that ended before it was
complete; "a block with a save" is all of it, from the call of save on. Bandwidths are of the run's
bytes, with no steps beside; the copy is of one file of as many bytes, in the same folder. Steps of
simulated devices take every core, those of GPUs do not: `--spare` holds them to one, on one device.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MARKER = "bench_checkpoint"


def build(mesh: str, width: int, batch: int) -> tuple[Any, tuple[Any, Any]]:
    """A trainer and a batch for it."""
    import numpy as np
    import optax
    from flax import nnx

    import shardtrain as st

    model = st.models.ResNet(18, 10, 1, width=width, stem="small", rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, 8, 8, 1), np.float32)
    labels = random.integers(0, 10, batch, np.int32)
    return st.Trainer(model, optax.adam(1e-3), mesh=st.make_mesh(mesh)), (images, labels)


class Bench:
    """Blocks of steps with and without a save, and saves and restores alone.

    Args:
        trainer: with its program compiled.
        batch: for all steps.
        folder: for the checkpoints.
    """

    def __init__(self, trainer: Any, batch: Any, folder: Path) -> None:
        import jax

        from shardtrain import Checkpoints

        self.trainer, self.batch, self.folder = trainer, batch, folder
        self.checkpoints = Checkpoints(folder, keep=2)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(trainer.state))
        self.ready = jax.block_until_ready

    def steps(self, count: int) -> list[tuple[float, float]]:
        """When each of so many steps began and ended."""
        times = []
        for _ in range(count):
            clock = time.perf_counter()
            goal = int(self.trainer.state.step) + 1
            self.trainer.fit(itertools.repeat(self.batch), steps=goal, progress=False)
            self.ready(self.trainer.state)
            times.append((clock, time.perf_counter()))
        return times

    def without(self, count: int) -> dict[str, float]:
        """Seconds of a step with no save on, and of the block."""
        clock = time.perf_counter()
        times = self.steps(count)
        return {
            "step": statistics.median(end - begin for begin, end in times),
            "block": time.perf_counter() - clock,
        }

    def with_save(self, count: int) -> dict[str, float]:
        """Seconds of a step while a save is on, of the call that begins it, of it all, and of the block."""
        clock = time.perf_counter()
        self.trainer.save(self.checkpoints)
        blocked = time.perf_counter() - clock
        ended: list[float] = []

        def watching() -> None:
            self.checkpoints.wait()
            ended.append(time.perf_counter())

        watch = threading.Thread(target=watching)
        watch.start()
        times = self.steps(count)
        block = time.perf_counter() - clock
        watch.join()
        (written,) = ended
        during = [end - begin for begin, end in times if end <= written]
        return {
            "step": statistics.median(during) if during else float("nan"),
            "steps": float(len(during)),
            "blocked": blocked,
            "written": written - clock,
            "block": block,
        }

    def save(self) -> float:
        """Seconds from the call until the checkpoint is there."""
        self.steps(1)  # what was saved already is not saved again
        clock = time.perf_counter()
        self.trainer.save(self.checkpoints)
        self.checkpoints.wait()
        return time.perf_counter() - clock

    def restore(self) -> float:
        """Seconds of taking up the newest checkpoint, its checksums included."""
        clock = time.perf_counter()
        self.trainer.restore(self.checkpoints)
        self.ready(self.trainer.state)
        return time.perf_counter() - clock

    def copy(self) -> float:
        """Seconds of copying one file of as many bytes."""
        source, target = self.folder.parent / "source", self.folder.parent / "target"
        if not source.exists():
            with source.open("wb") as file:
                file.write(bytes(self.bytes))
        target.unlink(missing_ok=True)
        clock = time.perf_counter()
        with source.open("rb") as a, target.open("wb") as b:
            shutil.copyfileobj(a, b, 1 << 22)
        return time.perf_counter() - clock


def measure(mesh: str, width: int, batch: int, rounds: int, steps: int, spare: bool) -> dict[str, Any]:
    """All that is timed, a list with an entry for every round."""
    cores = os.sched_getaffinity(0)
    if spare:
        os.sched_setaffinity(0, {min(cores)})  # the threads of the device, which is opened here, stay there
    trainer, host = build(mesh, width, batch)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-checkpoint-") as place:
        bench = Bench(trainer, host, Path(place) / "checkpoints")
        bench.without(3)
        os.sched_setaffinity(0, cores)
        bench.with_save(2)  # the first one opens the folder and starts the writers
        found: dict[str, list[Any]] = {"without": [], "with": [], "save": [], "restore": [], "copy": []}
        for _ in range(rounds):
            found["without"].append(bench.without(steps))
            found["with"].append(bench.with_save(steps))
        for _ in range(rounds):
            found["copy"].append(bench.copy())
            found["save"].append(bench.save())
            found["restore"].append(bench.restore())
        bench.checkpoints.close()
        return {"mesh": mesh, "bytes": bench.bytes, "steps": steps, "rounds": rounds, "spare": spare, **found}


def cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of one mesh: header and rows."""
    pairs = list(zip(found["without"], found["with"], strict=True))

    def middle(values: list[float]) -> str:
        low, _, high = statistics.quantiles(values, n=4)
        return f"{low:.2f} to {high:.2f}"

    def steps(name: str, key: str, scale: float) -> list[str]:
        kept = [(a[key], b[key]) for a, b in pairs if b[key] == b[key]]
        if len(kept) < 2:
            return [name, "", "", "none was that short", ""]
        ratios = [a / b for a, b in kept]
        alone, beside = (1000 * scale * statistics.median(column) for column in zip(*kept, strict=True))
        return [name, f"{alone:,.1f}", f"{beside:,.1f}", f"{statistics.median(ratios):.3f}", middle(ratios)]

    def bandwidth(name: str, key: str) -> list[str]:
        ratios = [a / b for a, b in zip(found["copy"], found[key], strict=True)]
        alone, beside = (1000 * statistics.median(found[k]) for k in ("copy", key))
        rate = found["bytes"] / 1e6 / (beside / 1000)
        named = f"{name}, {rate:,.0f} MB/s"
        return [named, f"{alone:,.1f}", f"{beside:,.1f}", f"{statistics.median(ratios):.3f}", middle(ratios)]

    header = ["", "without, ms", "with, ms", "speed", "middle half"]
    return header, [
        steps("a step while a save is written", "step", 1),
        steps(f"a block of {found['steps']} steps with a save", "block", 1),
        bandwidth("save, against a file copy", "save"),
        bandwidth("restore, against a file copy", "restore"),
    ]


def caption(found: dict[str, Any]) -> str:
    """What the table is of."""
    from bench_step import machine

    blocked = 1000 * statistics.median(row["blocked"] for row in found["with"])
    written = 1000 * statistics.median(row["written"] for row in found["with"])
    during = statistics.median(row["steps"] for row in found["with"])
    cores = "steps are held to one core" if found["spare"] else "steps and writers share the cores"
    return (
        f"ResNet-18 with adam, {found['bytes'] / 1e6:,.0f} MB, mesh {found['mesh']}, simulated devices: "
        f"{cores}. Medians of {found['rounds']} rounds in turns; speed: without "
        f"over with. The call of save takes {blocked:,.0f} ms, all of it {written:,.0f} ms and {during:.0f} "
        f"steps. {machine()}."
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mesh", metavar="MESH", help="of <= 8 devices (data=2; data=1 with --spare)")
    parser.add_argument("--spare", action="store_true", help="steps on one core, the others for writers")
    parser.add_argument("--width", type=int, default=64, metavar="N", help="features of the first block (64)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images of a step (32)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds of blocks (9)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a block (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    for name in ("width", "batch", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: use 1 or more")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: use 2 or more")

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from bench_step import markdown, show_table
    from census_conv import write_between

    mesh = args.mesh or ("data=1" if args.spare else "data=2")
    found = measure(mesh, args.width, args.batch, args.rounds, args.steps, args.spare)
    show_table("what a checkpoint costs", cells(found), caption(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.markdown:
        write_between(MARKER + "_spare" * args.spare, markdown(cells(found), caption(found)))


if __name__ == "__main__":
    main()
