"""The stages of curation: MB/s and documents/s a core, beside datatrove; recall of near-duplicates.

    pip install -e '.[curation]'
    python -m venv peer && peer/bin/pip install 'datatrove[processing]' 'xxhash<4' spacy
    apt-get download llvm-14-doc llvm-15-doc llvm-16-doc clang-14-doc clang-15-doc \\
        libreoffice-help-zh-cn libreoffice-help-ja
    for deb in *.deb; do mkdir docs/${deb%%_*}; dpkg-deb -x $deb docs/${deb%%_*}; done
    python -m experiments.benchmarks.curation --docs=docs --peer_python=peer/bin/python --work=work

The pages are those of --docs and of the shared data, extracted once (kept in --work). Speed is that
of CPU seconds of all threads, so of one core, in this process and in the peer's, which take turns
stage by stage on the same English pages; reading parquet and writing what a stage writes is part of
ours, of theirs what their steps write. Ours does more where a note says so.

Near-duplicates: pages with every hundredth, 33rd or tenth word (character, in Chinese and Japanese)
replaced by another one of the corpus; and the same page of successive versions of a package. A pair
is found when both have the same survivor. A found pair is wrong if it is no planted one and the
Jaccard similarity of the two pages' shingles is below 0.5.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import daft
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.extraction import pages as truth
from llama3_jax import cli
from llama3_jax.curation import (
    divergence,
    gopher,
    languages,
    lines,
    minhash,
    pii,
    safety,
    url_dedup,
    urls,
    words,
)
from llama3_jax.curation.page.extract import Document, extract
from llama3_jax.errors import UserError

FLAGS = flags.FLAGS
console = Console(width=180, highlight=False)
LIKE_PEER = minhash.MinhashConfig(bands=14, rows=8, verify=False, within_language=False)
STAGES = {
    "urls": (urls.urls, urls.UrlsConfig(), "ours also makes them canonical; its lists are small"),
    "url_dedup": (url_dedup.url_dedup, url_dedup.UrlDedupConfig(), "ours keeps the newest"),
    "languages": (languages.languages, languages.LanguagesConfig(), "ours reads 1,000 characters, theirs all"),
    "minhash": (minhash.minhash, LIKE_PEER, "both 14 bands of 8, unverified"),
    "minhash, verified": (minhash.minhash, minhash.MinhashConfig(), "25 bands of 5 and true similarity, our default"),
    "lines": (lines.lines, lines.LinesConfig(), "theirs drops any repeated line"),
    "gopher": (gopher.gopher, gopher.GopherConfig(), "theirs stops at the first rule, ours scores all"),
    "divergence": (divergence.divergence, divergence.DivergenceConfig(), "datatrove has none"),
    "safety": (safety.safety, safety.SafetyConfig(), "ours counts, theirs stops at the first word"),
    "pii": (pii.pii, pii.PiiConfig(), "ours six kinds, theirs e-mail and IP"),
}  # fmt: skip
_CJK = "\u3040-\u30ff\u4e00-\u9fff"
WITHOUT_PEER = ("minhash, verified", "divergence")


def define_flags() -> None:
    flags.DEFINE_string("docs", None, "Folder with a folder of pages a package.", required=True)
    flags.DEFINE_string("work", None, "Folder for extracted pages and scratch.", required=True)
    flags.DEFINE_string("peer_python", None, "Python that has datatrove; without, only ours.")
    flags.DEFINE_integer("pages", 600, "Pages a package at most, evenly taken.")
    flags.DEFINE_integer("documents", 2000, "English pages of the speed comparison, evenly taken.")
    flags.DEFINE_integer("rounds", 2, "Rounds of the speed comparison.")
    flags.DEFINE_integer("families", 300, "Pages with planted edits, of each script.")
    flags.DEFINE_list("parts", ["speed", "edits", "versions"], "What to measure.")


def load_pages(folder: Path, work: Path) -> pa.Table:
    """All pages as documents, extracted by us; kept for the next time."""
    kept = work / f"documents-{FLAGS.pages}.parquet"
    if kept.is_file():
        return pq.read_table(kept)
    rows: dict[str, dict] = {}
    packages = sorted(path for path in folder.iterdir() if path.is_dir())
    if not packages:
        raise UserError(f"--docs={folder}: no folder of a package; see --help")
    for package in packages:
        files = sorted(path for path in package.rglob("*.html") if not path.is_symlink())
        files = files[:: max(1, len(files) // FLAGS.pages)]
        for path in track(files, package.name, console=console):
            url = f"https://{package.name}.example.org/{path.relative_to(package)}"
            _add(rows, path.read_bytes(), url, package.name)
    for page in truth.load(truth.DATA / "html"):
        _add(rows, page.html, page.url or "", "web")
    table = pa.Table.from_pylist(list(rows.values()))
    named = languages.languages(
        daft.from_arrow(table), languages.LanguagesConfig(threshold=0.0), work
    )
    table = named.exclude("reason", "languages_score").sort("doc").to_arrow()
    pq.write_table(table, kept)
    return table


def _add(rows: dict[str, dict], html: bytes, url: str, source: str) -> None:
    outcome = extract(html, url)
    if isinstance(outcome, Document):
        doc = hashlib.md5(f"{source} {url} {len(rows)}".encode()).hexdigest()
        rows[doc] = {"doc": doc, "url": url, "time": "", "source": source, "text": outcome.text, "title": "", "language": ""}  # fmt: skip


def scratch(work: Path) -> Path:
    return work / f"scratch-{os.getpid()}"


class Peer:
    """datatrove in its own process, asked for one stage at a time."""

    def __init__(self, table: pa.Table, work: Path):
        documents, list_ = work / "documents.jsonl", work / "words.txt"
        with documents.open("w", encoding="utf-8") as file:
            for row in table.select(["url", "text"]).to_pylist():
                file.write(
                    json.dumps({"url": row["url"] or "https://example.org/", "text": row["text"]})
                    + "\n"
                )
        list_.write_text(
            "\n".join(safety.word_lists(safety.SafetyConfig())["en"]), encoding="utf-8"
        )
        script = Path(__file__).with_name("curation_datatrove.py")
        command = [FLAGS.peer_python, script, documents, languages.model_path(), list_]
        with (work / "peer.log").open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def seconds(self, stage: str) -> float:
        self.process.stdin.write(stage + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                if "error" in answer:
                    raise UserError(f"datatrove, stage {stage}: {answer['error']}")
                return answer["seconds"]
        raise UserError(f"datatrove ended with code {self.process.wait()} at stage {stage}")


def measure_speed(table: pa.Table, work: Path) -> None:
    table = table.filter(pc.equal(table["language"], "en"))
    step = max(1, len(table) // FLAGS.documents)
    table = table.take(list(range(0, len(table), step))[: FLAGS.documents])
    table = table.append_column("urls_canonical", table["url"])
    source = work / "english.parquet"
    pq.write_table(table, source)
    size = sum(len(text.encode()) for text in table["text"].to_pylist()) / 1e6
    peer = Peer(table, work) if FLAGS.peer_python else None
    ours: dict[str, list[float]] = {name: [] for name in STAGES}
    theirs: dict[str, list[float]] = {name: [] for name in STAGES}
    for stage, config, _ in STAGES.values():  # first use, left out
        stage(daft.read_parquet(str(source)).limit(50), config, scratch(work)).collect()
    for _, name in track(
        list(itertools.product(range(FLAGS.rounds), STAGES)), "speed", console=console
    ):
        stage, config, _ = STAGES[name]
        start = time.process_time()
        stage(daft.read_parquet(str(source)), config, scratch(work)).collect()
        ours[name].append(time.process_time() - start)
        if peer and name not in WITHOUT_PEER:
            theirs[name].append(peer.seconds(name))
    if peer:
        peer.process.stdin.close()
        peer.process.wait()
    out = Table(
        "stage",
        title=f"{len(table)} English pages, {size:.1f} MB of text, least of {FLAGS.rounds} rounds",
    )
    for column in ("ours MB/s", "documents/s", "datatrove MB/s", "documents/s", "ratio"):
        out.add_column(column, justify="right")
    out.add_column("note")

    def row(name: str, own: float, other: float | None, note: str) -> None:
        theirs = ("–", "–", "–") if other is None else (f"{size / other:.2f}", f"{len(table) / other:.0f}", f"{other / own:.1f}")  # fmt: skip
        out.add_row(name, f"{size / own:.1f}", f"{len(table) / own:.0f}", *theirs, note)

    for name, (_, _, note) in STAGES.items():
        row(name, min(ours[name]), min(theirs[name], default=None), note)
    both = [name for name in STAGES if theirs[name]]
    if both:
        total = sum(min(theirs[name]) for name in both)
        row("whole (stages of both)", sum(min(ours[name]) for name in both), total, "")
    ours_all = sum(min(ours[name]) for name in STAGES if name != "minhash")
    row("whole (all of ours)", ours_all, None, "minhash verified")
    console.print(out)


def shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = text.split(" ")
    return {tuple(found[start : start + ngram]) for start in range(max(len(found) - ngram, 0) + 1)}


def similarity(one: set, other: set) -> float:
    return len(one & other) / len(one | other)


def survivors(table: pa.Table, config: minhash.MinhashConfig, work: Path) -> dict[str, str]:
    found = minhash.minhash(daft.from_arrow(table), config, scratch(work)).to_pylist()
    return {row["doc"]: row["minhash_survivor"] or row["doc"] for row in found}


def shingle_sets(table: pa.Table, ngram: int) -> dict[str, set]:
    normal = daft.from_arrow(table).select("doc", words.normalized(daft.col("text")).alias("text"))
    return {row["doc"]: shingles(row["text"], ngram) for row in normal.to_pylist()}


CONFIGS = {
    "25 × 5, similarity 0.7 (default)": minhash.MinhashConfig(),
    "25 × 5, similarity 0.6": minhash.MinhashConfig(similarity=0.6),
    "14 × 8, unverified (FineWeb)": minhash.MinhashConfig(bands=14, rows=8, verify=False),
    "42 × 3, similarity 0.35": minhash.MinhashConfig(bands=42, rows=3, similarity=0.35),
}


def edited(text: str, share: float, pool: list[str], rng: random.Random) -> str:
    """`share` of the words, or of the characters of Chinese and Japanese, replaced by others."""
    pieces = re.findall(rf"[{_CJK}]|[^\s{_CJK}]+|\s+", text)
    return "".join(
        rng.choice(pool) if piece.strip() and rng.random() < share else piece for piece in pieces
    )


def measure_edits(table: pa.Table, work: Path) -> None:
    out = Table(
        "pages",
        "setting",
        title="near-duplicates by planted edits: recall of pairs, precision of all found",
    )
    for column in ("1%", "3%", "10%", "precision"):
        out.add_column(column, justify="right")
    for script, codes in (("Latin", ("en",)), ("CJK", ("zh", "ja"))):
        rng = random.Random(7)
        rows = [
            row
            for row in table.to_pylist()
            if row["language"] in codes and 800 < len(row["text"]) < 20_000
        ]
        kept = survivors(pa.Table.from_pylist(rows), CONFIGS["42 × 3, similarity 0.35"], work)
        rows = [row for row in rows if kept[row["doc"]] == row["doc"]]
        rows = rng.sample(rows, min(FLAGS.families, len(rows)))
        joined = "\n".join(row["text"] for row in rows)
        pool = joined.split() if script == "Latin" else re.findall(f"[{_CJK}]", joined)
        planted, everything = {}, list(rows)
        for share, row in itertools.product((0.01, 0.03, 0.1), rows):
            doc = hashlib.md5(f"{share} {row['doc']}".encode()).hexdigest()
            everything.append(row | {"doc": doc, "text": edited(row["text"], share, pool, rng)})
            planted[doc] = (share, row["doc"])
        # Each share in a corpus of its own: edits of one page must not lead to one another.
        for name, config in CONFIGS.items():
            recall, right, found = [], 0, 0
            for share in (0.01, 0.03, 0.1):
                own = [
                    row
                    for row in everything
                    if row["doc"] not in planted or planted[row["doc"]][0] == share
                ]
                part = pa.Table.from_pylist(own)
                survivor = survivors(part, config, work)
                pairs = {doc: origin for doc, (of, origin) in planted.items() if of == share}
                recall.append(
                    sum(survivor[doc] == survivor[origin] for doc, origin in pairs.items())
                    / len(pairs)
                )
                sets = shingle_sets(part, config.ngram)
                for doc, other in survivor.items():
                    if doc != other:
                        found += 1
                        true = pairs.get(doc) == other or pairs.get(other) == doc
                        right += true or similarity(sets[doc], sets[other]) >= 0.5
            out.add_row(
                f"{len(rows)} {script}",
                name,
                *(f"{one:.3f}" for one in recall),
                f"{right / max(found, 1):.4f}",
            )
    console.print(out)


def versions(table: pa.Table) -> Iterator[tuple[dict, dict]]:
    """The same page of a package's successive versions."""
    pages: dict[tuple, list] = {}
    for row in table.to_pylist():
        if match := re.fullmatch(r"(\w+)-(\d+)-doc", row["source"]):
            place = row["url"].split("/", 3)[3].replace(f"-{match[2]}", "")
            pages.setdefault((match[1], place), []).append((int(match[2]), row["doc"], row))
    for rows in pages.values():
        rows.sort()
        yield from ((one[2], other[2]) for one, other in itertools.pairwise(rows))


def measure_versions(table: pa.Table, work: Path) -> None:
    pairs = list(versions(table))
    sets = shingle_sets(table, 5)
    true = {
        (one["doc"], other["doc"]): similarity(sets[one["doc"]], sets[other["doc"]])
        for one, other in pairs
    }
    out = Table(
        "setting",
        title=f"the same page in successive versions: {len(pairs)} pairs, found by true similarity",
    )
    levels = [(1.0, 1.01), (0.8, 1.0), (0.7, 0.8), (0.5, 0.7), (0.0, 0.5)]
    for low, high in levels:
        count = sum(low <= value < high for value in true.values())
        out.add_column(
            f"{'identical' if low == 1 else f'{low} to {high}'} ({count})", justify="right"
        )
    out.add_column("precision of all found", justify="right")
    for name, config in CONFIGS.items():
        survivor = survivors(table, config, work)
        cells = []
        for low, high in levels:
            hits = [
                survivor[a] == survivor[b] for (a, b), value in true.items() if low <= value < high
            ]
            cells.append(f"{sum(hits) / len(hits):.3f}" if hits else "–")
        found = [(doc, other) for doc, other in survivor.items() if doc != other]
        right = sum(similarity(sets[doc], sets[other]) >= 0.5 for doc, other in found)
        out.add_row(name, *cells, f"{right / max(len(found), 1):.4f}")
    console.print(out)


def main(argv) -> None:
    work = Path(FLAGS.work)
    work.mkdir(parents=True, exist_ok=True)
    table = load_pages(Path(FLAGS.docs), work)
    measures = {"speed": measure_speed, "edits": measure_edits, "versions": measure_versions}
    for part in FLAGS.parts:
        if part not in measures:
            raise UserError(f"--parts={part}: known are {', '.join(measures)}")
        measures[part](table, work)
    shutil.rmtree(scratch(work), ignore_errors=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
