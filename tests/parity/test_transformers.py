"""Live comparison with transformers: weights both ways, logits, gradients, packed documents.

Needs the `parity` extra (torch, transformers); `make test-parity` runs it, `make test` does not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama3_jax.model import hf
from llama3_jax.model.config import ModelConfig, RopeConfig, RopeScaling
from llama3_jax.model.decoding import generate
from llama3_jax.model.definition import define, forward

pytestmark = pytest.mark.parity

VOCAB = 120
LLAMA3_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
SHARED = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
    max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=500_000.0,
)  # fmt: skip
THEIRS = {
    "llama3": dict(num_attention_heads=6, num_key_value_heads=2),
    "llama3_1": dict(num_attention_heads=3, num_key_value_heads=1, rope_scaling=LLAMA3_SCALING),
    "llama3_2": dict(
        num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        rope_scaling=LLAMA3_SCALING | {"factor": 32.0}, tie_word_embeddings=True,
    ),
}  # fmt: skip


# Imported in fixtures, so that collecting these tests needs neither; missing, they fail: no skip.
@pytest.fixture(scope="module")
def torch():
    import torch

    return torch


@pytest.fixture(scope="module")
def transformers():
    import transformers

    return transformers


@pytest.fixture(params=THEIRS)
def case(request, torch, transformers, tmp_path):
    """Their random model, and ours loaded from what it saved."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHARED, **THEIRS[request.param])
    )
    with torch.no_grad():
        for parameter in model.parameters():  # logits of order 1, norms that are not 1
            parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    config, params = hf.load(tmp_path / "theirs", dtype="float32")
    return model.eval(), config, params


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def their_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def our_logits(config, params, tokens, positions=None, segments=None):
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segments = np.ones_like(tokens) if segments is None else segments
    return jax.jit(forward, static_argnums=0)(config, params, tokens, positions, segments)


def test_their_weights_in_our_network(case, torch):
    model, config, params = case
    tokens = random_tokens(2, 200)  # RoPE beyond the original length of 64
    theirs = their_logits(torch, model, tokens)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(our_logits(config, params, tokens), theirs, rtol=0, atol=1e-4)


def test_gradients(case, torch):
    model, config, params = case
    tokens = random_tokens(2, 48, seed=1)
    targets = torch.from_numpy(tokens[:, 1:]).long()
    logits = model(torch.from_numpy(tokens[:, :-1]).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    loss.backward()

    def our_loss(params):
        log_p = jax.nn.log_softmax(our_logits(config, params, tokens[:, :-1]))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    value, gradients = jax.value_and_grad(our_loss)(params)
    assert abs(float(value) - loss.item()) < 1e-5
    their_gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    compared = 0
    for tensor in hf._tensors(config):
        ours = tensor.in_their_layout(np.asarray(tensor.ours(gradients)))
        theirs = their_gradients[tensor.name]
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale, err_msg=tensor.name)
        compared += 1
    assert compared == len(their_gradients)


def test_packed_documents_equal_each_document_alone(case, torch):
    model, config, params = case
    lengths = [70, 1, 39, 90]
    documents = [random_tokens(1, length, seed=length) for length in lengths]
    packed = np.concatenate(documents, axis=1)
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    ours = our_logits(config, params, packed, positions, segments)
    theirs = [their_logits(torch, model, document) for document in documents]
    np.testing.assert_allclose(ours, np.concatenate(theirs, axis=1), rtol=0, atol=1e-4)


def test_greedy_generation(case, torch):
    model, config, params = case
    prompts = [[5, 9, 2], list(range(40, 61))]
    ours = generate(config, params, prompts, max_new_tokens=20)
    for prompt, generated in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == generated


@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 20_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_our_weights_in_their_network(tied, dtype, shard_bytes, torch, transformers, tmp_path):
    config = ModelConfig(
        vocab_size=VOCAB, dim=48, layers=3, heads=6, kv_heads=2, head_dim=16, ffn_dim=96,
        tied_head=tied, rope=RopeConfig(scaling=RopeScaling(factor=8.0, original_length=64)),
        dtype="float32",
    )  # fmt: skip
    random = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        values = random.normal(mean, 0.2, size=leaf.shape)
        return values.astype(jnp.bfloat16).astype(np.float32)  # exact in both dtypes

    params = jax.tree_util.tree_map_with_path(draw, define(config).abstract_params())
    hf.save(tmp_path / "ours", config, params, dtype, shard_bytes)
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.max_position_embeddings == 16 * 64
    tokens = random_tokens(2, 150)
    ours = our_logits(config, params, tokens)
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(ours, their_logits(torch, model, tokens), rtol=0, atol=1e-4)
    stored = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert stored.dtype == getattr(torch, dtype)
