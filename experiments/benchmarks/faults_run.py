"""The run that faults.py disturbs: five stages of a tiny model on two data ranks.

    python -m llama3_jax.train --config=experiments/benchmarks/faults_run.py:CORPORA --workdir=…

CORPORA is a folder made by `faults.py`. Two devices make the mesh, of one process or of two.
`CORPORA,measured` is a shorter run with validation, evaluation and a gate. FAULTS_STEPS in the
environment makes other steps of each stage than 60 (at least 20), to try the cases quickly.
"""

import os

from llama3_jax.recipe.config import run_config

STEPS, EVERY = int(os.environ.get("FAULTS_STEPS", "60")), 10  # of each stage; between checkpoints
MEASURED_STEPS = 20  # of each of its two stages
MEASURED_END = 2 * MEASURED_STEPS
STAGES = ("short", "long", "longer", "wide", "annealing")


def get_config(argument):
    corpora, _, measured = argument.partition(",")
    if measured:
        return measured_config(corpora)
    sources = {name: dict(train=f"{corpora}/{name}/train") for name in "ab"}
    tokens = STEPS * 256
    return run_config(
        model=dict(
            vocab_size=272, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
            dtype="float32",
        ),
        data=dict(sources=sources),
        mesh=dict(data=2),
        stages=[
            dict(name="short", tokens=tokens, length=32, batch_tokens=256, mix=dict(a=0.7, b=0.3),
                 lr=dict(shape="cosine", peak=3e-3, end=3e-4, warmup_tokens=500)),
            dict(name="long", tokens=tokens, length=64),
            dict(name="longer", tokens=tokens, length=128),
            dict(name="wide", tokens=2 * tokens, batch_tokens=512),
            dict(name="annealing", tokens=2 * tokens, mix=dict(a=0.2, b=0.8),
                 lr=dict(shape="linear", end=0.0)),
        ],
        checkpoint=dict(every_steps=EVERY, keep_last=3),
        # A hang shall be found in seconds here.
        watchdog=dict(floor_seconds=15.0, other_seconds=300.0),
    )  # fmt: skip


def measured_config(corpora):
    needle = dict(haystack=f"{corpora}/a/train", depths=2, seeds=1, statement=" {key}:{value}")
    sources = {
        n: dict(train=f"{corpora}/{n}/train", validation=f"{corpora}/{n}/train") for n in "ab"
    }
    tokens = MEASURED_STEPS * 256
    return run_config(
        model=dict(
            vocab_size=272, dim=32, layers=1, heads=4, kv_heads=2, head_dim=8, ffn_dim=64,
            dtype="float32",
        ),
        data=dict(sources=sources),
        mesh=dict(data=2),
        stages=[
            dict(name="short", tokens=tokens, length=32, batch_tokens=256, mix=dict(a=0.7, b=0.3),
                 lr=dict(shape="constant", peak=3e-3)),
            dict(name="long", tokens=tokens, length=64,
                 gate=dict(every_tokens=tokens, max_tokens=2 * tokens, epsilon=100.0)),
        ],
        checkpoint=dict(every_steps=EVERY, keep_last=3),
        validation=dict(every_tokens=tokens // 3, tokens=1_000),
        evaluation=dict(length=32, held_out_tokens=1_000, every_tokens=tokens // 3, needle=needle),
    )  # fmt: skip
