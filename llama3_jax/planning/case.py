"""What is planned: one stage of a run, on one mesh."""

from typing import NamedTuple

from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.parallel.schedule import Schedule, make_schedule
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.prepare import lay_out, stage_model
from llama3_jax.recipe.timeline import ResolvedStage
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.xla import DEFAULT, XlaConfig

GPUS_PER_HOST = 8


class Case(NamedTuple):
    """A training step: `rows` of `length` tokens in `micro_batches`, made `steps` times."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    rows: int
    length: int
    micro_batches: int
    steps: int
    sources: int = 4
    xla: XlaConfig = DEFAULT

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch on one rank."""
        return self.rows // self.mesh.data // self.micro_batches

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch that one context rank computes (all its tensor ranks together)."""
        return self.micro_rows * self.length // self.mesh.context

    @property
    def width(self) -> int:
        """Bytes of an element of the products and activations."""
        return 2 if self.model.dtype == "bfloat16" else 4

    @property
    def schedule(self) -> Schedule | None:
        if self.mesh.pipe == 1:
            return None
        return make_schedule(self.mesh, self.micro_batches)


def case_of(config: RunConfig, stage: ResolvedStage) -> Case:
    return Case(
        stage.name, stage_model(config, stage), config.optimizer, stage.mesh, stage.batch_rows, stage.length,
        stage.micro_batches, stage.steps, len(config.data.sources), config.xla,
    )  # fmt: skip


def cases_of(config: RunConfig) -> list[Case]:
    """Every stage of the run's timeline.

    Raises:
      UserError: what cannot work of stages and meshes, by key.
    """
    return [case_of(config, stage) for stage in lay_out(config).stages]


def named(cases: list[Case], name: str | None) -> Case:
    """The case of that name, the last one (the longest and largest) by default.

    Raises:
      UserError: no such stage.
    """
    if name is None:
        return cases[-1]
    for case in cases:
        if case.name == name:
            return case
    raise UserError(f"--stage={name}: the stages are {', '.join(case.name for case in cases)}")
