"""Products with weights that are split over tensor ranks by columns (Megatron-LM, arXiv 1909.08053).

The gradient is written by hand, for what XLA's scheduler makes of it: the sum of the input's gradient
over ranks runs under the product of the weights' gradient, and the input is gathered again rather than
kept (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).
"""

import functools

import jax
from jaxtyping import Array, Float

from llama3_jax.kernels.linear import linear_pieces
from llama3_jax.parallel.ranks import Collectives

Pieces = tuple[Float[Array, "B P N"], ...]


def gathered_products(
    x: Float[Array, "B s M"], weights: tuple[Float[Array, "M N"], ...], ranks: Collectives
) -> tuple[Pieces, ...]:
    """For each weight, its products with the pieces of all tensor ranks' tokens."""
    if ranks.tensor == 1:
        return _products((x,), weights)
    return _gathered_products(x, weights, ranks)


def _products(xs: tuple[Array, ...], weights: tuple[Array, ...]) -> tuple[Pieces, ...]:
    return tuple(tuple(linear_pieces(xs, w)) for w in weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gathered_products(x, weights, ranks: Collectives):
    return _products(tuple(ranks.gather_pieces(x)), weights)


def _forward(x, weights, ranks: Collectives):
    return _gathered_products(x, weights, ranks), (x, weights)


def _backward(ranks: Collectives, saved, gradients):
    x, weights = saved
    _, pull_back = jax.vjp(_products, tuple(ranks.gather_pieces(x)), weights)
    dxs, dws = pull_back(gradients)
    # What follows waits for the weights' gradients, too, so that XLA has a product to run under the
    # sums of dx. (Its scheduler does not see optimization_barrier.)
    done = sum(0 * dw[0, 0] for dw in dws)
    return ranks.scatter_pieces(dxs) + done.astype(x.dtype), dws


_gathered_products.defvjp(_forward, _backward)
