from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from conftest import random_documents, write_jsonl

from llama3_jax.data import pretokens
from llama3_jax.data.documents import Fields, in_holdout, plan_pieces
from llama3_jax.data.tokenizer import LLAMA3_PATTERN
from llama3_jax.errors import UserError


@pytest.fixture
def source(tmp_path) -> tuple[Path, dict[str, str]]:
    random = np.random.default_rng(0)
    documents = random_documents("d", 150, seed=1)
    for identifier in documents:
        codes = random.choice([0x20, 0x41, 0x61, 0x430, 0x4E00, 0x31, 0x0A, 0x2E], 40)
        documents[identifier] += "".join(chr(c + random.integers(0, 6)) for c in codes)
    return write_jsonl(tmp_path / "in.jsonl", documents), documents


def count(path: Path, piece_bytes=2_000, weights=(), holdout=0.0, keep=10**6, workers=1):
    pieces = plan_pieces([path], piece_bytes)
    return pretokens.count(pieces, Fields(), dict(weights), holdout, keep, workers)


def naive(documents: dict[str, str]) -> Counter:
    return Counter(p for text in documents.values() for p in regex.findall(LLAMA3_PATTERN, text))


def test_all_are_counted(source):
    path, documents = source
    counted = count(path)
    assert counted.counts == naive(documents)
    assert counted.distinct == len(counted.counts) and counted.left_out == 0
    size = sum(len(text.encode()) for text in documents.values())
    assert counted.languages == {"": {"documents": len(documents), "bytes": size}}


def test_held_out_documents_are_not(source):
    path, documents = source
    kept = {i: text for i, text in documents.items() if not in_holdout(i, 0.3)}
    assert 0 < len(kept) < len(documents)
    assert count(path, holdout=0.3).counts == naive(kept)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("keep", [1, 7, 40, 300])
def test_the_most_frequent_are_kept_whatever_spills(source, keep, workers):
    path, documents = source
    expected = naive(documents)
    best = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:keep]
    counted = count(path, keep=keep, workers=workers)
    assert counted.counts == dict(best)
    assert counted.distinct == len(expected)
    assert counted.left_out == max(len(expected) - keep, 0)
    kept = sum(number for _, number in best)
    assert counted.left_out_share == pytest.approx(1 - kept / expected.total())


def test_weights_multiply_a_languages_counts(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [("de", "drei eins"), ("fr", "deux"), ("", "drei deux"), ("xx", "nichts")]
    path.write_text("".join(f'{{"lang": "{lang}", "text": "{text}"}}\n' for lang, text in rows))
    counted = count(path, weights={"de": "2.5", "fr": "0.2", "xx": "0"})
    shares = {pretoken: number / counted.unit for pretoken, number in counted.counts.items()}
    assert counted.unit == 10
    assert shares == {"drei": 3.5, " eins": 2.5, "deux": 0.2, " deux": 1.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"de": "x"}, "--weights=de=x: not a number"),
        ({"de": "-1"}, "must be 0 or more"),
        ({"de": "0.0001"}, "three decimals at most"),
        ({"de": "1"}, "no document is of language 'de'; languages: none"),
        ({"": "0"}, "no text to train on"),
    ],
)
def test_bad_weights(source, weights, message):
    with pytest.raises(UserError, match=message):
        count(source[0], weights=weights)
