"""`python -m pipeline.many MODEL MESH GROUP`: one comparison of `parity.check` on as many devices as it takes."""

import math
import sys

import jax

from shardtrain.mesh import parse

if __name__ == "__main__":
    name, mesh, group = sys.argv[1:4]
    jax.config.update("jax_num_cpu_devices", math.prod(parse(mesh).values()))
    jax.config.update("jax_enable_x64", True)
    from .parity import check

    check(name, mesh, group, rows=16)
