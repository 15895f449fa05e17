"""RoBERTa against transformers' recorded logits and a plain float64 NumPy forward; fine-tuning.

The recorded checkpoint in golden/roberta was written by golden/make_roberta_golden.py.
"""

import json
import math
import shutil
from pathlib import Path

import daft
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama3_jax.curation import classifiers, roberta, roberta_training
from llama3_jax.curation.labelled import Labelled
from llama3_jax.curation.quality_roberta import QualityRobertaConfig, quality_roberta
from llama3_jax.curation.roberta import RobertaConfig
from llama3_jax.curation.roberta_classifier import load_roberta
from llama3_jax.curation.roberta_tokens import RobertaTokens
from llama3_jax.curation.roberta_training import RobertaTrainingConfig, train_roberta
from llama3_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "roberta"
WEIGHTS = "model.safetensors"
TEXTS = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the recorded RoBERTa, to be spoiled."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "roberta"))


def erf(x):
    return np.vectorize(math.erf)(x)


def plain_forward(folder, documents):
    """Logits in float64, one document at a time and without padding, straight from the file."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: array.astype(np.float64) for name, array in load_file(folder / WEIGHTS).items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    logits = []
    for ids in documents:
        table = "roberta.embeddings.{}_embeddings.weight".format
        x = w[table("word")][ids] + w[table("position")][2 : 2 + len(ids)]
        x = norm(x + w[table("token_type")][0], "roberta.embeddings.LayerNorm")
        for i in range(config["num_hidden_layers"]):
            layer = f"roberta.encoder.layer.{i}"
            q, k, v = (linear(x, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
            heads = []
            size = x.shape[1] // config["num_attention_heads"]
            for h in range(config["num_attention_heads"]):
                part = slice(h * size, (h + 1) * size)
                scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
                heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
            mixed = linear(np.concatenate(heads, -1), f"{layer}.attention.output.dense")
            x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
            inner = linear(x, f"{layer}.intermediate.dense")
            inner = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
            x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        logits.append(linear(np.tanh(linear(x[0], "classifier.dense")), "classifier.out_proj"))
    return np.array(logits)


def test_logits_and_tokens_equal_those_of_transformers():
    config, params = roberta.load(GOLDEN, dtype="float32")
    golden = np.load(GOLDEN / "golden.npz")
    ids = RobertaTokens(GOLDEN, config, 96).encode(TEXTS[:4])
    for ours, theirs in zip(ids, golden["tokens"], strict=True):
        assert ours == theirs[theirs != config.pad_id].tolist()
    assert max(map(len, ids)) == 96  # one was cut
    logits = jax.jit(roberta.forward, static_argnums=0)(config, params, golden["tokens"])
    assert np.abs(golden["logits"]).max() > 1
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


@pytest.fixture
def random_checkpoint(checkpoint):
    """The same shapes with fresh random weights."""
    random = np.random.default_rng()
    tensors = {
        name: random.normal(1.0 if "LayerNorm.weight" in name else 0.0, 0.2, array.shape)
        for name, array in load_file(checkpoint / WEIGHTS).items()
    }
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, checkpoint / WEIGHTS)
    return checkpoint


def test_logits_equal_a_plain_forward_in_float64(random_checkpoint):
    config, params = roberta.load(random_checkpoint, dtype="float32")
    random = np.random.default_rng()
    documents = [random.integers(3, config.vocab_size, size=n).tolist() for n in (1, 2, 17, 60, 96)]
    expected = plain_forward(random_checkpoint, documents)
    tokens = np.full((len(documents), 96), config.pad_id, np.int32)
    for row, ids in enumerate(documents):
        tokens[row, : len(ids)] = ids
    forward = jax.jit(roberta.forward, static_argnums=0)
    logits = forward(config, params, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)
    low = config.model_copy(update={"dtype": "bfloat16"})
    np.testing.assert_allclose(forward(low, params, tokens), expected, rtol=0, atol=0.15)
    assert np.abs(forward(low, params, tokens) - expected).max() > 1e-4


def test_padding_rows_do_not_count_in_the_loss():
    config, params = roberta.load(GOLDEN, dtype="float32")
    tokens = np.load(GOLDEN / "golden.npz")["tokens"]
    labels, weight = np.array([1, 0, 2, 0], np.int32), np.array([1, 1, 1, 0], np.float32)
    loss = jax.jit(roberta_training.mean_loss, static_argnums=0)
    logits = np.load(GOLDEN / "golden.npz")["logits"].astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    by_hand = -np.mean(np.log(chances[np.arange(3), labels[:3]]))
    assert float(loss(config, params, tokens, labels, weight, None)) == pytest.approx(by_hand, 1e-5)


def test_dropout_keeps_the_mean_and_is_drawn_from_the_key():
    config, params = roberta.load(GOLDEN, dtype="float32")
    tokens = np.load(GOLDEN / "golden.npz")["tokens"]
    draw = jax.jit(roberta.forward, static_argnums=0)
    a, b = (draw(config, params, tokens, jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a, draw(config, params, tokens, jax.random.key(0)))
    assert np.abs(a - b).max() > 1e-3
    x = jnp.ones((200, 200))
    from flax import nnx

    dropped = roberta._dropout(x, 0.25, nnx.Rngs(dropout=jax.random.key(0)))
    assert set(np.unique(dropped).round(4)) == {0.0, np.float32(1 / 0.75).round(4)}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.01)


def test_round_trip_in_their_layout(tmp_path):
    config, params = roberta.load(GOLDEN)
    roberta.save(tmp_path / "out", config, params, ("a", "b", "c"))
    theirs, ours = load_file(GOLDEN / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(theirs) == set(ours)
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    recorded = json.loads((GOLDEN / "config.json").read_text())
    for key in set(values) & set(recorded) - {"id2label", "label2id", "problem_type"}:
        assert values[key] == recorded[key] or recorded[key] is None, key
    assert roberta.load(tmp_path / "out")[0] == config


def test_batches_hold_every_document_once_in_few_shapes():
    config, _ = roberta.load(GOLDEN)
    tokens = RobertaTokens(GOLDEN, config, 90)
    assert tokens.lengths() == [64, 90]
    random = np.random.default_rng(0)
    ids = [[0, *random.integers(3, 200, n).tolist(), 2] for n in random.integers(0, 89, 50)]
    batches = list(tokens.batches(ids, None, 640))
    assert {batch.tokens.shape for batch in batches} <= {(10, 64), (7, 90)}
    seen = []
    for batch in batches:
        for row, number in enumerate(batch.documents):
            assert [t for t in batch.tokens[row] if t != 1] == [t for t in ids[number] if t != 1]
        seen += batch.documents
    assert sorted(seen) == list(range(50))
    assert {b.tokens.shape[0] for b in tokens.batches(ids, 4, 0)} == {4}


def test_names_of_specials_in_a_text_are_text():
    config, _ = roberta.load(GOLDEN)
    (ids,) = RobertaTokens(GOLDEN, config, 96).encode([TEXTS[4]])
    assert ids[0] == 0 and ids[-1] == 2 and not {0, 1, 2} & set(ids[1:-1])


# ---- fine-tuning ----


@pytest.fixture(scope="module")
def documents():
    """Sentences told apart by a word somewhere in them."""
    random = np.random.default_rng(0)
    common = "the first tokens of a document with it reads in".split()
    found = []
    for label, own in (("no", "classifier"), ("yes", "schöner")):
        for _ in range(80):
            words = random.choice(common, random.integers(4, 20)).tolist()
            words.insert(random.integers(len(words)), own)
            found.append(Labelled(" ".join(words), label))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A RoBERTa of one layer that has learnt nothing."""
    folder = tmp_path_factory.mktemp("base")
    config = RobertaConfig(
        vocab_size=300, dim=32, layers=1, heads=4, ffn_dim=64, max_positions=66, labels=2,
        init_std=0.1, dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    roberta.save(folder, config, roberta.init_params(config, 0), ("a", "b"))
    shutil.copy(GOLDEN / "tokenizer.json", folder)
    return folder


CONFIG = RobertaTrainingConfig(
    base="set below", epochs=24, batch=16, learning_rate=3e-3, holdout=0.3, dtype="float32"
)


@pytest.fixture(scope="module")
def config(base):
    return CONFIG.model_copy(update={"base": str(base)})


@pytest.fixture(scope="module")
def trained(documents, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_roberta(documents, folder, config)


def test_fine_tuning_learns_and_is_repeated_exactly(documents, config, trained, tmp_path):
    folder, result = trained
    assert result.documents > 30
    assert result.accuracy > 0.9
    again = train_roberta(documents[::-1], tmp_path, config)
    assert again == result
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((folder / "classifier.json").read_text())["held_out"]["accuracy"] == (
        result.accuracy
    )


def test_stage_equals_one_document_at_a_time(documents, trained, tmp_path):
    folder = trained[0]
    texts = [document.text for document in documents[::4]] + ["", None, "x " * 500]
    series = daft.Series.from_pylist(texts).cast(daft.DataType.string())
    frame = daft.from_pydict(
        {
            "doc": [f"{i:032x}" for i in range(len(texts))],
            "language": ["en"] * len(texts),
            "text": series,
        }
    )
    rows = quality_roberta(frame, QualityRobertaConfig(model=str(folder)), tmp_path)
    rows = rows.sort("doc").to_pylist()
    tokens = RobertaTokens(folder, roberta.load(folder)[0], 64)
    ids = tokens.encode([text for text in texts if text is not None])
    logits = plain_forward(folder, ids)
    expected = iter(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    for row in rows:
        if row["text"] is None:
            assert row["reason"] == "quality_roberta_failed"
            continue
        score = next(expected)[1]
        assert row["quality_roberta_score"] == pytest.approx(score, abs=1e-4)
        if abs(score - 0.5) > 1e-3:
            assert row["reason"] == ("quality_roberta_low" if score < 0.5 else None)
    assert {row["reason"] for row in rows} == {
        None,
        "quality_roberta_low",
        "quality_roberta_failed",
    }


def test_the_schedule_warms_up_and_decays_to_zero():
    rates = [roberta_training.learning_rate(CONFIG, step, 100) for step in range(101)]
    np.testing.assert_allclose(rates[:6], 3e-3 * np.arange(1, 7) / 6)
    np.testing.assert_allclose(rates[6:], 3e-3 * np.linspace(1, 0, 95), atol=1e-18)
    unwarmed = CONFIG.model_copy(update={"warmup": 0.0})
    assert roberta_training.learning_rate(unwarmed, 0, 3) == pytest.approx(3e-3)


# ---- bad input ----


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bert"}, "model_type is 'bert'; only 'roberta' works"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": 5}, "dim 32 is not divisible by heads 5"),
        (
            {"intermediate_size": 81},
            r"intermediate.dense.weight has shape \[80, 32\]; .*\[81, 32\]",
        ),
        ({"num_hidden_layers": 3}, "tensor roberta.encoder.layer.2.attention.* is missing"),
        ({"num_hidden_layers": 1}, "tensor roberta.encoder.layer.1.* is unexpected"),
        ({"id2label": {"0": "a"}}, r"out_proj.weight has shape \[3, 32\]; .* \[1, 32\]"),
    ],
)
def test_config_that_does_not_fit(checkpoint, changes, message):
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        roberta.load(checkpoint)


def test_checkpoints_of_masked_language_models(checkpoint):
    tensors = load_file(checkpoint / WEIGHTS)
    for name in [name for name in tensors if name.startswith("classifier")]:
        del tensors[name]
    tensors["lm_head.bias"] = np.zeros(300, np.float32)
    tensors["roberta.pooler.dense.bias"] = np.zeros(32, np.float32)
    tensors["roberta.embeddings.position_ids"] = np.arange(98)[None]
    save_file(tensors, checkpoint / WEIGHTS)
    with pytest.raises(UserError, match="has no classifier .* fine-tune it first"):
        roberta.load(checkpoint)
    config, params = roberta.load(checkpoint, labels=5)
    assert params["out"]["kernel"].shape == (32, 5)
    recorded = roberta.load(GOLDEN)[1]
    np.testing.assert_array_equal(
        params["layers"][1]["up"]["kernel"], recorded["layers"][1]["up"]["kernel"]
    )
    assert not np.array_equal(params["dense"]["kernel"], recorded["dense"]["kernel"])


def test_absent_and_damaged_files(documents, config, trained, checkpoint, tmp_path):
    network, _ = roberta.load(checkpoint)
    with pytest.raises(UserError, match="max_length=97: .* positions for 3 to 96 tokens"):
        RobertaTokens(checkpoint, network, 97)
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: damaged or not a tokenizer"):
        RobertaTokens(checkpoint, network, 96)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: file not found"):
        train_roberta(
            documents, tmp_path / "o", config.model_copy(update={"base": str(checkpoint)})
        )
    with pytest.raises(UserError, match="none: file not found|config.json: file not found"):
        train_roberta(documents, tmp_path / "o", config.model_copy(update={"base": "/none"}))
    assert not (tmp_path / "o").exists()
    one_class = [document for document in documents if document.label == "no"]
    with pytest.raises(UserError, match="two labels or more; found: no"):
        train_roberta(one_class, tmp_path / "o", config)
    broken = Path(shutil.copytree(trained[0], tmp_path / "broken"))
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(UserError, match="model.safetensors: damaged, or of another training"):
        classifiers.load(broken)
    (broken / WEIGHTS).unlink()
    with pytest.raises(UserError, match="model.safetensors: file not found"):
        load_roberta(broken)


def test_a_diverging_loss_stops_with_a_hint(documents, config, trained, tmp_path):
    wild = config.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(UserError, match="diverged at step .* learning_rate below 1e.30 may help"):
        train_roberta(documents, tmp_path / "o", wild)
    assert not (tmp_path / "o").exists()
