"""Evaluates a model: multiple-choice tasks, held-out text, needles in haystacks; all offline.

    python -m llama3_jax.evaluate --model=runs/demo --task=cloze=cloze.jsonl --task=arc=olmo:arc_easy \\
        --held_out=code=runs/demo/tokens/code/validation --output=runs/demo/evaluation
    python -m llama3_jax.evaluate --model=runs/demo/averaged --haystack=moby_dick.txt \\
        --lengths=4096,32768,131072 --keys=1,4 --mesh=context=8

--model is a run's workdir (its newest checkpoint), one checkpoint, a model folder (the averaged
one, converted weights), or a Hugging Face directory; where there is no tokenizer beside it, give one by
--tokenizer. Needles are scored in one forward pass each, rows spread over the mesh's context axis,
with the words of the run's own needles where it has some. --output gets results.json and, with
needles, evaluation.html with the heat map.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli, xla
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.evaluation.metrics import Metric, bits_per_byte
from llama3_jax.evaluation.scoring import Scorer
from llama3_jax.evaluation.suite import EvaluationConfig, Suite, needle_summary
from llama3_jax.files import check_output_file, remove, write_json
from llama3_jax.parallel import processes
from llama3_jax.parallel.mesh import MeshConfig, make_mesh
from llama3_jax.reporting.evaluation import heat_maps
from llama3_jax.reporting.page import Section, plots_html, write_page
from llama3_jax.schema import parse
from llama3_jax.training.loading import check_tokenizer, find_tokenizer, load
from llama3_jax.training.state import abstract_params, relayout

FLAGS = flags.FLAGS
_LOOK = ("statement", "keys", "key_words", "value_words")  # of NeedleConfig
RESULTS_FILE, PAGE_FILE = "results.json", "evaluation.html"


def define_flags() -> None:
    processes.define_flags()
    flags.DEFINE_string(
        "model", None, "Run, checkpoint, model folder or Hugging Face weights.", required=True
    )
    flags.DEFINE_string("tokenizer", None, "A .tiktoken file or folder; default: the run's.")
    flags.DEFINE_multi_string("task", [], "name=FILE.jsonl or name=olmo:TASK; several times.")
    flags.DEFINE_multi_string("held_out", [], "name=CORPUS, tokenised; several times.")
    flags.DEFINE_integer("held_out_tokens", 1_000_000, "Of each corpus at most.", lower_bound=1)
    flags.DEFINE_string("haystack", None, "A tokenised corpus or a text file, for needles.")
    flags.DEFINE_list("lengths", [], "Of the haystacks, in tokens.")
    flags.DEFINE_integer("depths", 11, "Places of the needle, the two ends among them.")
    flags.DEFINE_integer("seeds", 5, "Haystacks of each length and depth.", lower_bound=1)
    flags.DEFINE_list(
        "keys", None, "Needles in a haystack; one is asked for. Default: the run's, or 1."
    )
    flags.DEFINE_string(
        "statement", None, "The needle, with {key} and {value}; default: the run's, or English."
    )
    flags.DEFINE_list("key_words", None, "What {key} may be; default: the run's, or English nouns.")
    flags.DEFINE_list("value_words", None, "What {value} may be; as --key_words.")
    flags.DEFINE_integer("length", 2048, "Of rows for tasks and held-out text.", lower_bound=2)
    flags.DEFINE_integer("batch_tokens", 16_384, "Tokens computed at once.", lower_bound=1)
    flags.DEFINE_string("mesh", "", "Devices along the axes, as data=2,context=4.")
    flags.DEFINE_string("output", None, "Folder for results.json and evaluation.html.")
    cli.define_overwrite()


def main(_) -> None:
    tasks, held_out = _pairs("task"), _pairs("held_out")
    lengths = _numbers("lengths")
    if bool(FLAGS.haystack) != bool(lengths):
        raise UserError("--haystack and --lengths belong together")
    values = dict(length=FLAGS.length, tasks=tasks, batch_tokens=FLAGS.batch_tokens)
    if held_out:
        values["held_out_tokens"] = FLAGS.held_out_tokens
    if lengths:
        given = {k: FLAGS[k].value for k in ("statement", "key_words", "value_words")}
        given["keys"] = FLAGS.keys and _numbers("keys")
        values["needle"] = needles_of_run(Path(FLAGS.model)) | dict(
            haystack=FLAGS.haystack, lengths=lengths, depths=FLAGS.depths, seeds=FLAGS.seeds,
            **{key: value for key, value in given.items() if value},
        )  # fmt: skip
    config = parse(EvaluationConfig, values, "flags")
    if FLAGS.output:
        for name in (RESULTS_FILE, PAGE_FILE):
            check_output_file("--output", Path(FLAGS.output) / name, FLAGS.overwrite)
    xla.start()
    mesh = parse(MeshConfig, {key: int(n) for key, n in _split(FLAGS.mesh, "mesh")}, "--mesh")
    with processes.joined(processes.from_flags()):
        evaluate(config, mesh, held_out)


def evaluate(config: EvaluationConfig, mesh: MeshConfig, held_out: dict[str, str]) -> None:
    corpora = {name: Corpus(place) for name, place in held_out.items()}
    path = Path(FLAGS.model)
    folder = find_tokenizer(path, FLAGS.tokenizer)
    tokenizer = tokenizers.load(folder)
    for corpus in corpora.values():
        if corpus.info.tokenizer != tokenizer.fingerprint:
            raise UserError(f"{corpus.directory} was tokenised by another tokenizer than {folder}")
    suite = Suite(config, corpora, tokenizer)
    if config.needle:
        suite.check_lengths(config.needle.lengths)
    if mesh == MeshConfig() and jax.process_count() > 1:
        raise UserError(
            f"--mesh is required with several processes: of {jax.device_count()} devices"
        )
    layout = make_mesh(mesh, jax.devices()[:1] if mesh == MeshConfig() else None)
    loaded = load(path, lambda model: abstract_params(model, layout, saved=True))
    check_tokenizer(loaded, tokenizer)
    params = relayout(loaded.params, loaded.config, None, layout)
    scorer = Scorer(loaded.config, params, layout, config.batch_tokens)

    say = Console(quiet=not processes.is_first(), soft_wrap=True, highlight=False).print
    for length in config.needle.lengths if config.needle else ():
        if loaded.length is None or length > loaded.length:
            if loaded.length:
                say(f"warning: --lengths: {length:,} is beyond {loaded.length:,}, the length of the "
                    "longest rows that the model was trained on")  # fmt: skip
            scorer.check_memory(length)
    scores: dict[str, Metric] = {}
    for part in suite.short_parts:
        scores |= suite.short(part, scorer)
    results = {"model": str(path), "scores": {name: m.value for name, m in scores.items()}}
    results["bits_per_byte"] = {
        name: bits_per_byte(scores[f"held_out/{name}"], corpus, config.held_out_tokens)
        for name, corpus in corpora.items()
    }
    if scores:
        say(_table(scores))
    if config.needle:
        found = []
        for length in config.needle.lengths:
            found += (at_length := suite.needle(length, scorer))
            say(f"length {length:,}: {sum(r.found for r in at_length)} of {len(at_length)} needles")
        results["needle"] = needle_summary(found)
    if FLAGS.output and processes.is_first():
        output = Path(FLAGS.output)
        remove(output / PAGE_FILE)  # an older one would be of other results
        write_json(output / RESULTS_FILE, results)
        if config.needle:
            plots = heat_maps(path.name, results["needle"])
            section = Section("Needle in a haystack", plots_html("needle", plots))
            write_page(output / PAGE_FILE, f"Evaluation of {path}", [section])
        say(f"wrote {output}")


def needles_of_run(path: Path) -> dict[str, Any]:
    """How needles look in the run that `path` is, or is a checkpoint or average of; {} if unknown.

    A model that never saw the words of other needles finds none of them.
    """
    for folder in (path, *path.absolute().parents[:2]):
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found = (config.get("evaluation") or {}).get("needle") or {}
            return {k: v for k, v in found.items() if k in _LOOK}
    return {}


def _table(scores: dict[str, Metric]) -> Table:
    table = Table("metric", "value", "items")
    for name, metric in scores.items():
        table.add_row(name, f"{metric.value:.4f}", f"{len(metric.sums):,}")
    return table


def _pairs(flag: str) -> dict[str, str]:
    return dict(pair for given in getattr(FLAGS, flag) for pair in _split(given, flag))


def _split(text: str, flag: str) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if bad := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise UserError(f"--{flag}={text}: {bad[0]!r} should be name=value")
    return [(name, value) for name, _, value in pairs]


def _numbers(flag: str) -> list[int]:
    try:
        return [int(number) for number in getattr(FLAGS, flag)]
    except ValueError:
        raise UserError(f"--{flag}={','.join(getattr(FLAGS, flag))}: should be numbers") from None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
