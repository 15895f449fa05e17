"""z-loss: keeps the logits' log-sum-exp near 0 (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    python -m llama3_jax.train --config=experiments/variants/z_loss.py --workdir=runs/z_loss

The logits are computed a second time for it. Needs the corpora that `make demo` prepares under
runs/demo.
"""

import jax.numpy as jnp

from experiments.demo import train
from llama3_jax.kernels.cross_entropy import token_losses
from llama3_jax.model.transformer import Transformer
from llama3_jax.parallel.ranks import SINGLE_DEVICE


class ZLossTransformer(Transformer):
    def losses(self, x, targets, mask, ranks=SINGLE_DEVICE):
        total, losses = super().losses(x, targets, mask, ranks)
        logits = self.logits(self.final_hidden(x, ranks))
        # No logit is a target: what is left of the loss is the log-sum-exp, over all tensor ranks.
        log_sum_exp = token_losses(logits, jnp.full_like(targets, -1), ranks)
        penalty = jnp.sum(jnp.where(mask, log_sum_exp**2, 0.0))
        return total + self.config.option("z_loss") * penalty, losses


def get_config(argument: str = "runs/demo"):
    config = train.get_config(argument)
    config.model.model_module = "experiments.variants.z_loss:ZLossTransformer"
    with config.unlocked():
        config.model.options = {"z_loss": 1e-4}
    return config
