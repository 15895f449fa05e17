"""Everything a run's config file may say."""

import typing
from typing import Any

import ml_collections
import pydantic
from ml_collections import config_dict

from llama3_jax.data.packing import Packing
from llama3_jax.evaluation.suite import EvaluationConfig
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import MeshConfig
from llama3_jax.recipe.timeline import Stage
from llama3_jax.schema import Config, parse
from llama3_jax.training.health import HealthConfig
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.sinks import SinkName
from llama3_jax.training.watchdog import WatchdogConfig
from llama3_jax.xla import XlaConfig


class Source(Config):
    """Corpora of one source, as directories written by `llama3_jax.tokenize`."""

    train: str
    validation: str | None = None


class DataConfig(Config):
    """`workers` processes build batches; 0 is one thread of the trainer."""

    sources: dict[str, Source]
    packing: Packing = "best_fit"
    workers: pydantic.NonNegativeInt = 0


class CheckpointConfig(Config):
    """A save every `every_steps`; the newest `keep_last` stay, and multiples of `keep_every`.

    Steps go on while a save is written, so a crash in one costs an interval and those steps. With
    `wait` they do not: an interval at most is lost, and every save takes its whole time.
    """

    every_steps: pydantic.PositiveInt
    keep_last: pydantic.PositiveInt = 2
    keep_every: pydantic.PositiveInt | None = None
    wait: bool = False


class ValidationConfig(Config):
    """Loss on up to `tokens` held-out tokens of each source, every `every_tokens` and at the end.

    In rows of `length`, or of the stage's length where it is not given.
    """

    every_tokens: pydantic.PositiveInt
    tokens: pydantic.PositiveInt
    length: pydantic.PositiveInt | None = None


class StatisticsConfig(Config):
    """Per layer, every `every_steps` (None: never): root mean square and largest absolute value of what the modules
    sow (model/sowing.py), and of the gradients and updates of their parameters."""

    every_steps: pydantic.PositiveInt | None = None


class SampleConfig(Config):
    """Text generated greedily from each prompt whenever validation runs, for the report."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: pydantic.PositiveInt = 64


class RunConfig(Config):
    """A training run. `max_bad_steps` consecutive steps that were not applied stop it.

    `init_from` gives the first parameters of a new run with its own data, seed and timeline: another
    run, whose newest checkpoint gives the optimizer's state too; or a model folder or Hugging Face
    weights. `init_anew` names parameters, by the last part of their name, that these lack and that
    start as in a fresh model; the optimizer then starts afresh.
    """

    seed: int = pydantic.Field(0, ge=0, lt=2**32)  # jax.random.key takes others for one of these
    init_from: str | None = None
    init_anew: tuple[str, ...] = ()
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig
    stages: tuple[Stage, ...]
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None = None
    evaluation: EvaluationConfig | None = None
    samples: SampleConfig = SampleConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    health: HealthConfig = HealthConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    xla: XlaConfig = XlaConfig()
    max_bad_steps: pydantic.PositiveInt = 10
    log_every: pydantic.PositiveInt = 1
    sinks: tuple[SinkName, ...] = ()


def run_config(**values) -> ml_collections.ConfigDict:
    """What a config file's `get_config` returns: `values` checked, every default filled in.

    With the defaults present, `--config.any.valid.key=value` works for each of them.

    Raises:
      UserError: an unknown key or a bad value.
    """
    return ml_collections.ConfigDict(_overridable(parse(RunConfig, values)))


def _overridable(value: Any) -> Any:
    """A config as plain values; a None that stands for a number or text may be set by a flag."""
    if isinstance(value, Config):
        fields = type(value).model_fields
        return {
            name: _placeholder(field.annotation)
            if getattr(value, name) is None
            else dict(getattr(value, name))
            if _is_mapping(field)
            else _overridable(getattr(value, name))
            for name, field in fields.items()
        }
    if isinstance(value, dict):
        return {key: _overridable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        # Inside a tuple, config_flags sees placeholders in ConfigDicts only.
        items = map(_overridable, value)
        return tuple(ml_collections.ConfigDict(i) if isinstance(i, dict) else i for i in items)
    return value


def _is_mapping(field: Any) -> bool:
    """Whether it is `Options`, a mapping that is held as pairs."""
    return any(isinstance(item, pydantic.PlainSerializer) for item in field.metadata)


def _placeholder(annotation: Any) -> Any:
    for option in typing.get_args(annotation):
        kind = typing.get_args(option)[0] if typing.get_args(option) else option
        if kind in (int, float, str):
            return config_dict.placeholder(kind)
    return None
