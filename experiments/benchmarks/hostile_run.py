"""Hostile documents through a whole curation run: each is kept or rejected by name, and none ends it.

    pip install -e '.[curation]'
    python -m experiments.benchmarks.hostile_run
    python -m experiments.benchmarks.hostile_run --only=spaces,emails --scale=0.1

hostile_pages.py tries the extractor alone; here go, among ordinary pages, runs of a million equal
characters, lists of addresses, JSON too deep or too long, and what is no Unicode, through all stages
that need no classifier, with tokens counted and written. Fails if the run does, or if an ordinary page
fares otherwise than in a run without hostile ones.
"""

import hashlib
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.curation import config as configs
from llama3_jax.curation import engine, run
from llama3_jax.curation.layout import STAGES
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError

FLAGS = flags.FLAGS
STAGE_NAMES = (
    "extract", "urls", "url_dedup", "languages", "minhash", "lines", "c4", "gopher", "divergence", "safety", "pii",
)  # fmt: skip
WORDS = "the river rises in hills above town and it runs through open country to a lake of".split()
LINE_BYTES = 300_000_000


def define_flags() -> None:
    flags.DEFINE_float("scale", 1.0, "Of the sizes.", lower_bound=0, upper_bound=1)
    flags.DEFINE_list("only", [], f"Some of the cases: {', '.join(cases(0))}.")
    flags.DEFINE_integer("ordinary", 40, "Ordinary pages beside them.", lower_bound=1)


def cases(size: int) -> dict[str, Callable[[], str]]:
    """By name what makes a line of JSON; `size` is how many of its things a document has."""

    def text(content: str, **more: str) -> str:
        return json.dumps({"text": content} | more)

    def html(content: str) -> str:
        return json.dumps({"html": f"<html><body><main>{content}</main></body></html>"})

    prose = prose_of(random.Random(0))
    return {
        "spaces": lambda: text(prose + " " * size + prose),
        "spaces in <pre>": lambda: html(f"<p>{prose}</p><pre>x{' ' * size}y</pre><p>{prose}</p>"),
        "no-break spaces": lambda: text(prose + "\u00a0" * size + "x"),
        "newlines": lambda: text(prose + "\n" * size + prose),
        "one letter": lambda: text("a" * size),
        "digits": lambda: text("1" * size),
        "emoji": lambda: text("🙂" * size),
        "combining marks": lambda: text("e" + "\u0301" * size),
        "Chinese": lambda: text("天地玄黄宇宙洪荒" * (size // 8)),
        "nulls": lambda: text("\0" * size),
        "one line again and again": lambda: text("the same line\n" * (size // 4)),
        "words of one letter": lambda: text("a b " * (size // 2)),
        "emails": lambda: text("".join(f"u{n}@example.org " for n in range(size // 3))),
        "emails, too many bytes": lambda: text("".join(f"u{n}@example.org " for n in range(size))),
        "telephones": lambda: text("tel 030 901820 " * (size // 4)),
        "deep HTML": lambda: html("<div>" * (size // 10) + prose),
        "long URL": lambda: text(prose, url="http://a.b/" + "x" * size),
        "deep JSON": lambda: "[" * (size // 10),
        "deep JSON in a field": lambda: '{"text": "x", "more": ' + "[" * (size // 10),
        "surrogates": lambda: '{"text": "' + "\\ud800" * (size // 10) + '"}',
        "long line": lambda: '{"text": "' + "x" * int(LINE_BYTES * size / 1e6) + '"}',
    }  # fmt: skip


def prose_of(rng: random.Random) -> str:
    lines = [" ".join(rng.choices(WORDS, k=20)).capitalize() + "." for _ in range(15)]
    return "\n".join(lines)


def curate(names: list[str], folder: Path, size: int, ordinary: int) -> dict[str, str]:
    """What became of each hostile line and of each ordinary page."""
    folder.mkdir()
    made, docs = cases(size), {}
    with open(folder / "pages.jsonl", "w", encoding="utf-8") as file:
        for number, name in enumerate(names, 1):
            file.write(made[name]() + "\n")
            docs[doc_of(number)] = name
        for number in range(ordinary):
            page = {"url": f"http://ordinary.org/{number}"}
            page["text"] = prose_of(random.Random(number + 1))
            file.write(json.dumps(page) + "\n")
            docs[doc_of(len(names) + number + 1)] = f"ordinary {number}"
    Tokenizer({bytes([byte]): byte for byte in range(256)}, 8).save(folder)
    config, stages = configs.parse({
        "inputs": {"web": {"paths": (str(folder / "pages.jsonl"),)}},
        "stages": dict.fromkeys(STAGE_NAMES, {}),
        "tokens": {"tokenizer": str(folder), "holdout": 0.1},
    })  # fmt: skip
    run.run(config, stages, folder / "work", say=lambda line: None)
    outcomes = dict.fromkeys(docs.values(), "lost")
    for stage in sorted((folder / "work" / STAGES).iterdir()):
        for path in sorted(stage.glob("rejected/*.parquet")):
            for row in pq.read_table(path, columns=["doc", "reason"]).to_pylist():
                outcomes[docs[row["doc"]]] = f"{stage.name[3:]}: {row['reason']}"
    for path in (folder / "work/documents/web").glob("*.parquet"):
        for doc in pq.read_table(path, columns=["doc"])["doc"].to_pylist():
            outcomes[docs[doc]] = "kept"
    return outcomes


def doc_of(line: int) -> str:
    identity = f"web\x000/pages.jsonl\0{line}"
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def main(_) -> None:
    engine.start()
    names = FLAGS.only or list(cases(0))
    if unknown := sorted(set(names) - set(cases(0))):
        raise UserError(f"--only={unknown[0]}: known: {', '.join(cases(0))}")
    size = int(1_000_000 * FLAGS.scale)
    with tempfile.TemporaryDirectory() as folder:
        alone = curate([], Path(folder) / "alone", size, FLAGS.ordinary)
        before = peak()
        begun = time.monotonic()
        among = curate(names, Path(folder) / "among", size, FLAGS.ordinary)
    table = Table("hostile document", "outcome")
    for name in names:
        table.add_row(name, among[name])
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{len(names)} hostile documents, {FLAGS.ordinary} ordinary pages: "
        f"{time.monotonic() - begun:.0f} s; peak memory of this process {peak()} MiB "
        f"({before} without them)"
    )
    if bad := [name for name, outcome in alone.items() if among.get(name) != outcome]:
        raise UserError(f"{bad[0]}: {alone[bad[0]]} alone, {among.get(bad[0])} among hostile ones")
    if lost := [name for name in names if among[name] == "lost"]:
        raise UserError(f"{', '.join(lost)}: neither kept nor rejected")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    define_flags()
    cli.run(main)
