"""Every kernel at the shapes of the 8B model's step: in every row of the tuning table, and those
whose sizes follow from the shapes also at the widths of the 70B and 405B models."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama3_jax.kernels.attention import Spans
from llama3_jax.kernels.gpu import cross_entropy, flash_attention, flash_kernels, pointwise
from llama3_jax.kernels.gpu.call import Launch
from llama3_jax.kernels.gpu.compile import launches_of
from llama3_jax.kernels.gpu.tuning import Blocks, table

WIDTHS = (4096, 8192, 16_384)


class Sizes(NamedTuple):
    """One row of the 8B model's pre-training."""

    tokens: int = 8192
    dim: int = 4096
    vocabulary: int = 128_256
    heads: int = 32
    kv_heads: int = 8


MODEL = Sizes()


class Problem(NamedTuple):
    """A function that launches a kernel with the sizes of one row of its table, and its arguments'
    shapes."""

    function: Callable
    shapes: tuple[jax.ShapeDtypeStruct, ...]


class Entry(NamedTuple):
    """What a step launches of a kernel, all its variants, with the sizes of one row of its table
    (None: it has no table)."""

    kernel: str
    row: str
    blocks: Blocks | None
    launches: tuple[Launch, ...]


def entries() -> Iterator[Entry]:
    for kernel, rows in table()["kernels"].items():
        for row, sizes in rows.items():
            yield entry(kernel, row, Blocks(**sizes))
    for row, sizes in table()["kernels"]["cross_entropy"].items():
        launches = _launches("dlogits", _cross_entropy(row, Blocks(**sizes)))
        yield Entry("dlogits", row, None, launches)
    for width in WIDTHS:
        yield _pointwise(width)


def entry(kernel: str, row: str, blocks: Blocks) -> Entry:
    """As the table's row, but with these sizes."""
    return Entry(kernel, row, blocks, _launches(kernel, PROBLEMS[kernel](row, blocks)))


def _launches(kernel: str, problem: Problem) -> tuple[Launch, ...]:
    launches = launches_of(problem.function, *problem.shapes)
    return tuple(dict.fromkeys(x for x in launches if x.kernel is _KERNELS[kernel]))


def _shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def _flash(name: str, row: str, blocks: Blocks, sizes: Sizes = MODEL) -> Problem:
    """Forward and backward of (q, k, v, first, last), one kernel's sizes replaced."""
    head_dim, dtype = row.split()
    tuning = flash_attention.tuning_for(int(head_dim), jnp.dtype(dtype))
    tuning = tuning._replace(**{name: blocks})

    def run(q, k, v, first, last):
        return flash_attention.flash_attention(q, k, v, Spans(first, last), tuning)[0]

    def total(*arrays):
        return run(*arrays).astype(jnp.float32).sum()

    q = _shape(1, sizes.tokens, sizes.heads, int(head_dim), dtype=dtype)
    k = _shape(1, sizes.tokens, sizes.kv_heads, int(head_dim), dtype=dtype)
    indices = _shape(1, sizes.tokens, dtype=jnp.int32)
    function = run if name == "forward" else jax.grad(total, argnums=(0, 1, 2))
    return Problem(function, (q, k, k, indices, indices))


def _cross_entropy(row: str, blocks: Blocks, sizes: Sizes = MODEL) -> Problem:
    """Losses of (hidden, head, targets, mask), without and with gradients."""
    how = cross_entropy.InTiles(blocks)

    def run(*arrays):
        return cross_entropy.linear_cross_entropy(*arrays, how=how)[0]

    def both(*arrays):
        return run(*arrays), jax.grad(run, argnums=(0, 1))(*arrays)

    shapes = (
        _shape(sizes.tokens, sizes.dim, dtype=row),
        _shape(sizes.dim, sizes.vocabulary, dtype=jnp.float32),
        _shape(sizes.tokens, dtype=jnp.int32), _shape(sizes.tokens, dtype=jnp.bool_),
    )  # fmt: skip
    return Problem(both, shapes)


def _pointwise(width: int) -> Entry:
    def run(x, update, scale, q, k, cos, sin, gate, up):
        total, normed = pointwise.add_norm(x, update, scale, 1e-5)
        alone = pointwise.add_norm(x, None, scale, 1e-5)
        turned = pointwise.rotate(q, k, (cos, sin))
        results = (total, normed, *alone, *turned, pointwise.swiglu(gate, up))
        return sum(x.astype(jnp.float32).sum() for x in results)

    tokens = MODEL.tokens
    x, scale = _shape(tokens, width), _shape(width, dtype=jnp.float32)
    q, k = (_shape(1, tokens, heads, 128) for heads in (width // 128, MODEL.kv_heads))
    table, inner = _shape(1, tokens, 64, dtype=jnp.float32), _shape(tokens, 3 * width)
    gradient = jax.grad(run, argnums=(0, 1, 2, 3, 4, 7, 8))
    launches = launches_of(gradient, x, x, scale, q, k, table, table, inner, inner)
    return Entry("pointwise", f"{width} bfloat16", None, tuple(dict.fromkeys(launches)))


_KERNELS = {
    "flash_forward": flash_kernels.forward_kernel,
    "flash_keys": flash_kernels.keys_kernel,
    "flash_queries": flash_kernels.queries_kernel,
    "cross_entropy": cross_entropy._tile_kernel,
    "dlogits": cross_entropy._dlogits_kernel,
}
PROBLEMS: dict[str, Callable[..., Problem]] = {
    **{f"flash_{name}": functools.partial(_flash, name) for name in ("forward", "keys", "queries")},
    "cross_entropy": _cross_entropy,
}
