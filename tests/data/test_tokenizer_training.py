import json
from pathlib import Path

import pytest
from conftest import random_documents, write_jsonl

from llama3_jax.data import bpe
from llama3_jax.data.tokenizer import load
from llama3_jax.data.tokenizer_training import BYTES, TRAINING_FILE, Options, save, train
from llama3_jax.errors import UserError


@pytest.fixture
def source(tmp_path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", random_documents("d", 300, seed=2))


def test_going_on_from_a_saved_tokenizer_keeps_its_ids(source, tmp_path):
    save(*train([source], BYTES, 20, Options(specials=4)), tmp_path / "base")
    base = load(tmp_path / "base")
    save(*train([source], base.ranks, 15, Options()), tmp_path / "more")
    more = load(tmp_path / "more")
    assert {token: more.ranks[token] for token in base.ranks} == base.ranks
    assert (more.vocab_size, more.bos) == (256 + 20 + 15 + 256, 256 + 20 + 15)
    assert more.ranks == train([source], BYTES, 35, Options())[0].ranks
    record = json.loads((tmp_path / "more" / TRAINING_FILE).read_text())
    assert (record["base_tokens"], record["new_tokens"]) == (276, 15)
    assert record["fingerprint"] == more.fingerprint


def test_processes_pieces_and_spilling_change_nothing(source, monkeypatch):
    expected = train([source], BYTES, 30, Options())[0].fingerprint
    monkeypatch.setattr("llama3_jax.data.pretokens.PIECE_BYTES", 1_500)
    distinct = train([source], BYTES, 30, Options())[1]["pretokens"]
    for workers in (1, 2):
        trained, record = train([source], BYTES, 30, Options(max_pretokens=distinct), workers)
        assert trained.fingerprint == expected
        assert record["rare_left_out"] == 0


def test_well_covered_pretokens_can_be_left_out(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("mixture mixture mixture mixture " + "zxq " * 3)
    base = bpe.extend(BYTES, {"mix": 2, "ture": 1}, 5)
    assert b"mix" in base and b"ture" in base
    # "mixture" has 3.5 characters a token, " mixture" 2.7, " zxq" 1.
    first = {
        covered: min(set(train([source], base, 1, Options(covered=covered))[0].ranks) - set(base))
        for covered in (None, 4.0, 2.5)
    }
    assert first == {None: b"mixture", 4.0: b"mixture", 2.5: b" z"}
    assert train([source], base, 1, Options(covered=2.5))[1]["covered_left_out"] == 2


def test_weights_change_what_is_learnt(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"lang": "a", "text": "xy " * 9}, {"lang": "b", "text": "vw " * 10}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = {
        weight: set(train([path], BYTES, 1, Options(weights={"a": weight}))[0].ranks) - set(BYTES)
        for weight in ("1", "1.2")
    }
    assert tokens == {"1": {b"vw"}, "1.2": {b"xy"}}


class TestProgram:
    """`tokenize train` and `export` as a user types them."""

    def train(self, command, tmp_path, *options: str):
        arguments = [f"--output={tmp_path}/out", "--base=bytes", *options]
        return command("tokenize", "train", *arguments)

    def test_train_and_export(self, command, source, tmp_path):
        result = self.train(
            command, tmp_path, f"--input={source}", "--new_tokens=12", "--workers=2"
        )
        assert result.returncode == 0, result.stderr
        assert "256 tokens of the base, 12 new, 256 specials" in result.stdout
        trained = load(tmp_path / "out")
        for name in ("x.tiktoken", "tokenizer.json", "folder"):
            options = [f"--tokenizer={tmp_path}/out", f"--output={tmp_path}/{name}"]
            result = command("tokenize", "export", *options)
            assert result.returncode == 0, result.stderr
            assert load(tmp_path / name).fingerprint == trained.fingerprint
        result = command("tokenize", "export", *options)
        assert result.returncode == 2 and "add --overwrite" in result.stderr
        result = self.train(command, tmp_path, f"--input={source}", "--new_tokens=2")
        assert result.returncode == 2 and "out exists and is not empty" in result.stderr
        assert load(tmp_path / "out").fingerprint == trained.fingerprint
        result = self.train(command, tmp_path, f"--input={source}", "--new_tokens=2", "--overwrite")
        assert result.returncode == 0 and len(load(tmp_path / "out").ranks) == 258

    def test_left_out_pretokens_are_told(self, command, source, tmp_path):
        result = self.train(
            command, tmp_path, f"--input={source}", "--new_tokens=2", "--max_pretokens=3"
        )
        assert result.returncode == 0, result.stderr
        assert "not exact: the" in result.stdout and "--max_pretokens=3" in result.stdout

    @pytest.mark.parametrize(
        ("options", "content", "message"),
        [
            (
                ["--new_tokens=1", "--workers=2"],
                b"\xff\xfe",
                "in.jsonl at byte 0: not a line of JSON",
            ),
            (["--new_tokens=9"], b'{"text": "abc"}', "only 2 of 9 new tokens can be merged"),
            (["--new_tokens=1", "--weights=de"], b'{"text": "abc"}', "--weights=de: must look"),
            (["--new_tokens=1", "--base_tokens=300"], b'{"text": "abc"}', "must be 256 to 256"),
            (["--new_tokens=1", "--output=setup.py"], b"", "--output=setup.py is not a folder"),
        ],
    )
    def test_one_line_and_nothing_written(self, command, tmp_path, options, content, message):
        (tmp_path / "in.jsonl").write_bytes(content)
        result = self.train(command, tmp_path, f"--input={tmp_path}/in.jsonl", *options)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert message in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]

    def test_commands_are_named(self, command):
        for arguments in ([], ["--input=x"], ["trian"]):
            result = command("tokenize", *arguments)
            assert result.returncode == 2
            assert "train|stats|export|encode" in result.stderr
        assert "tokenize train" in command("tokenize", "--help").stdout


@pytest.mark.parametrize(
    ("content", "new_tokens", "options", "message"),
    [
        (b'{"text": "\\ud800"}', 1, {}, "at byte 0: not Unicode: half of a surrogate pair"),
        (b'{"text": " "}', 1, {}, "no text to train on"),
        (b"", 1, {}, "no text to train on"),
        (b'{"text": "abc"}', 0, {}, "--new_tokens=0: must be at least 1"),
        (b'{"text": "abc"}', 3, {}, "only 2 of 3 new tokens can be merged"),
        (b'{"text": "abc"}', 1, {"covered": 0.5}, "only 0 of 1 new tokens can be merged"),
        (b'{"text": "abc"}', 1, {"holdout": 1.0}, "--holdout=1.0"),
        (b'{"text": "abc"}', 1, {"specials": 1}, "--specials=1: begin and end"),
        (b'{"text": "abc"}', 1, {"covered": 0}, "--covered=0"),
        (b'{"text": "abc"}', 1, {"max_pretokens": 0}, "--max_pretokens=0"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, content, new_tokens, options, message):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        train([tmp_path / "in.jsonl"], BYTES, new_tokens, Options(**options))
