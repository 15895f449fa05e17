"""Our extractor beside trafilatura and resiliparse: word F1, spot checks, pages/s; TeX, code, markers.

    pip install -e '.[curation,benchmarks]'
    python -m experiments.benchmarks.extraction --pages=../shared/data/html
    apt-get download python-sympy-doc python-scipy-doc
    for deb in python-*-doc_*.deb; do dpkg-deb -x $deb docs; done
    python -m experiments.benchmarks.extraction --pages=../shared/data/html --docs=docs

Sides take turns page by page, in an order that rotates. Word F1 is that of bags of lower-case words, mean
over pages; must is the share of snippets of true content that the output holds, must not the share
of boilerplate snippets that it lacks. Speed is pages per second of CPU time in this process, bytes
to text, imports and first use left out. Markers are counted in our prose alone: heading, bold, code
and link markers of markdown that the page's own visible code and math do not hold.
"""

import json
import logging
import re
import time
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.extraction import pages as truth
from llama3_jax import cli
from llama3_jax.curation.page import encoding
from llama3_jax.curation.page.extract import Document, extract
from llama3_jax.errors import UserError
from llama3_jax.files import write_json

FLAGS = flags.FLAGS
console = Console(width=200, highlight=False)
# Two stars close bold text only after a character: "**kwargs, or **" holds no marker.
_MARKERS = re.compile(
    r"^ {0,3}#{1,6} +\S[^\n]*|\*\*[^\s*](?:[^*\n]*[^\s*])?\*\*(?!\w)|(?<![\w`])`[^`\s][^`\n]*`|^```|\[[^\]\n]+\]\(https?:[^)\s]+\)",
    re.M,
)


def define_flags() -> None:
    flags.DEFINE_string(
        "pages", None, "Folder with truth.jsonl and pages/; else the shared data's."
    )
    flags.DEFINE_string("docs", None, "Folder with Debian's unpacked documentation packages.")
    flags.DEFINE_integer("docs_pages", 400, "Pages a documentation package at most, evenly taken.")
    flags.DEFINE_string("json", None, "File that takes every page's measurement.")


def ours(html: bytes, url: str | None) -> str:
    outcome = extract(html, url)
    return outcome.text if isinstance(outcome, Document) else ""


def sides() -> dict:
    try:
        import trafilatura
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[curation,benchmarks]'") from None

    logging.getLogger("trafilatura").setLevel(logging.ERROR)

    def resiliparse(html: bytes, url: str | None) -> str:
        return extract_plain_text(encoding.decode(html).text, main_content=True, alt_texts=True)

    return {
        "ours": ours,
        "trafilatura": lambda html, url: trafilatura.extract(html, url=url) or "",
        "resiliparse": resiliparse,
    }


def squeeze(text: str) -> str:
    return "".join(text.split())


def measure(pages: list[truth.Page], by_name: dict) -> list[dict]:
    for function in by_name.values():
        function(pages[0].html, pages[0].url)
    rows = []
    names = list(by_name)
    for number, page in enumerate(track(pages, "extracting", console=console)):
        literal = literal_text(encoding.decode(page.html).text)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            text = by_name[name](page.html, page.url)
            seconds = time.process_time() - start
            lowered = squeeze(text.lower())
            markers = [m[0].strip() for m in _MARKERS.finditer(text)]
            rows.append({
                "id": page.id, "kind": page.kind, "aside": page.aside, "side": name, "seconds": seconds,
                "f1": truth.word_f1(text, page.content), "markers": sum(squeeze(one) not in literal for one in markers),
                "must": [squeeze(one.lower()) in lowered for one in page.must_contain],
                "must_not": [squeeze(one.lower()) not in lowered for one in page.must_not_contain],
            })  # fmt: skip
    return rows


def show(rows: list[dict], title: str, names: list[str]) -> None:
    table = Table("pages", "n", title=title)
    for name in names:
        table.add_column(f"{name} F1", justify="right")
    for column in ("must", "must not", "pages/s"):
        table.add_column(f"{column}: {' / '.join(names)}", justify="right")
    table.add_column("F1 - trafilatura", justify="right")
    table.add_column("speed / trafilatura", justify="right")
    for kind in [*sorted({row["kind"] for row in rows}), "all"]:
        part = {
            n: [r for r in rows if r["side"] == n and kind in (r["kind"], "all")] for n in names
        }
        f1 = {n: np.mean([row["f1"] for row in part[n]]) for n in names}
        speed = {n: len(part[n]) / sum(row["seconds"] for row in part[n]) for n in names}

        def share(key, part=part):
            means = [np.mean([one for row in part[n] for one in row[key]]) for n in names]
            return " / ".join(f"{mean:.3f}" for mean in means)

        table.add_row(
            kind, str(len(part["ours"])), *(f"{f1[n]:.4f}" for n in names), share("must"),
            share("must_not"), " / ".join(f"{speed[n]:.0f}" for n in names),
            f"{f1['ours'] - f1['trafilatura']:+.4f}", f"{speed['ours'] / speed['trafilatura']:.1f}",
        )  # fmt: skip
    console.print(table)


def literal_text(html: str) -> str:
    """The text of a page's code and math, where signs of markdown mean something else."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(html)
    nodes = tree.css("pre, code, kbd, samp, math, script[type^='math/']")
    return squeeze("\n".join(node.text() for node in nodes))


def formulas(html: str) -> list[str]:
    """TeX in a page of documentation: alt of math images, and \\(…\\), \\[…\\] in math elements."""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(html)
    found = [node.attributes.get("alt") or "" for node in tree.css("img.math, .math img")]
    found += [node.text().strip() for node in tree.css("span.math, div.math")]
    return [squeeze(one) for one in found if one.strip()]


def code_blocks(html: str) -> list[str]:
    from selectolax.lexbor import LexborHTMLParser

    found = []
    for node in LexborHTMLParser(html).css("pre"):
        for extra in node.css(".linenos, .lineno, .headerlink, .copybtn"):
            extra.remove()
        if node.text().strip():
            found.append("\n".join(line.rstrip() for line in node.text().strip("\n").split("\n")))
    return found


def measure_docs(folder: Path, by_name: dict, limit: int) -> None:
    table = Table("package", "pages", "formulas", "code blocks", title="kept, of all in the pages")
    for name in by_name:
        table.add_column(f"{name}: TeX, code, code with its white space", justify="right")
    for package in ("sympy", "scipy"):
        files = sorted(
            path for path in folder.rglob("*.html") if f"python-{package}-doc" in str(path)
        )
        if not files:
            raise UserError(f"--docs={folder}: no page of python-{package}-doc; see --help")
        files = [path for path in files if not path.is_symlink()]
        files = files[:: max(1, len(files) // limit)]
        kept = {name: np.zeros(3) for name in by_name}
        math = code = 0
        for path in track(files, package, console=console):
            page = path.read_bytes()
            html = encoding.decode(page).text
            tex, blocks = formulas(html), code_blocks(html)
            math, code = math + len(tex), code + len(blocks)
            for name, function in by_name.items():
                text = function(page, None)
                flat = squeeze(text)
                text = "\n".join(line.rstrip() for line in text.split("\n"))
                kept[name] += (
                    sum(one in flat for one in tex), sum(squeeze(one) in flat for one in blocks),
                    sum(one in text for one in blocks),
                )  # fmt: skip
        cells = [
            ", ".join(
                f"{100 * share:.1f}%" for share in kept[n] / np.maximum((math, code, code), 1)
            )
            for n in by_name
        ]
        table.add_row(package, str(len(files)), str(math), str(code), *cells)
    console.print(table)


def main(argv) -> None:
    by_name = sides()
    folder = Path(FLAGS.pages) if FLAGS.pages else truth.DATA / "html"
    rows = measure(truth.load(folder), by_name)
    names = list(by_name)
    show([row for row in rows if not row["aside"]], "the part to tune on (trained on it)", names)
    show([row for row in rows if row["aside"]], "the part kept aside", names)
    for name in names:
        markers = sum(row["markers"] for row in rows if row["side"] == name)
        console.print(f"markdown markers in the output of {name}: {markers}")
    if FLAGS.json:
        write_json(Path(FLAGS.json), json.loads(json.dumps(rows, default=float)))
    if FLAGS.docs:
        measure_docs(Path(FLAGS.docs), by_name, FLAGS.docs_pages)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
