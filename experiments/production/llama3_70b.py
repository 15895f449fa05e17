"""Llama 3 70B on 128 H100s: the layout of the fastest published JAX run, to check the planner by.

    python -m llama3_jax.plan --config=experiments/production/llama3_70b.py:fsdp_128

MaxText trains this shape on 128 H100s in bfloat16 at 506.6 TFLOP/s a GPU, counting attention in full
(51.2% MFU; 47.8% causal), with FSDP over all of them. Its rematerialisation is not published with the
figure; `full` and `save_products` bound what it may have been.
"""

from experiments.production.common import MIX, sources
from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config

LAYOUTS = ("fsdp_128",)


def get_config(layout: str = "fsdp_128"):
    if layout not in LAYOUTS:
        raise ValueError(f"{layout!r} is no layout: {', '.join(LAYOUTS)}")
    return run_config(
        model=preset("70B", attention="triton", loss="triton", remat="full").model_dump(),
        data=dict(sources=sources("corpora")),
        mesh=dict(data=128),
        stages=[
            dict(
                name=layout, tokens=15_600_000_000_000, length=8_192, batch_tokens=256 * 8_192,
                mix=MIX,
                lr=dict(shape="cosine", peak=1.5e-4, end=1.5e-6, warmup_tokens=8_000 * 256 * 8_192),
            )
        ],
        checkpoint=dict(every_steps=500),
    )  # fmt: skip
