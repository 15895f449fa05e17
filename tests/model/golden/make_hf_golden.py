"""Records tiny random Hugging Face checkpoints and their logits for tests/model/test_hf.py.

    pip install -e .[parity]
    python tests/model/golden/make_hf_golden.py

Written by transformers' own save_pretrained, so that the tests see what users have. Weights are
larger than an initialisation's, norms are not 1: logits of order 1 show what is wrong.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SHARED = dict(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2)
CASES = {
    "llama3": dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5),
    # Wavelengths below, within and above the blended band, and positions beyond the original 64.
    "llama3_1": dict(
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama3_2": dict(
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
}
LENGTHS = {"llama3": 24, "llama3_1": 160, "llama3_2": 24}
DTYPES = {"llama3": torch.float32, "llama3_1": torch.float32, "llama3_2": torch.bfloat16}


def main() -> None:
    for seed, (name, values) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **SHARED, **values, max_position_embeddings=1024, rope_theta=500_000.0,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
        model.to(DTYPES[name])
        shutil.rmtree(HERE / name, ignore_errors=True)
        shards = "40KB" if name == "llama3_1" else "5GB"
        model.save_pretrained(HERE / name, max_shard_size=shards)
        (HERE / name / "generation_config.json").unlink()
        tokens = torch.randint(0, SHARED["vocab_size"], (1, LENGTHS[name]))
        # Read anew: to(bfloat16) above rounded the RoPE frequencies too, which no checkpoint holds.
        model = LlamaForCausalLM.from_pretrained(HERE / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(tokens).logits
        tokens = tokens.numpy().astype(np.int32)
        np.savez_compressed(HERE / name / "golden.npz", tokens=tokens, logits=logits.numpy())
        print(name, "logits up to", float(logits.abs().max()))


if __name__ == "__main__":
    main()
