"""The whole network as an NNX module (Llama 3 paper, section 3.2).

Its methods see the arrays of one rank: its part of the vocabulary, the heads, the tokens; on one
device these are the whole. The blocks' parameters are stacked over layers, and one scan runs them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama3_jax.kernels.attention import Places, make_spans
from llama3_jax.kernels.cross_entropy import linear_cross_entropy, linear_scores
from llama3_jax.kernels.embedding import lookup
from llama3_jax.kernels.linear import linear
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.layers import Block, Cache, Context, load_class, parameter
from llama3_jax.model.rope import rope_tables
from llama3_jax.parallel.ranks import GATHERED, SINGLE_DEVICE, Collectives

# What modules sowed: paths to values.
Sown = dict[tuple[str, ...], Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("attention_out"),
    "save_dots": jax.checkpoint_policies.save_only_these_names("attention_out", "product"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input", "attention_out"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Transformer(nnx.Module):
    """Llama 3 (section 3.2): logits for every position of packed documents."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = (config.vocab_size, config.dim)
        self.embedding = parameter(rngs, table, ("vocab", "embed"), config.init_std)
        self.blocks = stacked(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.final_norm = load_class(config.norm_module)(config, rngs=rngs)
        if not config.tied_head:
            self.head = parameter(rngs, table[::-1], ("embed", "vocab"), config.init_std)

    @property
    def first_names(self) -> tuple[str, ...]:
        """The attributes that `embed` uses."""
        return ("embedding",)

    @property
    def last_names(self) -> tuple[str, ...]:
        """The attributes that `losses` and `scores` use."""
        return ("final_norm", "embedding" if self.config.tied_head else "head")

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits in float32. Without positions and segment ids each row is one document."""
        return self.logits(self.hidden(tokens, positions, segment_ids)[0])

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length dim"], Cache | None]:
        """Final normed activations; with a cache (stacked over layers) also the updated cache.

        A cached row is one document: its queries see every slot up to their own position.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        context = self.context(positions, segment_ids)
        if cache is not None:
            slots = jnp.broadcast_to(
                jnp.arange(cache.keys.shape[2]), (len(tokens), cache.keys.shape[2])
            )
            context = dataclasses.replace(
                context,
                queries=Places(positions, jnp.ones_like(positions)),
                keys=Places(slots, jnp.ones_like(slots)),
            )
        x, cache = self.run_blocks(self.embed(tokens), context, cache)
        return self.final_norm(x), cache

    def context(
        self,
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
        ranks: Collectives = SINGLE_DEVICE,
    ) -> Context:
        """What all layers share, for this context rank's tokens."""
        queries = Places(positions, segment_ids)
        keys = Places(*map(ranks.gather_places, (positions, segment_ids)))
        rows = ranks.row_indices(positions.shape[1])
        spans = make_spans(queries, keys, rows) if self.config.attention == "triton" else None
        tables = rope_tables(positions, self.config.rope, self.config.head_dim)
        return Context(tables, queries, keys, rows, spans, ranks=ranks)

    def embed(
        self, tokens: Int[Array, "batch length"], ranks: Collectives = SINGLE_DEVICE
    ) -> Float[Array, "batch part dim"]:
        """Token embeddings, from a table that may be split over tensor ranks by vocabulary."""
        table = self.embedding[...]
        if ranks.tensor == 1:
            return lookup(table, tokens, self.config.dtype)
        # A token is in one rank's part; the others add zeros.
        own = tokens - ranks.vocabulary_offset(len(table))
        inside = (own >= 0) & (own < len(table))
        x = lookup(table, jnp.where(inside, own, len(table)), self.config.dtype)
        return ranks.scatter_sequence(x)

    def run_blocks(
        self, x: Float[Array, "batch length dim"], context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "batch length dim"], Cache | None]:
        """All blocks in turn; what they sow is kept stacked over layers."""
        graph, params = nnx.split(self.blocks)
        kinds = tuple(type(v) for v in getattr(self, "__captures__", ()))
        x, cache, sown = scan_blocks(
            self.config, lambda params: nnx.merge(graph, params), params, x, context, cache, kinds
        )
        for module_path, module in nnx.iter_modules(self.blocks):
            for kept, new in zip(getattr(module, "__captures__", ()), sown, strict=True):
                for path, value in new.items():
                    if path[:-1] == module_path:
                        kept[path[-1]] = value
        return x, cache

    def head_matrix(self) -> Float[Array, "dim vocab"]:
        """The output projection, the embedding's transpose when tied."""
        return self.embedding[...].T if self.config.tied_head else self.head[...]

    def logits(self, hidden: Float[Array, "*positions dim"]) -> Float[Array, "*positions vocab"]:
        """Of `hidden`: product in the activations' dtype, accumulated and returned in float32."""
        return linear(hidden, self.head_matrix(), jnp.float32)

    def final_hidden(
        self, x: Float[Array, "batch part dim"], ranks: Collectives = SINGLE_DEVICE
    ) -> Float[Array, "batch length dim"]:
        """The last block's output, normed, of all tokens of the context rank."""
        return ranks.gather_sequence(self.final_norm(x))

    def losses(
        self,
        x: Float[Array, "batch part dim"],
        targets: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        ranks: Collectives = SINGLE_DEVICE,
    ) -> tuple[Float[Array, ""], Float[Array, "batch length"]]:
        """Of the last block's output: the sum of the masked losses in nats, which has a gradient,
        and each token's part of it."""
        hidden, loss = self.final_hidden(x, ranks), self.config.loss
        return linear_cross_entropy(hidden, self.head_matrix(), targets, mask, loss, ranks)

    def scores(
        self,
        x: Float[Array, "batch part dim"],
        targets: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        ranks: Collectives = SINGLE_DEVICE,
    ) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
        """Of each masked token its loss in nats, and whether it is the likeliest. See `losses`."""
        hidden = self.final_hidden(x, ranks)
        return linear_scores(hidden, self.head_matrix(), targets, mask, ranks)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`make(rngs)` for every layer, as one module whose parameters are stacked over layers."""
    metadata = {nnx.PARTITION_NAME: "layers"}
    made = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata=metadata)
    return nnx.split_rngs(splits=layers)(made)(rngs)


# ---------------------------------------------------------------------- the scan over layers


def rematerialized(config: ModelConfig, function: Callable) -> Callable:
    """`function` so that its backward computes again what `config.remat` says."""
    if config.remat == "none":
        return function
    return jax.checkpoint(function, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)


def scan_blocks(
    config: ModelConfig,
    open_block: Callable[[Any], nnx.Module],
    weights: Any,
    x: Float[Array, "batch part dim"],
    context: Context,
    cache: Cache | None = None,
    kinds: tuple[type[nnx.Variable], ...] = (),
    keeps_weights: bool = True,
) -> tuple[Float[Array, "batch part dim"], Cache | None, tuple[Sown, ...]]:
    """All blocks in turn. `open_block` makes a block of one layer's part of the stacked `weights`.

    Without `keeps_weights` the backward pass opens them again. Returns also what the blocks sowed
    of each of `kinds`: paths in the block to values stacked over layers.
    """

    def apply(x, layer):
        weights, cache, number = layer
        layer_context = dataclasses.replace(context, layer=number)
        x, cache, sown = call_block(open_block(weights), x, layer_context, cache, kinds)
        return x, (cache, sown)

    if config.remat == "none" and not keeps_weights:
        apply = jax.checkpoint(apply, policy=_all_but_weights, prevent_cse=False)
    else:
        apply = rematerialized(config, apply)
    unroll = min(config.layer_unroll, config.layers)
    layers = (weights, cache, jnp.arange(config.layers))
    x, (cache, sown) = jax.lax.scan(apply, x, layers, unroll=unroll)
    return x, cache, sown


def call_block(
    block: nnx.Module,
    x: Float[Array, "batch part dim"],
    context: Context,
    cache: Cache | None = None,
    kinds: tuple[type[nnx.Variable], ...] = (),
) -> tuple[Float[Array, "batch part dim"], Cache | None, tuple[Sown, ...]]:
    """One block; and what it sowed of each of `kinds`, by path."""
    if not kinds:  # what it sows is dropped
        return *nnx.capture(block)(x, context, cache), ()
    (x, cache), *states = nnx.capture(block, *kinds)(x, context, cache)
    sown = tuple(
        {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
        for state in states
    )
    return x, cache, sown


def _all_but_weights(primitive, *_, **options) -> bool:
    """Keeps all but gathered weights and what is free to make from them: decided by names.

    What is gathered is kept by the name that it has after its gather (parallel/ranks.py), or not.
    """
    if primitive.name == "name":
        return options["name"] != GATHERED
    if primitive.name == "custom_vjp_call":  # one operation here: its body has the name
        body = options["call_jaxpr"].eqns
        names = {e.params["name"] for e in body if e.primitive.name == "name"}
        casts = all(e.primitive.name == "convert_element_type" for e in body)
        return GATHERED not in names and not casts
    return primitive.name not in ("all_gather", "reshape", "convert_element_type")
