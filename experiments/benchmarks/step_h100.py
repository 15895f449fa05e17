"""A whole training step on one NVIDIA GPU against the same model in torch.

    python -m experiments.benchmarks.step_h100                # 8 layers, ours and torch's
    python -m experiments.benchmarks.step_h100 --layers=2 --attention=cudnn --loss=chunked
    python -m experiments.benchmarks.step_h100 --variant=norm=triton --variant=swiglu=triton
    python -m experiments.benchmarks.step_h100 --rehearse     # no GPU: every line at toy sizes

The width is the 8B model's (dim 4096, 32/8 heads, vocabulary 128,256), one row of 8,192 tokens of
packed documents of 1.5K tokens on average, bfloat16 products, AdamW in float32. Ours is
`llama3_jax.training.step.compile_step` as a run uses it. Torch's is the same network written with
its own layers under `torch.compile`, FlexAttention with the compiled document mask, fused AdamW,
float32 parameters under bfloat16 autocast; it keeps all activations. In a rehearsal torch's attention
is its dense one, for FlexAttention has no gradient on a CPU, and nothing of torch is compiled.

Each side is timed alone in a process of its own, because neither fits beside the other, ours and
torch's in turn (`--rounds`); ratios are of neighbours. A side that runs out of memory has no figures:
fewer `--layers` then compare both. MFU is against the data sheet's peak, by the three accountings of
`model/flops.py`, and memory beside what XLA and the planner forecast. A variant is ours with one
choice changed, a side of its own: what a kernel gains in a step, where XLA may fuse what it replaces
with its neighbours.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.kernels import dispatch
from llama3_jax.model.config import ModelConfig, preset
from llama3_jax.model.flops import ACCOUNTINGS, training_flops
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.planning.case import Case
from llama3_jax.planning.memory import forecast
from llama3_jax.training.hardware import PEAK_FLOPS, peak_flops
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.state import abstract_state, init_state
from llama3_jax.training.step import compile_step

LEARNING_RATE = 1e-4
OURS, TORCH = SIDES = ("ours", "torch")
WARM_UP, STEPS = 3, 10
OUT_OF_MEMORY = 4
H100 = "NVIDIA H100 80GB HBM3"
# What a rehearsal assumes for a GPU, in seconds: compiling the step (torch's beyond that of a small
# function), and making a state; and of the peak, what a step reaches.
COMPILE, STATE, MFU = {"ours": 45.0, "torch": 30.0}, 8.0, 0.4

FLAGS = flags.FLAGS


class Sizes(NamedTuple):
    """Tokens of the row and of its documents, and what of the 8B model is replaced."""

    length: int = 8192
    mean_document: int = 1536
    model: dict[str, int] = {}


_TOY = Sizes(96, 24, dict(dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=300))


def sizes() -> Sizes:
    return _TOY if gpu.rehearsing() else Sizes()


def documents() -> list[int]:
    return gpu.document_lengths(sizes().length, sizes().mean_document, np.random.default_rng(0))


def make_batch(vocabulary: int) -> dict[str, np.ndarray]:
    """One packed row; a document's last token predicts nothing."""
    lengths, length = documents(), sizes().length
    tokens = np.random.default_rng(1).integers(0, vocabulary, (1, length + 1), dtype=np.int32)
    places = gpu.places_of(lengths)
    mask = np.ones((1, length), bool)
    mask[0, np.cumsum(lengths) - 1] = False
    return dict(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=np.asarray(places.positions),
        segment_ids=np.asarray(places.segments),
        loss_mask=mask, source=np.zeros(1, np.int32), cut=np.zeros(1, np.int32),
    )  # fmt: skip


def model_config(layers: int, **changes: Any) -> ModelConfig:
    """The 8B model with fewer layers; a rehearsal's has two at most."""
    layers = min(layers, 2) if gpu.rehearsing() else layers
    return preset("8B", layers=layers, **(sizes().model | changes))


def steps() -> tuple[int, int]:
    """To warm up, and measured."""
    return (1, 2) if gpu.rehearsing() else (WARM_UP, STEPS)


def compiled_step(config: ModelConfig):
    """The compiled step, its shapes alone needed, and the batch on the device."""
    layout, optimizer = make_mesh(MeshConfig(), jax.devices()[:1]), OptimizerConfig()
    batch = put_batch(make_batch(config.vocab_size), layout)
    state = abstract_state(config, optimizer, layout, saved=True)
    step = compile_step(config, optimizer, layout, micro_batches=1, sources=1)
    return step.lower(state, batch, np.float32(LEARNING_RATE)).compile(), batch, layout, optimizer


def case_of(config: ModelConfig) -> Case:
    """The step as the planner knows it."""
    one = dict(rows=1, length=sizes().length, micro_batches=1, steps=STEPS, sources=1)
    return Case("step", config, OptimizerConfig(), MeshConfig(), **one)


def needed_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip


def expect(side: str) -> None:
    """What this side would take on a GPU, where each compiles once."""
    flops = training_flops(preset("8B", layers=FLAGS.layers), 1, Sizes().length, 0)["full"]
    gpu.expect("steps", (WARM_UP + STEPS) * flops / (MFU * PEAK_FLOPS[H100]) + STATE)
    gpu.expect("a step's compilation", COMPILE[side])


def our_side(config: ModelConfig) -> dict[str, Any]:
    compiled, batch, layout, optimizer = compiled_step(config)
    state, rate = init_state(config, optimizer, layout, 0), np.float32(LEARNING_RATE)
    losses, times = [], []
    for _ in range(sum(steps())):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, rate)
        losses.append(float(metrics.loss))
        times.append(time.perf_counter() - start)
    # A CPU keeps no such account.
    peak = 0 if gpu.rehearsing() else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    expect(OURS)
    return dict(
        seconds=times[steps()[0] :],
        losses=losses,
        peak_bytes=peak,
        compiled_bytes=needed_bytes(compiled),
        planned_bytes=forecast(case_of(config)).total,
    )


def torch_side(config: ModelConfig) -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

    H, K, D, M, F = (
        config.heads, config.kv_heads, config.head_dim, config.dim, config.ffn_dim,
    )  # fmt: skip
    device, length = gpu.torch_device(), sizes().length
    batch = make_batch(config.vocab_size)
    batch = {name: torch.from_numpy(array.copy()).to(device) for name, array in batch.items()}
    segments = batch["segment_ids"][0]

    def visible(b, h, query, key):
        return (query >= key) & (segments[query] == segments[key])

    mask = gpu.torch_compile(create_block_mask)(visible, None, None, length, length, device=device)
    speeds = config.rope.theta ** (-torch.arange(0, D, 2, device=device) / D)
    angles = batch["positions"][0][:, None] * speeds
    cos, sin = angles.cos(), angles.sin()

    def attend(q, k, v):
        if gpu.rehearsing():
            seen = visible(0, 0, *torch.meshgrid(*[torch.arange(length)] * 2, indexing="ij"))
            return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    def rotate(x):
        first, second = x.float().chunk(2, -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat(turned, -1).to(x.dtype)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(M))

        def forward(self, x):
            x32 = x.float()
            inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + config.norm_eps)
            return (x32 * inverse * self.scale).to(x.dtype)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(Norm() for _ in range(2))
            self.qkv = nn.Linear(M, (H + 2 * K) * D, bias=False)
            self.out = nn.Linear(H * D, M, bias=False)
            self.gate_up = nn.Linear(M, 2 * F, bias=False)
            self.down = nn.Linear(F, M, bias=False)

        def forward(self, x):
            qkv = self.qkv(self.norms[0](x)).view(1, length, H + 2 * K, D).transpose(1, 2)
            q, k, v = qkv.split((H, K, K), 1)
            attended = attend(rotate(q), rotate(k), v).transpose(1, 2)
            x = x + self.out(attended.reshape(1, length, H * D))
            gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
            return x + self.down(silu(gate) * up)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(config.vocab_size, M)
            self.layers = nn.ModuleList(Layer() for _ in range(config.layers))
            self.norm = Norm()
            self.head = nn.Linear(M, config.vocab_size, bias=False)

        def forward(self, tokens, targets):
            x = self.embedding(tokens).to(torch.bfloat16)  # as ours, between layers
            for layer in self.layers:
                x = layer(x)
            logits = self.head(self.norm(x)).float()
            return cross_entropy(logits.view(length, -1), targets.view(-1), ignore_index=-100)

    torch.manual_seed(0)
    with torch.device(device):
        network = Network()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=config.init_std)
    optimizer = torch.optim.AdamW(
        network.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    compiled = gpu.torch_compile(network)
    targets = torch.where(batch["loss_mask"], batch["targets"].long(), -100)
    losses, times = [], []
    for _ in range(sum(steps())):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(batch["tokens"].long(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    peak = 0 if gpu.rehearsing() else torch.cuda.max_memory_allocated()
    expect(TORCH)
    return dict(seconds=times[steps()[0] :], losses=losses, peak_bytes=peak)


# ------------------------------------------------------------------------------------------- rounds


def run_side(side: str, changes: dict[str, str]) -> dict[str, Any]:
    """A side in a process of its own.

    Raises:
      UserError: it ran out of memory, or failed otherwise.
    """
    options = {f"--{name}={value}" for name, value in changes.items()}
    options |= {f"--{x}={FLAGS[x].value}" for x in ("results", "cache") if FLAGS[x].value}
    options |= {"--rehearse"} if FLAGS.rehearse else set()
    command = [sys.executable, "-m", "experiments.benchmarks.step_h100",
               f"--side={TORCH if side == TORCH else OURS}", f"--layers={FLAGS.layers}", *options]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == OUT_OF_MEMORY:
        raise UserError(f"out of memory with {FLAGS.layers} layers; try fewer --layers")
    if done.returncode:
        raise UserError(f"its process ended with {done.returncode}; the reason is above")
    return json.loads(done.stdout.splitlines()[-1])


def utilisation(config: ModelConfig, seconds: float, peak: float) -> dict[str, float]:
    """MFU by each accounting."""
    flops = training_flops(config, 1, sizes().length, gpu.pairs_of(documents()))
    return {name: flops[name] / seconds / peak for name in ACCOUNTINGS}


def table_of(config: ModelConfig, runs: dict[str, list[dict]], peak: float) -> Table:
    table = Table(title=f"{config.layers} layers of the 8B width, {sizes().length:,} packed tokens")
    table.add_column("side")
    for column in ("ms/step", "tokens/s", *(f"MFU {a}" for a in ACCOUNTINGS), "peak GB",
                   "compiler GB", "planner GB", "speed, ours over it"):  # fmt: skip
        table.add_column(column, justify="right")
    medians = {side: [float(np.median(r["seconds"])) for r in runs[side]] for side in runs}
    for side, results in runs.items():
        if not results:
            continue
        seconds, rounds = float(np.median(medians[side])), min(map(len, (medians[OURS], results)))
        mfu = utilisation(config, seconds, peak)
        accounts = [results[-1].get(name) for name in ("compiled_bytes", "planned_bytes")]
        table.add_row(
            side, f"{1e3 * seconds:.1f}", f"{sizes().length / seconds:,.0f}",
            *(f"{mfu[a]:.1%}" for a in ACCOUNTINGS), f"{results[-1]['peak_bytes'] / 1e9:.1f}",
            *(f"{account / 1e9:.1f}" if account else "" for account in accounts),
            f"{np.median(np.divide(medians[side][:rounds], medians[OURS][:rounds])):.2f}",
        )  # fmt: skip
    return table


def define_flags() -> None:
    flags.DEFINE_integer("layers", 8, "Layers of the model.", lower_bound=1)
    for operation, implementations in dispatch.KERNELS.items():
        default = "triton" if operation in ("attention", "loss") else "reference"
        flags.DEFINE_enum(operation, default, list(implementations), "Ours.")
    flags.DEFINE_multi_string(
        "variant", [], "OPERATION=IMPLEMENTATION: ours once more, so changed."
    )
    remats = get_args(ModelConfig.model_fields["remat"].annotation)
    flags.DEFINE_enum("remat", "save_dots", remats, "Ours.")
    flags.DEFINE_integer("rounds", 3, "Times that each side runs.", lower_bound=1)
    flags.DEFINE_enum("side", None, SIDES, "Be this side (the program starts itself).")
    gpu.define_flags()


def main(_) -> int:
    with gpu.machine("experiments/benchmarks/train_step.py, which measures a CPU"):
        changes = {name: FLAGS[name].value for name in (*dispatch.KERNELS, "remat")}
        return be_side(changes) if FLAGS.side else measure_sides(changes)


def be_side(changes: dict[str, str]) -> int:
    config = model_config(FLAGS.layers, **changes)
    try:
        print(json.dumps((our_side if FLAGS.side == OURS else torch_side)(config)))
    except RuntimeError as error:  # of both JAX and torch
        if not any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "out of memory")):
            raise
        print(str(error)[:300], file=sys.stderr)
        return OUT_OF_MEMORY
    return 0


def change(text: str) -> dict[str, str]:
    """
    Raises:
      UserError: it is not OPERATION=IMPLEMENTATION, or there is no such.
    """
    operation, _, implementation = text.partition("=")
    if operation not in dispatch.KERNELS:
        raise UserError(f"--variant={text}: one of {', '.join(dispatch.KERNELS)} = IMPLEMENTATION")
    dispatch.resolve(operation, implementation)
    return {operation: implementation}


def measure_sides(changes: dict[str, str]) -> int:
    sides = {OURS: changes, **{f"{OURS}, {text}": changes | change(text) for text in FLAGS.variant}}
    if gpu.has_torch():
        sides[TORCH] = changes
    gpu.say_without_torch()
    config = model_config(FLAGS.layers, **changes)
    peak, source = peak_flops()
    if gpu.rehearsing():
        peak, source = PEAK_FLOPS[H100], "an H100's, in a rehearsal"
    if peak is None:
        raise UserError(source)
    about = dict(layers=FLAGS.layers, changes=changes, peak_flops=peak)
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    failures: dict[str, str] = {}
    # This process holds no more of the device than what finding it took, which is little.
    for number in range(FLAGS.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            if side in failures:
                continue
            try:
                runs[side].append(run_side(side, sides[side]))
            except UserError as error:  # the other side is measured all the same
                failures[side] = str(error)
            written = gpu.save("step", about | dict(runs=runs, failures=failures))
    if runs[OURS]:
        Console(width=120).print(table_of(config, runs, peak))
    print(f"kernels: {dispatch.describe(config.kernels())}; MFU against {peak:.4g} ({source})")
    print(f"written: {written}")
    if failures:
        raise UserError("; ".join(f"{side}: {why}" for side, why in failures.items()))
    return 0


if __name__ == "__main__":
    # The sides need the memory that this process would otherwise take hold of.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    define_flags()
    cli.run(main)
