"""Near-duplicates: against all pairs compared in plain Python, and on edited real sentences."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation import minhash as stage
from llama3_jax.curation.minhash import MinhashConfig, minhash
from tests.curation.frames import document, frame, run
from tests.curation.test_components import union_find
from tests.curation.test_words import normalized

CJK = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


def shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = normalized(text).split(" ")
    if len(found) < ngram:
        return {tuple(found)}
    return {tuple(found[start : start + ngram]) for start in range(len(found) - ngram + 1)}


def jaccard(one: str, other: str, ngram: int) -> float:
    one, other = shingles(one, ngram), shingles(other, ngram)
    return len(one & other) / len(one | other)


def expected(rows: list[dict], config: MinhashConfig) -> dict[str, str]:
    """The survivor of each document in a group, by all pairs."""
    rows = [row for row in rows if normalized(row["text"])]
    pairs = [
        (one["doc"], other["doc"])
        for one, other in itertools.combinations(rows, 2)
        if one["language"] == other["language"]
        and jaccard(one["text"], other["text"], config.ngram) >= config.similarity
    ]
    by_doc = {row["doc"]: row for row in rows}
    groups: dict[str, list] = {}
    for doc, component in union_find(pairs).items():
        groups.setdefault(component, []).append(by_doc[doc])
    best = {}
    for group in groups.values():
        keep = max(group, key=lambda row: (row["time"], len(row["text"]), row["doc"]))
        best |= {row["doc"]: keep["doc"] for row in group}
    return best


def edited(tokens: list[str], share: float, seed: int, vocabulary) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(vocabulary) if rng.random() < share else token for token in tokens]


def corpus(seed: int) -> list[dict]:
    """Families of a text and its edits, in words and in characters; and strangers."""
    rng = random.Random(seed)
    latin = [f"w{number}" for number in range(500)]
    rows = [
        document(text="", title="e1"),
        document(text="?! ...", title="e2"),
        document(text="!!", title="e3"),
    ]
    for family in range(6):
        vocabulary, glue = (latin, " ") if family % 2 else (CJK, "")
        tokens = rng.choices(vocabulary, k=150)
        for number, share in enumerate([0, 0, 0.01, 0.01, 0.9]):
            text = glue.join(edited(tokens, share, rng.random(), vocabulary))
            rows.append(
                document(text=text, time=f"{2020 + rng.randrange(3)}", title=f"{family} {number}",
                         language="zh" if glue == "" else "en")
            )  # fmt: skip
    rows.append(rows[3] | {"language": "xx", "doc": "f" * 32})  # a twin in another language
    return rows


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("edges_in_memory", [10**9, 0], ids=["scipy", "rounds"])
def test_survivors_are_those_of_all_pairs(tmp_path, seed, edges_in_memory):
    # 40 bands of 3 find any pair of similarity 0.7 with probability 1 - 5e-8.
    config = MinhashConfig(bands=40, rows=3, edges_in_memory=edges_in_memory)
    rows = corpus(seed)
    best = expected(rows, config)
    assert len(set(best.values())) >= 6
    out = run(minhash, config, rows, tmp_path, files=1 + 2 * seed)
    for row in rows:
        survivor = best.get(row["doc"], row["doc"])
        got = out[row["doc"]]
        assert got["minhash_survivor"] == (None if survivor == row["doc"] else survivor)
        assert got["reason"] == (None if survivor == row["doc"] else "minhash_near_duplicate")


def test_sources_come_before_each_other_as_preferred(tmp_path):
    text = " ".join(CJK)
    rows = [
        document(text=text, source=source, time=time)
        for source, time in (("copies", "2024"), ("originals", "2022"), ("books", "2023"))
    ]
    for prefer, wins in (((), 0), (("originals", "books"), 1), (("books",), 2)):
        config = MinhashConfig(prefer=prefer)
        out = run(minhash, config, rows, tmp_path / "-".join(["x", *prefer]))
        kept = [row["doc"] for row in out.values() if row["reason"] is None]
        assert kept == [rows[wins]["doc"]]


def test_rules_of_survival_and_languages_by_config(tmp_path):
    text = " ".join(f"w{n}" for n in range(60))
    rows = [
        document(text=text + " and more", time="2020", title="long"),
        document(text=text, time="2021-01-01T00:00:00Z", title="new"),
        document(text=text, time="2022", language="de", title="german"),
    ]

    def survivors(config, folder):
        out = run(minhash, config, rows, tmp_path / folder)
        return {row["title"] for row in out.values() if row["reason"] is None}

    assert survivors(MinhashConfig(), "a") == {"new", "german"}
    assert survivors(MinhashConfig(survivor="longest"), "b") == {"long", "german"}
    assert survivors(MinhashConfig(within_language=False), "c") == {"german"}


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), min_size=2, max_size=14),
    st.integers(1, 4),
)
def test_short_texts(tmp_path_factory, texts, ngram):
    """Any texts from four words: where the similarity is 1 the bands cannot miss."""
    config = MinhashConfig(ngram=ngram, similarity=1.0, bands=2)
    rows = [document(text=text, title=str(number)) for number, text in enumerate(texts)]
    best = expected(rows, config)
    out = run(minhash, config, rows, tmp_path_factory.mktemp("short"), files=2)
    for row in rows:
        survivor = best.get(row["doc"], row["doc"])
        assert (out[row["doc"]]["minhash_survivor"] or row["doc"]) == survivor


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_bands_find_the_share_that_the_formula_says(tmp_path, share):
    """Candidates among 400 edited pairs, without verification: 1 - (1 - J^rows)^bands, to 4 sigma."""
    config, rng = MinhashConfig(bands=14, rows=8, verify=False), random.Random(5)
    vocabulary = [f"w{number}" for number in range(5000)]
    rows, probability = [], []
    for family in range(400):
        tokens = rng.choices(vocabulary, k=200)
        twin = edited(tokens, share, family, vocabulary)
        rows += [
            document(text=" ".join(one), title=f"{family} {n}")
            for n, one in enumerate([tokens, twin])
        ]
        similarity = jaccard(rows[-1]["text"], rows[-2]["text"], config.ngram)
        probability.append(1 - (1 - similarity**config.rows) ** config.bands)
    data = frame(rows, tmp_path / "in", 2)
    stage.write_bands(data, config, stage.components.fresh(tmp_path / "bands"))
    found = stage.find_edges(data, config, tmp_path).count_rows()
    probability = np.array(probability)
    assert (
        abs(found - probability.sum()) <= 4 * np.sqrt((probability * (1 - probability)).sum()) + 1
    )


def template_family(pairs: int, seed: int, template: int, name: str) -> list[tuple[dict, dict]]:
    """Pages of one template, in pairs whose contents differ by four of 126 words; J is 0.73."""
    rng = random.Random(seed)
    vocabulary = [f"{name}{number}" for number in range(20_000)]
    frame_ = rng.choices(vocabulary, k=template)
    made = []
    for number in range(pairs):
        content = rng.choices(vocabulary, k=130 - template)
        twin = list(content)
        for at in range(4, len(content), len(content) // 4):
            twin[at] = rng.choice(vocabulary)
        made.append(
            tuple(
                document(text=" ".join([*frame_, *words]), title=f"{name} {number} {which}")
                for which, words in enumerate((content, twin))
            )
        )
    return made


@pytest.mark.parametrize("template", [0, 90])
def test_pairs_in_a_family_of_one_template_are_found_as_the_formula_says(tmp_path, template):
    """400 pairs, alone or among 800 siblings whose similarity is about 0.5, to 0.01."""
    config = MinhashConfig()
    made = template_family(400, 7, template, "w")
    rows = [row for pair in made for row in pair]
    assert len({row["doc"] for row in rows}) == 800
    similarity = [jaccard(one["text"], other["text"], config.ngram) for one, other in made]
    assert 0.7 <= min(similarity) and max(similarity) < 0.8
    expected = np.mean([1 - (1 - j**config.rows) ** config.bands for j in similarity])
    data = frame(rows, tmp_path / "in", 2)
    stage.write_bands(data, config, stage.components.fresh(tmp_path / "bands"))
    found = {tuple(row.values()) for row in stage.find_edges(data, config, tmp_path).to_pylist()}
    share = np.mean([tuple(sorted(row["doc"] for row in pair)) in found for pair in made])
    assert share >= expected - 0.01


def test_candidates_grow_with_the_documents_and_not_with_their_square(tmp_path):
    config, counts = MinhashConfig(), {}
    for pairs in (200, 800):
        rows = [row for pair in template_family(pairs, 3, 95, "w") for row in pair]
        folder = tmp_path / str(pairs)
        data = frame(rows, folder / "in", 2)
        stage.write_bands(data, config, stage.components.fresh(folder / "bands"))
        counts[pairs] = stage.find_candidates(data, config, folder).count_rows()
    assert counts[800] < 1.5 * 4 * counts[200]
    assert counts[800] < 40 * 1600


def test_a_thousand_copies_are_compared_with_one(tmp_path):
    text = " ".join(f"w{number}" for number in range(50))
    rows = [document(text=text, title=str(number)) for number in range(1_000)]
    data = frame(rows, tmp_path / "in", 2)
    config = MinhashConfig()
    stage.write_bands(data, config, stage.components.fresh(tmp_path / "bands"))
    pairs = stage.find_candidates(data, config, tmp_path).to_pylist()
    least = min(row["doc"] for row in rows)
    assert len(pairs) == 999 and {row["low"] for row in pairs} == {least}


def test_what_a_killed_run_left_changes_nothing(tmp_path):
    rows = corpus(0)
    once = run(minhash, MinhashConfig(), rows, tmp_path)
    again = run(minhash, MinhashConfig(), rows, tmp_path)
    assert once == again
    fewer = run(minhash, MinhashConfig(bands=3), rows[:9], tmp_path)
    assert fewer == run(minhash, MinhashConfig(bands=3), rows[:9], tmp_path / "fresh")
