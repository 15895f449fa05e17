"""Compiles the training step for H100s that are not there, with XLA's own GPU compiler.

Needs only JAX's GPU plugin (the extra `plan`), no driver and no NVIDIA library.
"""

import importlib.util
import resource
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from llama3_jax.errors import UserError
from llama3_jax.parallel import sharding
from llama3_jax.parallel.mesh import Layout, make_mesh
from llama3_jax.planning.case import GPUS_PER_HOST, Case
from llama3_jax.training.state import abstract_state
from llama3_jax.training.step import compile_step

# What XLA asks of a chip to compile for it: an H100 SXM (data sheet; CUDA programming guide, table
# of compute capability 9.0).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class Compiled(NamedTuple):
    """What XLA says of the step on one GPU, in bytes, and what saying so took."""

    arguments: int
    temporary: int
    peak: int
    hlo: str
    seconds: float
    process_bytes: int


def h100s(count: int) -> list[jax.Device]:
    """`count` H100s to compile for, in hosts of 8.

    Raises:
      UserError: no GPU compiler is installed, or the count does not fill hosts.
    """
    if not any(_installed(name) for name in _PLUGINS):
        raise UserError(
            "there is no GPU compiler here: pip install -e '.[plan]' brings JAX's plugin, "
            "which needs neither a GPU nor CUDA"
        )
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(f"a mesh of {count} GPUs does not fill hosts of {GPUS_PER_HOST}")
    hosts, each = max(count // GPUS_PER_HOST, 1), min(count, GPUS_PER_HOST)
    description = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"{hosts}x1x{each}"
    )
    return description.devices


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compile_case(case: Case) -> Compiled:
    """The step as a run compiles it: optimizer, schedule, metrics and donation included.

    Raises:
      UserError: the mesh does not divide model or batch; XLA cannot compile it.
    """
    start = time.perf_counter()
    layout = make_mesh(case.mesh, h100s(case.mesh.devices))
    state = abstract_state(case.model, case.optimizer, layout)
    sharding.check_batch(case.rows, case.length, case.micro_batches, layout)
    step = compile_step(
        case.model, case.optimizer, layout, case.micro_batches, case.sources, case.xla
    )
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = step.lower(state, abstract_batch(case, layout), rate)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{case.name}: XLA cannot compile it: {str(error)[:300]}") from error
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        compiled.as_text(),
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def abstract_batch(case: Case, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch (see data/packing.py for what is in it)."""
    shapes = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), jnp.int32)
    shapes |= {"loss_mask": jnp.bool_, "source": jnp.int32, "cut": jnp.int32}

    def place(name: str, dtype) -> jax.ShapeDtypeStruct:
        whole = (case.rows,) if name in ("source", "cut") else (case.rows, case.length)
        array = jax.ShapeDtypeStruct(whole, dtype)
        spec = sharding.batch_spec(array, layout)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(layout.mesh, spec))

    return {name: place(name, dtype) for name, dtype in shapes.items()}
