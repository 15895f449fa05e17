"""Muon for the blocks' matrices, AdamW for the rest (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

    python -m llama3_jax.train --config=experiments/variants/muon.py --workdir=runs/muon

The update is scaled to AdamW's size, so the learning rates stay. Needs the corpora that `make demo`
prepares under runs/demo.
"""

import jax
from optax import contrib

from experiments.demo import train

# Input and output dimensions of the stacked matrices; the first one, of layers, is a batch.
DIMENSIONS = {
    "query": contrib.MuonDimensionNumbers(1, (2, 3)),
    "key": contrib.MuonDimensionNumbers(1, (2, 3)),
    "value": contrib.MuonDimensionNumbers(1, (2, 3)),
    "out": contrib.MuonDimensionNumbers((1, 2), 3),
    "gate": contrib.MuonDimensionNumbers(1, 2),
    "up": contrib.MuonDimensionNumbers(1, 2),
    "down": contrib.MuonDimensionNumbers(1, 2),
}


def muon(learning_rate, b1, b2, weight_decay, mask):
    def dimensions(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: DIMENSIONS.get(path[-1].key), params
        )

    return contrib.muon(
        learning_rate, weight_decay=weight_decay, weight_decay_mask=mask, adam_b1=b1, adam_b2=b2,
        adam_weight_decay=weight_decay, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions,
    )  # fmt: skip


def get_config(argument: str = "runs/demo"):
    config = train.get_config(argument)
    config.optimizer.name = "experiments.variants.muon:muon"
    return config
