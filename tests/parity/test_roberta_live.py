"""Live comparison with transformers: weights both ways, tokens, logits, gradients of RoBERTa.

Needs the `parity` extra (torch, transformers); `make test-parity` runs it, `make test` does not.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from llama3_jax.curation import roberta
from llama3_jax.curation.roberta import RobertaConfig
from llama3_jax.curation.roberta_tokens import RobertaTokens
from llama3_jax.curation.roberta_training import mean_loss

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "curation" / "golden" / "roberta"
VOCAB = 120


# Imported in fixtures, so that collecting these tests needs neither; missing, they fail: no skip.
@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def transformers():
    import transformers

    return transformers


@pytest.fixture
def case(torch, transformers, tmp_path):
    """Their random model, and ours loaded from what it saved."""
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        intermediate_size=96, max_position_embeddings=130, type_vocab_size=1, layer_norm_eps=1e-5,
        num_labels=4,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(tmp_path / "theirs")
    return model.eval(), *roberta.load(tmp_path / "theirs", dtype="float32")


def padded_tokens(lengths, seed=0):
    random = np.random.default_rng(seed)
    tokens = np.full((len(lengths), max(lengths)), 1, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = random.integers(2, VOCAB, length)
    return tokens


def their_logits(torch, model, tokens):
    ids = torch.from_numpy(tokens).long()
    return model(input_ids=ids, attention_mask=(ids != 1).long()).logits


def test_their_weights_in_our_network(case, torch):
    model, config, params = case
    tokens = padded_tokens([128, 1, 70, 3])
    with torch.no_grad():
        theirs = their_logits(torch, model, tokens).numpy()
    assert np.abs(theirs).max() > 1
    ours = jax.jit(roberta.forward, static_argnums=0)(config, params, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_gradients(case, torch):
    model, config, params = case
    tokens, labels = padded_tokens([40, 9, 25], seed=1), np.array([3, 0, 2], np.int32)
    loss = torch.nn.functional.cross_entropy(
        their_logits(torch, model, tokens), torch.from_numpy(labels).long()
    )
    loss.backward()
    value, gradients = jax.jit(jax.value_and_grad(mean_loss, argnums=1), static_argnums=0)(
        config, params, tokens, labels, np.ones(3, np.float32), None
    )
    assert abs(float(value) - loss.item()) < 1e-5
    compared = 0
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for tensor in roberta._tensors(config):
        ours = np.asarray(tensor.ours(gradients))
        # Where softmax is saturated, float32 leaves little of a query's gradient.
        scale = max(np.abs(theirs[tensor.name]).max(), 1e-2 * largest)
        np.testing.assert_allclose(
            ours, theirs[tensor.name], rtol=0, atol=1e-4 * scale, err_msg=tensor.name
        )
        compared += 1
    assert compared == len(theirs)


def test_our_weights_and_tokens_in_theirs(torch, transformers, tmp_path):
    config = RobertaConfig(
        vocab_size=300, dim=32, layers=2, heads=4, ffn_dim=64, max_positions=66, labels=3,
        init_std=0.3, dtype="float32",
    )  # fmt: skip
    params = jax.tree.map(np.array, roberta.init_params(config, 0))
    roberta.save(tmp_path, config, params, ("a", "b", "c"))
    (tmp_path / "tokenizer.json").write_bytes((GOLDEN / "tokenizer.json").read_bytes())
    model, info = transformers.RobertaForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    tokenizer = transformers.RobertaTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = ["The first tokens, größer! 日本語", "", "long " * 100]
    batch = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
    ids = RobertaTokens(tmp_path, config, 64).encode(texts)
    assert ids == batch
    tokens = np.full((3, 64), 1, np.int32)
    for row, document in enumerate(ids):
        tokens[row, : len(document)] = document
    with torch.no_grad():
        theirs = their_logits(torch, model.eval(), tokens).numpy()
    ours = jax.jit(roberta.forward, static_argnums=0)(config, params, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
