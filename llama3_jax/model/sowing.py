"""What a module may sow in training besides its output: auxiliary losses, and statistics.

    self.sow(AuxiliaryLoss, "balance", loss)
    sow_statistic(self, "output", x)

Both come out of every layer on every mesh (training/gradients.py). What is sown of `nnx.Intermediate`
is seen by `nnx.capture` on one device alone.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class AuxiliaryLoss(nnx.Variable):
    """This rank's part of a sum over all tokens, in nats, which is added to the sum of the losses.

    The step divides the sum over ranks, layers and micro-batches by the number of loss tokens.
    """


class Statistic(nnx.Variable):
    """A `Moments` of an array."""


class Moments(NamedTuple):
    """Of the elements of arrays: the sum of squares, how many, and the largest absolute value."""

    squares: Float[Array, "..."]
    count: Float[Array, "..."]
    largest: Float[Array, "..."]

    def combined(self, other: "Moments") -> "Moments":
        return Moments(
            self.squares + other.squares,
            self.count + other.count,
            jnp.maximum(self.largest, other.largest),
        )

    def over_ranks(self, axes: tuple[str, ...]) -> "Moments":
        if not axes:
            return self
        squares, count = jax.lax.psum((self.squares, self.count), axes)
        return Moments(squares, count, jax.lax.pmax(self.largest, axes))

    @property
    def rms(self) -> Float[Array, "..."]:
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1))


def moments(x: Array, mask: Array | bool = True) -> Moments:
    """Of the elements where the mask, which is broadcast, is True."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    counted = jnp.broadcast_to(mask, x.shape)
    x = jnp.where(counted, x, 0.0)
    count = jnp.sum(counted, dtype=jnp.float32)
    return Moments(jnp.sum(x * x), count, jnp.max(jnp.abs(x)))


def sow_statistic(module: nnx.Module, name: str, x: Array) -> None:
    """Root mean square and largest absolute value of `x`, where the run keeps statistics."""
    if is_captured(module, Statistic):
        module.sow(Statistic, name, moments(x))


def is_captured(module: nnx.Module, kind: type[nnx.Variable]) -> bool:
    """Whether what `module` sows of this kind is kept (by `nnx.capture`): else it need not be made."""
    return any(type(variable) is kind for variable in getattr(module, "__captures__", ()))


class LayerSums(NamedTuple):
    """What a layer sowed, by path; sums over tokens, or with a leading dimension of layers."""

    losses: dict[str, Float[Array, "..."]]
    statistics: dict[str, Moments]

    def combined(self, other: "LayerSums") -> "LayerSums":
        """Of further micro-batches."""
        losses = jax.tree.map(jnp.add, self.losses, other.losses)
        pairs = {name: m.combined(other.statistics[name]) for name, m in self.statistics.items()}
        return LayerSums(losses, pairs)


def layer_sums(
    losses: Mapping[tuple, Any], statistics: Mapping[tuple, Any] = MappingProxyType({})
) -> LayerSums:
    """Of what one block sowed of each kind. What is sown twice under one name is added up."""

    def name(path: tuple) -> str:
        return "/".join(map(str, path))

    return LayerSums(
        {name(path): sum(values) for path, values in losses.items()},
        {name(path): functools.reduce(Moments.combined, v) for path, v in statistics.items()},
    )


def auxiliary(sums: LayerSums) -> Float[Array, ""]:
    return sum(map(jnp.sum, sums.losses.values()), start=jnp.zeros(()))
