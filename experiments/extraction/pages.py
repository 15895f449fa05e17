"""The pages with their true content, in a part to tune on and a part kept aside; the measure."""

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import re
from pathlib import Path

from llama3_jax.errors import UserError

DATA = Path(
    os.environ.get("LLAMA3_JAX_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data"
)
ASIDE_SHARE = 0.3
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Page:
    """One page: its bytes, its kind (article, forum, …), its true content and spot checks."""

    id: str
    url: str
    kind: str
    html: bytes
    content: str
    must_contain: list[str]
    must_not_contain: list[str]

    @property
    def aside(self) -> bool:
        """Whether the page is kept aside: by a hash of its id, so the same for ever."""
        number = int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:4], "big")
        return number < ASIDE_SHARE * 2**32


def load(folder: Path) -> list[Page]:
    """The pages of `folder` (truth.jsonl, pages/ID.html.gz); UserError if it is not there."""
    truth = folder / "truth.jsonl"
    if not truth.is_file():
        raise UserError(
            f"{truth} is missing: --pages (or LLAMA3_JAX_DATA) names a folder with truth.jsonl and "
            "pages/ID.html.gz, as made from the development part of the WCXB benchmark"
        )
    pages = []
    for line in truth.read_text(encoding="utf-8").strip().split("\n"):
        row = json.loads(line)
        html = gzip.decompress((folder / "pages" / f"{row['id']}.html.gz").read_bytes())
        pages.append(
            Page(
                str(row["id"]), row["url"], row["type"], html, row["main_content"],
                row["must_contain"], row["must_not_contain"],
            )
        )  # fmt: skip
    return pages


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def word_f1(found: str, true: str) -> float:
    """F1 of the bags of words, lower case; 1 if both are empty."""
    ours, theirs = collections.Counter(words(found)), collections.Counter(words(true))
    if not ours and not theirs:
        return 1.0
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total())
