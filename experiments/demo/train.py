"""The demo's main run: a small Llama 3 on four sources of real text, on a laptop's CPU.

    make demo
    python -m llama3_jax.train --config=experiments/demo/train.py --workdir=runs/demo
    python -m llama3_jax.train --config=experiments/demo/train.py:runs/demo,without_recall --workdir=…

The second and third line need the corpora that `make demo` prepares under runs/demo. Three stages of
Llama 3 in miniature: length and batch ramp up; three increases of length; annealing of the rate to 0
with math and code up-sampled, and the average of four checkpoints. Synthetic key-value documents
(experiments/demo/recall.py) are in the mix, so that needles can be found: each increase waits behind
the gate. `runs/demo,without_recall` leaves them out, and the gate stops that run;
experiments/demo/seeds.py tries that, and other seeds. Size and tokens are those that the demo's
scaling-law ladder chose (experiments/demo/ladder.py), where it has run.
"""

import json
from pathlib import Path

from experiments.demo import recall
from llama3_jax.model.config import ModelConfig
from llama3_jax.recipe.config import run_config

SOURCES = ("general", "math", "code", "multilingual")
# Near the shares of the text at hand: Llama 3's 50/25/17/8 (paper, section 3.1.2) would leave too
# little of 53 languages for so short a run.
MIX = {"general": 0.34, "math": 0.25, "code": 0.21, "multilingual": 0.20}
ANNEALING_MIX = {"general": 0.24, "math": 0.29, "code": 0.25, "multilingual": 0.22}
# Share of the key-value documents: in the first stage, which teaches to look back; after it; in the
# stages behind gates. After the first, FAR of them look far back.
RECALL_FIRST, RECALL, RECALL_GATED = 0.9, 0.3, 0.5
FAR = 0.75
# Least tokens of the stages behind gates, in 43rds of all; the last gate asks for the most.
GATED_TOKENS = (4, 4, 6)
RECALL_TOKENS = 480_000
VOCAB_SIZE = 4096
# Shared with the ladder, so that its forecast is of the loss that this run reports.
LADDER_LENGTH, VALIDATION_LENGTH, VALIDATION_TOKENS = 128, 256, 50_000
# Where there is no ladder.
LAYERS, DIM, TOKENS = 4, 128, 2_400_000


def corpora(directory: str, *names: str) -> dict[str, dict[str, str]]:
    return {
        name: {
            "train": f"{directory}/tokens/{name}/train",
            "validation": f"{directory}/tokens/{name}/validation",
        }
        for name in names or SOURCES
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


def with_recall(mix: dict[str, float], share: float, far: float = FAR) -> dict[str, float]:
    """The mix with a share of key-value documents, `far` of them of the kind that looks far back."""
    own = {name: weight * (1 - share) for name, weight in mix.items()}
    return own | {"recall": share * (1 - far), "recall_far": share * far}


def get_config(argument: str = "runs/demo"):
    """`argument`: directory of the corpora; then `,without_recall` to see the gate stop the run, or
    `,FILE.json` for another ladder's plan."""
    directory, _, option = argument.partition(",")
    if option not in ("", "without_recall") and not option.endswith(".json"):
        raise ValueError(f"{option!r} is neither without_recall nor a plan's .json file")
    without = option == "without_recall"
    first, later, behind_gates = (0.0,) * 3 if without else (RECALL_FIRST, RECALL, RECALL_GATED)
    plan = Path(option if option.endswith(".json") else f"{directory}/ladder/plan.json")
    chosen = json.loads(plan.read_text()) if plan.exists() else {}
    # The key-value documents come on top of the tokens that the ladder foresaw.
    tokens = round(chosen.get("tokens", TOKENS) / (1 - RECALL))

    def share(of_43: int) -> int:
        return tokens * of_43 // 43

    # So wide because a model this small, on batches of 2K tokens, wanders by 0.2 nats on the languages
    # of which it has seen little.
    gate = dict(every_tokens=share(2), max_tokens=share(16), epsilon=0.2)
    return run_config(
        seed=0,
        model=model_config(chosen.get("layers", LAYERS), chosen.get("dim", DIM)),
        data=dict(sources=corpora(directory, *SOURCES, *recall.KINDS), packing="best_fit"),
        stages=[
            dict(
                name="short", tokens=RECALL_TOKENS, length=96, batch_tokens=960,
                mix=with_recall(MIX, first, far=0.0),
                lr=dict(
                    shape="cosine", peak=4e-3, end=6e-4, warmup_tokens=RECALL_TOKENS // 6,
                    tokens=RECALL_TOKENS + share(17),
                ),
            ),
            dict(
                name="longer", tokens=share(11), length=128, batch_tokens=1_024,
                mix=with_recall(MIX, later),
            ),
            dict(name="bigger batch", tokens=share(6), batch_tokens=2_048),
            *(
                dict(
                    name=f"long {length}", tokens=share(least), length=length, gate=gate,
                    batch_tokens=2_048 // length * length, mix=with_recall(MIX, behind_gates),
                )
                for length, least in zip(recall.ROWS, GATED_TOKENS, strict=True)
            ),
            dict(
                name="annealing", tokens=share(12), mix=with_recall(ANNEALING_MIX, later),
                lr=dict(shape="linear", end=0.0), average=dict(checkpoints=4),
            ),
        ],
        checkpoint=dict(every_steps=200, keep_last=2),
        validation=dict(every_tokens=share(8), tokens=VALIDATION_TOKENS, length=VALIDATION_LENGTH),
        evaluation=dict(
            length=128, tasks={"cloze": f"{directory}/cloze.jsonl"}, held_out_tokens=24_576,
            every_tokens=share(20), batch_tokens=4_096,
            needle=dict(
                haystack=f"{directory}/tokens/general/validation", statement=recall.STATEMENT,
                key_words=recall.KEYS, value_words=recall.VALUES,
            ),
        ),
        samples=dict(
            prompts=("Romeo and Juliet, ACT II, SCENE II.", "The integral of", "def __init__(self,", "El valor de"),
            max_new_tokens=48,
        ),
        log_every=100,
    )  # fmt: skip
