"""One process of a job that takes up a run: `PORT PROCESSES RANK DEVICES MESH FOLDER STEPS OUT`."""

import json
import sys
from pathlib import Path

import jax

port, processes, rank, devices = map(int, sys.argv[1:5])
jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_enable_x64", True)
if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

import shardtrain as st  # noqa: E402

mesh, folder, steps, out = sys.argv[5], Path(sys.argv[6]), int(sys.argv[7]), Path(sys.argv[8])
digits = st.data.load("digits")
kinds = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


class Net(nnx.Module):
    def __init__(self):
        self.conv = st.nn.Conv(1, 4, (3, 3), 2, **kinds)
        self.flatten = st.nn.Flatten()
        self.drop = st.nn.Dropout(0.2, rngs=nnx.Rngs(1))
        self.wide = st.nn.Linear(64, 12, **kinds)
        self.head = st.nn.Linear(12, 10, **kinds)

    def __call__(self, x):
        x = self.drop(self.flatten(nnx.relu(self.conv(x))))
        return self.head(nnx.tanh(self.wide(x)))


trainer = st.Trainer(
    Net(),
    optax.adam(optax.cosine_decay_schedule(0.01, 20)),
    mesh=st.make_mesh(mesh),
    accumulate=4,
)
rows = trainer.rows(32)
with st.Checkpoints(folder, every=3, keep=None) as checkpoints:
    start = trainer.restore(checkpoints) if checkpoints.steps() else 0
    feed = st.data.train_batches(digits.train, 32, seed=0, start=trainer.examples // 32, rows=rows)
    losses = [r["loss"] for r in trainer.fit(feed, steps=steps, checkpoints=checkpoints, progress=False)]
out.write_text(json.dumps({"start": start, "losses": losses, "examples": trainer.examples}))
