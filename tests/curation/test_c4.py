"""C4's rules for lines: against a plain list of them, and on text that they must leave alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llama3_jax.curation.c4 import C4Config, c4
from tests.curation import frames
from tests.curation.frames import document, run

PAGE = """The river
Please enable JavaScript to see this page.
The river rises in the hills.[1] It has two arms.[citation needed]

By going on you accept our use of cookies and the Privacy Policy.
It ends in the sea
>>> print("javascript")
    a = b[1]
Was it deep?"""


def of(text: str, folder, source: str = "web", **config) -> tuple[str, int, str | None]:
    row = document(text=text, source=source)
    out = run(c4, C4Config(**config), [row], folder)[row["doc"]]
    return out["text"], out["c4_lines"], out["reason"]


def test_notices_go_and_the_page_stays(tmp_path):
    text, gone, reason = of(PAGE, tmp_path / "a")
    left = [line for line in PAGE.split("\n") if "enable" not in line and "cookies" not in line]
    assert text.split("\n") == left
    assert (gone, reason) == (2, None)
    assert of(PAGE, tmp_path / "b", javascript=False, policies=False) == (PAGE, 0, None)
    assert of(PAGE, tmp_path / "c", "code", exempt_sources=("code",)) == (PAGE, 0, None)


def test_marks_of_citations_go_from_prose_alone(tmp_path):
    text, _, _ = of(PAGE, tmp_path, citations=True)
    assert "hills. It has two arms.\n" in text and "a = b[1]" in text


def test_sentences_and_lengths(tmp_path):
    text, gone, _ = of(PAGE, tmp_path / "a", terminal=True, citations=True, javascript=False)
    assert "It ends in the sea" not in text and "Was it deep?" in text and "a = b[1]" in text
    assert gone == 3  # the title, the policy, the line without a full stop
    text, _, _ = of(PAGE, tmp_path / "b", min_words=3)
    assert not text.startswith("The river\n") and "Was it deep?" in text
    assert of("水" * 2000 + "\n河很深", tmp_path / "c", min_words=3)[1] == 0
    assert of("x" * 1001, tmp_path / "d") == ("", 1, "c4_empty")
    assert of("x" * 1000, tmp_path / "e") == ("x" * 1000, 0, None)


line = frames.line | st.sampled_from(
    ["See our privacy policy.", "JAVASCRIPT", "one two three", "End.", "{", "  x = 1", "", " "]
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(line, max_size=9), min_size=1, max_size=5))
def test_what_stays_are_lines_of_the_document_in_their_order(tmp_path_factory, texts):
    rows = [
        document(text="\n".join(lines), title=str(number)) for number, lines in enumerate(texts)
    ]
    out = run(c4, C4Config(), rows, tmp_path_factory.mktemp("c4"), files=2)
    for row, lines in zip(rows, texts, strict=True):
        made = out[row["doc"]]
        bad = [
            one
            for one in lines
            if ("javascript" in one.lower() or "privacy policy" in one.lower())
            and not (one[0] <= " " or one.rstrip()[-1] in "{};([=\\")
        ]
        assert made["c4_lines"] == len(bad)
        if not bad:
            assert made["text"] == row["text"]
        written = [one for one in lines if one.strip() and one not in bad]
        assert [one for one in made["text"].split("\n") if one.strip()] == written
