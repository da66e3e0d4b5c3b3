"""GPUs to compile for without having one: what XLA must know of a GPU, and devices of a topology."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPILER = Path(sys.prefix) / "gpu-compiler"
"""Where `make gpu-compiler` installs the CUDA plugin of jax, ptxas and nvdisasm; apart from the environment,
in which the plugin would look for a driver at every start."""


@dataclass(frozen=True)
class TargetCard:
    """A GPU to compile for, by the figures of openxla/xla's `xla/backends/gpu/target_config/specs`.

    Attributes:
        kind: jax's `device_kind`.
        arch: as ptxas names it.
        capability: compute capability; `accelerated` cards have instructions of their own ("a").
        cores, fpus: multiprocessors, and floating point units of each.
        shared_per_core, shared_per_block: bytes of shared memory, the latter for a program that asks for it.
        memory, bandwidth, cache: bytes, bytes per second, bytes of the second level cache.
        clock: in GHz.
    """

    kind: str
    arch: str
    capability: int
    accelerated: bool
    cores: int
    fpus: int
    shared_per_core: int
    shared_per_block: int
    memory: int
    bandwidth: int
    cache: int
    clock: float

    @property
    def config(self) -> str:
        """XLA's `GpuTargetConfigProto`, as text."""
        features = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_per_core,
            "threads_per_core_limit": 2048,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "shared_memory_per_block_optin": self.shared_per_block,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "device_vendor": '"NVIDIA Corporation"',
            "name": f'"{self.kind}"',
            "driver_version": '"13.0.0"',
            "runtime_version": '"12.8.0"',
            "compile_time_toolkit_version": '"12.8.0"',
            "dnn_version": '"9.10.0"',
        }
        lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
        return (
            f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: {self.capability} "
            f"feature_extension: {features} }}\n}}\n"
            f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\n'
            f'device_description_str: "{self.kind}"\n'
        )


# fmt: off
CARDS = {
    card.arch: card
    for card in (
        TargetCard("NVIDIA A100-SXM4-80GB", "sm_80", 8, False, 108, 64, 167936, 166912, 85100068864,
                   2039040000000, 41943040, 1.41),
        TargetCard("NVIDIA H100 80GB HBM3", "sm_90a", 9, True, 132, 128, 233472, 232448, 84942979072,
                   3352320000000, 52428800, 1.98),
        TargetCard("NVIDIA B200", "sm_100a", 10, True, 148, 128, 233472, 232448, 191514411008,
                   7672320000000, 132644864, 1.965),
    )
}
# fmt: on


def prepare() -> None:
    """Makes the compiler of `make gpu-compiler` known; before jax is imported.

    Raises:
        SystemExit: it is not installed.
    """
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"  # otherwise the plugin looks for a driver
    sys.path.append(str(COMPILER))
    try:
        import jax_plugins.xla_cuda13  # noqa: F401
    except ImportError:
        sys.exit("error: jax's CUDA plugin is not installed; run `make gpu-compiler` (no GPU is needed)")


def devices(card: TargetCard, *, hosts: int = 1, per_host: int = 1) -> Any:
    """Devices of a topology of such cards: programs are compiled for them, and cannot run."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", target_config=card.config, topology=f"1x{hosts}x{per_host}"
    )
    return found.devices


def binary(name: str) -> str:
    """Path of `ptxas` or `nvdisasm`.

    Raises:
        SystemExit: it is not installed.
    """
    import shutil

    for folder in (COMPILER, *map(Path, sys.path)):
        for path in folder.glob(f"nvidia/**/bin/{name}"):
            return str(path)
    if (found := shutil.which(name)) is None:
        sys.exit(f"error: {name} is not installed; run `make gpu-compiler`")
    return found
