"""Our fits beside the published ones, on the sweeps that experiments/scaling_laws/published.py reads.

    python -m experiments.scaling_laws.acceptance

Prints what tests assert, and what they don't: errors of the other forms and targets, good or bad.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from experiments.scaling_laws import published
from llama3_jax import cli
from llama3_jax.errors import UserError
from llama3_jax.scaling import isoflop
from llama3_jax.scaling.commands.common import console, table
from llama3_jax.scaling.downstream import accuracy_at, fit_sigmoid, predict_nll
from llama3_jax.scaling.forecast import Options, back_test
from llama3_jax.scaling.mix import LAWS, rank_correlations
from llama3_jax.scaling.surface import fit_tied


def porian() -> None:
    shown = table("Porian et al.: exponent of the compute-optimal size", "setting", "published",
                  "akima", "difference", "parabola", "difference", "wide-grid warnings")  # fmt: skip
    for name, runs, fit in published.porian():
        options = isoflop.Options(1e21, resamples=50, methods=("parabola", "akima"))
        found = isoflop.result(isoflop.fit_isoflop(runs, options))
        wide = sum(line.startswith("wide-grid") for line in found["warnings"])
        exponent = float(fit["n_exp_basic"])
        akima, parabola = (found["methods"][m]["params_alpha"] for m in ("akima", "parabola"))
        shown.add_row(name, f"{exponent:.4f}", f"{akima:.4f}", f"{akima - exponent:+.4f}",
                      f"{parabola:.4f}", f"{parabola - exponent:+.4f}", str(wide))  # fmt: skip
    console.print(shown)


def olmo() -> None:
    shown = table(
        "OLMo ladder: accuracy of 13B-5T, and 1.3B left out (errors of NLL and accuracy)", "task",
        "actual", "published", "ours", "difference", "objective / one start", "linear", "power",
        "surface",
    )  # fmt: skip
    for task, (prediction, actual) in published.olmo_predictions().items():
        ladder, checkpoints, targets = published.olmo(task)
        nll, fitted = predict_nll("surface", ladder, targets["13B-5T"], 50, 0)
        sigmoids, _ = fit_sigmoid(checkpoints, 50, 0)
        ours = float(accuracy_at(sigmoids[:1], nll[:1])[0])
        _, objective = published.one_start_surface(ladder)
        tests = (back_test(form, ladder, checkpoints, Options()) for form in
                 ("linear", "power", "surface"))  # fmt: skip
        errors = [f"{t['nll_error']:+.1%} {t['accuracy_error']:+.3f}" for t in tests]
        ratio = fitted["certificate"]["objective"] / objective
        shown.add_row(task, f"{actual:.4f}", f"{prediction:.4f}", f"{ours:.4f}",
                      f"{ours - prediction:+.4f}", f"{ratio:.5f}", *errors)  # fmt: skip
    console.print(shown)


def gadre() -> None:
    shown = table("Gadre et al.: loss on C4 of larger models from five runs", "trained on", "model",
                  "actual", "predicted", "error", left=2)  # fmt: skip
    for dataset in published.GADRE_TARGETS:
        points, targets = published.gadre(dataset)
        fit, _ = fit_tied(points)
        for name, (params, tokens, loss) in targets.items():
            predicted = float(fit.loss(params, tokens))
            shown.add_row(dataset, name, f"{loss:.4f}", f"{predicted:.4f}",
                          f"{predicted / loss - 1:+.2%}")  # fmt: skip
    console.print(shown)


def regmix() -> None:
    """Laws are fitted on the 512 training runs; the test runs are read after that."""
    train = published.regmix("train_1m")
    parts = ("test_1m", "test_60m", "test_1B")
    laws = {name: [LAWS[name]().fit(train.weights, train.log_params(), loss)
                   for loss in train.losses.T] for name in LAWS}  # fmt: skip
    shown = table("RegMix: rank correlation of 1M models' laws with larger models", "law", "target",
                  *parts, left=2)  # fmt: skip
    tests = [published.regmix(part) for part in parts]
    chosen = train.targets.index(published.REGMIX_TARGET)
    for name, own in laws.items():
        correlations = []
        for test in tests:
            predicted = np.stack([law.predict(test.weights, test.log_params()) for law in own], 1)
            correlations.append(rank_correlations(predicted, test.losses))
        shown.add_row(name, "Pile-CC", *(f"{c[chosen]:.4f}" for c in correlations))
        shown.add_row(name, "mean of 13", *(f"{c.mean():.4f}" for c in correlations))
    console.print(shown)


def main(_) -> None:
    if not published.DIRECTORY.is_dir():
        raise UserError(f"published sweeps are not in {published.DIRECTORY}; set "
                        "LLAMA3_JAX_SCALING_DATA to their directory")  # fmt: skip
    porian()
    olmo()
    gadre()
    regmix()


if __name__ == "__main__":
    cli.run(main)
