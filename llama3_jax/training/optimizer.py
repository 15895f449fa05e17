"""The optimizer, of optax by name or of the user's own, with the learning rate as an input of the step."""

import importlib
import inspect
from typing import Any

import jax
import optax
import pydantic

from llama3_jax.errors import UserError
from llama3_jax.model.config import Options
from llama3_jax.model.definition import Params
from llama3_jax.schema import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as Llama 3 uses it, unless `name` says so.

    The update decays matrices by learning rate x `weight_decay` (Llama 3 paper, section 3.2.1:
    "0.1 times the learning rate at that step" is this product). Gradients are clipped to a global
    norm of `clip` first.

    `name` is a function of optax (`lion`, `adafactor`) or `package.module:function`; it is called with
    learning_rate=1, those of `b1`, `b2`, `eps` and `weight_decay` that it takes, `mask` (what weight
    decay applies to) if it takes one, and `options`. Its updates are multiplied by the step's rate.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: pydantic.PositiveFloat = 1.0
    options: Options = ()


def is_matrix(params: Params) -> Any:
    """True for every parameter but the norms' scales: what weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Updates to be multiplied by the learning rate and added.

    Raises:
      UserError: no such optimizer, or an option that it does not take.
    """
    function = _function(config.name)
    takes = inspect.signature(function).parameters
    values = {"learning_rate": 1.0, "mask": is_matrix}
    values |= {key: getattr(config, key) for key in ("b1", "b2", "eps", "weight_decay")}
    unused = [key for key in config.model_fields_set if key in values and key not in takes]
    unused += [key for key, _ in config.options if key not in takes]
    if unused:
        raise UserError(
            f"optimizer.{unused[0]}: {config.name} does not take it; it takes {', '.join(takes)}"
        )
    own = {key: value for key, value in values.items() if key in takes} | dict(config.options)
    return optax.chain(optax.clip_by_global_norm(config.clip), function(**own))


def _function(name: str):
    module, colon, attribute = name.rpartition(":")
    try:
        return getattr(importlib.import_module(module if colon else "optax"), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optimizer.name={name}: {error}") from None
