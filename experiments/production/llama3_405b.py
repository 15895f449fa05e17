"""Llama 3 405B: the whole timeline, and the three layouts of the paper's table 4 (section 3.3.2).

    python -m llama3_jax.train --config=experiments/production/llama3_405b.py --check
    srun python -m llama3_jax.train --config=experiments/production/llama3_405b.py --workdir=…
    python -m llama3_jax.plan --config=experiments/production/llama3_405b.py:8k_8192
    python -m llama3_jax.plan --config=experiments/production/llama3_405b.py:8k_16384
    python -m llama3_jax.plan --config=experiments/production/llama3_405b.py:128k_16384

The paper gives ranks, batch and length. Eight virtual stages follow from its text: with 126 layers
on 16 stages, a first chunk that holds only the embedding and a last one that holds only the head,
a chunk is one layer. What is kept for the backward pass is ours: the results of products, for the
paper used no activation checkpointing but released tensors by hand. So are the layouts between 8K
and 128K: as many context ranks as keep a rank at 8,192 tokens or fewer.
"""

from experiments.production.common import MIX, sources, whole_run
from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config

# Data ranks, context ranks, length, tokens of the stage.
ROWS = {
    "8k_8192": (64, 1, 8_192, 15_600_000_000_000),
    "8k_16384": (128, 1, 8_192, 15_600_000_000_000),
    "128k_16384": (8, 16, 131_072, 800_000_000_000),
}
BATCH_TOKENS = 16_777_216
CONTEXT_RANKS = {
    4_096: 1, 8_192: 1, 12_288: 2, 20_480: 4, 32_768: 4, 53_248: 8, 81_920: 16, 131_072: 16,
}  # fmt: skip


def _mesh(data: int, context: int) -> dict:
    return dict(data=data, pipe=16, context=context, tensor=8, reshard_after_forward=False, virtual_stages=8,
        tensor_pieces=4,
    )  # fmt: skip


def get_config(row: str = "timeline"):
    if row == "timeline":
        meshes = {length: _mesh(128 // ranks, ranks) for length, ranks in CONTEXT_RANKS.items()}
        return whole_run("405B", 8e-5, meshes)
    if row not in ROWS:
        raise ValueError(f"{row!r} is no row of table 4: {', '.join(ROWS)}; nor 'timeline'")
    data, context, length, tokens = ROWS[row]
    return run_config(
        model=preset(
            "405B", attention="triton", loss="triton", remat="save_dots"
        ).model_dump(),
        data=dict(sources=sources("corpora")),
        mesh=_mesh(data, context),
        stages=[
            dict(
                name=row, tokens=tokens, length=length, batch_tokens=BATCH_TOKENS, mix=MIX,
                # One row at a time on each data rank.
                micro_batch_tokens=data * length,
                lr=dict(shape="cosine", peak=8e-5, end=8e-7,
                        warmup_tokens=min(8_000 * BATCH_TOKENS, tokens // 10)),
            )
        ],
        checkpoint=dict(every_steps=500),
    )  # fmt: skip
