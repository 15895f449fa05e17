"""Llama 3 8B on one host of 8 H100s: the layout to measure first.

    python -m llama3_jax.plan --config=experiments/production/llama3_8b.py
    python -m llama3_jax.plan --config=experiments/production/llama3_8b.py:all_kernels

`all_kernels` computes norms, RoPE and SwiGLU by Triton, too, which nobody has shown to be faster yet.
"""

from experiments.production.common import MIX, sources
from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config

KERNELS = {
    "kernels": ("attention", "loss"),
    "all_kernels": ("attention", "loss", "norm", "rotary", "swiglu"),
}


def get_config(kernels: str = "kernels"):
    if kernels not in KERNELS:
        raise ValueError(f"{kernels!r} is unknown: {', '.join(KERNELS)}")
    chosen = dict.fromkeys(KERNELS[kernels], "triton")
    return run_config(
        model=preset("8B", remat="save_products", **chosen).model_dump(),
        data=dict(sources=sources("corpora")),
        mesh=dict(data=8),
        stages=[
            dict(
                name="initial", tokens=15_000_000_000_000, length=8_192, mix=MIX,
                batch_tokens=4_194_304, micro_batch_tokens=16 * 8_192,
                lr=dict(shape="cosine", peak=3e-4, end=3e-6, warmup_tokens=8_000 * 4_194_304),
            )
        ],
        checkpoint=dict(every_steps=500),
    )  # fmt: skip
