"""The commands of `python -m llama3_jax.curate` that make classifiers: labels, agreement, training."""

import typing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags

from llama3_jax import cli
from llama3_jax.curation.fasttext_classifier import FastTextConfig, train_fasttext
from llama3_jax.curation.label import Judge, LabelConfig, compare, label
from llama3_jax.curation.labelled import Labelled, read_files, read_labels
from llama3_jax.curation.roberta_training import RobertaTrainingConfig, train_roberta
from llama3_jax.errors import UserError
from llama3_jax.files import check_output_file, check_output_folder
from llama3_jax.schema import Config, ConfigT, parse

FLAGS = flags.FLAGS
_ROBERTA_CHARACTERS = 50_000  # more than 512 tokens have


class Command(NamedTuple):
    define_flags: Callable[[], None]
    main: Callable[[Callable[[Path, str | None], Judge]], None]  # given what loads a Llama


def _define_label() -> None:
    flags.DEFINE_string("model", None, "Run, checkpoint, model folder or Hugging Face weights.")
    flags.DEFINE_string("tokenizer", None, "A tokenizer file or folder; default: the model's.")
    flags.DEFINE_multi_string("input", [], "Documents: parquet, jsonl(.gz) or txt.")
    flags.DEFINE_string("output", None, "The parquet that takes text and labels.")
    flags.DEFINE_integer("limit", None, "Label the first so many documents.", lower_bound=1)
    cli.define_overwrite()
    _define_config(LabelConfig)


def _label(load: Callable[[Path, str | None], Judge]) -> None:
    model, inputs = _required("model"), [Path(path) for path in FLAGS.input]
    output = check_output_file("--output", _required("output"), FLAGS.overwrite, inputs)
    judge = load(Path(model), FLAGS.tokenizer)
    counts = label(inputs, output, judge, _config(LabelConfig), FLAGS.limit)
    for answer, count in counts.most_common():
        print(f"{answer}: {count} of {counts.total()} documents")
    print(f"wrote {output}")


def _define_agree() -> None:
    flags.DEFINE_string("reference", None, "Labels (columns doc, label) to compare with.")
    flags.DEFINE_string("other", None, "Labels of the same documents by another judge or order.")


def _agree(_) -> None:
    print(compare(Path(_required("reference")), Path(_required("other"))))


def _define_training(cls: type[Config]) -> Callable[[], None]:
    def define() -> None:
        flags.DEFINE_multi_string(
            "input", [], "Labelled documents: what `label` wrote (columns text, label)."
        )
        flags.DEFINE_multi_string(
            "documents", [], "LABEL=FILE: all documents of the file have the label."
        )
        flags.DEFINE_string("output", None, "Folder of the classifier.")
        cli.define_overwrite()
        _define_config(cls)

    return define


def _train_fasttext(_) -> None:
    config, output = _config(FastTextConfig), _output_folder()
    documents = _documents(config.characters)
    _say_trained(train_fasttext(documents, output, config))


def _train_roberta(_) -> None:
    config, output = _config(RobertaTrainingConfig), _output_folder()
    documents = _documents(_ROBERTA_CHARACTERS)
    _say_trained(train_roberta(documents, output, config))


COMMANDS = {
    "label": Command(_define_label, _label),
    "agree": Command(_define_agree, _agree),
    "train_fasttext": Command(_define_training(FastTextConfig), _train_fasttext),
    "train_roberta": Command(_define_training(RobertaTrainingConfig), _train_roberta),
}


def _say_trained(result) -> None:
    print("on held-out documents:")
    print(result)
    print(f"wrote {FLAGS.output}")


def _documents(characters: int) -> list[Labelled]:
    if bool(FLAGS.input) == bool(FLAGS.documents):
        raise UserError("give labelled documents by --input=FILE or by --documents=LABEL=FILE, …")
    if FLAGS.input:
        return read_labels([Path(path) for path in FLAGS.input], characters)
    files: dict[str, list[Path]] = {}
    for given in FLAGS.documents:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise UserError(f"--documents={given}: LABEL=FILE, such as positive=references.parquet")
        files.setdefault(name, []).append(Path(path))
    return read_files(files, characters)


def _output_folder() -> Path:
    return check_output_folder("--output", _required("output"), FLAGS.overwrite, FLAGS.input)


def _required(flag: str) -> str:
    if not FLAGS[flag].value:
        raise UserError(f"--{flag} is required: {FLAGS[flag].help}")
    return FLAGS[flag].value


def _define_config(cls: type[Config]) -> None:
    """A flag for each field; what is not given keeps the config's default."""
    for name, field in cls.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default}"
        kinds = {kind for kind in (field.annotation, *typing.get_args(field.annotation))}
        define = flags.DEFINE_string
        for kind, of_kind in (
            (bool, flags.DEFINE_bool), (int, flags.DEFINE_integer), (float, flags.DEFINE_float)
        ):  # fmt: skip
            if kind in kinds:
                define = of_kind
        define(name, None, f"{cls.__name__}.{name}, {default}.")


def _config(cls: type[ConfigT]) -> ConfigT:
    given = {name: FLAGS[name].value for name in cls.model_fields}
    return parse(cls, {k: v for k, v in given.items() if v is not None}, where="options")
