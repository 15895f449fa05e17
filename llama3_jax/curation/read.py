"""Read: every input file to rows of documents, a piece at a time (sec. 3.1.1).

The first step of a run, which makes the frame that the stages pass on. Reads WARC, HTML, parquet
and JSON lines (documents.py); a piece that is done is not read again after an interruption.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
from daft import DataType, col

from llama3_jax.curation import engine
from llama3_jax.curation.config import Input
from llama3_jax.curation.documents import Damage, File, Options, Piece
from llama3_jax.curation.sandbox import Killed, Sandbox
from llama3_jax.files import write_json

VERSION = 2


def read(
    pieces: list[Piece], inputs: dict[str, Input], limit: int | None, folder: Path
) -> dict[str, Any]:
    """Writes `folder`/kept and `folder`/rejected, a parquet file each for a piece; the account.

    `limit`: about so many documents of a source, from many of its files.
    """
    for name in ("kept", "rejected", "accounts"):
        (folder / name).mkdir(exist_ok=True)
    of_source = Counter(piece.source for piece in pieces)
    jobs = []
    for number, piece in enumerate(pieces):
        given = inputs[piece.source]
        options = Options(
            given.url_prefix,
            given.time,
            dict(given.fields),
            given.max_bytes,
            math.ceil(limit / of_source[piece.source]) if limit else 0,
        )
        jobs.append(json.dumps([number, piece, options]))
    frame = engine.spread(daft.from_pydict({"job": jobs}), len(jobs))
    frame.select(_read_piece(col("job"), folder=str(folder))).collect()
    accounts = [json.loads(path.read_bytes()) for path in sorted((folder / "accounts").iterdir())]
    for path in (folder / "accounts").iterdir():
        path.unlink()
    (folder / "accounts").rmdir()
    return _summed(accounts)


@daft.func.batch(return_dtype=DataType.int64(), batch_size=1, use_process=False)
def _read_piece(job, *, folder):
    sandbox = Sandbox("llama3_jax.curation.documents:read_piece", 0, 0)
    files = []
    for number, piece, options in map(json.loads, job.to_pylist()):
        name = f"part-{number:05d}"
        account = Path(folder) / "accounts" / f"{name}.json"
        if not account.exists():
            piece = Piece(piece[0], tuple(File(*file) for file in piece[1]))
            paths = [Path(folder) / kind / f"{name}.parquet" for kind in ("kept", "rejected")]
            (outcome,) = sandbox.map([(piece, Options(*options), *paths)])
            if isinstance(outcome, Killed):
                outcome = _lost(piece, outcome)
            write_json(account, {"source": piece.source, "files": outcome})
        files.append(len(piece[1]))
    return pa.array(files, pa.int64())


def _lost(piece: Piece, outcome: Killed) -> dict[str, Any]:
    """The account of a piece whose reader died: all of it is damage."""
    what = f"the reader died: {outcome.reason}, {outcome.detail}"
    return {
        file.name: {
            "path": file.path,
            "bytes": file.size,
            "rows": 0,
            "damaged": [Damage("whole file", file.size, what)._asdict()],
        }
        for file in piece.files
    }


def _summed(accounts: list[dict]) -> dict[str, Any]:
    """Files, bytes, rows, records that are no documents and all damage, by source."""
    sources: dict[str, Any] = {}
    for account in accounts:
        of_source = sources.setdefault(
            account["source"],
            {"files": 0, "bytes": 0, "rows": 0, "other_records": {}, "damaged": []},
        )
        for file in account["files"].values():
            of_source["files"] += 1
            of_source["bytes"] += file["bytes"]
            of_source["rows"] += file["rows"]
            for kind, number in file.get("other_records", {}).items():
                others = of_source["other_records"]
                others[kind] = others.get(kind, 0) + number
            damaged = file.get("damaged", [])
            of_source["damaged"] += [{"file": file["path"], **each} for each in damaged]
    return sources
