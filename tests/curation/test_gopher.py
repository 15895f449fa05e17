"""Scores against plain Python, a document at a time; rules against a plain list of them."""

import collections
import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.gopher import GopherConfig, Override, Rules, gopher
from llama3_jax.curation.gopher_scores import DUPLICATED, NAMES, STOP_WORDS, TOP, scores
from llama3_jax.errors import UserError
from llama3_jax.schema import parse
from tests.curation import frames
from tests.curation.frames import document, run
from tests.curation.test_words import spaced


def is_letter(c: str) -> bool:
    if c < "\x80":
        return c.isalpha()
    return c >= "\u00c0" and not "\u2000" <= c <= "\u207f" and not "\u3000" <= c <= "\u303f"


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def again(pieces: list) -> list[bool]:
    return [piece in pieces[:number] for number, piece in enumerate(pieces)]


def reference(text: str) -> dict[str, float]:
    found = [word for word in spaced(text).split(" ") if word]
    size = sum(map(len, found))
    out = {
        "words": len(found),
        "mean_length": share(size, len(found)),
        "hash_ratio": text.count("#") / max(len(found), 1),
        "ellipsis_ratio": (text.count("...") + text.count("…")) / max(len(found), 1),
        "alphabetic_share": share(sum(any(map(is_letter, word)) for word in found), len(found)),
        "stop_words": len(set(STOP_WORDS) & set(found)),
        "sentences": len(re.findall(r"[.!?](?=[\x00-\x20]|\Z)|[。！？]", text)),
        "curly_brackets": text.count("{") + text.count("}"),
        "lorem_ipsum": len(re.findall("(?ai)lorem ipsum", text)),
    }
    for n in (*TOP, *DUPLICATED):
        runs = [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
        counts = collections.Counter(runs)
        if n in TOP:
            best = max(
                ((k, sum(map(len, run))) for run, k in counts.items() if k > 1), default=(0, 0)
            )
            out[f"top_{n}gram"] = min(share(best[0] * best[1], size), 1)
        else:
            covered = {at + k for at, old in enumerate(again(runs)) if old for k in range(n)}
            out[f"dup_{n}gram"] = share(sum(len(found[at]) for at in covered), size)
    blank = "".join(map(chr, range(33)))
    lines = [line for line in text.split("\n") if line.strip(blank)]
    bare = [line.strip(blank) for line in lines]
    for name, which in {
        "bullet": [one[0] in "•‣●◦▪∙■" or one[:2] in ("- ", "* ") for one in bare],
        "ellipsis": [one.endswith(("...", "…")) for one in bare],
        "terminal": [one.endswith((".", "!", "?", "。", "！", "？")) for one in bare],
        "code": [
            line[0] <= " " or one[-1] in "{};([=\\" or one.startswith(">>>")
            for line, one in zip(lines, bare, strict=True)
        ],
    }.items():
        out[f"{name}_share"] = share(sum(which), len(which))
    paragraphs = [[]]
    for line in text.split("\n"):
        if line.strip(blank):
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    paragraphs = ["\n".join(one) for one in paragraphs if one]
    for name, pieces in (("line", lines), ("paragraph", paragraphs)):
        old = again(pieces)
        out[f"dup_{name}"] = share(sum(old), len(old))
        repeated = sum(len(one) for one, seen in zip(pieces, old, strict=True) if seen)
        out[f"dup_{name}_characters"] = share(repeated, sum(map(len, pieces)))
    return out


piece = st.sampled_from(
    ["a b c d e", "the and of with", "# ...", "…", "• x", "- x", "* x", "-x", "done.", "好。", "！", "{ x };", ">>> f(x)",
     "  indented", "Lorem Ipsum", "x", "", " ", "—", "1 2 3", "a a a a a a a a", "end!", "\tq"]
)  # fmt: skip
text = st.lists(piece | frames.words, max_size=30).flatmap(
    lambda found: st.lists(st.sampled_from([" ", "\n", "\n\n"]), min_size=len(found), max_size=len(found)).map(
        lambda glue: "".join(a + b for a, b in zip(found, glue, strict=True))
    )
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(text, max_size=6), st.integers(0, 2))
def test_scores_are_those_of_one_document_in_plain_python(texts, skip):
    texts = texts[: 0 if skip > len(texts) else None]
    words = pa.array([spaced(one) for one in texts], pa.string())
    out = scores(pa.array(texts, pa.string()), words)
    assert set(out) == set(NAMES)
    for number, one in enumerate(texts):
        found = {name: out[name][number] for name in NAMES}
        assert found == pytest.approx(reference(one))


def plain_reason(text: str, rules: Rules) -> str | None:
    found = reference(text)
    for name, limit in rules:
        kind, score = name.split("_", 1)
        if limit is not None and (found[score] < limit if kind == "min" else found[score] > limit):
            return f"gopher_{name}"
    return None


PROSE = "The state of the rivers will be the subject of a report that the committee and its guests have read. "


@settings(max_examples=10, deadline=None)
@given(
    st.lists(text | text.map(lambda one: PROSE * 3 + one), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_reasons_are_the_first_broken_rule(tmp_path_factory, texts, files):
    rules = Rules(min_words=5, max_curly_brackets=0, min_sentences=1, min_terminal_share=0.12)
    config = GopherConfig(rules=rules, overrides=())
    rows = [document(text=one, title=str(number)) for number, one in enumerate(texts)]
    out = run(gopher, config, rows, tmp_path_factory.mktemp("gopher"), files)
    for row in rows:
        assert out[row["doc"]]["reason"] == plain_reason(row["text"], rules)


def test_code_math_and_other_languages_are_judged_by_their_own_rules(tmp_path):
    code = "".join(f"    value_{n} = function({n}, other[{n}]);\n" for n in range(40))
    chinese = "".join(chr(0x4E00 + (n * n) % 997) for n in range(300))
    cases = {
        "code": document(text=f"Example\n{code}"),
        "chinese": document(text=chinese, language="zh"),
        "german": document(text=" ".join(f"Wort{n}" for n in range(60)), language="de"),
        "no stop words": document(text=" ".join(f"word{chr(97 + n % 26)}{n}" for n in range(60))),
        "numbers": document(text=PROSE + " ".join(f"{n}9 {n * n}99" for n in range(99))),
        "tables": document(
            text=PROSE + " ".join(f"{n}9 {n * n}99" for n in range(99)), source="math"
        ),
        "log": document(text=PROSE * 9),
    }
    strict = GopherConfig(overrides=())
    mine = Override(sources=("math",), rules={"min_alphabetic_share": None})
    config = GopherConfig(overrides=(*GopherConfig().overrides, mine))
    out = run(gopher, config, list(cases.values()), tmp_path / "a", files=2)
    reasons = {name: out[row["doc"]]["reason"] for name, row in cases.items()}
    assert reasons == {
        "code": None, "chinese": None, "german": None, "tables": None,
        "no stop words": "gopher_min_stop_words", "numbers": "gopher_min_alphabetic_share",
        "log": "gopher_max_top_3gram",
    }  # fmt: skip
    assert out[cases["code"]["doc"]]["gopher_kind"] == "code"
    out = run(gopher, strict, list(cases.values()), tmp_path / "b")
    reasons = {name: out[row["doc"]]["reason"] for name, row in cases.items()}
    assert None not in [reasons[name] for name in ("code", "chinese", "german", "tables")]


def test_an_unknown_rule_is_named():
    with pytest.raises(UserError, match="max_dup_5gran"):
        parse(GopherConfig, {"overrides": [{"rules": {"max_dup_5gran": 1.0}}]})
