"""The head's product and the cross-entropy of next tokens, as one operation.

"reference" is the definition: all logits, then the loss of each (`token_losses`). "chunked" and
"triton" hold the logits of some tokens at a time. For each chunk they compute logits, losses and,
when differentiated, at once both gradients: the result is one sum, whose cotangent is one number
that scales them afterwards, so no logits are kept or computed again. Positions outside of the mask
are sorted behind the others and cost nothing.

The vocabulary may be split over ranks, which then exchange one maximum, one sum and one target
logit a token, never logits (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Shapes: N tokens, C tokens of a chunk, M model dim, V vocabulary entries of this rank, W tiles of the
vocabulary.
"""

import functools
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama3_jax.kernels.dispatch import resolve
from llama3_jax.kernels.linear import linear

Implementation = Literal["reference", "chunked", "triton"]

# A chunk's logits, as they are kept, take at most this much memory.
CHUNK_BYTES = 2**28
_CHUNK_ROWS = 128


class Vocabulary(Protocol):
    """How the ranks that share a vocabulary combine what each has of it; hashable."""

    def vocabulary_offset(self, local_size: int) -> Int[Array, ""] | int: ...
    def vocabulary_sum(self, x: Array) -> Array: ...
    def vocabulary_max(self, x: Array) -> Array: ...


class Whole(NamedTuple):
    """A vocabulary that is not split."""

    def vocabulary_offset(self, local_size: int) -> int:
        return 0

    def vocabulary_sum(self, x: Array) -> Array:
        return x

    vocabulary_max = vocabulary_sum


def linear_cross_entropy(
    hidden: Float[Array, "*positions M"],
    head: Float[Array, "M V"],
    targets: Int[Array, "*positions"],
    mask: Bool[Array, "*positions"],
    implementation: Implementation = "reference",
    vocabulary: Vocabulary = Whole(),  # noqa: B008
) -> tuple[Float[Array, ""], Float[Array, "*positions"]]:
    """Sum over the mask of -log p(target) in nats, and each position's part of it.

    Logits are products in `hidden.dtype`, accumulated and kept in float32. Only the sum has a
    gradient; that of `hidden` is this rank's part where the vocabulary is split.

    Raises:
      UserError: the implementation is unknown or not installed.
    """
    compute = resolve("loss", implementation)
    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), mask.reshape(-1)
    total, losses = compute(flat[0], head, *flat[1:], vocabulary)
    return total, jax.lax.stop_gradient(losses).reshape(targets.shape)


def reference(hidden_NM, head_MV, targets_N, mask_N, vocabulary: Vocabulary = Whole()):  # noqa: B008
    """The definition. Arguments, flattened, and result as for `linear_cross_entropy`."""
    losses = token_losses(linear(hidden_NM, head_MV, jnp.float32), targets_N, vocabulary)
    losses = losses * mask_N.astype(jnp.float32)
    return jnp.sum(losses), losses


def chunked(hidden_NM, head_MV, targets_N, mask_N, vocabulary: Vocabulary = Whole()):  # noqa: B008
    """A chunk of tokens at a time. Arguments, flattened, and result as for the reference."""
    return in_chunks(Plain(), hidden_NM, head_MV, targets_N, mask_N, vocabulary)


def linear_scores(
    hidden: Float[Array, "*positions M"],
    head: Float[Array, "M V"],
    targets: Int[Array, "*positions"],
    mask: Bool[Array, "*positions"],
    vocabulary: Vocabulary = Whole(),  # noqa: B008
) -> tuple[Float[Array, "*positions"], Bool[Array, "*positions"]]:
    """-log p(target) in nats, and whether the target is the likeliest token (of equals the first).

    Logits as in `linear_cross_entropy`, a chunk of tokens at a time; 0 and False outside the mask,
    at no cost. Has no gradient.
    """
    shape, V = targets.shape, head.shape[-1]
    hidden_NM, targets_N, mask_N = (
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1),
        mask.reshape(-1),
    )
    N = len(targets_N)
    C = max(min(CHUNK_BYTES // (4 * V), N), 1)
    order_N = jnp.argsort(~mask_N, stable=True)
    padded = jnp.pad(order_N, (0, -N % C)).reshape(-1, C)
    counted = (jnp.arange(padded.size) < jnp.sum(mask_N)).reshape(-1, C)

    def compute(h_CM, t_C):
        logits_CV = linear(h_CM, head, jnp.float32)
        losses_C = token_losses(logits_CV, t_C, vocabulary)
        best_C = jnp.argmax(logits_CV, axis=-1)
        value_C = jnp.take_along_axis(logits_CV, best_C[:, None], axis=-1)[:, 0]
        best_C = best_C + vocabulary.vocabulary_offset(V)
        ties = value_C == vocabulary.vocabulary_max(value_C)
        last = jnp.iinfo(best_C.dtype).max
        best_C = -vocabulary.vocabulary_max(jnp.where(ties, -best_C, -last))
        return losses_C, best_C == t_C

    def chunk(_, piece):
        rows, counts = piece
        losses, is_argmax = jax.lax.cond(
            jnp.any(counts),
            compute,
            lambda *_: (jnp.zeros(C, jnp.float32), jnp.zeros(C, bool)),
            hidden_NM[rows],
            targets_N[rows],
        )
        return None, (jnp.where(counts, losses, 0.0), is_argmax & counts)

    _, (losses, is_argmax) = jax.lax.scan(chunk, None, (padded, counted))
    place_N = jnp.argsort(order_N)
    return tuple(x.reshape(-1)[:N][place_N].reshape(shape) for x in (losses, is_argmax))


# --------------------------------------------------------------------------------------- reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_losses(
    logits: Float[Array, "*positions vocab"],
    targets: Int[Array, "*positions"],
    vocabulary: Vocabulary = Whole(),  # noqa: B008
) -> Float[Array, "*positions"]:
    """-log p(target) in nats for every position, of this rank's part of the logits."""
    return _forward(logits, targets, vocabulary)[0]


def _forward(logits, targets, vocabulary):
    dtype, logits = logits.dtype, logits.astype(jnp.float32)
    largest = vocabulary.vocabulary_max(jnp.max(logits, axis=-1))
    total = vocabulary.vocabulary_sum(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    logsumexp = largest + jnp.log(total)
    own = targets - vocabulary.vocabulary_offset(logits.shape[-1])
    inside = (own >= 0) & (own < logits.shape[-1])
    at = jnp.clip(own, 0, logits.shape[-1] - 1)
    target_logits = jnp.take_along_axis(logits, at[..., None], axis=-1)[..., 0]
    target_logits = vocabulary.vocabulary_sum(jnp.where(inside, target_logits, 0.0))
    return logsumexp - target_logits, (logits.astype(dtype), logsumexp, own)


def _backward(vocabulary, saved, g):
    logits, logsumexp, own = saved
    probabilities = jnp.exp(logits.astype(jnp.float32) - logsumexp[..., None])
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    gradient = (probabilities - (columns == own[..., None])) * g[..., None]
    return gradient.astype(logits.dtype), None


token_losses.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------- a chunk at a time


class Tiles(NamedTuple):
    """The logits of a chunk, by tiles of the vocabulary.

    `exponentials` are exp(logit - largest of the tile), in the activations' dtype (None where only
    the losses are wanted); `target` is the target's logit, or 0 where another rank has it.
    """

    exponentials: Float[Array, "C V"] | None
    largest: Float[Array, "C W"]
    total: Float[Array, "C W"]
    target: Float[Array, "C"]


class Chunks(Protocol):
    """How a chunk's tiles and their gradient are computed; hashable."""

    @property
    def rows(self) -> int | None:
        """Tokens of a chunk; None: as many as CHUNK_BYTES hold."""

    def tiles(self, x_CM, head_MV, own_C, live, with_exponentials: bool) -> Tiles:
        """`own_C` are the targets as this rank counts them (some may be outside of it); rows from
        `live` on may be anything."""

    def dlogits(self, exponentials_CV, scale_CW, own_C, live) -> Float[Array, "C V"]:
        """Probabilities (exponentials times the scale of their tile) less the target's one, in the
        exponentials' dtype; zero in rows from `live` on, whatever they hold."""


class Plain(NamedTuple):
    """In plain JAX, the vocabulary as one tile."""

    rows: int | None = None

    def tiles(self, x_CM, head_MV, own_C, live, with_exponentials: bool) -> Tiles:
        logits_CV = jnp.matmul(x_CM, head_MV, preferred_element_type=jnp.float32)
        largest_C1 = logits_CV.max(-1, keepdims=True)
        exponentials_CV = jnp.exp(logits_CV - largest_C1)
        columns = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
        target_C = jnp.where(columns == own_C[:, None], logits_CV, 0.0).sum(-1)
        kept = exponentials_CV.astype(x_CM.dtype) if with_exponentials else None
        return Tiles(kept, largest_C1, exponentials_CV.sum(-1, keepdims=True), target_C)

    def dlogits(self, exponentials_CV, scale_C1, own_C, live) -> Float[Array, "C V"]:
        columns = jax.lax.broadcasted_iota(jnp.int32, exponentials_CV.shape, 1)
        target_CV = columns == own_C[:, None]
        dlogits_CV = exponentials_CV.astype(jnp.float32) * scale_C1 - target_CV
        counts_C1 = jnp.arange(len(own_C))[:, None] < live
        return jnp.where(counts_C1, dlogits_CV, 0.0).astype(exponentials_CV.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def in_chunks(
    how: Chunks,
    hidden_NM: Float[Array, "N M"],
    head_MV: Float[Array, "M V"],
    targets_N: Int[Array, "N"],
    mask_N: Bool[Array, "N"],
    vocabulary: Vocabulary,
) -> tuple[Float[Array, ""], Float[Array, "N"]]:
    """As the reference, with the logits of a chunk of tokens at a time."""
    return _run(how, hidden_NM, head_MV, targets_N, mask_N, vocabulary, False)[0]


def _in_chunks_forward(how, hidden_NM, head_MV, targets_N, mask_N, vocabulary):
    return _run(how, hidden_NM, head_MV, targets_N, mask_N, vocabulary, True)


def _in_chunks_backward(how, vocabulary, saved, cotangents):
    g, _ = cotangents
    return *((x * g).astype(x.dtype) for x in saved), None, None


in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _run(how: Chunks, hidden_NM, head_MV, targets_N, mask_N, vocabulary, differentiated: bool):
    """((sum, losses), (dhidden, dhead)), the second None where not wanted."""
    N, V, dtype = len(hidden_NM), head_MV.shape[1], hidden_NM.dtype
    C = min(how.rows or _rows_of_a_chunk(V, dtype), -(-N // _CHUNK_ROWS) * _CHUNK_ROWS)
    # The tokens that count come first; the last chunk is filled up with others.
    order_N = jnp.argsort(~mask_N, stable=True)
    padding = -N % C
    x = jnp.pad(hidden_NM[order_N], ((0, padding), (0, 0)))
    own = jnp.pad(targets_N[order_N] - vocabulary.vocabulary_offset(V), (0, padding))
    live = jnp.sum(mask_N)
    weight_MV = head_MV.astype(dtype)

    def chunk(carry):
        number, losses, dx, dhead_MV = carry
        at = number * C
        x_CM = jax.lax.dynamic_slice_in_dim(x, at, C)
        own_C = jax.lax.dynamic_slice_in_dim(own, at, C)
        tiles = how.tiles(x_CM, weight_MV, own_C, live - at, differentiated)
        counts_C = jnp.arange(C) < live - at
        largest_C = vocabulary.vocabulary_max(tiles.largest.max(-1))
        total = tiles.total * jnp.exp(tiles.largest - largest_C[:, None])
        logsumexp_C = largest_C + jnp.log(vocabulary.vocabulary_sum(total.sum(-1)))
        loss_C = logsumexp_C - vocabulary.vocabulary_sum(tiles.target)
        loss_C = jnp.where(counts_C, loss_C, 0.0)
        losses = jax.lax.dynamic_update_slice_in_dim(losses, loss_C, at, 0)
        if differentiated:
            scale_CW = jnp.exp(tiles.largest - logsumexp_C[:, None])
            dlogits_CV = how.dlogits(tiles.exponentials, scale_CW, own_C, live - at)
            dx_CM = jnp.matmul(dlogits_CV, weight_MV.T)
            dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_CM, at, 0)
            dhead_MV += jnp.matmul(x_CM.T, dlogits_CV, preferred_element_type=jnp.float32)
        return number + 1, losses, dx, dhead_MV

    start = (jnp.int32(0), jnp.zeros(N + padding, jnp.float32), None, None)
    if differentiated:
        start = (*start[:2], jnp.zeros_like(x), jnp.zeros(head_MV.shape, jnp.float32))
    # The planner reads in the compiled program how often the loop turns at most.
    with jax.named_scope(f"turns.{len(x) // C}"):
        _, losses, dx, dhead_MV = jax.lax.while_loop(lambda c: c[0] * C < live, chunk, start)
    losses_N = jnp.zeros(N, jnp.float32).at[order_N].set(losses[:N], unique_indices=True)
    if not differentiated:
        return (jnp.sum(losses_N), losses_N), None
    dhidden_NM = jnp.zeros_like(hidden_NM).at[order_N].set(dx[:N], unique_indices=True)
    return (jnp.sum(losses_N), losses_N), (dhidden_NM, dhead_MV.astype(head_MV.dtype))


def _rows_of_a_chunk(vocabulary_size: int, dtype) -> int:
    fit = CHUNK_BYTES // (vocabulary_size * jnp.dtype(dtype).itemsize)
    return max(_CHUNK_ROWS, fit // _CHUNK_ROWS * _CHUNK_ROWS)
