"""A fine-tuned RoBERTa as a classifier of documents.

A folder that transformers reads as RobertaForSequenceClassification (config.json, model.safetensors,
tokenizer.json), and classifier.json, as every classifier's.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llama3_jax.curation import roberta
from llama3_jax.curation.classifier_card import CARD_FILE, Card, check_weights, read_card
from llama3_jax.curation.roberta import Params, RobertaConfig
from llama3_jax.curation.roberta_tokens import RobertaTokens
from llama3_jax.errors import UserError
from llama3_jax.model.tensor_files import SINGLE

# Tokens of a batch when predicting: the scores depend on it in the last bits only.
_BATCH_TOKENS = 8192


class RobertaCard(Card):
    kind: Literal["roberta"] = "roberta"
    max_length: int
    dtype: Literal["bfloat16", "float32"]


class RobertaClassifier:
    def __init__(
        self, labels: tuple[str, ...], config: RobertaConfig, params: Params, tokens: RobertaTokens
    ):
        self.labels = labels
        self._config, self._tokens = config, tokens
        self._params = jax.device_put(params)

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, "documents labels"]:
        """Of each label for each document; rows sum to 1."""
        found = np.zeros((len(texts), len(self.labels)))
        ids = self._tokens.encode(texts)
        for batch in self._tokens.batches(ids, None, _BATCH_TOKENS):
            values = np.asarray(_probabilities(self._config, self._params, batch.tokens))
            found[batch.documents] = values[: len(batch.documents)]
        return found / np.maximum(found.sum(axis=1, keepdims=True), 1e-30)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(config: RobertaConfig, params: Params, tokens):
    return jax.nn.softmax(roberta.forward(config, params, tokens), axis=-1)


def load_roberta(folder: Path) -> RobertaClassifier:
    """The classifier in `folder`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    card = read_card(folder, RobertaCard)
    check_weights(folder / SINGLE, card)
    config, params = roberta.load(folder, dtype=card.dtype)
    if config.labels != len(card.labels):
        raise UserError(f"{folder}: {CARD_FILE} names {len(card.labels)} labels, "
                        f"{roberta.CONFIG_FILE} {config.labels}")  # fmt: skip
    params = jax.tree.map(jnp.asarray, params)
    return RobertaClassifier(
        card.labels, config, params, RobertaTokens(folder, config, card.max_length)
    )
