"""Trains, compares and exports tokenizers, and encodes text files into corpora for training.

    python -m llama3_jax.tokenize train --base=tokenizer.model --new_tokens=27744 \\
        --input='data/*.jsonl' --output=my_tokenizer --workers=8
    python -m llama3_jax.tokenize stats --tokenizers=mine=my_tokenizer,meta=tokenizer.model \\
        --input='held_out/*.jsonl' --output=tokenizer_stats
    python -m llama3_jax.tokenize export --tokenizer=my_tokenizer --output=tokenizer.json
    python -m llama3_jax.tokenize encode --tokenizer=my_tokenizer --input='data/web/*.jsonl' \\
        --output=corpora/web --holdout=0.01 --workers=8

train: --base may also be "bytes" (from scratch) and --base_tokens cuts it (Llama 3's first 100256
are cl100k's). export: the name of --output says the format: *.tiktoken and *.model, *.json
(Hugging Face), else a folder. encode writes <output>/train and <output>/validation; run it again
after an interruption: finished pieces are kept. What is there whole is replaced with --overwrite
only. `... COMMAND --help` lists a command's options.
"""

import glob
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama3_jax import cli
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data import tokenizer_stats, tokenizer_training, tokenizing
from llama3_jax.data.documents import Fields
from llama3_jax.errors import UserError
from llama3_jax.files import OVERWRITE, check_folder, check_output_file, check_output_folder
from llama3_jax.reporting import tokenizers as reporting

FLAGS = flags.FLAGS
PAGE_FILE = "stats.html"


def define_flags(command: str) -> None:
    """Defines the options of one command: those of another are unknown."""
    if command != "export":
        flags.DEFINE_multi_string(
            "input", [], "jsonl(.gz), parquet or txt files; may be a pattern."
        )
        flags.DEFINE_string("text_field", "text", "Field or column with the text.")
        flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1)
    if command in ("encode", "train"):
        flags.DEFINE_string("id_field", "id", "Field or column with the document's id.")
        flags.DEFINE_float("holdout", 0.0, "Share of the documents that go to validation.")
    if command in ("train", "stats"):
        flags.DEFINE_string("language_field", "lang", "Field or column with the language.")
    if command in ("encode", "export"):
        tokenizer = "A tokenizer folder, a .tiktoken or .model file of ranks, or a tokenizer.json."
        flags.DEFINE_string("tokenizer", None, tokenizer, required=True)
    flags.DEFINE_string("output", None, _OUTPUTS[command], required=True)
    if command != "stats":
        cli.define_overwrite()
    if command == "train":
        options = tokenizer_training.Options()
        flags.DEFINE_string("base", None, 'Tokenizer to go on from, or "bytes".', required=True)
        flags.DEFINE_integer("base_tokens", None, "How many of the base's tokens to take; all.")
        flags.DEFINE_integer("new_tokens", None, "Tokens to add.", required=True)
        flags.DEFINE_list("weights", [], "language=factor,…: how much its documents count; else 1.")
        flags.DEFINE_float(
            "covered", None, "Leave out pre-tokens that the base encodes with at least so many "
            "characters a token.",
        )  # fmt: skip
        flags.DEFINE_integer(
            "max_pretokens", options.max_pretokens, "Different pre-tokens kept, the most frequent."
        )
        flags.DEFINE_integer("specials", options.specials, "Special tokens after the others.")
    if command == "stats":
        flags.DEFINE_list("tokenizers", [], "name=path,…, also of SentencePiece models.")


_OUTPUTS = {
    "train": "Folder of the tokenizer.",
    "stats": f"Folder of {tokenizer_stats.STATS_FILE} and {PAGE_FILE}.",
    "export": "File or folder to write.",
    "encode": "Directory of the corpus.",
}


def train(_) -> None:
    inputs = _inputs()
    given = [] if FLAGS.base == "bytes" else [FLAGS.base]
    output = check_output_folder("--output", FLAGS.output, FLAGS.overwrite, given)
    base = tokenizer_training.BYTES
    if FLAGS.base != "bytes":
        base = tokenizers.load(FLAGS.base).ranks
    if FLAGS.base_tokens is not None:
        if not 256 <= FLAGS.base_tokens <= len(base):
            raise UserError(f"--base_tokens={FLAGS.base_tokens}: must be 256 to {len(base)}")
        base = {token: rank for token, rank in base.items() if rank < FLAGS.base_tokens}
    options = tokenizer_training.Options(
        Fields(FLAGS.text_field, FLAGS.id_field, FLAGS.language_field),
        _pairs("weights", FLAGS.weights),
        FLAGS.holdout,
        FLAGS.covered,
        FLAGS.max_pretokens,
        FLAGS.specials,
    )
    trained, record = tokenizer_training.train(
        inputs, base, FLAGS.new_tokens, options, FLAGS.workers
    )
    tokenizer_training.save(trained, record, output)
    print(f"{output}: {len(base):,} tokens of the base, {FLAGS.new_tokens:,} new, "
          f"{trained.specials} specials; {record['pretokens']:,} different pre-tokens")  # fmt: skip
    if record["rare_left_out"]:
        print(f"not exact: the {record['rare_left_out']:,} rarest pre-tokens "
              f"({record['rare_left_out_share']:.2%} of the text) were left out by "
              f"--max_pretokens={FLAGS.max_pretokens}")  # fmt: skip
    if FLAGS.covered is not None:
        print(f"{record['covered_left_out']:,} pre-tokens that the base covers were left out")


def stats(_) -> None:
    output = check_folder("--output", FLAGS.output)
    fields = Fields(FLAGS.text_field, language=FLAGS.language_field)
    paths = _pairs("tokenizers", FLAGS.tokenizers)
    if bad := [name for name in paths if not re.fullmatch(r"[\w.-]+", name)]:
        raise UserError(f"--tokenizers: name {bad[0]!r} must be letters, digits, _, . and -")
    measured, usage = tokenizer_stats.measure(_inputs(), paths, fields, FLAGS.workers)
    tokenizer_stats.save(measured, usage, output)
    reporting.write_page(measured, usage, output / PAGE_FILE)
    console = Console(soft_wrap=True)
    for key, title in reporting.MEASURES.items():
        _print(console, title, reporting.measure_table(measured, key))
    _print(console, "Use of the ids", reporting.use_table(measured))
    console.print(f"{output / tokenizer_stats.STATS_FILE}, {output / PAGE_FILE}", highlight=False)


def export(_) -> None:
    output = Path(FLAGS.output)
    check = check_output_file if output.suffix else check_output_folder
    check("--output", output, FLAGS.overwrite, [FLAGS.tokenizer])
    loaded = tokenizers.load(FLAGS.tokenizer)
    if output.suffix == ".json":
        output.parent.mkdir(parents=True, exist_ok=True)
        loaded.save_json(output)
    elif output.suffix in (".tiktoken", ".model"):
        output.parent.mkdir(parents=True, exist_ok=True)
        loaded.save_ranks(output)
    elif output.suffix:
        raise UserError(f"--output={output}: *.json, *.tiktoken, *.model or a folder's name")
    else:
        output.mkdir(parents=True, exist_ok=True)
        loaded.save(output)
    print(f"{output}: {len(loaded.ranks):,} tokens, {loaded.specials} specials")


def encode(_) -> None:
    inputs, output = _inputs(), check_folder("--output", FLAGS.output)
    if tokenizing.existing(output) and not FLAGS.overwrite:
        raise UserError(
            f"--output={output} holds a corpus; name another folder, or add --{OVERWRITE}"
        )
    infos = tokenizing.tokenize(
        inputs,
        output,
        Path(FLAGS.tokenizer),
        tokenizing.Options(FLAGS.text_field, FLAGS.id_field, FLAGS.holdout),
        FLAGS.workers,
    )
    for split, info in infos.items():
        print(f"{FLAGS.output}/{split}: {info.documents:,} documents, {info.tokens:,} tokens, "
              f"{info.utf8_bytes / max(info.tokens, 1):.2f} bytes per token")  # fmt: skip


COMMANDS: dict[str, Callable] = {"train": train, "stats": stats, "export": export, "encode": encode}


def _inputs() -> list[Path]:
    inputs = []
    for pattern in FLAGS.input:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input={pattern}: no such file")
        inputs += map(Path, matches)
    return inputs


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, right = value.partition("=")
        if not (name and equals and right):
            raise UserError(f"--{option}={value}: must look like name=value")
        if name in pairs:
            raise UserError(f"--{option}: {name} occurs twice")
        pairs[name] = right
    return pairs


def _print(console: Console, title: str, data: reporting.Table) -> None:
    table = Table(title=title)
    for column in data.columns:
        left = column == data.columns[0] or column in data.words
        table.add_column(column, justify="left" if left else "right")
    for row in data.rows:
        table.add_row(*map(escape, row))
    console.print(table)


def run(argv: list[str]) -> None:
    """Runs the command that stands first in `argv`, which loses it."""
    command = argv.pop(1) if len(argv) > 1 and not argv[1].startswith("-") else None
    if command is None and {"--help", "-help", "--helpfull"} & set(argv):
        print(__doc__)
        return
    if command not in COMMANDS:
        given = f"{command!r} is no command" if command else "no command"
        sys.exit(
            cli.fail(f"{given}: python -m llama3_jax.tokenize {'|'.join(COMMANDS)} --option=…")
        )
    define_flags(command)
    cli.run(COMMANDS[command])


if __name__ == "__main__":
    run(sys.argv)
