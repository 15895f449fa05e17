"""RoBERTa for classifying documents (Liu et al. 2019, arXiv 1907.11692), DistilRoberta with 6 layers.

Weights are read from and written to Hugging Face's layout (RobertaForSequenceClassification; a
RobertaForMaskedLM such as distilroberta-base has no classifier yet, and gets a fresh one).

Shapes: B batch, S length, M model dim, H heads, D head dim, F FFN dim, L labels.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, write_json
from llama3_jax.model.tensor_files import SINGLE, read_headers, read_json, write_tensors
from llama3_jax.schema import Config, parse

CONFIG_FILE = "config.json"
Params = dict[str, Any]


class RobertaConfig(Config):
    """Shapes as distilroberta-base has them. `dtype` is that of products and activations.

    Parameters, norms, softmax and logits are float32 whatever it is. `max_positions` counts the two
    that no token has (Hugging Face numbers positions from `pad_id` + 1).
    """

    vocab_size: pydantic.PositiveInt = 50_265
    dim: pydantic.PositiveInt = 768
    layers: pydantic.PositiveInt = 6
    heads: pydantic.PositiveInt = 12
    ffn_dim: pydantic.PositiveInt = 3072
    max_positions: pydantic.PositiveInt = 514
    labels: pydantic.PositiveInt
    pad_id: pydantic.NonNegativeInt = 1
    bos_id: pydantic.NonNegativeInt = 0
    eos_id: pydantic.NonNegativeInt = 2
    norm_eps: float = 1e-5
    init_std: float = 0.02
    dropout: float = pydantic.Field(0.1, ge=0, lt=1)
    attention_dropout: float = pydantic.Field(0.1, ge=0, lt=1)
    classifier_dropout: float = pydantic.Field(0.1, ge=0, lt=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @pydantic.model_validator(mode="after")
    def _check(self) -> "RobertaConfig":
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        return self

    @property
    def max_length(self) -> int:
        """Tokens of the longest document, begin and end included."""
        return self.max_positions - self.pad_id - 1


# ------------------------------------------------------------ the network


def _linear(config: RobertaConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.init_std)
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=config.dtype, rngs=rngs)


def _norm(config: RobertaConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.dim, epsilon=config.norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


def _dropout(x: Array, rate: float, random: nnx.Rngs | None) -> Array:
    """Zeroes a share of `x` and scales the rest; with `random` None nothing."""
    if random is None or rate == 0:
        return x
    kept = jax.random.bernoulli(random.dropout(), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Layer(nnx.Module):
    """Attention and feed-forward, each followed by its residual's norm (post-norm)."""

    def __init__(self, config: RobertaConfig, *, rngs: nnx.Rngs):
        M, F = config.dim, config.ffn_dim
        self.query, self.key, self.value, self.attended = (
            _linear(config, M, M, rngs) for _ in range(4)
        )
        self.attention_norm = _norm(config, rngs)
        self.up, self.down = _linear(config, M, F, rngs), _linear(config, F, M, rngs)
        self.norm = _norm(config, rngs)
        self.config = config

    def __call__(
        self, x_BSM: Float[Array, "B S M"], mask_BS: Bool[Array, "B S"], random: nnx.Rngs | None
    ) -> Float[Array, "B S M"]:
        config = self.config
        B, S, M = x_BSM.shape
        q, k, v = (
            layer(x_BSM).reshape(B, S, config.heads, M // config.heads)
            for layer in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        scores = scores / math.sqrt(M // config.heads)
        scores = jnp.where(mask_BS[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x_BSM.dtype)
        weights = _dropout(weights, config.attention_dropout, random)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, S, M)
        mixed = _dropout(self.attended(mixed), config.dropout, random)
        x_BSM = self.attention_norm(x_BSM + mixed).astype(x_BSM.dtype)
        inner = jax.nn.gelu(self.up(x_BSM), approximate=False)
        inner = _dropout(self.down(inner), config.dropout, random)
        return self.norm(x_BSM + inner).astype(x_BSM.dtype)


class Roberta(nnx.Module):
    """Logits of the labels for documents of tokens; padding (`pad_id`) is neither seen nor counted."""

    def __init__(self, config: RobertaConfig, *, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            init = nnx.initializers.normal(config.init_std)
            return nnx.Embed(rows, config.dim, embedding_init=init, dtype=jnp.float32, rngs=rngs)

        self.word, self.position = table(config.vocab_size), table(config.max_positions)
        self.kind = table(1)  # of segments, which RoBERTa does not tell apart
        self.norm = _norm(config, rngs)
        self.layers = nnx.List(Layer(config, rngs=rngs) for _ in range(config.layers))
        self.dense = _linear(config, config.dim, config.dim, rngs)
        self.out = _linear(config, config.dim, config.labels, rngs)
        self.config = config

    def __call__(
        self, tokens_BS: Int[Array, "B S"], random: nnx.Rngs | None = None
    ) -> Float[Array, "B L"]:
        """Float32. `random` draws dropout; without it there is none."""
        config = self.config
        mask_BS = tokens_BS != config.pad_id
        positions = config.pad_id + jnp.cumsum(mask_BS, axis=1) * mask_BS
        x = self.word(tokens_BS) + self.position(positions) + self.kind(jnp.zeros_like(tokens_BS))
        x = _dropout(self.norm(x), config.dropout, random).astype(config.dtype)
        for layer in self.layers:
            x = layer(x, mask_BS, random)
        first = _dropout(x[:, 0], config.classifier_dropout, random)
        hidden = jnp.tanh(self.dense(first))
        hidden = _dropout(hidden, config.classifier_dropout, random)
        return self.out(hidden).astype(jnp.float32)


@functools.cache
def _abstract(config: RobertaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Roberta(config, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_params(config: RobertaConfig, seed: int) -> Params:
    """Fresh parameters: matrices and tables from a normal distribution, biases 0, norms 1."""
    return nnx.to_pure_dict(nnx.state(Roberta(config, rngs=nnx.Rngs(seed)), nnx.Param))


def forward(
    config: RobertaConfig, params: Params, tokens: Int[Array, "B S"], key: Array | None = None
) -> Float[Array, "B L"]:
    """Logits of `params`; `key` draws dropout."""
    graph, state = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes in place
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(tokens, None if key is None else nnx.Rngs(dropout=key))


# ------------------------------------------------------------ Hugging Face

_EMBEDDINGS = {
    "word_embeddings.weight": ("word", "embedding"),
    "position_embeddings.weight": ("position", "embedding"),
    "token_type_embeddings.weight": ("kind", "embedding"),
    "LayerNorm.weight": ("norm", "scale"),
    "LayerNorm.bias": ("norm", "bias"),
}
_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attended",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}
_HEAD = {"classifier.dense": "dense", "classifier.out_proj": "out"}
# What other heads and older versions store beside the encoder.
_OTHERS = ("lm_head.", "roberta.pooler.")
_BUFFERS = frozenset({"roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids"})
# Keys of config.json -> ours.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_positions",
    "pad_token_id": "pad_id",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_id",
    "layer_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# Keys that would change the network, and the only value that works; absent is the same.
_FIXED = {
    "model_type": "roberta",
    "hidden_act": "gelu",
    "type_vocab_size": 1,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class _Tensor(NamedTuple):
    name: str
    path: tuple[str | int, ...]
    transposed: bool

    def ours(self, params: Params) -> np.ndarray:
        leaf = functools.reduce(lambda tree, key: tree[key], self.path, params)
        return leaf.T if self.transposed else leaf


def _pair(name: str, path: tuple[str | int, ...]) -> Iterator[_Tensor]:
    """Weight and bias of a linear layer or a norm."""
    norm = name.endswith("LayerNorm")
    yield _Tensor(f"{name}.weight", (*path, "scale" if norm else "kernel"), not norm)
    yield _Tensor(f"{name}.bias", (*path, "bias"), False)


def _tensors(config: RobertaConfig) -> Iterator[_Tensor]:
    for name, path in _EMBEDDINGS.items():
        yield _Tensor(f"roberta.embeddings.{name}", path, False)
    for layer in range(config.layers):
        for name, attribute in _LAYER.items():
            yield from _pair(f"roberta.encoder.layer.{layer}.{name}", ("layers", layer, attribute))
    for name, attribute in _HEAD.items():
        yield from _pair(name, (attribute,))


def load(
    directory: Path, labels: int | None = None, seed: int = 0, **overrides
) -> tuple[RobertaConfig, Params]:
    """Config and float32 parameters (numpy arrays) of a Hugging Face RoBERTa.

    With `labels` the classifier is made anew for so many, drawn from `seed`, whatever the checkpoint
    has; without, it must have one. `overrides` replace fields of the config.

    Raises:
      UserError: no checkpoint; another architecture; no classifier; a missing, unexpected, misshapen
        or truncated tensor. All headers are checked before data is read.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE, labels, overrides)
    stored = read_headers(directory, _BUFFERS)
    tensors = list(_tensors(config))
    heads = tuple(_HEAD)
    if labels is not None:
        tensors = [tensor for tensor in tensors if not tensor.name.startswith(heads)]
        stored = {name: entry for name, entry in stored.items() if not name.startswith(heads)}
    elif not any(name.startswith(heads) for name in stored):
        raise UserError(
            f"{directory}: this RoBERTa has no classifier (no tensor classifier.*): fine-tune it first"
        )
    shapes = nnx.to_pure_dict(_abstract(config)[1])
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    if labels is not None:
        random = np.random.default_rng(seed)
        for name in _HEAD.values():
            kernel = params[name]["kernel"]
            kernel[...] = random.normal(0, config.init_std, kernel.shape)
    for tensor in tensors:
        target = tensor.ours(params)
        if tensor.name not in stored:
            raise UserError(f"{directory}: tensor {tensor.name} is missing")
        entry = stored.pop(tensor.name)
        if entry.shape != target.shape:
            raise UserError(
                f"{entry.file}: tensor {tensor.name} has shape {list(entry.shape)}; {CONFIG_FILE} "
                f"asks for {list(target.shape)}"
            )
        target[...] = entry.read()
    if unexpected := [name for name in stored if not name.startswith(_OTHERS)]:
        raise UserError(f"{directory}: tensor {unexpected[0]} is unexpected in a RoBERTa")
    return config, params


def save(directory: Path, config: RobertaConfig, params: Params, labels: tuple[str, ...]) -> None:
    """Writes config.json and float32 model.safetensors, which transformers reads."""
    directory.mkdir(parents=True, exist_ok=True)
    by_name = {tensor.name: tensor for tensor in _tensors(config)}

    def read(name: str) -> np.ndarray:
        return np.ascontiguousarray(by_name[name].ours(params), dtype=np.float32)

    shapes = {name: tuple(tensor.ours(params).shape) for name, tensor in by_name.items()}
    with atomic_path(directory / SINGLE) as temporary:
        write_tensors(temporary, shapes, read, "float32")
    values = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    names = {str(index): label for index, label in enumerate(labels)}
    write_json(
        directory / CONFIG_FILE,
        values
        | _FIXED
        | {
            "architectures": ["RobertaForSequenceClassification"],
            "classifier_dropout": config.classifier_dropout,
            "id2label": names,
            "label2id": {label: int(index) for index, label in names.items()},
            "problem_type": "single_label_classification",
            "torch_dtype": "float32",
        },
    )


def _read_config(path: Path, labels: int | None, overrides: dict[str, Any]) -> RobertaConfig:
    values = {key: value for key, value in read_json(path).items() if value is not None}
    for key, allowed in _FIXED.items():
        if (value := values.get(key, allowed)) != allowed:
            raise UserError(f"{path}: {key} is {value!r}; only {allowed!r} works")
    fields: dict[str, Any] = {ours: values[k] for k, ours in _SIZES.items() if k in values}
    # Two labels and hidden_dropout_prob are what transformers takes where nothing is said.
    fields["labels"] = labels or len(values.get("id2label", {0: 0, 1: 1}))
    fields["classifier_dropout"] = values.get("classifier_dropout", fields.get("dropout", 0.1))
    return parse(RobertaConfig, fields | overrides, where=str(path))
