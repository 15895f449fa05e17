"""The conversion program: both directions, and what it refuses before it reads any weights."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama3_jax.convert import convert
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.errors import UserError
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define, init_params
from llama3_jax.training.checkpoint import load_model, save_model
from llama3_jax.training.loading import load_with_tokenizer

LLAMA3 = Path(__file__).parent / "model" / "golden" / "llama3"


def test_there_and_back_is_bit_exact(tmp_path, capsys):
    convert(LLAMA3, tmp_path / "ours")
    config, params = hf.load(LLAMA3)
    loaded = load_model(tmp_path / "ours")
    assert loaded.config == config and loaded.tokenizer is None
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, params))
    convert(tmp_path / "ours", tmp_path / "theirs", "float32", 4096)
    expected = load_file(LLAMA3 / "model.safetensors")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(stored[name].tobytes() == expected[name].tobytes() for name in stored)
    assert '"max_position_embeddings": 4096' in (tmp_path / "theirs" / "config.json").read_text()
    convert(tmp_path / "ours", tmp_path / "default")
    stored = load_file(tmp_path / "default" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"bfloat16"}
    assert f"wrote {define(config).parameter_count():,} parameters" in capsys.readouterr().out


def test_tokenizer_and_text_ends_are_those_of_the_run(tmp_path, byte_tokenizer):
    config = ModelConfig(
        vocab_size=272, dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_dim=8
    )  # fmt: skip
    shutil.copytree(byte_tokenizer, tmp_path / "tokenizer")
    for name, fingerprint in [("its", tokenizers.load(byte_tokenizer).fingerprint), ("not", "?")]:
        save_model(tmp_path / name, config, init_params(config, 0), fingerprint)
        convert(tmp_path / name, tmp_path / "out" / name)
        values = json.loads((tmp_path / "out" / name / "config.json").read_text())
        ids = (values["bos_token_id"], values["eos_token_id"])
        assert ids == ((256, 257) if name == "its" else (None, None))
        assert (tmp_path / "out" / name / "tokenizer.json").exists() == (name == "its")
    assert (
        tokenizers.load(tmp_path / "out" / "its").special_ids
        == tokenizers.load(byte_tokenizer).special_ids
    )


def test_the_tokenizer_goes_with_the_weights_and_back(tmp_path, byte_tokenizer, capsys):
    config = ModelConfig(
        vocab_size=272, dim=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn_dim=8
    )  # fmt: skip
    theirs, ours, again = (tmp_path / name for name in ("theirs", "ours", "again"))
    hf.save(theirs, config, init_params(config, 0), bos_token_id=256, eos_token_id=257)
    tokenizers.load(byte_tokenizer).save_json(theirs / "tokenizer.json")
    convert(theirs, ours)
    loaded, tokenizer = load_with_tokenizer(ours, None)
    assert loaded.tokenizer == tokenizer.fingerprint == tokenizers.load(byte_tokenizer).fingerprint
    convert(ours, again)
    assert (again / "tokenizer.json").read_text() == (theirs / "tokenizer.json").read_text()

    (theirs / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    convert(theirs, tmp_path / "without")
    assert "warning: converted without the tokenizer: " in capsys.readouterr().err
    assert load_model(tmp_path / "without").tokenizer is None


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="--from=.* is neither a Hugging Face directory"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--to=.* is also an input"):
        convert(LLAMA3, LLAMA3)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    with pytest.raises(UserError, match="--to=.*taken exists and is not empty; .*--overwrite"):
        convert(LLAMA3, tmp_path / "taken")
    with pytest.raises(UserError, match="--dtype is for Hugging Face weights"):
        convert(LLAMA3, tmp_path / "out", dtype="float32")
    with pytest.raises(UserError, match="--max_length is for Hugging Face weights"):
        convert(LLAMA3, tmp_path / "out", max_length=8192)
    assert not (tmp_path / "out").exists()


def test_program_prints_one_line_and_exits_with_2(command, tmp_path):
    result = command("convert", f"--from={tmp_path}", f"--to={tmp_path / 'out'}")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --from=") and "is neither a Hugging Face directory" in line
