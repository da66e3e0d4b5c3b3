"""`python -m pipeline.many MODEL MESH GROUP`: one comparison of `parity.check` on as many devices as it takes."""

import math
import os
import sys

# As in conftest.py: machine code is left as it comes, which saves much of the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax

from shardtrain.mesh import parse

if __name__ == "__main__":
    name, mesh, group = sys.argv[1:4]
    jax.config.update("jax_num_cpu_devices", math.prod(parse(mesh).values()))
    jax.config.update("jax_enable_x64", True)
    from .parity import check

    check(name, mesh, group, rows=16)
