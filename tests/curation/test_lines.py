"""Repeated lines go: against a plain count, whatever the partitioning, and nothing else changes."""

import collections

import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.lines import LinesConfig, lines
from tests.curation import frames
from tests.curation.frames import document, run


def normalized(line: str) -> str:
    return regex.sub(r"\p{N}", "0", regex.sub(r"[^\p{L}\p{M}\p{N}]+", "", line.lower()))


def expected(rows: list[dict], config: LinesConfig) -> dict[str, tuple[str, int]]:
    """(text, lines removed) of each document; one bucket."""
    counts = collections.Counter()
    for row in rows:
        found = [normalized(line) for line in row["text"].split("\n")]
        found = found if config.count == "occurrences" else set(found)
        group = row["language"] if config.within_language else ""
        counts.update((group, line) for line in found if line)
    out = {}
    for row in rows:
        group = row["language"] if config.within_language else ""
        split = row["text"].split("\n")
        gone = [counts[group, normalized(line)] > config.most for line in split]
        if row["source"] in config.exempt_sources or not any(gone):
            out[row["doc"]] = row["text"], 0
            continue
        kept, open_ = [], True
        for line, lost in zip(split, gone, strict=True):
            if lost:
                open_ = True
            elif line == "" and open_ and (not kept or kept[-1] == ""):
                continue
            else:
                kept.append(line)
                open_ = open_ and line == ""
        out[row["doc"]] = "\n".join(kept).strip("\n"), sum(gone)
    return out


def check(rows, config, folder, files=1):
    out = run(lines, config, rows, folder, files)
    for doc, (text, removed) in expected(rows, config).items():
        assert (out[doc]["text"], out[doc]["lines_removed"]) == (text, removed)
        assert out[doc]["reason"] == ("lines_empty" if removed and not text else None)
    return out


repeated = st.sampled_from(
    ["Home", "HOME!", "  home", "Page 1", "page 27", "}", "---", "", "中文", "a b", "x"]
)
text = st.lists(repeated | frames.line, max_size=14).map("\n".join)
row = st.tuples(text, st.sampled_from(["en", "de"]), st.sampled_from(["web", "code"]))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(row, min_size=1, max_size=12), st.integers(1, 3), st.sampled_from(["occurrences", "documents"]),
    st.booleans(), st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_lines_are_those_of_a_plain_count(
    tmp_path_factory, cases, most, count, within, exempt, files
):
    rows = [
        document(text=text, language=language, source=source, title=str(number))
        for number, (text, language, source) in enumerate(cases)
    ]
    config = LinesConfig(most=most, count=count, within_language=within,
                         exempt_sources=("code",) if exempt else ())  # fmt: skip
    check(rows, config, tmp_path_factory.mktemp("lines"), files)


def test_seven_documents_lose_what_six_keep_and_order_stays(tmp_path):
    body = "\n".join(
        f"Sentence number {word} is here." for word in "alpha beta gamma delta".split()
    )
    own = [f"Only {chr(97 + n) * 3}" for n in range(7)]
    rows = [document(text=f"Menu {n}\n\n{own[n]}\n\nFooter {n}!\n{body}") for n in range(7)]
    out = check(rows, LinesConfig(), tmp_path / "seven")
    assert [out[row["doc"]]["text"] for row in rows] == own
    assert {row["lines_removed"] for row in out.values()} == {6}
    out = check(rows[:6], LinesConfig(), tmp_path / "six")
    assert all(row["lines_removed"] == 0 for row in out.values())


def test_a_bucket_counts_for_itself(tmp_path):
    rows = [
        document(text=f"same\nown {chr(97 + n % 26)}{chr(97 + n // 26)}", title=str(n))
        for n in range(60)
    ]
    whole = run(lines, LinesConfig(), rows, tmp_path / "whole")
    assert {row["lines_removed"] for row in whole.values()} == {1}
    # 60 documents in 20 buckets: about 3 each, so the line stays in most.
    cut = run(lines, LinesConfig(bucket_documents=3), rows, tmp_path / "cut", files=3)
    assert cut == run(lines, LinesConfig(bucket_documents=3), rows, tmp_path / "again")
    assert sum(row["lines_removed"] for row in cut.values()) < 30
