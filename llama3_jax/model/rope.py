"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout.

The head dimension's first half is rotated against its second half, as in Hugging Face's
checkpoints, so that their weights load without a permutation.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama3_jax.model.config import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular speed of each rotated pair in radians a position, [head_dim / 2], float64."""
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return frequencies if rope.scaling is None else _llama3_scaling(frequencies, rope.scaling)


def _llama3_scaling(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slows pairs that turn less than once in the original length, keeps the fast ones.

    Between `low_freq_factor` and `high_freq_factor` turns the two are blended linearly in turns
    (Llama 3.1 model release).
    """
    turns = scaling.original_length * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_tables(
    positions: Int[Array, "batch length"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosines and sines for `positions`, float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(
        inverse_frequencies(rope, head_dim), jnp.float32
    )
    return jnp.cos(angles), jnp.sin(angles)
