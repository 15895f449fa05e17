"""Pages made with the markup of sites of code and math: what a rule names stays, goes, or is code."""

import pytest

from llama3_jax.curation.page import rules
from llama3_jax.curation.page.extract import Document, extract
from tests.curation.page.test_extract import CODE, PROSE, page

SHORT = "Take the left fork"
MENU = "Edit Share Flag"


def text_of(html: str) -> str:
    outcome = extract(html)
    assert isinstance(outcome, Document), outcome
    return outcome.text


STACK_EXCHANGE = (
    '<div class="question"><div class="js-voting-container"><button>Up</button><div>1742</div></div>'
    f'<div class="postcell"><div class="s-prose js-post-body"><p>{SHORT}</p><pre><code>{CODE}</code></pre></div>'
    f'<div class="js-post-menu"><a href="#">{MENU}</a></div><div class="post-signature">asked by troutfisher</div>'
    "</div></div>"
)
GITHUB = (
    '<div class="Layout"><div class="Layout-sidebar"><h2>Releases 1742</h2></div>'
    f'<article class="markdown-body entry-content"><h2>{SHORT}</h2><div class="highlight"><pre>{CODE}</pre></div>'
    f'</article></div><div class="file-navigation"><span>{MENU}</span></div>'
)
SPHINX = (
    f'<div class="sphinxsidebar"><p>{MENU}</p><p>1742</p></div><div class="body"><h1>{SHORT}'
    '<a class="headerlink" href="#x" title="Permalink to this headline">troutfisher</a></h1>'
    f"<p>{PROSE}</p><pre>{CODE}</pre></div>"
)
READ_THE_DOCS = (
    f'<nav class="wy-nav-side"><ul><li><a href="x">{MENU}</a></li><li>1742</li></ul></nav>'
    f'<div class="rst-content"><h1>{SHORT}</h1><p>{PROSE}</p><pre>{CODE}</pre>'
    '<div class="rst-footer-buttons"><a href="y">troutfisher</a></div></div>'
)
MEDIAWIKI = (
    '<div class="mw-parser-output"><h2>Take the left fork<span class="mw-editsection">[<a href="#">troutfisher'
    f'</a>]</span></h2><p>{PROSE}</p><pre>{CODE}</pre><div class="navbox"><p>{MENU}, {PROSE}1742</p></div></div>'
)
ARXIV_LISTING = (
    '<dl><dt><a name="item1">[1742]</a><span class="list-identifier"><a href="/abs/1">troutfisher</a> [pdf]</span></dt>'
    f'<dd><div class="meta"><div class="list-title mathjax"><span class="descriptor">{MENU}:</span> {SHORT}</div>'
    f'<div class="list-authors"><a href="/a">R. Walton</a></div></div></dd></dl><pre>{CODE}</pre>'
)
DOXYGEN = (
    f'<div id="nav-path" class="navpath"><ul><li>{MENU}</li><li>1742</li></ul></div><p>{PROSE}{SHORT}</p>'
    '<div class="fragment">'
    + "".join(
        f'<div class="line"><span class="lineno">{i}</span>{line}</div>'
        for i, line in enumerate(CODE.split("\n"))
    )
    + '</div><div class="ttc" id="a1">troutfisher</div>'
)
RUSTDOC = (
    f'<nav class="sidebar"><div class="sidebar-elems"><h3>{MENU}</h3><p>1742 {PROSE}</p></div></nav>'
    f'<div class="docblock"><p>{SHORT}</p><pre class="rust"><code>{CODE}</code></pre></div>'
    '<a class="src-rightside" href="s">troutfisher</a>'
)
JUPYTER = (
    '<div class="cell"><div class="input_prompt">In [1742]:</div><div class="text_cell_render rendered_html">'
    f'<h3>{SHORT}<a class="anchor-link" href="#x">troutfisher {MENU}</a></h3></div>'
    f'<div class="highlight"><pre>{CODE}</pre></div></div>'
)
DISCOURSE = (
    f'<div class="topic-post"><div class="cooked"><p>{SHORT}</p><pre><code>{CODE}</code></pre></div></div>'
    f'<div class="topic-map"><p>{MENU} 1742 {PROSE}</p></div><div class="suggested-topics">troutfisher</div>'
)


@pytest.mark.parametrize(
    "content",
    [STACK_EXCHANGE, GITHUB, SPHINX, READ_THE_DOCS, MEDIAWIKI, ARXIV_LISTING, DOXYGEN, RUSTDOC, JUPYTER, DISCOURSE],
    ids=["stack-exchange", "github", "sphinx", "read-the-docs", "mediawiki", "arxiv", "doxygen", "rustdoc",
         "jupyter", "discourse"],
)  # fmt: skip
def test_content_and_code_of_a_known_site_stay_and_its_boilerplate_goes(content):
    text = text_of(page(content))
    assert SHORT in text and CODE in text
    for boilerplate in (MENU, "1742", "troutfisher"):
        assert boilerplate not in text


def test_a_short_post_stays_by_its_rule_alone():
    """The same page without the class that the rule names loses or keeps it as the trees say."""
    ruled, unruled = (
        text_of(
            page(
                f'<aside class="widget"><div class="{name}"><a href="/x">{SHORT}</a></div></aside>'
            )
        )
        for name in ("s-prose", "none-known")
    )
    assert SHORT in ruled and SHORT not in unruled


def test_boilerplate_inside_content_goes():
    text = text_of(
        page(
            f'<div class="s-prose"><p>{PROSE}</p><div class="navbox"><p>{PROSE}{MENU}</p></div></div>'
        )
    )
    assert MENU not in text


def test_no_name_is_both_content_and_boilerplate():
    bits = rules.by_name()
    for name, found in bits.items():
        assert found.bit_count() == 1, name
    assert len({rule.software for rule in rules.RULES}) == len(rules.RULES)
