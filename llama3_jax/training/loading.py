"""A trained model together with the tokenizer that it was trained with."""

from collections.abc import Callable
from pathlib import Path

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data import tokenizer_json
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Params
from llama3_jax.training.checkpoint import CHECKPOINTS, LoadedModel, load_model


def load_with_tokenizer(path: Path, tokenizer: str | None) -> tuple[LoadedModel, Tokenizer]:
    """A run (its newest checkpoint), a checkpoint, a model folder, or Hugging Face weights.

    `tokenizer` is a file or folder; None takes the one beside the model.

    Raises:
      UserError: no model, no tokenizer, or one that is not the model's.
    """
    loaded = load(path)
    found = tokenizers.load(find_tokenizer(path, tokenizer))
    check_tokenizer(loaded, found)
    return loaded, found


def load(path: Path, abstract: Callable[[ModelConfig], Params] | None = None) -> LoadedModel:
    """As `load_model`, also of Hugging Face weights, which `abstract` leaves in host memory."""
    if _is_hugging_face(path):
        return LoadedModel(*hf.load(path), tokenizer=None)
    return load_model(path, abstract)


def find_tokenizer(path: Path, given: str | None) -> Path:
    """The tokenizer `given`, else the one beside the model in `path`.

    Raises:
      UserError: there is none.
    """
    if given or (own := tokenizers.find(path)):
        return Path(given or own)
    if _is_hugging_face(path) and (path / tokenizer_json.FILE).is_file():
        return path
    raise UserError(f"{path}: no tokenizer folder beside the model; give one by --tokenizer")


def check_tokenizer(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    """
    Raises:
      UserError: the model was trained with another one, or lacks ids that this one gives.
    """
    if loaded.tokenizer not in (None, tokenizer.fingerprint):
        raise UserError(
            f"the model was trained with tokenizer {loaded.tokenizer}, this one is "
            f"{tokenizer.fingerprint}: give the right one by --tokenizer"
        )
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {loaded.config.vocab_size}"
        )


def _is_hugging_face(path: Path) -> bool:
    # A run's folder has a config.json of its own.
    return (path / "config.json").is_file() and not (path / CHECKPOINTS).is_dir()
