"""Every kernel in every row of the tuning table, at the shapes of the 8B model's step."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama3_jax.kernels.attention import Spans
from llama3_jax.kernels.gpu import cross_entropy, flash_attention
from llama3_jax.kernels.gpu.call import Launch
from llama3_jax.kernels.gpu.compile import launches_of
from llama3_jax.kernels.gpu.tuning import Blocks, table

TOKENS, DIM, VOCABULARY, HEADS, KV_HEADS = 8192, 4096, 128_256, 32, 8


class Entry(NamedTuple):
    """A row of the tuning table, and what a step with it launches: the kernel's variants."""

    kernel: str
    row: str
    blocks: Blocks
    launches: tuple[Launch, ...]


def entries() -> Iterator[Entry]:
    for kernel, rows in table()["kernels"].items():
        for row, sizes in rows.items():
            yield entry(kernel, row, Blocks(**sizes))


def entry(kernel: str, row: str, blocks: Blocks) -> Entry:
    """As the table's row, but with these sizes."""
    return Entry(kernel, row, blocks, tuple(dict.fromkeys(_LAUNCHES[kernel](row, blocks))))


def _shape(*dims: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def _flash(name: str, row: str, blocks: Blocks) -> list[Launch]:
    head_dim, dtype = row.split()
    tuning = flash_attention.tuning_for(int(head_dim), jnp.dtype(dtype))

    def run(q, k, v, first, last):
        changed = tuning._replace(**{name: blocks})
        return flash_attention.flash_attention(q, k, v, Spans(first, last), changed)[0].sum()

    q = _shape(1, TOKENS, HEADS, int(head_dim), dtype=dtype)
    k = _shape(1, TOKENS, KV_HEADS, int(head_dim), dtype=dtype)
    indices = _shape(1, TOKENS, dtype=jnp.int32)
    launches = launches_of(jax.grad(run, argnums=(0, 1, 2)), q, k, k, indices, indices)
    return [x for x in launches if x.kernel.__name__ == f"_{name}_kernel"]


def _cross_entropy(row: str, blocks: Blocks) -> list[Launch]:
    how = cross_entropy.InTiles(blocks)

    def run(*arrays):
        return cross_entropy.linear_cross_entropy(*arrays, how=how)[0]

    shapes = [
        _shape(TOKENS, DIM, dtype=row), _shape(DIM, VOCABULARY, dtype=jnp.float32),
        _shape(TOKENS, dtype=jnp.int32), _shape(TOKENS, dtype=jnp.bool_),
    ]  # fmt: skip
    return [*launches_of(run, *shapes), *launches_of(jax.grad(run, argnums=(0, 1)), *shapes)]


_LAUNCHES: dict[str, Callable[[str, Blocks], list[Launch]]] = {
    **{f"flash_{name}": functools.partial(_flash, name) for name in ("forward", "keys", "queries")},
    "cross_entropy": _cross_entropy,
}
