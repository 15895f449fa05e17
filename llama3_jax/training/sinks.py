"""Metrics to where a team looks at them: Weights & Biases, or trackio's local dashboard.

Optional, beside metrics.jsonl and TensorBoard, which hold everything. Where the services keep things
is set by their own variables: WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_DIR, …. A resumed run goes
on as the same run there; steps after its checkpoint were sent already, and wandb keeps the first
value of a step.
"""

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llama3_jax.errors import UserError

SinkName = Literal["wandb", "trackio"]
PROJECT = "llama3_jax"


def check(names: Sequence[SinkName]) -> None:
    """Raises UserError where a sink's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"config.sinks: {name} is not installed: pip install -e '.[{name}]'")


class Sink:
    """A run at a service; the two have the same functions."""

    def __init__(self, name: SinkName, workdir: Path, config: dict[str, Any]):
        check([name])
        self._module = importlib.import_module(name)
        run = workdir.resolve()
        if name == "wandb":
            own = {"id": hashlib.sha256(str(run).encode()).hexdigest()[:16], "dir": str(run)}
        else:
            own = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        label = f"{run.parent.name}/{run.name}"
        self._module.init(project=project, name=label, config=config, resume="allow", **own)

    def write(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        self._module.finish()
