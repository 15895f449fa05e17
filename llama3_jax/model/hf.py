"""Weights from and to Hugging Face: Llama 3, 3.1 and 3.2 in safetensors.

Both directions go tensor by tensor: beside the model itself only the tensor at hand is in memory.
A linear layer is stored as [out, in], ours are [in, out] with heads apart; RoPE is half-split on
both sides, so no rows are permuted.
"""

import functools
import math
import operator
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, write_json
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Params, define
from llama3_jax.model.tensor_files import (
    INDEX,
    SINGLE,
    Stored,
    read_headers,
    read_json,
    write_tensors,
)
from llama3_jax.schema import parse

_CONFIG = "config.json"

# Keys of config.json -> ours.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
}
_OTHERS = {
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
    "initializer_range": "init_std",
}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
# Keys that would change the network, and the only value that works; absent is the same.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_FIXED_READ = _FIXED | {"quantization_config": None, "partial_rotary_factor": 1.0}

# Theirs -> our path, and how many leading axes of ours are inputs (0: stored as it is).
_HEAD = "lm_head.weight"
_TENSORS = {
    "model.embed_tokens.weight": (("embedding",), 0),
    "model.layers.{}.input_layernorm.weight": (("blocks", "attention_norm", "scale"), 0),
    "model.layers.{}.self_attn.q_proj.weight": (("blocks", "attention", "query"), 1),
    "model.layers.{}.self_attn.k_proj.weight": (("blocks", "attention", "key"), 1),
    "model.layers.{}.self_attn.v_proj.weight": (("blocks", "attention", "value"), 1),
    "model.layers.{}.self_attn.o_proj.weight": (("blocks", "attention", "out"), 2),
    "model.layers.{}.post_attention_layernorm.weight": (("blocks", "ffn_norm", "scale"), 0),
    "model.layers.{}.mlp.gate_proj.weight": (("blocks", "ffn", "gate"), 1),
    "model.layers.{}.mlp.up_proj.weight": (("blocks", "ffn", "up"), 1),
    "model.layers.{}.mlp.down_proj.weight": (("blocks", "ffn", "down"), 1),
    "model.norm.weight": (("final_norm", "scale"), 0),
    _HEAD: (("head",), 1),
}


class _Tensor(NamedTuple):
    """One tensor of the checkpoint: name and shape there, and its place in our parameters."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None
    input_axes: int

    def ours(self, params: Params) -> Any:
        """Our array for this tensor, one layer of a stacked one, in our layout."""
        leaf = functools.reduce(operator.getitem, self.path, params)
        return leaf if self.layer is None else leaf[self.layer]

    def in_their_layout(self, array: np.ndarray) -> np.ndarray:
        """`array` (our layout) seen as [out, in], a view if it is contiguous."""
        if self.input_axes == 0:
            return array
        return array.reshape(math.prod(array.shape[: self.input_axes]), -1).T


def load(directory: Path, **overrides) -> tuple[ModelConfig, Params]:
    """Config and float32 parameters (numpy arrays) of a Hugging Face Llama 3 checkpoint.

    `overrides` replace fields of the config (`dtype="float32"`, `remat="full"`, ...): config.json
    says nothing of how to compute.

    Raises:
      UserError: no checkpoint; an architecture, RoPE type or bias that is not Llama 3's; a missing,
        unexpected, misshapen or truncated tensor. All headers are checked before data is read.
    """
    directory = Path(directory)
    config = _read_config(directory / _CONFIG, overrides)
    stored = read_headers(directory)
    tensors = list(_tensors(config))
    _check(directory, config, tensors, stored)
    params = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, np.float32), define(config).abstract_params()
    )
    for tensor in tensors:
        _copy(tensor.in_their_layout(tensor.ours(params)), stored[tensor.name].read())
    if config.tied_head and _HEAD in stored:
        _check_tied(stored[_HEAD], params["embedding"])
    return config, params


def save(
    directory: Path,
    config: ModelConfig,
    params: Params,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shard_bytes: int = 5 * 2**30,
    *,
    max_length: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> None:
    """Writes a checkpoint that transformers reads as LlamaForCausalLM, whole or not at all.

    A tensor larger than `shard_bytes` gets a file of its own. `max_length` becomes
    max_position_embeddings; unless given it is as released: 8192, with RoPE scaling 16 times the
    original length. The ids of begin and end of text are Llama 3's unless given, and null for any
    other vocabulary.

    Raises:
      UserError: the target exists and is not an empty directory, or its disk is too small.
      ValueError: `params` are not those of `config`.
    """
    directory = Path(directory).resolve()
    _check_plain(config)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, define(config).abstract_params())]
    if shapes[0] != shapes[1]:
        raise UserError("the parameters are not those of the config: the module was changed")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; name a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    total_bytes = define(config).parameter_count() * np.dtype(dtype).itemsize
    if (free := shutil.disk_usage(directory.parent).free) < total_bytes:
        raise UserError(
            f"{directory.parent}: its disk has {free} bytes free, the weights need {total_bytes}"
        )

    values = _config_values(config, dtype, max_length, bos_token_id, eos_token_id)
    shards = _split(_tensors(config), np.dtype(dtype).itemsize, shard_bytes)
    weight_map = {}
    with atomic_path(directory) as temporary:
        try:
            temporary.mkdir()
            for number, shard in enumerate(shards, start=1):
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
                file = SINGLE if len(shards) == 1 else file
                _write_shard(temporary / file, shard, params, dtype)
                weight_map |= {tensor.name: file for tensor in shard}
            if len(shards) > 1:
                metadata = {"total_size": total_bytes}
                write_json(temporary / INDEX, {"metadata": metadata, "weight_map": weight_map})
            write_json(temporary / _CONFIG, values)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _check_plain(config: ModelConfig) -> None:
    """
    Raises:
      UserError: the network is not Hugging Face's Llama.
    """
    for name, field in ModelConfig.model_fields.items():
        if name.endswith("_module") and getattr(config, name) != field.default:
            raise UserError(
                f"model.{name}={getattr(config, name)} has no place in Hugging Face's Llama; a model "
                "folder keeps it (convert average, or save_pretrained with kind='model')"
            )


def _tensors(config: ModelConfig) -> Iterator[_Tensor]:
    """Every tensor of the checkpoint."""
    abstract = define(config).abstract_params()
    for name, (path, input_axes) in _TENSORS.items():
        if name == _HEAD and config.tied_head:
            continue
        stacked = path[0] == "blocks"
        shape = functools.reduce(operator.getitem, path, abstract).shape[stacked:]
        if input_axes:
            shape = (math.prod(shape[input_axes:]), math.prod(shape[:input_axes]))
        for layer in range(config.layers) if stacked else [None]:
            yield _Tensor(name.format(layer), shape, path, layer, input_axes)


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies and casts, some rows at a time: one side is transposed, and whole it is 5x slower."""
    for start in range(0, len(source), 256):
        target[start : start + 256] = source[start : start + 256]


# ---- reading ----


def _read_config(path: Path, overrides: dict[str, Any]) -> ModelConfig:
    values = {key: value for key, value in read_json(path).items() if value is not None}
    if (found := values.get("architectures")) != ["LlamaForCausalLM"]:
        raise UserError(f"{path}: architectures is {found!r}; only ['LlamaForCausalLM'] works")
    for key, allowed in _FIXED_READ.items():
        if (value := values.get(key, allowed)) != allowed:
            raise UserError(f"{path}: {key} is {value!r}; only {allowed!r} works")

    def size(key: str, default: float | None = None) -> int:
        value = values.get(key, default)
        if not isinstance(value, int | float) or value < 1 or value % 1:
            raise UserError(f"{path}: {key} is {value!r}; it must be a positive integer")
        return int(value)

    # Keys that a config may leave out have transformers' defaults.
    dim, heads = size("hidden_size"), size("num_attention_heads")
    defaults = {"num_key_value_heads": heads, "head_dim": dim / heads}
    fields: dict[str, Any] = {"norm_eps": 1e-6, "rope": _read_rope(path, values)}
    fields |= {ours: size(theirs, defaults.get(theirs)) for theirs, ours in _SIZES.items()}
    fields |= {ours: values[theirs] for theirs, ours in _OTHERS.items() if theirs in values}
    return parse(ModelConfig, fields | overrides, where=str(path))


def _read_rope(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """RoPE of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name, {})
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {name} is {rope!r}; it must be a dictionary")
    known = ("rope_type", "type", "rope_theta", *_SCALING)
    if unknown := [key for key in rope if key not in known and rope[key] is not None]:
        key = unknown[0]
        raise UserError(f"{path}: {name} has {key}={rope[key]!r}; only {', '.join(known)} work")
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"theta": theta}
    if kind != "llama3":
        raise UserError(f"{path}: {name} has rope_type {kind!r}; only 'default' and 'llama3' work")
    if missing := [key for key in _SCALING if rope.get(key) is None]:
        raise UserError(f"{path}: {name} of type 'llama3' lacks {missing[0]}")
    return {"theta": theta, "scaling": {ours: rope[theirs] for theirs, ours in _SCALING.items()}}


def _check(
    directory: Path, config: ModelConfig, tensors: list[_Tensor], stored: dict[str, Stored]
) -> None:
    """Names and shapes on disk against those that the config asks for."""
    files = {str(entry.file) for entry in stored.values()}
    where = files.pop() if len(files) == 1 else f"{directory} ({len(files)} shards)"
    for tensor in tensors:
        if tensor.name not in stored:
            raise UserError(f"{where}: tensor {tensor.name} is missing")
        entry = stored[tensor.name]
        if entry.shape != tensor.shape:
            raise UserError(
                f"{entry.file}: tensor {tensor.name} has shape {list(entry.shape)}; "
                f"{_CONFIG} asks for {list(tensor.shape)}"
            )
    known = {tensor.name for tensor in tensors} | ({_HEAD} if config.tied_head else set())
    for name, entry in stored.items():
        if name not in known:
            raise UserError(f"{entry.file}: tensor {name} is unexpected in this Llama 3")


def _check_tied(head: Stored, embedding: np.ndarray) -> None:
    """Some writers store the tied head as well: it must be the embedding."""
    rows = zip(head.read(), embedding, strict=False)  # row by row: no second float32 copy
    if head.shape != embedding.shape or not all(np.array_equal(*pair) for pair in rows):
        raise UserError(f"{head.file}: tensor {_HEAD} is not the embedding, though tied to it")


# ---- writing ----


def _split(tensors: Iterator[_Tensor], itemsize: int, shard_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = []
    room = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_shard(path: Path, shard: list[_Tensor], params: Params, dtype: str) -> None:
    by_name = {tensor.name: tensor for tensor in shard}

    def theirs(name: str) -> np.ndarray:
        tensor = by_name[name]
        array = np.empty(tensor.shape, dtype)
        _copy(array, tensor.in_their_layout(np.asarray(tensor.ours(params))))
        return array

    write_tensors(path, {tensor.name: tensor.shape for tensor in shard}, theirs, dtype)


def _config_values(
    config: ModelConfig, dtype: str, max_length: int | None, bos: int | None, eos: int | None
) -> dict[str, Any]:
    scaling = config.rope.scaling
    if max_length is None:
        max_length = 8192 if scaling is None else 16 * scaling.original_length
    if bos is None and eos is None and config.vocab_size == 128_256:
        bos, eos = 128_000, 128_001
    rope_scaling = None
    if scaling is not None:
        rope_scaling = {theirs: getattr(scaling, ours) for theirs, ours in _SCALING.items()}
        rope_scaling["rope_type"] = "llama3"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in (_SIZES | _OTHERS).items()},
        **_FIXED,
        # The keys of transformers 4: its version 5 reads them too.
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_scaling,
        "torch_dtype": dtype,
        "max_position_embeddings": max_length,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
