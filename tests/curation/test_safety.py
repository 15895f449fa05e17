"""Dirty words against plain look-arounds; what is a word by itself; the reasons."""

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.safety import SafetyConfig, count_words, safety, word_lists
from llama3_jax.errors import UserError
from tests.curation import frames
from tests.curation.frames import document, run

LISTS = {"en": "fuck\nred wine\nc++\nRed\n", "zh": "坏话\nbad\n坏话很多\n", "ru": "блин\n"}
UNSPACED = ("zh",)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SafetyConfig:
    folder = tmp_path_factory.mktemp("lists")
    for language, words in LISTS.items():
        (folder / language).write_text(words, "utf-8")
    files = {language: str(folder / language) for language in LISTS}
    return SafetyConfig(
        files=files, max_count=1, max_share=0.1, allowed={}, exempt_sources=("clinic",)
    )


def reference(text: str, language: str) -> int:
    words = sorted(
        {one.lower() for one in LISTS.get(language, "").split("\n")} - {""},
        key=lambda w: (-len(w), w),
    )
    inside = [w for w in words if language in UNSPACED and not w.isascii()]
    alone = [
        rf"(?<![\p{{L}}\p{{M}}\p{{N}}_]){regex.escape(w)}(?![\p{{L}}\p{{M}}\p{{N}}_])"
        for w in words
        if w not in inside
    ]
    found = "|".join([*map(regex.escape, inside), *alone])
    return len(regex.findall(found, text, regex.IGNORECASE)) if found else 0


piece = st.sampled_from(
    ["fuck", "FUCK", "fucking", "Fuck!", "red", "wine", "red wine", "red  wine", "reds", "c++", "坏话", "坏话很多", "bad", "Bad坏话",
     "блин", "Блин", "блины", "ok", "你好", "a\u0301", "_", ".", "fuck_", "fuck\u0301"]
)  # fmt: skip
text = st.lists(piece | frames.words, max_size=12).flatmap(
    lambda found: st.sampled_from(["", " ", "\n", "-", ", "]).map(lambda glue: glue.join(found))
)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(text, st.sampled_from(["en", "zh", "ru", "xx"]), st.sampled_from(["web", "clinic"])), min_size=1, max_size=25),
    st.integers(1, 3),
)  # fmt: skip
def test_counts_are_those_of_plain_look_arounds(config, tmp_path_factory, cases, files):
    rows = [
        document(text=text, language=language, source=source, title=str(number))
        for number, (text, language, source) in enumerate(cases)
    ]
    out = run(safety, config, rows, tmp_path_factory.mktemp("safety"), files)
    for row in rows:
        got, count = out[row["doc"]], reference(row["text"], row["language"])
        share = count / max(count_words(row["text"]), 1)
        assert got["safety_dirty_words"] == count
        assert got["safety_dirty_share"] == share
        rejected = count > 1 and share > 0.1 and row["source"] != "clinic"
        assert got["reason"] == ("safety_dirty_words" if rejected else None)


def test_the_built_in_lists(tmp_path):
    lists = word_lists(SafetyConfig())
    assert {"en", "de", "fr", "zh", "ja", "ru", "hi", "ar"} <= set(lists)
    assert "fuck" in lists["en"] and "sex" not in lists["en"] and "挿入" not in lists["ja"]
    assert "sex" in word_lists(SafetyConfig(allow_okayish=False))["en"]
    rows = [
        document(text="Scunthorpe assesses classic cockpits in Essex.", title="clean"),
        document(text="fuck this shit, asshole", title="dirty"),
        document(text="You said fuck once. " + "The rest is about rivers. " * 9, title="one word"),
        document(text="セルの挿入 ダイアログが開きます。", language="ja", title="japanese"),
    ]
    out = run(safety, SafetyConfig(), rows, tmp_path / "a")
    assert {row["title"] for row in out.values() if row["reason"]} == {"dirty"}
    raffel = SafetyConfig(max_count=0, max_share=0.0)
    out = run(safety, raffel, rows, tmp_path / "b")
    assert {row["title"] for row in out.values() if row["reason"]} == {"dirty", "one word"}


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.txt"):
        word_lists(SafetyConfig(files={"en": str(tmp_path / "absent.txt")}))
