"""What class names and ids say on sites of code and math: the domain-specific part of the extractor.

Sec. 3.1.2 of the Llama 3 paper: code and math pages have their own extraction. A rule is keyed by
names that a site's software writes and others hardly use, so that it holds on every mirror and
needs no list of hosts. To add a site, add a rule here and a page to tests/curation/page/test_rules.py.
"""

import dataclasses

# What a name does, as bits.
CONTENT, BOILERPLATE, DROPPED, CODE = (1 << bit for bit in range(4))


@dataclasses.dataclass(frozen=True)
class Rule:
    """Names, parted by spaces. Boilerplate inside content goes, content inside boilerplate too."""

    software: str
    content: str = ""  # what is inside stays, whatever the classifier says
    boilerplate: str = ""  # what is inside goes
    dropped: str = ""  # never read: it repeats or decorates other text (line numbers, permalinks)
    code: str = ""  # a div or table that is one block of code


RULES = (
    Rule(
        "Stack Exchange",
        content="s-prose comment-copy question-hyperlink",
        boilerplate="js-voting-container js-post-menu post-signature post-taglist s-sidebarwidget "
        "js-add-link js-show-link bottom-notice left-sidebar s-topbar comment-date comment-score",
    ),
    Rule(
        "GitHub, GitLab, Gitea",
        content="markdown-body",
        boilerplate="file-navigation Layout-sidebar pagehead-actions UnderlineNav js-repo-nav",
        dropped="blob-num diff-line-num lines-num",
        code="js-file-line-container js-file-line-table file-view-container",
    ),
    Rule(
        "Sphinx and its themes",
        boilerplate="sphinxsidebar sphinxsidebarwrapper wy-nav-side wy-breadcrumbs rst-footer-buttons "
        "rst-versions bd-sidebar-primary bd-sidebar-secondary prev-next-area sidebar-drawer toc-drawer "
        "related-pages",
        dropped="headerlink viewcode-link sd-copybtn copybtn linenodiv",
        code="highlighttable",
    ),
    Rule(
        "MediaWiki",
        boilerplate="navbox vertical-navbox catlinks mw-jump-link printfooter ambox mw-navigation "
        "mw-footer vector-menu sistersitebox mw-indicators siteNotice",
        dropped="mw-editsection mw-cite-backlink mwe-math-fallback-image-inline "
        "mwe-math-fallback-image-display",
    ),
    Rule(
        "arXiv: abstracts, listings, LaTeXML",
        content="list-title list-authors list-comments list-subjects ltx_para ltx_abstract",
        boilerplate="list-identifier extra-services bib-cite-container labstabs ltx_page_footer "
        "ltx_page_navbar submission-history",
        dropped="descriptor",
    ),
    Rule(
        "KaTeX and MathJax",
        dropped="katex-html MathJax_Preview MathJax_Display MathJax MathJax_SVG MathJax_CHTML",
    ),
    Rule(
        "Discourse",
        content="cooked",
        boilerplate="topic-map topic-footer-main-buttons suggested-topics more-topics__container",
    ),
    Rule(
        "Doxygen, Javadoc, rustdoc",
        content="docblock",
        boilerplate="navpath topNav bottomNav sub-nav sidebar-elems nav-path",
        dropped="ttc src-rightside",
        code="fragment",
    ),
    Rule(
        "Jupyter",
        content="rendered_html jp-RenderedHTMLCommon",
        dropped="input_prompt output_prompt jp-InputPrompt jp-OutputPrompt anchor-link",
    ),
    Rule(
        "Docusaurus, MkDocs",
        boilerplate="theme-doc-toc-desktop theme-doc-sidebar-container pagination-nav md-sidebar "
        "md-footer md-tabs",
        dropped="hash-link",
    ),
    Rule(
        "code highlighters",
        dropped="lineno linenos linenumber linenumbers line-number line-numbers line-numbers-rows "
        "gutter rouge-gutter hljs-ln-numbers crayon-nums crayon-num CodeMirror-linenumber ln-num lnt",
        code="syntaxhighlighter hljs-ln rouge-table crayon-table",
    ),
    Rule("others", dropped="anchorjs-link goog-gt-tt"),
)


def by_name() -> dict[str, int]:
    """The bits of each name in RULES."""
    bits: dict[str, int] = {}
    for rule in RULES:
        for names, bit in (
            (rule.content, CONTENT),
            (rule.boilerplate, BOILERPLATE),
            (rule.dropped, DROPPED),
            (rule.code, CODE),
        ):
            for name in names.split():
                bits[name] = bits.get(name, 0) | bit
    return bits
