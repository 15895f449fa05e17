"""The quality cut of each language against sorting in plain Python."""

import math
from collections import defaultdict

import daft
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.language_quality import LanguageQualityConfig, language_quality
from llama3_jax.errors import UserError
from llama3_jax.schema import parse

SCORES = st.one_of(
    st.none(),
    st.floats(-1e6, 1e6),
    st.sampled_from([0.0, -0.0, 0.5, 0.9999, 0.99991, 1.0, math.nan]),
)
ROWS = st.lists(st.tuples(st.sampled_from(["en", "de", ""]), SCORES), max_size=60)


def run(rows, tmp_path, **config):
    frame = daft.from_pydict(
        {
            "doc": [f"{i * 7919 % 1009:032x}" for i in range(len(rows))],
            "language": [language for language, _ in rows],
            "s": daft.Series.from_pylist([score for _, score in rows]).cast(
                daft.DataType.float64()
            ),
        }
    )
    config = LanguageQualityConfig(score="s", **config)
    return language_quality(frame, config, tmp_path).to_pylist()


@given(ROWS, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.sampled_from([0, 5]))
@settings(max_examples=40, deadline=None)
def test_against_sorting(tmp_path_factory, rows, keep, least):
    if not rows:
        return
    found = run(rows, tmp_path_factory.getbasetemp(), keep=keep, min_documents=least)
    assert len(found) == len(rows)
    groups = defaultdict(list)
    for row in found:
        if row["s"] is None or math.isnan(row["s"]):
            assert row["reason"] == "language_quality_unscored"
            assert row["language_quality_rank"] is None
        else:
            groups[row["language"]].append(row)
    for group in groups.values():
        ordered = sorted(group, key=lambda row: (row["s"], row["doc"]))
        lost = math.floor(round(len(group) * (1 - keep), 6)) if len(group) >= least else 0
        reasons = [row["reason"] for row in ordered]
        assert reasons == ["language_quality_low"] * lost + [None] * (len(group) - lost)
        for row in group:
            below = sum(other["s"] < row["s"] for other in group)
            near = sum(
                other["s"] != row["s"]
                and math.isclose(other["s"], row["s"], rel_tol=6e-4, abs_tol=1e-37)
                for other in group
            )
            assert below - near <= row["language_quality_rank"] * len(group) + 1e-6
            assert row["language_quality_rank"] * len(group) <= below + 1e-6


def test_languages_have_their_own_shares(tmp_path):
    random = np.random.default_rng(0)
    rows = [("en", float(x)) for x in random.random(400)]
    rows += [("sw", float(x) / 10) for x in random.random(200)]
    found = run(rows, tmp_path, keep=0.25, keep_of={"sw": 0.5})
    kept = [row for row in found if row["reason"] is None]
    assert sum(row["language"] == "en" for row in kept) == 100
    assert sum(row["language"] == "sw" for row in kept) == 100
    assert min(row["s"] for row in kept if row["language"] == "en") > 0.6
    ranks = {row["s"]: row["language_quality_rank"] for row in found if row["language"] == "en"}
    scores = sorted(ranks)
    np.testing.assert_allclose([ranks[s] for s in scores], np.arange(400) / 400, atol=0.005)


def test_works_on_files_with_statistics(tmp_path):
    """Comparisons on parquet that carries statistics have lost rows in Daft."""
    frame = daft.from_pydict(
        {"doc": [f"{i:032x}" for i in range(200)], "language": ["en"] * 200, "s": [0.5] * 200}
    )
    frame.write_parquet(str(tmp_path / "in"))
    frame = daft.read_parquet(str(tmp_path / "in" / "*.parquet"))
    found = language_quality(frame, LanguageQualityConfig(score="s", keep=0.25), tmp_path)
    rows = sorted(found.to_pylist(), key=lambda row: row["doc"])
    assert [row["reason"] is None for row in rows] == [False] * 150 + [True] * 50


def test_bad_input(tmp_path):
    frame = daft.from_pydict({"doc": ["0" * 32], "language": ["en"], "text": ["x"]})
    with pytest.raises(UserError, match="quality_fasttext_score: there is no such column"):
        language_quality(frame, LanguageQualityConfig(), tmp_path)
    with pytest.raises(UserError, match="score=text: of type String, not a number"):
        language_quality(frame, LanguageQualityConfig(score="text"), tmp_path)
    with pytest.raises(UserError, match="keep: .*less than or equal to 1"):
        parse(LanguageQualityConfig, {"keep": 20})
