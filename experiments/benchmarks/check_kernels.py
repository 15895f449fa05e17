"""Every kernel as this GPU computes it against float64 on the CPU, on fresh random problems.

    python -m experiments.benchmarks.check_kernels              # prints its seed
    python -m experiments.benchmarks.check_kernels --dtype=bfloat16 --head_dim=128
    python -m experiments.benchmarks.check_kernels --rehearse   # no GPU: the kernels interpreted

Triton's interpreter shows that a kernel's text is right; this shows it of what the compiler made of
it, with the tuned sizes. Values and gradients may be off by twice what the plain implementation is
in the same dtype on the same device (the largest difference, as a share of the largest value).

cuDNN's packed mode is checked in the same way, on documents alone. It is not ours, so that it fails
is told and fails nothing; a model may be offered it only where it is right.
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
from experiments.benchmarks.kernels_attention import cudnn_packed
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.kernels import attention, cross_entropy, pointwise
from llama3_jax.parallel.context import balanced_columns

FACTOR, LEAST = 2.0, 1e-6
OURS, PLAIN, PACKED = "triton", "reference", "cuDNN, packed"

FLAGS = flags.FLAGS


class Problem(NamedTuple):
    """`compute(implementation, *inputs, *data)`, the same in float64 `exact(*inputs, *data)`, with
    gradients of the inputs. `wide` is the input that is float32 to the model in any case."""

    name: str
    dtype: str
    compute: Callable[..., Any]
    exact: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    data: tuple[np.ndarray, ...] = ()
    wide: int | None = None
    implementation: str = OURS


def problems(random: np.random.Generator) -> Iterator[Problem]:
    for dtype in FLAGS.dtype:
        for head_dim in map(int, FLAGS.head_dim):
            # Of one shape, so that a kernel is compiled once for all of a row's masks.
            kv_heads, group = int(random.integers(1, 3)), int(random.integers(1, 9))
            heads = kv_heads * group, kv_heads, head_dim
            for name, documents, context in masks(random):
                yield attention_problem(random, name, dtype, heads, documents, context)
            if dtype == "bfloat16":
                gpu.expect("cuDNN's graphs", 2 * gpu.CUDNN)
                if not gpu.rehearsing():  # a CPU has no cuDNN
                    yield packed_problem(random, heads)
        for share in (0.0, 0.4, 1.0):
            yield loss_problem(random, share, dtype)
        yield from pointwise_problems(random, dtype)


def masks(random: np.random.Generator) -> Iterator[tuple[str, list[int], int]]:
    """Document lengths (negative: padding), and over how many context ranks the row lies."""
    most = 150 if gpu.rehearsing() else 1500
    length = int(random.integers(most // 2, most))
    yield "one document", [length], 1
    yield "documents", gpu.document_lengths(length, most // 8, random), 1
    half = length // 2
    yield "one-token documents and padding", [1] * 9 + [9 - half, length - half], 1
    yield "padding alone", [-length], 1
    yield "a context rank's queries", gpu.document_lengths(length // 8 * 8, most // 4, random), 4


def attention_problem(random, name, dtype, heads, documents, context) -> Problem:
    lengths = np.abs(documents)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)[None]
    marks = [0 if n < 0 else i + 1 for i, n in enumerate(documents)]
    segments = np.repeat(marks, lengths).astype(np.int32)[None]
    rows = balanced_columns(positions.size, context).reshape(context, -1)
    rows = np.asarray(rows[random.integers(context)], np.int32)
    compute = attention_of_rows if context > 1 else attention_of_all
    H, K, D = heads
    draw = lambda n, heads: random.normal(size=(1, n, heads, D))  # noqa: E731
    inputs = draw(len(rows), H), *(draw(positions.size, K) for _ in "kv")
    shape = f"{positions.size} tokens, {H}/{K} heads of {D}"
    return Problem(
        f"attention: {name}, {shape}", dtype, compute, exact_attention, inputs,
        (positions, segments, rows),
    )  # fmt: skip


def _places(positions, segments, rows):
    keys = attention.Places(positions, segments)
    return jax.tree.map(lambda x: x[:, rows], keys), keys


def attention_of_rows(implementation, q, k, v, positions, segments, rows, at: bool = True):
    queries, keys = _places(positions, segments, rows)
    at = rows if at else None
    out = attention.attention(q, k, v, queries, keys, implementation, rows=at)
    # What padding attends to differs.
    return jnp.where(queries.segments[0, :, None, None] > 0, out, 0)


def attention_of_all(*arguments):
    return attention_of_rows(*arguments, at=False)


def exact_attention(q, k, v, positions, segments, rows):
    return float64.attention(q, k, v, *_places(positions, segments, rows))


def packed_problem(random, heads) -> Problem:
    documents = gpu.document_lengths(1024, 200, random)
    found = attention_problem(random, "documents", "bfloat16", heads, documents, 1)
    data = *found.data, np.asarray(documents, np.int32)
    return found._replace(
        compute=packed_or_plain, data=data, implementation=PACKED,
        exact=lambda *arguments: exact_attention(*arguments[:-1]),
    )  # fmt: skip


def packed_or_plain(implementation, *arguments):
    if implementation == PACKED:
        return cudnn_packed(*arguments[:3], arguments[-1])
    return attention_of_all(implementation, *arguments[:-1])


def loss_problem(random, share: float, dtype: str) -> Problem:
    tokens, dim, vocabulary = (70, 40, 300) if gpu.rehearsing() else (700, 520, 5003)
    data = random.integers(0, vocabulary, tokens).astype(np.int32), random.random(tokens) < share
    inputs = random.normal(size=(tokens, dim)), random.normal(size=(dim, vocabulary)) / dim**0.5
    name = f"loss: {share:.0%} of {tokens} tokens count"
    return Problem(name, dtype, loss, float64.linear_cross_entropy, inputs, data, 1)


def loss(implementation, *arguments):
    return cross_entropy.linear_cross_entropy(*arguments, implementation)[0]


def pointwise_problems(random, dtype: str) -> Iterator[Problem]:
    tokens, width = (5, 72) if gpu.rehearsing() else (517, 4096)
    draw = lambda *shape: random.normal(size=shape)  # noqa: E731
    x, update, scale = draw(tokens, width), draw(tokens, width), draw(width)
    angles = draw(1, tokens, 64).astype(np.float32)
    yield Problem(
        "norm after a sum", dtype,
        lambda how, *inputs: pointwise.add_norm(*inputs, 1e-5, how),
        lambda *inputs: float64.add_norm(*inputs, 1e-5), (x, update, scale), wide=2,
    )  # fmt: skip
    yield Problem(
        "norm", dtype,
        lambda how, x, scale: pointwise.add_norm(x, None, scale, 1e-5, how),
        lambda x, scale: float64.add_norm(x, None, scale, 1e-5), (x, scale), wide=1,
    )  # fmt: skip
    yield Problem(
        "RoPE", dtype,
        lambda how, q, k, *tables: pointwise.rotate(q, k, tables, how),
        lambda q, k, *tables: float64.rotate(q, k, tables),
        (draw(1, tokens, 24, 128), draw(1, tokens, 3, 128)), (np.cos(angles), np.sin(angles)),
    )  # fmt: skip
    yield Problem(
        "SwiGLU", dtype, lambda how, *inputs: pointwise.swiglu(*inputs, how),
        float64.swiglu, (x, update),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(function, inputs, data, cotangents):
    out, pullback = jax.vjp(lambda *x: function(*x, *data), *inputs)
    return out, pullback(cotangents)


@functools.cache
def _by(compute: Callable, implementation: str) -> Callable:
    """One object for each pair, so that problems of one shape are compiled once."""
    return functools.partial(compute, implementation)


def results_of(function: Callable, inputs: list, data, rounded_to: str, seed: int) -> list:
    """Values and gradients of a random linear function of them, as float64."""
    random = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(jax.eval_shape(function, *inputs, *data))
    back = [_rounded(random.normal(size=x.shape), rounded_to).astype(x.dtype) for x in leaves]
    results = _with_gradients(function, tuple(inputs), data, jax.tree.unflatten(structure, back))
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(results)]


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """What all start from, exactly."""
    return np.asarray(x).astype(jnp.dtype(dtype)).astype(np.float64)


def errors(problem: Problem, seed: int) -> tuple[float, float]:
    """The largest error of the implementation's values and gradients, and of the plain one's."""
    inputs = [_rounded(x, problem.dtype) for x in problem.inputs]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = results_of(problem.exact, inputs, problem.data, problem.dtype, seed)
    inputs = [
        jnp.asarray(x, jnp.float32 if i == problem.wide else problem.dtype)
        for i, x in enumerate(inputs)
    ]
    data = jax.tree.map(jnp.asarray, problem.data)
    with jax.default_matmul_precision("highest"):
        both = [
            results_of(_by(problem.compute, how), inputs, data, problem.dtype, seed)
            for how in (problem.implementation, PLAIN)
        ]

    def error(results: list[np.ndarray]) -> float:
        pairs = zip(results, exact, strict=True)
        # Not Python's own maximum, which passes over a not-a-number that is not the first.
        return float(np.max([np.abs(x - e).max() / max(np.abs(e).max(), 1e-9) for x, e in pairs]))

    return error(both[0]), error(both[1])


def check(problem: Problem, seed: int) -> dict[str, Any]:
    """What a problem came to, as a row of the results."""
    row = dict(problem=problem.name, dtype=problem.dtype, implementation=problem.implementation)
    try:
        ours, plain = errors(problem, seed)
    except Exception as error:
        if problem.implementation == OURS:
            raise
        return row | dict(right=False, why=f"{type(error).__name__}: {str(error).strip()[:300]}")
    # Of not-a-numbers false.
    return row | dict(error=ours, plain_error=plain, right=ours <= FACTOR * plain + LEAST)


def main(_) -> int:
    seed = FLAGS.seed if FLAGS.seed is not None else int(np.random.SeedSequence().entropy % 10**6)
    table = Table(title=f"Largest error, of the largest value, against float64 (--seed={seed})")
    for column in ("problem", "dtype", "implementation"):
        table.add_column(column)
    for column in ("error", "plain JAX", "right"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    with gpu.machine("make test, which interprets the kernels"):
        for problem in problems(np.random.default_rng(seed)):
            rows.append(row := check(problem, seed))
            table.add_row(
                row["problem"], row["dtype"], row["implementation"],
                *(f"{row[x]:.2g}" if x in row else "-" for x in ("error", "plain_error")),
                "yes" if row["right"] else "NO",
            )  # fmt: skip
            if "why" in row:
                print(f"{row['implementation']} failed: {row['why']}", flush=True)
            gpu.save("check", dict(seed=seed, results=rows))
    Console(width=140).print(table)
    ours = [row for row in rows if row["implementation"] == OURS]
    if wrong := [f"{row['problem']}, {row['dtype']}" for row in ours if not row["right"]]:
        raise UserError(f"{len(wrong)} of {len(ours)} problems: {'; '.join(wrong)}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_integer("seed", None, "Of the problems; by default another each time.")
    dtypes, head_dims = ["bfloat16", "float32"], ["64", "128"]
    flags.DEFINE_multi_enum("dtype", dtypes, dtypes, "Of the inputs.")
    flags.DEFINE_multi_enum("head_dim", head_dims, head_dims, "Of attention.")
    gpu.define_flags()
    cli.run(main)
