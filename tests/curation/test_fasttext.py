"""fastText classifiers and their stage, on real code and prose of the standard library."""

import ast
import json
import math
import os
import zlib
from pathlib import Path

import daft
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation import classifiers, labelled
from llama3_jax.curation.agreement import agreement
from llama3_jax.curation.fasttext_classifier import (
    FastTextConfig,
    load_fasttext,
    train_fasttext,
)
from llama3_jax.curation.labelled import Labelled
from llama3_jax.curation.lexing import pieces, words
from llama3_jax.curation.page_features import feature_words
from llama3_jax.curation.quality_fasttext import QualityFastTextConfig, quality_fasttext
from llama3_jax.errors import UserError

CONFIG = FastTextConfig(dim=8, pair_buckets=5_000, epochs=10, holdout=0.3)


@pytest.fixture(scope="module")
def documents():
    """Functions' sources without docstrings, and docstrings."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("[a-h]*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            doc = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
            if not doc or len(doc) < 120:
                continue
            code = "\n".join(lines[node.body[0].end_lineno : node.end_lineno])
            found += [Labelled(doc, "prose"), Labelled(code[:3000], "code")]
    return [document for document in found if len(document.text) > 120]


@pytest.fixture(scope="module")
def trained(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return folder, train_fasttext(documents, folder, CONFIG)


def frame_of(texts, languages=None):
    return daft.from_pydict(
        {
            "doc": [f"{i:032x}" for i in range(len(texts))],
            "language": languages or ["en"] * len(texts),
            "text": texts,
        }
    )


def run(frame, config, tmp_path):
    rows = quality_fasttext(frame, config, tmp_path).to_pylist()
    return sorted(rows, key=lambda row: row["doc"])


def test_tells_code_from_prose_it_has_not_seen(documents, trained):
    folder, result = trained
    card = json.loads((folder / "classifier.json").read_text())
    assert (
        result.documents + card["trained_on"] + card["contradictory"]
        == len(set(documents)) - (card["contradictory"])
    )
    assert result.documents > 80
    assert result.accuracy > 0.95
    assert card["held_out"]["accuracy"] == result.accuracy
    # Labels that say nothing are not learnt: the figure is not one of memory.
    shuffled = np.random.default_rng(0).permutation([d.label for d in documents])
    noise = [Labelled(d.text, str(label)) for d, label in zip(documents, shuffled, strict=True)]
    assert train_fasttext(noise, folder.with_name("noise"), CONFIG).accuracy < 0.7


def test_training_is_the_same_in_any_order(documents, trained, tmp_path):
    again = train_fasttext(list(reversed(documents)), tmp_path, CONFIG)
    assert again == trained[1]
    for name in ("model.bin", "classifier.json"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.json", "model.bin"]


def known(model, text):
    """The features of a text that training kept, in a plain way."""
    found = pieces(text)
    pairs = [f"{a} {b}".encode() for a, b in zip(found, found[1:], strict=False)]
    features = found + [f"\N{SYMBOL FOR UNIT SEPARATOR}{zlib.crc32(p) % 5000}" for p in pairs]
    return [word for word in [*features, "</s>"] if model.get_word_id(word) >= 0]


def test_probabilities_are_those_of_a_plain_softmax(documents, trained):
    """One word at a time: the mean of its rows of the input matrix, then a softmax."""
    classifier = load_fasttext(trained[0])
    model = classifier._model
    texts = [document.text for document in documents[:20]]
    found = classifier.probabilities(texts)
    output = model.get_output_matrix().astype(np.float64)
    order = [int(name.removeprefix("__label__")) for name in model.get_labels()]
    for text, row in zip(texts, found, strict=True):
        hidden = np.mean([model.get_word_vector(word) for word in known(model, text)], axis=0)
        logits = output @ hidden.astype(np.float64)
        expected = np.exp(logits - logits.max())
        expected /= expected.sum()
        np.testing.assert_allclose(row[order], expected, atol=2e-3)  # fastText tabulates exp
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)


def test_stage_scores_rejects_and_keeps_every_row(documents, trained, tmp_path):
    folder = str(trained[0])
    texts = [document.text for document in documents[:300]] + ["", None, "\0 __label__0 </s> x"]
    config = QualityFastTextConfig(model=folder, label="prose", threshold=0.5)
    rows = run(frame_of(texts), config, tmp_path)
    classifier = load_fasttext(trained[0])
    column = classifier.labels.index("prose")
    assert [row["text"] for row in rows] == texts
    for row in rows:
        if row["text"] is None:
            assert row["quality_fasttext_score"] is None
            assert row["reason"] == "quality_fasttext_failed"
            continue
        expected = classifier.probabilities([row["text"]])[0, column]
        assert row["quality_fasttext_score"] == expected
        assert row["reason"] == ("quality_fasttext_low" if expected < 0.5 else None)
    assert len({row["reason"] for row in rows}) == 3


def test_thresholds_of_languages(documents, trained, tmp_path):
    text = documents[0].text
    config = QualityFastTextConfig(
        model=str(trained[0]), label="prose", threshold=0.0, thresholds={"de": 1.0}
    )
    rows = run(frame_of([text, text], ["de", "en"]), config, tmp_path)
    assert [row["reason"] for row in rows] == ["quality_fasttext_low", None]


def test_a_document_that_fails_the_classifier_costs_no_neighbour(trained):
    class Fragile:
        labels = ("a", "b")

        def probabilities(self, texts):
            if "poison" in texts:
                raise RuntimeError("boom")
            return np.full((len(texts), 2), 0.5)

    import pyarrow

    texts = pyarrow.array(["x", "poison", None, "y"])
    found = classifiers.probabilities(Fragile(), texts)[:, 0].tolist()
    assert [None if math.isnan(value) else value for value in found] == [0.5, None, None, 0.5]


def test_bad_input_is_one_clear_line(documents, trained, tmp_path):
    one_class = [document for document in documents if document.label == "code"]
    with pytest.raises(UserError, match="two labels or more; found: code"):
        train_fasttext(one_class, tmp_path / "a", CONFIG)
    with pytest.raises(UserError, match="'rare' has no"):
        train_fasttext([*documents, Labelled("only one", "rare")], tmp_path / "b", CONFIG)
    with pytest.raises(UserError, match="no classifier here"):
        run(frame_of(["x"]), QualityFastTextConfig(model=str(tmp_path / "none")), tmp_path)
    with pytest.raises(UserError, match="'positive' is unknown .* has code, prose"):
        run(frame_of(["x"]), QualityFastTextConfig(model=str(trained[0])), tmp_path)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "classifier.json").write_bytes((trained[0] / "classifier.json").read_bytes())
    with pytest.raises(UserError, match="model.bin: file not found"):
        load_fasttext(damaged)
    (damaged / "model.bin").write_bytes((trained[0] / "model.bin").read_bytes()[:100])
    with pytest.raises(UserError, match="model.bin: damaged, or of another training"):
        load_fasttext(damaged)
    (damaged / "classifier.json").write_text("[1")
    with pytest.raises(UserError, match="damaged, not a JSON object"):
        classifiers.load(damaged)
    (damaged / "classifier.json").write_text('{"kind": "forest"}')
    with pytest.raises(UserError, match="kind is 'forest'; known: fasttext, roberta"):
        classifiers.load(damaged)


def test_labelled_files(tmp_path):
    positive, negative, both = (tmp_path / name for name in ("p.jsonl", "n.txt", "b.jsonl"))
    positive.write_text('{"text": "good one"}\n{"text": " "}\n')
    negative.write_text("bad one")
    both.write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": ""}\n')
    found = labelled.read_files({"+": [positive], "-": [negative]}, 4)
    assert found == [Labelled("good", "+"), Labelled("bad ", "-")]
    assert labelled.read_labels([both], 100) == [Labelled("x", "a")]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="label '-': no document with text"):
        labelled.read_files({"+": [positive], "-": [empty]}, 4)
    with pytest.raises(UserError, match="no document has a label in column 'label'"):
        labelled.read_labels([positive], 4)


@given(st.lists(st.tuples(st.text("abc", max_size=3), st.sampled_from("xyz")), max_size=60))
@settings(max_examples=60, deadline=None)
def test_split_against_a_plain_one(pairs):
    documents = [Labelled(*pair) for pair in pairs]
    by_text = {}
    for text, label in pairs:
        by_text.setdefault(text, set()).add(label)
    clear = {(text, *labels) for text, labels in by_text.items() if len(labels) == 1}
    try:
        found = labelled.split(documents, 0.5)
    except UserError:
        return
    assert {*found.train, *found.held_out} == clear
    assert len(found.train) + len(found.held_out) == len(clear)
    assert found.contradictory == len(by_text) - len(clear)
    assert found == labelled.split(documents[::-1] + documents, 0.5)


def test_agreement_against_counting():
    random = np.random.default_rng(1)
    reference = random.choice(["a", "b", "c"], 200, p=[0.6, 0.3, 0.1]).tolist()
    other = [r if random.random() < 0.7 else str(random.choice(["a", "b"])) for r in reference]
    found = agreement(reference, other)
    pairs = list(zip(reference, other, strict=True))
    same = sum(r == o for r, o in pairs) / 200
    chance = sum(reference.count(x) * other.count(x) for x in "abc") / 200**2
    assert found.accuracy == pytest.approx(same)
    assert found.kappa == pytest.approx((same - chance) / (1 - chance))
    for i, x in enumerate("abc"):
        assert found.confusion[i] == tuple(pairs.count((x, y)) for y in "abc")
        assert found.recall[i] == pytest.approx(pairs.count((x, x)) / reference.count(x))
        given_x = other.count(x)
        assert found.precision[i] == pytest.approx(pairs.count((x, x)) / given_x if given_x else 0)
    assert "200 documents" in str(found)
    assert agreement(["a"], ["a"]).kappa is None
    with pytest.raises(UserError, match="no document"):
        agreement([], [])


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_words_are_the_pieces_without_signs(text):
    found = pieces(text)
    assert words(text) == [piece for piece in found if regex.search(r"[\p{L}\p{M}\p{N}]", piece)]
    assert not any(piece.isspace() or "__label__" in piece or piece == "</s>" for piece in found)
    # ASCII has a path of its own: a foreign word after it must not change what comes before.
    ascii_only = text.encode("ascii", "ignore").decode()
    assert pieces(ascii_only + " é")[:-1] == pieces(ascii_only)
    assert words(ascii_only + " é")[:-1] == words(ascii_only)


def test_words_of_scripts():
    assert words("Don't STOP हिन्दी 日本語 ไทย") == [
        "don", "t", "stop", "हिन्दी", "日", "本", "語", "ไ", "ท", "ย",
    ]  # fmt: skip
    # A radical of an index is of the script Han, but a symbol.
    assert (words("日⺀本"), pieces("日⺀本")) == (["日", "本"], ["日", "⺀", "本"])
    assert pieces("a_b </s>") == ["a", "_", "b", "<", "/", "s", ">"]


def test_features_tell_kinds_of_pages_apart():
    code = "Use it so:\n\n    import os\n    for x in y:\n        print(x)\n    z = f(x);\n"
    proof = "Suppose x > 0. Then $x^2 > 0$, hence $x^2 + 1 > 1$. It follows that \\frac{1}{x} > 0."
    plain = "We walked along the river and had lunch in the village. The weather was fine."

    def level(text, name):
        (found,) = [w for w in feature_words(text) if w.startswith(f"@{name}=")]
        return int(found[-1])

    assert level(code, "code_lines") > max(level(proof, "code_lines"), level(plain, "code_lines"))
    for name in ("math", "deduction"):
        assert level(proof, name) > max(level(code, name), level(plain, name))
    assert not set(feature_words(plain)) & set(pieces(" ".join(feature_words(plain))))
    assert all(0 <= int(w[-1]) <= 7 for w in feature_words("")), feature_words("")
