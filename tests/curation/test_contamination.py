"""Contamination by n-grams against a plain search, on random words and on real text."""

import inspect
import json
import textwrap

import daft
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation import contamination as module
from llama3_jax.curation.contamination import (
    Benchmark,
    ContaminationConfig,
    contamination,
    report,
    write_report,
)
from llama3_jax.curation.lexing import words
from llama3_jax.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Benchmark(path=str(path))


def run(texts, config, tmp_path):
    series = daft.Series.from_pylist(texts).cast(daft.DataType.string())
    frame = daft.from_pydict({"doc": [f"{i:032x}" for i in range(len(texts))], "text": series})
    return contamination(frame, config, tmp_path).collect()


def grams(text, n):
    found = words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


LINES = st.lists(st.lists(st.sampled_from("abcd!"), max_size=12).map(" ".join), max_size=8)


@given(LINES, LINES, LINES, st.integers(2, 4), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_against_a_plain_search(tmp_path_factory, first, second, texts, n, least):
    folder = tmp_path_factory.mktemp("benchmarks")
    sets = {"first": first, "second": second}
    config = ContaminationConfig(
        benchmarks={name: write(folder / f"{name}.jsonl", rows) for name, rows in sets.items()},
        ngram=n, min_grams=least,
    )  # fmt: skip
    if not texts:
        return
    if not all(any(grams(example, n) for example in rows) for rows in sets.values()):
        with pytest.raises(UserError, match="none of the .* examples"):
            run(texts, config, folder)
        return
    frame = run(texts, config, folder)
    rows = sorted(frame.to_pylist(), key=lambda row: row["doc"])
    wanted = {name: {g for e in rows_ for g in grams(e, n)} for name, rows_ in sets.items()}
    for row, text in zip(rows, texts, strict=True):
        shared = set(grams(text, n)) & (wanted["first"] | wanted["second"])
        assert len(row["contamination_grams"]) == len(shared)
        assert row["contamination_benchmarks"] == [b for b in sets if shared & wanted[b]]
        assert row["reason"] == ("contaminated" if len(shared) >= least else None)
    in_corpus = {g for text in texts for g in grams(text, n)}
    for name, found in report(frame, config).items():
        plain = [plain_share(example, n, in_corpus) for example in sets[name]]
        long = [share for share in plain if share is not None]
        assert found == {
            "examples": len(plain),
            "too_short": len(plain) - len(long),
            "touched": sum(share > 0 for share in long),
            "covered": pytest.approx(np.mean(long)),
            "documents": sum(bool(set(grams(text, n)) & wanted[name]) for text in texts),
        }


def plain_share(example, n, corpus):
    """Share of the words that lie in an n-gram of the corpus; None for an example too short."""
    found = grams(example, n)
    if not found:
        return None
    covered = {i + j for i, gram in enumerate(found) if gram in corpus for j in range(n)}
    return len(covered) / (len(found) + n - 1)


def test_real_text_with_other_case_and_punctuation(tmp_path):
    docs = [textwrap.dedent(inspect.getdoc(f)) for f in (json.dumps, json.loads, textwrap.wrap)]
    question = {"question": docs[0], "choices": [docs[2][:40], "b"], "answer": 1}
    short = {"question": "What is it?", "choices": [], "answer": 0}
    config = ContaminationConfig(
        benchmarks={"exam": write(tmp_path / "e.jsonl", [question, short])}
    )
    sentence = " ".join(words(docs[0])[20:33])
    texts = [
        docs[1],
        f"Someone wrote: {sentence.upper().replace(' ', ' -- ')}! And went.",
        " ".join(words(docs[0])[20:32]),  # twelve words are not thirteen
        docs[0] + docs[0],
        None,
        "",
    ]
    frame = run(texts, config, tmp_path)
    rows = sorted(frame.to_pylist(), key=lambda row: row["doc"])
    assert [row["reason"] for row in rows] == [
        None, "contaminated", None, "contaminated", "contamination_failed", None,
    ]  # fmt: skip
    assert len(rows[1]["contamination_grams"]) == 1
    assert len(rows[3]["contamination_grams"]) == len(set(grams(docs[0], 13)))
    write_report(tmp_path / "report.json", frame, config)
    found = json.loads((tmp_path / "report.json").read_text())["benchmarks"]["exam"]
    assert found["examples"] == 2 and found["too_short"] == 1 and found["touched"] == 1
    assert found["documents"] == 2
    assert 0.9 < found["covered"] < 1  # all of the question but its choices
    kept = run(texts, config.model_copy(update={"remove": False}), tmp_path).to_pylist()
    assert {row["reason"] for row in kept} == {None, "contamination_failed"}


def test_hashes_only_propose(tmp_path, monkeypatch):
    """With a hash that tells only half of the n-grams apart the result is the same."""
    config = ContaminationConfig(
        benchmarks={"a": write(tmp_path / "a.jsonl", ["one two three four"])}, ngram=3
    )
    texts = ["four three two one", "two three four", "one two three four", "one two"]
    module._index.cache_clear()
    monkeypatch.setattr(module, "_hashes", lambda rows: rows[:, 0].astype(np.uint64))
    rows = sorted(run(texts, config, tmp_path).to_pylist(), key=lambda row: row["doc"])
    assert [len(row["contamination_grams"]) for row in rows] == [0, 1, 2, 0]
    module._index.cache_clear()


def test_bad_input(tmp_path):
    def refused(config, match):
        with pytest.raises(UserError, match=match):
            run(["x"], config, tmp_path)

    good = write(tmp_path / "a.jsonl", [{"q": "one two three"}])
    refused(ContaminationConfig(benchmarks={}), "benchmarks is empty")
    absent = Benchmark(path=str(tmp_path / "none"))
    refused(ContaminationConfig(benchmarks={"a": absent}), "benchmarks.a: .*none not found")
    refused(ContaminationConfig(benchmarks={"a": good}), "none of the 1 examples .* has 13 words")
    field = Benchmark(path=good.path, fields=("q", "answer"))
    refused(ContaminationConfig(benchmarks={"a": field}), "a.jsonl:1: no field 'answer'; it has q")
    (tmp_path / "b.jsonl").write_text('{"q": 1}\n{"q"\n')
    damaged = Benchmark(path=str(tmp_path / "b.jsonl"))
    refused(ContaminationConfig(benchmarks={"b": damaged}), "b.jsonl:2: not a line of JSON")
