"""The demo's main run: a small Llama 3 on four sources of real text, on a laptop's CPU.

    make demo
    python -m llama3_jax.train --config=experiments/demo/train.py --workdir=runs/demo

The second line needs the corpora that `make demo` prepares under runs/demo. Sequence length and
batch ramp up as in Llama 3's initial pre-training; the last stage anneals the learning rate to 0
with math and code up-sampled. Size and tokens are those that the demo's scaling-law ladder chose
(experiments/demo/ladder.py), where it has run.
"""

import json
from pathlib import Path

from llama3_jax.model.config import ModelConfig
from llama3_jax.recipe.config import run_config

SOURCES = ("general", "math", "code", "multilingual")
# Near the shares of the text at hand: Llama 3's 50/25/17/8 (paper, section 3.1.2) would leave too
# little of 53 languages for so short a run.
MIX = {"general": 0.34, "math": 0.25, "code": 0.21, "multilingual": 0.20}
ANNEALING_MIX = {"general": 0.24, "math": 0.29, "code": 0.25, "multilingual": 0.22}
VOCAB_SIZE = 4096
# Shared with the ladder, so that its forecast is of the loss that this run reports.
LADDER_LENGTH, VALIDATION_LENGTH, VALIDATION_TOKENS = 128, 256, 50_000
# Where there is no ladder.
LAYERS, DIM, TOKENS = 4, 128, 2_400_000


def corpora(directory: str) -> dict[str, dict[str, str]]:
    return {
        name: {
            "train": f"{directory}/tokens/{name}/train",
            "validation": f"{directory}/tokens/{name}/validation",
        }
        for name in SOURCES
    }


def model_config(layers: int, dim: int) -> dict:
    """A Llama 3 of this depth and width: two query heads for each key head, FFN of 3 x width."""
    head_dim = 8 if dim < 64 else 16 if dim < 128 else 32
    heads = max(dim // head_dim // 2 * 2, 1)
    return dict(
        vocab_size=VOCAB_SIZE, dim=dim, layers=layers, heads=heads, kv_heads=max(heads // 2, 1),
        head_dim=head_dim, ffn_dim=3 * dim, dtype="float32", attention="chunked",
        layer_unroll=layers, init_std=0.05,
    )  # fmt: skip


def main_shape(layers: int, dim: int) -> ModelConfig:
    return ModelConfig(**model_config(layers, dim))


def get_config(argument: str = "runs/demo"):
    """`argument`: directory of the corpora, and optionally the file of another ladder's plan."""
    directory, _, other = argument.partition(",")
    plan = Path(other or f"{directory}/ladder/plan.json")
    chosen = json.loads(plan.read_text()) if plan.exists() else {}
    tokens = chosen.get("tokens", TOKENS)

    def share(of_24: int) -> int:
        return tokens * of_24 // 24

    return run_config(
        seed=0,
        model=model_config(chosen.get("layers", LAYERS), chosen.get("dim", DIM)),
        data=dict(sources=corpora(directory), packing="best_fit"),
        stages=[
            dict(
                name="short", tokens=share(5), length=128, batch_tokens=1_024, mix=MIX,
                lr=dict(shape="cosine", peak=5e-3, end=1e-3, warmup_tokens=share(1) // 2),
            ),
            dict(name="longer", tokens=share(7), length=256),
            dict(name="bigger batch", tokens=share(6), batch_tokens=2_048),
            dict(
                name="annealing", tokens=share(6), mix=ANNEALING_MIX,
                lr=dict(shape="linear", end=0.0),
            ),
        ],
        checkpoint=dict(every_steps=200, keep_last=2),
        validation=dict(every_tokens=share(5), tokens=VALIDATION_TOKENS, length=VALIDATION_LENGTH),
        samples=dict(
            prompts=("Romeo and Juliet, ACT II, SCENE II.", "The integral of", "def __init__(self,", "El valor de"),
            max_new_tokens=48,
        ),
        log_every=100,
    )  # fmt: skip
