"""Labels by a Llama: likelihoods against a plain forward pass, rubrics, files, agreement."""

import json
import re

import jax
import numpy as np
import pyarrow.parquet
import pytest

from llama3_jax.curation import label as module
from llama3_jax.curation.label import (
    RUBRICS,
    Judge,
    LabelConfig,
    compare,
    label,
    probabilities,
    read_rubric,
)
from llama3_jax.curation.labelled import read_labels
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import define, forward

RUBRIC = """Judge it.
[good] It is good.
[not good] It is not.
[goo] Almost.
Page: {document}
Answer:"""


@pytest.fixture(scope="module")
def judge():
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)}, specials=16)
    config = ModelConfig(
        vocab_size=272, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_dim=24,
        dtype="float32",
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.4, leaf.shape).astype(np.float32),
        define(config).abstract_params(),
    )
    return Judge(config, params, tokenizer)


@pytest.fixture
def rubric(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text(RUBRIC)
    return str(path)


def plain(judge, rubric_text, document, answers):
    """log p of each answer, one whole row for each, from the logits of all positions."""
    text = rubric_text.replace("{document}", document)
    scores = []
    for answer in answers:
        prompt = [judge.tokenizer.bos, *judge.tokenizer.encode(text)]
        tokens = np.array([prompt + judge.tokenizer.encode(" " + answer)], np.int32)
        # Padded to one length, which a causal model does not see: one program for all.
        padded = np.pad(tokens, ((0, 0), (0, 256 - tokens.shape[1])))
        positions = np.arange(256)[None]
        logits = jax.jit(forward, static_argnums=0)(
            judge.config, judge.params, padded, positions, np.ones_like(padded)
        )
        log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
        ends = range(len(prompt), tokens.shape[1])
        scores.append(sum(log_p[i - 1, tokens[0, i]] for i in ends))
    return np.array(scores)


def softmax(scores):
    values = np.exp(scores - scores.max())
    return values / values.sum()


def test_likelihoods_of_answers_of_several_tokens(judge, rubric):
    documents = ["", "a page", "another page, longer than the one before", "x" * 100]
    answers = ("good", "not good", "goo")
    found = probabilities(judge, read_rubric(rubric), documents, LabelConfig(batch_tokens=600))
    for document, row in zip(documents, found, strict=True):
        expected = plain(judge, RUBRIC, document, answers)
        np.testing.assert_allclose(row, softmax(expected), atol=1e-5)
    calibrated = LabelConfig(calibrate=True, batch_tokens=600)
    found = probabilities(judge, read_rubric(rubric), documents, calibrated)
    empty = plain(judge, RUBRIC, "", answers)
    for document, row in zip(documents, found, strict=True):
        expected = softmax(plain(judge, RUBRIC, document, answers) - empty)
        np.testing.assert_allclose(row, expected, atol=1e-5)
    np.testing.assert_allclose(found[0], 1 / 3, atol=1e-6)


def test_answers_of_one_token_take_one_row(judge, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(
        module, "_log_p", lambda config, params, tokens, at: rows.append(tokens) or np.zeros(
            (*at.shape, config.vocab_size)
        )
    )  # fmt: skip
    module._log_likelihoods(judge, [[1, 2, 3], [4]], [[7], [8], [9]], 128)
    (tokens,) = rows
    assert tokens.shape == (2, 64) and (tokens[:, 0] == [1, 4]).all()


def test_long_documents_are_cut_not_the_question(judge, rubric):
    read = read_rubric(rubric)
    config = LabelConfig(max_length=150)
    prompt = module._prompt(judge.tokenizer, read, "y" * 500, config)
    assert len(prompt) == 150
    text = judge.tokenizer.decode(prompt[1:])
    assert text.startswith("Judge it.") and text.endswith("y\nAnswer:")
    with pytest.raises(UserError, match="max_length=50: the rubric alone has 8. tokens"):
        probabilities(judge, read, ["x"], LabelConfig(max_length=50))


def test_chat_format(judge, rubric):
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"]  # fmt: skip
    tokenizer = Tokenizer(judge.tokenizer.ranks, names)
    config = LabelConfig(chat=True)
    prompt = module._prompt(tokenizer, read_rubric(rubric), "a <|eot_id|> page", config)
    assert tokenizer.decode(prompt) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        + RUBRIC.replace("{document}", "a <|eot_id|> page")
        + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # The document cannot end the user's turn: only the format's own mark is the special token.
    assert prompt.count(tokenizer.special_ids["<|eot_id|>"]) == 1
    with pytest.raises(UserError, match="lacks <.start_header_id.>"):
        probabilities(judge, read_rubric(rubric), ["x"], config)


@pytest.mark.parametrize("name", sorted(path.stem for path in RUBRICS.glob("*.txt")))
def test_rubrics_of_the_package(name):
    given, reversed_ = read_rubric(name), read_rubric(name, "reversed")
    assert given.answers == reversed_.answers
    assert len(given.answers) >= 2
    places = [given.before.index(f"[{answer}]") for answer in given.answers]
    turned = [reversed_.before.index(f"[{answer}]") for answer in given.answers]
    assert places == sorted(places) and turned == sorted(turned, reverse=True)
    assert sorted(given.before) == sorted(reversed_.before)
    assert given.after.endswith("Answer:")


def test_files_and_agreement_between_orders(judge, rubric, tmp_path):
    documents = tmp_path / "in.jsonl"
    texts = {f"{i:032x}": f"page {i} " + "ab" * (i % 7) for i in range(40)}
    documents.write_text(
        "".join(json.dumps({"doc": d, "text": t}) + "\n" for d, t in texts.items())
    )
    outputs = {}
    for order in ("given", "reversed"):
        outputs[order] = tmp_path / f"{order}.parquet"
        config = LabelConfig(rubric=rubric, order=order)
        counts = label([documents], outputs[order], judge, config)
        rows = pyarrow.parquet.read_table(outputs[order]).to_pylist()
        assert {row["doc"]: row["text"] for row in rows} == texts
        found = probabilities(judge, read_rubric(rubric, order), list(texts.values()), config)
        for row, expected in zip(rows, found, strict=True):
            np.testing.assert_allclose(row["answers"], expected, atol=1e-6)
            assert row["label"] == ("good", "not good", "goo")[int(np.argmax(row["answers"]))]
            assert row["probability"] == max(row["answers"])
        assert counts.total() == 40
    result = compare(outputs["given"], outputs["reversed"])
    labels = [
        {r["doc"]: r["label"] for r in pyarrow.parquet.read_table(path).to_pylist()}
        for path in outputs.values()
    ]
    same = sum(labels[0][doc] == labels[1][doc] for doc in texts)
    assert result.documents == 40 and result.accuracy == pytest.approx(same / 40)
    human = tmp_path / "human.jsonl"
    human.write_text(json.dumps({"doc": f"{3:032x}", "text": "x", "label": "goo"}) + "\n")
    assert compare(human, outputs["given"]).documents == 1
    assert len(read_labels([outputs["given"]], 100)) == 40
    few = tmp_path / "few.parquet"
    assert label([documents], few, judge, LabelConfig(rubric=rubric), limit=3).total() == 3


def test_bad_input(judge, rubric, tmp_path):
    def refused(match, function, *arguments):
        with pytest.raises(UserError, match=match):
            function(*arguments)

    refused("rubric 'taste' not found; known: classes, code", read_rubric, "taste")
    broken = tmp_path / "broken.txt"
    broken.write_text("[yes] a\n{document}")
    refused("needs two or more different answers.* found: yes", read_rubric, str(broken))
    broken.write_text("[yes] a\n[no] b\n")
    refused("needs {document} once", read_rubric, str(broken))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    output = tmp_path / "out.parquet"
    config = LabelConfig(rubric=rubric)
    refused("no document with text in .*empty", label, [empty], output, judge, config)
    refused("input file not found", label, [tmp_path / "none.jsonl"], output, judge, config)
    assert not output.exists() and len(list(tmp_path.iterdir())) == 3
    refused("written as parquet", label, [empty], tmp_path / "out.csv", judge, config)
    for name, doc in (("a.jsonl", "1"), ("b.jsonl", "2")):
        row = {"doc": doc, "text": "x", "label": "y"}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    refused("no labelled document in common", compare, tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_the_programs_commands(judge, tmp_path, command):
    """Labels by a Hugging Face directory, from the command line as a user would."""
    hf.save(tmp_path / "llama", judge.config, judge.params, "float32")
    judge.tokenizer.save_json(tmp_path / "llama" / "tokenizer.json")
    documents = tmp_path / "in.jsonl"
    documents.write_text('{"doc": "a", "text": "one"}\n{"doc": "b", "text": "two"}\n')
    output = tmp_path / "out.parquet"
    done = command(
        "curate", "label", f"--model={tmp_path / 'llama'}", "--rubric=code", f"--input={documents}",
        f"--output={output}", "--order=reversed",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 2 documents" in done.stdout
    rows = pyarrow.parquet.read_table(output).to_pylist()
    config = LabelConfig(rubric="code", order="reversed", max_length=4096)
    found = probabilities(judge, read_rubric("code", "reversed"), ["one", "two"], config)
    np.testing.assert_allclose([row["answers"] for row in rows], found, atol=0.02)  # bfloat16


def test_labels_do_not_replace_their_input(tmp_path, command):
    documents = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), documents)
    before = documents.read_bytes()
    same = tmp_path / "x" / ".." / "in.parquet"
    done = command("curate", "label", "--model=none", f"--input={documents}", f"--output={same}",
                "--overwrite")  # fmt: skip
    assert done.returncode == 2 and "is also an input" in done.stderr
    assert documents.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["label", "--output=x.parquet"], "--model is required"),
        (["agree", "--reference=none.jsonl", "--other=x"], "none.jsonl: input file not found"),
        (["train_fasttext", "--output=x"], "give labelled documents by --input=FILE or by"),
        (["train_fasttext", "--output=x", "--documents=a"], "--documents=a: LABEL=FILE"),
        (["train_roberta", "--output=x"], "options.base: required key is missing"),
        (["train_fasttext", "--holdout=2", "--output=x"], "options.holdout: .*less than 1"),
    ],
)
def test_the_programs_errors(command, arguments, message):
    done = command("curate", *arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
