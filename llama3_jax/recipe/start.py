"""What a run begins with: random parameters, another run's state, or weights."""

import functools
from pathlib import Path

import jax

from llama3_jax.data.corpus import Corpus
from llama3_jax.errors import UserError
from llama3_jax.kernels.dispatch import KERNELS
from llama3_jax.model.config import ModelConfig
from llama3_jax.parallel.mesh import Layout
from llama3_jax.recipe.config import RunConfig
from llama3_jax.training.checkpoint import CHECKPOINTS, Checkpoints, DamagedCheckpoint
from llama3_jax.training.loading import load
from llama3_jax.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    init_state,
    relayout,
)

# How the model is computed may change at a resume; what it is may not.
FREE_MODEL_KEYS = ("dtype", *KERNELS, "remat", "layer_unroll", "init_std", "rope")
# Weights may start a network of other classes, whose parameters are compared one by one.
_FREE_MODULES = ("attention_module", "ffn_module", "norm_module", "model_module", "options")


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
        if key not in (*FREE_MODEL_KEYS, *free) and was != value:
            raise UserError(f"config.model.{key} is {value!r}, but {config.init_from} was "
                            f"trained with {was!r}")  # fmt: skip
    if tokenizer not in (None, next(iter(corpora.values())).info.tokenizer):
        raise UserError(f"config.init_from: {config.init_from} has another tokenizer")
