"""Which stage decided what about a document, why, and its text before and after."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llama3_jax.curation import parts, urls
from llama3_jax.curation.layout import STAGE_FILE, STAGES, files
from llama3_jax.curation.page import encoding
from llama3_jax.errors import UserError

SHOWN = 2_000  # characters of a page's markup, or of its text
# Columns that every document has; a stage's scores are the others.
COMMON = (
    "doc", "url", "time", "source", "title", "language", "language_hint", "content_type", "html",
    "text", "bytes", "characters", "tokens", "reason", "stage",
)  # fmt: skip


def explain(workdir: Path, wanted: str) -> str:
    """The story of each document with this URL or id, as text.

    Raises:
      UserError: there is no run, or no such document in it.
    """
    stages = sorted((workdir / STAGES).glob("[0-9]*")) if workdir.is_dir() else []
    if not stages:
        raise UserError(f"--workdir={workdir}: no finished stage; run it without --explain first")
    found = _find(stages[0], wanted, Path(wanted).absolute().as_uri()) or _alike(stages[0], wanted)
    if not found:
        raise UserError(f"--explain={wanted}: no such URL, file or document id in {workdir}")
    return "\n\n".join(_story(stages, first) for first in found)


def _find(stage: Path, *wanted: str) -> list[dict[str, Any]]:
    """Rows of the first stage, kept and rejected, with one of these as document id or URL."""
    rows = []
    for path in files(stage / "kept") + files(stage / "rejected"):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            keys = file.read_row_group(group, ["doc", "url"])
            masks = [pc.is_in(keys[name], pa.array(wanted)) for name in ("doc", "url")]
            mask = pc.or_(*masks)
            if pc.any(mask).as_py():
                rows += file.read_row_group(group).filter(mask).to_pylist()
    return rows


def _row(stage: Path, doc: str) -> dict[str, Any] | None:
    """The document's row of a later stage: in the part to which its name leads."""
    number = json.loads((stage / STAGE_FILE).read_bytes()).get("parts")
    name = "*.parquet" if number is None else parts.part_name(parts.part_of(doc, number))
    for path in sorted([*stage.glob(f"kept/{name}"), *stage.glob(f"rejected/{name}")]):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            mask = pc.equal(file.read_row_group(group, ["doc"])["doc"], doc)
            if pc.any(mask).as_py():
                return file.read_row_group(group).filter(mask).to_pylist()[0]
    return None


def _alike(stage: Path, url: str) -> list[dict[str, Any]]:
    """Rows whose URLs differ from this one in form only."""
    wanted, found = _canonical(url), set()
    for path in files(stage / "kept") + files(stage / "rejected"):
        each = pq.ParquetFile(path).read(["url"])["url"].to_pylist()
        found.update(u for u in each if u and _canonical(u) == wanted)
    return _find(stage, *sorted(found)) if found else []


def _canonical(url: str) -> str:
    try:
        return urls.canonical(url, urls.UrlsConfig())
    except ValueError:
        return url


def _story(stages: list[Path], first: dict[str, Any]) -> str:
    lines = [f"{first['url'] or 'no URL'} (document {first['doc']}, source {first['source']})"]
    before: dict[str, Any] = {}
    for stage in stages:
        row = first if stage is stages[0] else _row(stage, first["doc"])
        if row is None:
            break
        name = stage.name.split("_", 1)[1]
        reason = row.get("reason")
        lines.append(f"\n{name}: {f'REJECTED, {reason}' if reason else 'kept'}")
        lines += [f"    {key}: {value}" for key, value in _news(before, row)]
        lines += [f"    | {line}" for line in _text(before, row)]
        before = row
    return "\n".join(lines)


def _news(before: dict[str, Any], row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the stage said of the document: its scores, and what it changed but the text."""
    for key, value in row.items():
        if key in ("doc", "source", "html", "text", "reason", "stage") or value in (None, ""):
            continue
        if key not in before or (key in COMMON and before[key] != value):
            yield key, value


def _text(before: dict[str, Any], row: dict[str, Any]) -> Iterator[str]:
    if row.get("html") is not None:
        page = encoding.decode(row["html"], row["content_type"]).text
        yield from _beginning(page)
    elif before.get("text") is None:
        yield from _beginning(row.get("text") or "")
    elif row["text"] != before["text"]:
        old, new = before["text"].split("\n"), row["text"].split("\n")
        yield from difflib.unified_diff(old, new, "before", "after", lineterm="", n=1)


def _beginning(text: str) -> Iterator[str]:
    yield from text[:SHOWN].split("\n")
    if len(text) > SHOWN:
        yield f"… {len(text) - SHOWN:,} more characters"
