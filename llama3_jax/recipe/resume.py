"""What a checkpoint says of its run, and whether a config goes on with the same one."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.kernels.dispatch import KERNELS
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import Layout
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.timeline import ResolvedStage, Timeline
from llama3_jax.training.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    DamagedCheckpoint,
    model_metadata,
)
from llama3_jax.training.events import EVENTS_FILE
from llama3_jax.training.loading import load
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    init_state,
    relayout,
)

# How the model is computed may change at a resume; what it is may not.
_FREE_MODEL_KEYS = ("dtype", *KERNELS, "remat", "layer_unroll", "init_std", "rope")
# Weights may start a network of other classes, whose parameters are compared one by one.
_FREE_MODULES = ("attention_module", "ffn_module", "norm_module", "model_module", "options")
# A batch means the same whatever mesh it is spread over and however it is cut.
# A gate may be made to wait longer: what has been decided stands in gates.jsonl.
_FREE_STAGE_KEYS = ("mesh", "micro_batch_tokens", "gate")


def run_metadata(
    config: RunConfig,
    timeline: Timeline,
    corpora: dict[str, Corpus],
    step: int,
    incidents: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metadata of the checkpoint after `step` steps; `incidents` is what `Incidents.state` says.

    The model's RoPE is that of the stage which made the parameters.
    """
    tokenizer = next(iter(corpora.values())).info.tokenizer
    begun = [stage for stage in timeline.stages if stage.first_step < max(step, 1)]
    model = config.model.model_copy(update={"rope": begun[-1].rope})
    length = max(stage.length for stage in begun)
    return model_metadata(model, tokenizer, length) | {
        "step": step,
        "consumed_tokens": timeline.consumed(step),
        **(incidents or {}),
        "seed": config.seed,
        "packing": config.data.packing,
        "corpora": {name: corpus.fingerprint for name, corpus in corpora.items()},
        "stages": [_stage_metadata(stage) for stage in timeline.stages],
        "learning_rates": _past_learning_rates(timeline, step),
        "config": json.loads(config.model_dump_json()),
    }


def _stage_metadata(stage: ResolvedStage) -> dict[str, Any]:
    values = stage._asdict()
    for key in ("rope", "mesh", "gate", "average"):
        values[key] = values[key] and values[key].model_dump()
    return json.loads(json.dumps(values))


def _past_learning_rates(timeline: Timeline, step: int) -> dict[str, float]:
    """The rate of the first and last step so far of each stage begun."""
    steps = {stage.first_step for stage in timeline.stages}
    steps |= {first - 1 for first in steps} | {step - 1}
    past = sorted(s for s in steps if 0 <= s < min(step, timeline.steps))
    return {str(s): timeline.step_learning_rate(s) for s in past}


def first_state(config: RunConfig, corpora: dict[str, Corpus], layout: Layout) -> TrainState:
    """What a run begins with: fresh, or from `config.init_from`.

    Raises:
      UserError: nothing usable there, or it is of another model or tokenizer.
    """
    fresh = functools.partial(init_state, config.model, config.optimizer, layout, config.seed)
    if config.init_from is None:
        return fresh()
    path = Path(config.init_from)
    if (path / CHECKPOINTS).is_dir() and not config.init_anew:
        return _of_newest_checkpoint(config, corpora, layout)
    loaded = load(path, lambda model: abstract_params(model, layout, saved=True))
    _check_start(config, corpora, loaded.config, loaded.tokenizer, _FREE_MODULES)
    given = relayout(loaded.params, loaded.config, None, layout)
    given = dict(jax.tree_util.tree_leaves_with_path(given))
    state = fresh()

    def choose(path, new: jax.Array) -> jax.Array:
        if path in given:
            return given.pop(path)
        if path[-1].key in config.init_anew:
            return new
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        raise UserError(
            f"config.init_from: {config.init_from} lacks the model's parameter {name}; with "
            f"config.init_anew=('{path[-1].key}',) it starts as in a fresh model"
        )

    params = jax.tree_util.tree_map_with_path(choose, state.params)
    if given:
        name = jax.tree_util.keystr(next(iter(given)), simple=True, separator=".")
        raise UserError(f"config.init_from: {config.init_from} has {name}, the model has not")
    return state._replace(params=params)


def _of_newest_checkpoint(
    config: RunConfig, corpora: dict[str, Corpus], layout: Layout
) -> TrainState:
    """With the optimizer's state."""
    directory = Path(config.init_from) / CHECKPOINTS
    checkpoints = Checkpoints(directory, keep_last=1, keep_every=1)  # nothing is saved there
    if not (steps := checkpoints.steps()):
        raise UserError(f"config.init_from: {directory} holds no checkpoint")
    try:
        saved = checkpoints.metadata(steps[-1])
        model = ModelConfig.model_validate(saved["model"])
        _check_start(config, corpora, model, saved["tokenizer"])
        abstract = abstract_state(config.model, config.optimizer, layout, saved=True)
        restored = checkpoints.restore(steps[-1], *abstract)
    except DamagedCheckpoint as error:
        raise UserError(
            f"config.init_from: {directory / str(steps[-1])} is damaged: {error}"
        ) from None
    state = TrainState(restored.params, restored.optimizer)
    return relayout(state, config.model, None, layout, config.optimizer)


def _check_start(
    config: RunConfig,
    corpora: dict[str, Corpus],
    model: ModelConfig,
    tokenizer: str | None,
    free: tuple[str, ...] = (),
) -> None:
    for key in ModelConfig.model_fields:
        value, was = getattr(config.model, key), getattr(model, key)
        if key not in (*_FREE_MODEL_KEYS, *free) and was != value:
            raise UserError(f"config.model.{key} is {value!r}, but {config.init_from} was "
                            f"trained with {was!r}")  # fmt: skip
    if tokenizer not in (None, next(iter(corpora.values())).info.tokenizer):
        raise UserError(f"config.init_from: {config.init_from} has another tokenizer")


def check_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with a checkpoint of another run.

    The model, the optimizer, the tokenizer, the data, the seed and the stages begun so far must be
    the same, or the result would be that of no config at all. Stages not yet begun may be changed.

    Raises:
      UserError: names the key, its value in the checkpoint and its value now.
    """

    def compare(where: str, before: Any, after: Any, reason: str = "") -> None:
        if before != after:
            raise UserError(
                f"{where} is {after!r}, but the checkpoint of step {saved['step']} was made with "
                f"{before!r}{reason}; restore the old value or choose another --workdir"
            )

    # By way of the config: an older checkpoint lacks keys that were added since.
    before = model_metadata(ModelConfig.model_validate(saved["model"]), None)["model"]
    for key, value in now["model"].items():
        if key not in _FREE_MODEL_KEYS:
            compare(f"config.model.{key}", before[key], value)
    optimizer = OptimizerConfig.model_validate(saved["config"]["optimizer"])
    for key, value in optimizer.model_dump(mode="json").items():
        compare(f"config.optimizer.{key}", value, now["config"]["optimizer"][key])
    compare("the tokenizer", saved["tokenizer"], now["tokenizer"])
    compare("config.seed", saved["seed"], now["seed"])
    compare("config.data.packing", saved["packing"], now["packing"])
    compare("config.data.sources", sorted(saved["corpora"]), sorted(now["corpora"]))
    for name, fingerprint in now["corpora"].items():
        where = f"the corpus of config.data.sources.{name}.train"
        compare(where, saved["corpora"][name], fingerprint, " (fingerprints)")
    for stage, numbers in saved.get("left_out", {}).items():
        if gone := set(numbers) - set(now.get("left_out", {}).get(stage, ())):
            raise UserError(
                f"the checkpoint of step {saved['step']} was made without batches {sorted(gone)} of "
                f"stage {stage}, but {EVENTS_FILE} does not name them: restore the file or choose "
                "another --workdir"
            )
    for number, before in enumerate(saved["stages"]):
        if before["first_step"] >= saved["step"]:
            break
        if number >= len(now["stages"]):
            raise UserError(f"config.stages: the checkpoint of step {saved['step']} lies in stage "
                            f"{number} ({before['name']}), which is gone")  # fmt: skip
        after = dict(now["stages"][number])
        # The last stage begun may be made longer or shorter, as long as it reaches the checkpoint.
        if before["first_step"] + before["steps"] >= saved["step"]:
            begun = saved["step"] - before["first_step"]
            after["steps"] = before["steps"] if after["steps"] >= begun else after["steps"]
        for key, value in before.items():
            if key not in _FREE_STAGE_KEYS:
                compare(f"config.stages.{number}.{key}", value, after[key])
    for step, rate in saved["learning_rates"].items():
        compare(f"the learning rate of step {step}", rate, now["learning_rates"].get(step))
