"""Hugging Face checkpoints: recorded ones give transformers' logits, ours survive the round trip.

The recorded checkpoints in golden/ were written by golden/make_hf_golden.py.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama3_jax.errors import UserError
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig, RopeConfig, RopeScaling, preset
from llama3_jax.model.definition import define, forward

GOLDEN = Path(__file__).parent / "golden"
CASES = ["llama3", "llama3_1", "llama3_2"]
CONFIG = ModelConfig(
    vocab_size=50, dim=24, layers=3, heads=6, kv_heads=2, head_dim=8, ffn_dim=40,
    rope=RopeConfig(scaling=RopeScaling(factor=32.0)), norm_eps=1e-6, init_std=0.03,
)  # fmt: skip
TIED = CONFIG.model_copy(update={"tied_head": True})


def random_params(config, dtype="float32", seed=0):
    """Float32 parameters whose values are exact in `dtype`."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(dtype).astype(np.float32),
        define(config).abstract_params(),
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, leaf in jax.tree_util.tree_leaves_with_path(left):
        other = functools.reduce(lambda tree, key: tree[key.key], path, right)
        assert leaf.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the recorded Llama 3, to be spoiled."""
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# ---- agreement with transformers ----


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case):
    config, params = hf.load(GOLDEN / case, dtype="float32")
    golden = np.load(GOLDEN / case / "golden.npz")
    tokens = golden["tokens"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    logits = jax.jit(forward, static_argnums=0)(
        config, params, tokens, positions, jnp.ones_like(tokens)
    )
    assert np.abs(golden["logits"]).max() > 1  # else 1e-4 would say little
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_rope_scaling_matters_in_the_recorded_logits():
    config, params = hf.load(GOLDEN / "llama3_1", dtype="float32", rope=RopeConfig())
    golden = np.load(GOLDEN / "llama3_1" / "golden.npz")
    tokens = golden["tokens"]
    assert tokens.shape[1] > 64  # beyond the original length
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    logits = define(config).bind(params)(tokens, positions, jnp.ones_like(tokens))
    assert np.abs(logits - golden["logits"]).max() > 0.1


def test_config_of_recorded_checkpoints():
    config, _ = hf.load(GOLDEN / "llama3_1", remat="full")
    scaling = RopeScaling(factor=8.0, original_length=64)
    assert config == ModelConfig(
        vocab_size=96, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn_dim=80,
        norm_eps=1e-5, rope=RopeConfig(theta=500_000.0, scaling=scaling), remat="full",
    )  # fmt: skip
    config, params = hf.load(GOLDEN / "llama3_2")
    assert config.tied_head and config.head_dim == 16 and config.rope.scaling is None
    assert "head" not in params


@pytest.mark.parametrize("case", CASES)
def test_keys_of_transformers_4_give_the_same_config(case, tmp_path):
    target = shutil.copytree(GOLDEN / case, tmp_path / case)
    values = json.loads((target / "config.json").read_text())
    rope = values["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = rope if rope["rope_type"] != "default" else None
    edit(target / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    assert hf.load(target)[0] == hf.load(GOLDEN / case)[0]


def test_head_dim_may_be_left_out(checkpoint):
    edit(checkpoint / "config.json", head_dim=None)
    assert hf.load(checkpoint)[0] == hf.load(GOLDEN / "llama3")[0]


# ---- round trips ----


@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 5000, 1])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_is_the_same(tmp_path, config, dtype, shard_bytes):
    params = random_params(config, dtype)
    hf.save(tmp_path / "out", config, params, dtype, shard_bytes)
    loaded_config, loaded = hf.load(tmp_path / "out")
    assert loaded_config == config
    assert_same(loaded, params)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes > 2**20)
    stored = [load_file(file) for file in files]  # safetensors itself can read them
    for file, tensors in zip(files, stored, strict=True):
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= shard_bytes or len(tensors) == 1, file
        assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    count = sum(tensor.size for tensors in stored for tensor in tensors.values())
    assert count == define(config).parameter_count()
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == count * np.dtype(dtype).itemsize
        assert index["weight_map"] == {
            name: file.name for file, tensors in zip(files, stored, strict=True) for name in tensors
        }


@pytest.mark.parametrize("case, dtype", [("llama3", "float32"), ("llama3_2", "bfloat16")])
def test_loaded_and_saved_is_the_same_bit_for_bit(case, dtype, tmp_path):
    config, params = hf.load(GOLDEN / case)
    hf.save(tmp_path / "out", config, params, dtype)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(GOLDEN / case / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def test_float16_and_jax_arrays(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(path).items()}
    save_file(halves, path)
    config, params = hf.load(checkpoint)
    hf.save(tmp_path / "out", config, jax.tree.map(jnp.asarray, params), "float32")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, halves[name].astype(np.float32))


def test_bfloat16_rounds_to_nearest_even(tmp_path):
    params = random_params(CONFIG)
    hf.save(tmp_path / "out", CONFIG, params)
    expected = jax.tree.map(
        lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16).astype(jnp.float32)), params
    )
    assert_same(hf.load(tmp_path / "out")[1], expected)


@pytest.mark.parametrize("name", ["8B", "3.1-8B", "3.2-1B", "3.2-3B"])
def test_config_json_of_the_released_models(name):
    values = hf._config_values(preset(name), "bfloat16", None, None, None)
    assert values["architectures"] == ["LlamaForCausalLM"] and values["model_type"] == "llama"
    assert (values["bos_token_id"], values["eos_token_id"]) == (128_000, 128_001)
    assert values["torch_dtype"] == "bfloat16" and values["rope_theta"] == 500_000.0
    assert values["tie_word_embeddings"] == name.startswith("3.2")
    assert values["max_position_embeddings"] == (8192 if name == "8B" else 131_072)
    assert (values["rope_scaling"] or {}).get("rope_type") == (None if name == "8B" else "llama3")


def test_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    target = shutil.copytree(GOLDEN / "llama3_2", tmp_path / "model")
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, target / "model.safetensors")
    assert_same(hf.load(target)[1], hf.load(GOLDEN / "llama3_2")[1])
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding"):
        hf.load(target)


# ---- memory ----

_PEAK = """
import json, sys, tracemalloc
from pathlib import Path
import jax, numpy as np
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define

config = ModelConfig(
    vocab_size=4000, dim=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn_dim=4096
)
params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), define(config).abstract_params())
target = Path(sys.argv[1])
tracemalloc.start()
hf.save(target, config, params, "float32", shard_bytes=2**24)
saving = tracemalloc.get_traced_memory()[1]
del params
tracemalloc.reset_peak()
before = tracemalloc.get_traced_memory()[0]
_, params = hf.load(target)
loading = tracemalloc.get_traced_memory()[1] - before
model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps(dict(saving=saving, loading=loading - model, model=model)))
"""


def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    # In its own process: what other tests allocate is not counted.
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "out")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peak = json.loads(result.stdout)
    largest = 4096 * 256 * 4  # gate, up and down: several in a row
    slack = 2**20  # headers, names, the code itself
    assert peak["model"] > 8 * largest
    assert largest <= peak["saving"] <= largest + slack
    assert largest <= peak["loading"] <= largest + slack


# ---- bad input ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MistralForCausalLM"]}, r"architectures is \['MistralForCausalLM'\]"),
        ({"architectures": None}, "architectures is None; only"),
        ({"attention_bias": True}, "attention_bias is True; only False works"),
        ({"mlp_bias": True}, "mlp_bias is True; only False works"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' works"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* works"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0 works"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters has rope_type 'yarn'; only 'default' and 'llama3' work",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "default", "mscale": 2}}, "has mscale=2; only rope_type"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; it must be a dictionary"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None; it must be a positive integer"),
        ({"vocab_size": "96"}, "vocab_size is '96'; it must be a positive integer"),
        ({"hidden_size": -32}, "hidden_size is -32; it must be a positive integer"),
        ({"num_attention_heads": 5, "head_dim": None}, "head_dim is 6.4; it must be a positive"),
        ({"num_key_value_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        (
            {"intermediate_size": 88},
            r"gate_proj.weight has shape \[80, 32\]; config.json asks for \[88, 32\]",
        ),
    ],
)
def test_bad_config(checkpoint, changes, message):
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(UserError, match=message) as raised:
        hf.load(checkpoint)
    assert "\n" not in str(raised.value) and str(checkpoint) in str(raised.value)


def test_unknown_override(checkpoint):
    with pytest.raises(UserError, match="dtipe: unknown key; nearest valid key: dtype"):
        hf.load(checkpoint, dtipe="float32")


def rewrite(checkpoint, change):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), rf"model\.safetensors: tensor {NORM} is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(2)}),
            "layers.2.mlp.up_proj.weight is F64; only F32, F16, BF16 work",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.ones(2, np.float32)}),
            r"model\.safetensors: tensor model.layers.2.mlp.up_proj.weight is unexpected",
        ),
        (
            lambda t: t.update({NORM: np.ones((2, 32), np.float32)}),
            rf"tensor {NORM} has shape \[2, 32\]; config.json asks for \[32\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.ones((32, 96), np.float32)}),
            r"lm_head.weight has shape \[32, 96\]; config.json asks for \[96, 32\]",
        ),
    ],
)
def test_bad_tensors(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(UserError, match=message) as raised:
        hf.load(checkpoint)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "keep, message",
    [
        (-1, r"truncated at byte \d+; tensor model\.\S+ ends at \d+"),
        (3000, r"truncated at byte 3000; tensor \S+ ends at"),
        (100, "header is truncated"),
        (5, "header is truncated"),
        (0, "header is truncated"),
    ],
)
def test_truncated_file(checkpoint, keep, message):
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(UserError, match=rf"model\.safetensors: {message}"):
        hf.load(checkpoint)


@pytest.mark.parametrize("header", [b"{broken", b"[1, 2]", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_header_that_is_not_safetensors(checkpoint, header):
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="the header is not that of a safetensors file"):
        hf.load(checkpoint)


def test_shards(tmp_path):
    target = shutil.copytree(GOLDEN / "llama3_1", tmp_path / "model")
    shard, index = target / "model-00002-of-00004.safetensors", "model.safetensors.index.json"
    data = shard.read_bytes()
    weight_map = json.loads((target / index).read_text())["weight_map"]

    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"model-00002-of-00004\.safetensors: truncated at byte"):
        hf.load(target)
    shard.unlink()
    with pytest.raises(UserError, match=r"00002-of-00004\.safetensors: shard not found; it should"):
        hf.load(target)
    shard.write_bytes(data)
    moved = next(name for name, file in weight_map.items() if file == shard.name)
    edit(target / index, weight_map=weight_map | {moved: "model-00001-of-00004.safetensors"})
    with pytest.raises(UserError, match=rf"00001-of-00004\.safetensors: tensor {moved} is missing"):
        hf.load(target)
    edit(target / index, weight_map=None)
    with pytest.raises(UserError, match="weight_map must map"):
        hf.load(target)
    (target / index).write_text("{")
    with pytest.raises(UserError, match="index.json: not a JSON object"):
        hf.load(target)
    (target / index).unlink()
    with pytest.raises(UserError, match="has no model.safetensors and no model.safetensors.index"):
        hf.load(target)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="config.json: file not found"):
        hf.load(tmp_path)


# ---- writing is whole or not at all ----


def test_refuses_what_exists(tmp_path):
    params = random_params(TIED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not an empty directory"):
            hf.save(tmp_path / name, TIED, params)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "notes.txt"]
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", TIED, params)
    hf.save(tmp_path / "new" / "deeper", TIED, params)
    assert hf.load(tmp_path / "empty")[0] == hf.load(tmp_path / "new" / "deeper")[0] == TIED


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def fail(path, *arguments):
        if len(written) == 2:
            raise OSError("disk pulled")
        written.append(path)
        return write_shard(path, *arguments)

    write_shard = hf._write_shard
    monkeypatch.setattr(hf, "_write_shard", fail)
    with pytest.raises(OSError, match="disk pulled"):
        hf.save(tmp_path / "out", CONFIG, random_params(CONFIG), shard_bytes=5000)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_no_space(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r": its disk has 100 bytes free, the weights need \d+"):
        hf.save(tmp_path / "out", CONFIG, random_params(CONFIG))


def test_params_of_another_config(tmp_path):
    with pytest.raises(UserError, match="not those of the config"):
        hf.save(tmp_path / "out", TIED, random_params(CONFIG))
    assert not (tmp_path / "out").exists()
