"""What differs between the jax versions that shardtrain supports (0.10 to 0.12), and jax's private names."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh


def auto_mesh(devices: np.ndarray, names: Sequence[str]) -> Mesh:
    """Returns a mesh whose axes are all `Auto`.

    `jax.make_mesh` makes `Explicit` ones by default, under which gradients of pooling and convolutions with
    sharded kernels have gaps (jax 0.10 to 0.12).
    """
    return Mesh(devices, tuple(names), axis_types=(AxisType.Auto,) * len(names))


def manual_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Returns the axes over which an enclosing `shard_map` is manual."""
    return frozenset(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Manual)


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Returns the axes of sharding-in-types, which our islands do not take."""
    return frozenset(
        n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit
    )


def ppermute(x: Array, axes: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Array:
    """Permutes as `lax.ppermute`, with devices numbered by `axes` in their given order, as `axis_index` does.

    In `lax.ppermute`, jax 0.10 numbers them in the order of the mesh, and jax 0.12 refuses any other order.
    """
    names = tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in axes)
    sizes = {a: lax.axis_size(a) for a in axes}
    index = np.arange(math.prod(sizes.values())).reshape([sizes[a] for a in axes])
    theirs = index.transpose([axes.index(a) for a in names]).ravel().argsort()
    return lax.ppermute(x, names, [(int(theirs[a]), int(theirs[b])) for a, b in pairs])


def match_varying(*arrays: Array) -> list[Array]:
    """Returns arrays that all vary over the mesh axes over which any of them does.

    Gradients of an array are then summed over the axes over which it did not vary. jax does so by itself for
    two operands of an operation, but not around a `custom_vjp`.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*varying)
    return [
        lax.pcast(x, tuple(sorted(every - have)), to="varying") if every - have else x
        for x, have in zip(arrays, varying, strict=True)
    ]


def default_precision() -> str | None:
    """Returns the value of `jax.default_matmul_precision`."""
    return getattr(jax.config, "jax_default_matmul_precision", None)


def device_kind() -> str:
    """Returns the kind of the devices of the mesh that a program is traced under, or of jax's default one."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = described or getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return str(device.device_kind)


IN_HASTE: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA for CPUs with which compiling is fastest, and the program slowest."""
if jax.__version_info__ < (0, 11):
    IN_HASTE["xla_cpu_use_fusion_emitters"] = False  # these emitters set up MLIR for each kernel


def in_haste() -> dict[str, bool | int] | None:
    """Returns compiler options for a program that runs once: on CPUs it is hardly optimized."""
    return IN_HASTE if jax.default_backend() == "cpu" else None


def coordination_client() -> Any:
    """Returns this process's client of the job's key-value store, None in a job of one process.

    We use its `key_value_set(key, value, allow_overwrite)` and `key_value_dir_get_bytes(prefix)`.
    """
    from jax._src import distributed  # the public API has no name for it

    return distributed.global_state.client


def collectives_at(address: str) -> None:
    """Lets this process's CPU collectives listen at an address; jax takes that of the host's own name.

    To be called after `jax.distributed.initialize` and before the first use of devices. Collectives other
    than Gloo, which a user can choose with `JAX_CPU_COLLECTIVES_IMPLEMENTATION`, stay as they are.
    """
    from jax._src import config, xla_bridge  # the public API cannot say where collectives listen
    from jax._src.lib import _jax

    if config.cpu_collectives_implementation.value != "gloo":
        return

    def client() -> Any:
        gloo = _jax.make_gloo_tcp_collectives(coordination_client(), hostname=address)
        return xla_bridge.make_cpu_client(gloo)

    xla_bridge.register_backend_factory("cpu", client, priority=0, fail_quietly=False)


def process_rank() -> int:
    """Returns `jax.process_index()` without starting jax's back end, before which a job must be joined."""
    from jax._src import distributed

    return int(distributed.global_state.process_id or 0)


def process_count() -> int:
    """Returns `jax.process_count()` without starting jax's back end."""
    from jax._src import distributed

    return int(distributed.global_state.num_processes or 1)


def mosaic_interpreter() -> Any:
    """Returns parameters by which Mosaic GPU runs a kernel in its interpreter, and looks for races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams(detect_races=True)


def bind(equation: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Binds the primitive of an equation to other operands and parameters, and returns its results.

    jax 0.10 passes functions among the parameters separately from the others, jax 0.12 does not.
    """
    found = equation.primitive.get_bind_params(params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    return equation.primitive.bind(*functions, *values, **params)


INTERPRETS_TRANSPOSED = jax.__version_info__ >= (0, 11)
"""Whether the interpreter of Mosaic GPU multiplies transposed tiles."""


def transposed(ref: Any) -> Any:
    """Returns a view of a tile in shared memory with its two dimensions swapped."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))


def mosaic_races() -> bool:
    """Whether the interpreter of Mosaic GPU found a race since it was last reset; resets it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    found = gpu_callbacks._races
    gpu_callbacks.reset_gpu_interpret_mode_state()
    return bool(found is not None and found.races_found)


def with_manual(mesh: Mesh | AbstractMesh, manual: Collection[str]) -> AbstractMesh:
    """Returns the mesh as it is inside a `shard_map` that is manual over the axes `manual` alone."""
    types = tuple(AxisType.Manual if name in manual else AxisType.Auto for name in mesh.axis_names)
    return mesh.abstract_mesh.update(axis_types=types)


def scan_extents(params: Any) -> tuple[int, int]:
    """Returns how many operands of a scan are constants and how many are carried, from its parameters."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # since jax 0.12
    return len(list(constants)), len(list(carried))
