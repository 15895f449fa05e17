"""Accuracy of a model that was never trained, in two stages (Llama 3 paper, section 3.2.1).

First the normalised negative log-likelihood of the right answer as a function of training compute,
then accuracy as a sigmoid of it, fitted on the ladder and on stronger external models. Each stage
has its own runs and its own error; both are resampled, and the forecast carries the product. An
interval is of what the target run itself will show: it holds the error of the fits, as wide as few
runs ask (Student's t), and the noise of one more run.

Shapes: B resamples (the data first where "1 +" stands), M ladder runs, P checkpoints.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from llama3_jax.errors import UserError
from llama3_jax.scaling import surface
from llama3_jax.scaling.minimize import Problem, minimize, minimize_batch
from llama3_jax.scaling.surface import Points, Surface

FORMS = ("linear", "power", "surface")
COEFFICIENTS = {"linear": 2, "power": 3, "surface": 5}


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Ladder runs at their end (stage 1): NLL per character or byte of the right answer."""

    run: tuple[str, ...]
    params: Float[np.ndarray, "M"]
    tokens: Float[np.ndarray, "M"]
    flops: Float[np.ndarray, "M"]
    nll: Float[np.ndarray, "M"]

    def only(self, kept: Bool[np.ndarray, "M"]) -> "Ladder":
        run = tuple(name for name, keep in zip(self.run, kept, strict=True) if keep)
        return Ladder(run, *(getattr(self, n)[kept] for n in ("params", "tokens", "flops", "nll")))


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Pairs of NLL and accuracy (stage 2), with the run that each is of."""

    run: tuple[str, ...]
    nll: Float[np.ndarray, "P"]
    accuracy: Float[np.ndarray, "P"]

    def without(self, runs: set[str]) -> "Checkpoints":
        kept = np.array([name not in runs for name in self.run])
        names = tuple(name for name in self.run if name not in runs)
        return Checkpoints(names, self.nll[kept], self.accuracy[kept])


@dataclasses.dataclass(frozen=True)
class Target:
    params: float
    tokens: float
    flops: float


# -------------------------------------------------------------------------- stage 1: compute to NLL


def power_objective(params, data, delta):
    """Sum of log-Huber losses of NLL = E + A / C^alpha."""
    a, e, log_alpha = params
    terms = jnp.stack([a - jnp.exp(log_alpha) * data["c"], jnp.broadcast_to(e, data["c"].shape)])
    residual = jax.nn.logsumexp(terms, axis=0) - jnp.log(data["nll"])
    size = jnp.abs(residual)
    huber = jnp.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
    return huber.sum() + 1e-12 * (params**2).sum()


POWER = Problem(power_objective)


def predict_nll(
    form: str, ladder: Ladder, target: Target, resamples: int, seed: int
) -> tuple[Float[np.ndarray, "1+B"], dict[str, Any]]:
    """NLL of the target by the data, then as the target run may show it, and what was fitted.

    Raises:
      UserError: more coefficients than runs.
    """
    if len(ladder.run) < COEFFICIENTS[form]:
        raise UserError(
            f"form {form!r} has {COEFFICIENTS[form]} coefficients, the ladder {len(ladder.run)} runs"
        )
    fit = {"linear": _linear, "power": _power, "surface": _surface}[form]
    predicted, fitted, named = fit(ladder, target, resamples, seed)
    dof, noise = max(len(ladder.run) - COEFFICIENTS[form], 1), _noise(ladder, fitted, form)
    rng = np.random.default_rng(seed + 1)
    away = predicted[0] * _of_one_run(predicted[1:] / predicted[0] - 1, noise, dof, rng)
    return np.append(predicted[0], predicted[0] + away), {**named, "noise": noise, "dof": dof}


def _of_one_run(deviations: np.ndarray, noise: float, dof: int, rng: np.random.Generator):
    """Deviations of refits, and noise of one more run, on the scale of Student's t.

    Residuals with few degrees of freedom know their own size badly: sqrt(dof / chi^2_dof) says how
    badly. Drawing it with each resample makes of a normal distribution a t distribution, and lets
    two stages with degrees of freedom of their own be joined.
    """
    scale = np.sqrt(dof / rng.chisquare(dof, deviations.shape))
    return scale * (deviations + noise * rng.normal(size=deviations.shape))


def _resampled(ladder: Ladder, fitted: np.ndarray, form: str, count: int, seed: int) -> np.ndarray:
    """NLLs with normal noise of the residuals' size.

    Not residuals drawn anew: a robust fit of few runs passes through as many as it has coefficients,
    and residuals of exactly zero hold its refits where it is.
    """
    noise = _noise(ladder, fitted, form)
    return fitted * (1 + noise * np.random.default_rng(seed).normal(size=(count, len(fitted))))


def _noise(ladder: Ladder, fitted: np.ndarray, form: str) -> float:
    """Standard deviation of a run's relative noise."""
    dof = max(len(fitted) - COEFFICIENTS[form], 1)
    return float(np.sqrt(((ladder.nll / fitted - 1) ** 2).sum() / dof))


def _linear(ladder: Ladder, target: Target, resamples: int, seed: int):
    design = np.stack([np.ones(len(ladder.run)), np.log(ladder.flops)], axis=1)
    solve = np.linalg.pinv(design)
    own = solve @ ladder.nll
    drawn = _resampled(ladder, design @ own, "linear", resamples, seed)
    all_fits = np.concatenate([own[None], drawn @ solve.T])
    predicted = all_fits @ [1.0, np.log(target.flops)]
    return predicted, design @ own, {"intercept": own[0], "slope": own[1]}


def _power(ladder: Ladder, target: Target, resamples: int, seed: int):
    centre = np.log(ladder.flops).mean()
    data = {"c": np.log(ladder.flops) - centre}
    rng = np.random.default_rng(0)
    parts = np.log(rng.dirichlet([1.0, 1.0], 64)) + np.log(ladder.nll.mean())
    starts = np.concatenate([parts, np.log(rng.uniform(0.02, 1.0, (64, 1)))], axis=1)
    found = minimize(POWER, starts, {**data, "nll": ladder.nll}, surface.SHARPNESS)

    def value(params: np.ndarray, log_flops) -> np.ndarray:
        a, e, log_alpha = np.moveaxis(params, -1, 0)
        return np.exp(e) + np.exp(a - np.exp(log_alpha) * (log_flops - centre))

    fitted = value(found.params, np.log(ladder.flops))
    drawn = _resampled(ladder, fitted, "power", resamples, seed)
    again, _ = minimize_batch(
        POWER, found.distinct[:2], data, {"nll": drawn}, surface.RESAMPLE_SHARPNESS
    )
    predicted = value(np.concatenate([found.params[None], again]), np.log(target.flops))
    a, e, log_alpha = found.params
    alpha = np.exp(log_alpha)
    named = {"E": np.exp(e), "A": np.exp(a + alpha * centre), "alpha": alpha}
    return predicted, fitted, {**named, "certificate": found.certificate()}


def _surface(ladder: Ladder, target: Target, resamples: int, seed: int):
    points = Points(ladder.params, ladder.tokens, ladder.nll, np.ones(len(ladder.run)))
    own, found = surface.fit_huber(points)
    fitted = own.loss(ladder.params, ladder.tokens)
    drawn = _resampled(ladder, fitted, "surface", resamples, seed)
    again: Surface = surface.refit_huber(points, found, drawn, np.ones_like(drawn))
    predicted = own.rows(None).joined(again).loss(target.params, target.tokens)
    named = {name: float(v) for name, v in own.coefficients().items()}
    return predicted, fitted, {**named, "certificate": found.certificate()}


# ------------------------------------------------------------------------- stage 2: NLL to accuracy


def sigmoid_objective(params, data, _):
    """Sum of squares of accuracy = b - a / (1 + exp(-k (NLL - x0))), 0 < a, b < 1, k and x0 > 0."""
    residual = _sigmoid(params, data["nll"], jnp) - data["accuracy"]
    # In the flat of a logit's tail a parameter is free: hold it faintly.
    return (data["weights"] * residual**2).sum() + 1e-9 * (params**2).sum()


def _sigmoid(params, nll, library):
    a, log_x0, log_k, b = params
    x0, k = library.exp(log_x0), library.exp(log_k)

    def unit(x):
        return 0.5 * (1 + library.tanh(0.5 * x))

    return unit(b) - unit(a) * unit(k * (nll - x0))


SIGMOID = Problem(sigmoid_objective)
SIGMOID_STEPS = np.ones(120)
SIGMOID_COEFFICIENTS = 4


def fit_sigmoid(
    checkpoints: Checkpoints, resamples: int, seed: int, at_zero_loss: float | None = 1.0
) -> tuple[Float[np.ndarray, "1+B 4"], dict[str, Any]]:
    """Sigmoids of the data and of resampled runs (whole runs: their checkpoints are one draw).

    `at_zero_loss` is the accuracy at an NLL of 0, added as a point; None adds none.
    """
    nll, accuracy = checkpoints.nll, checkpoints.accuracy
    runs, of_run = np.unique(np.array(checkpoints.run), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), resamples)
    weights = counts[:, of_run].astype(float)
    if at_zero_loss is not None:
        nll, accuracy = np.append(nll, 0.0), np.append(accuracy, at_zero_loss)
        weights = np.append(weights, np.ones((resamples, 1)), axis=1)
    data = {"nll": nll, "accuracy": accuracy}
    starts = np.stack([
        rng.uniform(-1.5, 3, 48), np.log(rng.uniform(0.3, 1.5, 48) * np.median(nll)),
        np.log(rng.uniform(0.5, 8, 48)), rng.uniform(-1, 5, 48),
    ], axis=1)  # fmt: skip
    found = minimize(SIGMOID, starts, {**data, "weights": np.ones(len(nll))}, SIGMOID_STEPS)
    again, _ = minimize_batch(
        SIGMOID, found.distinct[:2], data, {"weights": weights}, SIGMOID_STEPS[:60]
    )
    a, log_x0, log_k, b = found.params
    named = {"a": -1 / (1 + np.exp(-a)), "x0": np.exp(log_x0), "k": np.exp(log_k),
             "b": 1 / (1 + np.exp(-b)), "certificate": found.certificate()}  # fmt: skip
    residual = checkpoints.accuracy - accuracy_at(found.params[None], checkpoints.nll)
    more = max(len(residual) - SIGMOID_COEFFICIENTS, 1)
    named["noise"] = np.sqrt((residual**2).sum() / more)
    named["runs"], named["dof"] = len(runs), max(len(runs) - SIGMOID_COEFFICIENTS, 1)
    return np.concatenate([found.params[None], again]), named


def accuracy_at(sigmoids: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """Accuracy of each sigmoid [B, 4] at its own NLL [B]."""
    return _sigmoid(sigmoids.T, nll, np)


def predict_accuracy(
    sigmoids: Float[np.ndarray, "1+B 4"], nll: Float[np.ndarray, "1+B"], fitted: dict[str, Any],
    seed: int,
) -> Float[np.ndarray, "1+B"]:  # fmt: skip
    """Accuracy of the target by the data, then as the target run may show it, through both stages.

    `sigmoids` and `fitted` are fit_sigmoid's, `nll` is predict_nll's.
    """
    own, each = accuracy_at(sigmoids[:1], nll), accuracy_at(sigmoids, nll)
    dof, runs = fitted["dof"], fitted["runs"]
    # Resampled runs fit the sample as closely as the data do: HC1 of MacKinnon & White (1985).
    deviations = (each - own)[1:] * np.sqrt(runs / dof)
    away = _of_one_run(deviations, fitted["noise"], dof, np.random.default_rng(seed))
    return np.append(own[0], np.clip(own[1:] + away, 0, 1))
