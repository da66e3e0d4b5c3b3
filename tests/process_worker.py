"""One process of a job: `process_worker.py PORT PROCESSES RANK DEVICES MESH OUT`."""

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

digits = st.data.load("digits")
model = st.models.LeNet(10, (8, 8, 1), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
trainer = st.Trainer(model, optax.adam(0.01), mesh=st.make_mesh(sys.argv[5]))
rows = trainer.rows(32)
feed = st.data.train_batches(digits.train, 32, seed=0, rows=rows)
losses = [row["loss"] for row in trainer.fit(feed, steps=4, progress=False)]
result = {
    "losses": losses,
    "test": trainer.evaluate(st.data.eval_batches(digits.test, 32, rows=rows)),
    "outputs": trainer.predict(digits.test.images[rows.start : rows.stop]).tolist(),
    "rows": [rows.start, rows.stop],
}
Path(sys.argv[6]).write_text(json.dumps(result))
