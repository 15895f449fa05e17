"""Pages made to break a parser, and real ones damaged at random: a document or a named rejection.

Each runs under an alarm of many times what it needs: a hang is a failure and not a stuck run.
"""

import faulthandler
import random

import pytest

from experiments.benchmarks.hostile_pages import damaged
from llama3_jax.curation.page import bounds
from llama3_jax.curation.page.extract import Document, Rejection, extract

DEEP = 100_000
REJECTIONS = {
    "empty", "not_html", "too_large", "too_deep", "too_many_nodes", "too_many_attributes",
    "too_many_open_elements", "too_many_blocks", "unparsable", "no_text",
}  # fmt: skip
PROSE = "The river rises in the hills above the town, and it runs through open country. " * 4


@pytest.fixture(autouse=True)
def no_hang():
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def outcome_of(page, content_type=None):
    outcome = extract(page, "https://a.example/", content_type)
    if isinstance(outcome, Rejection):
        assert outcome.reason in REJECTIONS and outcome.detail
    else:
        assert isinstance(outcome, Document) and outcome.text.strip()
        outcome.text.encode()  # no lone surrogates
    return outcome


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("<div></x>" * DEEP + PROSE, "too_deep"),
        ("<div>" * DEEP + PROSE, "too_deep"),
        ("<div>" * DEEP + PROSE + "</div>" * DEEP, "too_deep"),
        ("<span>" * DEEP + PROSE, "too_deep"),
        ("<ul><li>" * DEEP + PROSE, "too_deep"),
        ("<div>" * (bounds.MAX_DEPTH + 1) + PROSE, "too_deep"),
        ("<p " + " ".join(f"a{i}={i}" for i in range(DEEP)) + f">{PROSE}", "too_many_attributes"),
        ("<p " + " ".join(f'a{i}=">"' for i in range(DEEP)) + f">{PROSE}", "too_many_attributes"),
        (f'<p a="{"x" * 50_000_000}">{PROSE}', "too_large"),
        ("<p a=1 b=2>" * 5_000_000, "too_large"),
        ("".join(f"<i a={i}>" for i in range(900)) + "<p>x" * 3_000, "too_many_open_elements"),
        (
            "<p>" + "".join(f"<b a={i}>" for i in range(1_400)) + "</p>" + "<p>x</p>" * 1_500,
            "too_many_open_elements",
        ),
        ("<p>x" * (bounds.MAX_NODES + 1), "too_many_nodes"),
        ("\0" * 10_000, "empty"),
        ("<p>" + "a\0" * 10_000, "not_html"),
        (b"%PDF-1.7 " + b"x" * 1_000, "not_html"),
        (b"PK\x03\x04" + b"x" * 1_000, "not_html"),
        ("<script>alert(1)</script>", "no_text"),
        (b"", "empty"),
        (" \n\t", "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "page",
)
def test_a_page_out_of_bounds_is_named(page, reason):
    assert outcome_of(page).reason == reason


@pytest.mark.parametrize(
    "start",
    ["<", "<a ", '<a b="', "<!--", "<!-", "<script>", "<table>", "<select><option>", "<math><mfrac>", "&",
     "&#x110000;", "<pre><code>", "[](", "**a", "`", "\\(", "<sup>", "<td>", "<b><p>", "<svg><p>",
     "<template>", "<br>", "<![CDATA[", "</p>", "\ud800", "<title>", "1 ", "<a><div>"],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 30_000])
def test_repeated_markup_ends(start, count):
    outcome_of(start * count)
    outcome_of(start * count + f"<p>{PROSE}</p>")


@pytest.mark.parametrize(
    "start", ["<math>", "<span class=katex>", "<nav>", "<footer>", "<math><mfrac>"]
)
def test_nesting_below_the_bounds_ends(start):
    outcome_of(start * (14_000 // start.count("<")) + f"<p>{PROSE}")


def test_a_null_or_two_cost_nothing_else():
    assert PROSE.strip() in outcome_of(f"<p>{PROSE}\0</p><p>{PROSE}</p>").text


def test_elements_alike_are_not_reopened_and_not_refused():
    assert PROSE.strip() in outcome_of("<i>" * 900 + "<p>x" * 3_000 + f"<p>{PROSE}").text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8", "cp037", "cp1251", "iso-2022-jp", "utf-7"])
@pytest.mark.parametrize("declared", ["utf-8", "utf-16", "hz", "shift_jis", "base64", "idna"])
def test_any_encoding_under_any_declaration_ends(encoding, declared):
    page = f"<meta charset={declared}><p>{PROSE}é</p>".encode(encoding, "ignore")
    outcome_of(page)
    outcome_of(page, f"text/html; charset={declared}")


def test_damaged_pages_end():
    from tests.curation.page.test_extract import CODE, KATEX, MATHJAX, page

    rng = random.Random(0)
    whole = page(
        f"<pre>{CODE}</pre>{KATEX}{MATHJAX}<table><tr><td>1<td>2</table><ul><li>a<li>b</ul>"
    )
    for _ in range(300):
        outcome_of(damaged(whole.encode(), rng))
    for size in range(0, len(whole), 37):
        outcome_of(whole.encode()[:size])
    for _ in range(100):
        outcome_of(rng.randbytes(rng.randrange(1, 5_000)))
