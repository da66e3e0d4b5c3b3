"""`python -m pipeline.sixteen MODEL MESH GROUP`: one comparison of `parity.check` on sixteen devices."""

import os
import sys

# As in conftest.py: machine code is left as it comes, which saves much of the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import jax

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_enable_x64", True)

from .parity import check  # noqa: E402

if __name__ == "__main__":
    check(*sys.argv[1:4], rows=16)
