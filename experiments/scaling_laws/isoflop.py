"""One run of the IsoFLOP sweep: a shape of the ladder at a budget, with a profile's LR and batch.

    python -m llama3_jax.train --config=experiments/scaling_laws/isoflop.py:6e18,124M \\
        --workdir=runs/isoflop/6e18,124M
    python -m experiments.scaling_laws.isoflop --profile=llama3        # the sweep and its audit
    python -m llama3_jax.launch --config=experiments/scaling_laws/isoflop.py:llama3     # all of it

`sweep()` names every run; experiments/scaling_laws/collect.py makes the table of what they end with,
which `python -m llama3_jax.fit isoflop` reads. Corpora are looked for in
corpora/{general,math,code,multilingual} (written by llama3_jax.tokenize); the mix is Llama 3's
50/25/17/8 (paper, section 3.1.2).
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.launching.experiment import Requirements
from llama3_jax.model.config import preset
from llama3_jax.recipe.config import run_config
from llama3_jax.scaling.audit import audit
from llama3_jax.scaling.profiles import PROFILES
from llama3_jax.scaling.sweep import isoflop_sweep, plan_run

# One host for each run: FSDP over its GPUs, a row a GPU at a time. By the planner every run of the
# sweep fits into what JAX takes of an H100. A small one on one GPU: --config.mesh.data=1.
GPUS = 8
REQUIREMENTS = Requirements(gpus=GPUS)
KERNELS = {"attention": "triton", "loss": "triton"}
MIX = {"general": 0.50, "math": 0.25, "code": 0.17, "multilingual": 0.08}
CORPORA = "corpora"


def sweep(profile: str = "llama3") -> list[str]:
    """The arguments that `get_config` takes, one a run."""
    return [f"{run.name},{profile}" for run in isoflop_sweep(profile_name=profile, ranks=GPUS)]


def get_config(argument: str = "6e18,124M"):
    """`argument`: budget in FLOPs, shape, and optionally profile, with commas between."""
    budget, shape, profile = _parts(argument)
    run = plan_run(budget, shape, profile, ranks=GPUS)
    warmup = min(run.warmup_steps * run.batch_tokens, run.tokens)
    return run_config(
        seed=0,
        model=preset(shape, remat="full", **KERNELS).model_dump(),
        mesh=dict(data=GPUS),
        data=dict(
            sources={
                name: dict(
                    train=f"{CORPORA}/{name}/train", validation=f"{CORPORA}/{name}/validation"
                )
                for name in MIX
            }
        ),
        stages=[
            dict(
                name="isoflop", tokens=run.tokens, length=run.length,
                batch_tokens=run.batch_tokens, micro_batch_tokens=GPUS * run.length, mix=MIX,
                lr=dict(shape="cosine", peak=run.learning_rate, end=run.learning_rate / 10,
                        warmup_tokens=warmup),
            )
        ],
        checkpoint=dict(every_steps=max(run.steps // 4, 1), keep_last=1),
        validation=dict(every_tokens=max(run.tokens // 20, 1), tokens=10_000_000),
    )  # fmt: skip


def _parts(argument: str) -> tuple[float, str, str]:
    parts = argument.split(",")
    if not 2 <= len(parts) <= 3:
        raise UserError(f"argument {argument!r}: BUDGET,SHAPE[,PROFILE], such as 6e18,124M,llama3")
    try:
        budget = float(parts[0])
    except ValueError:
        raise UserError(f"argument {argument!r}: budget {parts[0]!r} is no number") from None
    if not 0 < budget < float("inf"):
        raise UserError(f"argument {argument!r}: budget {parts[0]} must be positive")
    return budget, parts[1], parts[2] if len(parts) == 3 else "llama3"


def main(_) -> None:
    runs = isoflop_sweep(profile_name=flags.FLAGS.profile, ranks=GPUS)
    table = Table(title=f"{len(runs)} runs, {sum(r.flops_6nd for r in runs):.3g} FLOPs (6ND)")
    columns = ("budget", "shape", "N", "N with embeddings", "tokens", "steps", "batch", "peak LR",
               "6ND", "with head", "with attention")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            f"{run.budget:.3g}", run.shape, f"{run.params:,}", f"{run.params_with_embeddings:,}",
            f"{run.tokens:.4g}", f"{run.steps:,}", f"{run.batch_tokens:,}",
            f"{run.learning_rate:.3g}", f"{run.flops_6nd:.3g}", f"{run.flops_matmul:.3g}",
            f"{run.flops_causal:.3g}",
        )  # fmt: skip
    Console(width=150).print(table)
    for note in audit(runs):
        print(f"audit: {note}")


if __name__ == "__main__":
    flags.DEFINE_enum("profile", "llama3", list(PROFILES), "Where LR and batch come from.")
    cli.run(main)
