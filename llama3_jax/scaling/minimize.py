"""Many small smooth problems at once: damped Newton steps in JAX, vmapped over starts and data.

Objectives here have at most a dozen parameters, so a Hessian costs a few gradients, and a Cholesky
factorisation unrolled over the parameters runs across the whole batch at the speed of arithmetic.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

Objective = Callable[[Float[Array, "P"], Any, Float[Array, ""]], Float[Array, ""]]
# (value, gradient, Hessian or a positive stand-in for it)
Derivatives = Callable[
    [Float[Array, "P"], Any, Float[Array, ""]],
    tuple[Float[Array, ""], Float[Array, "P"], Float[Array, "P P"]],
]

# Starts whose objective is this near to the best, relatively, have reached the same minimum.
SAME = 1e-6
# A minimum that fewer starts reach may not be the lowest one.
CERTIFIED_BY = 3
# Problems of a batch that are solved together: their arrays stay in the cache.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised; `derivatives` by hand where JAX's own would be slow to compile."""

    objective: Objective
    derivatives: Derivatives | None = None

    def expand(self, params, data, sharp):
        """Value, gradient, Hessian."""
        if self.derivatives is not None:
            return self.derivatives(params, data, sharp)

        def with_gradient(params):
            value, gradient = jax.value_and_grad(self.objective)(params, data, sharp)
            return gradient, (value, gradient)

        hessian, (value, gradient) = jax.jacfwd(with_gradient, has_aux=True)(params)
        return value, gradient, hessian


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The best of many starts, and how many of them reached it."""

    params: np.ndarray
    objective: float
    starts: int
    reached: int
    distinct: np.ndarray  # other local minima, best first, to start resamples from

    @property
    def certified(self) -> bool:
        return self.reached >= CERTIFIED_BY

    def certificate(self) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "starts": self.starts,
            "starts_at_the_best_minimum": self.reached,
            "certified": self.certified,
        }


def minimize(
    problem: Problem, starts: np.ndarray, data: Any, sharpness: np.ndarray, keep: int = 4
) -> Minimum:
    """The lowest minimum found from starts [S, P].

    `sharpness` holds a value a step, passed on to the problem: a robust loss may begin smooth.
    """
    params, values = _all_starts(problem, starts, data, sharpness)
    values = np.where(np.isfinite(values), values, np.inf)
    order = np.argsort(values)
    best = values[order[0]]
    near = values <= best + SAME * max(abs(best), 1e-12)
    distinct: list[int] = []
    for index in order[np.isfinite(values[order])]:
        if all(abs(values[index] - values[i]) > 1e-3 * abs(values[i]) for i in distinct):
            distinct.append(index)
        if len(distinct) == keep:
            break
    return Minimum(params[order[0]], float(best), len(starts), int(near.sum()), params[distinct])


def minimize_batch(
    problem: Problem, starts: np.ndarray, data: Any, batched: Any, sharpness: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best parameters [B, P] and objectives [B] of B problems from the same starts [S, P].

    `data` is shared; the leaves of `batched` have a leading B. The objective sees both merged.
    """
    size = len(jax.tree.leaves(batched)[0])
    # XLA's CPU back-end runs such a loop on one core: a piece of the batch for each. Pieces of one
    # size and whole blocks are one program to compile; what fills them up is dropped again.
    workers = min(os.cpu_count() or 1, -(-size // BLOCK))
    rows = -(-size // (workers * BLOCK)) * BLOCK
    padded = np.minimum(np.arange(workers * rows), size - 1)

    def solve(piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = jax.tree.map(lambda x: np.asarray(x)[piece], batched)
        with jax.enable_x64(True):  # holds for its thread only
            best = _batch(problem, *map(_float64, (starts, data, own, sharpness)))
            return np.asarray(best[0]), np.asarray(best[1])

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        params, values = zip(*pool.map(solve, padded.reshape(workers, rows)), strict=True)
    return np.concatenate(params)[:size], np.concatenate(values)[:size]


def _all_starts(problem, starts, data, sharpness) -> tuple[np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        params, values = _starts(problem, *map(_float64, (starts, data, sharpness)))
        return np.asarray(params), np.asarray(values)


def _float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype=jnp.float64), tree)


@functools.partial(jax.jit, static_argnums=0)
def _starts(problem, starts, data, sharpness):
    return jax.vmap(lambda start: _newton(problem, start, data, sharpness))(starts)


@functools.partial(jax.jit, static_argnums=0)
def _batch(problem, starts, data, batched, sharpness):
    def one(own):
        merged = {**data, **own}
        params, values = jax.vmap(lambda s: _newton(problem, s, merged, sharpness))(starts)
        best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
        return params[best], values[best]

    return jax.lax.map(one, batched, batch_size=BLOCK)


def _newton(problem, start, data, sharpness):
    """Levenberg's damping on Newton's steps: a step is taken only where it lowers the objective."""

    def step(carry, sharp):
        params, damping = carry
        value, gradient, hessian = problem.expand(params, data, sharp)
        scale = jnp.maximum(jnp.abs(jnp.diagonal(hessian)), 1e-8 * jnp.abs(hessian).max() + 1e-300)
        moved = params - solve_positive(hessian + damping * jnp.diag(scale), gradient)
        # An indefinite matrix gives NaN, which compares as no improvement: more damping.
        better = problem.objective(moved, data, sharp) <= value
        damping = jnp.where(better, damping * 0.2, damping * 8.0)
        return (jnp.where(better, moved, params), jnp.clip(damping, 1e-14, 1e10)), None

    (params, _), _ = jax.lax.scan(step, (start, jnp.asarray(1e-2)), sharpness)
    return params, problem.objective(params, data, sharpness[-1])


def solve_positive(matrix: Float[Array, "P P"], right: Float[Array, "P"]) -> Float[Array, "P"]:
    """Solves by Cholesky with the loops unrolled; NaN where the matrix is not positive definite."""
    size = matrix.shape[0]
    lower: list[list[Any]] = [[None] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i, j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = jnp.sqrt(rest) if i == j else rest / lower[j][j]
    forward: list[Any] = []
    for i in range(size):
        rest = right[i] - sum(lower[i][k] * forward[k] for k in range(i))
        forward.append(rest / lower[i][i])
    solution: list[Any] = [None] * size
    for i in reversed(range(size)):
        rest = forward[i] - sum(lower[k][i] * solution[k] for k in range(i + 1, size))
        solution[i] = rest / lower[i][i]
    return jnp.stack(solution)
