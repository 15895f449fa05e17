"""What the ranks send, in closed form: the collectives of parallel/ counted by hand.

Tested against those that XLA leaves in the compiled step (planning/hlo.py).
"""

import functools
from typing import NamedTuple

from llama3_jax.model.definition import Definition, Parameter, define
from llama3_jax.parallel.mesh import AXES, FSDP_AXES, MeshConfig
from llama3_jax.parallel.sharding import mesh_axes
from llama3_jax.parallel.stages import make_stages
from llama3_jax.planning.case import GPUS_PER_HOST, Case
from llama3_jax.planning.constants import Constants

FORWARD, BACKWARD, TICK, STEP = "forward", "backward", "tick", "step"


class Traffic(NamedTuple):
    """Bytes that a GPU receives: in each layer's forward or backward, exchange of the pipeline, or step.

    `hidden`: the share of it under which XLA schedules products, by the layouts that were compiled
    (the planner reads it from the compiled step where there is one).
    """

    kind: str
    axes: tuple[str, ...]
    phase: str
    bytes: float
    hidden: float


def layer_parameters(case: Case) -> int:
    """Parameters of a layer that FSDP shards, on one tensor rank."""
    return sum(n for p, n in _on_tensor_rank(case) if p.in_blocks and "embed" in p.axes)


def table_parameters(case: Case) -> int:
    """Parameters outside of layers that FSDP shards (embedding and head), on one tensor rank."""
    return sum(n for p, n in _on_tensor_rank(case) if not p.in_blocks and "embed" in p.axes)


def small_parameters(case: Case) -> tuple[int, int]:
    """Parameters that FSDP does not shard, of a layer and outside of layers."""
    small = [(p, n) for p, n in _on_tensor_rank(case) if "embed" not in p.axes]
    return tuple(sum(n for p, n in small if p.in_blocks is inside) for inside in (True, False))


def _on_tensor_rank(case: Case) -> list[tuple[Parameter, int]]:
    """Every parameter with its elements on one tensor rank, one layer's of those in blocks."""
    return _sizes(define(case.model), case.mesh)


@functools.cache
def _sizes(model: Definition, mesh: MeshConfig) -> list[tuple[Parameter, int]]:
    found = []
    for parameter in model.parameters:
        size = parameter.size // (model.config.layers if parameter.in_blocks else 1)
        split = any("tensor" in mesh_axes(axis, mesh) for axis in parameter.axes)
        found.append((parameter, size // mesh.tensor if split else size))
    return found


def stacked_layers(case: Case) -> int:
    """Layers' places on one pipeline rank, also those that hold none (parallel/stages.py)."""
    if case.mesh.pipe == 1:
        return case.model.layers
    return case.mesh.virtual_stages * make_stages(case.model.layers, case.mesh).most


def traffic(case: Case) -> list[Traffic]:
    """All collectives that matter, of one micro-batch through one layer, or of one step."""
    model, mesh, tokens = case.model, case.mesh, case.rank_tokens
    width = case.width
    found = []
    if mesh.tensor > 1:
        part = tokens * model.dim * width * (mesh.tensor - 1) / mesh.tensor
        hidden = {1: 0.25, 2: 0.6}.get(mesh.tensor_pieces, 0.8)
        # What the backward gathers and reduces again (transformer.py, remat policies).
        again = {"none": (2, 0), "save_dots": (2, 0)}.get(model.remat, (2, 1))
        for phase, gathers, scatters in (
            (FORWARD, 2, 2), (BACKWARD, 2 + again[0], 2 + again[1])
        ):  # fmt: skip
            found.append(Traffic("all-gather", ("tensor",), phase, gathers * part, hidden))
            found.append(Traffic("reduce-scatter", ("tensor",), phase, scatters * part, hidden))
        # The embedding's result and its gradient, the head's input and its gradient.
        ends = 2 * case.micro_batches / mesh.pipe * part
        found.append(Traffic("all-gather", ("tensor",), STEP, ends, 0.0))
        found.append(Traffic("reduce-scatter", ("tensor",), STEP, ends, 0.0))
    if mesh.context > 1:
        heads = max(model.kv_heads // mesh.tensor, 1)
        elements = tokens * mesh.context * heads * model.head_dim
        part = 2 * elements * (mesh.context - 1) / mesh.context  # keys and values
        gathers = (1, 0 if model.remat == "none" else 1)
        for phase, count in zip((FORWARD, BACKWARD), gathers, strict=True):
            found.append(Traffic("all-gather", ("context",), phase, count * part * width, 0.0))
        found.append(Traffic("reduce-scatter", ("context",), BACKWARD, part * width, 0.0))
    ranks = mesh.data * mesh.context
    if ranks > 1:
        axes = tuple(axis for axis in FSDP_AXES if getattr(mesh, axis) > 1)
        share = (ranks - 1) / ranks
        layer = layer_parameters(case) * share
        tables = table_parameters(case) * share
        if mesh.reshard_after_forward:
            found.append(Traffic("all-gather", axes, FORWARD, layer * width, 0.8))
            found.append(Traffic("all-gather", axes, BACKWARD, layer * width, 0.8))
            found.append(Traffic("reduce-scatter", axes, BACKWARD, layer * 4, 0.8))
            micro = case.micro_batches / mesh.pipe  # the pipeline's two ends alone
            found.append(Traffic("all-gather", axes, STEP, micro * tables * width, 0.0))
            found.append(Traffic("reduce-scatter", axes, STEP, micro * tables * 4, 0.0))
        else:
            whole = layer * stacked_layers(case) + tables
            found.append(Traffic("all-gather", axes, STEP, whole * width, 0.0))
            found.append(Traffic("reduce-scatter", axes, STEP, whole * 4, 0.0))
    if mesh.pipe > 1:
        sent = tokens // mesh.tensor * model.dim * width
        found.append(Traffic("collective-permute", ("pipe",), TICK, sent, 0.0))
        tables = 2 * (mesh.pipe - 1) / mesh.pipe * table_parameters(case) / ranks * 4
        found.append(Traffic("all-reduce", ("pipe",), STEP, tables, 0.0))
    return found


def in_step(case: Case) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that a GPU receives in a step by kind and axes, the mean over the pipeline's ranks."""
    passes = case.micro_batches * case.model.layers / case.mesh.pipe
    schedule = case.schedule
    ticks = sum(map(schedule.exchanges, ("forward", "backward"))) if schedule else 0
    times = {FORWARD: passes, BACKWARD: passes, TICK: ticks, STEP: 1}
    sums: dict = {}
    for t in traffic(case):
        sums[t.kind, t.axes] = sums.get((t.kind, t.axes), 0.0) + times[t.phase] * t.bytes
    return sums


def bandwidth(axes: tuple[str, ...], mesh: MeshConfig, constants: Constants) -> float:
    """Bytes/s that a GPU receives in a collective over `axes`.

    Where a group spans hosts, its members on one host share their network links' work: each link
    brings a part of what all need, and NVLink spreads it.
    """
    stride, inside = 1, 1
    for axis in reversed(AXES):
        size = getattr(mesh, axis)
        if axis in axes:
            inside *= max(min(size, GPUS_PER_HOST // stride), 1) if stride <= GPUS_PER_HOST else 1
        stride *= size
    members = 1
    for axis in axes:
        members *= getattr(mesh, axis)
    if members <= inside:
        return constants.nvlink
    return min(constants.nvlink, constants.network * (1 if axes == ("pipe",) else inside))
