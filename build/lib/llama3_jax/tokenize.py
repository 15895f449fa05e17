"""Tokenises text files into corpora for training.

    python -m llama3_jax.tokenize --input='data/web/*.jsonl' --output=corpora/web \\
        --tokenizer=tokenizer.model --holdout=0.01 --workers=8

Writes corpora/web/train and corpora/web/validation. Run it again after an interruption: finished
pieces are kept.
"""

import glob
from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.data import tokenizing
from llama3_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    options = tokenizing.Options()
    flags.DEFINE_multi_string("input", [], "jsonl(.gz), parquet or txt files; may be a pattern.")
    flags.DEFINE_string("output", None, "Directory of the corpus.", required=True)
    flags.DEFINE_string("tokenizer", None, "A .tiktoken file or tokenizer folder.", required=True)
    flags.DEFINE_string("text_field", options.text_field, "Field or column with the text.")
    flags.DEFINE_string("id_field", options.id_field, "Field or column with the document's id.")
    flags.DEFINE_float("holdout", 0.0, "Share of the documents that go to validation.")
    flags.DEFINE_integer("workers", 1, "Processes.", lower_bound=1)


def main(_) -> None:
    inputs = []
    for pattern in FLAGS.input:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"--input={pattern}: no such file")
        inputs += map(Path, matches)
    infos = tokenizing.tokenize(
        inputs,
        Path(FLAGS.output),
        Path(FLAGS.tokenizer),
        tokenizing.Options(FLAGS.text_field, FLAGS.id_field, FLAGS.holdout),
        FLAGS.workers,
    )
    for split, info in infos.items():
        print(f"{FLAGS.output}/{split}: {info.documents:,} documents, {info.tokens:,} tokens, "
              f"{info.utf8_bytes / max(info.tokens, 1):.2f} bytes per token")  # fmt: skip


if __name__ == "__main__":
    define_flags()
    cli.run(main)
