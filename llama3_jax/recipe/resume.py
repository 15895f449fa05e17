"""Where a run begins: its newest checkpoint, if that is of the same run, or its first step."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.model.config import ModelConfig
from llama3_jax.model.definition import Params
from llama3_jax.parallel.mesh import Layout
from llama3_jax.recipe.config import RunConfig
from llama3_jax.recipe.gate import GateLog
from llama3_jax.recipe.incidents import Incidents
from llama3_jax.recipe.prepare import Run, apply_verdicts, stage_layouts, stage_model
from llama3_jax.recipe.start import FREE_MODEL_KEYS, first_state
from llama3_jax.recipe.timeline import ResolvedStage, Timeline
from llama3_jax.training.checkpoint import (
    Checkpoints,
    Restored,
    model_metadata,
    restore_newest,
)
from llama3_jax.training.events import EVENTS_FILE, Events
from llama3_jax.training.optimizer import OptimizerConfig
from llama3_jax.training.state import TrainState, abstract_state, relayout

# A batch means the same whatever mesh it is spread over and however it is cut.
# A gate may be made to wait longer: what has been decided stands in gates.jsonl.
_FREE_STAGE_KEYS = ("mesh", "micro_batch_tokens", "gate")


class Start(NamedTuple):
    """What training begins with after `step` steps: arrays sharded on the mesh of that step's stage.

    `average` are the averaged parameters so far, `saved` the checkpoint's metadata, empty without one.
    """

    step: int
    state: TrainState
    average: Params | None = None
    saved: Mapping[str, Any] = {}


def start_of_run(run: Run, layout: Layout) -> Start:
    """The first step, from random parameters or `config.init_from`."""
    return Start(0, first_state(run.config, run.corpora, layout))


def start_of_checkpoint(run: Run, layout: Layout, restored: Restored) -> Start:
    state = TrainState(restored.params, restored.optimizer)
    average = restored.average
    if average is not None:
        average = relayout(average, run.config.model, None, layout)
    state = relayout(state, run.config.model, None, layout, run.config.optimizer)
    return Start(restored.step, state, average, restored.metadata)


def abstract_saved(config: RunConfig, layout: Layout) -> TrainState:
    """Shapes and shardings of a state as checkpoints hold it."""
    return abstract_state(config.model, config.optimizer, layout, saved=True)


def start_of(run: Run, checkpoints: Checkpoints, gates: GateLog, events: Events) -> Start:
    """Where a run goes on: its newest valid checkpoint, or its beginning; applies its verdicts.

    Raises:
      UserError: the checkpoint is of another run, or see `restore_newest`.
    """
    layouts, so_far = stage_layouts(run), Incidents(run, events).state()

    def check(saved: dict) -> None:
        gates.back_to(saved["step"], saved.get("gates", ()))
        apply_verdicts(run, gates.verdicts)
        now = run_metadata(run.config, run.timeline, run.corpora, saved["step"], so_far)
        check_same_run(saved, now)

    def layout(step: int) -> Layout:
        return layouts[run.timeline.stage_index(step)]

    restored = restore_newest(
        checkpoints, lambda step: abstract_saved(run.config, layout(step)), check
    )
    if restored:
        return start_of_checkpoint(run, layout(restored.step), restored)
    gates.back_to(0, ())
    return start_of_run(run, layouts[0])


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
    length = max(stage.length for stage in begun)
    return model_metadata(stage_model(config, begun[-1]), tokenizer, length) | {
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
        if key not in FREE_MODEL_KEYS:
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
