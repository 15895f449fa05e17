"""The whole recipe in miniature on real text: `make demo`, or `python -m experiments.demo.run`.

Each part leaves its result under --workdir and is passed over when that is there, so the same
command goes on where it was interrupted.
"""

import os

# The demo is meant for any machine's CPU; must be set before jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments.demo import cloze, corpus, ladder, recall
from experiments.demo.curation import get_config as get_curation
from experiments.demo.train import SOURCES, VOCAB_SIZE
from llama3_jax import cli
from llama3_jax.curation import config as configs
from llama3_jax.curation import engine
from llama3_jax.curation import run as curation
from llama3_jax.curation.layout import DOCUMENTS
from llama3_jax.data import tokenizer_stats, tokenizer_training, tokenizing
from llama3_jax.data.corpus import Corpus
from llama3_jax.data.documents import Fields
from llama3_jax.evaluation.ngram import NgramModel
from llama3_jax.files import write_json
from llama3_jax.reporting import curation as curation_pages
from llama3_jax.reporting import tokenizers
from llama3_jax.reporting.run import write_run_report
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

HOLDOUT = 0.06  # of 170 pages of mathematics, enough to ask about
SPECIALS = 16
FIELDS = Fields("text", "doc", "language")
BASELINES = {"unigram": 1, "bigram": 2, "5-gram": 5}
RECALL_DOCUMENTS, QUESTIONS = 6_000, 20
BASELINES_FILE = "baselines.json"
CONFIG = Path(__file__).with_name("train.py")

FLAGS = flags.FLAGS
console = Console(soft_wrap=True, highlight=False)


def define_flags() -> None:
    flags.DEFINE_string("workdir", "runs/demo", "Where everything goes.")
    flags.DEFINE_bool("prepare", False, "Make the corpora, and stop before any training.")


def main(_) -> int:
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    part("collect real pages and text from installed packages", workdir / "corpus", collect)
    part("curate them", workdir / curation_pages.FOLDER, curate)
    part("train a 4K tokenizer on it", workdir / "tokenizer_4k", train_tokenizer)
    part("measure the tokenizer", workdir / tokenizers.FOLDER, measure_tokenizer)
    part("tokenize", workdir / "tokens", tokenize)
    for kind in recall.KINDS:
        part(f"make documents that ask for what they said: {kind}", workdir / "tokens" / kind,
             make_recall)  # fmt: skip
    part("make questions of held-out text", workdir / "cloze.jsonl", make_questions)
    if FLAGS.prepare:
        return 0
    part("count n-grams, to compare with", workdir / BASELINES_FILE, count_baselines)
    part("train a ladder of small models, fit scaling laws", workdir / "ladder", climb)
    console.rule("train", align="left")
    if code := train(workdir):
        if code == cli.EXIT_USER_ERROR and (workdir / METRICS_FILE).exists():
            write_run_report(workdir, [])  # the verdicts of a gate that stopped the run
        return code
    write_run_report(workdir, [ladder.section(workdir)])
    summarise(workdir)
    return 0


def part(title: str, result: Path, make: Callable[[Path], None]) -> None:
    """Runs `make(result)` unless an earlier run finished it."""
    done = result.with_name(f".{result.name}.done")
    if done.exists():
        console.print(f"{title}: already in {result}")
        return
    console.rule(title, align="left")
    begun = time.monotonic()
    make(result)
    done.touch()
    console.print(f"{time.monotonic() - begun:.0f} s")


# --------------------------------------------------------------------------------------- the parts


def collect(result: Path) -> None:
    result.mkdir(exist_ok=True)
    for source, counts in corpus.build(result).items():
        each = ", ".join(f"{number:,} {unit}" for unit, number in counts.items())
        console.print(f"{source}: {each}")


def curate(result: Path) -> None:
    """The curation program's work: pages to documents, and what became of them."""
    engine.start()
    curation.run(*configs.parse(get_curation(str(result.parent))), result, say=console.print)
    curation_pages.write_page(result)


def train_tokenizer(result: Path) -> None:
    """Byte-pair merging, from the bytes on, of the documents that are not held out."""
    trained, record = tokenizer_training.train(
        corpus_files(result.parent),
        tokenizer_training.BYTES,
        VOCAB_SIZE - SPECIALS - len(tokenizer_training.BYTES),
        tokenizer_training.Options(FIELDS, holdout=HOLDOUT, specials=SPECIALS),
    )
    tokenizer_training.save(trained, record, result)


def measure_tokenizer(result: Path) -> None:
    """Its compression by source and language, for the report."""
    paths = {"demo": str(result.parent / "tokenizer_4k")}
    measured = tokenizer_stats.measure(corpus_files(result.parent), paths, FIELDS)
    tokenizer_stats.save(*measured, result)


def corpus_files(workdir: Path, *sources: str) -> list[Path]:
    """The curated documents of some sources, or of all."""
    folder = workdir / curation_pages.FOLDER / DOCUMENTS
    files = [sorted((folder / source).glob("*.parquet")) for source in sources or SOURCES]
    return [file for of_source in files for file in of_source]


def tokenize(result: Path) -> None:
    for source in SOURCES:
        infos = tokenizing.tokenize(
            corpus_files(result.parent, source),
            result / source,
            result.parent / "tokenizer_4k",
            tokenizing.Options(FIELDS.text, FIELDS.id, HOLDOUT),
        )
        each = ", ".join(
            f"{split} {info.documents:,} documents, {info.tokens:,} tokens"
            for split, info in infos.items()
        )
        console.print(f"{source}: {each}")


def make_recall(result: Path) -> None:
    """Key-value documents (experiments/demo/recall.py), tokenised."""
    workdir = result.parent.parent
    text, kind = workdir / f"{result.name}.jsonl", recall.KINDS[result.name]
    recall.write(workdir / "tokens" / "general" / "train", text, RECALL_DOCUMENTS, kind)
    options = tokenizing.Options(holdout=HOLDOUT)
    infos = tokenizing.tokenize([text], result, workdir / "tokenizer_4k", options)
    console.print(f"{infos['train'].documents:,} documents, {infos['train'].tokens:,} tokens")


def make_questions(result: Path) -> None:
    """Which passage goes on? Asked of held-out text, by the gates and in the report."""
    held_out = {name: result.parent / "tokens" / name / "validation" for name in SOURCES}
    cloze.write(held_out, result, QUESTIONS)


def count_baselines(result: Path) -> None:
    """Mean loss of n-gram models, trained on all sources, on each source's held-out documents."""

    def documents(split: str, *sources: str) -> Iterator:
        for source in sources:
            split_corpus = Corpus(result.parent / "tokens" / source / split)
            yield from (split_corpus.document(i).tokens for i in range(len(split_corpus)))

    losses = {}
    for name, order in BASELINES.items():
        model = NgramModel(documents("train", *SOURCES), VOCAB_SIZE, order)
        losses[name] = {
            source: float(model.losses(documents("validation", source)).mean())
            for source in SOURCES
        }
        each = ", ".join(f"{source} {loss:.3f}" for source, loss in losses[name].items())
        console.print(f"{name}: {each} nats per held-out token")
    write_json(result, losses)


def climb(result: Path) -> None:
    """Small runs, their fit, and the main model's size and loss as they foresee it."""
    ladder.run_ladder(result, console.print)
    made = json.loads((result / ladder.PLAN_FILE).read_text())
    console.print(
        f"main model: {made['layers']} layers of {made['dim']}, {made['params']:,} parameters in "
        f"products, on {made['tokens']:,} tokens"
    )
    if made["loss"] is not None:
        low, high = made["loss_ci"]
        console.print(
            f"forecast of its held-out loss: {made['loss']:.3f} ({made['level']:.0%}: "
            f"{low:.3f} to {high:.3f})"
        )
    for warning in made["warnings"]:
        console.print(f"warning: {warning}", markup=False)


def train(workdir: Path) -> int:
    """Runs the training program as a user would; an interruption reaches it, too."""
    command = [sys.executable, "-m", "llama3_jax.train"]
    command += [f"--config={CONFIG}:{workdir}", f"--workdir={workdir}"]
    # Huge pages for XLA's buffers: a tenth off the step. Must be there when the process starts.
    child = subprocess.Popen(command, env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the trainer has had the signal as well: it saves and ends


def summarise(workdir: Path) -> None:
    """Where the model ended beside the baselines, and where to look."""
    records = read_metrics(workdir)
    final = [record for record in records if record["kind"] == "validation"][-1]
    baselines = json.loads((workdir / BASELINES_FILE).read_text())
    table = Table(title="Loss on held-out documents, nats per token")
    for column in ("source", *baselines, "this model", "bits per byte"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source, loss in final["losses"].items():
        if source not in SOURCES:
            continue
        counted = [f"{baselines[name][source]:.3f}" for name in baselines]
        table.add_row(source, *counted, f"{loss:.3f}", f"{final['bits_per_byte'][source]:.3f}")
    console.print(table)
    for record in records:
        if record["kind"] == "evaluation" and "needle" in record:
            found = f"{record['needle']['found']} of {record['needle']['asked']}"
            console.print(f"needles found by the {record['model']} model: {found}")
    samples = [record for record in records if record["kind"] == "sample"][-1]["samples"]
    for sample in samples:
        console.print(f"[bold]{sample['prompt']!r}[/bold] goes on: {sample['text']!r}")
    console.print(f"\nLook at {workdir / 'report.html'} in a browser; TensorBoard events are in "
                  f"{workdir / 'tensorboard'}; try\n  .venv/bin/python -m llama3_jax.generate "
                  f"--model={workdir} --prompt='To be'")  # fmt: skip


if __name__ == "__main__":
    define_flags()
    cli.run(main)
