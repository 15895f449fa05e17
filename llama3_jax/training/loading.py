"""A trained model together with the tokenizer that it was trained with."""

from pathlib import Path

from llama3_jax.data import tokenizer as tokenizers
from llama3_jax.data.tokenizer import Tokenizer
from llama3_jax.errors import UserError
from llama3_jax.model import hf
from llama3_jax.training.checkpoint import CHECKPOINTS, LoadedModel, load_model


def load_with_tokenizer(path: Path, tokenizer: str | None) -> tuple[LoadedModel, Tokenizer]:
    """A run (its newest checkpoint), a checkpoint, a model folder, or Hugging Face weights.

    `tokenizer` is a file or folder; None takes the one beside the model.

    Raises:
      UserError: no model, no tokenizer, or one that is not the model's.
    """
    own = tokenizers.find(path)
    # A run's folder has a config.json of its own.
    if (path / "config.json").is_file() and not (path / CHECKPOINTS).is_dir():
        loaded = LoadedModel(*hf.load(path), tokenizer=None)
        own = own or (path if (path / "tokenizer.json").is_file() else None)
    else:
        loaded = load_model(path)
    folder = tokenizer or own
    if folder is None:
        raise UserError(f"{path}: no tokenizer folder beside the model; give one by --tokenizer")
    found = tokenizers.load(folder)
    if loaded.tokenizer not in (None, found.fingerprint):
        raise UserError(
            f"the model was trained with tokenizer {loaded.tokenizer}, this one is "
            f"{found.fingerprint}: give the right one by --tokenizer"
        )
    if found.vocab_size > loaded.config.vocab_size:
        raise UserError(
            f"the tokenizer has {found.vocab_size} ids, the model {loaded.config.vocab_size}"
        )
    return loaded, found
