"""Each kernel against XLA, cuDNN through JAX, and torch, on one NVIDIA GPU.

    python -m experiments.benchmarks.kernels                  # everything; about ten minutes
    python -m experiments.benchmarks.kernels --only=attention --lengths=8192
    python -m experiments.benchmarks.kernels --compile_only   # no GPU: registers, spills, shared memory

Attention runs at the head shapes of the 8B model, forward and forward with backward, on rows of one
document and of documents of 1.5K tokens on average. Its TFLOP/s count what the mask lets through and
nothing else (4 x head dim x heads a pair forward, 2.5 times that backward). A contender that ignores
documents computes more than asked for and is marked "causal only"; one that packs documents as rows
of the longest one's length is marked "lengths". The loss runs at the head of the 8B model; its
TFLOP/s count three products over the positions of the mask.

Contenders run in turn in each round, so a ratio holds where a time may not. Before anything is timed
the results are compared with the chunked implementation. Shares are of what this chip was measured
to do (a product of 8192^3, a copy).
"""

import functools
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import gpu
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.kernels.attention import Places, attention
from llama3_jax.kernels.cross_entropy import linear_cross_entropy

LENGTHS = (2048, 8192, 32_768, 131_072)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MEAN_DOCUMENT = 1536
TOKENS, DIM, VOCABULARY = 8192, 4096, 128_256
FORWARD, BOTH = "forward", "forward + backward"
# Beyond these lengths a contender's scores or mask do not fit, or take minutes.
_LONGEST = {"XLA": 8192, "chunked": 32_768, "cuDNN, dense mask": 8192}

FLAGS = flags.FLAGS


class AttentionCase(NamedTuple):
    length: int
    documents: tuple[int, ...]

    @property
    def name(self) -> str:
        mix = "1 document" if len(self.documents) == 1 else f"{len(self.documents)} documents"
        return f"{self.length:,} tokens, {mix}"

    def flops(self, what: str) -> float:
        forward = 4.0 * HEAD_DIM * HEADS * gpu.pairs_of(list(self.documents))
        return forward * (3.5 if what == BOTH else 1)

    def places(self) -> Places:
        positions = np.concatenate([np.arange(n) for n in self.documents])
        segments = np.repeat(np.arange(len(self.documents)) + 1, self.documents)
        return Places(
            jnp.asarray(positions[None], jnp.int32), jnp.asarray(segments[None], jnp.int32)
        )


def attention_cases(lengths: list[int]) -> list[AttentionCase]:
    cases = []
    for length in lengths:
        random = np.random.default_rng(length)
        mixed = gpu.document_lengths(length, MEAN_DOCUMENT, random)
        cases += [AttentionCase(length, (length,)), AttentionCase(length, tuple(mixed))]
    return cases


def attention_contenders(case: AttentionCase, what: str) -> list[gpu.Contender]:
    """Ours first; the others where they can run."""
    places = case.places()
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, case.length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, g = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )

    def contender(name: str, compute, arrays=(q, k, v, g)) -> gpu.Contender:
        def run(q, k, v, g):
            if what == FORWARD:
                return compute(q, k, v)
            out, pullback = jax.vjp(compute, q, k, v)
            return out, pullback(g)

        return gpu.Contender(name, functools.partial(jax.jit(run), *arrays))

    def masked(implementation: str):
        return lambda q, k, v: attention(q, k, v, places, places, implementation)

    causal = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    several = len(case.documents) > 1
    all_ = [
        contender("ours", masked("triton")),
        contender("XLA", masked("reference")),
        contender("chunked", masked("chunked")),
        contender("cuDNN, causal only" if several else "cuDNN", causal),
        contender("cuDNN, dense mask", masked("cudnn")),
    ]
    if several:
        rows = [_as_rows(x, case.documents) for x in (q, k, v, g)]
        lengths = jnp.asarray(case.documents, jnp.int32)
        by_length = functools.partial(
            causal, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        )
        all_.append(contender("cuDNN, lengths", by_length, rows))
    all_ = [c for c in all_ if case.length <= _LONGEST.get(c.name, case.length)]
    return all_ + (_torch_attention(case, what) if gpu.has_torch() else [])


def _as_rows(x, documents):
    """[documents, longest, heads, head dim], padded."""
    longest, ends = max(documents), np.cumsum(documents)
    parts = [x[0, end - n : end] for n, end in zip(documents, ends, strict=True)]
    return jnp.stack([jnp.pad(p, ((0, longest - len(p)), (0, 0), (0, 0))) for p in parts])


def _torch_attention(case: AttentionCase, what: str) -> list[gpu.Contender]:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    def tensor(heads: int):
        shape = (1, heads, case.length, HEAD_DIM)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=what == BOTH)

    q, k, v, g = tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS), tensor(HEADS).detach()

    def contender(name: str, compute) -> gpu.Contender:
        def start():
            if what == FORWARD:
                with torch.no_grad():
                    return compute(q, k, v)
            return torch.autograd.grad(compute(q, k, v), (q, k, v), g)

        return gpu.torch_contender(name, start)

    documents = torch.from_numpy(np.asarray(case.places().segments[0])).cuda()

    def same_document(b, h, query, key):
        return (query >= key) & (documents[query] == documents[key])

    mask = create_block_mask(same_document, None, None, case.length, case.length, device="cuda")
    flex = functools.partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)
    sdpa = functools.partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    several = len(case.documents) > 1
    return [
        contender("torch SDPA, causal only" if several else "torch SDPA", sdpa),
        contender("torch FlexAttention", flex),
    ]


# -------------------------------------------------------------------------------------------- loss


class LossCase(NamedTuple):
    """`share` of the positions count."""

    share: float

    @property
    def name(self) -> str:
        return f"{TOKENS:,} tokens x {VOCABULARY:,}, {self.share:.0%} count"

    def mask(self) -> np.ndarray:
        return np.random.default_rng(0).random(TOKENS) < self.share

    def flops(self, what: str) -> float:
        products = 3 if what == BOTH else 1
        return 2.0 * products * float(self.mask().sum()) * DIM * VOCABULARY


LOSS_CASES = (LossCase(1.0), LossCase(0.5))


def loss_contenders(case: LossCase, what: str) -> tuple[list[gpu.Contender], dict[str, float]]:
    """The contenders, and the bytes that each needs beside inputs and results."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, DIM), jnp.bfloat16)
    head = jax.random.normal(keys[1], (DIM, VOCABULARY), jnp.float32) * DIM**-0.5
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCABULARY)
    mask = jnp.asarray(case.mask())
    contenders, memory = [], {}
    for name, implementation in (("ours", "triton"), ("chunked", "chunked"), ("XLA", "reference")):

        def loss(hidden, head, targets, mask, implementation=implementation):
            return linear_cross_entropy(hidden, head, targets, mask, implementation)[0]

        run = jax.jit(loss if what == FORWARD else jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = run.lower(hidden, head, targets, mask).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        start = functools.partial(compiled, hidden, head, targets, mask)
        contenders.append(gpu.Contender(name, start))
    if gpu.has_torch():
        _torch_loss(case, what, contenders, memory)
    return contenders, memory


def _torch_loss(case: LossCase, what: str, contenders: list, memory: dict) -> None:
    import torch

    options = dict(device="cuda", dtype=torch.bfloat16, requires_grad=what == BOTH)
    hidden, head = torch.randn(TOKENS, DIM, **options), torch.randn(VOCABULARY, DIM, **options)
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    targets = torch.where(torch.from_numpy(case.mask()).cuda(), targets, -100)

    def loss(hidden, head):
        logits = torch.nn.functional.linear(hidden, head).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    for name, compute in (("torch", loss), ("torch compiled", torch.compile(loss))):

        def start(compute=compute):
            if what == FORWARD:
                with torch.no_grad():
                    return compute(hidden, head)
            return torch.autograd.grad(compute(hidden, head), (hidden, head))

        start()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = start()
        kept = torch.cuda.memory_allocated() - before
        memory[name] = torch.cuda.max_memory_allocated() - before - kept
        del results
        contenders.append(gpu.torch_contender(name, start))


# ------------------------------------------------------------------------------------------- tables


def check(case: Any, contenders: list[gpu.Contender]) -> None:
    """Ours against the chunked implementation, both on the device, in bfloat16.

    Raises:
      UserError: they differ by more than rounding.
    """
    by_name = {contender.name: contender for contender in contenders}
    if "chunked" not in by_name:
        return
    results = [jax.tree.leaves(by_name[name].start()) for name in ("ours", "chunked")]
    for ours, other in zip(*results, strict=True):
        ours, other = (np.asarray(x, np.float32) for x in (ours, other))
        error = np.abs(ours - other).max() / max(np.abs(other).max(), 1e-9)
        if not error < 0.03:
            raise UserError(f"{case.name}: ours is off by {error:.3g} of the largest value")


def rows_of(
    case: Any, what: str, taken: dict[str, list[float]], ceiling: dict[str, float], memory=None
) -> list[dict[str, Any]]:
    """A row for each contender: TFLOP/s, share of the ceiling, and ours over it by round."""
    rows = []
    for name, times in taken.items():
        tflops = case.flops(what) / float(np.median(times)) / 1e12
        ratios = np.divide(times, taken["ours"])
        rows.append(
            dict(
                case=case.name, what=what, contender=name, milliseconds=1e3 * float(np.median(times)),
                tflops=tflops, share_of_product=tflops / ceiling["tflops"],
                ours_over_it=float(np.median(ratios)),
                quartiles=[float(x) for x in np.percentile(ratios, (25, 75))],
                temporary_bytes=None if memory is None else int(memory[name]),
            )
        )  # fmt: skip
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['case']}, {rows[0]['what']}")
    table.add_column("contender")
    for column in ("ms", "TFLOP/s", "of a product", "speed, ours over it", "memory, MB"):
        table.add_column(column, justify="right")
    for row in rows:
        low, high = row["quartiles"]
        memory = row["temporary_bytes"]
        table.add_row(
            row["contender"], f"{row['milliseconds']:.3f}", f"{row['tflops']:.0f}",
            f"{row['share_of_product']:.0%}", f"{row['ours_over_it']:.2f} ({low:.2f}..{high:.2f})",
            "" if memory is None else f"{memory / 1e6:,.0f}",
        )  # fmt: skip
    return table


def resources_table(kernels: list[str] | None) -> tuple[Table, bool]:
    """Every row of the tuning table compiled for sm_90, and whether all fit the chip."""
    from llama3_jax.kernels.gpu import tuning
    from llama3_jax.kernels.gpu.catalogue import entries
    from llama3_jax.kernels.gpu.compile import SHARED_BYTES, compile_for_hopper

    measured = tuning.table()["measured"]
    state = f"sizes measured on {measured}" if measured else "sizes not yet measured"
    table = Table(title=f"Compiled for sm_90 ({state}); a block may have {SHARED_BYTES:,} B shared")
    for column in ("kernel", "row"):
        table.add_column(column)
    for column in ("M x N", "warps", "stages", "registers", "spilled B", "shared B", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    all_fit = True
    for entry in entries():
        if kernels and entry.kernel not in kernels:
            continue
        for launch in entry.launches:
            taken = compile_for_hopper(launch)
            all_fit &= taken.fits
            name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            size = f"{entry.blocks.M} x {entry.blocks.N}" if entry.blocks else "-"
            table.add_row(
                f"{entry.kernel}: {name}", entry.row, size,
                str(launch.num_warps), str(launch.num_stages), str(taken.registers),
                str(taken.spilled_bytes), f"{taken.shared_bytes:,}", "yes" if taken.fits else "NO",
            )  # fmt: skip
    return table, all_fit


def define_flags() -> None:
    flags.DEFINE_bool("compile_only", False, "Compile for sm_90 and print what each kernel takes.")
    flags.DEFINE_multi_enum("only", ["attention", "loss"], ["attention", "loss"], "What to time.")
    flags.DEFINE_multi_string("kernel", None, "With --compile_only: these kernels alone.")
    flags.DEFINE_multi_integer("lengths", list(LENGTHS), "Tokens of a row.", lower_bound=128)
    flags.DEFINE_integer("rounds", 7, "Measured rounds.", lower_bound=2)


def main(_) -> int:
    console = Console(width=120)
    if FLAGS.compile_only:
        table, all_fit = resources_table(FLAGS.kernel)
        console.print(table)
        return 0 if all_fit else 1
    gpu.require_gpu("--compile_only works here")
    ceiling = gpu.ceilings()
    console.print(
        f"{jax.devices()[0].device_kind}: {ceiling['tflops']:.0f} TFLOP/s in a product, "
        f"{ceiling['gb_per_s']:.0f} GB/s in a copy"
    )
    results: list[dict[str, Any]] = []

    def measure(case, what, contenders, memory=None):
        check(case, contenders)
        taken = gpu.seconds(contenders, FLAGS.rounds)
        rows = rows_of(case, what, taken, ceiling, memory)
        console.print(table_of(rows))
        results.extend(rows)
        # After each case, so that a failure loses nothing.
        gpu.save("kernels", dict(ceilings=ceiling, rounds=FLAGS.rounds, results=results))

    for what in (FORWARD, BOTH):
        for case in attention_cases(FLAGS.lengths) if "attention" in FLAGS.only else ():
            measure(case, what, attention_contenders(case, what))
        for case in LOSS_CASES if "loss" in FLAGS.only else ():
            measure(case, what, *loss_contenders(case, what))
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
