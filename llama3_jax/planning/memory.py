"""What one GPU holds, in closed form; tested against what XLA allocates.

All figures are bytes. The formulas follow parallel/ and training/: what is stored, what a step
keeps between forward and backward, and the largest set of arrays that is alive at once beside it.
"""

from typing import NamedTuple

from llama3_jax.parallel.stages import make_stages
from llama3_jax.planning.case import Case
from llama3_jax.planning.traffic import layer_parameters, table_parameters

_F32, _BF16 = 4, 2


class Memory(NamedTuple):
    """`temporary` is what is alive only for a while: gathered layers, logits, a layer's inside."""

    parameters: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    temporary: float

    @property
    def total(self) -> float:
        return sum(self)


def forecast(case: Case) -> Memory:
    """The peak of a training step."""
    mesh, model = case.mesh, case.model
    ranks = mesh.data * mesh.context
    layer, tables = layer_parameters(case), table_parameters(case)
    norms = (2 * _stacked_layers(case) + 1) * model.dim
    matrices = _stacked_layers(case) * layer + tables
    stored = matrices / ranks + norms
    kept = mesh.fsdp == "kept" and ranks > 1
    # Automatic differentiation returns a micro-batch's gradients, which are added to the sum.
    sums = 2 if mesh.pipe == 1 and case.micro_batches > 1 else 1
    whole = matrices + norms if kept else stored
    return Memory(
        parameters=_F32 * stored,
        optimizer=2 * _F32 * stored,
        gradients=_F32 * sums * whole,
        gathered=_width(case) * matrices if kept else 0,
        activations=_activations(case),
        temporary=_temporary(case, kept),
    )


def _width(case: Case) -> int:
    return _BF16 if case.model.dtype == "bfloat16" else _F32


def _stacked_layers(case: Case) -> int:
    """Layers' places on one pipeline rank, also those that hold none (parallel/stages.py)."""
    if case.mesh.pipe == 1:
        return case.model.layers
    return case.mesh.virtual_stages * make_stages(case.model.layers, case.mesh).most


def layer_residuals(case: Case) -> float:
    """What one layer keeps of one micro-batch for its backward pass, by remat policy."""
    model, tensor, tokens = case.model, case.mesh.tensor, case.rank_tokens
    width = _width(case)
    kv = max(model.kv_heads // tensor, 1) * model.head_dim
    heads, ffn = model.heads // tensor * model.head_dim, model.ffn_dim // tensor
    residual = tokens // tensor * model.dim
    if model.remat == "full":
        return width * residual
    if model.remat == "save_attention":
        return width * (residual + tokens * heads)
    products = 2 * residual + tokens * (2 * heads + 2 * kv + 2 * ffn)
    if model.remat == "save_products":
        return width * products
    # Both gathered inputs, rotated queries and keys of the whole row, SwiGLU's result, norms.
    row = tokens * case.mesh.context
    gathered = 2 * tokens * model.dim + tokens * (heads + ffn) + 2 * row * kv
    return width * (products + gathered) + 2 * _F32 * residual


def _activations(case: Case) -> float:
    mesh = case.mesh
    boundary = _width(case) * (case.rank_tokens // mesh.tensor) * case.model.dim
    if mesh.pipe == 1:
        return case.model.layers * layer_residuals(case)
    most = make_stages(case.model.layers, mesh).most
    flying = in_flight(case)
    # Between stages lie what arrives, what is sent and what waits for the head.
    waiting = 2 * mesh.contiguous_or(case.micro_batches) + 2
    return flying * most * layer_residuals(case) + waiting * boundary


def in_flight(case: Case) -> int:
    """(micro-batch, virtual stage) pairs on the first rank: the schedule's limit."""
    mesh, micro = case.mesh, case.micro_batches
    if mesh.schedule == "gpipe":
        return micro * mesh.virtual_stages
    if mesh.schedule == "1f1b":
        return min(mesh.pipe, micro)
    contiguous = mesh.contiguous_or(micro)
    limit = 2 * (mesh.pipe - 1) + (mesh.virtual_stages - 1) * contiguous + 1
    return min(limit, micro * mesh.virtual_stages)


def _temporary(case: Case, kept: bool) -> float:
    """The larger of the head's inside and a layer's inside in the backward pass."""
    model, mesh, tokens = case.model, case.mesh, case.rank_tokens
    width, tensor = _width(case), mesh.tensor
    ranks = mesh.data * mesh.context
    vocabulary = model.vocab_size // tensor
    table = vocabulary * model.dim
    gathered = ranks > 1 and not kept
    head = tokens * vocabulary * (_F32 + _F32 + width) + 2 * width * tokens * model.dim
    layer = width * tokens * (4 * model.dim + 4 * model.ffn_dim // tensor)
    if gathered:
        head += table * (2 * width + _F32)
        layer += layer_parameters(case) * (width + _F32) + table * width
    return max(head, layer)
