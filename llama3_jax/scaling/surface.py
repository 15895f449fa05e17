"""The loss as a surface over model size and tokens: L(N, D) = E + A / N^alpha + B / D^beta.

Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) fit it to log losses by a Huber loss. Two
things go wrong in public code and are mended here: a mean instead of a sum stops the optimiser
early (Besiroglu et al. 2024, arXiv 2404.10102), and one start may end in a bad minimum. So: the
sum, many starts, and a certificate that several of them reached the best minimum.

Shapes: B resamples, M runs, S starts.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llama3_jax.scaling.minimize import Minimum, Problem, minimize, minimize_batch, solve_positive

DELTA = 1e-3
STARTS = 256
# A resample starts from the lowest minima of the original fit, and from one random point.
RESAMPLE_MINIMA = 2
# The Huber threshold begins wide (least squares) and narrows to DELTA: few starts are then lost.
SHARPNESS = np.concatenate([np.geomspace(0.3, DELTA, 24), np.full(150, DELTA)])
RESAMPLE_SHARPNESS = np.concatenate([np.geomspace(0.02, DELTA, 10), np.full(50, DELTA)])


@dataclasses.dataclass(frozen=True)
class Surface:
    """Coefficients; arrays of one shape where they come from resamples."""

    E: np.ndarray
    A: np.ndarray
    B: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray

    def loss(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Predicted loss, nats per token."""
        with np.errstate(over="ignore"):
            return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def tokens_law(self, flops_per_pair: float) -> tuple[np.ndarray, np.ndarray]:
        """(exponent, coefficient) of the tokens that minimise L under C = flops_per_pair N D."""
        total = self.alpha + self.beta
        exponent = self.alpha / total
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (self.beta * self.B / (self.alpha * self.A)) ** (1 / total)
        return exponent, ratio * flops_per_pair**-exponent

    def coefficients(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def rows(self, index: slice | int | None) -> "Surface":
        """Some of several surfaces; `None` gives the leading axis to one."""
        return Surface(**{n: np.asarray(v)[index] for n, v in self.coefficients().items()})

    def joined(self, other: "Surface") -> "Surface":
        """The surfaces of both, in order."""
        return Surface(**{
            name: np.concatenate([value, getattr(other, name)])
            for name, value in self.coefficients().items()
        })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs to fit: parameters, tokens, losses, and a weight each (0 leaves one out)."""

    params: Float[np.ndarray, "M"]
    tokens: Float[np.ndarray, "M"]
    loss: Float[np.ndarray, "M"]
    weights: Float[np.ndarray, "M"]

    @property
    def centre(self) -> tuple[float, float]:
        """Mean logs: coefficients are fitted there, where they are least correlated."""
        return float(np.log(self.params).mean()), float(np.log(self.tokens).mean())

    def data(self) -> dict[str, np.ndarray]:
        n, d = self.centre
        return {
            "n": np.log(self.params) - n,
            "d": np.log(self.tokens) - d,
            "loss": self.loss,
            "weights": self.weights,
        }


# ------------------------------------------------------------------------ Huber loss of log losses


def huber_objective(params, data: Mapping, delta):
    """Sum of Huber losses of log residuals; params: log terms at the centre, log exponents."""
    a, b, e, log_alpha, log_beta = params
    terms = jnp.stack([
        a - jnp.exp(log_alpha) * data["n"],
        b - jnp.exp(log_beta) * data["d"],
        jnp.broadcast_to(e, data["n"].shape),
    ])  # fmt: skip
    residual = jax.nn.logsumexp(terms, axis=0) - jnp.log(data["loss"])
    size = jnp.abs(residual)
    huber = jnp.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    # A vanishing term leaves its exponent free; the faintest pull keeps it finite.
    return (data["weights"] * huber).sum() + 1e-12 * (params**2).sum()


HUBER = Problem(huber_objective)


def huber_starts(points: Points, count: int, seed: int = 0) -> np.ndarray:
    """Random splits of the mean loss among the three terms, random exponents."""
    rng = np.random.default_rng(seed)
    parts = np.log(rng.dirichlet([1.0, 1.0, 1.5], count)) + np.log(points.loss.mean())
    exponents = np.log(rng.uniform(0.05, 1.2, (count, 2)))
    return np.concatenate([parts, exponents], axis=1)


def leverage(fitted: Surface, points: Points) -> Float[np.ndarray, "M"]:
    """How far each run's own loss moves its fitted value, relatively: 0 to 1, summing to the rank.

    The diagonal of the hat matrix of the surface linearised in its five coefficients.
    """
    n, d = np.log(points.params), np.log(points.tokens)
    by_params = fitted.A * np.exp(-fitted.alpha * n)
    by_tokens = fitted.B * np.exp(-fitted.beta * d)
    # Centred, or a coefficient and its exponent are hard to tell apart in floating point.
    n, d = n - n.mean(), d - d.mean()
    slopes = np.stack([np.ones_like(n), by_params, by_tokens, n * by_params, d * by_tokens])
    relative = slopes / fitted.loss(points.params, points.tokens)
    scale = np.linalg.norm(relative, axis=1, keepdims=True)
    basis, kept, _ = np.linalg.svd((relative / np.where(scale > 0, scale, 1.0)).T, False)
    return (basis[:, kept > 1e-9 * kept[0]] ** 2).sum(axis=1)


def fit_huber(points: Points, starts: int = STARTS) -> tuple[Surface, Minimum]:
    """The surface at the lowest minimum over many starts, with its certificate."""
    found = minimize(HUBER, huber_starts(points, starts), points.data(), SHARPNESS)
    return _from_logs(found.params, points.centre), found


def refit_huber(
    points: Points, found: Minimum, loss_BM: np.ndarray, weights_BM: np.ndarray
) -> Surface:
    """Surfaces of resampled losses, each from the original minima and a random start."""
    starts = np.concatenate([found.distinct[:RESAMPLE_MINIMA], huber_starts(points, 1, seed=1)])
    batched = {"loss": loss_BM, "weights": weights_BM}
    best, _ = minimize_batch(HUBER, starts, points.data(), batched, RESAMPLE_SHARPNESS)
    return _from_logs(best.T, points.centre)


def _from_logs(params, centre: tuple[float, float]) -> Surface:
    a, b, e, log_alpha, log_beta = params
    alpha, beta = np.exp(log_alpha), np.exp(log_beta)
    with np.errstate(over="ignore"):
        A, B = np.exp(a + alpha * centre[0]), np.exp(b + beta * centre[1])
    return Surface(np.exp(e), A, B, alpha, beta)


# --------------------------------------------------------------- variable projection, squared loss

VARPRO_SHARPNESS = np.ones(40)  # steps; nothing to sharpen
RESAMPLE_VARPRO_SHARPNESS = np.ones(15)


_SUBSETS = np.array([[(chosen >> i) & 1 for i in range(3)] for chosen in range(1, 8)], float)


def _columns(exponents, data: Mapping):
    """The three terms of the surface with coefficients 1, at the centre."""
    alpha, beta = jnp.exp(exponents)
    return jnp.stack(
        [jnp.ones_like(data["n"]), jnp.exp(-alpha * data["n"]), jnp.exp(-beta * data["d"])]
    )


def _non_negative(columns, weights, target):
    """Least squares with three non-negative coefficients: the best of the 7 sets that may be > 0.

    Returns the coefficients, which of them are free, and the matrix of the normal equations.
    """
    gram = (columns * weights) @ columns.T
    right = (columns * weights) @ target

    def solve(keep):
        # A whiff of ridge: at an exponent near 0 a term equals the constant.
        matrix = gram * (keep[:, None] * keep) + jnp.diag(1 - keep + 1e-13 * jnp.diagonal(gram))
        solution = solve_positive(matrix, right * keep) * keep
        value = solution @ gram @ solution - 2 * right @ solution
        return solution, matrix, jnp.where((solution >= 0).all(), value, jnp.inf)

    subsets = jnp.asarray(_SUBSETS)
    solutions, matrices, values = jax.vmap(solve)(subsets)
    best = jnp.argmin(values)
    return solutions[best], subsets[best], matrices[best]


def varpro_objective(exponents, data: Mapping, _):
    """Sum of squared residuals over (log alpha, log beta), the rest solved for (Golub & Pereyra)."""
    columns = _columns(exponents, data)
    coefficients, _, _ = _non_negative(columns, data["weights"], data["loss"])
    residual = data["loss"] - coefficients @ columns
    return (data["weights"] * residual**2).sum() + _pull(data) * (exponents**2).sum()


def _pull(data: Mapping):
    """Where a term vanishes its exponent is free; the faintest pull keeps it finite."""
    return 1e-10 * (data["weights"] * data["loss"] ** 2).mean()


def varpro_derivatives(exponents, data: Mapping, _):
    """Kaufman's (1975) Gauss-Newton matrix: what the coefficients can follow is projected out."""
    columns, weights = _columns(exponents, data), data["weights"]
    coefficients, free, matrix = _non_negative(columns, weights, data["loss"])
    residual = data["loss"] - coefficients @ columns
    alpha, beta = jnp.exp(exponents)
    slopes = jnp.stack([
        -alpha * data["n"] * coefficients[1] * columns[1],
        -beta * data["d"] * coefficients[2] * columns[2],
    ])  # fmt: skip
    pull = _pull(data)
    across = (columns * weights) @ slopes.T * free[:, None]
    followed = jax.vmap(lambda right: solve_positive(matrix, right))(across.T)
    hessian = 2 * ((slopes * weights) @ slopes.T - followed @ across + pull * jnp.eye(2))
    gradient = -2 * (slopes * weights) @ residual + 2 * pull * exponents
    value = (weights * residual**2).sum() + pull * (exponents**2).sum()
    return value, gradient, hessian


VARPRO = Problem(varpro_objective, varpro_derivatives)


def fit_varpro(points: Points, starts: int = 64) -> tuple[Surface, Minimum]:
    """The surface by variable projection, over a grid of exponents."""
    side = np.log(np.geomspace(0.05, 1.5, round(starts**0.5)))
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    found = minimize(VARPRO, grid, points.data(), VARPRO_SHARPNESS)
    surface = _from_exponents(points, found.params[None], points.loss[None], points.weights[None])
    return surface.rows(0), found


def _tied_objective(exponent, data: Mapping, _):
    return varpro_objective(jnp.concatenate([exponent, exponent]), data, _)


TIED = Problem(_tied_objective)


def fit_tied(points: Points, starts: int = 32) -> tuple[Surface, Minimum]:
    """The surface with alpha = beta, for the few runs that determine four coefficients at most.

    Gadre et al. 2024 (arXiv 2403.08540) predict over-trained models with it from five runs.
    """
    grid = np.log(np.geomspace(0.05, 1.5, starts))[:, None]
    found = minimize(TIED, grid, points.data(), VARPRO_SHARPNESS)
    both = np.repeat(found.params, 2)[None]
    return _from_exponents(points, both, points.loss[None], points.weights[None]).rows(0), found


def refit_varpro(
    points: Points, found: Minimum, loss_BM: np.ndarray, weights_BM: np.ndarray
) -> Surface:
    """Surfaces of resampled losses."""
    starts = np.concatenate([found.distinct[:1], np.log([[0.3, 0.3]])])
    batched = {"loss": loss_BM, "weights": weights_BM}
    best, _ = minimize_batch(VARPRO, starts, points.data(), batched, RESAMPLE_VARPRO_SHARPNESS)
    return _from_exponents(points, best, loss_BM, weights_BM)


def _from_exponents(points: Points, exponents_B2, loss_BM, weights_BM) -> Surface:
    with jax.enable_x64(True):
        data = {k: jnp.asarray(v, jnp.float64) for k, v in points.data().items()}
        solve = jax.jit(jax.vmap(lambda x, y, w: _non_negative(_columns(x, data), w, y)[0]))
        E, A, B = np.asarray(
            solve(jnp.asarray(exponents_B2), jnp.asarray(loss_BM), jnp.asarray(weights_BM))
        ).T
    alpha, beta = np.exp(np.asarray(exponents_B2)).T
    n, d = points.centre
    with np.errstate(over="ignore", invalid="ignore"):
        return Surface(E, A * np.exp(alpha * n), B * np.exp(beta * d), alpha, beta)
