"""Parts of a stage: what is counted of their texts."""

import pyarrow.parquet as pq

from llama3_jax.curation import engine, parts
from tests.curation.frames import document, frame


class Failing:
    """A tokenizer of one token a character that fails on some texts."""

    def encode(self, text: str) -> list[int]:
        if "fails" in text:
            raise ValueError("tiktoken failed")
        return [0] * len(text)


def test_a_text_on_which_the_tokenizer_fails_is_rejected_and_the_others_are_kept(
    tmp_path, monkeypatch
):
    engine.start()
    monkeypatch.setattr(parts, "_tokenizer", lambda path: Failing())
    rows = [document(text=text) for text in ("one", "it fails", "three", "gone")]
    reasons = {row["doc"]: "short" if row["text"] == "gone" else None for row in rows}
    data = frame([row | {"reason": reasons[row["doc"]]} for row in rows], tmp_path / "in")
    counts = parts.write(data, "stage", tmp_path, 1, "tokenizer")
    kept = pq.read_table(tmp_path / "kept").to_pylist()
    rejected = pq.read_table(tmp_path / "rejected").to_pylist()
    assert {row["text"]: row["tokens"] for row in kept} == {"one": 3, "three": 5}
    assert {row["text"]: row["reason"] for row in rejected} == {
        "it fails": "not_tokenized",
        "gone": "short",
    }
    assert sum(row["documents"] for row in counts) == 4
