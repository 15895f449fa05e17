"""The demo's main run: a 1.8M-parameter Llama 3 on four sources of real text, on a laptop's CPU.

    make demo
    python -m llama3_jax.train --config=experiments/demo/train.py --workdir=runs/demo

The second line needs the corpora that `make demo` prepares under runs/demo. Sequence length and
batch ramp up as in Llama 3's initial pre-training; the last stage anneals the learning rate to 0
with math and code up-sampled.
"""

from llama3_jax.recipe.config import run_config

SOURCES = ("general", "math", "code", "multilingual")
# Near the shares of the text at hand: Llama 3's 50/25/17/8 (paper, section 3.1.2) would leave too
# little of 53 languages for so short a run.
MIX = {"general": 0.34, "math": 0.25, "code": 0.21, "multilingual": 0.20}
ANNEALING_MIX = {"general": 0.24, "math": 0.29, "code": 0.25, "multilingual": 0.22}
VOCAB_SIZE = 4096


def get_config(directory: str = "runs/demo"):
    corpora = {
        name: {
            "train": f"{directory}/tokens/{name}/train",
            "validation": f"{directory}/tokens/{name}/validation",
        }
        for name in SOURCES
    }
    return run_config(
        seed=0,
        model=dict(
            vocab_size=VOCAB_SIZE, dim=128, layers=4, heads=4, kv_heads=2, head_dim=32, ffn_dim=384,
            dtype="float32", attention="chunked", layer_unroll=4, init_std=0.05,
        ),
        data=dict(sources=corpora, packing="best_fit"),
        stages=[
            dict(
                name="short", tokens=500_000, length=128, batch_tokens=1_024, mix=MIX,
                lr=dict(shape="cosine", peak=5e-3, end=1e-3, warmup_tokens=60_000),
            ),
            dict(name="longer", tokens=700_000, length=256),
            dict(name="bigger batch", tokens=600_000, batch_tokens=2_048),
            dict(
                name="annealing", tokens=600_000, mix=ANNEALING_MIX,
                lr=dict(shape="linear", end=0.0),
            ),
        ],
        checkpoint=dict(every_steps=200, keep_last=2),
        validation=dict(every_tokens=500_000, tokens=100_000, length=256),
        samples=dict(
            prompts=("Romeo and Juliet, ACT II, SCENE II.", "The integral of", "def __init__(self,", "El valor de"),
            max_new_tokens=48,
        ),
        log_every=100,
    )  # fmt: skip
