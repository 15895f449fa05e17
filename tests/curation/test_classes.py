"""Knowledge classes on real modules of three topics, and down-sampling against a plain reference."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import daft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3_jax.curation.classes import ClassesConfig, capped, classes
from llama3_jax.curation.fasttext_classifier import FastTextConfig, load_fasttext, train_fasttext
from llama3_jax.curation.labelled import Labelled
from llama3_jax.errors import UserError
from llama3_jax.schema import parse

TOPICS = ("asyncio", "email", "unittest")


@pytest.fixture(scope="module")
def documents():
    found = []
    for topic in TOPICS:
        for path in sorted((Path(os.__file__).parent / topic).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            found += [Labelled(text[i : i + 1500], topic) for i in range(0, len(text) - 800, 1500)]
    return found


@pytest.fixture(scope="module")
def model(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    config = FastTextConfig(dim=8, pair_buckets=0, epochs=25, holdout=0.3)
    assert train_fasttext(documents, folder, config).accuracy > 0.85
    return folder


@pytest.fixture
def frame(documents):
    texts = [document.text for document in documents]
    docs = [hashlib.md5(text.encode()).hexdigest() for text in texts]
    return daft.from_pydict({"doc": docs, "text": texts}).distinct("doc")


def plain(documents, model, keep):
    """doc -> (label, probability, reason), one document at a time."""
    classifier = load_fasttext(model)
    expected = {}
    for document in documents:
        doc = hashlib.md5(document.text.encode()).hexdigest()
        (row,) = classifier.probabilities([document.text])
        label = classifier.labels[row.argmax()]
        digest = hashlib.blake2b(doc.encode(), digest_size=8, person=b"classes").digest()
        dropped = int.from_bytes(digest, "big") / 2**64 >= keep[label]
        expected[doc] = (label, row.max(), "class_downsampled" if dropped else None)
    return expected


def test_explicit_shares(frame, documents, model, tmp_path):
    config = ClassesConfig(model=str(model), keep={"asyncio": 0.3, "email": 0.0})
    rows = classes(frame, config, tmp_path).to_pylist()
    expected = plain(documents, model, {"asyncio": 0.3, "email": 0.0, "unittest": 1.0})
    assert len(rows) == len(expected)
    for row in rows:
        found = row["classes_label"], row["classes_score"], row["reason"]
        assert found == expected[row["doc"]]
    kept = Counter(row["classes_label"] for row in rows if row["reason"] is None)
    all_of = Counter(row["classes_label"] for row in rows)
    assert kept["email"] == 0 and kept["unittest"] == all_of["unittest"]
    assert 0.2 < kept["asyncio"] / all_of["asyncio"] < 0.4
    # Fewer kept are a part of more kept.
    more = classes(frame, ClassesConfig(model=str(model), keep={"asyncio": 0.6}), tmp_path)
    still = {row["doc"] for row in more.to_pylist() if row["reason"] is None}
    assert {row["doc"] for row in rows if row["reason"] is None} <= still


def test_a_cap_on_the_share_of_characters(frame, documents, model, tmp_path):
    rows = classes(frame, ClassesConfig(model=str(model), max_share=0.4), tmp_path).to_pylist()
    sizes = Counter()
    for row in rows:
        sizes[row["classes_label"]] += len(row["text"])
    keep = capped(sizes, 0.4, dict.fromkeys(TOPICS, 1.0))
    assert min(keep.values()) < 1
    expected = plain(documents, model, keep)
    assert {row["doc"]: row["reason"] for row in rows} == {d: e[2] for d, e in expected.items()}
    for row in rows:
        assert row["classes_kept_share"] == keep[row["classes_label"]]
    assert len(rows) == len(expected)


@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 1000), min_size=1),
    st.floats(0.05, 1.0),
)
def test_capped_keeps_as_much_as_the_cap_allows(sizes, cap):
    keep = dict.fromkeys(sizes, 1.0)
    present = [size for size in sizes.values() if size]
    try:
        found = capped(sizes, cap, keep)
    except UserError:
        assert present and len(present) * cap < 1
        return
    if not present:
        assert found == keep
        return
    kept = {name: sizes[name] * share for name, share in found.items()}
    total = sum(kept.values())
    assert all(0 < share <= 1 for share in found.values())
    assert max(kept.values()) <= cap * total * (1 + 1e-9)
    # Bisection for the largest common limit under which the shares hold.
    low, high = 0.0, float(max(present))
    for _ in range(200):
        limit = (low + high) / 2
        cut = [min(size, limit) for size in present]
        low, high = (limit, high) if max(cut) <= cap * sum(cut) * (1 + 1e-12) else (low, limit)
    assert total == pytest.approx(sum(min(size, high) for size in present), rel=1e-6)


def test_a_document_without_text_is_named(model, tmp_path):
    text = daft.Series.from_pylist([None, "import asyncio"]).cast(daft.DataType.string())
    frame = daft.from_pydict({"doc": ["0" * 32, "1" * 32], "text": text})
    for config in (ClassesConfig(model=str(model)), ClassesConfig(model=str(model), max_share=1)):
        rows = classes(frame, config, tmp_path).sort("doc").to_pylist()
        assert [row["reason"] for row in rows] == ["classes_failed", None]


def test_bad_input(frame, model, tmp_path):
    with pytest.raises(UserError, match="label 'sports' is unknown .* has asyncio, email"):
        classes(frame, ClassesConfig(model=str(model), keep={"sports": 0.5}), tmp_path)
    with pytest.raises(UserError, match="max_share=0.2: 3 classes have text.* 0.333 or more"):
        classes(frame, ClassesConfig(model=str(model), max_share=0.2), tmp_path)
    with pytest.raises(UserError, match="keep: the share of 'arts' is 2.0; it must be from 0 to 1"):
        parse(ClassesConfig, {"model": "m", "keep": {"arts": 2}})
    with pytest.raises(UserError, match="no classifier here"):
        classes(frame, ClassesConfig(model=str(tmp_path)), tmp_path)
