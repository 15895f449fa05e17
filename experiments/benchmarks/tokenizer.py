"""Extends cl100k_base by 27,744 tokens, as Llama 3 did, beside Hugging Face's trainer and Meta's result.

    pip install -e '.[demo,tokenizer-benchmark]'
    python -m experiments.benchmarks.tokenizer --text=runs/tokenizer_text --json=tokenizer.json

Training text: LibreOffice's help in 11 languages but English (tokenizer_text.py), 20 MB and more;
held out: every tenth page, no line of which is in the training text, also of English. Ranks come
from the installed llama-models: the first 100,256 of Meta's are cl100k's, checked by tiktoken's own
checksum; Meta's tokenizer is the whole file.

Ours leaves out pre-tokens that cl100k encodes with 3 characters a token or more, and weighs the
languages so that each counts as much as the one with most text.

- Time: ours adds 27,744 tokens to cl100k, Hugging Face's BpeTrainer makes 32,000 from scratch, from
  the same files, a process each, taking turns; the ratio is taken within a round.
- Compression: characters a token on held-out text. Ours is trained on text of this kind and Meta's
  is not, which flatters ours; so beside it stand kinds of text on which neither was trained, the
  demo's sources: messages of web programs for the languages, plays and a Bible for English. Every
  tokenizer splits by its own pattern.
- Encoding: held-out documents of all languages, one a call, on one thread; the ids must be equal.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path

import tiktoken
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.benchmarks import tokenizer_text
from experiments.benchmarks.tokenizer_text import ENGLISH, LANGUAGES
from experiments.demo import corpus
from llama3_jax import cli
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.errors import UserError
from llama3_jax.files import write_json

CL100K, NEW_TOKENS, COVERED = 100_256, 27_744, 3.0
# Under this name tiktoken looks for cl100k_base in its cache, and checks what it finds.
CL100K_CACHED = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
SIDES = ("ours", "Hugging Face")
ENCODERS = ("ours", "tiktoken", "tokenizers")

FLAGS = flags.FLAGS
console = Console(soft_wrap=True, highlight=False)


def define_flags() -> None:
    flags.DEFINE_string("text", "runs/tokenizer_text", "Folder of the text, made if not there.")
    flags.DEFINE_integer("rounds", 5, "Times that each side trains, and encodes.", lower_bound=1)
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes that count pre-tokens for ours.")
    flags.DEFINE_float("seconds", 2.0, "CPU time that a measurement of encoding takes.")
    flags.DEFINE_string("json", None, "File that takes every measurement.")


def metas_file() -> Path:
    found = util.find_spec("llama_models")
    if found is None:
        raise UserError("needs Meta's ranks: pip install -e '.[tokenizer-benchmark]'")
    return Path(found.origin).parent / "llama3" / "tokenizer.model"


def cl100k(meta: tokenizers.Tokenizer, folder: Path) -> tiktoken.Encoding:
    """tiktoken's cl100k_base, from Meta's ranks; raises unless the bytes are OpenAI's."""
    ranks = {token: rank for token, rank in meta.ranks.items() if rank < CL100K}
    tokenizers.Tokenizer(ranks).save_ranks(folder / CL100K_CACHED)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return tiktoken.get_encoding("cl100k_base")


def measure(name: str, **options) -> dict[str, float]:
    """What the function of this name returns in a new process."""
    command = [sys.executable, "-m", "experiments.benchmarks.tokenizer_measure"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"}
    request = json.dumps([name, options])
    child = subprocess.run([*command, request], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(child.stdout)


def in_turn(name: str, sides: tuple[str, ...], **options) -> dict[str, list[dict]]:
    """Each side --rounds times, all of them before any again, and every other round backwards."""
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for number in track(range(FLAGS.rounds), name, console=console, transient=True):
        for side in sides[:: (-1) ** number]:
            runs[side].append(measure(name, side=side, **options))
    return runs


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def other_texts() -> dict[str, list[str]]:
    """The demo's texts of other kinds, by language."""
    texts = {ENGLISH: [document["text"] for document in corpus.general()]}
    names = {"zh-Hans": "zh-CN", "pt-BR": "pt"}
    messages = sorted(corpus.multilingual(), key=lambda document: document["lang"])
    for document in messages:
        language = names.get(document["lang"], document["lang"])
        if language in LANGUAGES:
            texts.setdefault(language, []).append(document["text"])
    return texts


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def show_training(runs: dict[str, list[dict]], megabytes: float) -> None:
    table = Table("side", "tokens", "seconds", "CPU seconds of the process",
                  title=f"Training on {megabytes:.1f} MB in {len(LANGUAGES)} languages")  # fmt: skip
    tokens = (f"{CL100K:,} + {NEW_TOKENS:,}", "32,000 from scratch")
    for (side, measured), made in zip(runs.items(), tokens, strict=True):
        columns = ([run[key] for run in measured] for key in ("seconds", "process_cpu_seconds"))
        table.add_row(side, made, *map(spread, columns))
    console.print(table)
    ours, peer = runs.values()
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, peer, strict=True)]
    console.print(f"ours / Hugging Face, by round: {spread(ratios)}; wanted: at most 1")


def compression(texts: dict[str, list[str]], encoders: dict) -> dict[str, dict[str, float]]:
    """Characters per token, by language and tokenizer."""
    return {
        language: {
            name: sum(map(len, documents)) / sum(len(encode(text)) for text in documents)
            for name, encode in encoders.items()
        }
        for language, documents in texts.items()
    }


def show_compression(title: str, measured: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(measured.values())))
    table = Table("language", *names, "ours / Meta's", "ours / cl100k", title=title)
    for language, values in measured.items():
        ratios = (values["ours"] / values[other] for other in ("Meta's", "cl100k"))
        table.add_row(language, *(f"{values[name]:.3f}" for name in names),
                      *(f"{ratio:.4f}" for ratio in ratios))  # fmt: skip
    console.print(table)


def show_encoding(runs: dict[str, list[dict]]) -> None:
    table = Table("encoder", "MB per second and core", "ours / it", title="Encoding")
    for side, measured in runs.items():
        speeds = [run["bytes_per_second"] / 1e6 for run in measured]
        pairs = zip(runs["ours"], measured, strict=True)
        ratios = [a["bytes_per_second"] / b["bytes_per_second"] for a, b in pairs]
        table.add_row(side, spread(speeds), spread(ratios))
    console.print(table)
    if len({run["ids"] for measured in runs.values() for run in measured}) != 1:
        raise UserError("the encoders gave different ids")
    console.print("All encoders gave the same ids.")


def main(_) -> None:
    text = Path(FLAGS.text)
    meta = tokenizers.load(metas_file())
    tokenizer_text.build(text)
    files = [str(text / f"{language}.train.jsonl") for language in LANGUAGES]
    held_out = {lang: text / f"{lang}.held_out.jsonl" for lang in (ENGLISH, *LANGUAGES)}
    documents = {lang: read(path) for lang, path in held_out.items()}
    texts = [read(Path(file)) for file in files]
    size = sum(len(text.encode()) for documents in texts for text in documents)
    characters = [sum(map(len, documents)) for documents in texts]
    weights = {
        lang: f"{max(characters) / number:.1f}"
        for lang, number in zip(LANGUAGES, characters, strict=True)
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = cl100k(meta, folder)
        trained = in_turn(
            "train", SIDES, files=files, base=str(folder / CL100K_CACHED), new_tokens=NEW_TOKENS,
            options={"covered": COVERED, "weights": weights}, workers=FLAGS.workers, output=str(folder / "ours"),
        )  # fmt: skip
        ours = tokenizers.load(folder / "ours")
        ours.save_json(folder / "ours" / "tokenizer.json")
        encoded = in_turn(
            "encode", ENCODERS, files=[str(path) for path in held_out.values()],
            folder=str(folder / "ours"), seconds=FLAGS.seconds,
        )  # fmt: skip
    encoders = {"cl100k": base.encode_ordinary, "Meta's": meta.encode, "ours": ours.encode}
    help_pages = compression(documents, encoders)
    other = compression(other_texts(), encoders)

    show_training(trained, size / 1e6)
    show_compression("Characters per token, held-out help pages", help_pages)
    show_compression("Characters per token, kinds of text not trained on", other)
    for name, measured in (("help pages", help_pages), ("other kinds", other)):
        worst = min(v["ours"] / v["Meta's"] for lang, v in measured.items() if lang != ENGLISH)
        english = measured[ENGLISH]["ours"] / measured[ENGLISH]["cl100k"]
        console.print(f"{name}: worst ours / Meta's {worst:.4f}, wanted 0.99 or more; English ours / "
                      f"cl100k {english:.4f}, wanted 0.995 or more")  # fmt: skip
    show_encoding(encoded)
    if FLAGS.json:
        write_json(
            Path(FLAGS.json),
            {
                "bytes": size, "training": trained, "encoding": encoded,
                "help_pages": help_pages, "other_kinds": other, "weights": weights,
            },
        )  # fmt: skip


if __name__ == "__main__":
    define_flags()
    cli.run(main)
