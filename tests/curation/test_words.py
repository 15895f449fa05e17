"""Words, their runs and hashes, against plain Python."""

import daft
import numpy as np
import pyarrow as pa
import regex
from daft import col
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation import words
from tests.curation import frames

_UNSPACED = regex.compile(f"({words.UNSPACED})")


def spaced(text: str) -> str:
    return regex.sub(r"\s+", " ", _UNSPACED.sub(r" \1 ", text)).strip(" ")


def normalized(text: str) -> str:
    return spaced(regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", text.lower()))


@settings(max_examples=20, deadline=None)
@given(st.lists(frames.texts, min_size=1, max_size=20))
def test_expressions_are_the_functions(texts):
    frame = daft.from_pydict({"text": texts})
    out = frame.select(
        words.spaced(col("text")).alias("s"), words.normalized(col("text")).alias("n")
    )
    out = out.to_pydict()
    assert out["s"] == [spaced(text) for text in texts]
    assert out["n"] == [normalized(text) for text in texts]


@settings(max_examples=40, deadline=None)
@given(st.lists(frames.texts, max_size=12), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_runs_and_hashes_are_those_of_the_strings(texts, length, skip, lines):
    separator = "\n" if lines else " "
    texts = texts if lines else [spaced(text) for text in texts]
    array = pa.array(texts, pa.string())[min(skip, len(texts)) :]  # arrays with an offset too
    pieces = words.Pieces(array, separator)
    cut = [text.split(separator) if text else [] for text in array.to_pylist()]
    assert np.diff(pieces.offsets).tolist() == [len(one) for one in cut]
    flat = array.to_pylist()
    data = "".join(flat).encode()
    found = [data[a:b].decode() for a, b in zip(pieces.starts, pieces.ends, strict=True)]
    assert found == [piece for one in cut for piece in one]
    runs = pieces.runs(length)
    expected = [
        separator.join(one[start : start + length])
        for one in cut for start in range(len(one) - length + 1)
    ]  # fmt: skip
    hashes = pieces.hashes(runs, length)
    assert len(expected) == len(hashes)
    # Equal where and only where the strings are.
    by_hash = dict(zip(hashes.tolist(), expected, strict=True))
    assert [by_hash[one] for one in hashes.tolist()] == expected
    assert len(set(expected)) == len(by_hash)
    # And the same in another batch.
    for one, found in list(zip(expected, hashes, strict=True))[:3]:
        if not lines:
            alone = words.Pieces(pa.array([one])).hashes(np.array([0]), one.count(" ") + 1)
            assert alone.tolist() == [found]
