"""One process of a guarded job: `guard_worker.py PORT PROCESSES RANK FOLDER '{"fault": ..., ...}'`.

Its batches take a moment each, and one of them may hold a fault: of the keys `rank` and `at` the place, and of
`fault` the kind. Of `ragged` a step and the rows that each rank has of it.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import jax

port, processes, rank, folder, wishes = *map(int, sys.argv[1:4]), Path(sys.argv[4]), json.loads(sys.argv[5])
jax.config.update("jax_num_cpu_devices", 2 // processes)
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import shardtrain as st  # noqa: E402
from shardtrain.checkpoint import storage  # noqa: E402

logging.basicConfig(level=logging.INFO, format=f"rank {rank} %(message)s", stream=sys.stderr)
for noisy in ("absl", "jax", "orbax"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


class Net(nnx.Module):
    def __init__(self):
        self.head = st.nn.Linear(4, 3, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(x)


def spin():
    while True:
        time.sleep(0.1)


def here(fault, step):
    return fault == wishes.get("fault") and wishes.get("rank", rank) == rank and wishes.get("at") == step


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)  # the ranks agree meanwhile


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_looking(event, args):
    """Kills this process where it looks for checkpoints."""
    if event == "os.listdir" and "checkpoints" in str(args[0]):
        die()


async def dies_writing(self, directory, args, write=storage.Handler.async_save):
    """Kills this process where it has begun to write the second checkpoint."""
    going_on = await write(self, directory, args)
    return die() if "/2.orbax-checkpoint-tmp" in str(directory) else going_on


def feed(rows, start):
    for step in range(start + 1, 1000):
        r = np.random.default_rng(step)
        x, y = r.standard_normal((8, 4)).astype(np.float32), r.integers(0, 3, 8).astype(np.int32)
        time.sleep(0.05)
        if here("raise", step):
            raise RuntimeError("the disk of rank 1 is on fire")
        if here("user error", step):
            raise st.UserError("this folder is empty; name another one")
        if here("exit", step):
            sys.exit(wishes["status"])
        if here("hang", step):
            spin()
        if here("sigterm", step):
            terminate()
        if here("nan", step):
            x[rows.start] = np.nan
        stop = rows.stop
        if step == wishes.get("ragged", [0])[0]:
            stop = rows.start + wishes["ragged"][1][rank]
        yield x[rows.start : stop], y[rows.start : stop]


class Observe(st.callbacks.Callback):
    def on_step(self, run, row):
        print(json.dumps({"step": run.step, "loss": row["loss"]}), flush=True)
        if here("sigterm in save", run.step):
            terminate()


trainer = st.Trainer(Net(), optax.adam(0.01), mesh=st.make_mesh("data=2"))
checkpoints = st.Checkpoints(folder / "checkpoints", every=wishes.get("every"))
if wishes.get("fault") == "killed in a save" and rank == wishes["rank"]:
    if wishes["at"] == "writing":
        storage.Handler.async_save = dies_writing
    else:
        sys.addaudithook(dies_looking)
guard = st.Guard(
    folder,
    watchdog=wishes.get("watchdog", 20),
    on_nan=wishes.get("on_nan", "stop"),
    profile=range(*wishes["profile"]) if rank == 1 and "profile" in wishes else None,
)
with guard, checkpoints:
    start = trainer.restore(checkpoints) if checkpoints.steps() else 0
    rows = trainer.rows(8)
    history = trainer.fit(
        feed(rows, start),
        steps=wishes.get("steps", 100000),
        progress=False,
        checkpoints=checkpoints,
        guard=guard,
        callbacks=[Observe()],
    )
    print(f"trained to example {trainer.examples}", flush=True)
    if wishes.get("fault") == "late" and rank == wishes["rank"]:
        signal.pause()
