"""Llama 3 8B: the whole timeline on 512 H100s, and one host of 8, the layout to measure first.

    python -m llama3_jax.train --config=experiments/production/llama3_8b.py --check
    srun python -m llama3_jax.train --config=experiments/production/llama3_8b.py --workdir=…
    python -m llama3_jax.plan --config=experiments/production/llama3_8b.py:kernels
    python -m llama3_jax.plan --config=experiments/production/llama3_8b.py:all_kernels

The paper gives no layouts for 8B: those of the timeline are ours, checked by the planner.
`all_kernels` computes norms, RoPE and SwiGLU by Triton, too, which nobody has shown to be faster yet.
"""

from experiments.production.common import MIX, sources, whole_run
from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config

KERNELS = {
    "kernels": ("attention", "loss"),
    "all_kernels": ("attention", "loss", "norm", "rotary", "swiglu"),
}
GPUS = 512
CONTEXT_RANKS = {
    4_096: 1, 8_192: 1, 12_288: 2, 20_480: 2, 32_768: 4, 53_248: 8, 81_920: 8, 131_072: 16,
}  # fmt: skip


def get_config(layout: str = "timeline"):
    if layout == "timeline":
        meshes = {n: dict(data=GPUS // r, context=r) for n, r in CONTEXT_RANKS.items()}
        return whole_run("8B", 3e-4, meshes)
    if layout not in KERNELS:
        raise ValueError(f"{layout!r} is unknown: timeline, {', '.join(KERNELS)}")
    chosen = dict.fromkeys(KERNELS[layout], "triton")
    return run_config(
        model=preset("8B", remat="save_dots", **chosen).model_dump(),
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
