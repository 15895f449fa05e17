"""How fast the loader is, beside grain's own packing, and how soon a resumed run has its batch.

    python -m experiments.benchmarks.loader --json=loader.json

Makes its corpora in a temporary folder. Every figure is the median (and range) over --repeats of a
process of its own on one core; sides and positions take turns. Speed counts tokens without padding
per second of CPU time of all threads. Grain's side reads the same files: uniform shuffle, mix of
sources, documents cut to the row where packed whole, its packer; it is spared targets and loss
mask. Start-up is the time from opening the corpora to the first batch, files in the page cache,
imports left out; "index alone" plans a first window of a simulated source too large to write here.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.benchmarks.loader_measure import LONG, MIX, SHORT, SIMULATED
from llama3_jax import cli
from llama3_jax.data import corpus as corpora
from llama3_jax.files import write_json

POSITIONS = (0.0, 0.1, 0.5, 0.9)
VOCAB_SIZE, SHARDS = 128_256, 4

FLAGS = flags.FLAGS
console = Console(soft_wrap=True, highlight=False)


def define_flags() -> None:
    flags.DEFINE_float("seconds", 2.0, "CPU time that a measurement of speed takes.")
    flags.DEFINE_integer("repeats", 5, "Processes a figure.", lower_bound=2)
    flags.DEFINE_integer("documents", 2_000_000, "Short documents of the start-up's corpora.")
    flags.DEFINE_float("step_tokens_per_second", None, "The demo's train step; else measured.")
    flags.DEFINE_string("json", None, "File that takes every measurement.")


def make_corpus(directory: Path, seed: int, documents: int, median: float, sigma: float) -> None:
    """Documents of log-normal length; token frequencies fall as 1/rank, as those of words do."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(np.log(median), sigma, documents), 2).astype(np.uint32)
    shards = []
    for number, part in enumerate(np.array_split(lengths, SHARDS)):
        ends = np.cumsum(part, dtype=np.int64)
        tokens = np.exp(rng.uniform(0, np.log(VOCAB_SIZE), ends[-1])).astype(np.uint32)
        file = f"shard-{number}.arrayrecord"
        writer = ArrayRecordWriter(str(directory / file), "group_size:1")
        for i, text in enumerate(np.split(tokens, ends[:-1])):
            writer.write(corpora.encode_record(corpora.Document(f"{number}-{i}", text)))
        writer.close()
        shards.append(corpora.Shard(file=file, documents=len(part), tokens=len(tokens)))
    np.save(directory / corpora.LENGTHS_FILE, lengths)
    info = corpora.DatasetInfo(
        format=corpora.FORMAT, tokenizer="none", vocab_size=VOCAB_SIZE, documents=documents,
        tokens=int(lengths.sum()), utf8_bytes=0, shards=shards,
    )  # fmt: skip
    write_json(directory / corpora.DATASET_FILE, info.model_dump())


def measure(name: str, **setup) -> dict[str, float]:
    """What the function of this name returns in a new process."""
    request = json.dumps([name, setup])
    command = [sys.executable, "-m", "experiments.benchmarks.loader_measure", request]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(child.stdout)


def in_turn(name: str, setups: list[dict]) -> list[dict]:
    """Each setup --repeats times, all of them before any again, and every other round backwards."""
    results = [{"measurement": name, **setup, "runs": []} for setup in setups]
    for repeat in track(range(FLAGS.repeats), name, console=console, transient=True):
        for setup, result in list(zip(setups, results, strict=True))[:: (-1) ** repeat]:
            result["runs"].append(measure(name, **setup))
    return results


def middle(result: dict, key: str, scale: float) -> tuple[float, str]:
    runs = sorted(run[key] * scale for run in result["runs"])
    median = statistics.median(runs)
    return median, f"{median:.3g} ({runs[0]:.3g}-{runs[-1]:.3g})"


def show_speeds(results: list[dict], step: float) -> None:
    table = Table("packing", "row", "ours", "grain", "ratio", "padding", "of grain", "ours / step",
                  title="Million tokens per second and core")  # fmt: skip
    for mine, peer in zip(results[::2], results[1::2], strict=True):
        (speed, text), (its, its_text) = (
            middle(r, "tokens_per_second", 1e-6) for r in (mine, peer)
        )
        padding = [f"{middle(r, 'padding', 100)[0]:.1f}%" for r in (mine, peer)]
        table.add_row(mine["packing"], str(mine["length"]), text, its_text, f"{speed / its:.2f}",
                      *padding, f"{speed * 1e6 / step:.0f}")  # fmt: skip
    console.print(table, f"step: the demo's train step, {step:,.0f} tokens/s; wanted: 20 or more")


def show_starts(title: str, results: list[dict]) -> None:
    table = Table("position", "ms", "ms of CPU time", title=title)
    cells = [[middle(result, key, 1e3) for key in ("wall", "cpu")] for result in results]
    for position, row in zip(POSITIONS, cells, strict=True):
        table.add_row(f"{position:.0%}", *(text for _, text in row))
    ratios = [late / early for (late, _), (early, _) in zip(cells[3], cells[1], strict=True)]
    table.add_row("90% / 10%", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)


def main(_) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(MIX):
            make_corpus(Path(folder, "long", name), seed, 20_000, median=600, sigma=1.2)
            make_corpus(Path(folder, "many", name), seed, FLAGS.documents // len(MIX), 20, 0.5)
        step = FLAGS.step_tokens_per_second or measure("train_step")["tokens_per_second"]
        speeds = in_turn("speed", [
            dict(side=side, seconds=FLAGS.seconds, folder=f"{folder}/long", packing=packing,
                 length=length)
            for packing in ("best_fit", "concat") for length in (SHORT, LONG)
            for side in ("ours", "grain")
        ])  # fmt: skip
        many = f"{folder}/many"
        starts = in_turn("start_up", [dict(folder=many, position=p) for p in POSITIONS])
    indices = in_turn("index", [dict(position=p) for p in POSITIONS])
    show_speeds(speeds, step)
    show_starts(f"To the first batch of {FLAGS.documents:,} documents", starts)
    show_starts(f"Index alone of {SIMULATED:,} documents", indices)
    if FLAGS.json:
        measured = [*speeds, *starts, *indices]
        write_json(Path(FLAGS.json), {"train_step_tokens_per_second": step, "measured": measured})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
