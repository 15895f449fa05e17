"""Llama 3 70B: the whole timeline on 2,048 H100s, and the layout of the fastest published JAX run.

    python -m llama3_jax.train --config=experiments/production/llama3_70b.py --check
    srun python -m llama3_jax.train --config=experiments/production/llama3_70b.py --workdir=…
    python -m llama3_jax.plan --config=experiments/production/llama3_70b.py:fsdp_128

The paper gives no layouts for 70B: those of the timeline are ours, checked by the planner. MaxText
trains this shape on 128 H100s in bfloat16 at 506.6 TFLOP/s a GPU, counting attention in full (51.2%
MFU; 47.8% causal), with FSDP over all of them. Its rematerialisation is not published with the
figure; `full` and `save_dots` bound what it may have been.
"""

from experiments.production.common import MIX, sources, whole_run
from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config

LAYOUTS = ("timeline", "fsdp_128")
GPUS = 2_048
CONTEXT_RANKS = {
    4_096: 1, 8_192: 1, 12_288: 2, 20_480: 4, 32_768: 4, 53_248: 8, 81_920: 16, 131_072: 16,
}  # fmt: skip


def _mesh(context: int) -> dict:
    return dict(
        data=GPUS // 32 // context,
        pipe=4,
        context=context,
        tensor=8,
        reshard_after_forward=False,
        virtual_stages=5,
        tensor_pieces=4,
    )


def get_config(layout: str = "timeline"):
    if layout not in LAYOUTS:
        raise ValueError(f"{layout!r} is no layout: {', '.join(LAYOUTS)}")
    if layout == "timeline":
        meshes = {length: _mesh(ranks) for length, ranks in CONTEXT_RANKS.items()}
        return whole_run("70B", 1.5e-4, meshes)
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
