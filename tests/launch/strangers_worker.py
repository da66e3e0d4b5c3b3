"""One process of a job that works until a file appears: `strangers_worker.py FOLDER`.

It writes its process id to a file in FOLDER as soon as all processes work together, and its number of rounds at
the end.
"""

import logging
import os
import sys
import time
from pathlib import Path

import jax

from shardtrain.guard import Guard
from shardtrain.guard.processes import everyone
from shardtrain.launch import Limits, connect

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
folder = Path(sys.argv[1])
connect(limits=Limits(start=60.0))
jax.config.update("jax_num_cpu_devices", 1)
rounds = 0
with Guard(folder, watchdog=20.0):
    while "end" not in everyone("end" if (folder / "end").exists() else "go on"):
        rounds += 1
        (folder / f"{jax.process_index()}.pid").write_text(str(os.getpid()))
        time.sleep(0.02)
(folder / f"{jax.process_index()}.rounds").write_text(str(rounds))
