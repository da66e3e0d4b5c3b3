"""One process of a job that saves as it goes: `worker.py OUT STEPS`, on the mesh data=-1.

Process 0 writes the losses of what it has trained to OUT/losses.jsonl, each with its step and the number of
processes.
"""

import json
import sys
from pathlib import Path

import jax

from shardtrain.launch import Limits, connect

out, steps = Path(sys.argv[1]), int(sys.argv[2])
connect(limits=Limits(start=60.0, heartbeat=10, shutdown=30))
jax.config.update("jax_num_cpu_devices", 1)

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import shardtrain as st  # noqa: E402

EVERY, BATCH = 5, 24  # 24 examples divide by 1, 2, 3 and 4 processes

first = jax.process_index() == 0
digits = st.data.load("digits")
dtype = jnp.zeros(()).dtype  # float64 with JAX_ENABLE_X64=1
model = st.models.LeNet(10, (8, 8, 1), param_dtype=dtype, rngs=nnx.Rngs(0))
trainer = st.Trainer(model, optax.adam(0.003), mesh=st.make_mesh("data=-1"))
saved = out / "checkpoints"
start = trainer.restore(saved) if saved.is_dir() and any(saved.iterdir()) else 0
print(f"process {jax.process_index()} of {jax.process_count()} begins at step {start}", flush=True)


class Watch(st.callbacks.Callback):
    def on_step(self, run, row):
        if first:
            with (out / "losses.jsonl").open("a") as file:
                line = {"step": run.step, "loss": row["loss"], "processes": jax.process_count()}
                file.write(json.dumps(line) + "\n")


feed = st.data.train_batches(digits.train, BATCH, seed=0, start=start, rows=trainer.rows(BATCH))
while start < steps:
    start += EVERY
    trainer.fit(feed, steps=start, callbacks=[Watch()], progress=False)
    trainer.save(saved)
print(f"process {jax.process_index()} is done", flush=True)
