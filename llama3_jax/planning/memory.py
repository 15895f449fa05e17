"""What one GPU holds, in closed form; tested against what XLA allocates.

All figures are bytes. The formulas follow parallel/ and training/: what is stored, what a step
keeps between forward and backward, and the largest set of arrays that is alive at once beside it.
"""

import functools
from typing import NamedTuple

import jax

from llama3_jax.kernels.cross_entropy import CHUNK_BYTES
from llama3_jax.model.definition import Definition, define
from llama3_jax.parallel.schedule import in_flight_limits
from llama3_jax.parallel.stages import make_stages
from llama3_jax.planning.case import Case
from llama3_jax.planning.traffic import (
    layer_parameters,
    small_parameters,
    stacked_layers,
    table_parameters,
)
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama3_jax.xla import MEMORY_FRACTION

_F32 = 4


def usable(case: Case, memory: float) -> float:
    """Bytes that JAX takes of a GPU's `memory`."""
    return memory * (case.xla.memory_fraction or MEMORY_FRACTION)


def optimizer_bytes(case: Case) -> float:
    """Of the optimizer's state, for each parameter."""
    return _optimizer_bytes(define(case.model), case.optimizer)


@functools.cache
def _optimizer_bytes(model: Definition, optimizer: OptimizerConfig) -> float:
    state = jax.eval_shape(make_optimizer(optimizer).init, model.abstract_params())
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return total / model.parameter_count()


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
    mesh = case.mesh
    ranks = mesh.data * mesh.context
    matrices = stacked_layers(case) * layer_parameters(case) + table_parameters(case)
    in_layer, outside = small_parameters(case)
    norms = stacked_layers(case) * in_layer + outside
    stored = matrices / ranks + norms
    kept = not mesh.reshard_after_forward and ranks > 1
    gradients = _F32 * (matrices + norms if kept else stored)
    head, layer = _head_inside(case, kept), _layer_inside(case, kept)
    if mesh.pipe == 1 and case.micro_batches == 1:
        # The head's inside is gone before the layers' gradients are there.
        gradients, temporary = max(gradients + layer, head) - layer, layer
    else:
        # Automatic differentiation returns a micro-batch's gradients, to be added to the sum.
        gradients *= 2 if mesh.pipe == 1 else 1
        temporary = max(head, layer)
    return Memory(
        parameters=_F32 * stored,
        optimizer=optimizer_bytes(case) * stored,
        gradients=gradients,
        gathered=case.width * matrices if kept else 0,
        activations=_activations(case),
        temporary=temporary,
    )


def layer_residuals(case: Case) -> float:
    """What one layer keeps of one micro-batch for its backward pass, by remat policy."""
    model, tensor, tokens = case.model, case.mesh.tensor, case.rank_tokens
    width = case.width
    kv = max(model.kv_heads // tensor, 1) * model.head_dim
    heads, ffn = model.heads // tensor * model.head_dim, model.ffn_dim // tensor
    residual = tokens // tensor * model.dim
    if model.remat == "full":
        return width * residual
    if model.remat == "save_attention":
        return width * (residual + tokens * heads)
    products = 2 * residual + tokens * (2 * heads + 2 * kv + 2 * ffn)
    if model.remat == "save_dots":
        return width * products
    # Both normed inputs, rotated queries and keys of the whole row, SwiGLU's result, norms.
    row = tokens * case.mesh.context
    gathered = 2 * residual + tokens * (heads + ffn) + 2 * row * kv
    return width * (products + gathered) + 2 * _F32 * residual


def _activations(case: Case) -> float:
    mesh = case.mesh
    boundary = case.width * (case.rank_tokens // mesh.tensor) * case.model.dim
    if mesh.pipe == 1:
        return case.model.layers * layer_residuals(case)
    most = make_stages(case.model.layers, mesh).most
    flying = max(in_flight_limits(mesh, case.micro_batches))
    # Between stages there is what arrives, what is sent and what waits for the head.
    waiting = 2 * mesh.contiguous_or(case.micro_batches) + 2
    return flying * most * layer_residuals(case) + waiting * boundary


def _head_inside(case: Case, kept: bool) -> float:
    """Logits and what is made of them, and the head's gathered table with its gradient.

    XLA has three float32 arrays of logits alive at once, and two where the vocabulary is split or
    the head is inside a loop: over micro-batches, or over the pipeline's ticks.
    """
    model, tokens, width = case.model, case.rank_tokens, case.width
    vocabulary = model.vocab_size // case.mesh.tensor
    if model.loss == "reference":
        copies = 3 if case.mesh.pipe == case.mesh.tensor == case.micro_batches == 1 else 2
        inside = tokens * vocabulary * (copies * _F32 + width)
    else:  # a chunk of logits at a time, and the head's gradient at once with them
        chunks = 1 if model.loss == "triton" else 3  # its gradient is where its logits were
        inside = chunks * CHUNK_BYTES + vocabulary * model.dim * _F32
    inside += 2 * width * tokens * model.dim
    if _gathers(case, kept):
        inside += vocabulary * model.dim * (width + _F32)
    return inside


def _layer_inside(case: Case, kept: bool) -> float:
    """A layer's backward: gathered and widened activations, and its own weights and gradients."""
    model, tokens, width = case.model, case.rank_tokens, case.width
    inside = width * tokens * (4 * model.dim + 4 * model.ffn_dim // case.mesh.tensor)
    inside += 2.5 * _F32 * _scores(case)
    if case.mesh.tensor > 1 and case.mesh.pipe == 1:
        # The input gathered again and the gradient of it, which wait for the weights' gradients.
        inside += 2 * width * tokens * model.dim
    if _gathers(case, kept):
        inside += layer_parameters(case) * (width + _F32)
        inside += model.vocab_size // case.mesh.tensor * model.dim * width
    return inside


def _scores(case: Case) -> float:
    """Attention scores that are in memory at once; their gradient and mask come on top."""
    model, row = case.model, case.rank_tokens * case.mesh.context
    heads = model.heads // case.mesh.tensor
    if model.attention == "reference":
        return heads * case.rank_tokens * row / case.micro_rows
    if model.attention == "chunked":  # kernels/attention.py: 512 queries, or a 16th of a row
        return (
            heads * case.micro_rows * max(512, case.length // 16 // case.mesh.context) * case.length
        )
    return 0


def _gathers(case: Case, kept: bool) -> bool:
    return case.mesh.data * case.mesh.context > 1 and not kept
