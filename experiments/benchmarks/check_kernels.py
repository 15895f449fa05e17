"""Every kernel as this GPU computes it against float64 on the CPU, on fresh random problems.

    python -m experiments.benchmarks.check_kernels              # prints its seed
    python -m experiments.benchmarks.check_kernels --rehearse   # no GPU: the kernels interpreted

Triton's interpreter shows that a kernel's text is right; this shows it of what the compiler made of
it, with the tuned sizes. Values and gradients may be off by twice what the plain implementation is
in the same dtype on the same device (the largest difference, as a share of the largest value).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import float64, gpu
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.kernels import attention, cross_entropy, pointwise
from llama3_jax.parallel.context import balanced_columns

FACTOR, LEAST = 2.0, 1e-6

FLAGS = flags.FLAGS


class Problem(NamedTuple):
    """`compute(implementation, *inputs)` and the same in float64, `exact(*inputs)`."""

    name: str
    dtype: str
    compute: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]


def problems(random: np.random.Generator) -> Iterator[Problem]:
    for dtype in ("bfloat16", "float32"):
        for head_dim in (64, 128):
            for name, documents, context in masks(random):
                yield attention_problem(random, name, dtype, head_dim, documents, context)
        for share in (0.0, 0.4, 1.0):
            yield loss_problem(random, share, dtype)
        yield from pointwise_problems(random, dtype)


def masks(random: np.random.Generator) -> Iterator[tuple[str, list[int], int]]:
    """Document lengths (negative: padding), and over how many context ranks the row lies."""
    most = 150 if gpu.rehearsing() else 1500
    length = int(random.integers(most // 2, most))
    yield "one document", [length], 1
    yield "documents", gpu.document_lengths(length, most // 8, random), 1
    yield "one-token documents and padding", [1] * 9 + [-length, length // 2], 1
    yield "padding alone", [-length], 1
    yield "a context rank's queries", gpu.document_lengths(length // 8 * 8, most // 4, random), 4


def attention_problem(random, name, dtype, head_dim, documents, context) -> Problem:
    kv_heads, group = int(random.integers(1, 3)), int(random.integers(1, 9))
    lengths = np.abs(documents)
    positions = np.concatenate([np.arange(n) for n in lengths])
    marks = [0 if n < 0 else i + 1 for i, n in enumerate(documents)]
    keys = attention.Places(
        jnp.asarray(positions[None], jnp.int32),
        jnp.asarray(np.repeat(marks, lengths)[None], jnp.int32),
    )
    ranks = balanced_columns(len(positions), context).reshape(context, -1)
    rows = ranks[random.integers(context)]
    queries = attention.Places(*(x[:, rows] for x in keys))
    real = queries.segments[0, :, None, None] > 0

    def compute(implementation, q, k, v):
        at = None if context == 1 else jnp.asarray(rows, jnp.int32)
        out = attention.attention(q, k, v, queries, keys, implementation, rows=at)
        return jnp.where(real, out, 0)  # what padding attends to differs

    def exact(q, k, v):
        return float64.attention(q, k, v, queries, keys)

    draw = lambda n, heads: random.normal(size=(1, n, heads, head_dim))  # noqa: E731
    inputs = draw(len(rows), kv_heads * group), *(draw(len(positions), kv_heads) for _ in "kv")
    shape = f"{len(positions)} tokens, {kv_heads * group}/{kv_heads} heads of {head_dim}"
    return Problem(f"attention: {name}, {shape}", dtype, compute, exact, inputs)


def loss_problem(random, share: float, dtype: str) -> Problem:
    tokens, dim, vocabulary = (70, 40, 300) if gpu.rehearsing() else (700, 520, 5003)
    targets = jnp.asarray(random.integers(0, vocabulary, tokens), jnp.int32)
    mask = jnp.asarray(random.random(tokens) < share)

    def compute(implementation, hidden, head):
        args = hidden, head, targets, mask, implementation
        return cross_entropy.linear_cross_entropy(*args)[0]

    def exact(hidden, head):
        return float64.linear_cross_entropy(hidden, head, targets, mask)

    inputs = random.normal(size=(tokens, dim)), random.normal(size=(dim, vocabulary)) / dim**0.5
    return Problem(f"loss: {share:.0%} of {tokens} tokens count", dtype, compute, exact, inputs)


def pointwise_problems(random, dtype: str) -> Iterator[Problem]:
    tokens, width = (5, 72) if gpu.rehearsing() else (517, 4096)
    draw = lambda *shape: random.normal(size=shape)  # noqa: E731
    x, update, scale = draw(tokens, width), draw(tokens, width), draw(width)
    angles = jnp.asarray(draw(1, tokens, 64), jnp.float32)
    tables = jnp.cos(angles), jnp.sin(angles)
    yield Problem(
        "norm after a sum", dtype,
        lambda how, *inputs: pointwise.add_norm(*inputs, 1e-5, how),
        lambda *inputs: float64.add_norm(*inputs, 1e-5), (x, update, scale),
    )  # fmt: skip
    yield Problem(
        "norm", dtype,
        lambda how, x, scale: pointwise.add_norm(x, None, scale, 1e-5, how),
        lambda x, scale: float64.add_norm(x, None, scale, 1e-5), (x, scale),
    )  # fmt: skip
    yield Problem(
        "RoPE", dtype,
        lambda how, q, k: pointwise.rotate(q, k, tables, how),
        lambda q, k: float64.rotate(q, k, tables),
        (draw(1, tokens, 24, 128), draw(1, tokens, 3, 128)),
    )  # fmt: skip
    yield Problem(
        "SwiGLU", dtype, lambda how, *inputs: pointwise.swiglu(*inputs, how),
        float64.swiglu, (x, update),
    )  # fmt: skip


def results_of(function: Callable, inputs: list, rounded_to: str, seed: int) -> list[np.ndarray]:
    """Values and gradients of a random linear function of them, as float64."""

    def both(*inputs):
        out, pullback = jax.vjp(function, *inputs)
        random, (leaves, structure) = np.random.default_rng(seed), jax.tree.flatten(out)
        back = [_rounded(random.normal(size=x.shape), rounded_to).astype(x.dtype) for x in leaves]
        return out, pullback(jax.tree.unflatten(structure, back))

    return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.jit(both)(*inputs))]


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """What all start from, exactly."""
    return np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float64)


def errors(problem: Problem, seed: int) -> tuple[float, float]:
    """The largest error of the kernel's values and gradients, and of the plain implementation's."""
    inputs = [_rounded(x, problem.dtype) for x in problem.inputs]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = results_of(problem.exact, inputs, problem.dtype, seed)
    # The head and the norm's scale are float32 to the model in any case.
    wide = {"loss": 1, "norm": len(inputs) - 1}.get(problem.name.split()[0].rstrip(":"))
    inputs = [
        jnp.asarray(x, jnp.float32 if i == wide else problem.dtype) for i, x in enumerate(inputs)
    ]
    with jax.default_matmul_precision("highest"):
        both = [
            results_of(functools.partial(problem.compute, how), inputs, problem.dtype, seed)
            for how in ("triton", "reference")
        ]

    def error(results: list[np.ndarray]) -> float:
        pairs = zip(results, exact, strict=True)
        # Not Python's own maximum, which passes over a not-a-number that is not the first.
        return float(np.max([np.abs(x - e).max() / max(np.abs(e).max(), 1e-9) for x, e in pairs]))

    return error(both[0]), error(both[1])


def main(_) -> int:
    seed = FLAGS.seed if FLAGS.seed is not None else int(np.random.SeedSequence().entropy % 10**6)
    table = Table(title=f"Largest error, of the largest value, against float64 (--seed={seed})")
    for column in ("problem", "dtype"):
        table.add_column(column)
    for column in ("kernel", "plain JAX", "right"):
        table.add_column(column, justify="right", no_wrap=True)
    wrong = []
    with gpu.machine("make test, which interprets the kernels"):
        for problem in problems(np.random.default_rng(seed)):
            ours, plain = errors(problem, seed)
            right = ours <= FACTOR * plain + LEAST  # of not-a-numbers false
            wrong += [] if right else [f"{problem.name}, {problem.dtype}"]
            table.add_row(
                problem.name, problem.dtype, f"{ours:.2g}", f"{plain:.2g}", "yes" if right else "NO"
            )
    Console(width=120).print(table)
    if wrong:
        raise UserError(f"{len(wrong)} of {table.row_count} problems: {'; '.join(wrong)}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_integer("seed", None, "Of the problems; by default another each time.")
    gpu.define_flags(results=False)
    cli.run(main)
