"""Our training step against Hugging Face transformers on torch: same model, batch and CPU.

    pip install -e '.[parity]'        # with a CPU build of torch
    python -m experiments.benchmarks.train_step --shapes=1.8M --rounds=20 --json=FILE

Ours is `llama3_jax.training.step.compile_step` as a run uses it: documents packed with their mask,
AdamW, clipping at 1.0, the check for finite gradients, all metrics. Theirs is LlamaForCausalLM with
its default (scaled-dot-product) attention, fused AdamW and `clip_grad_norm_`, once eager and once
under `torch.compile`. All compute in float32 on every core.

What makes the ratio mean something:
- Both sides load the same weights (ours, saved by `model/hf.py`) and the same rows of one document
  each, on which torch's causal mask is our document mask. The losses of the first three steps are
  compared, so gradients and update are too; the first may differ by 1e-4 at most.
- Each side is a process, and one works at a time: in a round every side makes a few steps, in an
  order that alternates. Ratios are taken within a round. CPU time (user and system) stands beside
  wall time, because other work on the machine disturbs it less.

Linux only. README.md beside this file says what bounds our step, and what did not help it.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import init_params
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.parallel.sharding import put_batch
from llama3_jax.training.optimizer import OptimizerConfig, make_optimizer
from llama3_jax.training.state import TrainState, abstract_state, shardings
from llama3_jax.training.step import compile_step

# Model, rows of a batch, tokens of a row.
SHAPES = {
    "9.5M": (dict(layers=6, dim=256, heads=8, kv_heads=4, head_dim=32, ffn_dim=896,
                  vocab_size=8192), 8, 512),
    "1.8M": (dict(layers=4, dim=128, heads=4, kv_heads=2, head_dim=32, ffn_dim=384,
                  vocab_size=4096), 16, 256),
}  # fmt: skip
OURS, EAGER, COMPILED = SIDES = ("ours", "torch eager", "torch compiled")
LEARNING_RATE, CHECKED_STEPS, STEPS_PER_ROUND = 1e-3, 3, 3
# For both sides alike: activations are allocated anew in every step, which huge pages make cheaper.
# OMP_WAIT_POLICY stays unset: idle sides take no CPU time without it, and PASSIVE cost compiled
# torch a tenth of its speed on free cores.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "JAX_PLATFORMS": "cpu",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_multi_enum("shapes", list(SHAPES), list(SHAPES), "Models to measure.")
    flags.DEFINE_integer("rounds", 15, "Measured rounds.", lower_bound=2)
    flags.DEFINE_string("json", None, "Where the numbers go as JSON.")
    # The program starts itself once for each side.
    flags.DEFINE_enum("side", None, SIDES, "Be this side, steered by standard input.")
    flags.DEFINE_string("weights", None, "Checkpoint that the side loads.")


def our_step(shape: str, weights: Path):
    """A function that makes a step and returns its loss."""
    layers = SHAPES[shape][0]["layers"]
    config, params = hf.load(weights, dtype="float32", attention="chunked", layer_unroll=layers)
    optimizer, mesh = OptimizerConfig(), make_mesh(MeshConfig())
    state = TrainState(params, make_optimizer(optimizer).init(params))
    state = jax.device_put(state, shardings(abstract_state(config, optimizer, mesh)))
    compiled = compile_step(config, optimizer, mesh, micro_batches=1, sources=1)

    tokens = make_tokens(shape)
    mask = np.ones(tokens.shape, bool)
    mask[:, -1] = False  # transformers too predicts nothing after a row's last token
    rows = np.zeros(len(tokens), np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = dict(tokens=tokens, targets=np.roll(tokens, -1, axis=1), positions=positions,
                 segment_ids=np.ones_like(tokens), loss_mask=mask, source=rows, cut=rows)  # fmt: skip
    batch = put_batch(batch, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, np.float32(LEARNING_RATE))
        return float(metrics.loss)

    return step


def torch_step(shape: str, weights: Path, side: str):
    """The same by transformers and torch."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32).train()
    groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == matrix],
                   weight_decay=0.1 * matrix) for matrix in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    network = torch.compile(model) if side == COMPILED else model
    tokens = torch.from_numpy(make_tokens(shape)).long()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def make_tokens(shape: str) -> np.ndarray:
    model, rows, length = SHAPES[shape]
    random = np.random.default_rng(0)
    return random.integers(0, model["vocab_size"], (rows, length), dtype=np.int32)


def serve(side: str, shape: str, weights: Path) -> None:
    """Answers each number of steps on standard input with their losses and what they took."""
    step = our_step(shape, weights) if side == OURS else torch_step(shape, weights, side)
    for line in sys.stdin:
        usage, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        losses = [step() for _ in range(int(line))]
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
        print(json.dumps(dict(losses=losses, seconds=seconds, cpu=cpu)), flush=True)


class Side:
    """A side in a process of its own."""

    def __init__(self, name: str, shape: str, weights: Path):
        self.name = name
        command = [sys.executable, "-m", "experiments.benchmarks.train_step", f"--side={name}",
                   f"--shapes={shape}", f"--weights={weights}"]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | ENVIRONMENT)  # fmt: skip

    def run(self, steps: int) -> dict:
        with contextlib.suppress(BrokenPipeError):
            print(steps, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise UserError(f"{self.name}: its process ended; the reason stands above")
        return json.loads(answer)


def measure(shape: str, rounds: int, weights: Path) -> dict[str, dict]:
    """By side: tokens/s and CPU seconds a step of every round, losses of the checked steps."""
    model, rows, length = SHAPES[shape]
    config = ModelConfig(**model, dtype="float32")
    hf.save(weights, config, init_params(config, 0), "float32")
    with contextlib.ExitStack() as stack:
        sides = [Side(name, shape, weights) for name in SIDES]
        for side in sides:
            stack.callback(side.process.communicate)  # ends its input, and waits
        # Compilation and warm-up happen here, too.
        results = {s.name: dict(s.run(CHECKED_STEPS), tokens_per_s=[], cpu_s=[]) for s in sides}
        check_same(shape, results)
        for number in range(rounds):
            for side in sides if number % 2 else reversed(sides):
                side.run(1)  # caches and memory are again this side's
                answer, result = side.run(STEPS_PER_ROUND), results[side.name]
                tokens = STEPS_PER_ROUND * rows * length
                result["tokens_per_s"].append(tokens / answer["seconds"])
                result["cpu_s"].append(answer["cpu"] / STEPS_PER_ROUND)
    return results


def check_same(shape: str, results: dict[str, dict]) -> None:
    ours = results[OURS]["losses"]
    for name in (EAGER, COMPILED):
        differences = np.abs(np.subtract(results[name]["losses"], ours))
        # Adam's first updates are near the gradient's sign, which rounding decides where it is 0.
        if differences[0] > 1e-4 or differences.max() > 1e-3:
            raise UserError(f"{shape}: losses {ours}, of {name} {results[name]['losses']}")


def table_of(results: dict[str, dict[str, dict]]) -> Table:
    table = Table(title="Training step on CPU, float32 (medians; ratio with its quartiles)")
    for column in ("model", "side"):
        table.add_column(column)
    for column in ("tokens/s", "CPU s/step", "ours / it, tokens/s", "it / ours, CPU", "first loss"):
        table.add_column(column, justify="right")
    for shape, sides in results.items():
        ours = sides[OURS]
        for name, side in sides.items():
            low, middle, high = np.percentile(
                np.divide(ours["tokens_per_s"], side["tokens_per_s"]), (25, 50, 75)
            )
            cpu = np.median(np.divide(side["cpu_s"], ours["cpu_s"]))
            cells = [shape, name, f"{np.median(side['tokens_per_s']):,.0f}",
                     f"{np.median(side['cpu_s']):.3f}",
                     f"{middle:.2f} ({low:.2f}..{high:.2f})", f"{cpu:.2f}",
                     f"{side['losses'][0]:.5f}"]  # fmt: skip
            table.add_row(*cells, end_section=name == SIDES[-1])
    return table


def about_this_machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    packages = ("jax", "jaxlib", "optax", "flax", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    date, cores = datetime.date.today().isoformat(), len(os.sched_getaffinity(0))
    return dict(date=date, cpu=cpu, cores=cores, python=sys.version.split()[0], versions=versions)


def main(argv) -> None:
    del argv
    if FLAGS.side:
        return serve(FLAGS.side, FLAGS.shapes[0], Path(FLAGS.weights))
    if missing := [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]:
        raise UserError(
            f"{missing[0]} is not installed: pip install -e '.[parity]', with a CPU build of torch"
        )
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for shape in dict.fromkeys(FLAGS.shapes):
            results[shape] = measure(shape, FLAGS.rounds, Path(directory, shape))
    Console(width=100).print(table_of(results))
    print("Same computation: losses of the first step within 1e-4, of three steps within 1e-3.")
    if FLAGS.json:
        about = about_this_machine() | dict(rounds=FLAGS.rounds)
        write_json(Path(FLAGS.json), about | dict(results=results))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
