"""A curation run: read, then stage after stage, each whole or absent, none done twice.

    <workdir>/stages/00_read, 01_extract, …   kept/*.parquet, rejected/*.parquet, stage.json
    <workdir>/documents/<source>/*.parquet    what is kept in the end
    <workdir>/tokens/<source>/train, …        the same as token shards for training
    <workdir>/mix.json                        weights of the sources in a run of so many tokens
    <workdir>/funnel.json                     what became of how much, and what was damaged
    <workdir>/times.json                      seconds, of what this and earlier runs did

A stage's folder appears when it is whole, with a fingerprint of the inputs, the configs and the
versions of all stages so far. A run passes over those that are there and unchanged, so that it goes
on after any interruption and gives the same files.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llama3_jax.curation import engine, inputs, mix, parts, read
from llama3_jax.curation.config import CurationConfig, named_files
from llama3_jax.curation.documents import parquet_writer
from llama3_jax.curation.layout import (
    DOCUMENTS,
    FUNNEL_FILE,
    MIX_FILE,
    REPORT_FILE,
    STAGE_FILE,
    STAGES,
    TIMES_FILE,
    TOKENS,
    files,
)
from llama3_jax.curation.registry import Stage
from llama3_jax.data import tokenizing
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.folder_lock import locked
from llama3_jax.schema import Config

FULL_BYTES = 1 << 20  # a disk with less to give is what ended a stage


def run(
    config: CurationConfig,
    stages: list[tuple[Stage, Config]],
    workdir: Path,
    sample: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Does what is left to do and returns the funnel.

    `sample`: about so many documents of each source, from many of its files.

    Raises:
      UserError: an input that is not there, or a folder that another process works in.
    """
    pieces, others = inputs.plan(config.inputs), inputs.passed_over(config.inputs)
    for source, suffixes in others.items():
        listed = ", ".join(f"{suffix} {number:,}" for suffix, number in suffixes.items())
        say(f"{source}: {sum(suffixes.values()):,} files of formats that are not read ({listed})")
    if sample:
        pieces = inputs.sample(pieces, sample)
    with locked(workdir):
        for killed in list(workdir.rglob(".*.tmp")):  # in the middle of writing it
            killed.unlink()
        records = _run_stages(config, stages, pieces, sample, workdir, say)
        _remove_others(workdir / STAGES, {record["folder"] for record in records})
        funnel = {
            "inputs": records[0].pop("inputs"),
            "stages": [{"stage": r["stage"], "counts": r["counts"]} for r in records],
        }
        if others:
            funnel["files_not_read"] = others
        last = workdir / STAGES / records[-1]["folder"]
        _write_documents(config, last, records[-1]["fingerprint"], workdir / DOCUMENTS)
        if config.tokens.tokenizer:
            funnel["shards"] = _write_tokens(config, workdir)
        if config.mix:
            train = {source: splits["train"]["tokens"] for source, splits in
                     funnel["shards"].items()}  # fmt: skip
            mix.save_plan(workdir / MIX_FILE, mix.plan_mix(config.mix, train))
        write_json(workdir / FUNNEL_FILE, funnel)
    return funnel


def _run_stages(
    config: CurationConfig,
    stages: list[tuple[Stage, Config]],
    pieces: list[inputs.Piece],
    sample: int | None,
    workdir: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    given = {name: each.model_dump() for name, each in config.inputs.items()}
    fingerprint = _fingerprint(read.VERSION, given, [list(piece) for piece in pieces], sample)

    def make_read(folder: Path) -> dict[str, Any]:
        # Again after a lost worker: pieces that are done stay.
        account = engine.patient(lambda: read.read(pieces, dict(config.inputs), sample, folder))
        return {"counts": _count_read(folder), "inputs": account}

    records = [_stage(workdir, 0, "read", fingerprint, make_read, say)]
    tokenizer = config.tokens.tokenizer
    for number, (stage, own) in enumerate(stages, 1):
        before = records[-1]
        values = own.model_dump()
        fingerprint = _fingerprint(
            before["fingerprint"], stage.name, stage.version, values, tokenizer,
            [_state(path) for path in stage.files(own)],
            [_state(path) for path in named_files(values | {"tokenizer": tokenizer})],
        )  # fmt: skip

        def make(folder: Path, stage=stage, own=own, before=before) -> dict[str, Any]:
            number = parts.number_of_parts(_kept_bytes(before))
            counts = _apply(stage, own, before, workdir / STAGES, folder, number, tokenizer)
            return {"counts": counts, "parts": number}

        records.append(_stage(workdir, number, stage.name, fingerprint, make, say))
    return records


def _apply(
    stage: Stage,
    own: Config,
    before: dict,
    stages: Path,
    folder: Path,
    number: int,
    tokenizer: str | None,
) -> list[dict[str, Any]]:
    """One stage on what the one before it kept, in `number` parts."""
    kept = [row for row in before["counts"] if not row["reason"]]
    if not kept:
        raise UserError(f"stage {before['stage']} kept no document: see its rejected/*.parquet "
                        f"in {stages / before['folder']}")  # fmt: skip
    came_in = files(stages / before["folder"] / "kept")

    def attempt() -> list[dict[str, Any]]:
        for leftover in list(folder.iterdir()):
            _remove(leftover)
        scratch = folder / "scratch"
        scratch.mkdir()
        frame = stage.function(daft.read_parquet(came_in), own, scratch)
        counts = parts.write(frame, stage.name, folder, number, tokenizer)
        if stage.report:
            found = [files(folder / kind) for kind in ("kept", "rejected")]
            frames = [daft.read_parquet(paths) for paths in found if paths]
            stage.report(folder / REPORT_FILE, functools.reduce(_stacked, frames), own)
        _remove(scratch)
        _remove(folder / "unsorted")
        return counts

    try:
        counts = engine.patient(attempt)
    except Exception as error:
        # Daft's own writers say no more than that a channel is closed.
        if shutil.disk_usage(folder).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    came, went = sum(row["documents"] for row in kept), sum(row["documents"] for row in counts)
    if came != went:
        raise ValueError(f"stage {stage.name}: {came} documents came, {went} left")
    return counts


def _kept_bytes(record: dict[str, Any]) -> int:
    return sum(row["bytes"] for row in record["counts"] if not row["reason"])


def _stacked(above: daft.DataFrame, below: daft.DataFrame) -> daft.DataFrame:
    shared = [name for name in above.column_names if name in below.column_names]
    return above.select(*shared).concat(below.select(*shared))


def _stage(
    workdir: Path,
    number: int,
    name: str,
    fingerprint: str,
    make: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The record of a stage, made if it is not there with this fingerprint."""
    folder = workdir / STAGES / f"{number:02d}_{name}"
    record = _record(folder)
    if record is None or record["fingerprint"] != fingerprint:
        partial = folder.with_name(f".{folder.name}.{fingerprint[:16]}")
        if (record := _record(partial)) is None:
            partial.mkdir(parents=True, exist_ok=True)
            begun = time.monotonic()
            record = {"stage": name, "folder": folder.name, "fingerprint": fingerprint}
            with _clock(name):
                record |= make(partial)
            _note_time(workdir / TIMES_FILE, name, time.monotonic() - begun)
            write_json(partial / STAGE_FILE, record)
        # Interrupted between these two, the next run finds the partial folder whole.
        _remove(folder)
        os.rename(partial, folder)
        say(_line(record))
    else:
        say(f"{_line(record)} (unchanged)")
    return record


def _clock(name: str) -> Progress:
    """Shows, on a terminal, which stage runs and for how long."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, transient=True, disable=not sys.stderr.isatty())
    progress.add_task(name, total=None)
    return progress


def _line(record: dict[str, Any]) -> str:
    kept = sum(row["documents"] for row in record["counts"] if not row["reason"])
    rejected = sum(row["documents"] for row in record["counts"] if row["reason"])
    return f"{record['stage']}: {kept:,} kept, {rejected:,} rejected"


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / STAGE_FILE
    return json.loads(path.read_bytes()) if path.exists() else None


def _count_read(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in files(folder / "kept") + files(folder / "rejected"):
        file = pq.ParquetFile(path)
        known = {"source", "language", "reason", "bytes"} & set(file.schema_arrow.names)
        rows += parts.count(file.read(sorted(known)))
    return parts.sum_counts(rows)


# ------------------------------------------------------------------------------------- the results


def _write_documents(config: CurationConfig, last: Path, fingerprint: str, target: Path) -> None:
    """What the last stage kept, a folder for each source."""
    mark = target / STAGE_FILE
    if mark.exists() and json.loads(mark.read_bytes()) == fingerprint:
        return
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    for source in config.inputs:
        (partial / source).mkdir(parents=True)
    for path in map(Path, files(last / "kept")):
        file = pq.ParquetFile(path)
        with contextlib.ExitStack() as stack:
            writers: dict[str, pq.ParquetWriter] = {}
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                for source in sorted(set(table["source"].to_pylist())):
                    if source not in writers:
                        to = partial / source / path.name
                        writers[source] = stack.enter_context(parquet_writer(to, table.schema))
                    writers[source].write_table(_of_source(table, source))
    write_json(partial / STAGE_FILE, fingerprint)
    _remove(target)
    os.rename(partial, target)


def _of_source(table: pa.Table, source: str) -> pa.Table:
    return table.filter(pa.compute.equal(table["source"], source))


def _write_tokens(config: CurationConfig, workdir: Path) -> dict[str, Any]:
    shards = {}
    for source in config.inputs:
        documents = [Path(path) for path in files(workdir / DOCUMENTS / source)]
        if not documents:
            continue
        options = tokenizing.Options("text", "doc", config.tokens.holdout)
        infos = tokenizing.tokenize(
            documents, workdir / TOKENS / source, Path(config.tokens.tokenizer), options
        )
        shards[source] = {
            split: {"documents": info.documents, "tokens": info.tokens}
            for split, info in infos.items()
        }
    _remove_others(workdir / TOKENS, set(shards))
    return shards


def damage(funnel: dict[str, Any]) -> Iterator[str]:
    """Lines on what could not be read."""
    for source, account in funnel["inputs"].items():
        for each in account["damaged"]:
            yield (f"damaged: {each['file']} at {each['where']}: {each['bytes']:,} bytes of "
                   f"{source} lost ({each['what']})")  # fmt: skip


# ----------------------------------------------------------------------------------- small things


def _fingerprint(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _state(path: Path) -> list[Any]:
    """What changes when a file, or one in a folder, does."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file), file.stat()) for file in found if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _note_time(path: Path, name: str, seconds: float) -> None:
    times = json.loads(path.read_bytes()) if path.exists() else {}
    write_json(path, times | {name: round(seconds, 2)})


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_others(folder: Path, known: set[str]) -> None:
    """What runs with another config, or interrupted ones, left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in known:
            _remove(path)
