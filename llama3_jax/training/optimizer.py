"""AdamW by optax, with the learning rate as an input of the step."""

from typing import Any

import jax
import optax
import pydantic

from llama3_jax.model.transformer import Params
from llama3_jax.schema import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as Llama 3 uses it.

    The update decays matrices by learning rate x `weight_decay` (Llama 3 paper, section 3.2.1:
    "0.1 times the learning rate at that step" is this product). Gradients are clipped to a global
    norm of `clip` first.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: pydantic.PositiveFloat = 1.0


def is_matrix(params: Params) -> Any:
    """True for every parameter but the norms' scales: what weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Updates to be multiplied by minus the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
    )
