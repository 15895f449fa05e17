"""Small pages by hand, one for each thing that must be kept or must go."""

import pytest

from llama3_jax.curation.page import markdown
from llama3_jax.curation.page.extract import Document, Rejection, extract

PROSE = (
    "The river rises in the hills above the town, and for most of its length it runs through open "
    "country, where farmers have used its water for as long as anyone can remember. "
)


def page(content: str, head: str = "<title>The river</title>") -> str:
    """An article page with a menu, a footer, and `content` between paragraphs."""
    return f"""<!doctype html><html lang="en-GB"><head>{head}</head><body>
<nav class="menu"><ul><li><a href="/">Start page</a></li><li><a href="/shop">Webshop</a></li>
<li><a href="/contact">Contact us</a></li></ul></nav>
<main><article class="content"><h1>The river</h1><p>{PROSE}</p><p>{PROSE * 2}</p>
{content}<p>{PROSE} At its mouth it is wide and slow.</p><p>{PROSE}</p></article></main>
<footer class="footer"><a href="/privacy">Privacy policy</a> <a href="/terms">Terms of use</a>
Copyright 2020 Rivers Ltd.</footer></body></html>"""


def text_of(content: str) -> str:
    outcome = extract(page(content))
    assert isinstance(outcome, Document), outcome
    return outcome.text


def test_content_stays_and_boilerplate_goes():
    text = text_of("")
    assert "At its mouth it is wide and slow." in text
    for boilerplate in ("Webshop", "Contact us", "Privacy policy", "Terms of use"):
        assert boilerplate not in text


@pytest.mark.parametrize(
    ("html", "tex"),
    [
        (
            "<math><semantics><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow>"
            '<annotation encoding="application/x-tex">a+b</annotation></semantics></math>',
            "$a+b$",
        ),
        ('<math alttext="\\alpha_{1}" display="block"><mi>α</mi></math>', "$$\\alpha_{1}$$"),
        ("<math><mfrac><mi>x</mi><mn>2</mn></mfrac></math>", "(x)/(2)"),
        ("<math><msup><mi>x</mi><mn>2</mn></msup></math>", "x^2"),
        ('<script type="math/tex">\\frac{a}{b}</script>', "$\\frac{a}{b}$"),
        ('<script type="math/tex; mode=display">\\sum_i i</script>', "$$\\sum_i i$$"),
        ('<span class="math">\\(e^{i\\pi}\\)</span>', "\\(e^{i\\pi}\\)"),
        ('<img class="math" src="1.png" alt="\\int_0^1 f">', "$\\int_0^1 f$"),
        ('<img src="x.png" alt="\\sqrt{2}">', "$\\sqrt{2}$"),
    ],
)  # fmt: skip
def test_a_formula_is_kept_as_tex(html, tex):
    text = text_of(f"<p>We know that {html} holds along the whole of its course.</p>")
    assert f"We know that {tex} holds" in text


KATEX = (
    '<span class="katex"><span class="katex-mathml"><math><semantics><mrow><mi>Qzx</mi></mrow>'
    '<annotation encoding="application/x-tex">Qzx^2</annotation></semantics></math></span>'
    '<span class="katex-html" aria-hidden="true">Qzx2</span></span>'
)
MATHJAX = (
    '<span class="MathJax_Preview">Qzx2</span><span class="MathJax" data-mathml="&lt;math&gt;'
    '&lt;mi&gt;Qzx&lt;/mi&gt;&lt;/math&gt;"><nobr>Qzx2</nobr></span>'
    '<script type="math/tex">Qzx^2</script>'
)
WIKIPEDIA = (
    '<span class="mwe-math-element"><span style="display: none;"><math alttext="{\\displaystyle '
    'Qzx^2}"><mi>Qzx</mi></math></span><img class="mwe-math-fallback-image-inline" '
    'alt="{\\displaystyle Qzx^2}"></span>'
)
MATHJAX_3 = (
    '<mjx-container class="MathJax"><svg><text>Qzx</text></svg><mjx-assistive-mml><math '
    'alttext="Qzx^2"><mi>Qzx</mi></math></mjx-assistive-mml></mjx-container>'
)


@pytest.mark.parametrize("html", [KATEX, MATHJAX, WIKIPEDIA, MATHJAX_3])
def test_a_formula_that_is_in_the_page_twice_is_read_once(html):
    text = text_of(f"<p>We know that {html} holds along the whole of its course.</p>")
    assert "We know that $Qzx^2$ holds" in text
    assert text.count("Qzx") == 1


def test_powers_and_indices_stay_readable():
    text = text_of(
        "<p>Some 10<sup>6</sup> m of H<sub>2</sub>O and x<sub>i</sub> on the 1<sup>st</sup>.</p>"
    )
    assert "10^6 m of H2O and x_i on the 1st." in text


CODE = "def f(x):\n    if x:\n\treturn **x\n\n    # a comment\n    return `x`"


@pytest.mark.parametrize(
    "html",
    [
        f"<pre>{CODE}</pre>",
        f'<div class="highlight"><pre><code class="language-python">{CODE}</code></pre></div>',
        "<pre>" + "".join(f'<span class="lineno">{i} </span>{line}\n' for i, line in enumerate(CODE.split("\n"))) + "</pre>",
        "<pre>" + "<br>".join(CODE.split("\n")) + "</pre>",
        '<table class="highlighttable"><tr><td class="linenos"><pre>1\n2\n3\n4\n5\n6</pre></td>'
        f'<td class="code"><pre>{CODE}</pre></td></tr></table>',
        "<pre>" + "\n".join(f"{i:2} {line}" for i, line in enumerate(CODE.split("\n"), 1)) + "</pre>",
        '<table class="js-file-line-container"><tbody>'
        + "".join(
            f'<tr><td class="blob-num" data-line-number="{i}"></td><td class="blob-code">{line}</td></tr>'
            for i, line in enumerate(CODE.split("\n"))
        )
        + "</tbody></table>",
    ],
)  # fmt: skip
def test_code_keeps_its_lines_and_indentation_and_loses_line_numbers(html):
    assert f"\n\n{CODE}\n\n" in text_of(html)


def test_tables_and_lists_keep_their_rows_and_items():
    text = text_of(
        "<table><tr><th>Month</th><th>Flow</th></tr><tr><td>May</td><td>12 m3/s</td></tr></table>"
        f"<ul><li>{PROSE}One.</li><li>{PROSE}Two.</li></ul>"
    )
    assert "One.\nThe river" in text and "Two.\n\n" in text
    assert "May\t12 m3/s" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("call __init__ or __new__(cls), not __main__.py", None),
        ("a __bold text__ and __Word__ here", "a bold text and Word here"),
        ("**init** and __x y__ with __all__", "init and x y with __all__"),
        ("2 * 3 and a_b_c and *emphasis*", None),
    ],
)
def test_names_of_programs_keep_their_underscores(text, expected):
    assert markdown.strip(text) == (expected or text)


def test_markdown_markers_go_from_prose_and_none_is_added():
    text = text_of(
        "<h2>A <b>heading</b></h2><p># Left **over** from `markdown`, see [the map](https://a.b/c)"
        f" of the upper course. {PROSE}</p><p>In C# and **kwargs nothing changes. {PROSE}</p>"
    )
    assert "Left over from markdown, see the map of" in text
    assert "In C# and **kwargs nothing changes." in text


def test_forum_posts_stay():
    posts = "".join(
        f'<div class="post" id="post-{i}"><div class="post-author"><a href="/u/{i}">user{i}</a></div>'
        f'<div class="post-content"><p>{PROSE} I fished there in {1990 + i}.</p></div>'
        '<div class="post-actions"><a href="#">Reply</a> <a href="#">Quote</a></div></div>'
        for i in range(6)
    )
    text = text_of(posts)
    assert all(f"I fished there in {1990 + i}." in text for i in range(6))
    assert "Quote" not in text


def test_a_products_description_stays():
    outcome = extract(
        page(
            f'<div class="product-description"><h2>Description</h2><p>{PROSE}</p><ul>'
            "<li>Made of oak and brass, two metres long</li><li>Weighs 4 kg without the line</li></ul>"
            "</div>"
        )
    )
    assert "Made of oak and brass, two metres long" in outcome.text


def test_title_date_and_language():
    head = (
        "<title>The   river\n rises</title>"
        '<meta property="article:published_time" content="2021-03-04T10:00:00Z">'
    )
    outcome = extract(page("", head), url="https://a.example/2001/02/03/river")
    assert (outcome.title, outcome.date, outcome.language) == (
        "The river rises",
        "2021-03-04",
        "en-gb",
    )
    undated = extract(page(""), url="https://a.example/2001/02/03/river")
    assert undated.date == "2001-02-03"


@pytest.mark.parametrize("kind", [bytes, str])
def test_an_empty_page_is_a_named_rejection(kind):
    outcome = extract(kind(), url="https://a.example/")
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, outcome.url) == ("empty", "https://a.example/")


def test_the_same_page_gives_the_same_document():
    assert extract(page(CODE)) == extract(page(CODE))
