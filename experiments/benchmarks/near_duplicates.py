"""Recall of MinHash among pages of one template, beside what the formula says; and its candidates.

    pip install -e '.[curation]'
    python -m experiments.benchmarks.near_duplicates --seed=1

Pages of 130 words, of which the first so many are the template's, in pairs whose contents differ by
some words. A pair is found when its edge is; the formula is 1 - (1 - J^rows)^bands, the mean over
the pairs that are similar enough to be kept. Candidates are what is compared shingle by shingle.
"""

import random
import tempfile
import time
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.curation import components, engine, minhash

FLAGS = flags.FLAGS
WORDS, VOCABULARY = 130, 50_000


def define_flags() -> None:
    flags.DEFINE_integer("seed", None, "Of the pages; drawn if not given.")
    flags.DEFINE_list("pairs", ["500", "2000", "8000"], "Pairs of a family.")
    flags.DEFINE_list("templates", ["0", "80", "95", "105"], "Words of the template.")
    flags.DEFINE_list("edits", ["3", "4"], "Words by which a pair differs.")


def family(pairs: int, template: int, edits: int, rng: random.Random) -> list[list[int]]:
    """Pages as numbers of words; a pair is two in a row."""
    shared = rng.choices(range(VOCABULARY), k=template)
    pages = []
    for _ in range(pairs):
        content = rng.choices(range(VOCABULARY), k=WORDS - template)
        twin = list(content)
        step = len(content) // edits
        for edit in range(edits):
            twin[edit * step + step // 2] = rng.randrange(VOCABULARY)
        pages += [shared + content, shared + twin]
    return pages


def similarity(one: list[int], other: list[int], ngram: int) -> float:
    sets = [
        {tuple(page[i : i + ngram]) for i in range(len(page) - ngram + 1)} for page in (one, other)
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def measure(pages: list[list[int]], folder: Path) -> tuple[float, float, float, float, float]:
    """Siblings' and pairs' mean J, recall, the formula, candidates a document."""
    config = minhash.MinhashConfig()
    docs = [f"{number:032x}" for number in range(len(pages))]
    random.Random(0).shuffle(docs)
    table = pa.table(
        {
            "doc": docs,
            "text": [" ".join(f"w{word}" for word in page) for page in pages],
            "language": ["en"] * len(pages),
        }
    )
    pq.write_table(table, folder / "pages.parquet")
    frame = daft.read_parquet(str(folder / "pages.parquet"))
    minhash.write_bands(frame, config, components.fresh(folder / "bands"))
    found = {
        (row["low"], row["high"]) for row in minhash.find_edges(frame, config, folder).to_pylist()
    }
    candidates = daft.read_parquet(str(folder / "candidates/**/*.parquet")).distinct().count_rows()
    siblings = np.mean([similarity(pages[i], pages[i + 2], config.ngram) for i in range(0, 200, 2)])
    alike, hit = [], 0
    for at in range(0, len(pages), 2):
        own = similarity(pages[at], pages[at + 1], config.ngram)
        if own >= config.similarity:
            alike.append(own)
            hit += tuple(sorted(docs[at : at + 2])) in found
    formula = np.mean([1 - (1 - j**config.rows) ** config.bands for j in alike])
    return siblings, np.mean(alike), hit / len(alike), formula, candidates / len(pages)


def main(_) -> None:
    engine.start()
    seed = random.randrange(10**9) if FLAGS.seed is None else FLAGS.seed
    table = Table("pairs", "template", "edits", "J of siblings", "J of pairs", "recall", "formula",
                  "difference", "candidates a page", "seconds", title=f"seed {seed}")  # fmt: skip
    for pairs in map(int, FLAGS.pairs):
        for template in map(int, FLAGS.templates):
            for edits in map(int, FLAGS.edits):
                rng = random.Random(f"{seed} {pairs} {template} {edits}")
                begun = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(family(pairs, template, edits, rng), Path(folder))
                siblings, j, recall, formula, candidates = row
                table.add_row(
                    str(pairs), str(template), str(edits), f"{siblings:.3f}", f"{j:.3f}",
                    f"{recall:.4f}", f"{formula:.4f}", f"{recall - formula:+.4f}",
                    f"{candidates:.1f}", f"{time.monotonic() - begun:.1f}",
                )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
