"""What differs between the jax versions we work on (0.10 to 0.12), and nothing else."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh

from shardtrain.errors import UserError


def auto_mesh(devices: np.ndarray, names: Sequence[str]) -> Mesh:
    """A mesh whose axes are all `Auto`: `jax.make_mesh` gives `Explicit` ones by default, under which
    pooling gradients and convolutions with sharded kernels have gaps (jax 0.10 to 0.12)."""
    return Mesh(devices, tuple(names), axis_types=(AxisType.Auto,) * len(names))


def manual_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """The axes over which an enclosing `shard_map` is manual."""
    return frozenset(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Manual)


def explicit_axes(mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """The axes of sharding-in-types, which our islands do not take."""
    return frozenset(
        n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit
    )


def ppermute(x: Array, axes: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Array:
    """`lax.ppermute` that numbers devices by `axes` as they are given, as `lax.axis_index` does.

    jax 0.10 numbers them in the order of the mesh here, whatever the order of `axes`; 0.12 refuses another.
    """
    names = tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in axes)
    sizes = {a: lax.axis_size(a) for a in axes}
    index = np.arange(math.prod(sizes.values())).reshape([sizes[a] for a in axes])
    theirs = index.transpose([axes.index(a) for a in names]).ravel().argsort()
    return lax.ppermute(x, names, [(int(theirs[a]), int(theirs[b])) for a, b in pairs])


def alike(*arrays: Array) -> list[Array]:
    """Arrays that may differ over all axes of an enclosing `shard_map` over which any of them does.

    Their gradients are summed over the axes over which they do not; jax does so by itself between two
    operands, but not around a `custom_vjp`.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*varying)
    return [
        lax.pcast(x, tuple(sorted(every - have)), to="varying") if every - have else x
        for x, have in zip(arrays, varying, strict=True)
    ]


def default_precision() -> str | None:
    """What `jax.default_matmul_precision` says."""
    return getattr(jax.config, "jax_default_matmul_precision", None)


def device_kind() -> str:
    """Kind of the devices that a program is traced for: those of the mesh around it, or jax's default one."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = described or getattr(jax.config, "jax_default_device", None)
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return str(device.device_kind)


def scan_extents(params: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried, by its parameters."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()  # since jax 0.12
    return len(list(constants)), len(list(carried))


IN_HASTE: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""XLA's options for CPUs with which compiling takes least, and running most."""
if jax.__version_info__ < (0, 11):
    IN_HASTE["xla_cpu_use_fusion_emitters"] = False  # the others set MLIR up anew for each of their kernels


def in_haste() -> dict[str, bool | int] | None:
    """Compiler options for a program that runs once: on CPUs its machine code is left as it comes."""
    return IN_HASTE if jax.default_backend() == "cpu" else None


def coordination_client() -> Any:
    """This process's client of the job's key-value store, None in a job of one process.

    `key_value_set(key, value, allow_overwrite)` and `key_value_dir_get(prefix)` are what we use of it.
    """
    from jax._src import distributed  # the public API has no name for it

    return distributed.global_state.client


def process_rank() -> int:
    """`jax.process_index()` that does not start jax's back end, before which a job must be joined."""
    from jax._src import distributed

    return int(distributed.global_state.process_id or 0)


def process_count() -> int:
    """`jax.process_count()` that does not start jax's back end."""
    from jax._src import distributed

    return int(distributed.global_state.num_processes or 1)


def is_collective_failure(error: BaseException) -> bool:
    """Whether an error may only say that another process is gone: runtimes have no type for it."""
    words = ("Gloo", "NCCL", "coordination", "collective", "Connection closed", "Connection reset", "barrier")
    return not isinstance(error, UserError) and any(word in str(error) for word in words)


def inner_jaxpr(value: Any) -> Any:
    """An open or closed jaxpr as an open one."""
    return getattr(value, "jaxpr", value)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = inner_jaxpr(part)
            if hasattr(inner, "eqns"):
                yield inner


def where(equation: Any) -> str:
    """`file:line` of the user's code that made a jaxpr equation."""
    from jax._src import source_info_util  # the public API has no name for it

    frames = list(source_info_util.user_frames(equation.source_info.traceback))
    users = [f for f in frames if "/flax/" not in f.file_name] or frames
    return f"{users[0].file_name}:{users[0].start_line}" if users else "unknown place"


INTERPRETS_TRANSPOSED = jax.__version_info__ >= (0, 11)
"""Whether the interpreter of Mosaic GPU multiplies transposed tiles."""


def mosaic_kernel(
    body: Callable, *, name: str, out_shape: Sequence[int], out_type: Any, interpreted: bool, **kwargs: Any
) -> Callable:
    """`plgpu.kernel` with the semantics that our kernels are written in, or in the interpreter.

    jax 0.10's default is `Lane` and 0.11's `Warpgroup`, whose vectors take no scalars.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret: Any = None
    if interpreted:
        if hasattr(plgpu, "InterpretGPUParams"):
            interpret = plgpu.InterpretGPUParams(detect_races=True)
        else:
            from jax._src.pallas.mosaic_gpu.interpret import params

            interpret = params.InterpretGPUParams(detect_races=True)
    semantics = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(tuple(out_shape), out_type),
        compiler_params=semantics,
        interpret=interpret,
        kernel_name=name,
        **kwargs,
    )

    def call(*operands: Array) -> Array:
        with jax.enable_x64(False):  # indices of 64 bits are not for kernels
            y = kernel(*operands)
        return alike(y, *operands)[0]  # it forgets over which axes they vary

    return call


def transposed(ref: Any) -> Any:
    """A tile in shared memory, read the other way round."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))


def mosaic_races() -> bool:
    """Whether the interpreter of Mosaic GPU found a race since it was last reset; resets it."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    found = gpu_callbacks._races
    gpu_callbacks.reset_gpu_interpret_mode_state()
    return bool(found is not None and found.races_found)


def triton_kernel(
    body: Callable,
    *,
    name: str,
    out_shape: Sequence[int],
    out_type: Any,
    warps: int,
    stages: int,
    interpreted: bool,
    **kwargs: Any,
) -> Callable:
    """`pl.pallas_call` lowered by Triton, or in the interpreter."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    params = plt.CompilerParams(num_warps=warps, num_stages=stages)

    def call(*operands: Array) -> Array:
        same = alike(*operands)
        varying = jax.typeof(same[0]).manual_axis_type
        out = jax.ShapeDtypeStruct(tuple(out_shape), out_type, manual_axis_type=varying)
        with jax.enable_x64(False), warnings.catch_warnings():
            # jax 0.11 says that this back end will go: it is our second choice.
            warnings.filterwarnings("ignore", ".*Triton backend is deprecated.*", DeprecationWarning)
            kernel = pl.pallas_call(
                body, out_shape=out, compiler_params=params, interpret=interpreted, name=name, **kwargs
            )
            return kernel(*same)

    return call


def closed_jaxprs(equation: Any) -> Iterator[Any]:
    """As `inner_jaxprs`, closed."""
    from jax.extend.core import ClosedJaxpr

    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part if hasattr(part, "jaxpr") else ClosedJaxpr(part, ())


def island_parts(equation: Any) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    """Of a `shard_map` in a jaxpr: its body, and the PartitionSpecs of its inputs and outputs."""
    p = equation.params
    return inner_jaxpr(p["jaxpr"]), p["in_specs"], p["out_specs"]


def rebind(equation: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs an equation of a jaxpr on other operands, with some of its parameters changed."""
    from jax._src import source_info_util  # names of scopes and the user's line stay with it

    stack = source_info_util.current_name_stack() + equation.source_info.name_stack
    # Shardings name the mesh that the equation was traced under, which is not the one it runs under now.
    shardings = {key: None for key in ("sharding", "out_sharding") if key in equation.params}
    params = {**equation.params, **shardings, **_combiner(equation.params), **changed}
    found = equation.primitive.get_bind_params(params)
    subfuns, params = found if isinstance(found, tuple) else ((), found)
    with source_info_util.user_context(equation.source_info.traceback, name_stack=stack):
        out = equation.primitive.bind(*subfuns, *values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def _combiner(params: dict[str, Any]) -> dict[str, Any]:
    """What a scatter combines by, traced under the mesh of now.

    Under one that is manual over some axes only, jax lowers the sum of two numbers with a sharding of its
    own, a custom call, which XLA's compiler for GPUs fails to evaluate ("unhandled HLO ops").
    """
    old = params.get("update_jaxpr")
    if old is None or params["update_consts"]:
        return {}

    def run(*numbers: Any) -> list[Any]:
        known = dict(zip(old.invars, numbers, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if hasattr(atom, "val") else known[atom]

        for equation in old.eqns:
            outs = rebind(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, outs, strict=True))
        return [read(atom) for atom in old.outvars]

    new = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct((), v.aval.dtype) for v in old.invars))
    return {"update_jaxpr": new.jaxpr, "update_consts": ()}


def with_manual(mesh: Mesh | AbstractMesh, manual: Collection[str]) -> AbstractMesh:
    """The mesh as it is inside a `shard_map` that is manual over the axes `manual` and no others."""
    types = tuple(AxisType.Manual if name in manual else AxisType.Auto for name in mesh.axis_names)
    return mesh.abstract_mesh.update(axis_types=types)


def subprogram(closed: Any, invars: Sequence[Any], eqns: Sequence[Any], outvars: Sequence[Any]) -> Any:
    """Some of a closed jaxpr's equations as a closed jaxpr of their own."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    whole = closed.jaxpr
    effects = frozenset().union(*(e.effects for e in eqns))
    inner = Jaxpr(whole.constvars, invars, outvars, eqns, effects, debug_info=whole.debug_info)
    return ClosedJaxpr(inner, closed.consts)
