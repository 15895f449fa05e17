"""Fine-tuning of a RoBERTa on labelled documents (Llama 3 paper, section 3.1.1).

Shapes: B rows of a batch, S length.
"""

import functools
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from jaxtyping import Array, Float, Int
from rich.progress import track

from llama3_jax.curation import roberta
from llama3_jax.curation.agreement import Agreement
from llama3_jax.curation.classifier_card import CARD_FILE, file_sha256, judge
from llama3_jax.curation.labelled import Labelled, split
from llama3_jax.curation.roberta import Params, RobertaConfig
from llama3_jax.curation.roberta_classifier import RobertaCard, RobertaClassifier
from llama3_jax.curation.roberta_tokens import TOKENIZER_FILE, Batch, RobertaTokens
from llama3_jax.errors import UserError
from llama3_jax.files import write_json
from llama3_jax.model.tensor_files import SINGLE
from llama3_jax.schema import Config


class RobertaTrainingConfig(Config):
    """RoBERTa's own fine-tuning (Liu et al. 2019, appendix C): AdamW, linear decay after 6% warm-up.

    `base` is a folder with config.json, model.safetensors and tokenizer.json, such as
    distilroberta-base. Documents are cut to `max_length` tokens; None: as many as it has positions.
    """

    base: str
    epochs: pydantic.PositiveInt = 3
    batch: pydantic.PositiveInt = 32
    learning_rate: pydantic.PositiveFloat = 2e-5
    warmup: float = pydantic.Field(0.06, ge=0, lt=1)
    weight_decay: pydantic.NonNegativeFloat = 0.1
    max_length: pydantic.PositiveInt | None = None
    holdout: float = pydantic.Field(0.1, gt=0, lt=1)
    seed: pydantic.NonNegativeInt = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


def train_roberta(
    documents: Sequence[Labelled], folder: Path, config: RobertaTrainingConfig
) -> Agreement:
    """Fine-tunes on part of `documents`, writes the classifier; returns how it does on the rest.

    The same documents, whatever their order, and config give the same weights on the same device.

    Raises:
      UserError: fewer than two labels, too few documents of one, a base that cannot be read, or a
        loss that is no number.
    """
    found = split(documents, config.holdout)
    base = Path(config.base)
    network, params = roberta.load(base, len(found.labels), config.seed, dtype=config.dtype)
    max_length = config.max_length or network.max_length
    tokens = RobertaTokens(base, network, max_length)
    ids = tokens.encode([document.text for document in found.train])
    targets = np.array([found.labels.index(document.label) for document in found.train], np.int32)

    batches = [
        batch
        for epoch in range(config.epochs)
        for batch in _epoch(tokens, ids, config.batch, (config.seed, epoch))
    ]
    optimizer = _optimizer(config.weight_decay)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    key = jax.random.key(config.seed)
    for step, batch in enumerate(track(batches, "fine-tuning", transient=True)):
        labels = np.zeros(len(batch.tokens), np.int32)
        labels[: len(batch.documents)] = targets[batch.documents]
        weight = (np.arange(len(labels)) < len(batch.documents)).astype(np.float32)
        rate = learning_rate(config, step, len(batches))
        params, state, loss = _step(
            network, optimizer, params, state, batch.tokens, labels, weight, rate,
            jax.random.fold_in(key, step),
        )  # fmt: skip
        if not math.isfinite(float(loss)):
            raise UserError(
                f"fine-tuning diverged at step {step + 1} of {len(batches)}: the loss is {loss}; a "
                f"learning_rate below {config.learning_rate} may help"
            )

    result = judge(RobertaClassifier(found.labels, network, params, tokens), found.held_out)
    (folder / CARD_FILE).unlink(missing_ok=True)  # no classifier until the new one is whole
    roberta.save(folder, network, jax.tree.map(np.asarray, params), found.labels)
    if folder.resolve() != base.resolve():
        shutil.copyfile(base / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    card = RobertaCard(
        labels=found.labels, sha256=file_sha256(folder / SINGLE), trained_on=len(found.train),
        contradictory=found.contradictory, held_out=result.as_dict(), max_length=max_length,
        dtype=config.dtype,
    )  # fmt: skip
    write_json(folder / CARD_FILE, card.model_dump())
    return result


def _epoch(
    tokens: RobertaTokens, ids: list[list[int]], rows: int, seed: tuple[int, int]
) -> Iterator[Batch]:
    """Every document once, documents of similar length together, all else in random order."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(ids))
    batches = list(tokens.batches([ids[number] for number in order], rows, 0))
    for place in random.permutation(len(batches)):
        batch = batches[place]
        yield batch._replace(documents=[int(order[number]) for number in batch.documents])


def learning_rate(config: RobertaTrainingConfig, step: int, steps: int) -> float:
    """Of the step with number `step` from 0: up to its peak in a line, and down to 0 in another."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (steps - step) / (steps - warmup)


@functools.cache
def _optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW but for the learning rate, which a step multiplies."""

    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: path[-1].key in ("kernel", "embedding"), params
        )

    return optax.adamw(1.0, b1=0.9, b2=0.98, eps=1e-6, weight_decay=weight_decay, mask=matrices)


def mean_loss(
    network: RobertaConfig, params: Params, tokens: Int[Array, "B S"], labels: Int[Array, " B"],
    weight: Float[Array, " B"], key: Array | None,
) -> Float[Array, ""]:  # fmt: skip
    """Mean cross-entropy of the rows with weight 1, in nats."""
    logits = roberta.forward(network, params, tokens, key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * weight) / jnp.sum(weight)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(network, optimizer, params, state, tokens, labels, weight, rate, key):
    loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(
        network, params, tokens, labels, weight, key
    )
    updates, state = optimizer.update(gradients, state, params)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params, state, loss
