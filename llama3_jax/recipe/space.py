"""Whether the disk holds what a run will save."""

import shutil
from pathlib import Path

from llama3_jax.errors import UserError
from llama3_jax.parallel import processes
from llama3_jax.recipe.prepare import Run
from llama3_jax.recipe.timeline import average_steps
from llama3_jax.training.checkpoint import CHECKPOINTS, state_bytes
from llama3_jax.training.state import TrainState


def check_space(workdir: Path, abstract: TrainState, run: Run) -> None:
    """Refuses to start where the checkpoints to be kept would not fit on the disk.

    Raises:
      UserError: names what is free and what is needed.
    """
    if not processes.is_first():  # the folder may be shared, and hold many files
        return
    policy, steps = run.config.checkpoint, run.timeline.steps
    saves = sorted({*range(policy.every_steps, steps, policy.every_steps), steps})
    # One more than is kept: the new one is written before the oldest goes.
    kept = set(saves[-policy.keep_last - 1 :])
    if policy.keep_every:
        kept |= {step for step in saves if step % policy.keep_every == 0}
    need, last = state_bytes(abstract) * len(kept), run.timeline.stages[-1]
    if last.average:  # in the checkpoints after its first place, and in a folder of its own
        first = average_steps(last)[0]
        need += state_bytes(abstract.params) * (sum(step >= first for step in kept) + 1)
    present = sum(p.stat().st_size for p in (workdir / CHECKPOINTS).rglob("*") if p.is_file())
    free = shutil.disk_usage(workdir).free
    if free + present < need:
        raise UserError(
            f"{workdir}: {free / 1e6:,.1f} MB are free, {len(kept)} checkpoints need "
            f"{need / 1e6:,.1f} MB; free space or lower checkpoint.keep_last"
            + (" or raise checkpoint.keep_every" if policy.keep_every else "")
        )
