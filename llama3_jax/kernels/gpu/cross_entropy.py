"""A chunk's logits in Triton: each tile of the head's product leaves the chip as exponentials,
maxima, sums and target logits. The rest stands in kernels/cross_entropy.py.

The two products of the gradient are left to XLA's library calls. What the kernel saves is passes
over float32 logits: exponentials against the tile's own maximum are written once, in the
activations' dtype, with the softmax's sums done on the way.

Shapes: C tokens, M model dim, V vocabulary entries; a tile is R tokens by `width` entries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from llama3_jax.kernels.cross_entropy import Tiles, Vocabulary, Whole, in_chunks
from llama3_jax.kernels.gpu.call import triton_call
from llama3_jax.kernels.gpu.tuning import Blocks, blocks_for

# Rows of tiles that go over the vocabulary together, so that the head's columns stay in the cache.
_GROUP = 8
# Entries of a program that turns exponentials into gradients, bound by memory.
_COLUMNS = 4096


def linear_cross_entropy(
    hidden_NM,
    head_MV,
    targets_N,
    mask_N,
    vocabulary: Vocabulary = Whole(),  # noqa: B008
    how: "InTiles | None" = None,
):
    """Arguments, flattened, and result as for `kernels.cross_entropy.reference`; `how` replaces the
    tuned sizes."""
    how = how or InTiles(blocks_for("cross_entropy", hidden_NM.dtype.name))
    return in_chunks(how, hidden_NM, head_MV, targets_N, mask_N, vocabulary)


@triton.jit
def _tile_kernel(
    x_ptr, head_ptr, own_ptr, live_ptr, exponentials_ptr, largest_ptr, total_ptr, target_ptr,
    C: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Down a group of tiles' rows, then to the next columns.
    number = tl.program_id(0)
    tiles_down, tiles_across = tl.cdiv(C, M), tl.cdiv(V, N)
    group = number // (GROUP * tiles_across)
    down = tl.minimum(tiles_down - group * GROUP, GROUP)
    inner = number % (GROUP * tiles_across)
    tile_row, tile_column = group * GROUP + inner % down, inner // down
    if tile_row * M < tl.load(live_ptr):
        rows = tile_row * M + tl.arange(0, M)
        columns = tile_column * N + tl.arange(0, N)
        depth = tl.arange(0, DEPTH)
        logits = tl.zeros([M, N], tl.float32)
        x_at = x_ptr + rows.to(tl.int64)[:, None] * DIM + depth[None, :]
        head_at = head_ptr + depth[:, None] * V + columns[None, :]
        for at in tl.range(0, DIM, DEPTH):
            inside = at + depth < DIM
            x = tl.load(x_at, mask=(rows[:, None] < C) & inside[None, :], other=0.0)
            head = tl.load(head_at, mask=inside[:, None] & (columns[None, :] < V), other=0.0)
            logits = tl.dot(x, head, logits, input_precision=PRECISION)
            x_at += DEPTH
            head_at += DEPTH * V
        own = tl.load(own_ptr + rows, mask=rows < C, other=-1)
        # Before the columns beyond V are masked: another rank's target may seem to be there.
        target = tl.sum(tl.where(columns[None, :] == own[:, None], logits, 0.0), 1)
        logits = tl.where(columns[None, :] < V, logits, -1e30)
        largest = tl.max(logits, 1)
        exponentials = tl.exp(logits - largest[:, None])
        at = rows * tiles_across + tile_column
        tl.store(largest_ptr + at, largest, mask=rows < C)
        tl.store(total_ptr + at, tl.sum(exponentials, 1), mask=rows < C)
        tl.store(target_ptr + at, target, mask=rows < C)
        if KEEP:
            tl.store(
                exponentials_ptr + rows.to(tl.int64)[:, None] * V + columns[None, :],
                exponentials.to(exponentials_ptr.dtype.element_ty),
                mask=(rows[:, None] < C) & (columns[None, :] < V),
            )  # fmt: skip


@triton.jit
def _dlogits_kernel(
    exponentials_ptr, scale_ptr, own_ptr, live_ptr, same_ptr,
    V: tl.constexpr, W: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts = row < tl.load(live_ptr)
    at = row.to(tl.int64) * V + columns
    inside = columns < V
    exponentials = tl.load(exponentials_ptr + at, mask=inside & counts, other=0.0)
    scale = tl.load(scale_ptr + row * W + columns // N, mask=inside & counts, other=0.0)
    target = counts & (columns == tl.load(own_ptr + row))
    dlogits = exponentials.to(tl.float32) * scale - tl.where(target, 1.0, 0.0)
    # In place: the result's own parameter is not for use (see call.py).
    tl.store(exponentials_ptr + at, dlogits.to(exponentials_ptr.dtype.element_ty), mask=inside)


class InTiles(NamedTuple):
    """The kernel's sizes: tiles of blocks.M tokens by blocks.N entries, `depth` of the model dim at
    a time, `rows` tokens of a chunk."""

    blocks: Blocks
    depth: int = 64
    rows: int | None = None

    def tiles(self, x_CM, head_MV, own_C, live, with_exponentials: bool) -> Tiles:
        (C, M), V = x_CM.shape, head_MV.shape[1]
        W = triton.cdiv(V, self.blocks.N)
        kept = (C, V) if with_exponentials else (1, 1)
        shape = jax.ShapeDtypeStruct
        exponentials, largest, total, target = triton_call(
            _tile_kernel,
            [x_CM, head_MV, own_C, live.astype(jnp.int32).reshape(1)],
            [shape(kept, x_CM.dtype), *(shape((C, W), jnp.float32) for _ in range(3))],
            grid=(triton.cdiv(C, self.blocks.M) * W,),
            **self.blocks._asdict(),
            C=C, V=V, DIM=M, DEPTH=self.depth, GROUP=_GROUP, KEEP=with_exponentials,
            PRECISION="ieee" if x_CM.dtype == jnp.float32 else "tf32",
        )  # fmt: skip
        return Tiles(exponentials if with_exponentials else None, largest, total, target.sum(-1))

    def dlogits(self, exponentials_CV, scale_CW, own_C, live):
        """In the exponentials' place: a second array of a chunk's size would double the memory."""
        (C, V), W = exponentials_CV.shape, scale_CW.shape[1]
        (dlogits_CV,) = triton_call(
            _dlogits_kernel,
            [exponentials_CV, scale_CW, own_C, live.astype(jnp.int32).reshape(1)],
            [jax.ShapeDtypeStruct((C, V), exponentials_CV.dtype)],
            grid=(C, triton.cdiv(V, _COLUMNS)),
            num_warps=8,
            num_stages=1,
            in_place={0: 0},
            V=V, W=W, N=self.blocks.N, BLOCK=_COLUMNS,
        )  # fmt: skip
        return dlogits_CV
