"""Annealing as a judge of data: from a half-trained checkpoint, the rate to 0 on 30% of a candidate.

    python -m llama3_jax.train --workdir=runs/probe/new-0 \\
        --config=experiments/annealing/probe.py:runs/base,corpora/new,0
    python -m llama3_jax.train --workdir=runs/probe/control-0 \\
        --config=experiments/annealing/probe.py:runs/base,control,0
    python -m llama3_jax.launch --config=experiments/annealing/probe.py:runs/base,corpora/new   # all arms
    python -m experiments.annealing.probe --workdir=runs/probe       # scores.csv: held-out losses
    python -m llama3_jax.fit probe --data=runs/probe/scores.csv

A new run starts from the base's newest checkpoint, weights and optimizer state, at the learning
rate where the base stood, and takes it linearly to 0 over ANNEALING_SHARE of the tokens that the
base has consumed (Llama 3 paper, section 3.1.3: 40B tokens from a half-trained 8B), on 30%
candidate and 70% of the base's last mix. The control arm is 100% of that mix on as many tokens.
The seed decides which documents are read: run each arm with three at least.
"""

from pathlib import Path

from absl import flags

from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.files import write_text
from llama3_jax.launching.experiment import WorkUnit
from llama3_jax.recipe.config import RunConfig, run_config
from llama3_jax.recipe.timeline import Timeline
from llama3_jax.scaling.probe import CONTROL
from llama3_jax.schema import parse
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints
from llama3_jax.training.metrics import METRICS_FILE, read_metrics

CANDIDATE, CANDIDATE_WEIGHT = "candidate", 0.3
# 40B of the 7.8T tokens that half of the paper's 8B consumed.
ANNEALING_SHARE = 0.005


def sweep(argument: str, seeds: int = 3) -> list[WorkUnit]:
    """Each candidate and the control arm, in directories ARM-SEED; `argument`: base, candidates."""
    base, *candidates = argument.split(",")
    return [
        WorkUnit(name=f"{Path(arm).name}-{seed}", argument=f"{base},{arm},{seed}")
        for arm in (CONTROL, *candidates) for seed in range(seeds)
    ]  # fmt: skip


def get_config(argument: str = f"runs/base,{CONTROL},0", share: float = ANNEALING_SHARE):
    """`argument`: directory of the base run, corpus of the candidate or "control", seed."""
    base, candidate, seed = _parts(argument)
    directory = base / CHECKPOINTS
    steps = Checkpoints(directory, 1, 1).steps() if directory.is_dir() else []
    if not steps:
        raise UserError(f"argument {argument!r}: {directory} holds no checkpoint")
    saved = Checkpoints(directory, 1, 1).metadata(steps[-1])
    config = parse(RunConfig, saved["config"])
    timeline = Timeline(config.stages, config.model.rope, config.mesh)
    stage, consumed = timeline.stage(steps[-1] - 1), timeline.consumed(steps[-1])
    rate = timeline.learning_rate(consumed)
    if not rate > 0:
        raise UserError(f"argument {argument!r}: the base's learning rate is 0 already")
    total = sum(stage.mix.values())
    mix = {name: weight / total for name, weight in stage.mix.items()}
    sources = {name: source.model_dump() for name, source in config.data.sources.items()}
    if candidate != CONTROL:
        mix = {name: weight * (1 - CANDIDATE_WEIGHT) for name, weight in mix.items()}
        mix[CANDIDATE] = CANDIDATE_WEIGHT
        sources[CANDIDATE] = {"train": f"{candidate}/train"}
    tokens = max(round(share * consumed / stage.batch_tokens), 1) * stage.batch_tokens
    return run_config(
        seed=seed,
        init_from=str(base),
        model=config.model.model_dump() | {"rope": stage.rope.model_dump()},
        optimizer=config.optimizer.model_dump(),
        data=dict(sources=sources, packing=config.data.packing),
        mesh=stage.mesh.model_dump(),
        stages=[
            dict(
                name="annealing", tokens=tokens, length=stage.length, mix=mix,
                batch_tokens=stage.batch_tokens, micro_batch_tokens=stage.micro_batch_tokens,
                lr=dict(shape="linear", peak=rate, end=0.0),
            )
        ],
        checkpoint=dict(every_steps=config.checkpoint.every_steps, keep_last=1),
        validation=(config.validation.model_dump() if config.validation else dict(tokens=10**7))
        | dict(every_tokens=tokens),
    )  # fmt: skip


def _parts(argument: str) -> tuple[Path, str, int]:
    parts = argument.split(",")
    if len(parts) != 3 or not parts[2].isdigit():
        raise UserError(f"argument {argument!r}: BASE,CANDIDATE,SEED, such as runs/base,control,0")
    return Path(parts[0]), parts[1], int(parts[2])


def collect(workdir: Path) -> list[tuple[str, str, str, float]]:
    """(arm, seed, benchmark, score) of runs named ARM-SEED: minus the final held-out losses.

    Raises:
      UserError: no runs, a name of another form, or a run that is not finished.
    """
    rows = []
    for path in sorted(workdir.glob(f"*/{METRICS_FILE}")):
        arm, _, seed = path.parent.name.rpartition("-")
        if not arm or not seed.isdigit():
            raise UserError(f"{path.parent}: a run's directory is named ARM-SEED, as control-0")
        found = [r for r in read_metrics(path.parent) if r["kind"] == "validation"]
        if not found:
            raise UserError(f"{path.parent}: has no validation loss yet")
        rows += [(arm, seed, f"{name} (minus loss)", -v) for name, v in found[-1]["losses"].items()]
    if not rows:
        raise UserError(f"{workdir}: no runs (directories with {METRICS_FILE})")
    return rows


def main(_) -> None:
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is required: the directory that holds the runs")
    path = Path(flags.FLAGS.workdir) / "scores.csv"
    rows = [("arm", "seed", "benchmark", "score"), *collect(path.parent)]
    write_text(path, "\n".join(",".join(map(str, row)) for row in rows) + "\n")
    print(f"{path}: {len(rows) - 1} scores")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the runs' directories.")
    cli.run(main)
