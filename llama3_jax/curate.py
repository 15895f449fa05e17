"""Turns web pages into documents and token shards for training, and says what became of each page.

    python -m llama3_jax.curate --config=experiments/curation/web.py --workdir=runs/web
    python -m llama3_jax.curate --config=… --workdir=… --sample=1000        # a trial, in sample_1000/
    python -m llama3_jax.curate --config=… --workdir=… --explain=https://example.org/page
    python -m llama3_jax.curate --config=… --workdir=… --runner=ray --address=host:6379
    python -m llama3_jax.curate label --model=runs/8b --rubric=quality --input=runs/web/… \\
        --output=labels.parquet                                     # a Llama judges documents
    python -m llama3_jax.curate agree --reference=labels.parquet --other=human.jsonl
    python -m llama3_jax.curate train_fasttext --input=labels.parquet --output=models/quality
    python -m llama3_jax.curate train_roberta --base=distilroberta-base --input=… --output=…

Run it again after an interruption or a change: stages whose inputs and config are unchanged are
passed over. <workdir>/documents holds what is kept, <workdir>/tokens its token shards,
<workdir>/stages what each stage kept and rejected, with reasons; funnel.json and curation.html
tell it all. --explain says, of a URL or document of an earlier run, which stage decided what, and
why, with the text before and after.
"""

import sys
from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.curation import config as configs
from llama3_jax.curation import engine, explain, run
from llama3_jax.curation.commands import COMMANDS
from llama3_jax.curation.label import Judge
from llama3_jax.curation.layout import DOCUMENTS
from llama3_jax.errors import UserError
from llama3_jax.files import check_folder
from llama3_jax.reporting import curation as reporting
from llama3_jax.training.loading import load_with_tokenizer

FLAGS = flags.FLAGS
_config = None


def define_flags() -> None:
    global _config
    _config = cli.define_config()
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.DEFINE_enum("runner", "native", ["native", "ray"], "In this process, or on Ray.")
    flags.DEFINE_string("address", None, "Of a Ray cluster: host:6379 or auto. Default: start one.")
    flags.DEFINE_integer("sample", None, "About so many documents a source.", lower_bound=1)
    flags.DEFINE_string("explain", None, "A URL, HTML file or document id of an earlier run.")


def main(_) -> None:
    if not FLAGS.workdir:
        raise UserError("--workdir is required: the directory for the run")
    workdir = Path(FLAGS.workdir)
    if FLAGS.sample:
        workdir = workdir / f"sample_{FLAGS.sample}"
    if FLAGS.explain:
        print(explain.explain(workdir, FLAGS.explain))
        return
    config, stages = configs.parse(cli.require_config(_config.value))
    check_folder("--workdir", workdir)
    engine.start(FLAGS.runner, FLAGS.address)
    funnel = run.run(config, stages, workdir, FLAGS.sample)
    print("\n".join(run.damage(funnel)))
    page = reporting.write_page(workdir)
    print(f"{workdir / DOCUMENTS}, {page}")


def load_judge(path: Path, tokenizer: str | None) -> Judge:
    loaded, own = load_with_tokenizer(path, tokenizer)
    return Judge(loaded.config, loaded.params, own)


if __name__ == "__main__":
    if command := COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else ""):
        command.define_flags()
        cli.run(lambda _: command.main(load_judge), [sys.argv[0], *sys.argv[2:]])
    else:
        define_flags()
        cli.run(main)
