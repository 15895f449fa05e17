"""How long a step takes: a roofline of products, attention, memory passes and links.

Times are seconds of one GPU. Products and attention run at an achieved share of the peak, what is
between them at the memory's speed, collectives at the link's; what XLA does not overlap is added up:
by the compiled step's own schedule where there is one.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from llama3_jax.model.definition import define
from llama3_jax.model.flops import training_flops
from llama3_jax.parallel.schedule import make_schedule, simulate_times
from llama3_jax.parallel.stages import make_stages
from llama3_jax.planning.case import Case
from llama3_jax.planning.constants import Constants
from llama3_jax.planning.memory import optimizer_bytes
from llama3_jax.planning.traffic import (
    BACKWARD,
    FORWARD,
    STEP,
    TICK,
    bandwidth,
    layer_parameters,
    traffic,
)  # fmt: skip

AttentionKernel = Literal["triton", "cudnn"]


class Cost(NamedTuple):
    """Of a step; the parts of `seconds` by what takes them. `bubble` is idle over busy time.

    `flops` are by the three accountings, of the whole batch, without what is computed twice.
    """

    seconds: float
    parts: dict[str, float]
    bubble: float
    flops: dict[str, float]
    gpus: int
    tokens: int
    peak: float

    def flops_per_gpu(self, accounting: str = "causal") -> float:
        """FLOP/s of each GPU."""
        return self.flops[accounting] / self.seconds / self.gpus

    def mfu(self, accounting: str = "causal") -> float:
        return self.flops_per_gpu(accounting) / self.peak

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.seconds * 86_400


def predict(
    case: Case,
    constants: Constants,
    document_length: int | None = None,
    simulated: bool = True,
    overlap: Mapping[tuple[str, tuple[str, ...]], float] | None = None,
    attention: AttentionKernel = "triton",
) -> Cost:
    """The step's time. Documents are as long as a row, or `document_length` tokens on average.

    The pipeline's bubble comes from the simulated schedule, or else from (P - 1) / (M V). `overlap`
    holds what share of a collective's bytes has products under it, by kind and axes; without it,
    what compiled layouts of the kind showed. `attention` names the kernel whose efficiency counts.
    """
    model, mesh, micro = case.model, case.mesh, case.micro_batches

    def exposed(phase: str) -> dict[str, float]:
        times: dict[str, float] = {}
        for t in traffic(case):
            if t.phase == phase:
                share = t.hidden if overlap is None else overlap.get((t.kind, t.axes), 0.0)
                part = t.axes[0] if t.axes in (("tensor",), ("context",)) else "fsdp"
                seconds = t.bytes / bandwidth(t.axes, mesh, constants)
                times[part] = times.get(part, 0.0) + (1 - constants.overlap * share) * seconds
        return times

    forward, backward = _layer(case, constants, document_length, attention)
    for times, phase in ((forward, FORWARD), (backward, BACKWARD)):
        times |= dict.fromkeys(("tensor", "context", "fsdp"), 0.0) | exposed(phase)
    layers = model.layers / mesh.pipe
    head_forward, head_backward = _head(case, constants)
    parts = {
        name: micro * layers * (forward[name] + backward[name]) for name in forward
    }  # fmt: skip
    parts["head"] = micro * (head_forward + head_backward) / mesh.pipe
    ends = {
        **exposed(STEP),
        # Reads and writes parameter and optimizer state, reads the gradient: float32.
        "optimizer": (12 + 2 * optimizer_bytes(case))
        * _stored_parameters(case)
        / constants.memory_bandwidth,
    }
    bubble = 0.0
    if mesh.pipe > 1:
        busy = sum(parts.values())
        bubble = (mesh.pipe - 1) / (micro * mesh.virtual_stages)
        exchanges = 2 * (micro * mesh.virtual_stages + mesh.pipe - 1)
        if simulated:
            stages = np.array(make_stages(model.layers, mesh).counts, float)
            times = [stages * sum(forward.values()), stages * sum(backward.values())]
            times[1][-1, -1] += head_forward + head_backward
            schedule = make_schedule(mesh, micro)
            bubble = simulate_times(schedule, *times) / busy - 1
            exchanges = sum(map(schedule.exchanges, ("forward", "backward")))
        parts["bubble"] = bubble * busy
        parts["pipeline"] = exchanges * sum(exposed(TICK).values())
    for name, seconds in ends.items():
        parts[name] = parts.get(name, 0.0) + seconds
    pairs = _document_pairs(case, document_length)
    return Cost(
        sum(parts.values()), parts, bubble,
        training_flops(model, case.rows, case.length, pairs), mesh.devices, case.tokens,
        constants.peak,
    )  # fmt: skip


def _document_pairs(case: Case, document_length: int | None) -> float:
    """(query, key) pairs that the document mask lets through."""
    length = min(document_length or case.length, case.length)
    return case.tokens * (length + 1) / 2


def _layer(case: Case, constants: Constants, document_length: int | None, kernel: AttentionKernel):
    """Seconds by part of one layer's forward and backward for one micro-batch, without exchanges."""
    model, mesh, tokens = case.model, case.mesh, case.rank_tokens
    product = 2 * layer_parameters(case) * tokens / (constants.peak * constants.gemm_efficiency)
    pairs = _document_pairs(case, document_length) / case.rows * case.micro_rows / mesh.context
    flops = 4 * model.heads // mesh.tensor * model.head_dim * pairs
    attention = flops / (constants.peak * getattr(constants, f"{kernel}_forward_efficiency"))
    attention_back = (
        2.5 * flops / (constants.peak * getattr(constants, f"{kernel}_backward_efficiency"))
    )
    passes = _memory_passes(case) / constants.memory_bandwidth
    again = {"none": 0, "save_dots": 0}.get(model.remat, 1)
    # Only the Triton kernel's results are kept where the policy says so (gpu/flash_attention.py).
    keeps = model.remat == "none" or (model.remat != "full" and model.attention == "triton")
    attention_again = 0 if keeps else 1
    forward = {"products": product, "attention": attention, "memory": passes}
    backward = {
        "products": (2 + again) * product,
        "attention": attention_back + attention_again * attention,
        "memory": (2 + (model.remat != "none")) * passes,
    }
    if mesh.pipe > 1 or case.micro_batches > 1:
        # float32 sums of gradients: each is read and written, and what is added is read.
        shards = mesh.data * mesh.context if mesh.reshard_after_forward else 1
        sums = 12 * layer_parameters(case) / shards
        backward["gradients"] = sums / constants.memory_bandwidth
        forward["gradients"] = 0.0
    return forward, backward


def _memory_passes(case: Case) -> float:
    """Bytes that a layer's forward moves between its products: norms, RoPE, SwiGLU, residuals."""
    model, tensor, tokens = case.model, case.mesh.tensor, case.rank_tokens
    residual = 8 * tokens // tensor * model.dim  # two norms and two additions
    rope = 2 * tokens * (model.heads + 2 * model.kv_heads) // tensor * model.head_dim
    swiglu = 3 * tokens * model.ffn_dim // tensor
    return 2 * (residual + rope + swiglu)


def _head(case: Case, constants: Constants) -> tuple[float, float]:
    """Seconds of head and loss for one micro-batch, forward and backward."""
    model, tokens = case.model, case.rank_tokens
    vocabulary = model.vocab_size // case.mesh.tensor
    product = 2 * vocabulary * model.dim * tokens / (constants.peak * constants.gemm_efficiency)
    logits = 4 * vocabulary * tokens / constants.memory_bandwidth
    return product + 3 * logits, 2 * product + 3 * logits


def _stored_parameters(case: Case) -> float:
    """Parameters that one GPU keeps and updates."""
    return define(case.model).parameter_count() / case.mesh.devices
