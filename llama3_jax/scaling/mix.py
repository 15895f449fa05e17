"""Laws from a mix of sources to losses, chosen by cross-validation that sees no test run.

The exponential law, L = c + exp(t . w), is that of Ye et al. 2024 (arXiv 2403.16952; on the simplex
its factor k is part of t). With runs of several sizes N it becomes L = c + exp(t . w) N^-gamma: a
mix scales the reducible loss, size shrinks it. Linear and tree laws stand beside it (Liu et al.
2024, arXiv 2407.01492, whose public code stops its trees early by the test set; here nothing but
training runs is ever looked at).

Shapes: R runs, S sources, T targets.
"""

import dataclasses
from typing import Protocol

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float
from sklearn.ensemble import HistGradientBoostingRegressor

from llama3_jax.errors import UserError

FOLDS = 5
STARTS = 4
# A faint pull of the exponential law's slopes towards their mean, against the variance of the losses.
RIDGE = 1e-3


def _exp(x: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(x, 50.0))


class Law(Protocol):
    """One target's loss as a function of weights [R, S] (and log sizes [R])."""

    def fit(
        self, weights_RS: np.ndarray, log_params_R: np.ndarray, loss_R: np.ndarray
    ) -> "Law": ...

    def predict(self, weights_RS: np.ndarray, log_params_R: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass
class Exponential:
    """L = c + exp(t . w - gamma log N); gamma is fitted where sizes differ."""

    c: float = 0.0
    t: np.ndarray | None = None
    gamma: float = 0.0
    centre: float = 0.0

    def fit(self, weights_RS, log_params_R, loss_R) -> "Exponential":
        sized, sources = np.ptp(log_params_R) > 0, weights_RS.shape[1]
        self.centre = float(log_params_R.mean())
        size = -(log_params_R - self.centre)[:, None]
        X = np.concatenate([weights_RS, size], axis=1) if sized else weights_RS
        # Rows that pull each slope of a source towards their mean.
        pull = np.zeros((sources, X.shape[1]))
        pull[:, :sources] = np.sqrt(RIDGE * loss_R.var()) * (np.eye(sources) - 1 / sources)

        def residual(p):
            return np.concatenate([p[0] + _exp(X @ p[1:]) - loss_R, pull @ p[1:]])

        def jacobian(p):
            rows = np.concatenate([_exp(X @ p[1:])[:, None] * X, pull])
            return np.concatenate(
                [np.r_[np.ones(len(X)), np.zeros(sources)][:, None], rows], axis=1
            )

        best = None
        for share in np.linspace(0.0, 0.9, STARTS):
            c = share * loss_R.min()
            slopes, *_ = np.linalg.lstsq(X, np.log(loss_R - c), rcond=None)
            found = scipy.optimize.least_squares(residual, np.r_[c, slopes], jac=jacobian)
            if best is None or found.cost < best.cost:
                best = found
        self.c, self.t = float(best.x[0]), best.x[1 : sources + 1]
        self.gamma = float(best.x[-1]) if sized else 0.0
        return self

    def predict(self, weights_RS, log_params_R):
        return self.c + np.exp(weights_RS @ self.t - self.gamma * (log_params_R - self.centre))


@dataclasses.dataclass
class Linear:
    """L = a . w - gamma log N, least squares."""

    coefficients: np.ndarray | None = None

    def fit(self, weights_RS, log_params_R, loss_R) -> "Linear":
        X = np.concatenate([weights_RS, log_params_R[:, None] - log_params_R.mean()], axis=1)
        self._centre = log_params_R.mean()
        self.coefficients, *_ = np.linalg.lstsq(X, loss_R, rcond=None)
        return self

    def predict(self, weights_RS, log_params_R):
        X = np.concatenate([weights_RS, log_params_R[:, None] - self._centre], axis=1)
        return X @ self.coefficients


@dataclasses.dataclass
class Trees:
    """Gradient-boosted trees; they stop early by runs split off the training runs."""

    model: HistGradientBoostingRegressor | None = None

    def fit(self, weights_RS, log_params_R, loss_R) -> "Trees":
        self.model = HistGradientBoostingRegressor(
            max_iter=300, learning_rate=0.1, min_samples_leaf=10, early_stopping=True,
            validation_fraction=0.15, n_iter_no_change=20, random_state=0,
        )  # fmt: skip
        self.model.fit(np.concatenate([weights_RS, log_params_R[:, None]], axis=1), loss_R)
        return self

    def predict(self, weights_RS, log_params_R):
        return self.model.predict(np.concatenate([weights_RS, log_params_R[:, None]], axis=1))


LAWS = {"exponential": Exponential, "linear": Linear, "trees": Trees}


@dataclasses.dataclass(frozen=True)
class MixRuns:
    """Runs of small models, each on its own mix. `params` are all 1 where no size is known."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    weights: Float[np.ndarray, "R S"]
    params: Float[np.ndarray, "R"]
    losses: Float[np.ndarray, "R T"]

    def log_params(self) -> np.ndarray:
        return np.log(self.params)


@dataclasses.dataclass
class MixLaw:
    """A law for each target, and how it was chosen: mean squared error of left-out runs."""

    name: str
    laws: list[Law]
    cross_validation: dict[str, dict[str, float]]

    def losses(self, weights_RS: np.ndarray, params: float = 1.0) -> Float[np.ndarray, "R T"]:
        sizes = np.full(len(weights_RS), np.log(params))
        return np.stack([law.predict(weights_RS, sizes) for law in self.laws], axis=1)


def fit_mix(runs: MixRuns, names: tuple[str, ...] = tuple(LAWS), seed: int = 0) -> MixLaw:
    """Fits the law of least cross-validated error, relative to each target's variance.

    Raises:
      UserError: too few runs to leave any out.
    """
    scores = cross_validate(runs, names, seed)
    best = min(scores, key=lambda name: scores[name]["error"])
    return MixLaw(best, fit_laws(runs, best), scores)


def fit_laws(runs: MixRuns, name: str) -> list[Law]:
    """One law a target, on all runs."""
    columns = runs.losses.T
    return [LAWS[name]().fit(runs.weights, runs.log_params(), loss) for loss in columns]


def cross_validate(
    runs: MixRuns, names: tuple[str, ...], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Share of variance unexplained in left-out folds, and Spearman's rank correlation there.

    A mix that several runs share (seeds, sizes) is in one fold only.

    Raises:
      UserError: fewer different mixes than coefficients.
    """
    mixes, of_mix = np.unique(np.round(runs.weights, 9), axis=0, return_inverse=True)
    of_mix = of_mix.reshape(-1)
    least = max(len(runs.sources) + 2, 2 * FOLDS)
    if len(mixes) < least:
        raise UserError(
            f"{len(mixes)} different mixes of {len(runs.sources)} sources; a law needs {least}"
        )
    fold = np.random.default_rng(seed).permutation(len(mixes))[of_mix] % FOLDS
    scores = {}
    for name in names:
        predicted = np.empty_like(runs.losses)
        for left in range(FOLDS):
            out = fold == left
            for target in range(len(runs.targets)):
                law = LAWS[name]().fit(
                    runs.weights[~out], runs.log_params()[~out], runs.losses[~out, target]
                )
                predicted[out, target] = law.predict(runs.weights[out], runs.log_params()[out])
        error = ((predicted - runs.losses) ** 2).mean(axis=0) / runs.losses.var(axis=0)
        scores[name] = {"error": float(error.mean()),
                        "spearman": float(rank_correlations(predicted, runs.losses).mean())}  # fmt: skip
    return scores


def rank_correlations(predicted_RT: np.ndarray, actual_RT: np.ndarray) -> Float[np.ndarray, "T"]:
    """Spearman's rank correlation of each target."""
    pairs = zip(predicted_RT.T, actual_RT.T, strict=True)
    return np.array([scipy.stats.spearmanr(p, a).statistic for p, a in pairs])


def rank_transfer(
    predicted_RT: np.ndarray, actual_RT: np.ndarray, level: float = 0.9, seed: int = 0
) -> dict[str, object]:
    """Do ranks by small models hold for large ones? Correlation of the mean loss, with interval.

    The interval is a bootstrap over mixes.
    """
    predicted, actual = predicted_RT.mean(axis=1), actual_RT.mean(axis=1)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(actual), (1000, len(actual)))
    values = [scipy.stats.spearmanr(predicted[d], actual[d]).statistic for d in draws]
    bounds = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return {
        "spearman": float(scipy.stats.spearmanr(predicted, actual).statistic),
        "ci": [float(v) for v in bounds],
        "by_target": [float(v) for v in rank_correlations(predicted_RT, actual_RT)],
        "mixes": len(actual),
    }
