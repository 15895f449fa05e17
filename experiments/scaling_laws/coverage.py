"""How often the intervals of `fit downstream` hold what a simulated target run shows.

    python -m experiments.scaling_laws.coverage --simulations=200

A made ladder (sizes by tokens per parameter, three checkpoints a run) with noise in NLL and
accuracy is fitted, a larger run is made with the same noise, and its NLL and accuracy are looked up
in the interval. In truth the NLL follows the form that is fitted and accuracy a sigmoid, so this
tests the statistics and not the forms.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from llama3_jax import cli
from llama3_jax.scaling.downstream import (
    COEFFICIENTS,
    FORMS,
    Checkpoints,
    Ladder,
    Target,
    fit_sigmoid,
    predict_accuracy,
    predict_nll,
)
from llama3_jax.scaling.isoflop import interval
from llama3_jax.scaling.surface import Surface

TASK = Surface(E=0.3, A=30.0, B=80.0, alpha=0.25, beta=0.24)
SHARES = (0.6, 0.8, 1.0)
TARGET = Target(7e9, 7e9 * 100, 6 * 7e9**2 * 100)
LEVEL = 0.9

FLAGS = flags.FLAGS


def nll_of(form: str, params, tokens):
    flops = 6 * params * tokens
    if form == "linear":
        return 2.9 - 0.04 * np.log(flops)
    if form == "power":
        return 0.3 + 50 * flops**-0.1
    return TASK.loss(params, tokens)


def accuracy_of(nll):
    return 0.98 - 0.7 / (1 + np.exp(-6.0 * (nll - 0.9)))


def simulate(form: str, runs: int, noise: float, seed: int, resamples: int) -> tuple[bool, bool]:
    """Whether the intervals of NLL and of accuracy hold the target run's."""
    rng = np.random.default_rng(seed)

    def shown(params, tokens):
        nll = nll_of(form, params, tokens) * np.exp(noise * rng.normal())
        return nll, accuracy_of(nll) + 0.5 * noise * rng.normal()

    ladder, pairs = [], []
    for number in range(runs):
        params = 2e8 * 2 ** (number % 4)
        tokens = params * 20 * 2 ** (number // 4)
        for share in SHARES:
            nll, accuracy = shown(params, tokens * share)
            pairs.append((str(number), nll, accuracy))
        ladder.append((str(number), params, tokens, 6 * params * tokens, nll))
    names, *columns = zip(*ladder, strict=True)
    of, x, y = zip(*pairs, strict=True)
    ladder = Ladder(names, *map(np.array, columns))
    nll, _ = predict_nll(form, ladder, TARGET, resamples, seed)
    checkpoints = Checkpoints(of, np.array(x), np.array(y))
    sigmoids, fitted = fit_sigmoid(checkpoints, resamples, seed, at_zero_loss=None)
    accuracy = predict_accuracy(sigmoids, nll, fitted, seed)
    outcome = shown(TARGET.params, TARGET.tokens)
    bounds = (interval(nll[1:], LEVEL), interval(accuracy[1:], LEVEL))
    return tuple(low <= value <= high for value, (low, high) in zip(outcome, bounds, strict=True))


def main(_) -> None:
    table = Table(title=f"{LEVEL:.0%} intervals, {FLAGS.simulations} simulations a row")
    for column in ("form", "runs", "dof", "NLL held", "accuracy held"):
        table.add_column(column, justify="right")
    for form in FLAGS.forms:
        for runs in map(int, FLAGS.runs):
            if runs <= COEFFICIENTS[form]:
                continue
            held = np.array([
                simulate(form, runs, FLAGS.noise, seed, FLAGS.resamples)
                for seed in range(FLAGS.simulations)
            ])  # fmt: skip
            nll, accuracy = held.mean(axis=0)
            row = (form, runs, runs - COEFFICIENTS[form], f"{nll:.1%}", f"{accuracy:.1%}")
            table.add_row(*map(str, row))
            print(*row, flush=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    flags.DEFINE_integer("simulations", 200, "Simulations a row.", lower_bound=1)
    flags.DEFINE_integer("resamples", 200, "Resamples of a forecast.", lower_bound=50)
    flags.DEFINE_multi_enum("forms", list(FORMS), FORMS, "Forms of the first stage.")
    flags.DEFINE_list("runs", ["6", "8", "12", "16"], "Sizes of the ladder.")
    flags.DEFINE_float("noise", 0.01, "Relative noise of an NLL; half of it is the accuracy's.")
    cli.run(main)
