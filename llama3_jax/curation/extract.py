"""Extract: each page's bytes to its text, or to a named rejection (sec. 3.1.1).

The extractor is page/extract.py. Here it runs in processes that may die: a page that crashes,
hangs or eats memory is rejected by name, and its neighbours come through.
"""

from pathlib import Path

import daft
import pyarrow as pa
import pydantic
from daft import DataType, col

from llama3_jax.curation.page.extract import Document, Rejection
from llama3_jax.curation.sandbox import Killed, Sandbox
from llama3_jax.schema import Config

VERSION = 4
PAGES_PER_BATCH = 64
EXTRACTOR = "llama3_jax.curation.page.extract:extract"

_OUT = {
    "text": DataType.string(),
    "title": DataType.string(),
    "language_hint": DataType.string(),
    "extract_date": DataType.string(),
    "extract_encoding": DataType.string(),
    "extract_dropped_blocks": DataType.int64(),
    "extract_detail": DataType.string(),
    "reason": DataType.string(),
}
_ARROW = DataType.struct(_OUT).to_arrow_dtype()


class ExtractConfig(Config):
    """Bounds of one page: `seconds` of processor time and `memory_mib` of memory."""

    seconds: float = pydantic.Field(default=20.0, gt=0)
    memory_mib: int = pydantic.Field(default=2048, ge=64)


def extract(frame: daft.DataFrame, config: ExtractConfig, scratch: Path) -> daft.DataFrame:
    """Text, title and what the page says of its language; `html` and `content_type` go.

    Documents that came as text pass as they are. `extract_detail` is of rejections.
    """
    read = ("html", "content_type", "url", "text", "title", "language_hint")
    made = _extract_batch(*map(col, read), seconds=config.seconds, memory=config.memory_mib << 20)
    gone = {*_OUT, "html", "content_type"}
    return frame.select(*(name for name in frame.column_names if name not in gone), made)


@daft.func.batch(
    return_dtype=DataType.struct(_OUT),
    unnest=True,
    batch_size=PAGES_PER_BATCH,
    use_process=False,
)
def _extract_batch(html, content_type, url, text, title, language_hint, *, seconds, memory):
    columns = (html, content_type, url, text, title, language_hint)
    rows = list(zip(*(column.to_pylist() for column in columns), strict=True))
    sandbox = Sandbox(EXTRACTOR, seconds, memory)
    outcomes = sandbox.map((row[0], row[2], row[1]) for row in rows if row[0] is not None)
    made = [_given(*row[3:]) if row[0] is None else _columns(next(outcomes)) for row in rows]
    next(outcomes, None)  # lets the process go
    return pa.array(made, _ARROW)


def _columns(outcome: Document | Rejection | Killed) -> dict:
    row = dict.fromkeys(_OUT) | {"text": "", "title": "", "language_hint": ""}
    if not isinstance(outcome, Document):
        return row | {"reason": outcome.reason, "extract_detail": outcome.detail}
    said = dict(reason.split(":", 1) for reason in outcome.reasons)
    return row | {
        "text": outcome.text,
        "title": outcome.title,
        "language_hint": outcome.language or "",
        "extract_date": outcome.date,
        "extract_encoding": said["encoding"],
        "extract_dropped_blocks": int(said["dropped"].rsplit(":", 1)[1]),
    }


def _given(text: str | None, title: str, language_hint: str) -> dict:
    row = dict.fromkeys(_OUT)
    row |= {"text": text or "", "title": title, "language_hint": language_hint}
    return row if row["text"].strip() else row | {"reason": "empty", "extract_detail": "no text"}
