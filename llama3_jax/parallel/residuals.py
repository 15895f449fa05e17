"""What a layer keeps between its forward and its backward pass, as plain arrays.

A pipeline runs other micro-batches between the two, so what automatic differentiation would hold in
a closure has to be in a buffer. Only what depends on the layer's input is kept: weights, and what
is made of weights and positions alone, are at hand again when the backward runs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun

Arrays = list[jax.Array]


class SplitLayer:
    """`layer(constants, variables, x, context) -> (y, loss), aux` cut into forward and backward.

    Differentiable in `variables` and `x`. Made once for given shapes (`example` may be tracers).
    """

    def __init__(self, layer: Callable, example: tuple[Any, Any, jax.Array, Any]):
        self._layer = layer
        flat, self._structure = jax.tree.flatten(example)
        x_leaf = len(jax.tree.leaves(example[:2]))
        # Traced once: another trace, with other operands equal, could keep other things.
        jaxpr = jax.make_jaxpr(self._trace)(*flat)
        self._forward_leaves = jaxpr_as_fun(jaxpr)
        leaves = jaxpr.jaxpr.outvars[self._results :]
        depends = {jaxpr.jaxpr.invars[x_leaf]}
        for equation in jaxpr.jaxpr.eqns:
            if any(v in depends for v in equation.invars if not isinstance(v, Literal)):
                depends.update(equation.outvars)
        # For each leaf the place of its array among those that are kept, or None.
        self._kept: list[int | None] = []
        self._shapes: list[jax.ShapeDtypeStruct] = []
        seen: dict[Any, int] = {}
        for leaf in leaves:
            if isinstance(leaf, Literal) or leaf not in depends:
                self._kept.append(None)
                continue
            if leaf not in seen:
                seen[leaf] = len(seen)
                self._shapes.append(jax.ShapeDtypeStruct(leaf.aval.shape, leaf.aval.dtype))
            self._kept.append(seen[leaf])

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """What one layer keeps of one micro-batch."""
        return list(self._shapes)

    def forward(self, constants, variables, x: jax.Array, context) -> tuple[Any, Arrays]:
        """((y, loss), aux), and the arrays to keep."""
        flat = jax.tree.leaves((constants, variables, x, context))
        results, leaves = self._split(self._forward_leaves(*flat))
        kept: dict[int, jax.Array] = {}
        for place, leaf in zip(self._kept, leaves, strict=True):
            if place is not None:
                kept.setdefault(place, leaf)
        return jax.tree.unflatten(self._result_tree, results), [kept[p] for p in range(len(kept))]

    def backward(self, kept: Arrays, constants, variables, x_like: jax.Array, context, dy):
        """(gradients of the variables, gradient of x), of y by `dy` and of the loss itself."""
        # The forward is written down once more for the leaves that do not depend on x; the rest of
        # it has no use, and the compiler drops it.
        flat = jax.tree.leaves((constants, variables, x_like, context))
        _, leaves = self._split(self._forward_leaves(*flat))
        leaves = [
            leaf if place is None else kept[place]
            for place, leaf in zip(self._kept, leaves, strict=True)
        ]
        return jax.tree.unflatten(self._tree, leaves)((dy, jnp.ones(())))

    def _trace(self, *flat):
        constants, variables, x, context = jax.tree.unflatten(self._structure, flat)
        y, vjp, aux = jax.vjp(
            lambda v, x: self._layer(constants, v, x, context), variables, x, has_aux=True
        )
        results, self._result_tree = jax.tree.flatten((y, aux))
        leaves, self._tree = jax.tree.flatten(vjp)
        self._results = len(results)
        return *results, *leaves

    def _split(self, outputs: Arrays) -> tuple[Arrays, Arrays]:
        return outputs[: self._results], outputs[self._results :]
