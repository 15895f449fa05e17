"""Converts weights between Hugging Face and this package, either way.

    python -m llama3_jax.convert --from=Meta-Llama-3-8B --to=models/llama3_8b
    python -m llama3_jax.convert --from=runs/demo --to=exported/demo --dtype=bfloat16
    python -m llama3_jax.convert average --from=runs/a/checkpoints/100 --from=runs/a/checkpoints/200 \\
        --weights=1,2 --to=models/averaged

--from tells the direction: a Hugging Face directory (config.json and safetensors) becomes a model
folder; a run's workdir (its newest checkpoint), one checkpoint or a model folder becomes a
Hugging Face directory, with --max_length (by default that of the longest rows trained on) as the
longest text it says it was trained for. The model's tokenizer goes with it, as tokenizer.json or as
the folder tokenizer.

`average` writes the mean of several models, in float32, as a model folder: equal parts, or --weights.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from llama3_jax import cli
from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data import tokenizer_json
from llama3_jax.errors import UserError
from llama3_jax.files import atomic_path, check_output_folder
from llama3_jax.model import hf
from llama3_jax.model.definition import define
from llama3_jax.training.averaging import average_models
from llama3_jax.training.checkpoint import CHECKPOINTS, LoadedModel, load_model, save_model

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("from", None, "What to convert.", required=True)
    flags.DEFINE_string("to", None, "Folder to write.", required=True)
    cli.define_overwrite()
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"], "Of the Hugging Face weights; default bfloat16."
    )
    flags.DEFINE_integer("max_length", None, "Its max_position_embeddings.", lower_bound=1)


def main(_) -> None:
    # In host memory: a model may be larger than an accelerator's.
    jax.config.update("jax_platforms", "cpu")
    convert(
        Path(FLAGS["from"].value), Path(FLAGS.to), FLAGS.dtype, FLAGS.max_length, FLAGS.overwrite
    )


def convert(
    source: Path,
    target: Path,
    dtype: str | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `target` in the format that `source` is not in.

    Raises:
      UserError: `source` is neither, `target` is taken, or an option that this way does not use.
    """
    target = check_output_folder("--to", target, overwrite, [source]).absolute()
    if (source / CHECKPOINTS).is_dir() or (source / "params").is_dir():
        loaded = load_model(source)
        tokenizer = _tokenizer(source, loaded)
        ids = {}
        if tokenizer:
            ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        dtype, max_length = dtype or "bfloat16", max_length or loaded.length
        with _written(target, overwrite) as folder:
            hf.save(folder, loaded.config, loaded.params, dtype, max_length=max_length, **ids)
            if tokenizer:
                tokenizer.save_json(folder / tokenizer_json.FILE)
        config, kind = loaded.config, f"Hugging Face, {dtype}"
    elif (source / "config.json").is_file():
        if dtype or max_length:
            given = "--dtype" if dtype else "--max_length"
            raise UserError(f"{given} is for Hugging Face weights; here {target} gets float32 ones")
        own = source / tokenizer_json.FILE
        tokenizer = _load_tokenizer(own) if own.is_file() else None
        config, params = hf.load(source)
        model = LoadedModel(config, params, tokenizer and tokenizer.fingerprint, None)
        _save_model(target, model, tokenizer, overwrite)
        kind = "model folder, float32"
    else:
        raise UserError(
            f"--from={source} is neither a Hugging Face directory (config.json) nor a run, "
            "a checkpoint or a model folder"
        )
    print(f"wrote {define(config).parameter_count():,} parameters to {target} ({kind})")


@contextlib.contextmanager
def _written(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, which becomes `target` when all of it is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target, overwrite) as folder:
        yield folder


def _save_model(
    target: Path, model: LoadedModel, tokenizer: tokenizers.Tokenizer | None, overwrite: bool
) -> None:
    with _written(target, overwrite) as folder:
        save_model(folder, model.config, model.params, model.tokenizer, model.length)
        if tokenizer:
            (folder / "tokenizer").mkdir()
            tokenizer.save(folder / "tokenizer")


def define_average_flags() -> None:
    flags.DEFINE_multi_string("from", None, "A checkpoint, run or model folder.", required=True)
    flags.DEFINE_string("to", None, "Folder to write.", required=True)
    cli.define_overwrite()
    flags.DEFINE_list("weights", None, "A number for each --from; equal parts by default.")


def average(_) -> None:
    jax.config.update("jax_platforms", "cpu")
    sources, target = list(map(Path, FLAGS["from"].value)), Path(FLAGS.to)
    try:
        weights = FLAGS.weights and [float(weight) for weight in FLAGS.weights]
    except ValueError:
        raise UserError(f"--weights={','.join(FLAGS.weights)}: should be numbers") from None
    target = check_output_folder("--to", target, FLAGS.overwrite, sources).absolute()
    made = average_models(sources, weights)
    _save_model(target, made, _tokenizer(sources[0], made), FLAGS.overwrite)
    print(f"wrote the mean of {len(sources)} models to {target} (model folder, float32)")


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    try:
        return tokenizers.load(path)
    except UserError as error:  # the weights can be used all the same
        print(f"warning: converted without the tokenizer: {error}", file=sys.stderr)
        return None


def _tokenizer(source: Path, loaded: LoadedModel) -> tokenizers.Tokenizer | None:
    """The tokenizer in the run's folder, if the model is its."""
    folder = tokenizers.find(source)
    if folder is None:
        return None
    tokenizer = tokenizers.load(folder)
    return tokenizer if loaded.tokenizer == tokenizer.fingerprint else None


def run(argv: list[str]) -> None:
    """Runs `average` where it stands first in `argv`, else the conversion."""
    if argv[1:2] == ["average"]:
        define_average_flags()
        cli.run(average, [argv[0], *argv[2:]])
    else:
        define_flags()
        cli.run(main, argv)


if __name__ == "__main__":
    run(sys.argv)
