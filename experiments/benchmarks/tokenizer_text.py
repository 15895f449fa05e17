"""Multilingual text for the tokenizer's benchmark: the help pages of LibreOffice, as Debian has them.

One package a language, in languages of six scripts (MPL-2.0); nothing of it is copied into this
repository. A line is kept once in a language, and not where it is the English one untranslated.
"""

import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from llama3_jax.errors import UserError
from llama3_jax.files import write_text

ENGLISH = "en-US"
LANGUAGES = ("de", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "vi", "zh-CN")
HELD_OUT = 0.1
_MIN_CHARACTERS = 20
_BLOCKS = "p|div|h\\d|li|td|tr|br|table|ul|ol|details|summary|pre|body|header|footer|nav|section"


def build(folder: Path) -> None:
    """Writes `<language>.train.jsonl` and `<language>.held_out.jsonl` unless they are there.

    Raises:
      UserError: no Debian to take them from.
    """
    languages = (ENGLISH, *LANGUAGES)
    if all((folder / f"{lang}.held_out.jsonl").is_file() for lang in languages):
        return
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise UserError(f"the benchmark's text comes from Debian packages: no {program} here")
    folder.mkdir(parents=True, exist_ok=True)
    english: set[str] = set()
    for lang in track(languages, "text of packages", transient=True):
        with tempfile.TemporaryDirectory() as unpacked:
            _unpack(f"libreoffice-help-{lang.lower()}", Path(unpacked))
            pages = dict(_pages(Path(unpacked)))
        if lang == ENGLISH:
            english = {line for lines in pages.values() for line in lines}
        seen = english.copy() if lang != ENGLISH else set()
        split: dict[str, list[str]] = {"train": [], "held_out": []}
        for name, lines in pages.items():
            new = [line for line in dict.fromkeys(lines) if line not in seen]
            seen.update(new)
            text = "".join(line + "\n" for line in new)
            if not text:
                continue
            document = {"id": name, "lang": lang, "text": text}
            split[_part(name)].append(json.dumps(document, ensure_ascii=False) + "\n")
        for part, documents in split.items():
            write_text(folder / f"{lang}.{part}.jsonl", "".join(documents))


def _unpack(package: str, folder: Path) -> None:
    for command in (
        ["apt-get", "download", "-q", package],
        ["sh", "-c", 'dpkg-deb -x "$0"_*.deb .', package],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise UserError(f"{package}: {' '.join(command[:2])} failed: {' '.join(reason)}")


def _pages(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each page's name, the same in all languages, and its lines of text."""
    (root,) = folder.glob("usr/share/libreoffice/help/*/text")
    for path in sorted(root.rglob("*.html")):
        text = path.read_text("utf-8")
        text = re.sub(r"<(script|style|head)\b.*?</\1>", "", text, flags=re.S)
        text = re.sub(rf"</?(?:{_BLOCKS})\b[^>]*>", "\n", text)
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
        lines = (" ".join(line.split()) for line in text.split("\n"))
        lines = [line for line in lines if len(line) >= _MIN_CHARACTERS]
        yield str(path.relative_to(root)), lines


def _part(name: str) -> str:
    """By the page's name: what is held out in one language is so in all."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "held_out" if digest < HELD_OUT * 2**64 else "train"
